"""The safetensors layout: where each tensor lies; and a writer that lands a file atomically.

A safetensors file is eight bytes of header length, a JSON header that maps each tensor's name to
its dtype, shape and place, and the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors

from posthoc_cli.errors import MachineError, SnapshotError, UsageError, printable

DTYPE_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4,
}  # fmt: skip
"""Bits of one element of each dtype, by the name that safetensors gives it; a file has them in
this order, as the safetensors library writes them."""

_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are byte offsets within the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What the header of a safetensors file says.

    `data_start` is the byte offset of the data section in the file, `size` the file's length and
    `modified` the time of its last change, in nanoseconds.
    Files whose headers agree share one `tensors` mapping, so that 600 snapshots of a large network
    cost little more than one.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    modified: int


def read_layout(path: Path, cache: dict[bytes, Mapping[str, TensorInfo]] | None = None) -> Layout:
    """Read and check the header of the safetensors file at `path`; none of its data.

    The safetensors library validates the file. `cache` lets calls share `tensors` between files
    with the same tensors at the same places. Raises SnapshotError for a file that is not a valid
    safetensors file, MachineError for one that cannot be read.
    """
    try:
        # A FIFO would block on open, and a device has no length.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SnapshotError(str(path), "not a regular file", "leave it out with --only")
        with safetensors.safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = file.read(length)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise MachineError(
            str(path), f"cannot be read ({reason(error)})", "check the file and its permissions"
        ) from None
    except (safetensors.SafetensorError, struct.error, UnicodeError) as error:
        raise _corrupt(path, str(error)) from None
    metadata, rest = _split_metadata(header)
    tensors = cache.get(rest) if cache is not None else None
    if tensors is None:
        tensors = _parse_tensors(rest)
        if cache is not None:
            cache[rest] = tensors
    end = max((info.end for info in tensors.values()), default=0)
    data_start = _LENGTH.size + length
    if len(header) != length or data_start + end != status.st_size:
        raise _corrupt(path, "its length changed while it was read")
    return Layout(path, tensors, metadata, data_start, status.st_size, status.st_mtime_ns)


def _corrupt(path: Path, detail: str) -> SnapshotError:
    return SnapshotError(
        str(path), f"not a whole safetensors file ({detail})", "copy it again or leave it out"
    )


def changed(path: Path) -> SnapshotError:
    """The error for a file that is no longer what its header said when it was read."""
    return SnapshotError(
        str(path),
        "changed while it was read",
        "wait until it is written, or leave it out with --only",
    )


def _split_metadata(header: bytes) -> tuple[dict[str, str], bytes]:
    """The `__metadata__` of a header, and the rest of the header as bytes that ignore it.

    Snapshots of one run differ in their metadata only; every writer puts it first, so what follows
    it can be compared between files without being parsed.
    """
    opening = re.match(rb'\s*\{\s*"__metadata__"\s*:\s*', header)
    if opening:
        text = header[opening.end() :].decode()
        metadata, end = json.JSONDecoder().raw_decode(text)
        return metadata or {}, b"{" + text[end:].strip(" ,\t\r\n").encode()
    parsed = json.loads(header)
    metadata = parsed.pop("__metadata__", None)
    return metadata or {}, json.dumps(parsed).encode()


def _parse_tensors(header: bytes) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in json.loads(header).items()
    }


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a file that shall hold `tensors`, name -> (dtype, shape).

    Returns the header, its length included, and where each tensor lies after it. Tensors go by
    dtype, largest elements first so that each is aligned, then by name: the same tensors always
    get the same places.
    """
    infos: dict[str, TensorInfo] = {}
    position = 0
    rank = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
    for name in sorted(tensors, key=lambda name: (rank[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        infos[name] = TensorInfo(dtype, tuple(shape), position, end)
        position = end
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in infos.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text, infos


class AtomicFile:
    """A file of `size` bytes that appears at `path` whole, or not at all.

    Written beside its place under a temporary name, its space reserved first; on leaving the
    `with` block it is flushed to disk and renamed, or, if there was an exception, removed. Its mode
    is what the umask gives. `write_at` may be called from several threads at once.

    Raises UsageError when `path` exists and `overwrite` is false, MachineError when the space or
    the permission is missing.
    """

    def __init__(self, path: Path, size: int, *, overwrite: bool = False) -> None:
        self.path = path
        self.size = size
        self.overwrite = overwrite
        self._lock = threading.Lock()
        self._temporary = path.with_name(f".{path.name[:40]}.{os.urandom(6).hex()}.posthoc-tmp")

    def __enter__(self) -> AtomicFile:
        if not self.overwrite and os.path.lexists(self.path):
            raise _exists(self.path)
        with writing_to(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._fd = os.open(self._temporary, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                _reserve(self._fd, self.size)
            except BaseException:
                self._discard()
                raise
        return self

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `offset` of the file."""
        with writing_to(self.path):
            view = memoryview(data).cast("B")
            while view:
                written = self._write_some(view, offset)
                view, offset = view[written:], offset + written

    def flush(self) -> None:
        """Wait until what was written so far is on the disk."""
        with writing_to(self.path):
            getattr(os, "fdatasync", os.fsync)(self._fd)

    def _write_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, view, offset)
        with self._lock:  # Windows has one position a file
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, view)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        with writing_to(self.path):
            try:
                os.fsync(self._fd)
                os.close(self._fd)
                _land(self._temporary, self.path, self.overwrite)
                _flush_folder(self.path.parent)
            except BaseException:
                self._discard()
                raise

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)


def _exists(path: Path) -> UsageError:
    return UsageError(
        str(path), "exists already", "use --force to replace it or --skip-existing to keep it"
    )


def _reserve(fd: int, size: int) -> None:
    """Give the file its length now, and its space where the system can promise it."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:  # some file systems cannot reserve; a full one must say so now
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(fd, size)


def _land(temporary: Path, path: Path, overwrite: bool) -> None:
    """Move the finished file to its place; without `overwrite`, never onto another file."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, fails if another run got there first
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without hard links: the check above has to do
        if os.path.lexists(path):
            raise _exists(path) from None
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where a folder can be flushed."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the system's errors while `path` is written into one line that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "free some space or choose another disk",
            getattr(errno, "EDQUOT", -1): "free some space or choose another disk",
            errno.EFBIG: "raise the file size limit (ulimit -f) or choose another disk",
            errno.ENOENT: "create the folder first",
            errno.ENOTDIR: "choose another path",
            errno.ENAMETOOLONG: "choose a shorter name",
        }.get(error.errno or 0, "check the folder and its permissions")
        raise MachineError(str(path), f"cannot be written ({reason(error)})", remedy) from error


def reason(error: OSError) -> str:
    """What went wrong, in the system's words, without the paths it adds."""
    return printable(error.strerror or str(error))
