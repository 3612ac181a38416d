"""torch.distributed checkpoints: folders of shards, read where they lie.

`.metadata` is a pickle of torch.distributed.checkpoint's classes: which tensors there are, which
boxes of each were saved, and in which file from which byte on. There lies, for each box, what
torch.save writes of one tensor. HuggingFaceStorageWriter writes safetensors files instead, which
say themselves where their boxes belong, and no `.metadata`.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from posthoc_cli.errors import IncompleteError
from posthoc_cli.formats.checkpoint import Checkpoint, is_beside, state_dict
from posthoc_cli.formats.pickles import corrupt, naming, refused, shown
from posthoc_cli.formats.sharding import (
    METADATA,
    Entry,
    Place,
    Table,
    is_shard,
    read_sharding,
    read_table,
)
from posthoc_cli.formats.tensors import Storage, StoredTensor
from posthoc_cli.formats.torchfile import read_stream
from posthoc_cli.storage import Cache, File, Part, TensorIndex, TensorInfo, read_header
from posthoc_cli.storage.blocks import Block, Blocks, make_parts, whole
from posthoc_cli.storage.dtypes import BY_NAME, bytes_of
from posthoc_cli.storage.metadata import FORMAT, SHARDING, SHARDS, TOOL
from posthoc_cli.storage.stores import file_status, is_file, is_folder, list_folder, open_file

_ENDING = ".distcp"

_MAX_METADATA = 1 << 30
_MOST_LAYOUTS = 4
"""Layouts of checkpoints read before that are kept: the next one mostly lies as the last did."""

_MOST_PROBED = 16
_HEAD = 1 << 12
"""Bytes from the beginning of a shard; what torch.save writes before the tensor's fits in it."""

