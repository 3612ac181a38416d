"""The trajectory that explains the snapshots' squared differences best; and how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from posthoc_cli.solver.arrays import FloatArray, distinct
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.quadrature import IntArray, quadrature, resolved
from posthoc_cli.solver.trajectory import (
    Jitter,
    Trajectory,
    alike,
    jitter_seen,
    moments,
    rounding_covariance,
)

INTERVALS = 64
"""Between few snapshots, intervals are cut so that there are about this many."""

LAGS = (0.0, 0.5, 2.0)
"""How long jitter lasts, in units of the snapshots' spacing; 0 is a single step."""

FIRST = 0.1
"""What jitter is given at first, as a part of what would explain all of the differences."""

SHORTER = 0.99
"""What each longer jitter is given of that: where the snapshots can't tell two apart, as raw ones
can't, it is the shorter, and not the one that the last digits favour."""

RELUCTANCE = 1e-4
"""What a factor of e in jitter's rate costs, down to LEAST of what would explain all of the
differences: there is none where the measures don't ask for it."""

LEAST = 1e-4

PARTS = 8
"""Of the run, in each of which jitter has one rate."""

SMOOTHNESS = 2.5e-3
"""What a bend of log q costs against the misfit of the measures; see docs/blup.md for how little
the result depends on it. A slope of the logarithm of jitter's rate costs as much."""

STEADINESS = 2.5e-4
"""The same for a slope: where the measures tell nothing, q is taken to go on as it was."""

FLOOR = 1e-12
"""The least rate, in units of the highest: below it sums of squares would lose it anyway."""

ALL_PAIRS = 64
"""With more snapshots than this the rates are fitted to some of their pairs."""

ENOUGH = 1e-5
"""The iteration ends when it gains less, as a part of what is left,"""

EXACT = 1e-6
"""or when the mean square of the logarithms is as small: a tenth of a per cent."""


