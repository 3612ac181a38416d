"""Files with torch's tensors: where these lie, read without running anything in them.

Three containers are read: the zip archives that `torch.save` writes, the files that it wrote
before version 1.6, and plain pickles with torch's storages inside. Each has a pickle that says
which tensors there are. The tensors' bytes are never read here.
"""

from __future__ import annotations

import hashlib
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from posthoc_cli.errors import IncompleteError, SnapshotError
from posthoc_cli.formats.archive import DEFLATED, Entry, entry_start, read_directory
from posthoc_cli.formats.checkpoint import Checkpoint
from posthoc_cli.formats.inert import inert
from posthoc_cli.formats.pickles import (
    Allowance,
    Call,
    Persistent,
    Span,
    corrupt,
    cut_short,
    naming,
    refused,
    shown,
    unpickle,
)
from posthoc_cli.formats.quick import Quick
from posthoc_cli.formats.tensors import NAMES, Storage, claim_storage, itemsize, unsupported
from posthoc_cli.storage import Cache
from posthoc_cli.storage.deflated import Deflated
from posthoc_cli.storage.sniffing import read_start, sniff, unfilled
from posthoc_cli.storage.stores import open_file

_PICKLE = tuple(bytes([0x80, version]) for version in range(2, 6))
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE = 32 << 20


def read_checkpoint(path: Path, cache: Cache | None = None) -> Checkpoint:
    """Read what the checkpoint at `path` holds, and where its tensors lie; none of their data.

    Reads `torch.save`'s files, of any version but the tar archives of 2016, and plain pickles.
    Raises SnapshotError for a file that is none of them, that is corrupt, or that names anything
    that is not data; MachineError for one that cannot be read.

    `cache` lets calls share what is the same in the file before: then its `root` is that one's, and
    what it says of places holds until the next call.
    """
    with naming(path), open_file(path, "leave it out") as (file, found):
        root, structure = _read(file, found.size, {} if cache is None else cache)
    return Checkpoint(path, root, found, structure)


def read_stream(file: BinaryIO, size: int) -> Any:
    """What torch.save wrote to a stream of `size` bytes, such as a part of a file; the offsets of
    its tensors are in the stream. Raises SnapshotError without a name."""
    return _read(file, size, {})[0]


def _other(start: bytes, size: int) -> SnapshotError:
    """The error for a file of no known format: what it is, and what to do."""
    problem = "neither a checkpoint of torch nor a pickle"
    if not size or unfilled(start):
        what = "all zeros" if size else "empty"
        return IncompleteError("", f"{problem}: it is {what}", "copy it again or leave it out")
    what, remedy = sniff(start, size) or ("", "leave it out")
    return refused(problem + (f", but {what}" if what else ""), remedy)


def _read(file: BinaryIO, size: int, cache: Cache) -> tuple[Any, bytes]:
    start = file.read(512)
    file.seek(0)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _read_zip(file, size, cache)
    if start[257:262] == b"ustar":
        raise unsupported("a tar archive of torch before 0.1.10")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        raise refused("is a safetensors file already", "use it as it is, or rename it")
    if not start.startswith(_PICKLE):
        raise _other(read_start(file), size)
    return _read_pickle(file, size)


def _read_pickle(file: BinaryIO, size: int) -> tuple[Any, bytes]:
    """A plain pickle, in which each storage is a legacy file of its own; or a legacy file."""
    allowance = Allowance()
    storages: list[tuple[int, int]] = []

    def storage(args: tuple[Any, ...]) -> Any:
        if args and isinstance(args[0], Call):  # text that was bytes, before protocol 3
            raise refused(
                "a pickle of tensors with protocol 2, which can't be read in place",
                "save it again with pickle protocol 3 or newer",
            )
        if not args or not isinstance(args[0], Span):
            raise corrupt("a storage isn't where it should be")
        after, end = file.tell(), args[0].offset + args[0].length
        file.seek(args[0].offset)
        value, found = _read_legacy(file, end, allowance)
        storages.extend((each.offset, each.size) for each in found)
        file.seek(after)
        return value

    names = NAMES | {("torch.storage", "_load_from_bytes"): storage}
    root = unpickle(file, size, names, None, allowance, inert)
    if isinstance(root, int) and root == _MAGIC:
        file.seek(0)
        root, found = _read_legacy(file, size, Allowance())
        storages = [(each.offset, each.size) for each in found]
        return root, _digest(file, size, storages)
    return root, _digest(file, file.tell(), storages)


def _digest(file: BinaryIO, end: int, storages: list[tuple[int, int]]) -> bytes:
    """Of all that lies before `end` and is in no storage."""
    digest, at = hashlib.sha256(), 0
    for offset, length in [*sorted(storages), (end, 0)]:
        file.seek(at)
        while at < offset:
            data = file.read(min(offset - at, 1 << 16))
            digest.update(data)
            at += len(data) or offset
        at = max(at, offset + length)
    return digest.digest()


