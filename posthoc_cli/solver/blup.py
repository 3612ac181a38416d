"""Best linear unbiased prediction: weights from how the network moved, and any weights' error.

The trajectory is modelled as an unknown start plus a random walk, whose variance rate q(u) is
fitted to the squared differences between the snapshots. Of a profile, all that counts is `F(u)`,
the share of its average that lies after `u`: a step of the walk at `u` enters the average with that
factor. Weights that sum to one cancel the start, and then

    error of the weights w  =  integral of q (F_r - sum of w_i F_i)^2  +  sum of w_i^2 nu_i,

with nu_i the variance of snapshot i's rounding. docs/blup.md derives all of it.

With a sum of one, F can be replaced by `G = 1 - F`, the share before `u`. That is what is computed
with: where the network moved most, near the beginning, G is tiny and F all but one, so that with G
nothing cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.solver.arrays import FloatArray, namespace, on_device, to_numpy
from posthoc_cli.solver.chain_blup import chain_errors, chain_weights
from posthoc_cli.solver.chains import find_chains
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.quadrature import NODES, IntArray, quadrature

INTERVALS = 64
"""Between few snapshots, intervals are cut so that there are about this many."""

SMOOTHNESS = 2.5e-3
"""What a bend of log q costs against the misfit of the measures; see docs/blup.md for how little
the result depends on it."""

STEADINESS = 2.5e-4
"""The same for a slope: where the measures tell nothing, q is taken to go on as it was."""

FLOOR = 1e-12
"""The least rate, in units of the highest: below it sums of squares would lose it anyway."""

TINY = 1e-24
"""The least variance of a snapshot, in units of the largest, that the system is solved with."""

ALL_PAIRS = 64
"""With more snapshots than this the rates are fitted to some of their pairs."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How the network moved, per parameter.

    The variance rate is `rates[k]` from step `edges[k]` to `edges[k + 1]`, and the last one after
    it; all zero when the network didn't move, NaN when nothing tells. `noise` [snapshots] is the
    variance of each snapshot's rounding, `start` the mean square of the first weights.
    """

    edges: FloatArray
    rates: FloatArray
    noise: FloatArray
    start: float


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


# Integrals


def _intervals(
    trajectory: Trajectory, profiles: Sequence[Average], end: float
) -> tuple[FloatArray, FloatArray]:
    """Edges from 0 to `end`, with the trajectory's and all steps among them; the rates between."""
    edges = np.unique([*trajectory.edges, *(float(each.step) for each in profiles), end])
    edges = edges[edges <= end]
    at = np.searchsorted(trajectory.edges, edges[:-1], side="right") - 1
    return edges, trajectory.rates[np.minimum(at, len(trajectory.rates) - 1)]


# How the network moved


