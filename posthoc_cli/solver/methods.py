"""Profiles in, weights and their diagnostics out; knows no files.

Algorithm 3 of the paper: the weighted sum of the snapshots' profiles shall be as near to the
target's profile as it can be in the L2 norm over training time. That is a linear system whose
matrix holds the profiles' inner products. The other way, `blup`, is in blup.py: the weighted sum of
the snapshots shall be as near to the target as it can be expected to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from posthoc_cli.errors import SnapshotError, UsageError, either
from posthoc_cli.solver.arrays import Array, FloatArray, namespace, on_device, to_numpy
from posthoc_cli.solver.chains import algorithm3_weights, closest, find_chains, profile_error
from posthoc_cli.solver.overlaps import overlaps
from posthoc_cli.solver.profiles import Average, Profile, cosine, norm

if TYPE_CHECKING:
    from posthoc_cli.solver.trajectory import Trajectory


Profiles = Sequence[Average]


@dataclass(frozen=True)
class SolvedWeights:
    """The weights that make the targets out of the snapshots, and how good they are.

    `weights` is [targets, snapshots]; `sum_of_weights`, `noise_gain` (2-norm of the weights: how
    much independent rounding noise of the snapshots is amplified) and `profile_error` (L2 distance
    between the wanted profile and the one the weights give, relative to the wanted one's norm) are
    [targets]; the last is NaN where a profile has no norm (gamma <= -1/2, or a raw checkpoint's).
    `condition_number` is that of the matrix solved, scaled to a unit diagonal (an estimate for a
    band, as chains.py solves); 1 for `share`, which solves none.
    """

    snapshots: tuple[Average, ...]
    targets: tuple[Average, ...]
    method: str
    weights: FloatArray
    sum_of_weights: FloatArray
    noise_gain: FloatArray
    profile_error: FloatArray
    condition_number: float


Weights = tuple[FloatArray, FloatArray, float]
"""`weights`, `profile_error` and `condition_number` of SolvedWeights."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to find weights.

    `help` says in a line what they are. `weights(snapshots, targets, device, trajectory)` finds
    them, from the profiles alone or, with `needs_values`, also from the trajectory that was fitted
    to the snapshots' values. `takes_emas` and `takes_raw` say which snapshots it can weigh.
    """

    name: str
    help: str
    weights: Callable[[Profiles, Profiles, str, Trajectory | None], Weights]
    needs_values: bool = False
    takes_emas: bool = True
    takes_raw: bool = False


def methods_for(raw: bool) -> tuple[str, ...]:
    """The methods for raw checkpoints, or for EMAs: first those that need the profiles alone."""
    every = [each for each in METHODS.values() if (each.takes_raw if raw else each.takes_emas)]
    return tuple(each.name for each in sorted(every, key=lambda each: each.needs_values))


DEFAULT = "blup"
"""The method when none is asked for."""


def plain_method(raw: bool) -> str:
    """The first that goes by the profiles alone: what DEFAULT is held against, and gives way to."""
    return methods_for(raw)[0]


def solve(
    snapshots: Profiles,
    targets: Profiles,
    method: str = "edm2",
    device: str = "cpu",
    trajectory: Trajectory | None = None,
) -> SolvedWeights:
    """Weights, [targets, snapshots], that rebuild each target from the snapshots.

    `device` is where the system is solved: "cpu" (NumPy) or a torch device; float64 on either. That
    of very many snapshots is small, and always solved on the CPU.
    `trajectory` is what blup.fit_trajectory gives, for a method that needs values.

    Raises ValueError when the method is unknown, a snapshot was taken after a target's step or
    `trajectory` is missing; with the methods that go by the profiles alone, UsageError when one has
    no finite norm (gamma <= -1/2) and SnapshotError when two are too alike to be told apart.
    UsageError too when the method isn't one for these snapshots, raw or not.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    if max(s.step for s in snapshots) > min(t.step for t in targets):
        raise ValueError("a snapshot was taken after the target's step")
    check_method(method, any(s.raw for s in snapshots), all(s.raw for s in snapshots))
    chosen = METHODS[method]
    if chosen.needs_values and trajectory is None:
        raise ValueError(f"method {method} needs a trajectory")
    weights, profile_error, condition = chosen.weights(snapshots, targets, device, trajectory)
    return SolvedWeights(
        snapshots=tuple(snapshots),
        targets=tuple(targets),
        method=method,
        weights=weights,
        sum_of_weights=weights.sum(axis=1),
        noise_gain=np.sqrt((weights**2).sum(axis=1)),
        profile_error=profile_error,
        condition_number=condition,
    )


def solve_apart(
    snapshots: Profiles,
    targets: Profiles,
    together: int,
    method: str,
    device: str,
    trajectory: Trajectory | None,
) -> SolvedWeights:
    """The same, the first `together` targets at once and each other one alone.

    Its weights are then, to the last bit, those that it has where nothing else is wanted.
    """
    apart = [targets[:together], *([target] for target in targets[together:])]
    parts = [solve(snapshots, each, method, device, trajectory) for each in apart]

    def joined(field: str) -> FloatArray:
        return np.concatenate([getattr(part, field) for part in parts])

    return replace(
        parts[0],
        targets=tuple(targets),
        weights=joined("weights"),
        sum_of_weights=joined("sum_of_weights"),
        noise_gain=joined("noise_gain"),
        profile_error=joined("profile_error"),
    )


def choose_method(method: str | None, snapshots: Profiles) -> str:
    """The method, by default DEFAULT; raises UsageError where it doesn't fit the snapshots."""
    some_raw = any(each.raw for each in snapshots)
    all_raw = some_raw and all(each.raw for each in snapshots)
    if method is None:
        return DEFAULT
    if method not in METHODS:
        raise UsageError("method=", f"'{method}' is not known", f"choose {either(METHODS)}")
    check_method(method, some_raw, all_raw)
    return method


def check_method(method: str, some_raw: bool, all_raw: bool) -> None:
    """Raise UsageError unless `method` is one for snapshots of which some, or all, are raw."""
    if some_raw and not METHODS[method].takes_raw:
        remedy = f"use {' or '.join(methods_for(raw=True)) if all_raw else 'blup'}"
        raise UsageError(f"method='{method}'", "raw checkpoints have no profile", remedy)
    if not all_raw and not METHODS[method].takes_emas:
        remedy = "use blup" if some_raw else "add raw=True if they are"
        raise UsageError(f"method='{method}'", "is for raw checkpoints only", remedy)


def _algorithm3(
    method: str, snapshots: Profiles, targets: Profiles, device: str, *_: object
) -> Weights:
    gammas = [each.gamma for each in (*snapshots, *targets) if isinstance(each, Profile)]
    if (lowest := min(gammas, default=0.0)) <= -0.5:
        raise UsageError(
            f"method='{method}'", f"has no weights for gamma {lowest:g}", "use method='blup'"
        )
    weights, error = np.empty((len(targets), len(snapshots))), np.empty(len(targets))
    conditions = []
    for group in _alike(targets):
        some = [targets[at] for at in group]
        weights[group], error[group], condition = _weights_of(method, snapshots, some, device)
        conditions.append(condition)
    return weights, error, max(conditions)


def _alike(targets: Profiles) -> list[list[int]]:
    """The places of the power functions among the targets, and of the others; if any.

    Apart, so that what a target's weights are doesn't depend on which others there are.
    """
    kinds = [isinstance(each, Profile) for each in targets]
    groups = ([at for at, one in enumerate(kinds) if one is kind] for kind in (True, False))
    return [group for group in groups if group]


def _weights_of(method: str, snapshots: Profiles, targets: Profiles, device: str) -> Weights:
    if chains := find_chains(snapshots):
        wished = powers(targets)
        if wished is None or powers(snapshots) is None:
            raise UsageError(
                f"method='{method}'",
                f"of {len(snapshots):,} snapshots it knows power functions only",
                "use method='blup'",
            )
        try:
            return algorithm3_weights(chains, wished, rescaled=method == "edm2")
        except np.linalg.LinAlgError:
            raise _too_alike(snapshots, closest(chains, wished)) from None
    # Scaled to unit diagonal, the matrix is far better conditioned than the plain inner products:
    # those span orders of magnitude between early and late snapshots.
    gram, wanted, norm_i, norm_r = _inner_products(snapshots, targets, device)
    try:
        scaled, condition_number = _solve_symmetric(gram, wanted)
    except np.linalg.LinAlgError:
        cosines = to_numpy(gram) - np.eye(len(snapshots))
        first, second = np.unravel_index(np.argmax(cosines), cosines.shape)
        raise _too_alike(snapshots, (int(first), int(second))) from None
    weights = scaled * norm_r / norm_i
    if method == "edm2":
        total = namespace(weights).sum(weights, axis=0)
        weights = weights / total
        scaled = scaled / total
    return to_numpy(weights.T), _profile_error(gram, wanted, scaled), condition_number


def powers(averages: Profiles) -> Sequence[Profile] | None:
    """The same where all are power functions, else None."""
    profiles = [each for each in averages if isinstance(each, Profile)]
    return profiles if len(profiles) == len(averages) else None


def _share(snapshots: Profiles, targets: Profiles, *_: object) -> Weights:
    """Checkpoint k holds `G(t_k) - G(t_(k-1))` of the target's share G.

    The first one also holds what lies on the start, the last one what lies after it, so that the
    weights sum to one.
    """
    steps = np.array([float(each.step) for each in snapshots])
    order = np.argsort(steps, kind="stable")
    steps = steps[order]
    weights = np.empty((len(targets), len(snapshots)))
    for row, target in zip(weights, targets, strict=True):
        ends = np.append(steps[:-1], float(target.step))
        before = np.append(0.0, steps[:-1])
        held = target.between(before, ends)
        held[0] += target.share(before[0])
        row[order] = held
    return weights, np.full(len(targets), np.nan), 1.0


def _blup(
    snapshots: Profiles, targets: Profiles, device: str, trajectory: Trajectory | None
) -> Weights:
    from posthoc_cli.solver.blup import blup_weights  # only here: the others start without it

    assert trajectory is not None
    weights, condition_number = blup_weights(trajectory, snapshots, targets, device)
    error = np.full(len(targets), np.nan)
    for group in _alike(targets):
        some = [targets[at] for at in group]
        gammas = [each.gamma for each in (*snapshots, *some) if isinstance(each, Profile)]
        if min(gammas, default=0.0) > -0.5 and not any(each.raw for each in snapshots):
            error[group] = _error_of(snapshots, some, weights[group], device)
    return weights, error, condition_number


def _error_of(
    snapshots: Profiles, targets: Profiles, weights: FloatArray, device: str
) -> FloatArray:
    if chains := find_chains(snapshots):
        wished = powers(targets)
        if wished is None or powers(snapshots) is None:
            return np.full(len(targets), np.nan)
        return profile_error(chains, wished, weights)
    gram, wanted, norm_i, norm_r = _inner_products(snapshots, targets, device)
    return _profile_error(gram, wanted, on_device(weights.T, device) * (norm_i / norm_r))


_BLUP = "the least error to be expected, by a sample of the snapshots' values"
_SHARE = "the share of the EMA that each checkpoint stands for"
_ALL = (
    Method("edm2", "the weights sum to one, as in the paper's code", partial(_algorithm3, "edm2")),
    Method(
        "algorithm3", "not rescaled, as in the paper's text", partial(_algorithm3, "algorithm3")
    ),
    Method("blup", _BLUP, _blup, needs_values=True, takes_raw=True),
    Method("share", _SHARE, _share, takes_emas=False, takes_raw=True),
)
METHODS = {each.name: each for each in _ALL}
"""All methods, by name."""


def _inner_products(
    snapshots: Profiles, targets: Profiles, device: str
) -> tuple[Array, Array, Array, Array]:
    """Cosines of the snapshots' profiles with each other and with the targets', and their norms.

    [snapshots, snapshots], [snapshots, targets], [snapshots, 1] and [1, targets], on `device`. Of
    power functions the integrals, as in the paper; where there are others, sums over all steps.
    """
    # They know the paper's profiles, which are smooth.
    snapshots = [each.smooth if isinstance(each, Profile) else each for each in snapshots]
    known, wished = powers(snapshots), powers(targets)
    if known is None or wished is None:
        products = overlaps([*snapshots, *targets], [*snapshots, *targets])
        scale = np.sqrt(np.diagonal(products))
        cosines = on_device(products / np.outer(scale, scale), device)
        norms, count = on_device(scale, device), len(snapshots)
        gram, wanted = cosines[:count, :count], cosines[:count, count:]
        return gram, wanted, norms[:count, None], norms[None, count:]
    step_i, step_r = (on_device([p.step for p in each], device) for each in (known, wished))
    gamma_i, gamma_r = (on_device([p.gamma for p in each], device) for each in (known, wished))
    step_i, gamma_i = step_i[:, None], gamma_i[:, None]
    return (
        cosine(step_i, gamma_i, step_i.T, gamma_i.T),
        cosine(step_i, gamma_i, step_r[None, :], gamma_r[None, :]),
        norm(step_i, gamma_i),
        norm(step_r, gamma_r)[None, :],
    )


def _profile_error(gram: Array, wanted: Array, scaled: Array) -> FloatArray:
    """|target - sum| in units of |target|, [targets]; `scaled` [snapshots, targets]."""
    squared_error = 1 + namespace(gram).sum(scaled * (gram @ scaled - 2 * wanted), axis=0)
    # Rounding can leave a true zero just below it.
    error: FloatArray = np.sqrt(np.maximum(to_numpy(squared_error), 0.0))
    return error


def _solve_symmetric(matrix: Array, right: Array) -> tuple[Array, float]:
    """Solve `matrix @ x = right` for a symmetric positive definite matrix; also its condition.

    Raises LinAlgError when the matrix is singular to working precision.
    """
    values, vectors = namespace(matrix).linalg.eigh(matrix)
    lowest, highest = float(values[0]), float(values[-1])
    if lowest <= highest * matrix.shape[0] * np.finfo(np.float64).eps:
        raise np.linalg.LinAlgError

    def solved(side: Array) -> Array:
        return vectors @ ((vectors.T @ side) / values[:, None])

    x = solved(right)
    x = x + solved(right - matrix @ x)  # one step of refinement takes out the rounding of eigh
    return x, highest / lowest


def _too_alike(snapshots: Profiles, pair: tuple[int, int]) -> SnapshotError:
    a, b = (f"step {snapshots[i].step:g}, {snapshots[i]}" for i in sorted(pair))
    return SnapshotError(
        f"snapshots at {a} and {b}",
        "their profiles are too alike to be told apart",
        "leave one of them out with only=, or use method='blup'",
    )
