"""Best linear unbiased prediction: weights from how the network moved, and any weights' error.

By the model of trajectory.py the error of weights w that sum to one is, in the mean square,

    sum over pieces of the movement of variance * (sum of w_i f_i - f_r)^2  +  w' N w,

with f the factors by which snapshots and target see a piece, and N the covariance of the snapshots'
rounding. docs/blup.md derives all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.solver.arrays import FloatArray, namespace, on_device, to_numpy
from posthoc_cli.solver.averages import Decay
from posthoc_cli.solver.chain_blup import chain_errors, chain_weights
from posthoc_cli.solver.chains import find_chains
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.trajectory import Trajectory, moments, rounding_covariance, seen

TINY = 1e-24
"""The least variance of a snapshot, in units of the largest, that the system is solved with."""


@dataclass(frozen=True, slots=True)
class ExpectedError:
    """Expected errors [targets], each a root mean square over the parameters.

    `approximation` is what is left with snapshots of infinite precision, `rounding` what their
    rounding adds, `total` both. `distance` is how far the target is from the network itself at its
    step: errors mean something relative to it.
    """

    approximation: FloatArray
    rounding: FloatArray
    total: FloatArray
    distance: FloatArray

    @property
    def relative(self) -> FloatArray:
        """`total` relative to `distance`; 0 where both are."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.total / self.distance
        relative: FloatArray = np.where(self.total == 0, 0.0, ratio)
        return relative


def blup_weights(
    trajectory: Trajectory,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    device: str = "cpu",
) -> tuple[FloatArray, float]:
    """The weights, [targets, snapshots], of least expected error; and the system's condition.

    `[M + N, 1; 1', 0] [w; m] = [k; 1]`, with M and k the moments of the snapshots with each other
    and with the target. Solved on `device`, "cpu" (NumPy) or torch's; float64. Where nothing is
    known of the walk, or there was none, it is taken to be even.
    """
    if not np.any(trajectory.rates > 0):
        trajectory = replace(trajectory, rates=np.ones_like(trajectory.rates))
    # Where the snapshots are farther from the model than it says, it isn't their rounding.
    trajectory = replace(trajectory, noise=trajectory.noise / trajectory.raised**2)
    if chains := find_chains(snapshots):
        return chain_weights(chains, snapshots, targets, trajectory)
    count = len(snapshots)
    found = moments(trajectory, snapshots, targets)
    known = found[:, :count]
    matrix = known + rounding_covariance(trajectory.noise, known)
    # A raw checkpoint of the last step has nothing on its diagonal but its rounding.
    own = np.diagonal(matrix)
    matrix[np.diag_indices(count)] = np.maximum(own, TINY * (float(own.max()) or 1.0))
    scale = np.sqrt(np.diagonal(matrix))
    matrix = on_device(matrix / np.outer(scale, scale), device)
    right = np.column_stack([found[:, count:], np.ones(count)]) / scale[:, None]
    xp, right = namespace(matrix), on_device(right, device)
    values, vectors = xp.linalg.eigh(matrix)
    # Of snapshots too alike to be told apart, the shortest weights: they share alike.
    least = 4 * np.finfo(np.float64).eps * float(values[-1])
    inverse = 1 / xp.where(values > least, values, xp.full_like(values, float("inf")))
    solved = to_numpy(vectors @ (inverse[:, None] * (vectors.T @ right))) / scale[:, None]
    best, ones = solved[:, :-1], solved[:, -1:]
    weights = best + ones * ((1 - best.sum(axis=0)) / ones.sum())
    weights = weights / weights.sum(axis=0)
    return weights.T, float(values[-1]) / max(float(values[0]), least)


def expected_error(
    trajectory: Trajectory,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    weights: FloatArray,
) -> ExpectedError:
    """The errors to be expected of `weights` [targets, snapshots], by whatever method.

    Weights that don't sum to one also scale the start; that counts as approximation.
    """
    return expected_errors(trajectory, snapshots, targets, [weights])[0]


def expected_errors(
    trajectory: Trajectory,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    several: Sequence[FloatArray],
) -> list[ExpectedError]:
    """The same of each of `several` weights for the same targets; hardly slower than of one."""
    excesses = [weights.sum(axis=1) - 1 for weights in several]
    for excess in excesses:
        excess[np.abs(excess) < 1e-12] = 0.0
    networks = [Decay(each.step, 0.0) for each in targets]
    if chains := find_chains(snapshots):
        made = list(zip(several, excesses, strict=True))
        found = chain_errors(chains, snapshots, targets, networks, trajectory, made)
        approximations, distance = found
        roundings = [weights**2 @ trajectory.noise for weights in several]
    else:
        count, end = len(snapshots), max(float(each.step) for each in targets)
        approximations, distance = np.zeros((len(several), len(targets))), np.zeros(len(targets))
        known = np.zeros((count, count))
        every = [*snapshots, *targets, *networks]
        for past, own, amounts, factors in seen(trajectory, every, end, targets):
            told = factors[:count]
            wanted, network = np.split(factors[count:], 2)
            known += (told * amounts) @ told.T
            for sums, weights, excess in zip(approximations, several, excesses, strict=True):
                sums += (weights @ told - wanted - past * excess[:, None]) ** 2 @ amounts
            distance += (wanted - own * network) ** 2 @ amounts
        covariance = rounding_covariance(trajectory.noise, known)
        roundings = [((weights @ covariance) * weights).sum(axis=1) for weights in several]
    raised = trajectory.raised
    errors = []
    for sums, rounding, excess in zip(approximations, roundings, excesses, strict=True):
        approximation = sums + excess**2 * trajectory.start
        errors.append(
            ExpectedError(
                raised * np.sqrt(approximation),
                raised * np.sqrt(rounding),
                raised * np.sqrt(approximation + rounding),
                np.sqrt(distance + trajectory.white),
            )
        )
    return errors