def fit_trajectory(
    snapshots: Sequence[Average],
    differences: FloatArray,
    noise: FloatArray,
    squares: FloatArray,
) -> Trajectory:
    """Fit the walk to `differences` [snapshots, snapshots], the mean squared ones.

    `E|s_i - s_j|^2 = sum over intervals of q_k * integral of (G_i - G_j)^2, + nu_i + nu_j`. The
    relative deviations count, all of them alike. `noise` and `squares` [snapshots] are the
    variance of each snapshot's rounding and the mean square of its values.
    """
    steps = np.array([float(each.step) for each in snapshots])
    edges = np.unique([0.0, *steps])
    cut = max(1, INTERVALS // (len(edges) - 1))
    edges = np.interp(np.arange(cut * (len(edges) - 1) + 1) / cut, np.arange(len(edges)), edges)
    first, second = _pairs(steps)
    measured = differences[first, second]
    told = measured > 0
    first, second, measured = first[told], second[told], measured[told]
    # How many of the pairs differ in an interval: those of which one was taken after it.
    later = np.maximum(steps[first], steps[second])
    differing = len(later) - np.searchsorted(later[::-1], edges[:-1], side="right")
    design = np.zeros((len(measured), len(edges) - 1))
    after = np.zeros((len(snapshots), len(edges) - 1))  # integrals of (1 - G)^2
    for intervals, weights, shares in quadrature(snapshots, edges):
        after_them = np.einsum("pnm,nm->np", (1 - shares) ** 2, weights)
        shares = np.ascontiguousarray(np.swapaxes(shares * np.sqrt(weights), 0, 1))
        for interval, share, late in zip(intervals, shares, after_them, strict=True):
            after[:, interval] += late
            pairs = slice(differing[interval])
            apart = share.take(first[pairs], axis=0) - share.take(second[pairs], axis=0)
            design[pairs, interval] += np.einsum("pm,pm->p", apart, apart)
    rates = np.full(len(edges) - 1, 0.0 if len(snapshots) > 1 else np.nan)
    if len(measured):
        rounding = (noise[first] + noise[second]) / measured
        rates = _smooth_rates(design / measured[:, None], rounding, cut)
    # The mean square of the weights before the walk: of the snapshots, less what they walked.
    start = np.maximum(np.mean(squares - noise - after @ rates), 0.0)
    return Trajectory(edges, rates, noise, float(start))


def _pairs(steps: FloatArray) -> tuple[IntArray, IntArray]:
    """All pairs of few snapshots, of many each with those at growing distances; latest first."""
    count = len(steps)
    first, second = np.triu_indices(count, 1)
    if count > ALL_PAIRS:
        kept = list(range(1, 9))
        while kept[-1] < count:
            kept.append(kept[-1] * 5 // 4)
        chosen = np.isin(second - first, kept)
        first, second = first[chosen], second[chosen]
    order = np.argsort(-np.maximum(steps[first], steps[second]), kind="stable")
    return first[order], second[order]


def _smooth_rates(design: FloatArray, rounding: FloatArray, cut: int) -> FloatArray:
    """The rates whose `design @ rates + rounding` are nearest to 1, and which are smooth.

    Least squares of log(design @ rates + rounding), plus what bends and slopes of log(rates) cost,
    by Levenberg and Marquardt's steps in log(rates): no rate is ever negative, and one that the
    measures say little of lies between its neighbours'. `cut` is the number of intervals between
    two snapshots' steps; bends are counted by those, not by intervals.
    """
    count = design.shape[1]
    bends = np.diff(np.eye(count), 2, axis=0) * cut**2
    slopes = np.diff(np.eye(count), 1, axis=0) * cut
    cost_of = (SMOOTHNESS * bends.T @ bends + STEADINESS * slopes.T @ slopes) / count

    def cost(logs: FloatArray) -> tuple[float, FloatArray]:
        off = np.log(design @ np.exp(logs) + rounding)
        return float(np.mean(off**2) + logs @ cost_of @ logs), off

    left = np.maximum(1 - rounding, 1e-3)
    logs = np.full(count, np.log(np.median(left / np.maximum(design.sum(axis=1), 1e-300))))
    now, off = cost(logs)
    damping = 1e-2
    for _ in range(100):
        slope = design * np.exp(logs)
        slope *= np.exp(-off)[:, None]
        hessian = slope.T @ slope / len(off) + cost_of
        gradient = slope.T @ off / len(off) + cost_of @ logs
        ridge = np.diagonal(hessian) + 1e-12
        while damping < 1e9:
            change = np.linalg.solve(hessian + np.diag(damping * ridge), -gradient)
            trial = logs + np.clip(change, -3.0, 3.0)
            then, then_off = cost(trial)
            if then < now:
                break
            damping *= 4
        else:
            break
        gained = now - then
        logs, now, off = trial, then, then_off
        damping = max(damping / 5, 1e-9)
        if gained < 1e-8 * now:
            break
    rates = np.exp(logs)
    floored: FloatArray = np.maximum(rates, FLOOR * rates.max())
    return floored


# Weights


def blup_weights(
    trajectory: Trajectory,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    device: str = "cpu",
) -> tuple[FloatArray, float]:
    """The weights, [targets, snapshots], of least expected error; and the system's condition.

    `[K + diag(nu), 1; 1', 0] [w; m] = [k; 1]` with `K_ij = integral of q G_i G_j`, `k_i = integral
    of q G_i G_r`. Solved on `device`, "cpu" (NumPy) or torch's; float64. Where nothing is known of
    the walk, or there was none, it is taken to be even.
    """
    if not np.any(trajectory.rates > 0):
        trajectory = replace(trajectory, rates=np.ones_like(trajectory.rates))
    if chains := find_chains(snapshots):
        end = max(float(each.step) for each in targets)
        edges, rates = _intervals(trajectory, [*snapshots, *targets], end)
        return chain_weights(chains, snapshots, targets, edges, rates, trajectory.noise)
    count = len(snapshots)
    moments = _moments(trajectory, snapshots, targets)
    matrix = moments[:, :count] + np.diag(trajectory.noise)
    # A raw checkpoint of the last step has nothing on its diagonal but its rounding.
    own = np.diagonal(matrix)
    matrix[np.diag_indices(count)] = np.maximum(own, TINY * (float(own.max()) or 1.0))
    scale = np.sqrt(np.diagonal(matrix))
    matrix = on_device(matrix / np.outer(scale, scale), device)
    right = np.column_stack([moments[:, count:], np.ones(count)]) / scale[:, None]
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


def _moments(
    trajectory: Trajectory, snapshots: Sequence[Average], targets: Sequence[Average]
) -> FloatArray:
    """`integral of q G_i G_j` to the last step, [snapshots, snapshots and targets]."""
    every = [*snapshots, *targets]
    edges, rates = _intervals(trajectory, every, max(float(each.step) for each in every))
    moments = np.zeros((len(snapshots), len(every)))
    for interval, weights, shares in quadrature(every, edges):
        shares = shares * np.sqrt(weights * rates[interval, None])
        flat = shares.reshape(len(every), -1)
        moments += flat[: len(snapshots)] @ flat.T
    return moments


# Errors


def expected_error(
    trajectory: Trajectory,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    weights: FloatArray,
) -> ExpectedError:
    """The errors to be expected of `weights` [targets, snapshots], by whatever method.

    Weights that don't sum to one also scale the start; that counts as approximation.
    """
    excess = weights.sum(axis=1) - 1
    excess[np.abs(excess) < 1e-12] = 0.0
    ends = np.array([float(each.step) for each in targets])
    edges, rates = _intervals(trajectory, [*snapshots, *targets], ends.max())
    approximation = excess**2 * trajectory.start
    distance = np.zeros(len(targets))
    if chains := find_chains(snapshots):
        found = chain_errors(chains, snapshots, targets, edges, rates, weights, excess)
        approximation, distance = approximation + found[0], found[1]
    else:
        for interval, node_weights, shares in quadrature([*snapshots, *targets], edges):
            known, wanted = np.split(shares.reshape(len(shares), -1), [len(snapshots)])
            amounts = (node_weights * rates[interval, None]).ravel()
            # A target's error ends where the target does.
            within = np.repeat(edges[interval + 1], NODES) <= ends[:, None]
            off = weights @ known - wanted - excess[:, None]
            approximation += np.where(within, off**2, 0.0) @ amounts
            distance += np.where(within, wanted**2, 0.0) @ amounts
    rounding = weights**2 @ trajectory.noise
    return ExpectedError(
        np.sqrt(approximation),
        np.sqrt(rounding),
        np.sqrt(approximation + rounding),
        np.sqrt(distance),
    )
