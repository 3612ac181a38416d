"""Where to evaluate a noisy metric next, and where its best is: a search over log length.

Everything minimises. A point is `(length,)`, or `(length, step)` where steps are searched too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

Point = tuple[float, ...]


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
