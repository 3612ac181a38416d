"""Steps that are images: EDM2 counts training in them, and names its snapshots by thousands."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_cli.snapshots.listing import title
from posthoc_cli.snapshots.names import images_of, read_name
from posthoc_cli.snapshots.snapshot import Snapshot


def out_of_range(snapshots: Sequence[Snapshot], step: int) -> str:
    """What to do about a target step that no snapshots reach: where steps are images, in kimg."""
    steps = [snapshot.step for snapshot in snapshots]
    first, last = min(steps), max(steps)
    if not _are_images(snapshots):
        return f"give one from {first} to {last}"
    same = max((each for each in steps if each // 1000 == step), default=None)
    if same is not None:
        return f"steps are images here: {step} kimg are step={same}"
    return (
        f"steps are images here: give one from {first} to {last}, which are {first // 1000} and "
        f"{last // 1000} kimg"
    )


def _are_images(snapshots: Sequence[Snapshot]) -> bool:
    """Whether the names count kimg: by EDM2's convention, or by a pattern that made them steps."""
    for snapshot in snapshots:
        named = read_name(title(snapshot.file, None)) if snapshot.source != "pattern" else None
        if named is not None and named.convention == "edm2":
            return True
    return all(
        snapshot.source == "pattern" and snapshot.step == images_of(snapshot.step // 1000)[0]
        for snapshot in snapshots
    ) and all(snapshot.step >= 10_000 for snapshot in snapshots)
