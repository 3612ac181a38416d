"""Outputs: files that appear together, and what came of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import UsageError
from posthoc_cli.formats.companions import Companions
from posthoc_cli.storage import TensorIndex, made_by_posthoc
from posthoc_cli.storage.outputs import Group
from posthoc_cli.storage.ranks import share
from posthoc_cli.storage.stores import file_status, same_file
from posthoc_cli.storage.workers import background_flush
from posthoc_cli.storage.writing import commit_together
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.engine import Engine, Progress
from posthoc_cli.synthesis.kept import Forms, check_kept
from posthoc_cli.synthesis.lora_report import LoraReport, report_products
from posthoc_cli.synthesis.nonfinite import NonfiniteReport, NonfiniteTensor, summarize
from posthoc_cli.synthesis.output_files import (
    Output,
    OutputFiles,
    is_there,
    kept_output,
    output_files,
)
from posthoc_cli.synthesis.plan import TensorPlan
from posthoc_cli.synthesis.products import Factors, Products, Ranks, find_ranks, rounded
from posthoc_cli.synthesis.writing import (
    FileSink,
    by_shards,
    find_nonfinite,
    write_part,
    write_shards,
)


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
    """What was written: each target's output, and what is not finite in them."""

    outputs: list[Output]
    nonfinite: list[NonfiniteTensor]
    ranks: Ranks | None


def save_outputs(
    plan: TensorPlan | Products,
    weights: Weights,
    paths: Sequence[Path],
    recipes: Sequence[Mapping[str, Any]],
    *,
    skip_existing: bool,
    beside: Companions | None,
    progress: Callable[[int, int], None] | None,
    **more: Any,
) -> Saved:
    """Write the outputs, and with `skip_existing` none that is there; what came of all of them.

    `progress` is called with the bytes just read and all there are; `more` is for `write_outputs`,
    which raises. UsageError too where what is there isn't what would be written.
    """
    kept = [skip_existing and is_there(path, beside is not None) for path in paths]
    wanted = [at for at, there in enumerate(kept) if not there]
    outputs = {at: kept_output(path) for at, path in enumerate(paths) if kept[at]}
    check_kept([outputs[at].path for at in outputs], [recipes[at] for at in outputs], _forms(plan))
    if not wanted:
        return Saved([outputs[at] for at in range(len(paths))], [], "")
    total = plan.bytes_to_read + (beside.bytes * len(wanted) if beside else 0)

    def count(read: int) -> None:
        if progress is not None:
            progress(read, total)

    made, places = [recipes[at] for at in wanted], [paths[at] for at in wanted]
    more |= {"beside": beside, "progress": count}
    written = write_outputs(plan, weights[:, wanted], places, made, **more)
    outputs.update(zip(wanted, written.outputs, strict=True))
    rest = plan.plan if isinstance(plan, Products) else plan
    summary = ": ".join(summarize(rest, written.nonfinite)) if written.nonfinite else ""
    report = report_products(plan, weights[:, wanted], wanted, written.ranks)
    return Saved([outputs[at] for at in range(len(paths))], written.nonfinite, summary, report)


def _forms(plan: TensorPlan | Products) -> Forms:
    """The tensors of an output; the shapes of a LoRA's factors depend on their ranks."""
    if isinstance(plan, TensorPlan):
        return plan.tensors
    made = plan.tensors([1] * len(plan.pairs))
    own = plan.plan.tensors
    return {name: (code, own[name][1] if name in own else None) for name, (code, _) in made.items()}


