"""A folder of snapshots in, the same stored as differences out.

The snapshots of one profile are a chain: the first, and each N-th after it, is a plain file, the
keyframe; every other one is the difference to the one before it, as that can be rebuilt. Those of
the other profiles are so too, but their first after a keyframe is a difference to that: it is no
keyframe of their own. What is there already is kept, so that a run can be interrupted.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli.errors import PosthocError, SnapshotError, UsageError, either, printable
from posthoc_cli.formats import as_snapshot
from posthoc_cli.snapshots import Snapshot
from posthoc_cli.snapshots.kinds import same_kind
from posthoc_cli.solver import Average
from posthoc_cli.storage import ENDING, Cache, Reader, TensorIndex, open_tensors
from posthoc_cli.storage.deltas import MOST_LINKS
from posthoc_cli.storage.disk import make_folder
from posthoc_cli.storage.dtypes import bytes_of
from posthoc_cli.storage.metadata import BASE, FORMAT, PACKED, STEP, carried_over
from posthoc_cli.storage.stores import exists, file_status, is_folder, same_file
from posthoc_cli.storage.temporary import clean_up
from posthoc_cli.synthesis.conversion import stated
from posthoc_cli.synthesis.deltas import DELTA_DTYPES, Bytes, check_delta, write_delta
from posthoc_cli.synthesis.outputs import write_copy
from posthoc_cli.synthesis.plan import plan_tensors

KEYFRAME_EVERY = 16

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot to pack: what its file is called, and that of its base, None for a keyframe."""

    snapshot: Snapshot
    output: Path
    base: Path | None


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed snapshot of `bytes` bytes; `seconds` is None where it was there already."""

    job: Job
    bytes: int
    seconds: float | None


def plan_pack(
    snapshots: Sequence[Snapshot], folder: Path, *, keyframe_every: int = KEYFRAME_EVERY
) -> list[Job]:
    """What becomes of each of `snapshots`, which are by step, in the order in which it is done.

    Raises UsageError for `keyframe_every` out of bounds, a `folder` that the snapshots lie in, or
    two that would have one name.
    """
    if not 1 <= keyframe_every <= MOST_LINKS - 1:
        remedy = f"give 1 to {MOST_LINKS - 1}"
        raise UsageError("keyframe_every=", f"{keyframe_every} is out of bounds", remedy)
    _check_folder(snapshots, folder)
    kinds: list[Average] = []
    kind = {}
    for each in snapshots:
        known = (at for at, one in enumerate(kinds) if same_kind(one, each.profile))
        kind[each.file] = next(known, len(kinds))
        if kind[each.file] == len(kinds):
            kinds.append(each.profile)
    counts = Counter(kind.values())
    # Of several the first, but sooner an average than the network itself, which changes more.
    main = max(counts, key=lambda each: (counts[each], not kinds[each].raw))
    jobs: list[Job] = []
    taken: dict[str, Snapshot] = {}
    base: Path | None = None
    links = 0
    last: dict[int, Path] = {}
    for snapshot in sorted(snapshots, key=lambda each: (each.step, kind[each.file] != main)):
        name = _name(snapshot)
        place = os.path.normcase(name)
        if place in taken:
            raise UsageError(
                str(snapshot.index.path),
                f"would become '{printable(name)}', as '{printable(taken[place].file)}' would",
                "leave one of the two out with only=",
            )
        taken[place] = snapshot
        output = folder / name
        if kind[snapshot.file] == main:
            keyframe = links % keyframe_every == 0
            jobs.append(Job(snapshot, output, None if keyframe else base))
            base, links = output, links + 1
            last = {} if keyframe else last
        else:
            jobs.append(Job(snapshot, output, last.get(kind[snapshot.file], base)))
            last[kind[snapshot.file]] = output
    return jobs


def _name(snapshot: Snapshot) -> str:
    """A packed snapshot's name: its own, or its path with hyphens, with the usual ending."""
    name = as_snapshot(snapshot.file.removesuffix(".index.json")).replace("/", "-")
    return name if name.lower().endswith(ENDING) else name + ENDING


def _check_folder(snapshots: Sequence[Snapshot], folder: Path) -> None:
    if file_status(folder) is None:
        return
    if not is_folder(folder):
        raise UsageError(str(folder), "is not a folder", "give the folder to write to")
    places = {file.path.parent for each in snapshots for file in each.index.files}
    if any(same_file(folder, place) for place in places):
        raise UsageError(str(folder), "the snapshots lie in it", "choose another folder")


