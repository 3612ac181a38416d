"""Whether snapshots are of one network, and which of them are not.

Each check gives the file names and messages of those that don't go with the others, judged by the
newest snapshot, the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from posthoc_cli.snapshots.lora import different_alphas
from posthoc_cli.snapshots.names import SAME_WIDTH
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.storage import TensorInfo


def inconsistencies(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, str]]:
    """What is wrong with snapshots that are in order: file name and message of each problem."""
    yield from _same_average(snapshots)
    if not snapshots:
        return
    newest = snapshots[-1].file
    for check in (_other_tensors, different_alphas):
        for snapshot, difference in check(snapshots):
            yield (
                snapshot.file,
                f"{difference} in the newest snapshot, '{newest}'; "
                "leave out with only= what isn't of the same network",
            )


def _same_average(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, str]]:
    """Two of one step and profile: no weights could tell them apart."""
    for one, other in pairwise(snapshots):
        same_width = math.isclose(one.sigma_rel, other.sigma_rel, rel_tol=SAME_WIDTH)
        # Below gamma 0 there are two of each width.
        same_gamma = math.isclose(one.gamma + 1, other.gamma + 1, rel_tol=10 * SAME_WIDTH)
        if one.step == other.step and one.profile.raw:
            yield (
                other.file,
                f"has the step ({other.step}) of '{one.file}'; leave out one of the two, "
                f"as with exclude='{other.file}', or say with pattern= which number of the names "
                "it is",
            )
        elif one.step == other.step and same_width and same_gamma:
            yield (
                other.file,
                f"has the step ({other.step}) and profile (sigma_rel {other.sigma_rel:.4g}) of "
                f"'{one.file}'; leave out one of the two, as with exclude='{other.file}'",
            )


def _other_tensors(snapshots: Sequence[Snapshot]) -> Iterator[tuple[Snapshot, str]]:
    """Snapshots whose tensors are not those of the newest, and the first difference."""
    newest = snapshots[-1].index.tensors
    known: dict[int, str | None] = {id(newest): None}
    for snapshot in snapshots:
        tensors = snapshot.index.tensors
        if id(tensors) not in known:
            known[id(tensors)] = _difference(tensors, newest)
        if difference := known[id(tensors)]:
            yield snapshot, difference


def _difference(tensors: Mapping[str, TensorInfo], newest: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor, by name, in which the two differ: `tensor 'w' is F32 [2] here and ...`."""

    def describe(info: TensorInfo | None) -> str:
        return "missing" if info is None else f"{info.dtype} {list(info.shape)}"

    for name in sorted(tensors.keys() | newest.keys()):
        here, there = describe(tensors.get(name)), describe(newest.get(name))
        if here != there:
            return f"tensor '{name}' is {here} here and {there}"
    return None
