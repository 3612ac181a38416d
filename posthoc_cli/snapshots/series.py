"""Steps that are missing from a regular series: 1000, 2000, 4000, 5000."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from posthoc_cli.snapshots.snapshot import Snapshot

_EXACT = 0.01
"""A distance that differs by less than this part of the usual one is as good as equal: kimg are
rounded."""


def missing_steps(snapshots: Sequence[Snapshot]) -> list[str]:
    """A line for each step that a snapshot is missing of, where all others are regular."""
    steps: dict[str, set[int]] = defaultdict(set)
    for snapshot in snapshots:
        steps[str(snapshot.profile)].add(snapshot.step)
    lacking: dict[tuple[int, int], list[str]] = defaultdict(list)
    for kind, each in steps.items():
        for step, usual in _gaps(sorted(each)):
            lacking[step, usual].append(kind)
    return [
        f"no snapshot of step {step}"
        + (f" and {' or '.join(kinds)}" if len(kinds) < len(steps) else "")
        + f": all others are {usual} apart"
        for (step, usual), kinds in sorted(lacking.items())
    ]


def _gaps(steps: Sequence[int]) -> list[tuple[int, int]]:
    """The missing steps, each with the usual distance: few of many, and all else regular."""
    distances = [other - one for one, other in pairwise(steps)]
    usual = int(statistics.median_low(distances)) if len(distances) > 2 else 0
    if distances and distances[-1] < usual:  # training needn't end with a whole interval
        distances.pop()
    missing = []
    for start, distance in zip(steps, distances, strict=False):
        count = round(distance / usual) if usual else 0
        if count < 1 or abs(distance - count * usual) > _EXACT * usual:
            return []
        missing += [(start + round(distance * k / count), usual) for k in range(1, count)]
    regular = sum(abs(distance - usual) <= _EXACT * usual for distance in distances)
    return missing if regular >= 2 and len(missing) <= max(1, len(steps) // 4) else []
