"""Where to evaluate a noisy metric next, and where its best is: a search over log length.

Everything minimises. A point is `(length,)`, or `(length, step)` where steps are searched too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from posthoc_cli.tuning.process import Belief, FloatArray, IntArray, fit

Point = tuple[float, ...]

FINE, COARSE, MOST_STEPS, NEAR = 65, 49, 12, 16
"""Lengths of the grid where the curve is believed; with steps fewer, and up to so many steps; and
lengths beside the best, to each side, between it and the grid."""
SPREAD, MARGIN = 1.6449, 1.2816
"""Standard deviations within which a normal variable is with a probability of 0.9: to both sides,
and to one."""
NO_GAIN = 1e-9
"""In standard deviations of the values: by less than that nothing lowers the minimum."""
SAME, ENOUGH = 1e-3, 0.5
"""Of the range: points that are no other; of the gain: what a point tells that tells as much."""
STEEP = 5.0
"""In differences between the least and the middle of the range: where steepness begins to count."""


@dataclass(frozen=True, slots=True)
class Space:
    """The lengths from `low` to `high`, searched in log; with `steps` also which of these."""

    low: float
    high: float
    steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Observation:
    """The metric at a point: less is better."""

    point: Point
    value: float


@dataclass(frozen=True)
class Posterior:
    """What is known of the curve.

    `best` is where the mean of the curve is least and `value` the mean there; the true best length
    and its value lie in the `interval` and the `value_interval` with a probability of 0.9. `noise`
    is the standard deviation of one evaluation, `depth` how far the mean goes up from its least.
    `at_edge`: the best is the lowest or highest length that was asked for. `flat`: the depth can't
    be told from noise.
    """

    space: Space
    observations: tuple[Observation, ...]
    best: Point
    value: float
    interval: tuple[float, float]
    value_interval: tuple[float, float]
    noise: float
    depth: float
    at_edge: Literal["low", "high"] | None
    flat: bool

    @property
    def width(self) -> float:
        """Of the interval of the best length, in log: 0.1 is about 10 %."""
        return math.log(self.interval[1] / self.interval[0])

    def curve(self, points: Sequence[Point]) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the curve at `points`; not of an evaluation there."""
        belief, units = _believe(self.space, self.observations, _unit(self.space, points))
        deviation = np.sqrt(np.maximum(np.diag(belief.covariance), 0.0))
        return units.back(belief.mean), deviation * units.slope(belief.mean)


def first_points(space: Space, count: int = 7) -> list[Point]:
    """`count` lengths evenly spaced in log, both ends among them; the steps spread over them."""
    at = np.linspace(0.0, 1.0, count) if count > 1 else np.full(count, 0.5)
    lengths = space.low * (space.high / space.low) ** at
    if not space.steps:
        return [(float(length),) for length in lengths]
    # Multiples of the golden ratio are spread evenly, however many of them are taken.
    order = np.argsort(np.argsort((np.arange(count) * 0.6180339887498949) % 1.0))
    chosen = np.rint((order + 0.5) / count * len(space.steps) - 0.5).astype(int)
    return [
        (float(length), float(sorted(space.steps)[each]))
        for length, each in zip(lengths, chosen, strict=True)
    ]


def suggest(
    space: Space,
    observations: Sequence[Observation],
    pending: Sequence[Point] = (),
    count: int = 1,
) -> list[Point]:
    """The `count` points to evaluate next, while those `pending` are still being evaluated.

    Each is where a value is expected to lower the minimum of the curve's mean most: the expected
    improvement for noisy values, also called knowledge gradient. Where no value is expected to
    lower it, as when a metric without noise has told where its best is, it is where the curve is
    known least. Of what was measured already another value is asked for only where no point beside
    it tells about as much. A point that is pending or was just chosen counts as if its value had
    come out as expected. The same input gives the same points.
    """
    grid = _grid(space)
    belief, _ = _believe(space, observations, grid)
    covariance = belief.covariance
    for point in pending:
        at = int(np.abs(grid - _unit(space, [point])).sum(axis=1).argmin())
        covariance = _told(covariance, at, belief.noise)
    there = _unit(space, [*(each.point for each in observations), *pending])
    away = np.abs(grid[:, None] - there).max(axis=2)  # [G, N]
    new: npt.NDArray[np.bool_] = np.asarray(away.min(axis=1, initial=1.0) > SAME)
    found = []
    for _ in range(count):
        gains = _gains(belief.mean, covariance, belief.noise)
        if gains.max() <= NO_GAIN:
            gains = np.diag(covariance)
        others = np.where(new, gains, 0.0)
        at = int((others if others.max() > ENOUGH * gains.max() else gains).argmax())
        new[at] = False
        covariance = _told(covariance, at, belief.noise)
        found.append(_point(space, grid[at]))
    return found


