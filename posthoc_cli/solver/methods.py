"""Profiles in, weights and their diagnostics out; knows no files.

Algorithm 3 of the paper: the weighted sum of the snapshots' profiles shall be as near to the
target's profile as it can be in the L2 norm over training time. That is a linear system whose
matrix holds the profiles' inner products. The other way, `blup`, is in kriging.py: the weighted sum
of the snapshots shall be as near to the target as it can be expected to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.solver.profiles import Array, Profile, cosine, namespace, norm

if TYPE_CHECKING:
    from posthoc_cli.solver.blup import Trajectory

PROFILE_METHODS = ("edm2", "algorithm3")
"""Methods that go by the profiles alone. `edm2`: algorithm 3, rescaled to sum one, as the paper's
official code does. `algorithm3`: not rescaled, as in the paper's text."""

EMA_METHODS = (*PROFILE_METHODS, "blup")
"""Those for EMAs. `blup` also goes by how the network moved, and how coarsely it was stored."""

RAW_METHODS = ("share", "blup")
"""Those for raw checkpoints. `share`: the share of the target's profile that lies between a
checkpoint and the one before it."""

METHODS = (*EMA_METHODS, "share")
"""All methods."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SolvedWeights:
    """The weights that make the targets out of the snapshots, and how good they are.

    `weights` is [targets, snapshots]; `sum_of_weights`, `noise_gain` (2-norm of the weights: how
    much independent rounding noise of the snapshots is amplified) and `profile_error` (L2 distance
    between the wanted profile and the one the weights give, relative to the wanted one's norm) are
    [targets]; the last is NaN where a profile has no norm (gamma <= -1/2, or a raw checkpoint's).
    `condition_number` is that of the matrix solved, scaled to a unit diagonal; 1 for `share`, which
    solves none.
    """

    snapshots: tuple[Profile, ...]
    targets: tuple[Profile, ...]
    method: str
    weights: FloatArray
    sum_of_weights: FloatArray
    noise_gain: FloatArray
    profile_error: FloatArray
    condition_number: float


def solve(
    snapshots: Sequence[Profile],
    targets: Sequence[Profile],
    method: str = "edm2",
    device: str = "cpu",
    trajectory: Trajectory | None = None,
) -> SolvedWeights:
    """Weights, [targets, snapshots], that rebuild each target from the snapshots.

    `device` is where the system is solved: "cpu" (NumPy) or a torch device; float64 on either.
    `trajectory` is what kriging.fit gives; only `blup` needs it, and no other uses it.

    Raises ValueError when a snapshot was taken after a target's step or `trajectory` is missing;
    with the methods that go by the profiles alone, UsageError when one has no finite norm
    (gamma <= -1/2) and SnapshotError when two are too alike to be told apart. UsageError too when
    the method isn't one for raw checkpoints, and some are raw, or is only for them.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    if max(s.step for s in snapshots) > min(t.step for t in targets):
        raise ValueError("a snapshot was taken after the target's step")
    check_method(method, any(s.raw for s in snapshots), all(s.raw for s in snapshots))
    if method == "share":
        return _solve_share(snapshots, targets)
    if method == "blup":
        if trajectory is None:
            raise ValueError("method blup needs a trajectory")
        return _solve_blup(snapshots, targets, device, trajectory)
    lowest = min(profile.gamma for profile in (*snapshots, *targets))
    if lowest <= -0.5:
        raise UsageError(
            f"method='{method}'", f"has no weights for gamma {lowest:g}", "use method='blup'"
        )

    xp, step_i, gamma_i = _columns(snapshots, device)
    _, step_r, gamma_r = _columns(targets, device)
    # Scaled to unit diagonal, the matrix is far better conditioned than the plain inner products:
    # those span orders of magnitude between early and late snapshots.
    gram = cosine(step_i[:, None], gamma_i[:, None], step_i[None, :], gamma_i[None, :])
    wanted = cosine(step_i[:, None], gamma_i[:, None], step_r[None, :], gamma_r[None, :])
    try:
        scaled, condition_number = _solve_symmetric(xp, gram, wanted)
    except np.linalg.LinAlgError:
        raise _too_alike(snapshots, _to_numpy(gram)) from None
    weights = scaled * norm(step_r, gamma_r)[None, :] / norm(step_i, gamma_i)[:, None]
    if method == "edm2":
        total = xp.sum(weights, axis=0)
        weights = weights / total
        scaled = scaled / total

    error = _profile_error(xp, gram, wanted, scaled)
    return _solution(snapshots, targets, method, _to_numpy(weights.T), error, condition_number)


def check_method(method: str, some_raw: bool, all_raw: bool) -> None:
    """Raise UsageError unless `method` is one for snapshots of which some, or all, are raw."""
    if some_raw and method not in RAW_METHODS:
        raise UsageError(
            f"method='{method}'", "raw checkpoints have no profile", "use share or blup"
        )
    if method == "share" and not all_raw:
        raise UsageError(
            "method='share'", "is for raw checkpoints only", "add raw=True if they are"
        )


def _solve_share(snapshots: Sequence[Profile], targets: Sequence[Profile]) -> SolvedWeights:
    """Checkpoint k holds `(t_k^(gamma + 1) - t_(k-1)^(gamma + 1)) / t^(gamma + 1)` of the target.

    The last one also holds what lies after it, so that the weights sum to one.
    """
    steps = np.array([float(each.step) for each in snapshots])
    order = np.argsort(steps, kind="stable")
    steps = steps[order]
    weights = np.empty((len(targets), len(snapshots)))
    for row, target in zip(weights, targets, strict=True):
        ends = np.append(steps[:-1], float(target.step))
        before = np.append(0.0, steps[:-1])
        with np.errstate(divide="ignore", under="ignore"):
            # Neither powers of large steps nor differences of them: nothing overflows or cancels.
            left = np.exp((target.gamma + 1) * np.log(ends / target.step))
            row[order] = left * -np.expm1((target.gamma + 1) * np.log1p((before - ends) / ends))
    error = np.full(len(targets), np.nan)
    return _solution(snapshots, targets, "share", weights, error, 1.0)


def _solve_blup(
    snapshots: Sequence[Profile], targets: Sequence[Profile], device: str, trajectory: Trajectory
) -> SolvedWeights:
    from posthoc_cli.solver.blup import (
        predict,  # only here: the other methods shall start without it
    )

    xp, step_i, gamma_i = _columns(snapshots, device)
    _, step_r, gamma_r = _columns(targets, device)

    def to_device(array: FloatArray) -> Array:
        return xp.asarray(array, device=step_i.device)

    solved, condition_number = predict(trajectory, snapshots, targets, xp, to_device)
    error = np.full(len(targets), np.nan)
    every = (*snapshots, *targets)
    if min(each.gamma for each in every) > -0.5 and not any(each.raw for each in every):
        gram = cosine(step_i[:, None], gamma_i[:, None], step_i[None, :], gamma_i[None, :])
        wanted = cosine(step_i[:, None], gamma_i[:, None], step_r[None, :], gamma_r[None, :])
        norms = norm(step_i, gamma_i)[:, None] / norm(step_r, gamma_r)[None, :]
        error = _profile_error(xp, gram, wanted, solved.T * norms)
    return _solution(snapshots, targets, "blup", _to_numpy(solved), error, condition_number)


def _profile_error(xp: Any, gram: Array, wanted: Array, scaled: Array) -> FloatArray:
    """|target - sum| in units of |target|, [targets]; `scaled` [snapshots, targets]."""
    squared_error = 1 + xp.sum(scaled * (gram @ scaled - 2 * wanted), axis=0)
    # Rounding can leave a true zero just below it.
    error: FloatArray = np.sqrt(np.maximum(_to_numpy(squared_error), 0.0))
    return error


def _solution(
    snapshots: Sequence[Profile],
    targets: Sequence[Profile],
    method: str,
    weights: FloatArray,
    profile_error: FloatArray,
    condition_number: float,
) -> SolvedWeights:
    return SolvedWeights(
        snapshots=tuple(snapshots),
        targets=tuple(targets),
        method=method,
        weights=weights,
        sum_of_weights=weights.sum(axis=1),
        noise_gain=np.sqrt((weights**2).sum(axis=1)),
        profile_error=profile_error,
        condition_number=condition_number,
    )


def _solve_symmetric(xp: Any, matrix: Array, right: Array) -> tuple[Array, float]:
    """Solve `matrix @ x = right` for a symmetric positive definite matrix; also its condition.

    Raises LinAlgError when the matrix is singular to working precision.
    """
    values, vectors = xp.linalg.eigh(matrix)
    lowest, highest = float(values[0]), float(values[-1])
    if lowest <= highest * matrix.shape[0] * np.finfo(np.float64).eps:
        raise np.linalg.LinAlgError

    def solved(side: Array) -> Array:
        return vectors @ ((vectors.T @ side) / values[:, None])

    x = solved(right)
    x = x + solved(right - matrix @ x)  # one step of refinement takes out the rounding of eigh
    return x, highest / lowest


def _too_alike(snapshots: Sequence[Profile], gram: FloatArray) -> SnapshotError:
    """The error that names the two snapshots whose profiles are nearest to each other."""
    first, second = np.unravel_index(np.argmax(gram - np.eye(len(gram))), gram.shape)
    a, b = (
        f"step {snapshots[i].step:g}, sigma_rel {snapshots[i].sigma_rel:.6g}"
        for i in sorted((int(first), int(second)))
    )
    return SnapshotError(
        f"snapshots at {a} and {b}",
        "their profiles are too alike to be told apart",
        "leave one of them out with only=, or use method='blup'",
    )


def _columns(profiles: Sequence[Profile], device: str) -> tuple[Any, Array, Array]:
    """The array namespace of `device`, and the profiles' steps and exponents on it."""
    steps = [float(profile.step) for profile in profiles]
    gammas = [float(profile.gamma) for profile in profiles]
    if device == "cpu":
        return np, np.asarray(steps), np.asarray(gammas)
    import torch  # only here: it takes a second to import

    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    step, gamma = torch.tensor(steps, **options), torch.tensor(gammas, **options)
    return namespace(step), step, gamma


def _to_numpy(array: Array) -> FloatArray:
    if isinstance(array, np.ndarray):
        return array
    numpy_array: FloatArray = array.cpu().numpy()
    return numpy_array
