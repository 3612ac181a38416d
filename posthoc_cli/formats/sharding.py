"""What torch.distributed's checkpoints say of themselves: which boxes of which tensors lie where.

`.metadata` is a pickle of torch.distributed.checkpoint's classes. HuggingFaceStorageWriter writes
none: its safetensors files say themselves where their boxes belong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from posthoc_cli.errors import IncompleteError, SnapshotError
from posthoc_cli.formats.checkpoint import is_beside
from posthoc_cli.formats.inert import inert
from posthoc_cli.formats.pickles import (
    Allowance,
    Call,
    Global,
    Key,
    corrupt,
    refused,
    shown,
    unpickle,
)
from posthoc_cli.formats.tensors import NAMES
from posthoc_cli.storage import TensorIndex
from posthoc_cli.storage.dtypes import BY_NAME
from posthoc_cli.storage.metadata import SHARDING, SHARDS

METADATA = ".metadata"
_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")

_MAX_DIMENSIONS = 64


class Place(NamedTuple):
    """Bytes of a file of the checkpoint."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor, and where it lies: in a stream of torch.save's, or as it is."""

    first: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place
    stream: bool = True


@dataclass(slots=True)
class Entry:
    """A tensor of a checkpoint, with safetensors' name for its dtype."""

    dtype: str
    shape: tuple[int, ...]
    boxes: list[Box]


@dataclass(slots=True)
class Table:
    """What a checkpoint holds: tensors by name, values of other kinds, and where in nested dicts
    each name belongs. One of a tracker's holds one network and nothing else."""

    entries: dict[str, Entry] = field(default_factory=dict)
    values: dict[str, Place] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    one_network: bool = False


def read_table(data: bytes) -> Table:
    """What a pickle of torch.distributed.checkpoint.metadata.Metadata says.

    Raises SnapshotError, without the file's name, for anything else.
    """
    allowance = Allowance()
    allowance.left = max(allowance.left, 2 * len(data))  # of many ranks it is long
    root = unpickle(BytesIO(data), len(data), NAMES, None, allowance, inert)
    said = _fields(root, "Metadata")
    listed, stored = said.get("state_dict_metadata"), said.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise corrupt(f"{METADATA} doesn't say where its tensors lie")
    places = dict(_placed(key, info) for key, info in stored.items())
    table = Table()
    for name, entry in listed.items():
        if not isinstance(name, str) or not isinstance(entry, Call):
            raise corrupt(f"{METADATA} lists what is no tensor")
        if entry.function.name == "BytesStorageMetadata":
            if (name, None) in places:
                table.values[name] = places[name, None]
        else:
            table.entries[name] = _entry(name, entry, places)
    mapping = said.get("planner_data")
    for name in [*table.entries, *table.values]:
        path = mapping.get(name) if isinstance(mapping, dict) else None
        parts = path if isinstance(path, tuple) and path else _guessed_path(name)
        table.paths[name] = tuple(str(part) for part in parts if isinstance(part, str | int))
    return table


def _fields(value: Any, name: str) -> dict[Any, Any]:
    """What is said of an object that has to be of the class `name`."""
    if not isinstance(value, Call) or value.function.name != name:
        raise corrupt(f"{METADATA} has no {name} where one belongs")
    if not isinstance(value.state, dict):
        raise corrupt(f"{METADATA} says nothing of a {name}")
    return value.state


def _placed(key: Any, info: Any) -> tuple[tuple[str, tuple[int, ...] | None], Place]:
    """The name and first element of a saved box, and where it lies."""
    index = _fields(key.value if isinstance(key, Key) else key, "MetadataIndex")
    said = _fields(info, "_StorageInfo")
    name, first = index.get("fqn"), index.get("offset")
    path, offset, length = (said.get(part) for part in ("relative_path", "offset", "length"))
    if said.get("transform_descriptors"):
        raise refused(
            "is written through extensions, such as compression, which are not read",
            "save it again without them",
        )
    first = None if first is None else _sizes(first)
    if not isinstance(name, str):
        raise corrupt(f"{METADATA} has a box of no tensor")
    if not isinstance(path, str) or path in ("", ".", "..") or re.search(r"[/\\\0]", path):
        raise corrupt(f"{METADATA} names a file that is none of its own")
    offset, length = _sizes((offset, length))
    return (name, first or None), Place(path, offset, length)