def fit_trajectory(
    snapshots: Sequence[Average],
    differences: FloatArray,
    noise: FloatArray,
    squares: FloatArray,
) -> Trajectory:
    """Fit walk and jitter to `differences` [snapshots, snapshots], the mean squared ones.

    `E|s_i - s_j|^2 = M_ii + M_jj - 2 M_ij + nu_i + nu_j - 2 N_ij`, with M the moments and N the
    covariance of the rounding. The relative deviations count, all of them alike. `noise` and
    `squares` [snapshots] are the variance of each snapshot's rounding and the mean square of its
    values.
    """
    steps = np.array([float(each.step) for each in snapshots])
    saved = distinct([0.0], steps)
    cut = max(1, INTERVALS // (len(saved) - 1))
    snapshots, stairs = resolved(snapshots, float(saved[-1]))
    edges = np.interp(np.arange(cut * (len(saved) - 1) + 1) / cut, np.arange(len(saved)), saved)
    count = len(edges) - 1
    first, second = _pairs(steps)
    told = differences[first, second] > 0
    pairs = first[told], second[told]
    walk, after = _walk_design(snapshots, steps, edges, stairs, pairs)
    rates = np.full(count, 0.0 if len(snapshots) > 1 else np.nan)
    trajectory = Trajectory(edges, rates, noise, 0.0)
    moved = after @ rates
    if len(walk):
        part = np.arange(count) * min(PARTS, count) // count
        cell, spacing = trajectory.cell, np.quantile(np.diff(saved), 0.25)
        lags = dict.fromkeys(max(round(lag * spacing / cell), 1) * cell for lag in LAGS)
        designs, own = [walk], []
        for lag in lags:
            middles, weights, factors = jitter_seen(snapshots, saved, stairs, cell, lag)
            factors *= np.sqrt(weights)
            among = part[trajectory.at(middles)]
            grams = [(each := factors[:, among == at]) @ each.T for at in range(part[-1] + 1)]
            own.append(np.array([np.diagonal(gram) for gram in grams]))
            designs.append(np.stack([_apart(gram, *pairs) for gram in grams], axis=1))
        noises = noise[pairs[0]], noise[pairs[1]]
        (rates, *found), misfit = _smooth_rates(designs, differences[pairs], noises, cut)
        trajectory = Trajectory(
            edges,
            np.maximum(rates, FLOOR * rates.max()),
            noise,
            0.0,
            tuple(Jitter(lag, each[part]) for lag, each in zip(lags, found, strict=True)),
            misfit,
            white=float(found[0][-1] * own[0].sum(axis=0).max()),
        )
        trajectory = replace(trajectory, left_out=leave_out(trajectory, snapshots, differences))
        moved = after @ trajectory.rates + np.einsum("lps,lp->s", own, found)
    # The mean square of the weights before the walk: of the snapshots, less what they moved.
    start = np.maximum(np.mean(squares - noise - moved), 0.0)
    return replace(trajectory, start=float(start))


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


def _walk_design(
    snapshots: Sequence[Average],
    steps: FloatArray,
    edges: FloatArray,
    stairs: FloatArray,
    pairs: tuple[IntArray, IntArray],
) -> tuple[FloatArray, FloatArray]:
    """Integrals over each interval: of `(G_i - G_j)^2` [pairs, intervals], and of `(1 - G)^2`
    [snapshots, intervals]."""
    first, second = pairs
    # How many of the pairs differ in an interval: those of which one was taken after it.
    later = np.maximum(steps[first], steps[second])
    differing = len(later) - np.searchsorted(later[::-1], edges[:-1], side="right")
    design = np.zeros((len(first), len(edges) - 1))
    after = np.zeros((len(snapshots), len(edges) - 1))
    fine = distinct(edges, stairs)
    for pieces, weights, shares in quadrature(snapshots, fine):
        intervals = np.searchsorted(edges, fine[pieces], side="right") - 1
        after_them = np.einsum("pnm,nm->np", (1 - shares) ** 2, weights)
        shares = np.ascontiguousarray(np.swapaxes(shares * np.sqrt(weights), 0, 1))
        for interval, share, late in zip(intervals, shares, after_them, strict=True):
            after[:, interval] += late
            some = slice(differing[interval])
            apart = share.take(first[some], axis=0) - share.take(second[some], axis=0)
            design[some, interval] += np.einsum("pm,pm->p", apart, apart)
    return design, after


def _apart(gram: FloatArray, first: IntArray, second: IntArray) -> FloatArray:
    own = np.diagonal(gram)
    apart: FloatArray = np.maximum(own[first] + own[second] - 2 * gram[first, second], 0.0)
    return apart


def _smooth_rates(
    designs: Sequence[FloatArray],
    measured: FloatArray,
    noises: tuple[FloatArray, FloatArray],
    cut: int,
) -> tuple[list[FloatArray], float]:
    """The rates of each of `designs`, the walk's first, and the misfit.

    They are those whose differences `design @ rates + rounding` [pairs] are nearest to `measured`,
    and which are smooth: least squares of the logarithm of their ratio, plus what bends and slopes
    of log(rates) cost, by Levenberg and Marquardt's steps in log(rates). No rate is ever negative,
    and one that the measures say little of lies between its neighbours'. `cut` is the number of
    intervals between two snapshots' steps; bends are counted by those, not by intervals.
    """
    places = np.cumsum([0, *(each.shape[1] for each in designs)])
    count = int(places[1])
    bends = np.diff(np.eye(count), 2, axis=0) * cut**2
    slopes = np.diff(np.eye(count), 1, axis=0) * cut
    cost_of = np.zeros((places[-1], places[-1]))
    cost_of[:count, :count] = (
        SMOOTHNESS * bends.T @ bends + STEADINESS * slopes.T @ slopes
    ) / count
    for low, high in pairwise(places[1:]):
        slopes = np.diff(np.eye(high - low), 1, axis=0)
        cost_of[low:high, low:high] = SMOOTHNESS * slopes.T @ slopes / (high - low)
    design = np.concatenate(designs, axis=1) / measured[:, None]
    rounding = (noises[0] + noises[1]) / measured
    shared = 2 * np.sqrt(noises[0] * noises[1]) / measured

    left = np.maximum(1 - rounding, 1e-3)
    even = np.empty(places[-1])
    for low, high in pairwise(places):
        of_each = left / np.maximum(design[:, low:high].sum(axis=1), 1e-300)
        even[low:high] = np.quantile(of_each, 0.5)
    price = np.repeat([0.0, *(RELUCTANCE / (np.diff(places)[1:]))], np.diff(places))

    def cost(logs: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        apart = design @ np.exp(logs)
        correlation, slope = alike(apart, rounding)
        told = np.maximum(apart + rounding - shared * correlation, 1e-300)
        off = np.log(told)
        slope = (1 + slope * shared / np.maximum(rounding, 1e-300)) / told
        paid = price @ np.log1p(np.exp(logs) / (LEAST * even))
        return float(np.mean(off**2) + logs @ cost_of @ logs + paid), off, slope

    given = [1.0, *(FIRST * SHORTER**at for at in range(len(designs) - 1))]
    logs = np.log(even * np.repeat(given, np.diff(places)))
    now, off, slope = cost(logs)
    damping = 1e-2
    for _ in range(100):
        sloping = design * np.exp(logs) * slope[:, None]
        hessian = sloping.T @ sloping / len(off) + cost_of
        gradient = sloping.T @ off / len(off) + cost_of @ logs
        part = 1 / (1 + LEAST * even * np.exp(-logs))
        gradient += price * part / 2
        hessian += np.diag(price * part * (1 - part) / 2)
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
        if gained < ENOUGH * now or now < EXACT:
            break
    rates = np.exp(logs)
    return np.split(rates, places[1:-1]), float(np.sqrt(np.mean(off**2)))


def leave_out(
    trajectory: Trajectory, snapshots: Sequence[Average], differences: FloatArray
) -> float:
    """How much farther the snapshots are than expected from what the others tell of each.

    With B the inverse of the bordered system, `r_i = sum_j B_ij s_j / B_ii` is what snapshot i is
    off its prediction from the others, and `1 / B_ii` the square that is expected. The true one is
    `-1/2 c' D c`, with c the coefficients and D the squared differences. The root mean square of
    the ratios; NaN where too little is above the rounding of these numbers themselves.
    """
    known = moments(trajectory, snapshots, [])
    matrix = known + rounding_covariance(trajectory.noise, known)
    scale = np.sqrt(np.maximum(np.diagonal(matrix), 1e-300))
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    precision = np.finfo(np.float64).eps * len(values)
    if not values[0] > 4 * precision * values[-1]:
        values = np.maximum(values, 4 * precision * values[-1])
    inverse = (vectors / values) @ vectors.T / np.outer(scale, scale)
    ones = inverse.sum(axis=1)
    inverse -= np.outer(ones, ones) / ones.sum()
    own = np.diagonal(inverse)
    coefficients = inverse / np.where(own > 0, own, np.nan)[:, None]
    true = -np.einsum("ij,jk,ik->i", coefficients, differences, coefficients) / 2
    sizes = np.abs(coefficients)
    lost = 16 * precision * np.einsum("ij,jk,ik->i", sizes, differences, sizes)
    sure = true > lost  # False where it is NaN
    return float(np.sqrt(np.mean((true * own)[sure]))) if np.any(sure) else float("nan")
