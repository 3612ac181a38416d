"""A run's last file beside its numbered ones, and what was saved in another format.

Trainers end with `name.safetensors`, or a folder without a number. Where it holds the values of a
numbered snapshot it is left out; else it is for the user to say what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from posthoc_cli.errors import SnapshotError, brief, printable
from posthoc_cli.formats import as_snapshot
from posthoc_cli.snapshots.counts import read_counts
from posthoc_cli.snapshots.kinds import same_kind
from posthoc_cli.snapshots.listing import counts
from posthoc_cli.snapshots.names import read_name
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.storage import ENDING, Reader, TensorIndex

_WHOLE = 256 << 20
"""Bytes of data up to which all of it is compared; of more, some of each tensor."""

_BLOCK = 4096


class Contents(Protocol):
    """What of a folder's contents is put right here."""

    snapshots: list[Snapshot]
    skipped: list[tuple[str, str]]
    problems: list[tuple[str, str]]


def settle_copies(contents: Contents, unsaid: Mapping[str, TensorIndex]) -> None:
    """Leave out what has no number of its own and holds the values of a numbered snapshot.

    `unsaid` are those of which nothing says the step, by name. What holds other values is a
    problem. Raises what Reader does.
    """
    numbered = [each for each in contents.snapshots if counts(_step_part(each.file))]
    known = {each.file for each in numbered}
    at_step: dict[int, list[Snapshot]] = {}
    for each in contents.snapshots:
        at_step.setdefault(each.step, []).append(each)

    def leave_out_if_twin(each: Snapshot, others: Sequence[Snapshot]) -> None:
        if twin := _twin(each.index, _of_its_step(each, others)):
            contents.snapshots.remove(each)
            at_step[each.step].remove(each)
            contents.skipped.append((each.file, f"holds the same values as '{twin.file}'"))

    for each in list(contents.snapshots):
        if each.file not in known:
            leave_out_if_twin(each, [one for one in at_step[each.step] if one.file in known])
    for each in sorted(numbered, key=lambda each: (-len(each.file), each.file)):
        # A second download or a backup: the plainest name of the same values stays.
        leave_out_if_twin(each, [other for other in at_step[each.step] if other is not each])
    known = {each.file for each in contents.snapshots} | {file for file, _ in contents.skipped}
    told = dict(contents.problems)
    for name, index in unsaid.items():
        if name not in told.keys() - known or not numbered:
            continue
        unit_apart = numbered[0].profile.raw and _twin(index, numbered)
        if not counts(_step_part(name)) or unit_apart:
            contents.problems[:] = [each for each in contents.problems if each[0] != name]
            _settle(contents, name, index, numbered, told[name].rpartition("; ")[0])
    _ask_for_folders(contents, unsaid, numbered)


def _ask_for_folders(
    contents: Contents, unsaid: Mapping[str, TensorIndex], numbered: Sequence[Snapshot]
) -> None:
    """A folder without a number that holds the same network as the numbered folders do."""
    folders = [each for each in numbered if not each.file.lower().endswith(ENDING)]
    for name, reason in list(contents.skipped):
        index = unsaid.get(name)
        if index is None or not folders or not reason.startswith("a folder, and "):
            continue
        if _same_tensors(index, folders[-1].index):
            contents.skipped.remove((name, reason))
            _settle(contents, name, index, folders, reason.removeprefix("a folder, and "))


def _settle(
    contents: Contents, name: str, index: TensorIndex, numbered: Sequence[Snapshot], problem: str
) -> None:
    """Leave `name` out as a copy of a numbered snapshot, or note that it is to be decided."""
    if twin := _twin(index, numbered):
        contents.skipped.append((name, f"holds the same values as '{twin.file}'"))
        return
    # A plain name would fit the folders in the step folders too.
    inner = any(name in each.file.split("/")[1:] for each in numbered)
    glob = f"./{name}" if inner else name
    problem += f", and its values are none of the {len(numbered)} numbered snapshots'"
    remedy = f"leave it out with exclude='{glob}', or put its step into its name"
    contents.problems.append((name, brief(printable(f"{problem}; {remedy}"))))


def other_formats(contents: Contents, failed: Mapping[str, SnapshotError]) -> None:
    """Leave out checkpoints of other tools beside safetensors files that they are no part of.

    `failed` are those that aren't snapshots, by name, with why. What is not named like the
    snapshots is for training to go on from; what is of a step that there is, that step once more.
    """
    plain = [each for each in contents.snapshots if each.index.structure is None]
    if not plain:
        return
    steps = {each.step for each in plain}
    for each in plain:
        steps |= _steps(_step_part(each.file))
    heads = {_head(each.file) for each in plain}
    raw = any(each.profile.raw for each in plain)
    for name in failed:
        reason = None
        if _steps(_step_part(name)) & steps:
            reason = f"there is a {ENDING} file of its step"
        elif not raw and _head(name) not in heads:
            reason = "not a safetensors file, and not named like the snapshots"
        if reason:
            contents.problems[:] = [each for each in contents.problems if each[0] != name]
            contents.skipped.append((name, reason))
    for each in list(contents.snapshots):
        if each.index.structure is not None and _of_its_step(each, plain):
            contents.snapshots.remove(each)
            contents.skipped.append((each.file, f"there is a {ENDING} file of its step"))


def _head(path: str) -> str:
    """What a name begins with before its first number."""
    return re.split("[0-9]", _step_part(path))[0].lower()


def _step_part(name: str) -> str:
    """Of a path the part that counts training, else its last."""
    parts = name.removesuffix(".index.json").split("/")
    return next(filter(counts, parts), parts[-1])


def _steps(part: str) -> set[int]:
    """All that a name may say its step is."""
    name = as_snapshot(part)
    name = name if name.lower().endswith(ENDING) else part + ENDING
    reading = read_name(name)
    return {*read_counts(name).values(), *(reading.steps if reading else ())}


def _of_its_step(snapshot: Snapshot, others: Sequence[Snapshot]) -> list[Snapshot]:
    return [
        each
        for each in others
        if each.step == snapshot.step and same_kind(each.profile, snapshot.profile)
    ]


# Values


def _twin(index: TensorIndex, snapshots: Sequence[Snapshot]) -> Snapshot | None:
    """The newest of `snapshots` that holds the same tensors with the same values."""
    for each in reversed(snapshots):
        if _same_tensors(index, each.index) and _same_values(index, each.index):
            return each
    return None


def _same_tensors(one: TensorIndex, other: TensorIndex) -> bool:
    if one.tensors is other.tensors:
        return True
    return one.tensors.keys() == other.tensors.keys() and all(
        (info.dtype, info.shape) == (other.tensors[name].dtype, other.tensors[name].shape)
        for name, info in one.tensors.items()
    )


def _same_values(one: TensorIndex, other: TensorIndex) -> bool:
    length = sum(info.end - info.start for info in one.tensors.values())
    with Reader(one) as first, Reader(other) as second:
        for name, info in one.tensors.items():
            place, count = other.tensors[name].start, info.end - info.start
            if length <= _WHOLE:
                starts = range(0, count, 1 << 20)
                size = 1 << 20
            else:  # the beginning, the middle and the end of each
                size = min(_BLOCK, count)
                starts = range(0, max(count - size, 0) + 1, max((count - size) // 2, 1))[:3]
            for at in starts:
                data, same = bytearray(min(size, count - at)), bytearray(min(size, count - at))
                first.read(info.start + at, memoryview(data))
                second.read(place + at, memoryview(same))
                if data != same:
                    return False
    return True
