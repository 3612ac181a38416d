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
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.solver.profiles import Profile

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

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
    """ExpectedError errors [targets], each a root mean square over the parameters.

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


# What a profile is. G(u) = (u / step)^(gamma + 1) before its step, 1 after it: on an interval in
# which no profile ends it is G(high) (u / high)^power. All that follows uses powers only.


# That of a raw checkpoint, whose gamma is infinite, is 0 before its step.


def _powers(high: float, steps: FloatArray, gammas: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Each profile's power on an interval that stops at `high`, and its G there, from below."""
    before = steps >= high
    raw = np.isinf(gammas)
    powers = np.where(before & ~raw, gammas + 1, 0.0)
    values = np.exp(powers * np.log(high / np.where(before, steps, high)))
    return powers, np.where(before & raw, 0.0, values)


def _integral(low: float, high: float, power: FloatArray) -> FloatArray:
    """`integral of (u / high)^power` from `low` to `high`, for power > -1; never a difference."""
    share = -np.expm1((power + 1) * np.log(low / high)) if low > 0 else 1.0
    integral: FloatArray = high * share / (power + 1)
    return integral


def _columns(profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
    steps = np.array([float(profile.step) for profile in profiles])
    return steps, np.array([float(profile.gamma) for profile in profiles])


# How the network moved


def fit(
    snapshots: Sequence[Profile],
    differences: FloatArray,
    noise: FloatArray,
    squares: FloatArray,
) -> Trajectory:
    """Fit the walk to `differences` [snapshots, snapshots], the mean squared ones.

    `E|s_i - s_j|^2 = sum over intervals of q_k * integral of (G_i - G_j)^2, + nu_i + nu_j`. The
    relative deviations count, all of them alike. `noise` and `squares` [snapshots] are the
    variance of each snapshot's rounding and the mean square of its values.
    """
    steps, gammas = _columns(snapshots)
    edges = np.unique([0.0, *steps])
    cut = max(1, INTERVALS // (len(edges) - 1))
    edges = np.interp(np.arange(cut * (len(edges) - 1) + 1) / cut, np.arange(len(edges)), edges)
    first, second = _pairs(len(snapshots))
    measured = differences[first, second]
    told = measured > 0
    first, second, measured = first[told], second[told], measured[told]
    rates = np.full(len(edges) - 1, 0.0 if len(snapshots) > 1 else np.nan)
    if len(measured):
        design = np.stack(
            [
                _squared_difference(low, high, steps, gammas, first, second)
                for low, high in pairwise(edges.tolist())
            ],
            axis=1,
        )
        rounding = (noise[first] + noise[second]) / measured
        rates = _smooth_rates(design / measured[:, None], rounding, cut)
    trajectory = Trajectory(edges, rates, noise, 0.0)
    return Trajectory(edges, rates, noise, _start(trajectory, snapshots, squares))


def _pairs(count: int) -> tuple[IntArray, IntArray]:
    """All pairs of few snapshots; of many, each with those at growing distances from it."""
    first, second = np.triu_indices(count, 1)
    if count > ALL_PAIRS:
        kept = list(range(1, 9))
        while kept[-1] < count:
            kept.append(kept[-1] * 5 // 4)
        chosen = np.isin(second - first, kept)
        first, second = first[chosen], second[chosen]
    return first, second


def _squared_difference(
    low: float,
    high: float,
    steps: FloatArray,
    gammas: FloatArray,
    first: IntArray,
    second: IntArray,
) -> FloatArray:
    """`integral of (G_i - G_j)^2` from `low` to `high`, for pairs of profiles."""
    powers, values = _powers(high, steps, gammas)
    own = values**2 * _integral(low, high, 2 * powers)
    both = values[first] * values[second] * _integral(low, high, powers[first] + powers[second])
    return np.maximum(own[first] + own[second] - 2 * both, 0.0)


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

    def cost(logs: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        parts = design * np.exp(logs)
        modelled = parts.sum(axis=1) + rounding
        off = np.log(modelled)
        return float(np.mean(off**2) + logs @ cost_of @ logs), off, parts / modelled[:, None]

    left = np.maximum(1 - rounding, 1e-3)
    logs = np.full(count, np.log(np.median(left / np.maximum(design.sum(axis=1), 1e-300))))
    now, off, slope = cost(logs)
    damping = 1e-2
    for _ in range(100):
        hessian = slope.T @ slope / len(off) + cost_of
        gradient = slope.T @ off / len(off) + cost_of @ logs
        ridge = np.diagonal(hessian) + 1e-12
        while damping < 1e9:
            change = np.linalg.solve(hessian + np.diag(damping * ridge), -gradient)
            trial = logs + np.clip(change, -3.0, 3.0)
            then, then_off, then_slope = cost(trial)
            if then < now:
                break
            damping *= 4
        else:
            break
        gained = now - then
        logs, now, off, slope = trial, then, then_off, then_slope
        damping = max(damping / 5, 1e-9)
        if gained < 1e-8 * now:
            break
    rates = np.exp(logs)
    floored: FloatArray = np.maximum(rates, FLOOR * rates.max())
    return floored


def _start(trajectory: Trajectory, snapshots: Sequence[Profile], squares: FloatArray) -> float:
    """The mean square of the weights before the walk: of the snapshots, less what they walked."""
    steps, gammas = _columns(snapshots)
    walked = np.zeros(len(snapshots))
    for low, high, rate in _intervals(trajectory, steps.max()):
        powers, values = _powers(high, steps, gammas)
        walked += rate * (
            (high - low)
            - 2 * values * _integral(low, high, powers)
            + values**2 * _integral(low, high, 2 * powers)
        )
    return float(np.maximum(np.mean(squares - trajectory.noise - walked), 0.0))


def _intervals(
    trajectory: Trajectory, end: float, cuts: Sequence[float] = ()
) -> list[tuple[float, float, float]]:
    """(low, high, rate), from 0 to `end`, with further `cuts`."""
    edges = np.unique([*trajectory.edges, *cuts, end])
    edges = edges[edges <= end]
    at = np.searchsorted(trajectory.edges, edges[:-1], side="right") - 1
    rates = trajectory.rates[np.minimum(at, len(trajectory.rates) - 1)]
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), rates.tolist(), strict=True))


# Weights


def predict(
    trajectory: Trajectory,
    snapshots: Sequence[Profile],
    targets: Sequence[Profile],
    xp: Any = np,
    to_device: Any = np.asarray,
) -> tuple[Any, float]:
    """The weights, [targets, snapshots], of least expected error; and the system's condition.

    `[K + diag(nu), 1; 1', 0] [w; m] = [k; 1]` with `K_ij = integral of q G_i G_j`, `k_i = integral
    of q G_i G_r`. Solved where `to_device` puts arrays, in the namespace `xp`; float64. Where
    nothing is known of the walk, or there was none, it is taken to be even.
    """
    if not np.any(trajectory.rates > 0):
        even = np.ones_like(trajectory.rates)
        trajectory = Trajectory(trajectory.edges, even, trajectory.noise, trajectory.start)
    every = [*snapshots, *targets]
    count = len(snapshots)
    moments = _moments(trajectory, every)
    matrix = moments[:count, :count] + np.diag(trajectory.noise)
    # A raw checkpoint of the last step has nothing on its diagonal but its rounding.
    own = np.diagonal(matrix)
    matrix[np.diag_indices(count)] = np.maximum(own, TINY * (float(own.max()) or 1.0))
    scale = np.sqrt(np.diagonal(matrix))
    matrix = to_device(matrix / np.outer(scale, scale))
    right = to_device(np.column_stack([moments[:count, count:], np.ones(count)]) / scale[:, None])
    values, vectors = xp.linalg.eigh(matrix)
    # Of snapshots too alike to be told apart, the shortest weights: they share alike.
    least = 4 * np.finfo(np.float64).eps * float(values[-1])
    inverse = 1 / xp.where(values > least, values, xp.full_like(values, float("inf")))
    solved = vectors @ (inverse[:, None] * (vectors.T @ right)) / to_device(scale)[:, None]
    best, ones = solved[:, :-1], solved[:, -1:]
    weights = best + ones * ((1 - xp.sum(best, axis=0)) / xp.sum(ones))
    weights = weights / xp.sum(weights, axis=0)
    return weights.T, float(values[-1]) / max(float(values[0]), least)


def _moments(trajectory: Trajectory, profiles: Sequence[Profile]) -> FloatArray:
    """`integral of q G_i G_j` from 0 to the last step, for all pairs.

    One pass along the steps keeps, for each pair of exponents, the integral of `q (u / e)^power` up
    to the edge e: enough for every pair of profiles with those exponents.
    """
    steps, gammas = _columns(profiles)
    end = float(steps.max())
    distinct, kind = np.unique(np.append(gammas + 1, 0.0), return_inverse=True)
    zero, kind = kind[-1], kind[:-1]
    sums = distinct[:, None] + distinct[None, :]
    running = np.zeros_like(sums)
    # What is wanted of it at each profile's step: with its own exponent, and with none.
    own, plain = np.empty((len(steps), len(distinct))), np.empty((len(steps), len(distinct)))
    for low, high, rate in _intervals(trajectory, end, steps.tolist()):
        if low > 0:
            running = running * np.exp(sums * np.log(low / high))
        running = running + rate * _integral(low, high, sums)
        for at in np.flatnonzero(steps == high):
            own[at], plain[at] = running[kind[at]], running[zero]
    row, column = np.indices((len(steps), len(steps)))
    swapped = steps[column] < steps[row]
    earlier, other = np.where(swapped, column, row), np.where(swapped, row, column)
    # Up to the earlier step both are powers, then one of them is 1, and in the end both.
    powers = np.where(np.isinf(gammas), 0.0, gammas + 1)  # a raw one has nothing to shrink
    shrink = np.exp(powers[other] * np.log(steps[earlier] / steps[other]))
    both, one = own[earlier, kind[other]], plain[earlier, kind[other]]
    rest, tail = plain[other, kind[other]], running[zero, zero] - plain[other, zero]
    moments: FloatArray = (both - one) * shrink + rest + tail
    return moments


# Errors


def expected_error(
    trajectory: Trajectory,
    snapshots: Sequence[Profile],
    targets: Sequence[Profile],
    weights: FloatArray,
) -> ExpectedError:
    """The errors to be expected of `weights` [targets, snapshots], by whatever method.

    Weights that don't sum to one also scale the start; that counts as approximation.
    """
    approximation = np.zeros(len(targets))
    distance = np.zeros(len(targets))
    steps, gammas = _columns(snapshots)
    ends, exponents = _columns(targets)
    excess = weights.sum(axis=1) - 1
    excess[np.abs(excess) < 1e-12] = 0.0
    for at in range(len(targets)):
        approximation[at] = excess[at] ** 2 * trajectory.start
        step, gamma = np.append(steps, ends[at]), np.append(gammas, exponents[at])
        factors = np.append(weights[at], -1.0)
        for low, high, rate in _intervals(trajectory, float(ends[at])):
            powers, values = _powers(high, step, gamma)
            # Between edges the error of the profile is a sum of a few powers.
            terms, which = np.unique(np.append(powers, 0.0), return_inverse=True)
            amounts = np.bincount(which, np.append(factors * values, -excess[at]))
            squared = amounts @ _integral(low, high, terms[:, None] + terms[None, :]) @ amounts
            approximation[at] += rate * max(float(squared), 0.0)
            own = values[-1] ** 2 * _integral(low, high, 2 * powers[-1:])
            distance[at] += rate * float(own[0])
    rounding = weights**2 @ trajectory.noise
    return ExpectedError(
        np.sqrt(approximation),
        np.sqrt(rounding),
        np.sqrt(approximation + rounding),
        np.sqrt(distance),
    )
