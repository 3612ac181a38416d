"""A lock on a file that ends with the process that holds it, and is held by one process only."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from pathlib import Path

_BEYOND = 1 << 30
"""The byte to lock where locks are for bytes: what is locked, nobody else can read."""

if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int) -> None:
        os.lseek(fd, _BEYOND, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    _HELD_ELSEWHERE: tuple[type[OSError], ...] = (PermissionError,)
else:
    import fcntl

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    _HELD_ELSEWHERE = (BlockingIOError, PermissionError)

_LONGEST_NOTE = 4096


class FileLock:
    """This process' lock on the file `path`, until `release`, or the end of this or the process.

    `sure` is false where the system has no locks: then other processes may have one too.
    """

    def __init__(self, path: Path, fd: int, sure: bool) -> None:
        self.path, self.sure, self.fd = path, sure, fd
        self.note = b""
        self._key = _key(os.fstat(fd))
        _HELD[self._key] = self
        self._end = weakref.finalize(self, _release, path, fd, sure)

    @property
    def held(self) -> bool:
        """Not after `release` or `pass_on`, nor in a process forked from the one that has it."""
        return self.fd >= 0

    @property
    def in_place(self) -> bool:
        """Whether it is still this file that others find, and not removed with its folder."""
        return _same(self.path, self.fd)

    def release(self) -> None:
        """End the lock, and remove its file."""
        self.fd = -1
        self._end()

    def pass_on(self) -> FileLock:
        """The same lock for another holder; this one has it no longer."""
        return FileLock(self.path, self._forget(), self.sure)

    def retry(self) -> bool:
        """Try again where there seemed to be no locks; false where another process has it now."""
        sure = _try(self.fd)
        if sure:
            self._end.detach()
            self.sure = True
            self._end = weakref.finalize(self, _release, self.path, self.fd, True)
        return sure is not False

    def write_note(self, note: bytes) -> None:
        """Say in the file who holds it: for a message, or for those who have no sure locks."""
        self.note = note
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, 0)
            os.lseek(self.fd, 0, os.SEEK_SET)
            os.write(self.fd, note)

    def _forget(self) -> int:
        self._end.detach()
        fd, self.fd = self.fd, -1
        return fd


_HELD: weakref.WeakValueDictionary[tuple[int, int], FileLock] = weakref.WeakValueDictionary()
"""The locks of this process, by what tells files apart."""


def take_lock(path: Path) -> FileLock | None:
    """Lock the file `path`, made if need be; None where another process has it locked.

    Raises OSError when it can't be made.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        sure = _try(fd)
        if sure is False:
            os.close(fd)
            return None
        if _same(path, fd):
            return FileLock(path, fd, bool(sure))
        os.close(fd)  # who had it has just removed it


def own_lock(path: Path) -> FileLock | None:
    """The lock that this process has on `path`."""
    try:
        return _HELD.get(_key(os.stat(path)))
    except OSError:
        return None


def read_note(path: Path) -> bytes:
    """What the holder of a lock says in its file; nothing where that can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_LONGEST_NOTE)
    except OSError:
        return b""


def _try(fd: int) -> bool | None:
    """Whether it is locked now: false where another has it, None where the system has no locks."""
    try:
        _lock(fd)
    except _HELD_ELSEWHERE:
        return False
    except OSError:
        return None
    return True


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _same(path: Path, fd: int) -> bool:
    try:
        return _key(os.stat(path)) == _key(os.fstat(fd))
    except OSError:
        return False


def _release(path: Path, fd: int, sure: bool) -> None:
    own = sure and _same(path, fd)
    with contextlib.suppress(OSError):
        if own and os.name != "nt":
            os.unlink(path)  # while it is locked: nobody else has it
    with contextlib.suppress(OSError):
        os.close(fd)
    with contextlib.suppress(OSError):
        if own and os.name == "nt":
            os.unlink(path)  # fails where another has it open by now


def _forget_all() -> None:
    """In a forked process: the locks are the parent's, and end when it ends, not with this one."""
    for lock in list(_HELD.values()):
        with contextlib.suppress(OSError):
            os.close(lock._forget())
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