def _entry(
    name: str, entry: Call, places: Mapping[tuple[str, tuple[int, ...] | None], Place]
) -> Entry:
    said = _fields(entry, "TensorStorageMetadata")
    shape, chunks, properties = _sizes(said.get("size")), said.get("chunks"), said.get("properties")
    state = properties.state if isinstance(properties, Call) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(chunks, list) or not isinstance(dtype, Global):
        raise corrupt(f"{METADATA} doesn't say what '{shown(name)}' is")
    boxes = []
    for chunk in chunks:
        box = _fields(chunk, "ChunkStorageMetadata")
        first, sizes = _sizes(box.get("offsets")), _sizes(box.get("sizes"))
        if 0 in sizes:
            continue
        place = places.get((name, first or None)) or places.get((name, None))
        if place is None:
            raise corrupt(f"{METADATA} doesn't say where '{shown(name)}' lies")
        boxes.append(Box(first, sizes, place))
    return Entry(BY_NAME.get(dtype.name, dtype.name), shape, boxes)


def _sizes(value: Any) -> tuple[int, ...]:
    """A shape, or a place in one; raises SnapshotError for what can be neither."""
    if (
        not isinstance(value, tuple)
        or len(value) > _MAX_DIMENSIONS
        or any(type(size) is not int or not 0 <= size < 1 << 62 for size in value)
    ):
        raise corrupt("a tensor's shape or place is impossible")
    return value


def _guessed_path(name: str) -> tuple[str, ...]:
    """Where a name belongs, in a checkpoint that doesn't say it: Megatron-LM's."""
    first, dot, rest = name.partition(".")
    return (first, rest) if dot and is_beside(first) else (name,)


def is_shard(name: str) -> bool:
    """Whether HuggingFaceStorageWriter calls its files so."""
    return _SHARD.fullmatch(name) is not None


def shard_name(at: int) -> str:
    """What HuggingFaceStorageWriter calls the safetensors file of rank `at`."""
    return f"shard-{at + 1:05d}-model-00001-of-00001.safetensors"


def sharding_metadata(firsts: Mapping[str, Sequence[int]], shards: int) -> dict[str, str]:
    """The metadata of one of so many files: where in each tensor the box it has begins."""
    said = {name: {"saved_offsets": list(first)} for name, first in firsts.items()}
    return {SHARDING: json.dumps(said, separators=(",", ":")), SHARDS: str(shards)}


def read_sharding(folder: Path, shards: Sequence[TensorIndex]) -> Table:
    """What the safetensors files of one checkpoint say of their boxes.

    Raises IncompleteError where they say that there are more of them.
    """
    table = Table(one_network=SHARDS in shards[0].metadata)
    for index in shards:
        count = index.metadata.get(SHARDS)
        if count is not None and count != str(len(shards)):
            raise IncompleteError(
                str(folder),
                f"is not whole: {len(shards)} of its {count} files are there",
                "wait until it is written, copy it again, or leave it out with exclude=",
            )
        (file,), start = index.files, index.parts[0].data_start
        try:
            said = json.loads(index.metadata[SHARDING])
            firsts = {
                tensor: _sizes(tuple(said[tensor]["saved_offsets"])) for tensor in index.tensors
            }
        except (KeyError, TypeError, ValueError, RecursionError, SnapshotError):
            problem = "doesn't say which part of each tensor it has"
            raise _of_no_checkpoint(file.path, problem) from None
        for tensor, info in index.tensors.items():
            first = firsts[tensor]
            shape = tuple(a + size for a, size in zip(first, info.shape, strict=False))
            entry = table.entries.setdefault(tensor, Entry(info.dtype, shape, []))
            if entry.dtype != info.dtype or not len(entry.shape) == len(shape) == len(info.shape):
                raise _of_no_checkpoint(file.path, f"has another '{shown(tensor)}' than others")
            entry.shape = tuple(map(max, entry.shape, shape))
            place = Place(file.path.name, start + info.start, info.end - info.start)
            entry.boxes.append(Box(first, info.shape, place, stream=False))
            table.paths[tensor] = (tensor,)
    return table


def _of_no_checkpoint(path: Path, problem: str) -> SnapshotError:
    return SnapshotError(str(path), problem, "copy the checkpoint again or leave it out")
