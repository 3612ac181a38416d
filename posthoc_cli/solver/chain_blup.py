"""blup.py's weights and errors for thousands of snapshots, by the pieces that chains.py tells of.

A piece's share is 0 before the steps it averages over and 1 after them, and the difference of two
neighbours' is 0 on either side. In terms of those differences the moments are a band as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.solver.chains import Chains, solve_band, to_amounts, to_weights
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.quadrature import quadrature

INTERVALS = 16
"""Looked at together: those whose pieces are at work."""


def _stretches(
    chains: Chains,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    edges: FloatArray,
    rates: FloatArray,
) -> Iterator[tuple[int, FloatArray, FloatArray, FloatArray, FloatArray]]:
    """The integrals' nodes, some intervals between `edges` at a time.

    Yields the first place that is not all before them, the rates times the nodes' weights [nodes],
    the shares of the pieces from that place on that are not all after them [pieces, nodes], those
    of the targets [targets, nodes], and the ends of the nodes' intervals [nodes].
    """
    for start in range(0, len(edges) - 1, INTERVALS):
        stretch = edges[start : start + INTERVALS + 1]
        first = int(np.searchsorted(chains.step, stretch[0], side="right"))
        begun = np.flatnonzero(chains.low[first:] < stretch[-1])
        places = np.arange(first, first + (int(begun[-1]) + 1 if len(begun) else 0))
        linked = chains.before[places]
        needed = np.unique(np.concatenate([places, linked[linked >= 0]]))
        profiles = [*(snapshots[at] for at in chains.order[needed]), *targets]
        own, other = np.searchsorted(needed, places), np.searchsorted(needed, linked)
        kept = np.where(linked >= 0, chains.kept[places], 0.0)[:, None, None]
        for interval, weights, shares in quadrature(profiles, stretch):
            low, high = stretch[interval], stretch[interval + 1]
            pieces = shares[own]
            pieces -= kept * shares[other]
            pieces /= chains.mass[places, None, None]
            pieces[chains.step[places, None] <= low] = 1.0
            pieces[chains.low[places, None] >= high] = 0.0
            amounts = weights * rates[start + interval, None]
            wanted = shares[len(needed) :]
            ends = np.repeat(high, weights.shape[1])
            yield (
                first,
                amounts.ravel(),
                pieces.reshape(len(places), amounts.size),
                wanted.reshape(len(targets), amounts.size),
                ends,
            )


def chain_weights(
    chains: Chains,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    edges: FloatArray,
    rates: FloatArray,
    noise: FloatArray,
) -> tuple[FloatArray, float]:
    """The weights of least expected error, as blup.blup_weights has them; and the condition.

    The first piece's weight is one, as all others are differences, whose weights sum to none: what
    is left is a plain problem of least squares.
    """
    count = len(chains.step)
    band, against = _noise_band(chains, noise[chains.order])
    right = np.repeat(-against[:, None], len(targets), axis=1)
    for first, amounts, pieces, wanted, _ in _stretches(chains, snapshots, targets, edges, rates):
        start = pieces[0] if first == 0 else np.ones(len(amounts))
        if first == 0:
            steps, rows = np.diff(pieces, axis=0, append=0.0), 1
        else:
            steps, rows = np.diff(pieces, axis=0, prepend=1.0, append=0.0), first
        steps = steps[: count - rows]
        weighed = steps * amounts
        moments = weighed @ steps.T
        for apart in range(min(chains.width + 1, len(steps))):
            band[rows + apart : rows + len(steps), apart] += np.diagonal(moments, -apart)
        right[rows : rows + len(steps)] += weighed @ (wanted - start).T
    solved, condition = _solve(band[1:], right[1:])
    differences = np.vstack([np.ones((1, len(targets))), solved, np.zeros((1, len(targets)))])
    amounts = -np.diff(differences, axis=0) / chains.mass[:, None]
    weights = to_weights(chains, amounts)
    return weights / weights.sum(axis=1, keepdims=True), condition


def _noise_band(chains: Chains, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The covariances of the differences' rounding, a band; and those with the first piece's."""
    count = len(chains.step)
    places = np.arange(count)
    part, passed = 1 / chains.mass, np.zeros(count)
    linked = chains.after >= 0
    passed[linked] = -(chains.kept / chains.mass)[chains.after[linked]]
    # Each snapshot is part of its own piece and the next in its chain, each of two differences.
    rows = np.stack([places, places + 1, chains.after, chains.after + 1])
    factors = np.stack([part, -part, passed, -passed])
    factors[2:, ~linked] = 0.0
    factors[rows >= count] = 0.0
    band = np.zeros((count, chains.width + 2))
    for row, factor in zip(rows, factors, strict=True):
        for column, other in zip(rows, factors, strict=True):
            value = factor * other * noise
            used = (value != 0) & (row >= column)
            np.add.at(band, (row[used], (row - column)[used]), value[used])
    against = np.zeros(count)
    near = np.arange(1, min(band.shape[1], count))
    against[near] = band[near, near]
    return band, against


def _solve(band: FloatArray, right: FloatArray) -> tuple[FloatArray, float]:
    """The band's solution; where it is singular to working precision, with a little more on the
    diagonal, so that snapshots too alike to be told apart share alike."""
    band[:, 0] = np.maximum(band[:, 0], 1e-24 * band[:, 0].max())
    own = band[:, 0].copy()
    for more in (0.0, 1e-15, 1e-14, 1e-13, 1e-12):
        band[:, 0] = own * (1 + more)
        try:
            return solve_band(band, right)
        except np.linalg.LinAlgError:
            continue
    band[:, 0] = own * (1 + 1e-9)
    return solve_band(band, right)


def chain_errors(
    chains: Chains,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    edges: FloatArray,
    rates: FloatArray,
    weights: FloatArray,
    excess: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """The squares of approximation (without what scales the start) and distance, [targets] each.

    `excess` [targets] is by how much the weights sum to more than one.
    """
    amounts = (to_amounts(chains, weights) * chains.mass[:, None]).T
    before = np.concatenate([np.zeros((len(targets), 1)), np.cumsum(amounts, axis=1)], axis=1)
    stop = np.array([float(each.step) for each in targets])
    approximation, distance = np.zeros(len(targets)), np.zeros(len(targets))
    for first, factors, pieces, wanted, ends in _stretches(
        chains, snapshots, targets, edges, rates
    ):
        own = amounts[:, first : first + len(pieces)]
        off = before[:, first, None] + own @ pieces - wanted - excess[:, None]
        # A target's error ends where the target does.
        within = ends <= stop[:, None]
        approximation += np.where(within, off**2, 0.0) @ factors
        distance += np.where(within, wanted**2, 0.0) @ factors
    return approximation, distance
