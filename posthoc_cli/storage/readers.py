"""Reading the tensors' bytes of snapshots, and noticing when their files change meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from posthoc_cli.errors import MachineError, SnapshotError
from posthoc_cli.storage.header import TensorIndex, reason, spans

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_FLAGS |= getattr(os, "O_NONBLOCK", 0)  # never wait for a pipe that has taken a file's name

_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK = 16, 4096


_OTHER_FILES = 64
"""Files that a process has open besides those that it counts, at the most."""


def can_open(files: int) -> bool:
    """Whether this process may have so many more files open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return True
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft == resource.RLIM_INFINITY or soft >= files + _OTHER_FILES


class InputFile:
    """One file, open for reading; in a `with` block, from several threads at once.

    It has to be what it was when it was looked at: of `size` bytes, last modified at `modified` (in
    nanoseconds), with the number `inode` where that is known. With `keep_open` false each read
    opens it anew.

    Raises SnapshotError when it is another now, MachineError when it can't be read.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        modified: int,
        inode: int | None = None,
        *,
        keep_open: bool = True,
    ) -> None:
        self._path = path
        self._expected = size, modified, inode
        self._keep_open = keep_open
        self._fd = -1
        self._lock = threading.Lock()

    def __enter__(self) -> InputFile:
        fd = self._open()
        if self._keep_open:
            self._fd = fd
        else:
            os.close(fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """The descriptor, which is only good while it is kept open."""
        return self._fd

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on."""
        fd = self._fd if self._keep_open else self._open()
        try:
            with read_errors(self._path):
                while into:
                    count = self._read_some(fd, offset, into)
                    if count == 0:
                        raise changed(self._path)
                    into, offset = into[count:], offset + count
        finally:
            if not self._keep_open:
                os.close(fd)

    def check_unchanged(self) -> None:
        """Raise SnapshotError if it is not as it was when it was looked at."""
        with read_errors(self._path):
            if self._keep_open:
                self._check(os.fstat(self._fd))
            self._check(os.stat(self._path))  # another file may have taken its name

    def _open(self) -> int:
        with read_errors(self._path):
            fd = os.open(self._path, _FLAGS)
            try:
                self._check(os.fstat(fd))
            except BaseException:
                os.close(fd)
                raise
            return fd

    def _check(self, status: os.stat_result) -> None:
        size, modified, inode = self._expected
        found = status.st_size, status.st_mtime_ns, None if inode is None else status.st_ino
        if found != (size, modified, inode):
            raise changed(self._path)

    def _read_some(self, fd: int, offset: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(fd, [into], offset)
        with self._lock:  # a file has one position, which the threads share
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(into))
        into[: len(data)] = data
        return len(data)


class Reader:
    """The files of a snapshot, open for reading; in a `with` block, from several threads at once.

    With `keep_open` false each read opens its file anew, for those with more snapshots than the
    system lets a process have files.

    Raises SnapshotError for a file that is no longer what its header said when that was read,
    MachineError for one that can't be read.
    """

    def __init__(self, layout: TensorIndex, *, keep_open: bool = True) -> None:
        self._parts = layout.parts
        self._files = [
            InputFile(part.path, part.size, part.modified, part.inode, keep_open=keep_open)
            for part in layout.parts
        ]
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Reader:
        with contextlib.ExitStack() as opened:
            for file in self._files:
                opened.enter_context(file)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the snapshot's data from `start` on."""
        for at, offset, count in spans(self._parts, start, len(into)):
            self._files[at].read(offset, into[:count])
            into = into[count:]

    def header(self, at: int) -> bytearray:
        """All that stands before the data in file `at` of the snapshot's parts."""
        header = bytearray(self._parts[at].data_start)
        self._files[at].read(0, memoryview(header))
        return header

    def check_unchanged(self) -> None:
        """Raise SnapshotError for a file that is not as it was when its header was read."""
        for file in self._files:
            file.check_unchanged()


def fingerprint(layout: TensorIndex) -> str:
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


def changed(path: Path) -> SnapshotError:
    """The error for a file that is no longer what its header said when it was read."""
    return SnapshotError(
        str(path),
        "changed while it was read",
        "wait until it is written, or leave it out with only=",
    )


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors while `path` is read into one line that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise changed(path) from None
    except OSError as error:
        raise MachineError(
            str(path), f"cannot be read ({reason(error)})", "check the disk and the permissions"
        ) from error
