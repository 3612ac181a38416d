"""Thousands of snapshots, solved without a matrix of thousands by thousands.

Snapshots of one profile are a chain: up to the step of the one before, each holds the same as that
one, `G_i(u) = kept_i G_before(u)`. What it adds, `e_i = s_i - kept_i s_before`, is an average over
the steps between the two alone. Such pieces overlap with few others, so in terms of them every
matrix is a narrow band along its diagonal: time and memory grow with the number of snapshots, not
with its square or cube, and the weights are those of the whole set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.solver.profiles import Average, Profile, norm
from posthoc_cli.solver.quadrature import IntArray

MANY = 400
"""Up to so many snapshots the plain matrices are solved."""

WIDEST = 64
"""The widest band: snapshots of more profiles, or of steps that lie too unevenly, are thinned."""


@dataclass(frozen=True, slots=True)
class Chains:
    """Snapshots in the order of their steps, [n] each: which are links of one chain.

    `order` are their places among the snapshots as given; all else is by place in that order.
    `gamma` is NaN for other kinds than power functions.
    `before` and `after` are the neighbours in the chain, -1 where there is none; `low` is the step
    of the one before, 0 at first; `kept` how much of it each holds, and `mass` the rest. `width` is
    how far from the diagonal the band reaches.
    """

    order: IntArray
    step: FloatArray
    gamma: FloatArray
    low: FloatArray
    kept: FloatArray
    mass: FloatArray
    before: IntArray
    after: IntArray
    width: int


def find_chains(snapshots: Sequence[Average]) -> Chains | None:
    """The chains of more than MANY snapshots; None for fewer, or where the band is too wide."""
    count = len(snapshots)
    if count <= MANY or not all(each.recursive for each in snapshots):
        return None
    steps = np.array([float(each.step) for each in snapshots])
    order = np.argsort(steps, kind="stable")
    step = steps[order]
    gamma = np.array([getattr(snapshots[at], "gamma", np.nan) for at in order])
    before, after = np.full(count, -1), np.full(count, -1)
    last: dict[Average, int] = {}
    for at in range(count):
        running = replace(snapshots[order[at]], step=1.0)
        if running in last:
            before[at], after[last[running]] = last[running], at
        last[running] = at
    low = np.where(before >= 0, step[before], 0.0)
    if np.any(low == step):  # two of the same step and profile
        return None
    kept, mass = np.zeros(count), np.ones(count)
    for at in np.flatnonzero(before >= 0).tolist():
        kept[at] = snapshots[order[at]].share(low[at])
        mass[at] = snapshots[order[at]].between(low[at], step[at])
    # How many of those before it a piece overlaps with, and how far apart two of a chain are.
    overlap = np.arange(count) - np.searchsorted(step, low, side="right")
    apart = np.where(after >= 0, after - np.arange(count), 0)
    width = int(max(overlap.max(), apart.max())) + 1
    if width > WIDEST:
        return None
    return Chains(order, step, gamma, low, kept, mass, before, after, width)


def to_weights(chains: Chains, amounts: FloatArray) -> FloatArray:
    """Weights of the snapshots [targets, snapshots] from those of the pieces [n, targets]."""
    taken = amounts.copy()
    linked = np.flatnonzero(chains.before >= 0)
    np.subtract.at(taken, chains.before[linked], chains.kept[linked, None] * amounts[linked])
    weights = np.empty_like(taken)
    weights[chains.order] = taken
    return np.ascontiguousarray(weights.T)


def to_amounts(chains: Chains, weights: FloatArray) -> FloatArray:
    """The inverse of `to_weights`."""
    amounts = np.ascontiguousarray(weights[:, chains.order].T)
    for at in range(len(amounts) - 1, -1, -1):
        if (before := chains.before[at]) >= 0:
            amounts[before] += chains.kept[at] * amounts[at]
    return amounts


# Algorithm 3


def inner_products(
    chains: Chains, targets: Sequence[Profile]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Of the pieces' profiles with each other, a band, with the targets', and the targets' norms.

    [n, width + 1], [n, targets] and [targets]. Gammas are above -1/2.
    """
    step, gamma, low = chains.step, chains.gamma, chains.low
    count = len(step)
    band = np.zeros((count, chains.width + 1))
    for apart in range(min(chains.width, count - 1) + 1):
        here, there = slice(apart, None), slice(None, count - apart)
        band[here, apart] = _overlap(
            (step[here], gamma[here]),
            (step[there], gamma[there]),
            np.maximum(low[here], low[there]),
            step[there],
        )
    wanted = np.stack(
        [_overlap((step, gamma), (each.step, each.gamma), low, step) for each in targets], axis=1
    )
    return band, wanted, np.array([norm(each.step, each.gamma) for each in targets])


def _overlap(
    one: tuple[FloatArray, FloatArray],
    other: tuple[FloatArray | float, FloatArray | float],
    low: FloatArray,
    high: FloatArray,
) -> FloatArray:
    """Integral of two profiles' product from `low` to `high`, which is after neither's step."""
    (step_a, gamma_a), (step_b, gamma_b) = one, other
    power = gamma_a + gamma_b + 1
    factor = (gamma_a + 1) * (gamma_b + 1) / (power * np.sqrt(step_a * step_b))
    factor = factor * (high / step_a) ** (gamma_a + 0.5) * (high / step_b) ** (gamma_b + 0.5)
    with np.errstate(divide="ignore"):
        part = -np.expm1(power * np.log(np.minimum(low / high, 1.0)))
    overlap: FloatArray = factor * part
    return overlap


