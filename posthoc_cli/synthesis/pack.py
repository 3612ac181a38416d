"""A folder of snapshots in, the same stored as differences out.

The snapshots of one profile are a chain: the first, and each N-th after it, is a plain file, the
keyframe; every other one is the difference to what those before it in the chain, as they can be
rebuilt, let expect (see `prediction`). Those of the other profiles are of the same chain: their
first after a keyframe is a difference to that, and no keyframe of their own. What is there already
is kept, so that a run can be interrupted.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli.errors import LinkError, PosthocError, SnapshotError, UsageError, either, printable
from posthoc_cli.formats import as_snapshot
from posthoc_cli.snapshots import Snapshot
from posthoc_cli.snapshots.identity import stated
from posthoc_cli.snapshots.kinds import same_kind
from posthoc_cli.solver import Average
from posthoc_cli.storage import ENDING, Cache, Reader, TensorIndex, TensorInfo, open_tensors
from posthoc_cli.storage.deltas import MOST_LINKS, bases_of, links_of
from posthoc_cli.storage.disk import make_folder
from posthoc_cli.storage.dtypes import bytes_of
from posthoc_cli.storage.metadata import FORMAT, PACKED, STEP, carried_over
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.readers import can_open
from posthoc_cli.storage.stores import exists, file_status, is_folder, same_file
from posthoc_cli.storage.temporary import clean_up
from posthoc_cli.synthesis.bases import Stored
from posthoc_cli.synthesis.delta_check import check_chain
from posthoc_cli.synthesis.deltas import (
    DELTA_DTYPES,
    NewFile,
    ReadElements,
    write_chain,
)
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.prediction import predictors
from posthoc_cli.synthesis.values import Bytes

KEYFRAME_EVERY = 16


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot to pack: what its file is called, and those of its bases, with their coefficients;
    a keyframe has none."""

    snapshot: Snapshot
    output: Path
    bases: Sequence[tuple[Path, float]]

    @property
    def base(self) -> Path | None:
        return next((path for path, _ in self.bases), None)


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
    if not snapshots:
        return []
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
    links = 0
    chain: list[tuple[int, Average]] = []
    outputs: list[Path] = []
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
        own = kind[snapshot.file]
        if own == main:
            if links % keyframe_every == 0:
                chain, outputs = [], []
            links += 1
        bases = predictors(chain, own, snapshot.profile) if chain else []
        jobs.append(Job(snapshot, output, [(outputs[at], number) for at, number in bases]))
        chain.append((own, snapshot.profile))
        outputs.append(output)
    return jobs


def _name(snapshot: Snapshot) -> str:
    """A packed snapshot's name: its own, or its path with hyphens, with the usual ending."""
    name = as_snapshot(snapshot.file.removesuffix(".index.json")).replace("/", "-")
    return name if name.lower().endswith(ENDING) else name + ENDING


def _check_folder(snapshots: Sequence[Snapshot], folder: Path) -> None:
    if isinstance(folder, Url):
        problem = "is a URL, and what is packed is read back before it appears"
        raise UsageError(str(folder), problem, "pack to a folder, and copy that")
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

    Those from one keyframe to the next are read once and written together, in little memory, and
    appear one after the other, each whole or not at all. What is there and was made of the same
    file is kept, with `verify` once it is read back. `progress` is told the bytes just done.

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
    packed: list[Packed] = []
    cache: Cache = {}
    for segment in _segments(jobs):
        begun = len(packed)
        while len(packed) - begun < len(segment):
            rest = segment[len(packed) - begun :]
            made = _done(rest[0], dtype, cache)
            if made is not None:
                packed.append(Packed(rest[0], made.size, None))
                if progress is not None:
                    progress(rest[0].snapshot.bytes)
                continue
            packed += _write(_together(rest, overwrite), dtype, cache, progress)
        if verify:
            _verify(segment, cache, progress)
    return packed


