"""blup.py's weights and errors for thousands of snapshots, by the pieces that chains.py tells of.

A piece's share is 0 before the steps it averages over and 1 after them, and the difference of two
neighbours' is 0 on either side. In terms of those differences the moments are a band as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from posthoc_cli.solver.arrays import FloatArray, distinct
from posthoc_cli.solver.chains import Chains, solve_band, to_amounts, to_weights
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.quadrature import IntArray, quadrature, resolved
from posthoc_cli.solver.trajectory import Trajectory, close_steps, held_before, jitter_cells

INTERVALS = 16
"""Looked at together: those whose pieces are at work."""

CELLS = 12 * INTERVALS
"""Of jitter, that are looked at together."""


def _stretches(
    chains: Chains,
    snapshots: Sequence[Average],
    others: Sequence[Average],
    trajectory: Trajectory,
    end: float,
    closely: Sequence[Average] = (),
) -> Iterator[tuple[int, float, float, FloatArray, FloatArray, FloatArray]]:
    """What trajectory.seen yields, with the pieces for the snapshots, a stretch at a time.

    Yields the first place that is not all before a stretch, what it yields first, the variances
    [n], the factors of the pieces from that place on that are not all after it [pieces, n], and
    those of the `others` [others, n].
    """
    steps = distinct([0.0, end], chains.step, [float(each.step) for each in others])
    every, stairs = resolved([*snapshots, *others], end)
    snapshots, others = every[: len(snapshots)], every[len(snapshots) :]
    edges = distinct(trajectory.edges, steps, stairs)
    edges = edges[edges <= end]
    steps = close_steps(steps, closely)
    for start in range(0, len(edges) - 1, INTERVALS):
        stretch = edges[start : start + INTERVALS + 1]
        first, places, needed = _at_work(chains, stretch[0], stretch[-1])
        profiles = [*(snapshots[at] for at in chains.order[needed]), *others]
        for interval, weights, shares in quadrature(profiles, stretch):
            low, high = stretch[interval, None], stretch[interval + 1, None]
            known, wanted = np.split(shares, [len(needed)])
            pieces = _pieces(chains, places, needed, known, low, high)
            amounts = weights * trajectory.rates[trajectory.at(stretch[interval])][:, None]
            size = amounts.size
            flat = pieces.reshape(len(places), size), wanted.reshape(len(others), size)
            yield first, 1.0, 1.0, amounts.ravel(), *flat
    for jitter in trajectory.jitter:
        begin, lasting, weights = jitter_cells(steps, stairs, trajectory.cell, jitter.lag)
        lasting = np.broadcast_to(lasting, begin.shape)
        own = float(jitter.lag > trajectory.cell)
        for start in range(0, len(begin), CELLS):
            some = slice(start, start + CELLS)
            low, high = begin[some], begin[some] + lasting[some]
            first, places, needed = _at_work(chains, low[0], high[-1])
            every = [*(snapshots[at] for at in chains.order[needed]), *others]
            ends = np.stack([each.share(high) for each in every])
            starts = np.stack([held_before(each, low) for each in every])
            pieces = _pieces(chains, places, needed, ends[: len(needed)], high, high)
            pieces -= _pieces(chains, places, needed, starts[: len(needed)], low, low)
            rates = jitter.rates[trajectory.at(np.maximum(low, 0.0))]
            wanted = ends[len(needed) :] - starts[len(needed) :]
            yield first, 0.0, own, weights[some] * rates, pieces, wanted


def _at_work(chains: Chains, low: float, high: float) -> tuple[int, IntArray, IntArray]:
    """The first place whose piece isn't all before `low`, those from it on that begin before
    `high`, and the places whose shares make up their pieces."""
    first = int(np.searchsorted(chains.step, low, side="right"))
    begun = np.flatnonzero(chains.low[first:] < high)
    places = np.arange(first, first + (int(begun[-1]) + 1 if len(begun) else 0))
    linked = chains.before[places]
    return first, places, np.unique(np.concatenate([places, linked[linked >= 0]]))


def _pieces(
    chains: Chains,
    places: IntArray,
    needed: IntArray,
    shares: FloatArray,
    low: FloatArray,
    high: FloatArray,
) -> FloatArray:
    """The shares of the pieces at `places` [places, ...], from the snapshots' at `needed`.

    `low` and `high` are between what steps the shares are: the pieces are 1 after their last and 0
    before their first step.
    """
    linked = chains.before[places]
    whole = (len(places), *(1,) * (shares.ndim - 1))
    kept = np.where(linked >= 0, chains.kept[places], 0.0).reshape(whole)
    pieces = shares[np.searchsorted(needed, places)]
    pieces -= kept * shares[np.searchsorted(needed, linked)]
    pieces /= chains.mass[places].reshape(whole)
    shape = pieces.shape
    pieces[np.broadcast_to(chains.step[places].reshape(whole) <= low, shape)] = 1.0
    pieces[np.broadcast_to(chains.low[places].reshape(whole) >= high, shape)] = 0.0
    return pieces


def chain_weights(
    chains: Chains,
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    trajectory: Trajectory,
) -> tuple[FloatArray, float]:
    """The weights of least expected error, as blup.blup_weights has them; and the condition.

    The first piece's weight is one, as all others are differences, whose weights sum to none: what
    is left is a plain problem of least squares.
    """
    count, end = len(chains.step), max(float(each.step) for each in targets)
    lag = max((each.lag for each in trajectory.jitter), default=0.0)
    width = chains.width + _within(chains, lag)
    band, against = _noise_band(chains, trajectory.noise[chains.order], width)
    right = np.repeat(-against[:, None], len(targets), axis=1)
    for first, past, _, amounts, pieces, wanted in _stretches(
        chains, snapshots, targets, trajectory, end
    ):
        if first == 0:
            start, rows = pieces[0], 1
            steps = np.diff(pieces, axis=0, append=0.0)
        else:
            start, rows = np.full(len(amounts), past), first
            steps = np.diff(pieces, axis=0, prepend=past, append=0.0)
        steps = steps[: count - rows]
        weighed = steps * amounts
        products = weighed @ steps.T
        for apart in range(min(width + 1, len(steps))):
            band[rows + apart : rows + len(steps), apart] += np.diagonal(products, -apart)
        right[rows : rows + len(steps)] += weighed @ (wanted - start).T
    solved, condition = _solve(band[1:], right[1:])
    differences = np.vstack([np.ones((1, len(targets))), solved, np.zeros((1, len(targets)))])
    amounts = -np.diff(differences, axis=0) / chains.mass[:, None]
    weights = to_weights(chains, amounts)
    return weights / weights.sum(axis=1, keepdims=True), condition


def _within(chains: Chains, lag: float) -> int:
    """The most snapshots that were taken within `lag` steps."""
    return int(
        (np.searchsorted(chains.step, chains.step + lag) - np.arange(len(chains.step))).max()
    )


def _noise_band(chains: Chains, noise: FloatArray, width: int) -> tuple[FloatArray, FloatArray]:
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
    band = np.zeros((count, width + 2))
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
    networks: Sequence[Average],
    trajectory: Trajectory,
    several: Sequence[tuple[FloatArray, FloatArray]],
) -> tuple[FloatArray, FloatArray]:
    """The squares of approximation (without what scales the start), [several, targets], and
    distance, [targets].

    `networks` are the network itself at each target's step; `several` are weights, and by how much
    they sum to more than one [targets].
    """
    made_of = []
    for weights, excess in several:
        amounts = (to_amounts(chains, weights) * chains.mass[:, None]).T
        before = np.cumsum(np.insert(amounts, 0, 0.0, axis=1), axis=1) - excess[:, None]
        made_of.append((amounts, before))
    end = max(float(each.step) for each in targets)
    approximations, distance = np.zeros((len(several), len(targets))), np.zeros(len(targets))
    for first, past, own, factors, pieces, others in _stretches(
        chains, snapshots, [*targets, *networks], trajectory, end, targets
    ):
        wanted, network = np.split(others, 2)
        for sums, (amounts, before) in zip(approximations, made_of, strict=True):
            made = amounts[:, first : first + len(pieces)] @ pieces
            made += past * before[:, first, None]
            sums += (made - wanted) ** 2 @ factors
        distance += (wanted - own * network) ** 2 @ factors
    return approximations, distance