# Nodes and weights of the expectation over a normal variable.
_Z, _P = np.polynomial.hermite_e.hermegauss(11)


def _gains(mean: FloatArray, covariance: FloatArray, noise: float) -> FloatArray:
    """By how much a value at each point of the grid is expected to lower the mean's minimum."""
    moves = covariance / np.sqrt(np.maximum(np.diag(covariance), 0.0) + noise + 1e-12)
    lowest = np.stack([(mean[:, None] + z * moves).min(axis=0) for z in _Z])
    gains: FloatArray = mean.min() - _P @ lowest / _P.sum()
    return gains


def _told(covariance: FloatArray, at: int, noise: float) -> FloatArray:
    """The covariance after a value at `at` that is just what was expected."""
    column = covariance[:, at]
    told: FloatArray = covariance - np.outer(column, column) / (column[at] + noise + 1e-12)
    return told


def posterior(space: Space, observations: Sequence[Observation]) -> Posterior:
    """What is known after `observations`.

    The interval holds each length of which it isn't known with a probability of 0.9 that it is
    worse than the best. As nothing is better than the true best, that is among them as surely.
    """
    grid = _grid(space)
    best = _least(grid, _believe(space, observations, grid)[0].mean)
    near = np.tile(best, (2 * NEAR + 1, 1))
    near[:, 0] = np.clip(best[0] + np.linspace(-1.0, 1.0, len(near)) / COARSE, 0.0, 1.0)
    points = np.concatenate([best[None], near, grid])
    belief, units = _believe(space, observations, points)
    mean, covariance = belief.mean, belief.covariance
    variances = np.maximum(np.diag(covariance), 0.0)
    apart = np.sqrt(np.maximum(variances + variances[0] - 2 * covariance[0], 0.0))
    lengths, at = np.unique(points[:, 0], return_inverse=True)
    worse = np.full(len(lengths), np.inf)  # above 0: than the best, at any step
    np.minimum.at(worse, at, mean - mean[0] - MARGIN * apart)
    good = np.flatnonzero(worse <= 0)

    def end(inner: int, outer: int) -> float:
        pair = [inner, outer if 0 <= outer < len(lengths) else inner]
        return _point(space, [np.interp(0.0, worse[pair], lengths[pair])])[0]

    ends = mean[0] + math.sqrt(variances[0]) * np.array([-SPREAD, 0.0, SPREAD])
    lowest, value, highest = units.back(ends).tolist()
    depth = float(np.ptp(units.back(mean)))
    noise = math.sqrt(belief.noise) * float(units.slope(mean[:1])[0])
    return Posterior(
        space,
        tuple(observations),
        _point(space, best),
        value,
        (end(good[0], good[0] - 1), end(good[-1], good[-1] + 1)),
        (lowest, highest),
        noise,
        depth,
        "low" if best[0] < 0.01 else "high" if best[0] > 0.99 else None,
        depth < 2 * noise,
    )


