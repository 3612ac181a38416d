"""How a network moved, as a model: a walk, jitter about it, and the rounding of what was saved.

The network at step u is an unknown start, plus a random walk of the variance rate q(u), plus
jitter: of components of zero mean that are forgotten after `lag` steps. Of an average with the
share `G(u)` of its weight before u,

    a step of the walk at u enters with all that comes after it, F(u) = 1 - G(u),
    a piece of jitter that lasts from u to u + lag with G(u + lag) - G(u).

Jitter of one step is white: an average of density p sees the integral of p^2 of it, a raw
checkpoint all. For weights that sum to one F can be replaced by G: where the network moved most,
near the beginning, G is tiny and F all but one, so that with G nothing cancels. The integrals of
products of two averages' factors are their moments; docs/blup.md derives all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_cli.solver.arrays import FloatArray, distinct
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.quadrature import cells, quadrature, resolved

STEPS = 1000
"""Of a run of fewer steps each counts as several: they are epochs, or saves, not updates."""

TOO_FAR = 0.9
"""The misfit beyond which the snapshots are not those of a walk with jitter: a factor of 2.5 in the
mean squared differences. Networks in training have 0.05 to 0.35, pure drift 0.7."""


@dataclass(frozen=True, slots=True)
class Jitter:
    """A component of jitter that is forgotten after `lag` steps.

    Its variance at a step is `rates[k]` from step `edges[k]` of the trajectory to `edges[k + 1]`.
    """

    lag: float
    rates: FloatArray


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How the network moved, per parameter.

    The walk's variance rate is `rates[k]` from step `edges[k]` to `edges[k + 1]`, and the last one
    after it; all zero when the network didn't move, NaN when nothing tells. `noise` [snapshots] is
    the variance of each snapshot's rounding, `start` the mean square of the first weights.
    `misfit` is the root mean square logarithm of modelled over measured squared differences,
    `left_out` how much larger errors were than expected when each snapshot was rebuilt from the
    others (NaN when that can't be told), and `white` what the least averaged snapshot would show,
    in variance, of the last steps' jitter of single steps.
    """

    edges: FloatArray
    rates: FloatArray
    noise: FloatArray
    start: float
    jitter: tuple[Jitter, ...] = ()
    misfit: float = 0.0
    left_out: float = float("nan")
    white: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the model describes these snapshots at all."""
        return not self.misfit > TOO_FAR

    @property
    def raised(self) -> float:
        """What every expected error is multiplied with: at least 1, and more where rebuilding the
        snapshots themselves went worse than expected."""
        factor = max(1.0, self.left_out) if self.left_out == self.left_out else 1.0
        return factor if self.fits else factor * float(np.exp(self.misfit / 2))

    @property
    def cell(self) -> float:
        """The shortest time that is looked at, in steps."""
        return one_cell(float(self.edges[-1]))

    def at(self, u: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """In which of the intervals between `edges` each of `u` [n] lies."""
        found = np.searchsorted(self.edges, u, side="right") - 1
        return np.clip(found, 0, len(self.rates) - 1)


def one_cell(last: float) -> float:
    """The shortest time looked at in a run up to step `last`."""
    return 1.0 if last >= STEPS else 1.0 / float(np.ceil(STEPS / last))


def seen(
    trajectory: Trajectory,
    averages: Sequence[Average],
    end: float,
    closely: Sequence[Average] = (),
) -> Iterator[tuple[float, float, FloatArray, FloatArray]]:
    """What `averages` see of the network's movement up to step `end`, some pieces at a time.

    Jitter is looked at step by step where an average ends, and where one of `closely` begins.
    Yields the factor of an average that was taken after all of a piece (1 for the walk's, 0 for
    jitter's), whether the network's own is known (0 for white jitter, else 1), the variance of each
    piece [n], and its factors [averages, n].
    """
    steps = distinct([0.0, end], [float(each.step) for each in averages])
    averages, stairs = resolved(averages, end)
    edges = distinct(trajectory.edges, steps, stairs)
    edges = edges[edges <= end]
    steps = close_steps(steps, closely)
    rates = trajectory.rates[trajectory.at(edges[:-1])]
    for interval, weights, shares in quadrature(averages, edges):
        yield 1.0, 1.0, (weights * rates[interval, None]).ravel(), shares.reshape(len(averages), -1)
    for jitter in trajectory.jitter:
        middles, weights, factors = jitter_seen(
            averages, steps, stairs, trajectory.cell, jitter.lag
        )
        amounts = weights * jitter.rates[trajectory.at(middles)]
        yield 0.0, float(jitter.lag > trajectory.cell), amounts, factors


def close_steps(steps: FloatArray, closely: Sequence[Average]) -> FloatArray:
    """`steps`, and where averages of `closely` have a kink, as a window where it begins."""
    begun = [at for each in closely for at in getattr(each, "breaks", ()) if at > 0]
    return distinct(steps, begun)


def jitter_seen(
    averages: Sequence[Average], steps: FloatArray, stairs: FloatArray, cell: float, lag: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What `averages` see of jitter of variance one: middles [n], weights [n] and factors.

    The factors are [averages, n]: `sum of weights * factor_i * factor_j` is the covariance.
    """
    first, lasting, weights = jitter_cells(steps, stairs, cell, lag)
    factors = np.empty((len(averages), len(first)))
    for row, each in zip(factors, averages, strict=True):
        np.subtract(each.share(first + lasting), held_before(each, first), out=row)
    return np.maximum(first, 0.0), weights, factors


def held_before(average: Average, u: FloatArray) -> FloatArray:
    """The share before `u`, where `u` may lie before the start: there jitter began with it."""
    share: FloatArray = np.where(u > 0, average.share(np.maximum(u, 0.0)), 0.0)
    return share


def jitter_cells(
    steps: FloatArray, stairs: FloatArray, cell: float, lag: float
) -> tuple[FloatArray, FloatArray | float, FloatArray]:
    """From where on pieces of jitter last, how long, and their weights [n].

    At `stairs` averages rise between their `steps`.
    """
    if lag <= cell:
        bounds = _cut(cells(steps, cell), np.concatenate([stairs - cell, stairs]), cell)
        lengths = np.diff(bounds)
        return bounds[:-1], lengths, cell / lengths
    bounds = cells(distinct([-lag], steps - lag, steps), cell)
    bounds = _cut(bounds, np.concatenate([stairs - lag, stairs]), cell)
    lengths = np.diff(bounds)
    return bounds[:-1] + lengths / 2, lag, lengths / lag


def _cut(bounds: FloatArray, more: FloatArray, cell: float) -> FloatArray:
    """The bounds of cells and `more`, whole steps exactly."""
    if not len(more):
        return bounds
    whole = np.rint(np.concatenate([bounds, more]) / cell)
    cut: FloatArray = distinct(whole) / np.rint(1 / cell)
    return cut


def moments(
    trajectory: Trajectory, snapshots: Sequence[Average], targets: Sequence[Average]
) -> FloatArray:
    """The moments up to the last step, [snapshots, snapshots and targets]; rounding not counted."""
    every = [*snapshots, *targets]
    total = np.zeros((len(snapshots), len(every)))
    for _, _, amounts, factors in seen(trajectory, every, max(float(each.step) for each in every)):
        total += (factors[: len(snapshots)] * amounts) @ factors.T
    return total


# Rounding

_HARMONICS = np.arange(1, 9)[:, None]


def alike(apart: FloatArray, rounding: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The correlation of two snapshots' rounding, and minus its slope times `rounding`.

    `apart` is the mean square of how far they are apart without it, `rounding` the sum of both
    variances. Values that differ by less than the spacing of floating-point numbers are rounded the
    same way: for a normal difference of variance m and spacing d it is
    `6 / pi^2 * sum over n of exp(-2 pi^2 n^2 m / d^2) / n^2`, and `rounding` is `d^2 / 6`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(rounding > 0, np.pi**2 / 3 * apart / rounding, np.inf)
    waves = np.exp(-np.minimum(_HARMONICS**2 * np.ravel(ratio), 700.0))
    correlation = 6 / np.pi**2 * np.sum(waves / _HARMONICS**2, axis=0)
    return correlation.reshape(ratio.shape), 2 * waves.sum(axis=0).reshape(ratio.shape)


def rounding_covariance(noise: FloatArray, known: FloatArray) -> FloatArray:
    """The covariance of the snapshots' rounding, by their moments `known`; [snapshots] twice."""
    own = np.diagonal(known)
    apart = np.maximum(own[:, None] + own - 2 * known, 0.0)
    correlation, _ = alike(apart, noise[:, None] + noise)
    covariance: FloatArray = np.sqrt(np.outer(noise, noise)) * correlation
    covariance[np.diag_indices(len(noise))] = noise
    return covariance
