"""The files and folders that outputs are, before and after they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli._version import __version__
from posthoc_cli.formats.companions import Companions
from posthoc_cli.snapshots.lora_scale import CONFIG, adapter_config, lora_metadata
from posthoc_cli.storage import Part as FilePart
from posthoc_cli.storage import (
    TensorInfo,
    existing_output,
    index_path,
    make_header,
    make_index,
    replaced_files,
    shard_paths,
    shards_of,
    spans,
    split,
)
from posthoc_cli.storage.folders import own_manifest, replaced_folder
from posthoc_cli.storage.manifest import is_taken
from posthoc_cli.storage.metadata import FORMAT, MANIFEST, RECIPE, carried_over
from posthoc_cli.storage.outputs import Output as FileOutput
from posthoc_cli.storage.stores import is_folder, size_of
from posthoc_cli.storage.temporary import clean_up
from posthoc_cli.storage.writing import OutputFolder, make_output, make_output_folder
from posthoc_cli.synthesis.plan import Chunk, TensorPlan
from posthoc_cli.synthesis.products import Products


@dataclass(frozen=True, slots=True)
class Output:
    """One target's output: a file, or an index and its `shards`, or a folder; its `bytes` together.

    `manifest` says what a folder holds: `weights`, what was `copied`, `left_out` and is `missing`.
    `seconds` is how long all outputs took to be written, None where this one was there and is kept.
    """

    path: Path
    shards: Sequence[Path]
    bytes: int
    seconds: float | None
    manifest: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """The files of one output, in the order in which they are committed, and its data's places.

    Of one in shards the index comes last, and has no part. `places` are those of its tensors,
    which are not the plan's if `moved`. `replaced` gives what goes, as it is when it is called.
    With a `folder` the files are written into that, and `manifest` says what it holds.
    """

    path: Path
    files: Sequence[FileOutput]
    contents: Sequence[bytes]
    parts: Sequence[FilePart]
    places: Mapping[str, TensorInfo]
    moved: bool
    replaced: Callable[[], list[Path]]
    folder: OutputFolder | None = None
    manifest: Mapping[str, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """For another rank: what it takes to write a part of them."""
        own = self.path, self.files, (), self.parts, self.places, self.moved, list
        return OutputFiles, own

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

    def written(self, seconds: float) -> Output:
        """What it is once it is in its place."""
        *shards, main = (file.path for file in self.files)
        if self.folder is None:
            return Output(main, shards, sum(file.size for file in self.files), seconds)
        return Output(self.path, shards, self.folder.size, seconds, self.manifest)


def output_files(
    plan: TensorPlan,
    path: Path,
    recipe: Mapping[str, Any] | None,
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    beside: Companions | None = None,
    overwrite: bool = False,
    products: Products | None = None,
    ranks: Sequence[int] = (),
) -> OutputFiles:
    """The files of an output; shards with an index where one would hold more than `shard_bytes`;
    in a folder with what lies `beside` the snapshots.

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
    if len(shards) > 1 or beside:
        metadata = {FORMAT: "pt", **metadata}  # without it transformers loads none
    weights = path / beside.weights if beside else path
    paths = [weights] if len(shards) == 1 else shard_paths(weights, len(shards))
    over = overwrite and beside is None

    def replaced() -> list[Path]:
        if beside:
            return replaced_folder(path, overwrite)
        return replaced_files(path, paths, overwrite)

    is_there(path, beside is not None)  # what a killed run was replacing is finished or undone
    replaced()  # refuses before anything is read
    files, contents, parts = [], [], []
    for name, names in zip(paths, shards, strict=True):
        header, _ = make_header({tensor: tensors[tensor] for tensor in names}, metadata)
        first, last = places[names[0]].start, places[names[-1]].end
        size = len(header) + last - first
        files.append(make_output(name, size, overwrite=over, in_order=products is None))
        contents.append(header)
        parts.append(FilePart(first, last - first, len(header)))
    if len(shards) > 1:
        total = max(info.end for info in places.values())
        index = make_index(list(zip(paths, shards, strict=True)), total)
        files.append(make_output(index_path(weights), len(index), overwrite=over))
        contents.append(index)
    folder = manifest = None
    if beside:
        rank = products.shared_rank(ranks) if products else None
        texts = _changed(beside, rank)
        manifest = _manifest(beside, files[-1].path.relative_to(path), texts)
        text = json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"
        folder = make_output_folder(path, files, beside.copied, texts | {MANIFEST: text})
    moved = products is not None
    return OutputFiles(path, files, contents, parts, places, moved, replaced, folder, manifest)


def _changed(beside: Companions, rank: int | None) -> dict[str, bytes]:
    """The files that can't be copied as they are: peft's configuration, with factors of `rank`."""
    name = (Path(beside.weights).parent / CONFIG).as_posix()
    if rank is None or name not in beside.copied:
        return {}
    return {name: adapter_config(beside.copied[name].path, rank)}


def _manifest(beside: Companions, weights: Path, texts: Mapping[str, bytes]) -> dict[str, Any]:
    """What a folder says of itself; docs/folders.md tells it."""
    sizes = {name: file.size for name, file in beside.copied.items()}
    sizes |= {name: len(text) for name, text in texts.items()}
    return {
        "posthoc": __version__,
        "weights": weights.as_posix(),
        "from": beside.origin(),
        "copied": [
            {"file": name, "bytes": size, "from": beside.origin(name)}
            for name, size in sizes.items()
        ],
        "left_out": [{"file": name, "reason": why} for name, why in beside.left_out],
        "missing": list(beside.missing),
    }


def is_there(path: Path, folder: bool) -> bool:
    """Whether there is something at an output, once what a killed run was replacing is finished or
    undone."""
    clean_up(path.parent)
    return is_taken(path) if folder else bool(existing_output(path))


def kept_output(path: Path) -> Output:
    """An output that is there already: its file, index or folder, its shards, its bytes.

    Raises UsageError for a folder that posthoc didn't make.
    """
    manifest = own_manifest(path, linked=True) if is_folder(path) else None
    main = path / manifest["weights"] if manifest else existing_output(path)[0]
    shards = shards_of(main)
    size = sum(size_of(each) for each in (main, *shards))
    if manifest is None:
        return Output(main, shards, size, None)
    copied = sum(each["bytes"] for each in manifest["copied"])
    size += copied + size_of(path / MANIFEST)
    return Output(path, shards, size, None, manifest)