def _read_legacy(file: BinaryIO, end: int, allowance: Allowance) -> tuple[Any, list[Storage]]:
    """A file of torch before 1.6: pickles, and the storages one after the other behind them."""

    def value(persistent: Persistent | None = None) -> Any:
        names, others = (NAMES, inert) if persistent else ({}, None)
        return unpickle(file, end, names, persistent, allowance, others)

    if value() != _MAGIC:
        raise corrupt("its magic number is wrong")
    version, system = value(), value()
    if version != _LEGACY_PROTOCOL:
        raise corrupt(f"its version is not {_LEGACY_PROTOCOL}")
    # What the system says of its byte order is none of the storages': they are little-endian.
    if not isinstance(system, dict):
        raise corrupt("it doesn't say what system wrote it")
    storages: dict[str, Storage] = {}
    root = value(partial(claim_storage, storages, legacy=True))
    keys = value()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise corrupt("its list of storages is not a list of names")
    missing = dict(storages)
    for key in keys:
        storage = missing.pop(key, None)
        if storage is None:
            raise corrupt(f"storage {shown(key)} is not what its pickle says")
        length = file.read(8)
        if len(length) < 8:
            raise cut_short()
        elements = int.from_bytes(length, "little", signed=True)
        if elements * itemsize(storage.dtype) != storage.size:
            raise corrupt(f"storage {shown(key)} has not the length its pickle says")
        storage.offset = file.tell()
        if storage.offset + storage.size > end:
            raise cut_short()
        file.seek(storage.offset + storage.size)
    if missing:
        raise corrupt("a storage is missing")
    return root, list(storages.values())


# Zip archives.


def _read_zip(file: BinaryIO, size: int, cache: Cache) -> tuple[Any, bytes]:
    entries = read_directory(file, size)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if not pickles and any(name.endswith(".npy") for name in entries):
        raise unsupported("an .npz archive of numpy")
    if len(pickles) != 1:
        raise refused("a zip archive, but not of torch.save", "leave it out")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise refused(
            "is a TorchScript archive, which is not read",
            "load it with torch.jit.load and save its state_dict() with torch.save",
        )
    order = _small(file, size, entries.get(f"{folder}byteorder"), "byteorder", 16)
    if order not in (b"", b"little", b"big"):
        raise unsupported("a checkpoint of a machine with another byte order")
    root, storages, digest = _unpickled(file, size, entries[pickles[0]], cache)
    swapped, taken = order == b"big", 0
    if hasattr(file, "will_read"):  # of a store: each of these would be a request
        wanted = (entries.get(f"{folder}data/{key}") for key in storages)
        file.will_read([(entry[0], 30) for entry in wanted if entry is not None])
    for key, storage in storages.items():
        entry = entries.get(f"{folder}data/{key}")
        what = f"storage {key}"
        if entry is None:
            raise corrupt(f"{shown(what)} is missing")
        storage.offset = offset = entry_start(file, size, entry, what)
        storage.swapped, storage.content = swapped, None
        _, packed, length, method, crc, _ = entry
        if storage.size > length:
            raise corrupt(f"{shown(what)} is shorter than its pickle says")
        if method == DEFLATED:
            storage.content = Deflated(offset, packed, length, crc=crc)
            if storage.size:
                _inflated(file, storage.content, 1)
        taken += min(packed, storage.size)
    if taken > size:
        raise corrupt("its storages overlap")  # of an honest archive every byte has one owner
    return root, digest


def _unpickled(
    file: BinaryIO, size: int, entry: Entry, cache: Cache
) -> tuple[Any, dict[str, Storage], bytes]:
    """What the pickle of an archive holds, the storages by their keys, and the pickle's digest."""
    storages: dict[str, Storage] = {}
    values = NAMES, partial(claim_storage, storages), None, inert
    start = entry_start(file, size, entry, "data.pkl")
    _, _, length, method, _, _ = entry
    if length > _MAX_PICKLE and method != DEFLATED:  # large arrays lie in it
        file.seek(start)
        root = unpickle(file, start + length, *values)
        file.seek(start)
        return root, storages, hashlib.sha256(file.read(_MAX_PICKLE)).digest()
    data = _small(file, size, entry, "data.pkl", _MAX_PICKLE)
    digest = hashlib.sha256(data).digest()
    # Of many that differ only the last is kept: all of them would fill the memory.
    last, before = cache.get("pickle", (None, None))
    if last is not None and last[2] == digest:
        return last[0], last[1], digest
    rebuild = NAMES["torch._utils", "_rebuild_tensor_v2"]
    assert rebuild is not None
    known, names = (before.known, before.names) if before else ([], {})
    quick = Quick(data, rebuild, storages, known, names)
    root = unpickle(BytesIO(data), len(data), *values, base=start, quick=quick)
    quick.before, quick.data = [], b""
    cache["pickle"] = (root, storages, digest), quick
    return root, storages, digest


def _small(file: BinaryIO, size: int, entry: Entry | None, what: str, most: int) -> bytes:
    """The bytes of an entry that are needed at once; none where there is no such entry."""
    if entry is None:
        return b""
    start = entry_start(file, size, entry, what)
    _, packed, length, method, crc, _ = entry
    if length > most:
        raise corrupt(f"{what} is too long")
    if method == DEFLATED:
        return _inflated(file, Deflated(start, packed, length, crc=crc), length)
    file.seek(start)
    return file.read(length)


def _inflated(file: BinaryIO, content: Deflated, length: int) -> bytes:
    """The first bytes of a deflated entry."""

    def read(offset: int, into: memoryview) -> None:
        file.seek(offset)
        into[:] = file.read(len(into))

    data = bytearray(length)
    try:
        content.open([read])(0, memoryview(data))
    except SnapshotError as error:
        raise corrupt(error.problem) from None
    return bytes(data)
