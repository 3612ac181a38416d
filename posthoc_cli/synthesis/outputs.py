"""Outputs: their files, and the sink that writes the sums to them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.lora_scale import lora_metadata
from posthoc_cli.storage import Part as FilePart
from posthoc_cli.storage import (
    TensorIndex,
    TensorInfo,
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
from posthoc_cli.synthesis.lora_report import LoraReport, report_products
from posthoc_cli.synthesis.nonfinite import NonfiniteReport, NonfiniteTensor, summarize
from posthoc_cli.synthesis.plan import Chunk, TensorPlan
from posthoc_cli.synthesis.products import (
    Factors,
    Products,
    Ranks,
    find_ranks,
    rounded,
)


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
    `summary` says so in a line. Of a LoRA, `lora` tells how far its two averages are apart.
    """

    def __init__(
        self,
        outputs: list[Output],
        nonfinite: list[NonfiniteTensor],
        summary: str,
        lora: LoraReport | None = None,
    ) -> None:
        super().__init__(output.path for output in outputs)
        self.outputs = outputs
        self.nonfinite = nonfinite
        self.summary = summary
        self.lora = lora


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: for each target its `files`, an index last, and their bytes together."""

    files: list[tuple[Path, ...]]
    sizes: list[int]
    nonfinite: list[NonfiniteTensor]
    ranks: Ranks | None


def save_outputs(
    plan: TensorPlan | Products,
    weights: Weights,
    paths: Sequence[Path],
    recipes: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
    *,
    skip_existing: bool,
    progress: Callable[[int, int], None] | None,
    **more: Any,
) -> Saved:
    """Write the outputs, and with `skip_existing` none that is there; what came of all of them.

    `recipes` makes the recipes of those targets that are to be written; `progress` is called with
    the bytes just read and all there are; `more` is for `write_outputs`, which raises.
    """
    kept = [skip_existing and bool(existing_output(path)) for path in paths]
    wanted = [at for at, there in enumerate(kept) if not there]
    outputs = {at: kept_output(path) for at, path in enumerate(paths) if kept[at]}
    if not wanted:
        return Saved([outputs[at] for at in range(len(paths))], [], "")
    total = plan.bytes_to_read

    def count(read: int) -> None:
        if progress is not None:
            progress(read, total)

    made, places = recipes(wanted), [paths[at] for at in wanted]
    begin = time.perf_counter()
    written = write_outputs(plan, weights[wanted], places, made, progress=count, **more)
    seconds = time.perf_counter() - begin
    for at, files, size in zip(wanted, written.files, written.sizes, strict=True):
        outputs[at] = Output(files[-1], files[:-1], size, seconds)
    rest = plan.plan if isinstance(plan, Products) else plan
    summary = ": ".join(summarize(rest, written.nonfinite)) if written.nonfinite else ""
    report = report_products(plan, weights[wanted], wanted, written.ranks)
    return Saved([outputs[at] for at in range(len(paths))], written.nonfinite, summary, report)


def write_outputs(
    plan: TensorPlan | Products,
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
    products = plan if isinstance(plan, Products) else None
    plan = plan.plan if isinstance(plan, Products) else plan
    found = find_ranks(products, weights, progress) if products else None
    outputs = [
        output_files(
            plan,
            path,
            recipe,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            products=products,
            ranks=found.ranks[at] if found else (),
        )
        for at, (path, recipe) in enumerate(zip(paths, recipes, strict=True))
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
        if products is not None and found is not None:
            _write_products(products, found.ranks, weights, outputs, progress)
        nonfinite = report.tensors(engine.varies)
        if strict and nonfinite:
            summary = summarize(plan, nonfinite)
            raise SnapshotError(*summary, "nothing is written, as strict=True says")
    return Written(
        [tuple(file.path for file in output.files) for output in outputs],
        [sum(file.size for file in output.files) for output in outputs],
        nonfinite,
        found,
    )


def _write_products(
    products: Products,
    ranks: Sequence[Sequence[int]],
    weights: Weights,
    outputs: Sequence[OutputFiles],
    progress: Progress | None,
) -> None:
    """Write the factors of `products`, of these `ranks` [targets][pairs], to their places."""
    with Factors.open(products) as factors:
        for at, pair in enumerate(products.pairs):
            made = factors.factors(at, factors.stack(at), weights, [each[at] for each in ranks])
            for output, values in zip(outputs, made, strict=True):
                for name, value in zip(pair.names, values, strict=True):
                    info = output.places[name]
                    output.write(info.start, rounded(name, value, info.dtype).data)
            if progress is not None:
                progress(products.bytes_of(pair))


def write_copy(
    plan: TensorPlan,
    path: Path,
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[int, list[str]]:
    """Write a plan of which nothing is averaged; the file's size, and which tensors overflowed.

    Raises what `write_outputs` does.
    """
    output = output_files(plan, path, None, metadata=metadata, overwrite=overwrite)
    weights = np.ones((1, 1))
    report = NonfiniteReport(plan, weights)
    engine = Engine(plan, weights, report=report, progress=progress)
    with engine, _opened(plan, [output], beside=True):
        engine.run(FileSink([output]))
    found = [each.tensor for each in report.tensors(engine.varies) if each.overflowed]
    return sum(file.size for file in output.files), sorted(found)


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """The files of one output, in the order in which they are committed, and its data's places.

    Of one in shards the index comes last, and has no part. `places` are those of its tensors,
    which are not the plan's if `moved`. `replaced` gives the files that go, as they are when it is
    called.
    """

    path: Path
    files: Sequence[AtomicFile]
    contents: Sequence[bytes]
    parts: Sequence[FilePart]
    places: Mapping[str, TensorInfo]
    moved: bool
    replaced: Callable[[], list[Path]]

    def write(self, start: int, data: memoryview) -> None:
        """Write `data` from byte `start` of the tensors' data on."""
        for at, offset, count in spans(self.parts, start, len(data)):
            self.files[at].write_at(offset, data[:count])
            data = data[count:]

    def take(self, chunk: Chunk, data: memoryview) -> None:
        """Write the values of a chunk to where its tensors lie."""
        if not self.moved:
            self.write(chunk.out_start, data)
            return
        segment = chunk.segment
        for tensor, part in chunk.parts():
            inside = segment.out_size_of(part.first - segment.bounds[tensor])
            count = segment.out_size_of(part.elements)
            self.write(self.places[segment.names[tensor]].start + inside, data[:count])
            data = data[count:]


