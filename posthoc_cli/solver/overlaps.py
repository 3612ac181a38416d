"""Inner products of averages over training: sums over the steps of their weights' products.

Power functions have closed forms for them, as integrals (profiles.cosine); these are the sums, of
any kinds, in a time that grows with the logarithm of the steps. Between two places where an average
ends or has a kink, the steps are cut into panels that double in size from either end, and Gauss'
formula for sums takes 12 of each panel's steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.solver.profiles import Average

NODES = 12
"""Of each panel: polynomials of a degree up to 23 are summed up exactly."""

BLOCK = 2**19
"""About how many weights are held at a time."""


def overlaps(one: Sequence[Average], other: Sequence[Average]) -> FloatArray:
    """The sums over all steps of `w_i w_j`, [one, other]; step k has the weight `G(k) - G(k - 1)`.

    What lies on the network's start counts as a step before the first. In units of 1 / steps; that
    of an average with itself is its norm's square, 1 for a raw checkpoint.
    """
    every = list(dict.fromkeys([*one, *other]))
    rows, columns = ([every.index(each) for each in some] for some in (one, other))
    start = np.array([float(each.share(np.zeros(()))) for each in every])
    total = np.outer(start, start)
    size = max(NODES, BLOCK // len(every))
    for nodes, counts in _nodes(every, size):
        weights = np.stack([_weights(each, nodes) for each in every])
        total += (weights * counts) @ weights.T
    return total[np.ix_(rows, columns)]


def _weights(average: Average, steps: FloatArray) -> FloatArray:
    """Of ascending steps; none after the average's own, when that is a whole number."""
    weights = np.zeros(len(steps))
    some = steps[: np.searchsorted(steps, average.step + 1)]
    weights[: len(some)] = average.between(some - 1, np.minimum(some, average.step))
    return weights


def _nodes(averages: Sequence[Average], size: int) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Steps, and for how many steps each of them stands; about `size` at a time."""
    edges = {0, *(math.ceil(at) for each in averages for at in (each.step, *each.breaks))}
    steps: list[FloatArray] = []
    counts: list[FloatArray] = []
    held = 0
    for low, high in pairwise(sorted(edges)):
        for first, count in _panels(low, high):
            places, weights = _gauss(count)
            steps.append(first + places)
            counts.append(weights)
            held += len(places)
            if held >= size:
                yield np.concatenate(steps), np.concatenate(counts)
                steps, counts, held = [], [], 0
    if steps:
        yield np.concatenate(steps), np.concatenate(counts)


def _panels(low: int, high: int) -> Iterator[tuple[int, int]]:
    """The steps after `low` up to `high` in panels, each its first step and how many it has."""
    at, left, size = low + 1, high - low, NODES
    sizes = []
    while left > 2 * size:
        sizes.append(size)
        left -= 2 * size
        size *= 2 if len(sizes) > 1 else 1
    for count in (*sizes, left // 2, left - left // 2, *reversed(sizes)):
        if count:
            yield at, count
        at += count


@lru_cache(256)
def _gauss(count: int) -> tuple[FloatArray, FloatArray]:
    """Places among 0, 1, ... count - 1, and weights, that sum polynomials up over all of them.

    The places are the eigenvalues of the recurrence of the polynomials that are orthogonal on these
    points (Chebyshev's discrete ones).
    """
    if count <= NODES:
        return np.arange(count, dtype=np.float64), np.ones(count)
    n = np.arange(1.0, NODES)
    beside = n / 2 * np.sqrt((float(count) ** 2 - n**2) / (4 * n**2 - 1))
    places, vectors = np.linalg.eigh(np.diag(beside, 1) + np.diag(beside, -1))
    return places + (count - 1) / 2, count * vectors[0] ** 2
