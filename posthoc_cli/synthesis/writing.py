"""A rank's part of the outputs, summed into their files.

As a rule all ranks write to the files that rank 0 has made. Where their disks are their own, each
writes whole shards, and rank 0 the index, without which these are nothing.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.storage.outputs import Group, Output
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.ranks import Part, Running, check_there, several, share
from posthoc_cli.storage.temporary import Probe
from posthoc_cli.storage.workers import background_flush
from posthoc_cli.storage.writing import commit_together, make_output
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.engine import Engine, Results
from posthoc_cli.synthesis.engine import Part as TensorPart
from posthoc_cli.synthesis.nonfinite import Counts, NonfiniteReport, NonfiniteTensor, summarize
from posthoc_cli.synthesis.output_files import OutputFiles
from posthoc_cli.synthesis.parts import between, parts_of, varying
from posthoc_cli.synthesis.plan import Chunk, TensorPlan

PAGE = max(mmap.PAGESIZE, 4096)
"""Bytes that a client of a file server may send at once where fewer were written."""

Piece = tuple[int, bytes]
"""Bytes, and where they begin in their file."""

Varying = list[bytes]
"""What an engine has as `varying`."""


class FileSink:
    """Writes the sums of each target to the files of its output."""

    def __init__(self, outputs: Sequence[OutputFiles]) -> None:
        self._outputs = outputs

    def take_sums(self, chunk: Chunk, results: Results, unsettled: Sequence[TensorPart]) -> None:
        self.take_copies(chunk, results)

    def take_copies(self, chunk: Chunk, results: Results) -> None:
        for target, output in enumerate(self._outputs):
            output.take(chunk, results(target))


class _Kept:
    """A file, of which what is written to some of its pages is kept."""

    in_order = False

    def __init__(self, file: Output, pages: Sequence[int]) -> None:
        self._file, self._pages = file, pages
        self.pieces: list[Piece] = []

    def write_at(self, offset: int, data: memoryview) -> None:
        self._file.write_at(offset, data)
        for page in self._pages:
            low, high = max(offset, page), min(offset + len(data), page + PAGE)
            if low < high:
                self.pieces.append((low, bytes(data[low - offset : high - offset])))


def write_part(
    part: Part,
    plan: TensorPlan,
    weights: Weights,
    outputs: Sequence[OutputFiles],
    how: dict[str, Any],
) -> Running:
    """Write a rank's part of all files; returns what was counted in it, and what varies."""
    files: list[Any] = [file for output in outputs for file in output.files]
    report = NonfiniteReport(plan, weights)
    parts = parts_of(plan, part.size)
    with contextlib.ExitStack() as opened:
        engine = opened.enter_context(_engine(part, plan, weights, report, len(files), how))
        for file in files:
            opened.enter_context(file.joined())
        if part.size == 1:
            yield from _sum(engine, outputs, files, parts[0])
            return report.counts, engine.varying
        if part.rank:
            opened.enter_context(background_flush(files))
        else:
            for file in files:  # what was written to reserve them
                file.flush()
        pages = [_shared_pages(output, parts) for output in outputs]
        kept: list[list[Any]] = [
            [_Kept(file, own) for file, own in zip(output.files, each, strict=False)]
            for output, each in zip(outputs, pages, strict=True)
        ]
        into = [replace(output, files=each) for output, each in zip(outputs, kept, strict=True)]
        yield from _sum(engine, into, files, parts[part.rank])
        for file in files:
            file.finish()
        pieces = yield [[file.pieces for file in each] for each in kept]
        if part.rank == 0:
            _write_pages(outputs, pages, pieces)
    return report.counts, engine.varying


def _shared_pages(output: OutputFiles, parts: Sequence[Sequence[Chunk]]) -> list[list[int]]:
    """Where the pages of each file begin that several ranks write to."""
    cuts = [part[0].out_start for part in parts if part]
    return [
        sorted(
            {
                (shard.data_start + max(cut - shard.first, 0)) // PAGE * PAGE
                for cut in (shard.first, *cuts)
                if shard.first <= cut < shard.first + shard.length
            }
        )
        for shard in output.parts
    ]


def _write_pages(
    outputs: Sequence[OutputFiles],
    pages: Sequence[Sequence[Sequence[int]]],
    pieces: Sequence[Sequence[Sequence[Sequence[Piece]]]],
) -> None:
    """Write the pages anew that several ranks have written parts of.

    A client of a file server may send whole pages, with what it takes for the rest of them.
    """
    for target, output in enumerate(outputs):
        for at, begins in enumerate(pages[target]):
            content = output.contents[at]
            for begin in begins:
                page = bytearray(min(PAGE, output.files[at].size - begin))
                header = content[begin : begin + PAGE]
                page[: len(header)] = header
                for offset, data in (piece for own in pieces for piece in own[target][at]):
                    if begin <= offset < begin + PAGE:
                        page[offset - begin : offset - begin + len(data)] = data
                output.files[at].write_at(begin, bytes(page))