def _segments(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs from each keyframe to the next."""
    segments: list[list[Job]] = []
    for job in jobs:
        if not job.bases:
            segments.append([])
        segments[-1].append(job)
    return segments


def _together(jobs: Sequence[Job], overwrite: bool) -> list[Job]:
    """Those of `jobs`, whose first is to be written, that are written in one pass.

    Raises UsageError when there is something else in its place, unless `overwrite`.
    """
    first = jobs[0]
    again = exists(first.output)
    if again and not overwrite:
        try:
            open_tensors(first.output, {})
        except LinkError as error:
            remedy = f"remove '{printable(error.link)}', and pack again with force=True"
            raise SnapshotError(error.subject, error.problem, remedy) from None
        except PosthocError:
            pass
        raise UsageError(
            str(first.output),
            f"exists already, and is not what this makes of '{printable(first.snapshot.file)}'",
            "use force=True to replace it, or choose another folder",
        )
    files, count = 0, 0
    kinds = _dtypes(first)
    for job in jobs:
        files += 1 + len(job.snapshot.index.files)
        # What builds on a file that is replaced is made anew, whatever there is.
        there = exists(job.output) and not again
        if count and (there or not can_open(files) or _dtypes(job) != kinds):
            break
        count += 1
    return list(jobs[:count])


def _dtypes(job: Job) -> dict[str, str]:
    return {name: info.dtype for name, info in job.snapshot.index.tensors.items()}


def _entry(job: Job, dtype: str) -> str:
    """What a packed snapshot says it was made of."""
    index = job.snapshot.index
    entry = {
        "file": job.snapshot.file,
        "bytes": sum(file.size for file in index.files),
        "modified": max((file.modified for file in index.files), default=0),
        "dtype": dtype,
    }
    if index.structure is not None:  # of several networks in a checkpoint, which it is
        places = [(part.file, part.data_start, part.length) for part in index.parts]
        entry["places"] = zlib.crc32(repr(places).encode())
    return json.dumps(entry)


def _done(job: Job, dtype: str, cache: Cache) -> TensorIndex | None:
    """What lies at the output, if it is what this makes of the snapshot, step and profile too."""
    if not exists(job.output):
        return None
    try:
        there = open_tensors(job.output, cache)
    except PosthocError:
        return None
    bases = [(base.name, base.coefficient) for base in bases_of(there.metadata)]
    same = _metadata(job, dtype).items() <= there.metadata.items()
    return there if same and bases == [(path.name, c) for path, c in job.bases] else None


def _write(
    jobs: Sequence[Job], dtype: str, cache: Cache, progress: Progress | None
) -> list[Packed]:
    begin = time.perf_counter()
    again = any(exists(job.output) for job in jobs)
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(job.snapshot.index)) for job in jobs]
        files = [
            _new_file(job, _metadata(job, dtype), reader)
            for job, reader in zip(jobs, readers, strict=True)
        ]

        def check(_: Path) -> None:
            for reader in readers:
                reader.check_unchanged()

        outside = _outside(jobs, cache, stack)
        write_chain(files, dtype, outside, progress=progress, check=check)
    if again:
        cache.clear()
    seconds = (time.perf_counter() - begin) / len(jobs)
    return [Packed(job, open_tensors(job.output, cache).size, seconds) for job in jobs]


def _metadata(job: Job, dtype: str) -> dict[str, str]:
    snapshot = job.snapshot
    metadata = {FORMAT: "pt", **carried_over(snapshot.index.metadata), STEP: str(snapshot.step)}
    return metadata | stated(snapshot.profile) | {PACKED: _entry(job, dtype)}


def _new_file(job: Job, metadata: Mapping[str, str], reader: Reader) -> NewFile:
    tensors = job.snapshot.index.tensors
    read = _elements(reader, tensors)
    return NewFile(job.output, tensors, read, metadata, job.bases, exists(job.output))


def _outside(jobs: Sequence[Job], cache: Cache, stack: ExitStack) -> Stored | None:
    """The bases that are none of `jobs`, open."""
    every = dict.fromkeys(path for job in jobs for path, _ in job.bases)
    outside = [path for path in every if path not in {job.output for job in jobs}]
    if not outside:
        return None
    return stack.enter_context(Stored([open_tensors(path, cache) for path in outside]))


def _elements(reader: Reader, tensors: Mapping[str, TensorInfo]) -> ReadElements:
    def read(name: str, first: int, into: Bytes) -> None:
        info = tensors[name]
        reader.read(info.start + bytes_of(info.dtype, first), into.data)

    return read


def _verify(jobs: Sequence[Job], cache: Cache, progress: Progress | None) -> None:
    """Read a segment back; or as much of it at a time as can be open."""
    while jobs:
        most = next((n for n in range(len(jobs), 1, -1) if can_open(2 * n)), 1)
        with ExitStack() as stack:
            made = []
            for job in jobs[:most]:
                index = open_tensors(job.output, cache)
                own = links_of(index)[-1].index
                source, there = (
                    stack.enter_context(Reader(each)) for each in (job.snapshot.index, own)
                )
                read = _elements(there, own.tensors)
                made.append((_new_file(job, {}, source), index, read))
            check_chain(made, _outside(jobs[:most], cache, stack), progress=progress)
        jobs = jobs[most:]
