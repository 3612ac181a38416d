"""Which widths a set of snapshots reaches: from the profiles alone, before or after training."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.solver.chains import Chains, algorithm3_weights, find_chains
from posthoc_cli.solver.profiles import MAX_SIGMA_REL, Average, Profile, cosine, sigma_rel_to_gamma

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
    if chains := find_chains(snapshots):
        return partial(_error_of_chains, chains, step)
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


def _error_of_chains(chains: Chains, step: float, sigma_rel: FloatArray) -> FloatArray:
    gamma = sigma_rel_to_gamma(np.asarray(sigma_rel, np.float64))
    wanted = [Profile(step, float(each)) for each in gamma]
    try:
        return algorithm3_weights(chains, wanted, rescaled=False)[1]
    except np.linalg.LinAlgError:  # so alike that every second tells as much
        return np.full(len(wanted), np.nan)


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


MOST_STEPS = 256
"""Of a plan with more steps than this every second, third, ... is looked at: it reaches a little
more than is said then."""

EXTRA_WIDTHS = (0.01, 0.02, 0.03, 0.15, 0.20, 0.25)
"""Profiles that a plan could have besides those it has."""


def planned(
    steps: int, every: int, widths: Sequence[float], at: int | None = None
) -> list[Profile]:
    """The snapshots there will be at step `at` (by default the last) of a run of `steps` steps."""
    last = (steps if at is None else at) // every * every
    stride = every * -(-last // every // MOST_STEPS)
    gammas = [float(sigma_rel_to_gamma(width)) for width in widths]
    return [
        Profile(step, gamma) for step in range(last, 0, -max(stride, every)) for gamma in gammas
    ]


def best_extra_width(
    steps: int, every: int, widths: Sequence[float], within: float
) -> float | None:
    """The one of EXTRA_WIDTHS that widens most, on a log scale, what a plan reaches.

    None when the plan has something like each of them.
    """

    def span(width: float) -> float:
        snapshots = planned(steps, every, [*widths, width])
        ranges = reachable(snapshots, snapshots[0].step, within)
        return float(sum(np.log(high / low) for low, high in ranges))

    new = [width for width in EXTRA_WIDTHS if all(abs(width / one - 1) > 0.1 for one in widths)]
    return max(new, key=span, default=None)


NEAR, FAR = 48, 24
"""Of a plan's steps that errors are told for: so many last ones, and some of those before."""

HALF = 2.0**-24
"""About the variance of what float16 rounds off, in units of the values' mean square."""


def planned_near(steps: int, every: int, widths: Sequence[float]) -> list[Profile]:
    """The snapshots of a plan at its end: all of the last steps, and fewer and fewer before."""
    count = steps // every
    near = max(2 * NEAR // len(widths), 8)
    back = {*range(min(near, count))}
    if count > near:
        back |= {int(at) for at in np.geomspace(near, count - 1, FAR)}
    gammas = [float(sigma_rel_to_gamma(width)) for width in widths]
    return [Profile((count - at) * every, gamma) for at in sorted(back) for gamma in gammas]


def even_error(snapshots: Sequence[Average], target: Average) -> float:
    """What error is to be expected of blup's weights for a network that moves evenly.

    Relative to how far the target is from the network of its step. Snapshots are taken to be of
    half precision, of a network that moves by as much as its weights are large.
    """
    from posthoc_cli.solver.blup import blup_weights, expected_error
    from posthoc_cli.solver.trajectory import Trajectory

    last = float(target.step)
    even = Trajectory(np.array([0.0, last]), np.ones(1), np.full(len(snapshots), HALF * last), 0.0)
    weights, _ = blup_weights(even, snapshots, [target])
    return float(expected_error(even, snapshots, [target], weights).relative[0])


def needed(snapshots: Sequence[Average], target: Average) -> tuple[float, float]:
    """The error of all snapshots, and the step from which on they give it within a tenth."""
    least = even_error(snapshots, target)
    steps = sorted({float(each.step) for each in snapshots}, reverse=True)

    def enough(first: float) -> bool:
        some = [each for each in snapshots if each.step >= first]
        return even_error(some, target) <= max(1.1 * least, 1e-4)

    return least, steps[bisect.bisect_left(steps[:-1], True, key=enough)]
