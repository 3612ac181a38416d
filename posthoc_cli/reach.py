"""Which widths a set of snapshots reaches: from the profiles alone, before or after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import MAX_SIGMA_REL, Profile, cosine, sigma_rel_to_gamma

FloatArray = npt.NDArray[np.float64]

NARROWEST = 0.001
"""No target narrower than this is looked at: it is the network itself."""

_GRID = 240


def least_profile_error(
    snapshots: Sequence[Profile], step: float
) -> Callable[[FloatArray], FloatArray]:
    """A function of sigma_rel [widths]: the least profile error any weights can have at `step`.

    Unlike a solve it needs no weights, and so takes snapshots however alike. Profiles need
    gamma > -1/2.
    """
    steps = np.array([float(each.step) for each in snapshots])
    gammas = np.array([float(each.gamma) for each in snapshots])
    values, vectors = np.linalg.eigh(
        cosine(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    )
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    basis = vectors[:, kept] / np.sqrt(values[kept])

    def error(sigma_rel: FloatArray) -> FloatArray:
        gamma = sigma_rel_to_gamma(np.asarray(sigma_rel, np.float64))
        wanted = cosine(steps[:, None], gammas[:, None], np.float64(step), gamma[None, :])
        caught = np.sum((basis.T @ wanted) ** 2, axis=0)
        left: FloatArray = np.sqrt(np.maximum(1 - caught, 0.0))
        return left

    return error


def reachable(
    snapshots: Sequence[Profile], step: float, within: float
) -> list[tuple[float, float]]:
    """The ranges of sigma_rel that can be had at `step` with a profile error of at most `within`.

    Narrowest first; more than one where the snapshots' widths lie far apart, none where no
    snapshot is near `step`. Profiles need gamma > -1/2.
    """
    error = least_profile_error(snapshots, step)
    highest = MAX_SIGMA_REL * (1 - 1e-9)
    grid = np.geomspace(NARROWEST, highest, _GRID)
    own = [each.sigma_rel for each in snapshots if each.step == step and each.gamma > 0]
    grid = np.unique([*grid, *np.clip(own, NARROWEST, highest)])
    good = error(grid) <= within
    edges = np.flatnonzero(np.diff(good.astype(int)))
    ends = [0, *(edges + 1), len(grid)]
    ranges = []
    for first, last in pairwise(ends):
        if good[first]:
            low = _bisect(error, within, grid[first], grid[max(first - 1, 0)])
            high = _bisect(error, within, grid[last - 1], grid[min(last, len(grid) - 1)])
            ranges.append((low, high))
    return ranges


def _bisect(
    error: Callable[[FloatArray], FloatArray], within: float, good: float, bad: float
) -> float:
    """Where, from `good` to `bad`, the error crosses `within`; `good` itself at the grid's end."""
    for _ in range(24):
        middle = (good * bad) ** 0.5
        if float(error(np.array([middle]))[0]) <= within:
            good = middle
        else:
            bad = middle
    return float(good)
