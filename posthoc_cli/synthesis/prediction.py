"""What a snapshot is stored as the difference to: a guess at it by those before it in its chain.

An average's last two values tell what the network was in between, on average; that is what is known
of where it has gone since. Of a step's second average much more is known: how the first has moved,
by its last two values, which the same steps of the network have moved. The coefficients are the
best for a network that moves at random, and for snapshots of which each is known up to the rounding
of its own difference, the coarsest there is: so they stay small where steps lie unevenly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from posthoc_cli.solver import Average
from posthoc_cli.solver.trajectory import Trajectory, moments

_ROUNDING = 2.0**-5
"""About what rounding loses of a difference in float8, root mean square."""

_LEAST = 0.01
"""Coefficients below it are left out."""

_LEAST_APART = 1e-11
"""Averages that are nearer to each other, by their variance, can't be told apart in float64."""

_UNIT = 2.0**-16
"""Coefficients are multiples of it: more digits would make no difference, and depend on the
machine. And the sum of values that are all the same is exact."""


def predictors(
    chain: Sequence[tuple[Hashable, Average]], kind: Hashable, average: Average
) -> list[tuple[int, float]]:
    """The places in `chain` of those that the next snapshot, `average`, is predicted from, each
    with its coefficient; the first is nearest to it. The coefficients sum to one.

    The chain has kind and average of each, in the order in which they are written, from the
    keyframe on. Snapshots of its kind are predicted by their last two; those of another by their
    last, and the last two of the keyframe's kind.
    """
    leading = _before(chain, chain[0][0], len(chain))
    own = _before(chain, kind, len(chain))
    if not own:
        return [(leading[0], 1.0)]
    alone = kind == chain[0][0] or leading[0] < own[0]
    bases = own if alone else [own[0], *leading]
    weights = _weights(chain, bases, average)
    kept = [
        (at, round(float(each) / _UNIT) * _UNIT)
        for at, each in zip(bases[1:], weights, strict=True)
        if abs(each) >= _LEAST
    ]
    return [(bases[0], 1.0 - sum(each for _, each in kept)), *kept]


def _before(chain: Sequence[tuple[Hashable, Average]], kind: Hashable, end: int) -> list[int]:
    """The places of the last two of a kind before the place `end`, the last first."""
    return [at for at in range(end - 1, -1, -1) if chain[at][0] == kind][:2]


def _weights(
    chain: Sequence[tuple[Hashable, Average]], bases: Sequence[int], average: Average
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The best weights of all `bases` but the first, whose weight is the rest."""
    # Each is known up to the rounding of its difference to the one before it.
    before = [
        (_before(chain, chain[at][0], at) or _before(chain, chain[0][0], at) or [at])[0]
        for at in bases
    ]
    every = [*(chain[at][1] for at in (*bases, *before)), average]
    walk = Trajectory(
        edges=np.array([0.0, float(average.step)]),
        rates=np.ones(1),
        noise=np.zeros(len(every)),
        start=0.0,
    )
    known = moments(walk, every, [])
    own = np.diagonal(known)
    apart = own[:, None] + own - 2 * known
    count = len(bases)
    # Or of the average's own: what two steps that lie close tell of one far away is not much.
    lost = np.maximum(np.diagonal(apart[:count, count:]), max(apart[0, -1], _LEAST_APART * own[0]))
    rounding = _ROUNDING**2 * lost
    moved = known - known[0] - known[:, :1] + known[0, 0]
    matrix = moved[1:count, 1:count] + rounding[0] + np.diag(rounding[1:])
    right = moved[1:count, -1] + rounding[0]
    scale = np.sqrt(np.maximum(np.diagonal(matrix), np.finfo(float).tiny))
    found = np.linalg.lstsq(matrix / np.outer(scale, scale), right / scale, rcond=1e-12)[0] / scale
    return found if np.isfinite(found).all() else np.zeros(count - 1)
