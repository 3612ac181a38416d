"""Outputs: their files, and the sink that writes the sums to them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.storage import Part as FilePart
from posthoc_cli.storage import (
    TensorIndex,
    existing_output,
    index_path,
    made_by_posthoc,
    make_header,
    make_index,
    replaced_files,
    shard_names,
    shard_paths,
    spans,
    split,
)
from posthoc_cli.storage.atomic import AtomicFile, Group, commit_together
from posthoc_cli.storage.metadata import FORMAT, RECIPE, carried_over
from posthoc_cli.storage.workers import background_flush
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.engine import Engine, Part, Progress, Results
from posthoc_cli.synthesis.nonfinite import NonfiniteReport, NonfiniteTensor, summarize
from posthoc_cli.synthesis.plan import Chunk, TensorPlan


@dataclass(frozen=True, slots=True)
class Output:
    """One target's output: a file, or an index and its `shards`; their `bytes` together.

    `seconds` is how long all outputs took to be written, None where this one was there and is kept.
    """

    path: Path
    shards: Sequence[Path]
    bytes: int
    seconds: float | None


class Saved(list[Path]):
    """The path of each target's output; `outputs` tells more of each.

    `nonfinite` are the tensors that hold NaN or infinity, or sums too large for the dtype, and
    `summary` says so in a line.
    """

    def __init__(
        self, outputs: list[Output], nonfinite: list[NonfiniteTensor], summary: str
    ) -> None:
        super().__init__(output.path for output in outputs)
        self.outputs = outputs
        self.nonfinite = nonfinite
        self.summary = summary


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: for each target its `files`, an index last, and their bytes together."""

    files: list[tuple[Path, ...]]
    sizes: list[int]
    nonfinite: list[NonfiniteTensor]


