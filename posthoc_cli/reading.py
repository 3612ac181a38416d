"""Reading the tensors' bytes of snapshots, and noticing when their files change meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from posthoc_cli.errors import MachineError, SnapshotError
from posthoc_cli.tensorfile import Layout, Part, reason, spans

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_FLAGS |= getattr(os, "O_NONBLOCK", 0)  # never wait for a pipe that has taken a file's name

_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK = 16, 4096


class Reader:
    """The files of a snapshot, open for reading; in a `with` block, from several threads at once.

    With `keep_open` false each read opens its file anew, for those with more snapshots than the
    system lets a process have files.

    Raises SnapshotError for a file that is no longer what its header said when that was read,
    MachineError for one that can't be read.
    """

    def __init__(self, layout: Layout, *, keep_open: bool = True) -> None:
        self._layout = layout
        self._keep_open = keep_open
        self._fds: list[int] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        try:
            for part in self._layout.parts:
                fd = _open(part)
                if self._keep_open:
                    self._fds.append(fd)
                else:
                    os.close(fd)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the snapshot's data from `start` on."""
        for at, offset, count in spans(self._layout.parts, start, len(into)):
            part = self._layout.parts[at]
            fd = self._fds[at] if self._keep_open else _open(part)
            try:
                self._fill(fd, part, offset, into[:count])
            finally:
                if not self._keep_open:
                    os.close(fd)
            into = into[count:]

    def header(self, at: int) -> bytearray:
        """All that stands before the data in file `at` of the snapshot's parts."""
        part = self._layout.parts[at]
        header = bytearray(part.data_start)
        fd = self._fds[at] if self._keep_open else _open(part)
        try:
            self._fill(fd, part, 0, memoryview(header))
        finally:
            if not self._keep_open:
                os.close(fd)
        return header

    def _fill(self, fd: int, part: Part, offset: int, into: memoryview) -> None:
        with reading_from(part.path):
            while into:
                count = self._read_some(fd, offset, into)
                if count == 0:
                    raise changed(part.path)
                into, offset = into[count:], offset + count

    def _read_some(self, fd: int, offset: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(fd, [into], offset)
        with self._lock:  # a file has one position, which the threads share
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(into))
        into[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        """Raise SnapshotError for a file that is not as it was when its header was read."""
        for at, part in enumerate(self._layout.parts):
            if self._keep_open:
                _check(part, os.fstat(self._fds[at]))
            with reading_from(part.path):  # another file may have taken its name
                _check(part, os.stat(part.path))


def fingerprint(layout: Layout) -> str:
    """What tells a snapshot from others, wherever it lies and whatever it is called.

    32 hex digits of the SHA-256 of its files' headers and of 16 blocks of its data, spread evenly
    from the first byte to the last: 64 KiB are quickly read, however large it is. Raises what
    Reader does.
    """
    import hashlib  # only here: it takes as long to load as all else in this module

    digest = hashlib.sha256()
    length = sum(part.length for part in layout.parts)
    block = min(_FINGERPRINT_BLOCK, length)
    places = {
        (length - block) * at // (_FINGERPRINT_BLOCKS - 1) for at in range(_FINGERPRINT_BLOCKS)
    }
    with Reader(layout) as reader:
        for at in range(len(layout.parts)):
            digest.update(reader.header(at))
        data = bytearray(block)
        for start in sorted(places):
            reader.read(start, memoryview(data))
            digest.update(data)
    return digest.hexdigest()[:32]


def _open(part: Part) -> int:
    with reading_from(part.path):
        fd = os.open(part.path, _FLAGS)
        try:
            _check(part, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd


def _check(part: Part, status: os.stat_result) -> None:
    found = status.st_size, status.st_mtime_ns, status.st_ino
    if found != (part.size, part.modified, part.inode):
        raise changed(part.path)


def changed(path: Path) -> SnapshotError:
    """The error for a file that is no longer what its header said when it was read."""
    return SnapshotError(
        str(path),
        "changed while it was read",
        "wait until it is written, or leave it out with --only",
    )


@contextlib.contextmanager
def reading_from(path: Path) -> Iterator[None]:
    """Turn the system's errors while `path` is read into one line that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise changed(path) from None
    except OSError as error:
        raise MachineError(
            str(path), f"cannot be read ({reason(error)})", "check the disk and the permissions"
        ) from error