def write_outputs(
    plan: TensorPlan | Products,
    weights: Weights,
    paths: Sequence[Path],
    recipes: Sequence[Mapping[str, Any]],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    shard_bytes: int | None = None,
    beside: Companions | None = None,
    strict: bool = False,
    workers: int | None = None,
    row_bytes: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write one output for each target of `weights` [groups, targets, snapshots], in one pass.

    The first axis may be missing where all tensors are of one group.

    Each appears whole or not at all; when anything fails none does. One with more than
    `shard_bytes` of data becomes several files of at most so much, and an index; with `beside`, a
    folder with that as well. With `strict`, NaN or infinity in the snapshots or the sums is an
    error. `workers`, `row_bytes` and `progress` are those of Engine; bytes that are copied count.

    Raises UsageError when an output exists and `overwrite` is false, or when it is one of the
    snapshots; SnapshotError when a snapshot changed meanwhile, or by `strict`; MachineError when
    the disk or the device fails.
    """
    begin = time.perf_counter()
    products = plan if isinstance(plan, Products) else None
    plan = plan.plan if isinstance(plan, Products) else plan
    weights = weights.reshape(-1, *weights.shape[-2:])
    found = find_ranks(products, weights, progress) if products else None
    outputs = [
        output_files(
            plan,
            path,
            recipe,
            shard_bytes=shard_bytes,
            beside=beside,
            overwrite=overwrite,
            products=products,
            ranks=found.ranks[at] if found else (),
        )
        for at, (path, recipe) in enumerate(zip(paths, recipes, strict=True))
    ]
    how: dict[str, Any] = {"device": device, "workers": workers, "row_bytes": row_bytes}
    if products is None and by_shards(outputs):
        shards = [
            [(file.path, file.size, content) for file, content in zip(*each, strict=True)]
            for each in ((output.files, output.contents) for output in outputs)
        ]
        paths = [file.path for output in outputs for file in output.files]
        _refuse_inputs(plan.sources, paths, False)
        bare = [replace(output, files=()) for output in outputs]
        how |= {"overwrite": overwrite, "strict": strict}
        done = share(write_shards, plan, weights, bare, shards, how, progress=progress)
        nonfinite = find_nonfinite(plan, weights, done)
    else:
        with _opened(plan, outputs, progress):
            done = share(
                *(write_part, plan, weights, outputs, how),
                progress=progress,
                # The factors of products lie among the sums: they are written by one rank.
                together=products is None
                and all(file.by_ranks for output in outputs for file in output.files),
            )
            if products is not None and found is not None:
                _write_products(products, found.ranks, weights, outputs, progress)
            nonfinite = find_nonfinite(plan, weights, done, strict=strict)
    seconds = time.perf_counter() - begin
    return Written([output.written(seconds) for output in outputs], nonfinite, found)


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
    weights = np.ones((1, 1, 1))  # [groups, targets, snapshots]
    report = NonfiniteReport(plan, weights)
    engine = Engine(plan, weights, report=report, progress=progress)
    with engine, _opened(plan, [output], beside=True):
        engine.run(FileSink([output]))
    found = [each.tensor for each in report.tensors(engine.varies) if each.overflowed]
    return sum(file.size for file in output.files), sorted(found)


@contextlib.contextmanager
def _opened(
    plan: TensorPlan,
    outputs: Sequence[OutputFiles],
    progress: Progress | None = None,
    *,
    beside: bool = False,
) -> Iterator[None]:
    """Open the files of `outputs` for a `with` block, at the end of which all appear, or none.

    Raises UsageError when one is a snapshot or takes the place of what lies beside them and isn't
    ours, unless that is what `beside` allows, MachineError when the disk fails.
    """

    def group(output: OutputFiles) -> Group:
        def old() -> list[Path]:
            replaced = output.replaced()
            new = () if output.folder else (file.path for file in output.files)
            _refuse_inputs(plan.sources, {*new, *replaced}, beside)
            return replaced

        return Group(output.folder.members if output.folder else output.files, old, output.path)

    files = [file for output in outputs for file in output.files]
    with commit_together([group(output) for output in outputs]):
        for output in outputs:
            for file, content in zip(output.files, output.contents, strict=True):
                file.write_at(0, content)
            if output.folder:
                output.folder.copy(progress or (lambda count: None))
        with background_flush(files):
            yield


def _refuse_inputs(sources: Sequence[TensorIndex], outputs: Collection[Path], beside: bool) -> None:
    """Never write over a snapshot, whatever name or link it goes by; nor over one not used, which
    is what `beside` allows."""
    inputs = [file.path for source in sources for file in source.files]
    folders = {source.path.parent for source in sources}
    for path in outputs:
        if file_status(path) is None:
            continue
        if any(same_file(path, source) for source in inputs):
            raise UsageError(str(path), "is one of the snapshots", "choose another output")
        among = any(same_file(path.parent, folder) for folder in folders)
        if among and not beside and not made_by_posthoc(path):
            raise UsageError(
                str(path),
                "lies among the snapshots, and posthoc didn't make it",
                "choose another output",
            )