_MAX_VALUE = 1 << 12
_VALUES = {"step", "global_step", "optimization_step", "gamma", "sigma_rel"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the network's tensors lie in the files of a checkpoint, and of any that lies alike.

    `paths` are the files, each with the bytes that it has at least; `probes` some of what lies
    before the tensors' bytes: file, offset, and what is there.
    """

    tensors: Mapping[str, TensorInfo]
    parts: tuple[Part, ...]
    paths: tuple[tuple[str, int], ...]
    probes: tuple[tuple[int, int, bytes], ...]
    values: Mapping[str, Place]
    structure: bytes


def is_distributed(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of torch.distributed, be it finished or not."""
    return is_folder(folder) and holds_distributed(list_folder(folder))


def holds_distributed(names: Iterable[str]) -> bool:
    """Whether these are the names of all in the folder of such a checkpoint."""
    return any(name == METADATA or name.endswith(_ENDING) or is_shard(name) for name in names)


def read_distributed(
    folder: Path, key: str | None = None, cache: Cache | None = None
) -> TensorIndex:
    """The index of the network in the checkpoint `folder`; `key` is as `state_dict` has it.

    `cache` lets calls share what is the same in checkpoints that lie alike. Raises IncompleteError
    for one that isn't finished or lacks a file, SnapshotError for one that is broken, or where
    several networks are to choose from, MachineError for what can't be read.
    """
    cache = {} if cache is None else cache
    stated: dict[str, str] = {}
    if is_file(folder / METADATA):
        with naming(folder / METADATA), open_file(folder / METADATA) as (file, status):
            if status.size > _MAX_METADATA:
                raise corrupt("it is too long")
            data = file.read()
        layout = _layout(folder, data, key, cache)
    else:
        names = list_folder(folder)
        if any(name.endswith(_ENDING) for name in names):
            raise IncompleteError(
                str(folder),
                f"is not finished: it has no {METADATA} yet",
                "wait until it is written, or leave it out with exclude=",
            )
        shards = [read_header(folder / name, cache) for name in names if is_shard(name)]
        layout = _sharded(folder, shards, key, cache)
        stated = dict(shards[0].metadata)
    files = tuple(_found(folder / name, least) for name, least in layout.paths)
    values = {FORMAT: "pt", TOOL: "torch"} | _read_values(folder, layout.values)
    if stated.pop(SHARDS, None) is not None:  # a tracker's, which says all of itself
        stated.pop(SHARDING, None)
        values = stated
    return TensorIndex(folder, layout.tensors, values, files, layout.parts, layout.structure)


def _sharded(folder: Path, shards: Sequence[TensorIndex], key: str | None, cache: Cache) -> Layout:
    """The layout that safetensors files say, or that of others before which say the same."""
    # The cache keeps the tensors, so that no others get their numbers.
    same = tuple((each.path.name, id(each.tensors), each.metadata.get(SHARDING)) for each in shards)
    places = tuple((each.metadata.get(SHARDS), each.parts[0].data_start) for each in shards)
    found: Layout | None = cache.get(("sharded", key, same, places))
    if found is None:
        found = _laid_out(folder, read_sharding(folder, shards), key, b"")
        tensors = cache.setdefault(("sharded", key, same), found.tensors)
        found = cache["sharded", key, same, places] = replace(found, tensors=tensors)
    return found


def _found(path: Path, least: int) -> File:
    """The file as it is there, with `least` bytes or more; raises IncompleteError."""
    status = file_status(path)
    if status is None:
        problem = f"is missing: {METADATA} names it"
    elif status.size < least:
        problem = f"ends too early: {METADATA} has it at {least:,} bytes or more"
    else:
        return status
    remedy = "wait until it is written, copy it again, or leave it out with exclude="
    raise IncompleteError(str(path), problem, remedy)


def _layout(folder: Path, data: bytes, key: str | None, cache: Cache) -> Layout:
    """The layout that the bytes of `.metadata` say, or that of one before that says the same."""
    same = _without_identity(data)
    layouts: Any = cache.setdefault("distributed", {})
    known: dict[tuple[bytes, str | None], Layout] = layouts
    found = known.get((same, key))
    if found is not None and _fits(folder, found):
        return found
    with naming(folder / METADATA):
        table = read_table(data)
    found = _laid_out(folder, table, key, hashlib.sha256(same).digest())
    known[same, key] = found
    for other in list(known)[:-_MOST_LAYOUTS]:
        del known[other]
    return found


def _without_identity(data: bytes) -> bytes:
    """The bytes of `.metadata` without what differs between checkpoints that lie alike: lengths of
    the pickle's frames, and at its end where and when it was saved."""
    payload, at = [data[:2]], 2
    while data[at : at + 1] == b"\x95":
        length = int.from_bytes(data[at + 1 : at + 9], "little")
        payload.append(data[at + 9 : at + 9 + length])
        at += 9 + length
    payload.append(data[at:])
    whole_ = b"".join(payload)
    end = whole_.rfind(b"storage_meta")
    return whole_ if end < 0 else whole_[:end]


def _fits(folder: Path, layout: Layout) -> bool:
    """Whether what lies before some tensors' bytes is what the layout has there."""
    for at, (name, _) in enumerate(layout.paths):
        probes = [probe for probe in layout.probes if probe[0] == at]
        if not probes or file_status(folder / name) is None:
            continue
        with open_file(folder / name) as (file, _):
            for _, offset, expected in probes:
                file.seek(offset)
                if file.read(len(expected)) != expected:
                    return False
    return True


# Where the tensors lie.


def _laid_out(folder: Path, table: Table, key: str | None, structure: bytes) -> Layout:
    """The layout of the network that is meant."""
    with naming(folder):
        one = table.one_network
        chosen = list(table.entries.items()) if one else _choose(folder, table, key)
    boxes = {id(box): box for _, entry in chosen for box in entry.boxes}
    paths = sorted({box.place.path for box in boxes.values()})
    numbers = {path: number for number, path in enumerate(paths)}
    least = dict.fromkeys(paths, 0)
    probes: list[tuple[int, int, bytes]] = []
    found: dict[int, StoredTensor] = {}
    every = [box.place for entry in table.entries.values() for box in entry.boxes]
    for place in [*every, *table.values.values()]:
        if place.path in least:
            least[place.path] = max(least[place.path], place.offset + place.length)
    for path in paths:
        streams = [box for box in boxes.values() if box.stream and box.place.path == path]
        streams.sort(key=lambda box: box.place.offset)
        read = _read_streams(folder / path, [box.place for box in streams], least[path])
        for box, (head, tensor) in zip(streams, read, strict=True):
            found[id(box)] = tensor
            probes.append((numbers[path], box.place.offset, head))
    tensors: dict[str, TensorInfo] = {}
    parts: list[Part] = []
    first = 0
    for name, entry in chosen:
        with naming(folder):
            content = _content(name, entry, found, numbers)
        added = make_parts(content, first)
        tensors[name] = TensorInfo(
            entry.dtype, entry.shape, first, first + bytes_of(entry.dtype, math.prod(entry.shape))
        )
        parts += added
        first = tensors[name].end
    probes = probes[:: max(len(probes) // _MOST_PROBED, 1)]
    values = {
        table.paths[name][0]: place
        for name, place in table.values.items()
        if len(table.paths[name]) == 1 and table.paths[name][0] in _VALUES
    }
    digest = hashlib.sha256(structure)
    for name, info in tensors.items():
        digest.update(f"{name}\0{info}\0".encode(errors="surrogatepass"))
    return Layout(
        tensors, tuple(parts), tuple(least.items()), tuple(probes), values, digest.digest()
    )


def _choose(folder: Path, table: Table, key: str | None) -> list[tuple[str, Entry]]:
    """The tensors of the network that is meant, by their names in it."""
    root: dict[Any, Any] = {}
    leaves: dict[int, Entry] = {}
    for name, entry in table.entries.items():
        tensor = StoredTensor(entry.dtype, entry.shape, (0,) * len(entry.shape), Storage("", 0))
        *above, last = table.paths[name] or (name,)
        if entry.dtype not in BY_NAME.values():
            if any(map(is_beside, above)):
                continue
            raise refused(
                f"holds a tensor of dtype {shown(entry.dtype)}, which safetensors has no place for",
                "save it with another dtype, or without that tensor",
            )
        node = root
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise corrupt(f"{METADATA} has '{shown(part)}' as a tensor and as more")
        if last in node:
            raise corrupt(f"{METADATA} has '{shown(last)}' twice")
        node[last] = tensor
        leaves[id(tensor)] = entry
    while key is None or (key != "." and key.split(".")[0] not in root):
        # {"app": {"model": ..., "optim": ...}}, as torch's tutorial has it
        inside = [value for name, value in root.items() if not is_beside(name)]
        dicts = isinstance(inside[0], dict) and inside[0].values() if len(inside) == 1 else ()
        if not dicts or any(isinstance(value, StoredTensor) for value in dicts):
            break
        root = inside[0]
    chosen = state_dict(Checkpoint(folder, root, File(folder, 0)), key)
    for name in chosen:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise refused(
                f"a tensor's name, {name!r}, is none that safetensors can have",
                "save it under another name",
            ) from None
    return [(name, leaves[id(tensor)]) for name, tensor in chosen.items()]


def _content(
    name: str, entry: Entry, found: Mapping[int, StoredTensor], numbers: Mapping[str, int]
) -> Blocks:
    """A tensor as its boxes lie in the files."""
    blocks: list[Block] = []
    swapped = False
    itemsize = bytes_of(entry.dtype, 1)
    unit = itemsize // 2 if entry.dtype.startswith("C") else itemsize
    for box in entry.boxes:
        inside = len(box.first) == len(box.sizes) == len(entry.shape) and all(
            first + size <= whole_
            for first, size, whole_ in zip(box.first, box.sizes, entry.shape, strict=True)
        )
        strides = tuple(math.prod(box.sizes[at + 1 :]) for at in range(len(box.sizes)))
        offset = box.place.offset
        if box.stream and inside:
            tensor = found[id(box)]
            inside = tensor.dtype == entry.dtype and tensor.elements == math.prod(box.sizes)
            if tensor.shape == box.sizes:
                strides = tensor.strides
            else:  # Megatron-LM's has dimensions of 1 that were added
                inside = inside and tensor.contiguous
            offset += tensor.offset
            if tensor.storage.content is not None or (blocks and swapped != tensor.storage.swapped):
                raise corrupt(f"a box of '{shown(name)}' is packed in another way than others")
            swapped = tensor.storage.swapped
        if not inside:
            raise corrupt(f"a box of '{shown(name)}' is not what {METADATA} says")
        blocks.append(Block(box.first, box.sizes, strides, offset, numbers[box.place.path]))
    if not whole(entry.shape, blocks):
        raise corrupt(f"parts of '{shown(name)}' are missing, or there twice")
    return Blocks(entry.shape, itemsize, tuple(blocks), unit if swapped else 0)


def _read_streams(
    path: Path, places: Sequence[Place], least: int
) -> list[tuple[bytes, StoredTensor]]:
    """The tensor of each stream that torch.save wrote to a file, from the stream's first byte on;
    and what lies before its bytes."""
    if not places:
        return []
    known: dict[int, list[tuple[bytes, StoredTensor]]] = {}
    found = []
    _found(path, least)
    with naming(path), open_file(path) as (file, _):
        for place in places:
            file.seek(place.offset)
            head = file.read(min(place.length, _HEAD))
            alike = known.setdefault(place.length, [])
            for one in alike:
                if head.startswith(one[0]):
                    found.append(one)
                    break
            else:
                tensor = _read_stream(file, place, head)
                found.append((head[: tensor.offset], tensor))
                if tensor.offset <= len(head):
                    alike.append(found[-1])
    return found


def _read_stream(file: BinaryIO, place: Place, head: bytes) -> StoredTensor:
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise corrupt(f"no tensor lies where {METADATA} has one")
    stream: Any = io.BytesIO(head)
    if len(head) < place.length:
        stream = io.BufferedReader(_Window(file, place.offset, place.length), _HEAD)
    root = read_stream(stream, place.length)
    if not isinstance(root, StoredTensor):
        raise corrupt("it holds no tensor where one belongs")
    return root


def _read_values(folder: Path, values: Mapping[str, Place]) -> dict[str, str]:
    """Numbers that a checkpoint holds beside its tensors, such as its step, as metadata."""
    found = {}
    for name, place in values.items():
        if place.length > _MAX_VALUE:
            continue
        with naming(folder / place.path), open_file(folder / place.path) as (file, _):
            file.seek(place.offset)
            value = read_stream(io.BytesIO(file.read(place.length)), place.length)
        if type(value) in (int, float):
            found[name] = str(value)
    return found


class _Window(io.RawIOBase):
    """Bytes of a file as a file of their own."""

    def __init__(self, file: BinaryIO, first: int, length: int) -> None:
        self._file, self._first, self._length, self._at = file, first, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        self._file.seek(self._first + self._at)
        data = self._file.read(min(len(into), max(self._length - self._at, 0)))
        into[: len(data)] = data
        self._at += len(data)
        return len(data)
