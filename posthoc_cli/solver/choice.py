"""Some of thousands of snapshots: all near the end, fewer and fewer before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posthoc_cli.solver.chains import MANY, find_chains
from posthoc_cli.solver.profiles import Average


def usable(snapshots: Sequence[Average]) -> list[int]:
    """Which snapshots weights are found for: all, unless they are too many to be solved together.

    They are where there are more than MANY and they make no chains: of very many profiles, or saved
    at such steps that hundreds of averages overlap.
    """
    if len(snapshots) <= MANY or find_chains(snapshots):
        return list(range(len(snapshots)))
    return choose([each.step for each in snapshots], MANY)


def choose(steps: Sequence[float], most: int) -> list[int]:
    """At most about `most` of the snapshots at `steps`, by index: all of a step, or none.

    The last steps are all kept; before them the gaps grow with the distance from the end. The first
    is kept too.
    """
    distinct = np.unique(np.asarray(steps, np.float64))
    count = len(distinct)
    if len(steps) <= most or count < 3:
        return list(range(len(steps)))
    wanted = max(3, most * count // len(steps))
    # With the last `near` all kept, and gaps of distance / near before them, so many are kept:
    # near (1 + log(count / near)).
    near, high = 1.0, float(wanted)
    for _ in range(50):
        middle = (near + high) / 2
        near, high = (
            (middle, high) if middle * (1 + np.log(count / middle)) <= wanted else (near, middle)
        )
    close = max(1, int(near))
    far = np.geomspace(close, count - 1, wanted - close)
    kept = distinct[count - 1 - np.unique([*range(close), *np.rint(far).astype(int)])]
    return [int(at) for at in np.flatnonzero(np.isin(steps, kept))]