def write_outputs(
    plan: TensorPlan,
    weights: Weights,
    paths: Sequence[Path],
    recipes: Sequence[Mapping[str, Any]],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    shard_bytes: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    row_bytes: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write one output for each row of `weights` [targets, snapshots], in one pass.

    Each appears whole or not at all; when anything fails none does. One with more than
    `shard_bytes` of data becomes several files of at most so much, and an index. With `strict`, NaN
    or infinity in the snapshots or the sums is an error. `workers`, `row_bytes` and `progress` are
    those of Engine.

    Raises UsageError when an output exists and `overwrite` is false, or when it is one of the
    snapshots; SnapshotError when a snapshot changed meanwhile, or by `strict`; MachineError when
    the disk or the device fails.
    """
    outputs = [
        output_files(plan, path, recipe, shard_bytes=shard_bytes, overwrite=overwrite)
        for path, recipe in zip(paths, recipes, strict=True)
    ]
    report = NonfiniteReport(plan, weights)
    engine = Engine(
        plan,
        weights,
        device=device,
        workers=workers,
        row_bytes=row_bytes,
        report=report,
        progress=progress,
        other_files=sum(len(output.files) for output in outputs),
    )
    with engine, _opened(plan, outputs):
        engine.run(FileSink(outputs))
        found = report.tensors(engine.varies)
        if strict and found:
            raise SnapshotError(*summarize(plan, found), "nothing is written, as strict=True says")
    return Written(
        [tuple(file.path for file in output.files) for output in outputs],
        [sum(file.size for file in output.files) for output in outputs],
        found,
    )


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """The files of one output, in the order in which they are committed, and its data's places.

    Of one in shards the index comes last, and has no part. `replaced` gives the files that go, as
    they are when it is called.
    """

    path: Path
    files: Sequence[AtomicFile]
    contents: Sequence[bytes]
    parts: Sequence[FilePart]
    replaced: Callable[[], list[Path]]


def output_files(
    plan: TensorPlan,
    path: Path,
    recipe: Mapping[str, Any],
    *,
    shard_bytes: int | None = None,
    overwrite: bool = False,
) -> OutputFiles:
    """The files of an output; shards with an index where one would hold more than `shard_bytes`.

    Raises UsageError when the output exists and `overwrite` is false.
    """
    places = make_header(plan.tensors, {})[1]
    shards = [list(places)] if shard_bytes is None else split(places, shard_bytes)
    carried = carried_over(plan.sources[plan.newest].metadata)
    metadata = carried | {RECIPE: json.dumps(recipe)}
    if len(shards) > 1:
        metadata = {FORMAT: "pt", **metadata}  # without it transformers loads no shard
    paths = [path] if len(shards) == 1 else shard_paths(path, len(shards))
    existing_output(path)  # once what a killed run was replacing is finished or undone
    replaced_files(path, paths, overwrite)  # refuses before anything is read
    files, contents, parts = [], [], []
    for name, names in zip(paths, shards, strict=True):
        header, _ = make_header({tensor: plan.tensors[tensor] for tensor in names}, metadata)
        first, last = places[names[0]].start, places[names[-1]].end
        size = len(header) + last - first
        files.append(AtomicFile(name, size, overwrite=overwrite))
        contents.append(header)
        parts.append(FilePart(first, last - first, len(header)))
    if len(shards) > 1:
        index = make_index(list(zip(paths, shards, strict=True)), plan.bytes_to_write)
        files.append(AtomicFile(index_path(path), len(index), overwrite=overwrite))
        contents.append(index)
    return OutputFiles(path, files, contents, parts, lambda: replaced_files(path, paths, overwrite))


class FileSink:
    """Writes the sums of each target to the files of its output."""

    def __init__(self, outputs: Sequence[OutputFiles]) -> None:
        self._outputs = outputs

    def take_sums(self, chunk: Chunk, results: Results, unsettled: Sequence[Part]) -> None:
        self.take_copies(chunk, results)

    def take_copies(self, chunk: Chunk, results: Results) -> None:
        for target, output in enumerate(self._outputs):
            data = results(target)
            for at, offset, count in spans(output.parts, chunk.out_start, len(data)):
                output.files[at].write_at(offset, data[:count])
                data = data[count:]


@contextlib.contextmanager
def _opened(plan: TensorPlan, outputs: Sequence[OutputFiles]) -> Iterator[None]:
    """Open the files of `outputs` for a `with` block, at the end of which all appear, or none.

    Raises UsageError when one is a snapshot or lies among them, MachineError when the disk fails.
    """

    def group(output: OutputFiles) -> Group:
        def old() -> list[Path]:
            replaced = output.replaced()
            _refuse_inputs(plan.sources, {*(file.path for file in output.files), *replaced})
            return replaced

        return Group(output.files, old, output.path)

    files = [file for output in outputs for file in output.files]
    with commit_together([group(output) for output in outputs]):
        for output in outputs:
            for file, content in zip(output.files, output.contents, strict=True):
                file.write_at(0, content)
        with background_flush(files):
            yield


def _refuse_inputs(sources: Sequence[TensorIndex], outputs: Collection[Path]) -> None:
    """Never write over a snapshot, whatever name or link it goes by, nor over one not used."""
    inputs = [file.path for source in sources for file in source.files]
    folders = {source.path.parent for source in sources}
    for path in outputs:
        if not path.exists():
            continue
        if any(os.path.samefile(path, source) for source in inputs):
            raise UsageError(str(path), "is one of the snapshots", "choose another output")
        among = any(os.path.samefile(path.parent, folder) for folder in folders)
        if among and not made_by_posthoc(path):
            raise UsageError(
                str(path),
                "lies among the snapshots, and posthoc didn't make it",
                "choose another output",
            )


def kept_output(path: Path) -> Output:
    """An output that is there already: its file or index, its shards, their bytes."""
    main = existing_output(path)[0]
    shards = [] if main == path else [path.with_name(name) for name in sorted(shard_names(main))]
    return Output(main, shards, sum(each.stat().st_size for each in (main, *shards)), None)
