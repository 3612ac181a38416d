"""Files that appear whole or not at all, one or several together."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from posthoc_cli.errors import MachineError, in_bytes
from posthoc_cli.storage.disk import (
    already_exists,
    remove_file,
    unsupported_is_fine,
    write_errors,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.posthoc-tmp", re.DOTALL)

_ABANDONED_AFTER = 60.0
"""Seconds without a write after which a temporary file counts as abandoned, without locks."""


class AtomicFile:
    """A file of `size` bytes that appears at `path` whole, or not at all.

    Its space is reserved, and it is written beside its place under a temporary name; at the end of
    the `with` block it is flushed to disk and renamed, or, after an exception, removed. Its mode
    is what the umask gives. `write_at` may be called from several threads at once. What a killed
    process has left in the folder is removed by the next one that writes there.

    Raises UsageError when `path` exists and `overwrite` is false, MachineError when the space or
    the permission is missing. `commit_together` does the same for several files.
    """

    def __init__(self, path: Path, size: int, *, overwrite: bool = False) -> None:
        self.path = path
        self.size = size
        self.overwrite = overwrite
        self._lock = threading.Lock()
        self._fd = -1
        self._temporary: Path | None = None
        self._own: os.stat_result | None = None

    def __enter__(self) -> AtomicFile:
        self.check_absent()
        check_space([self])
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
                self.commit()
        finally:
            self.discard()

    def check_absent(self) -> None:
        """Raise UsageError when there is something that must not be replaced."""
        if not self.overwrite and os.path.lexists(self.path):
            raise already_exists(self.path)

    def open(self) -> None:
        """Make the temporary file, and reserve its space."""
        with write_errors(self.path):
            _remove_abandoned(self.path.parent)
            self._fd, self._temporary = _make_temporary(self.path)
            self._own = os.fstat(self._fd)
            try:
                _reserve(self._fd, self.size)
            except BaseException:
                self.discard()
                raise

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `offset` of the file."""
        with write_errors(self.path):
            view = memoryview(data).cast("B")
            while view:
                written = self._write_some(view, offset)
                view, offset = view[written:], offset + written

    def copy_from(self, fd: int, offset: int, start: int, count: int) -> int:
        """Have the system copy up to `count` bytes from `offset` of the open file `fd` to byte
        `start` of this one; returns how many: 0 where it can't, or not between these two.
        """
        if not hasattr(os, "copy_file_range"):
            return 0
        with write_errors(self.path):
            try:
                return os.copy_file_range(fd, self._fd, count, offset, start)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1)):
                    raise
                return 0

    def flush(self) -> None:
        """Wait until what was written so far is on the disk."""
        with write_errors(self.path), unsupported_is_fine():
            getattr(os, "fdatasync", os.fsync)(self._fd)

    def finish(self) -> None:
        """Wait until all of it is on the disk, length and times included."""
        with write_errors(self.path), unsupported_is_fine():
            os.fsync(self._fd)

    def commit(self) -> None:
        """Give the finished file its name."""
        assert self._temporary is not None
        with write_errors(self.path):
            if fcntl is None:
                self._close()  # Windows renames no open file; elsewhere it stays open: locked
            _move_into_place(self._temporary, self.path, self.overwrite)
            self._temporary = None
            self._close()
            _flush_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the temporary file, unless it has been renamed."""
        self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None

    def rollback(self) -> None:
        """Undo `commit`, unless it replaced another file."""
        if not self.overwrite and self._own is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(self.path), self._own):
                    os.unlink(self.path)

    def _close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def _write_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, view, offset)
        with self._lock:  # Windows has one position a file
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, view)


@contextlib.contextmanager
def commit_together(files: Sequence[AtomicFile], stale: Sequence[Path] = ()) -> Iterator[None]:
    """Open `files` for a `with` block, at the end of which all of them appear, or none.

    They appear in their order, once all are on the disk. `stale` are files that would contradict
    them, such as the index of an output that they replace: they are removed before.
    """
    try:
        for file in files:
            file.check_absent()
        check_space(files)
        for file in files:
            file.open()
        yield
        for file in files:
            file.finish()
        for file in files:  # again, as another run may have been faster
            file.check_absent()
        for path in stale:
            remove_file(path)
        for file in files:
            file.commit()
    except BaseException:  # an interrupt may come right after a rename
        for file in reversed(files):
            file.rollback()
        raise
    finally:
        for file in files:
            file.discard()


def check_space(files: Sequence[AtomicFile]) -> None:
    """Raise MachineError, with how much is missing, when a disk can't hold its `files`."""
    needed: dict[int, tuple[int, AtomicFile]] = {}
    for file in files:
        with contextlib.suppress(OSError):  # a folder that isn't there is told when it is written
            device = os.stat(file.path.parent).st_dev
            needed[device] = needed.get(device, (0, file))[0] + file.size, file
    for size, file in needed.values():
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(file.path.parent).free
            if free < size:
                raise MachineError(
                    str(file.path.parent),
                    f"{in_bytes(size - free)} of the {in_bytes(size)} to be written are missing "
                    "on its disk",
                    "free some space or choose another disk",
                )


# Temporary files. One that is being written is locked; one that isn't has been abandoned.


def _make_temporary(path: Path) -> tuple[int, Path]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = path.with_name(f".{path.name[:40]}.{os.urandom(6).hex()}.posthoc-tmp")
        fd = os.open(temporary, flags, 0o666)
        if fcntl is None:
            return fd, temporary
        with contextlib.suppress(OSError):  # some file systems have no locks: none is ever taken
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(temporary), os.fstat(fd)):
                return fd, temporary
        os.close(fd)  # another run took it for abandoned before it was locked


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in `folder` that no process writes any more."""
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return
    if fcntl is None:
        if time.time() - status.st_mtime > _ABANDONED_AFTER:
            os.unlink(path)  # fails while it is open
        return
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is written
        os.unlink(path)
    finally:
        os.close(fd)


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


def _move_into_place(temporary: Path, path: Path, overwrite: bool) -> None:
    """Move the finished file to its place; without `overwrite`, never onto another file."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, fails if another run got there first
    except FileExistsError:
        raise already_exists(path) from None
    except OSError:  # a file system without hard links: the check above has to do
        if os.path.lexists(path):
            raise already_exists(path) from None
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