def algorithm3_weights(
    chains: Chains, targets: Sequence[Profile], rescaled: bool
) -> tuple[FloatArray, FloatArray, float]:
    """What methods.SolvedWeights has as `weights`, `profile_error` and `condition_number`.

    Raises LinAlgError when two snapshots are too alike to be told apart.
    """
    band, wanted, norms = inner_products(chains, targets)
    amounts, condition = solve_band(band, wanted)
    if condition * np.finfo(np.float64).eps * WIDEST > 1:
        raise np.linalg.LinAlgError
    if rescaled:
        amounts = amounts / (chains.mass @ amounts)
    return to_weights(chains, amounts), _profile_error(band, wanted, norms, amounts), condition


def closest(chains: Chains, targets: Sequence[Profile]) -> tuple[int, int]:
    """The snapshots, by place as given, whose pieces are nearest to each other."""
    band, _, _ = inner_products(chains, targets)
    cosines = np.zeros_like(band)
    for apart in range(1, min(band.shape[1], len(band))):
        own, other = band[apart:, 0], band[: len(band) - apart, 0]
        cosines[apart:, apart] = band[apart:, apart] / np.sqrt(own * other)
    row, apart = divmod(int(np.argmax(cosines)), cosines.shape[1])
    return int(chains.order[row]), int(chains.order[row - apart])


def profile_error(chains: Chains, targets: Sequence[Profile], weights: FloatArray) -> FloatArray:
    """Of any weights, [targets]."""
    return _profile_error(*inner_products(chains, targets), to_amounts(chains, weights))


def _profile_error(
    band: FloatArray, wanted: FloatArray, norms: FloatArray, amounts: FloatArray
) -> FloatArray:
    twice = times_band(band, amounts) - 2 * wanted
    # Rounding can leave a true zero just below it.
    squares = np.maximum(1 + np.sum(amounts * twice, axis=0) / norms**2, 0.0)
    error: FloatArray = np.sqrt(squares)
    return error


# Symmetric bands: row i, column d holds the element (i, i - d)


def times_band(band: FloatArray, right: FloatArray) -> FloatArray:
    """The symmetric matrix of a band times `right` [n, columns]."""
    product = band[:, :1] * right
    for apart in range(1, min(band.shape[1], len(band))):
        side = band[apart:, apart, None]
        product[apart:] += side * right[:-apart]
        product[:-apart] += side * right[apart:]
    return product


def solve_band(band: FloatArray, right: FloatArray) -> tuple[FloatArray, float]:
    """Solve a symmetric positive definite band; also about the condition of the scaled matrix.

    By Cholesky's factors of blocks, which are a band of blocks themselves. Raises LinAlgError when
    the matrix is singular to working precision.
    """
    scale = np.sqrt(band[:, 0])
    if not np.all(scale > 0):
        raise np.linalg.LinAlgError
    scaled = band / scale[:, None]
    for apart in range(band.shape[1]):
        scaled[apart:, apart] /= scale[: len(band) - apart]
    factors = _factor(scaled)
    pivots = np.concatenate([np.diagonal(own) for own, _ in factors])
    side = right / scale[:, None]
    solved = _substitute(factors, side)
    # One step of refinement takes out the rounding of the factors.
    solved = solved + _substitute(factors, side - times_band(scaled, solved))
    return solved / scale[:, None], max(1.0, float(pivots.max() / pivots.min()) ** 2)


Factors = list[tuple[Any, Any]]
"""Of each block: its own lower triangle, and what lies to the left of it."""


def _factor(band: FloatArray) -> Factors:
    count, size = len(band), max(band.shape[1] - 1, 16)
    factors: Factors = []
    for first in range(0, count, size):
        last = min(first + size, count)
        own, left = np.zeros((last - first, last - first)), np.zeros((last - first, size))
        for apart in range(min(band.shape[1], last)):
            rows = np.arange(max(first, apart), last)
            columns, values = rows - apart, band[max(first, apart) : last, apart]
            inside = columns >= first
            at = rows[inside] - first, columns[inside] - first
            own[at] = own[at[::-1]] = values[inside]
            left[rows[~inside] - first, columns[~inside] - first + size] = values[~inside]
        if factors:
            left = np.linalg.solve(factors[-1][0], left.T).T
            own -= left @ left.T
        factors.append((np.linalg.cholesky(own), left))
    return factors


def _substitute(factors: Factors, right: FloatArray) -> FloatArray:
    blocks: list[Any] = []
    first = 0
    for own, left in factors:
        side = right[first : first + len(own)]
        if blocks:
            side = side - left @ blocks[-1]
        blocks.append(np.asarray(np.linalg.solve(own, side), np.float64))
        first += len(own)
    for at in range(len(blocks) - 1, -1, -1):
        if at + 1 < len(blocks):
            blocks[at] = blocks[at] - factors[at + 1][1].T @ blocks[at + 1]
        blocks[at] = np.linalg.solve(factors[at][0].T, blocks[at])
    return np.concatenate(blocks)
