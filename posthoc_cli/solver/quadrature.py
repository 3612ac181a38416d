"""Where to look at shares, to integrate their products between steps, whatever the profiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from posthoc_cli.solver.arrays import FloatArray, distinct
from posthoc_cli.solver.profiles import Average, Profile

IntArray = npt.NDArray[np.intp]

NODES = 12
"""Of each panel. What the shares are between them is a polynomial, and products of two of those
are integrated exactly."""

TOLERANCE = 1e-17
"""What a panel may add to the error of an integral of squares over its interval, in units of the
interval's length times the square of the largest share in it."""

DEPTH = 60
"""How often an interval may be halved."""

BLOCK = 2**19
"""About how many values of shares are held at a time."""


def _gauss_legendre() -> tuple[FloatArray, FloatArray, FloatArray]:
    """Nodes on [0, 2], with 2 itself as one more; weights; and what finds a misfit.

    From the shares at the nodes the matrix [NODES + 1, 3] makes the last two Legendre coefficients
    of the polynomial through them, and how far it misses the share at the end.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    degrees = np.arange(NODES)
    basis = np.polynomial.legendre.legvander(nodes, NODES - 1)
    coefficients = basis * weights[:, None] * (degrees + 0.5)
    misfit = np.zeros((NODES + 1, 3))
    misfit[:-1, :2] = coefficients[:, -2:]
    misfit[:, 2] = [*-coefficients.sum(axis=1), 1.0]  # each Legendre polynomial is 1 at the end
    return np.append(nodes, 1.0) + 1, weights, misfit


_POINTS, _WEIGHTS, _MISFIT = _gauss_legendre()


def quadrature(
    profiles: Sequence[Average], edges: FloatArray
) -> Iterator[tuple[IntArray, FloatArray, FloatArray]]:
    """Nodes to integrate products of two shares with, over the intervals between `edges`.

    Yields panels: the interval [n] each lies in, the weights of its nodes [n, NODES], and the
    shares there [profiles, n, NODES]. No profile's step lies within an interval. A panel is halved
    until the polynomials through its nodes have converged and meet the share at its end, so that no
    kink, no steep end and no root at 0 is passed over: a share never falls.
    """
    size = max(1, BLOCK // (len(profiles) * len(_POINTS)))
    for first in range(0, len(edges) - 1, size):
        interval = np.arange(first, min(first + size, len(edges) - 1))
        low, high = edges[interval], edges[interval + 1]
        part, top = np.ones(len(interval)), None
        for depth in range(DEPTH):
            half = (high - low) / 2
            # A share jumps at its step: the end is just before it, and nothing is rounded to it.
            nodes = np.minimum(
                low[:, None] + half[:, None] * _POINTS, np.nextafter(high, 0)[:, None]
            )
            shares = np.stack([each.share(nodes) for each in profiles])
            if top is None:
                top = np.maximum(shares[:, :, -1], 1e-30)
            misfit = np.abs(shares.reshape(-1, len(_POINTS)) @ _MISFIT).max(axis=1)
            off = (misfit.reshape(top.shape) / top).max(axis=0)
            bad = part * off**2 > TOLERANCE if depth < DEPTH - 1 else np.zeros(len(part), bool)
            good = ~bad
            yield interval[good], half[good, None] * _WEIGHTS, shares[:, good, :-1]
            if not bad.any():
                break
            middle = (low + half)[bad]
            low = np.column_stack([low[bad], middle]).ravel()
            high = np.column_stack([middle, high[bad]]).ravel()
            interval, part = np.repeat(interval[bad], 2), np.repeat(part[bad] / 2, 2)
            top = np.repeat(top[:, bad], 2, axis=1)


MOST_STAIRS = 2**22
"""So many of them times the averages are looked at one by one; of more, the slope."""


def resolved(averages: Sequence[Average], end: float) -> tuple[list[Average], FloatArray]:
    """The averages, and at which steps below `end` those rise that are not updated at every step.

    Of too many such steps none is told, and the averages are smooth.
    """
    grids = {grid for each in averages if (grid := getattr(each, "stairs", None)) is not None}
    if sum(end / every for _, every in grids) * len(averages) > MOST_STAIRS:
        return [each.smooth if isinstance(each, Profile) else each for each in averages], _NONE
    rising = [np.arange(first, end, every, dtype=np.float64) for first, every in grids]
    return list(averages), distinct(_NONE, *rising)


_NONE = np.zeros(0)

CELLS = 6
"""Of each half of an interval: the shortest at its ends, where averages begin and end."""


def cells(edges: FloatArray, shortest: float) -> FloatArray:
    """Bounds of cells that grow from `shortest` at all `edges` to the middles between them.

    They are multiples of `shortest`, as the edges are taken to be.
    """
    low, half = edges[:-1, None], np.diff(edges)[:, None] / 2
    # The first of CELLS that grow evenly: expm1(x / CELLS) / expm1(x) of a half, for growth x.
    slow, fast = np.full(half.shape, 1e-6), np.full(half.shape, 60.0)
    for _ in range(30):
        growth = (slow + fast) / 2
        long = np.expm1(growth / CELLS) / np.expm1(growth) * half > shortest
        slow, fast = np.where(long, growth, slow), np.where(long, fast, growth)
    inward = half * np.expm1(slow * np.arange(CELLS + 1) / CELLS) / np.expm1(slow)
    bounds = np.concatenate([low + inward, low + 2 * half - inward], axis=None)
    return distinct(np.rint(bounds / shortest)) * shortest
