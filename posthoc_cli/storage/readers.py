"""Reading the tensors' bytes of snapshots, and noticing when their files change meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from posthoc_cli.errors import SnapshotError
from posthoc_cli.storage.disk import unreadable
from posthoc_cli.storage.header import File, Part, ReadAt, TensorIndex, spans

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_FLAGS |= getattr(os, "O_NONBLOCK", 0)  # never wait for a pipe that has taken a file's name

_BLOCKS, _BLOCK = 16, 4096
"""How many blocks of data a fingerprint is made of, and their bytes."""


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
    """A file open for reading in a `with` block, from several threads at once.

    It must still be as it was found. With `keep_open` false each read opens it anew.

    Raises SnapshotError when it has changed, MachineError when it can't be read.
    """

    def __init__(self, file: File, *, keep_open: bool = True) -> None:
        self._path = file.path
        self._expected = file
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

    def __exit__(self, *_: object) -> None:
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
            with _read_errors(self._path):
                while into:
                    count = self._read_some(fd, offset, into)
                    if count == 0:
                        raise _changed(self._path)
                    into, offset = into[count:], offset + count
        finally:
            if not self._keep_open:
                os.close(fd)

    def check_unchanged(self) -> None:
        """Raise SnapshotError if the file is not as it was."""
        with _read_errors(self._path):
            if self._keep_open:
                self._check(os.fstat(self._fd))
            self._check(os.stat(self._path))  # another file may have taken its name

    def _open(self) -> int:
        with _read_errors(self._path):
            fd = os.open(self._path, _FLAGS)
            try:
                self._check(os.fstat(fd))
            except BaseException:
                os.close(fd)
                raise
            return fd

    def _check(self, status: os.stat_result) -> None:
        found = File.of(self._path, status)
        if self._expected.inode is None:
            found = replace(found, inode=None)
        if found != self._expected:
            raise _changed(self._path)

    def _read_some(self, fd: int, offset: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(fd, [into], offset)
        with self._lock:  # a file has one position, which the threads share
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(into))
        into[: len(data)] = data
        return len(data)


class Reader:
    """A snapshot's files open for reading in a `with` block, from several threads at once.

    With `keep_open` false each read opens its file anew: for more snapshots than the system lets a
    process have open files.

    Raises SnapshotError for a file that changed since its header was read, MachineError for one
    that can't be read.
    """

    def __init__(self, index: TensorIndex, *, keep_open: bool = True) -> None:
        self._parts = index.parts
        self._files = [InputFile(file, keep_open=keep_open) for file in index.files]
        self._contents: dict[int, ReadAt] = {}
        self._lock = threading.Lock()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Reader:
        with contextlib.ExitStack() as opened:
            for file in self._files:
                opened.enter_context(file)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the snapshot's data from `start` on."""
        for at, offset, count in spans(self._parts, start, len(into)):
            self._reads(at)(offset, into[:count])
            into = into[count:]

    def read_file(self, at: int, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of file `at` of the index from `offset` on."""
        self._files[at].read(offset, into)

    def _reads(self, at: int) -> ReadAt:
        """What reads part `at`; a content is opened once, as it may remember where it is."""
        part = self._parts[at]
        if part.content is None:
            return self._files[part.file].read
        with self._lock:
            if at not in self._contents:
                self._contents[at] = part.content.open([file.read for file in self._files])
            return self._contents[at]

    def check_unchanged(self) -> None:
        """Raise SnapshotError for a file that changed since its header was read."""
        for file in self._files:
            file.check_unchanged()


def fingerprint(index: TensorIndex) -> str:
    """What tells a snapshot from others, wherever it lies and whatever it is called.

    32 hex digits of the SHA-256 of its files' headers and of 16 blocks of 4 KiB of its data, spread
    evenly from the first byte to the last. Of a format other than safetensors it is that of its
    structure and of such blocks of its files as they are; of a difference that of its own file,
    which has that of its base. Raises what Reader does.
    """
    import hashlib  # only here: it takes as long to load as all else in this module

    index = index.links[-1].index if index.links else index
    digest = hashlib.sha256(index.structure or b"")
    parts: Sequence[Part] = index.parts
    if index.structure is not None:
        firsts = accumulate((file.size for file in index.files), initial=0)
        sizes = zip(index.files, firsts, strict=False)
        parts = [Part(first, file.size, 0, at) for at, (file, first) in enumerate(sizes)]
    length = sum(part.length for part in parts)
    block = min(_BLOCK, length)
    with Reader(replace(index, parts=tuple(parts))) as reader:
        for part in parts:
            header = bytearray(part.data_start)
            reader.read_file(part.file, 0, memoryview(header))
            digest.update(header)
        data = bytearray(block)
        for start in sorted({(length - block) * at // (_BLOCKS - 1) for at in range(_BLOCKS)}):
            reader.read(start, memoryview(data))
            digest.update(data)
    return digest.hexdigest()[:32]


def _changed(path: Path) -> SnapshotError:
    return SnapshotError(
        str(path),
        "changed while it was read",
        "wait until it is written, or leave it out with only=",
    )


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Raise the system's errors while an open `path` is read as one line each."""
    try:
        yield
    except FileNotFoundError:
        raise _changed(path) from None
    except OSError as error:
        raise unreadable(path, error, "check the disk and the permissions") from error
