"""Files with torch's tensors: where these lie, read without running anything in them.

Three containers are read: the zip archives that `torch.save` writes, the files that it wrote
before version 1.6, and plain pickles with torch's storages inside. Each has a pickle that says
which tensors there are. The tensors' bytes are never read here.
"""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from posthoc_cli.formats.checkpoint import Checkpoint
from posthoc_cli.formats.inert import inert
from posthoc_cli.formats.pickles import (
    Allowance,
    Call,
    Persistent,
    Span,
    corrupt,
    naming,
    refused,
    shown,
    unpickle,
)
from posthoc_cli.formats.tensors import NAMES, Storage, claim_storage, itemsize, unsupported
from posthoc_cli.storage.disk import open_file
from posthoc_cli.storage.sniffing import read_start, sniff, unfilled

_PICKLE = tuple(bytes([0x80, version]) for version in range(2, 6))
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = 30
_MAX_DIRECTORY = 8 << 20


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what the checkpoint at `path` holds, and where its tensors lie; none of their data.

    Reads `torch.save`'s files, of any version but the tar archives of 2016, and plain pickles.
    Raises SnapshotError for a file that is none of them, that is corrupt, or that names anything
    that is not data; MachineError for one that cannot be read.
    """
    with naming(path), open_file(path, "leave it out") as (file, status):
        root = _read(file, status.st_size)
    return Checkpoint(path, root, status.st_size, status.st_mtime_ns)


def _other(start: bytes, size: int) -> tuple[str, str]:
    """What a file of no known format is, for a message, and what to do."""
    if not size or unfilled(start, size, None):
        return f": it is {'all zeros' if size else 'empty'}", "copy it again or leave it out"
    what, remedy = sniff(start, size) or ("", "leave it out")
    return f", but {what}" if what else "", remedy


def _read(file: BinaryIO, size: int) -> Any:
    start = file.read(512)
    file.seek(0)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _read_zip(file, size)
    if start[257:262] == b"ustar":
        raise unsupported("a tar archive of torch before 0.1.10")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        raise refused("is a safetensors file already", "use it as it is, or rename it")
    if not start.startswith(_PICKLE):
        what, remedy = _other(read_start(file), size)
        raise refused(f"neither a checkpoint of torch nor a pickle{what}", remedy)
    return _read_pickle(file, size)


def _read_pickle(file: BinaryIO, size: int) -> Any:
    """A plain pickle, in which each storage is a legacy file of its own; or a legacy file."""
    allowance = Allowance()

    def storage(args: tuple[Any, ...]) -> Any:
        if args and isinstance(args[0], Call):  # text that was bytes, before protocol 3
            raise refused(
                "a pickle of tensors with protocol 2, which can't be read in place",
                "save it again with pickle protocol 3 or newer",
            )
        if not args or not isinstance(args[0], Span):
            raise corrupt("a storage isn't where it should be")
        after = file.tell()
        file.seek(args[0].offset)
        value = _read_legacy(file, args[0].offset + args[0].length, allowance)
        file.seek(after)
        return value

    names = NAMES | {("torch.storage", "_load_from_bytes"): storage}
    root = unpickle(file, size, names, None, allowance, inert)
    if isinstance(root, int) and root == _MAGIC:
        file.seek(0)
        return _read_legacy(file, size, Allowance())
    return root


def _read_legacy(file: BinaryIO, end: int, allowance: Allowance) -> Any:
    """A file of torch before 1.6: pickles, and the storages one after the other behind them."""

    def value(persistent: Persistent | None = None) -> Any:
        names, others = (NAMES, inert) if persistent else ({}, None)
        return unpickle(file, end, names, persistent, allowance, others)

    if value() != _MAGIC:
        raise corrupt("its magic number is wrong")
    version, system = value(), value()
    if version != _LEGACY_PROTOCOL:
        raise corrupt(f"its version is not {_LEGACY_PROTOCOL}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise unsupported("a checkpoint of a big-endian machine")
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
        elements = int.from_bytes(file.read(8), "little", signed=True)
        if elements * itemsize(storage.dtype) != storage.size:
            raise corrupt(f"storage {shown(key)} has not the length its pickle says")
        storage.offset = file.tell()
        if storage.offset + storage.size > end:
            raise corrupt("it ends too early")
        file.seek(storage.offset + storage.size)
    if missing:
        raise corrupt("a storage is missing")
    return root


# Zip archives.


def _read_zip(file: BinaryIO, size: int) -> Any:
    entries = _entries(file)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
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
    order = f"{folder}byteorder"
    if order in entries:
        start, end = _span(file, size, entries[order], "byteorder")
        file.seek(start)
        if file.read(min(end - start, 16)) != b"little":
            raise unsupported("a checkpoint of a big-endian machine")
    storages: dict[str, Storage] = {}
    start, end = _span(file, size, entries[pickles[0]], "data.pkl")
    file.seek(start)
    root = unpickle(file, end, NAMES, partial(claim_storage, storages), None, inert)
    for key, storage in storages.items():
        entry = entries.get(f"{folder}data/{key}")
        if entry is None:
            raise corrupt(f"storage {shown(key)} is missing")
        storage.offset, end = _span(file, size, entry, f"storage {shown(key)}")
        if storage.size > end - storage.offset:
            raise corrupt(f"storage {shown(key)} is shorter than its pickle says")
    if sum(storage.size for storage in storages.values()) > size:
        raise corrupt("its storages overlap")  # of an honest archive every byte has one owner
    return root


def _entries(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The entries of the archive by name, as its central directory has them."""
    try:
        with zipfile.ZipFile(cast(BinaryIO, _Directory(file))) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error):
        raise corrupt("its directory is missing or broken") from None
    named = {entry.filename: entry for entry in entries}
    if len(named) != len(entries):
        ((name, _),) = Counter(entry.filename for entry in entries).most_common(1)
        raise corrupt(f"two entries are named {shown(name)}")
    return named


class _Directory:
    """A file of which no more is read at a time than a directory may be long."""

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self._file = file.tell, file

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset < 0:
            raise ValueError
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY:
            raise corrupt("its directory is too large")
        return self._file.read(size)


def _span(file: BinaryIO, size: int, entry: zipfile.ZipInfo, what: str) -> tuple[int, int]:
    """Start and end of an entry's bytes in the file of `size` bytes."""
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.flag_bits & 1
        or entry.file_size != entry.compress_size
    ):
        raise unsupported(f"a zip archive whose {what} is compressed or encrypted")
    if not 0 <= entry.header_offset < size:
        raise corrupt(f"{what} lies outside of it")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise corrupt(f"{what} is not where its directory says")
    start = entry.header_offset + _LOCAL_HEADER + sum(struct.unpack_from("<2H", header, 26))
    if start + entry.file_size > size:
        raise corrupt(f"{what} ends outside of it")
    return start, start + entry.file_size