def write_shards(
    part: Part,
    plan: TensorPlan,
    weights: Weights,
    outputs: Sequence[OutputFiles],
    files_of: Sequence[Sequence[tuple[Path, int, bytes]]],
    how: dict[str, Any],
) -> Running:
    """The same with whole shards, which get their names.

    `files_of` has the path, size and beginning of each file of each output.
    """
    how = dict(how)
    overwrite, strict = how.pop("overwrite"), how.pop("strict")
    shards = outputs[0].parts  # which are alike in all outputs
    total = shards[-1].first + shards[-1].length
    middles = [shard.first + shard.length // 2 for shard in shards]
    own = [at for at, middle in enumerate(middles) if middle * part.size // total == part.rank]
    first, last = (shards[own[0]], shards[own[-1]]) if own else (shards[0], shards[0])
    chunks = between(plan, first.first, last.first + last.length) if own else []
    own += [len(shards)] * (part.rank == 0)
    outputs = [
        replace(
            output,
            files=[make_output(path, size, overwrite=overwrite) for path, size, _ in files],
        )
        for output, files in zip(outputs, files_of, strict=True)
    ]
    groups = [Group([output.files[at] for at in own]) for output in outputs if own]
    files = [file for group in groups for file in group.files]
    report = NonfiniteReport(plan, weights)
    with _engine(part, plan, weights, report, len(files), how) as engine, commit_together(groups):
        for output, begun in zip(outputs, files_of, strict=True):
            for at in own:
                output.files[at].write_at(0, begun[at][2])
        with background_flush(files):
            yield from _sum(engine, outputs, files, chunks)
        find_nonfinite(plan, weights, (yield (report.counts, engine.varying)), strict=strict)
        if part.rank == 0:
            yield None  # the others give theirs their names first
    try:
        if part.rank:
            yield None
        yield None
    except GeneratorExit:  # a rank has failed
        for file in files if not overwrite else ():
            file.rollback()
        raise
    return report.counts, engine.varying


def _engine(
    part: Part,
    plan: TensorPlan,
    weights: Weights,
    report: NonfiniteReport,
    files: int,
    how: dict[str, Any],
) -> Engine:
    check_there(part, plan.sources)
    how = how | {"device": part.device(how["device"]), "other_files": files}
    return Engine(plan, weights, report=report, progress=part.count, **how)


def _sum(
    engine: Engine,
    outputs: Sequence[OutputFiles],
    files: Sequence[Output],
    chunks: Sequence[Chunk],
) -> Running:
    """Write the sums of `chunks` to those `files` of the outputs that are open."""
    yield None  # before anything is written, all ranks can
    sink = FileSink(outputs)
    once = any(file.in_order for file in files)
    if once:
        engine.settle(chunks)
    else:
        engine.sum(sink, chunks)
    engine.note_all((yield engine.varying))
    if once:
        engine.sum_in_order(sink, chunks)
    else:
        engine.copy(sink, chunks)
    engine.check_unchanged()


def find_nonfinite(
    plan: TensorPlan,
    weights: Weights,
    done: Sequence[tuple[Counts, Varying]],
    *,
    strict: bool = False,
) -> list[NonfiniteTensor]:
    """What is not finite by what the ranks have counted; with `strict` raises SnapshotError."""
    report = NonfiniteReport(plan, weights)
    for counts, _ in done:
        report.add(counts)
    varies = done[0][1]
    found = report.tensors(varying(plan, varies))
    if strict and found:
        summary = summarize(plan, found)
        raise SnapshotError(*summary, "nothing is written, as strict=True says")
    return found


def by_shards(outputs: Sequence[OutputFiles]) -> bool:
    """Whether ranks are to write whole shards: a rank doesn't see the folder in which rank 0
    writes, or an output is an object of a bucket.

    Raises UsageError when the outputs are not all in shards, and that is the only way.
    """
    if not several():
        return False
    whole = any(len(output.parts) == 1 or output.folder for output in outputs)
    if isinstance(outputs[0].path, Url):
        return not whole
    with contextlib.ExitStack() as made:
        folders = {output.path.parent: Probe(output.path) for output in outputs}
        probes = [made.enter_context(each) for each in folders.values()]
        others = [each for each in share(_blind, probes) if each is not None]
    if others and whole:
        raise UsageError(
            str(outputs[0].path.parent),
            f"isn't the same folder for {others[0]}: what rank 0 writes isn't there",
            "give one that all ranks share, or have whole shards written to each machine's own "
            "disk, with max_shard_size=",
        )
    return bool(others)


def _blind(part: Part, probes: Sequence[Probe]) -> Running:
    """The rank's name, if it doesn't see all of what rank 0 has made."""
    yield from ()
    return None if all(each.is_seen() for each in probes) else str(part)
