"""Of groups of snapshots that don't go together, the one by which the others are judged."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_cli.snapshots.snapshot import Snapshot


def most(groups: Sequence[Sequence[Snapshot]], newest: Snapshot) -> tuple[int, str]:
    """The place of the largest of `groups`, the one with the `newest` if others are as large.

    Also how a message calls its snapshots: where many agree and few differ, the few are at fault.
    """

    def weight(at: int) -> tuple[int, bool, int]:
        return len(groups[at]), newest in groups[at], groups[at][-1].step

    place = max(range(len(groups)), key=weight)
    if newest in groups[place]:
        return place, f"in the newest snapshot, '{newest.file}'"
    group = groups[place]
    return place, f"in {len(group)} others, such as '{group[-1].file}'"
