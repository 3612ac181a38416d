"""A writer that streams, and lands its files atomically: whole or not at all."""

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
from types import TracebackType

from posthoc_cli.errors import MachineError, UsageError, in_bytes
from posthoc_cli.storage.header import reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.posthoc-tmp", re.DOTALL)

_ABANDONED_AFTER = 60.0
"""Seconds without a write after which a temporary file is nobody's, where files have no locks."""


class AtomicFile:
    """A file of `size` bytes that appears at `path` whole, or not at all.

    Written beside its place under a temporary name, its space reserved first; on leaving the
    `with` block it is flushed to disk and renamed, or, if there was an exception, removed. Its mode
    is what the umask gives. `write_at` may be called from several threads at once. What a process
    that was killed has left in the folder is removed by the next one that writes there.

    Raises UsageError when `path` exists and `overwrite` is false, MachineError when the space or
    the permission is missing. `together` lands several.
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

    def check_absent(self) -> None:
        """Raise UsageError when there is something that must not be replaced."""
        if not self.overwrite and os.path.lexists(self.path):
            raise _exists(self.path)

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
        """Have the system copy up to `count` bytes, from `offset` in the file open as `fd`, to byte
        `start` of this one; returns how many: 0 where it can't do that, or not between these two.
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
        with write_errors(self.path):
            getattr(os, "fdatasync", os.fsync)(self._fd)

    def finish(self) -> None:
        """Flush all of it, length and times included."""
        with write_errors(self.path):
            os.fsync(self._fd)

    def commit(self) -> None:
        """Give the finished file its name."""
        assert self._temporary is not None
        with write_errors(self.path):
            if fcntl is None:
                self._close()  # Windows renames no open file; elsewhere it stays open: locked
            _land(self._temporary, self.path, self.overwrite)
            self._temporary = None
            self._close()
            _flush_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written, unless it has landed."""
        self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None

    def rollback(self) -> None:
        """Remove it from its place again if it has landed there, unless in that of another."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
                self.commit()
        finally:
            self.discard()


@contextlib.contextmanager
def commit_together(files: Sequence[AtomicFile], stale: Sequence[Path] = ()) -> Iterator[None]:
    """Open `files` for a `with` block, at the end of which all of them land, or none.

    They land in their order, once all are on the disk. `stale` are files that would contradict
    them, such as the index of an output that they replace: gone before the first one lands.
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
        for file in files:  # before any of them lands, as another run may have been faster
            file.check_absent()
        for path in stale:
            with write_errors(path):
                path.unlink(missing_ok=True)
        for file in files:
            file.commit()
    except BaseException:  # an interrupt may come between a landing and any note of it
        for file in reversed(files):
            file.rollback()
        raise
    finally:
        for file in files:
            file.discard()


def check_space(files: Sequence[AtomicFile]) -> None:
    """Raise MachineError, and say how much is missing, when a disk can't hold its `files`."""
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


# Temporary files: one that a living process writes is locked, one that is not has been abandoned.


def _make_temporary(path: Path) -> tuple[int, Path]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
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
    fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is written
        os.unlink(path)
    finally:
        os.close(fd)


def _exists(path: Path) -> UsageError:
    return UsageError(
        str(path), "exists already", "use force=True to replace it or skip_existing=True to keep it"
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
def write_errors(path: Path) -> Iterator[None]:
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