def output_files(
    plan: TensorPlan,
    path: Path,
    recipe: Mapping[str, Any] | None,
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    products: Products | None = None,
    ranks: Sequence[int] = (),
) -> OutputFiles:
    """The files of an output; shards with an index where one would hold more than `shard_bytes`.

    With `products`, their factors of these `ranks` are among its tensors. The metadata is that of
    the newest snapshot with the recipe, or else `metadata`. Raises UsageError when the output
    exists and `overwrite` is false.
    """
    tensors = products.tensors(ranks) if products else plan.tensors
    places = make_header(tensors, {})[1]
    shards = [list(places)] if shard_bytes is None else split(places, shard_bytes)
    carried = carried_over(plan.sources[plan.newest].metadata)
    if products is not None:
        carried = lora_metadata(carried, products.shared_rank(ranks), ranks)
    if metadata is None:
        metadata = carried | {RECIPE: json.dumps(recipe)}
    if len(shards) > 1:
        metadata = {FORMAT: "pt", **metadata}  # without it transformers loads no shard
    paths = [path] if len(shards) == 1 else shard_paths(path, len(shards))
    existing_output(path)  # once what a killed run was replacing is finished or undone
    replaced_files(path, paths, overwrite)  # refuses before anything is read
    files, contents, parts = [], [], []
    for name, names in zip(paths, shards, strict=True):
        header, _ = make_header({tensor: tensors[tensor] for tensor in names}, metadata)
        first, last = places[names[0]].start, places[names[-1]].end
        size = len(header) + last - first
        files.append(AtomicFile(name, size, overwrite=overwrite))
        contents.append(header)
        parts.append(FilePart(first, last - first, len(header)))
    if len(shards) > 1:
        total = max(info.end for info in places.values())
        index = make_index(list(zip(paths, shards, strict=True)), total)
        files.append(AtomicFile(index_path(path), len(index), overwrite=overwrite))
        contents.append(index)
    return OutputFiles(
        path,
        files,
        contents,
        parts,
        places,
        products is not None,
        lambda: replaced_files(path, paths, overwrite),
    )


class FileSink:
    """Writes the sums of each target to the files of its output."""

    def __init__(self, outputs: Sequence[OutputFiles]) -> None:
        self._outputs = outputs

    def take_sums(self, chunk: Chunk, results: Results, unsettled: Sequence[Part]) -> None:
        self.take_copies(chunk, results)

    def take_copies(self, chunk: Chunk, results: Results) -> None:
        for target, output in enumerate(self._outputs):
            output.take(chunk, results(target))


@contextlib.contextmanager
def _opened(
    plan: TensorPlan, outputs: Sequence[OutputFiles], *, beside: bool = False
) -> Iterator[None]:
    """Open the files of `outputs` for a `with` block, at the end of which all appear, or none.

    Raises UsageError when one is a snapshot or takes the place of what lies beside them and isn't
    ours, unless that is what `beside` allows, MachineError when the disk fails.
    """

    def group(output: OutputFiles) -> Group:
        def old() -> list[Path]:
            replaced = output.replaced()
            paths = {*(file.path for file in output.files), *replaced}
            _refuse_inputs(plan.sources, paths, beside)
            return replaced

        return Group(output.files, old, output.path)

    files = [file for output in outputs for file in output.files]
    with commit_together([group(output) for output in outputs]):
        for output in outputs:
            for file, content in zip(output.files, output.contents, strict=True):
                file.write_at(0, content)
        with background_flush(files):
            yield


def _refuse_inputs(sources: Sequence[TensorIndex], outputs: Collection[Path], beside: bool) -> None:
    """Never write over a snapshot, whatever name or link it goes by; nor over one not used, which
    is what `beside` allows."""
    inputs = [file.path for source in sources for file in source.files]
    folders = {source.path.parent for source in sources}
    for path in outputs:
        if not path.exists():
            continue
        if any(os.path.samefile(path, source) for source in inputs):
            raise UsageError(str(path), "is one of the snapshots", "choose another output")
        among = any(os.path.samefile(path.parent, folder) for folder in folders)
        if among and not beside and not made_by_posthoc(path):
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
