"""Files and folders of the local disk, with the system's errors as one line each."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import stat
import threading
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from posthoc_cli.errors import MachineError, SnapshotError, UsageError, printable
from posthoc_cli.storage.places import File, Url
from posthoc_cli.storage.sniffing import where_link_leads

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_FLAGS |= getattr(os, "O_NONBLOCK", 0)  # never wait for a pipe that has taken a file's name


def make_folder(folder: Path, *, parents: bool = False) -> None:
    """Make `folder` unless it is there; with `parents`, also those it lies in. Stores need none."""
    if isinstance(folder, Url):
        return
    with write_errors(folder):
        folder.mkdir(parents=parents, exist_ok=True)


def free_bytes(folder: Path) -> float:
    """What the disk of `folder` has room for; infinite where that can't be told."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf


def is_full(error: Exception) -> bool:
    """Whether something couldn't be written because a disk, or a quota, has no room for it."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _FULL


_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class Disk:
    """The local disk, as a store (see `stores`)."""

    def list(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def is_folder(self, path: Path) -> bool:
        return os.path.isdir(path)

    def is_file(self, path: Path) -> bool:
        return os.path.isfile(path)

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def status(self, path: Path) -> File | None:
        try:
            return File.of(path, os.stat(path))
        except OSError:
            return None

    def identity(self, path: Path) -> Hashable | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        # Some file systems have no numbers.
        return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)

    @contextlib.contextmanager
    def open(self, path: Path, remedy: str) -> Iterator[tuple[BinaryIO, File]]:
        try:
            # A FIFO would block on open, and a device has no length.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise SnapshotError(str(path), "not a regular file", remedy)
            with open(path, "rb") as file:
                yield file, File.of(path, os.fstat(file.fileno()))
        except OSError as error:
            if os.path.islink(path) and not os.path.exists(path):
                raise SnapshotError(str(path), *where_link_leads(path)) from None
            raise unreadable(path, error, "check the file and its permissions") from error

    def input(self, file: File, keep_open: bool) -> InputFile:
        return InputFile(file, keep_open=keep_open)


def allocated(path: Path) -> int | None:
    """How many bytes of the file the disk holds, where that is known."""
    try:
        blocks = getattr(os.stat(path), "st_blocks", None)
    except OSError:
        return None
    return None if blocks is None else 512 * blocks


class InputFile:
    """A file open for reading in a `with` block, from several threads at once.

    It must still be as it was found. With `keep_open` false each read opens it anew.

    Raises SnapshotError when it has changed, MachineError when it can't be read.
    """

    remote = False

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
                        raise changed(self._path)
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
            raise changed(self._path)

    def _read_some(self, fd: int, offset: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(fd, [into], offset)
        with self._lock:  # a file has one position, which the threads share
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(into))
        into[: len(data)] = data
        return len(data)


def changed(path: Path) -> SnapshotError:
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
        raise changed(path) from None
    except OSError as error:
        raise unreadable(path, error, "check the disk and the permissions") from error


def unreadable(path: Path, error: OSError, remedy: str) -> MachineError:
    return MachineError(str(path), f"cannot be read ({reason(error)})", remedy)


def is_gone(error: Exception) -> bool:
    """Whether a file couldn't be read because it is no longer there."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _GONE


_GONE = {errno.ENOENT, errno.ENOTDIR, getattr(errno, "ESTALE", errno.ENOENT)}


def already_exists(path: Path) -> UsageError:
    return UsageError(
        str(path), "exists already", "use force=True to replace it or skip_existing=True to keep it"
    )


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise the system's errors while `path` is written as MachineError, with what to do."""
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


@contextlib.contextmanager
def unsupported_is_fine() -> Iterator[None]:
    """Some network and FUSE file systems can't flush, and say so: the disk has not failed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def reason(error: OSError) -> str:
    """What went wrong, in the system's words, without the paths it adds."""
    return printable(error.strerror or str(error))