def pack(
    jobs: Sequence[Job],
    dtype: str,
    *,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Packed]:
    """Write each snapshot as a difference stored as `dtype`, a key of DELTA_DTYPES.

    One at a time is read once and written, in little memory, and appears whole or not at all; what
    is there and was made of the same file is kept, with `verify` once it is read back. `progress`
    is told the bytes of the snapshots just done.

    Raises UsageError for an unknown dtype or an output that is something else, unless `overwrite`;
    SnapshotError when a file changes meanwhile, or isn't what was written, MachineError when a disk
    fails.
    """
    if dtype not in DELTA_DTYPES:
        problem, remedy = f"'{dtype}' is not known", f"choose {either(DELTA_DTYPES)}"
        raise UsageError("dtype=", problem, remedy)
    if not jobs:
        return []
    make_folder(jobs[0].output.parent)
    clean_up(jobs[0].output.parent)
    packed = []
    cache: Cache = {}
    anew: set[Path] = set()
    for job in jobs:
        begin = time.perf_counter()
        entry = _entry(job, dtype)
        made = None if job.base in anew else _done(job, entry, cache)
        seconds = None
        if made is None:
            if exists(job.output) and not overwrite and job.base not in anew:
                of = f"'{printable(job.snapshot.file)}'"
                raise UsageError(
                    str(job.output),
                    f"exists already, and is not what this makes of {of}",
                    "use force=True to replace it, or choose another folder",
                )
            again = exists(job.output)
            _write(job, dtype, entry, cache, again)
            if again:
                anew.add(job.output)
                cache.clear()
            made = open_tensors(job.output, cache)
            seconds = time.perf_counter() - begin
        if verify:
            _verify(job, made)
        packed.append(Packed(job, made.size, seconds))
        if progress is not None:
            progress(job.snapshot.bytes)
    return packed


def _entry(job: Job, dtype: str) -> str:
    """What a packed snapshot says it was made of."""
    files = job.snapshot.index.files
    return json.dumps(
        {
            "file": job.snapshot.file,
            "bytes": sum(file.size for file in files),
            "modified": max((file.modified for file in files), default=0),
            "dtype": dtype,
        }
    )


def _done(job: Job, entry: str, cache: Cache) -> TensorIndex | None:
    """What lies at the output, if it is what this makes of the snapshot."""
    if not exists(job.output):
        return None
    try:
        there = open_tensors(job.output, cache)
    except PosthocError:
        return None
    base = None if job.base is None else job.base.name
    same = there.metadata.get(PACKED) == entry and there.metadata.get(BASE) == base
    return there if same else None


def _write(job: Job, dtype: str, entry: str, cache: Cache, overwrite: bool) -> None:
    snapshot = job.snapshot
    metadata = {FORMAT: "pt", **carried_over(snapshot.index.metadata), STEP: str(snapshot.step)}
    metadata |= stated(snapshot.profile) | {PACKED: entry}
    if job.base is None:
        index = snapshot.index
        plan = plan_tensors([index], 0, index.tensors, set(index.tensors), "same")
        write_copy(plan, job.output, metadata, overwrite=overwrite)
        return
    base = open_tensors(job.base, cache)
    with Reader(snapshot.index) as reader:
        write_delta(
            job.output,
            snapshot.index.tensors,
            _elements(reader, snapshot.index),
            base,
            dtype,
            metadata,
            overwrite=overwrite,
        )
        reader.check_unchanged()


def _elements(reader: Reader, index: TensorIndex) -> Callable[[str, int, Bytes], None]:
    def read(name: str, first: int, into: Bytes) -> None:
        info = index.tensors[name]
        reader.read(info.start + bytes_of(info.dtype, first), into.data)

    return read


def _verify(job: Job, made: TensorIndex) -> None:
    index = job.snapshot.index
    with Reader(index) as reader:
        read = _elements(reader, index)
        if made.links:
            check_delta(made, index.tensors, read)
            return
        with Reader(made) as there:
            for name, info in index.tensors.items():
                start, length = made.tensors[name].start, info.end - info.start
                for at in range(0, length, 1 << 20):
                    data, same = (bytearray(min(1 << 20, length - at)) for _ in range(2))
                    reader.read(info.start + at, memoryview(data))
                    there.read(start + at, memoryview(same))
                    if data != same:
                        problem = f"tensor '{printable(name)}' is not what it was made of"
                        remedy = "check the disk, and pack it anew"
                        raise SnapshotError(str(made.path), problem, remedy)