def _least(grid: FloatArray, curve: FloatArray) -> FloatArray:
    """Where `curve` [G] is least, [D]; between lengths by a parabola through three.

    Where it is as low at several, in their middle.
    """
    low = np.flatnonzero(curve <= curve.min() + 1e-12 * np.ptp(curve))
    at = int(low[(len(low) - 1) // 2])
    found: FloatArray = grid[at].copy()
    around = slice(max(at - 1, 0), at + 2)
    lengths = grid[around, 0]
    if len(lengths) == 3 and lengths[0] < lengths[1] < lengths[2]:
        left, _, right = curve[around] - curve[at]
        if left + right > 0:
            shift = (left - right) / (2 * (left + right))
            found[0] += np.clip(shift, -0.5, 0.5) * (lengths[2] - lengths[1])
    return found


class _Units:
    """Between the units of the metric and those of the belief, in which values are about 1.

    Far from the best a metric may rise steeply, and no smooth curve is steep in one place alone: of
    what lies above the middle of the range only the logarithm counts.
    """

    def __init__(self, x: FloatArray, values: FloatArray) -> None:
        order = np.argsort(x[:, 0], kind="stable")
        even = np.interp(np.linspace(0.0, 1.0, 101), x[order, 0], values[order])
        self.start = float(np.median(even))
        least = float(even.min())
        self.width = STEEP * (self.start - least) or 1.0
        self.middle, self.scale = 0.0, 1.0
        inner = self.to(values)
        self.middle, self.scale = float(inner.mean()), float(inner.std()) or 1.0

    def to(self, values: FloatArray) -> FloatArray:
        over = (values - self.start) / self.width
        inner = np.where(over > 0, np.log1p(np.maximum(over, 0.0)), over)
        scaled: FloatArray = (inner - self.middle) / self.scale
        return scaled

    def back(self, scaled: FloatArray) -> FloatArray:
        inner = self.middle + self.scale * scaled
        over: FloatArray = np.where(inner > 0, np.expm1(np.maximum(inner, 0.0)), inner)
        return self.start + self.width * over

    def slope(self, scaled: FloatArray) -> FloatArray:
        """How much of the metric one unit of the belief is, about `scaled`."""
        inner = self.middle + self.scale * scaled
        slope: FloatArray = self.width * self.scale * np.exp(np.maximum(inner, 0.0))
        return slope


def _believe(
    space: Space, observations: Sequence[Observation], at: FloatArray
) -> tuple[Belief, _Units]:
    x = _unit(space, [each.point for each in observations])
    values = np.array([each.value for each in observations], dtype=np.float64)
    good = _plausible(x, values)
    x, values = x[good], values[good]
    units = _Units(x, values) if len(values) else _Units(np.zeros((1, 1)), np.zeros(1))
    return fit(x, units.to(values), at), units


def _plausible(x: FloatArray, values: FloatArray) -> IntArray:
    """Which of the values are taken: all but a few that went wrong, far too high between others.

    One that is far too low can't be told from a narrow dip; the search measures there again.
    """
    good = np.argsort(x[:, 0], kind="stable")
    while x.shape[1] == 1 and len(good) >= max(5, 0.8 * len(x)):
        chords = [
            np.interp(x[one, 0], x[others, 0], values[others])
            for one, others in ((good[k], np.delete(good, k)) for k in range(1, len(good) - 1))
        ]
        rises = values[good[1:-1]] - chords
        k = int(rises.argmax())
        if rises[k] <= 10 * np.median(np.abs(rises)):
            break
        one, others = good[k + 1], np.delete(good, k + 1)
        units = _Units(x[others], values[others])
        there = fit(x[others], units.to(values[others]), x[[one]])
        away = float(units.to(values[[one]])[0] - there.mean[0])
        if away < 6 * math.sqrt(max(float(there.covariance[0, 0]), 0.0) + there.noise):
            break
        good = others
    return np.sort(good)


def _grid(space: Space) -> FloatArray:
    """The points where the curve is believed, [G, D] in [0, 1]; of each step all lengths."""
    if not space.steps:
        return np.linspace(0.0, 1.0, FINE)[:, None]
    steps = sorted(space.steps)
    some = np.unique(np.rint(np.linspace(0, len(steps) - 1, MOST_STEPS)).astype(int))
    unit = _unit(space, [(space.low, float(steps[each])) for each in some])[:, 1]
    lengths = np.tile(np.linspace(0.0, 1.0, COARSE), len(unit))
    return np.stack([lengths, np.repeat(unit, COARSE)], axis=1)


def _unit(space: Space, points: Sequence[Point]) -> FloatArray:
    """`points` on a scale where the space is [0, 1]: [N, D]."""
    columns = 2 if space.steps else 1
    table = np.array(points, dtype=np.float64).reshape(-1, columns)
    wide = math.log(space.high / space.low) or 1.0
    table[:, 0] = np.log(table[:, 0] / space.low) / wide
    if space.steps:
        first, last = min(space.steps), max(space.steps)
        table[:, 1] = (table[:, 1] - first) / ((last - first) or 1.0)
    return table


def _point(space: Space, x: Sequence[float] | FloatArray) -> Point:
    """The point of the space at `x` of the scale."""
    length = float(space.low * (space.high / space.low) ** x[0])
    if not space.steps or len(x) < 2:
        return (length,)
    first, last = min(space.steps), max(space.steps)
    wanted = first + x[1] * (last - first)
    return (length, float(min(space.steps, key=lambda step: abs(step - wanted))))
