"""Outputs that appear whole or not at all, one or several together."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from posthoc_cli.errors import MachineError, in_bytes
from posthoc_cli.storage.aside import Aside, flush_folder, identity, identity_at
from posthoc_cli.storage.disk import already_exists, unsupported_is_fine, write_errors
from posthoc_cli.storage.outputs import Group, Output, refuse_folder
from posthoc_cli.storage.temporary import (
    aside_name,
    busy,
    clean_up,
    locked_output,
    locks_exist,
    make_temporary,
    recover,
)

LONGEST_WAIT = 60.0
"""Seconds to wait for another run that is putting its files in the same places."""


class AtomicFile:
    """A file of `size` bytes that appears at `path` whole, or not at all.

    Its space is reserved, and it is written beside its place under a temporary name; at the end of
    the `with` block it is flushed to disk and renamed, or, after an exception, removed. Its mode
    is what the umask gives. `write_at` may be called from several threads at once. What a killed
    process has left in the folder is removed by the next one that writes there.

    Raises UsageError when `path` exists and `overwrite` is false, MachineError when the space or
    the permission is missing. `commit_together` does the same for several files.
    """

    in_order = False
    by_ranks = True
    at_once = True
    """Whether one rename replaces what is in its place."""

    def __init__(self, path: Path, size: int, *, overwrite: bool = False) -> None:
        self.path = path
        self.size = size
        self.overwrite = overwrite
        self._lock = threading.Lock()
        self._fd = -1
        self._temporary: Path | None = None
        self._own: os.stat_result | None = None

    def __enter__(self) -> AtomicFile:
        clean_up(self.path.parent)
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

    def __reduce__(self) -> tuple[type[JoinedFile], tuple[Path, Path | None, int]]:
        return JoinedFile, (self.path, self._temporary, self.size)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Have the file open on this rank for a `with` block; on the one that made it, it is."""
        yield

    @property
    def temporary(self) -> Path:
        """Where it lies while it is written."""
        assert self._temporary is not None
        return self._temporary

    def check_absent(self) -> None:
        """Raise UsageError when there is something that must not be replaced."""
        refuse_folder(self.path)
        if not self.overwrite and self.taken():
            raise already_exists(self.path)

    def taken(self) -> bool:
        """Whether there is something in its place."""
        return os.path.lexists(self.path)

    def open(self) -> None:
        """Make the temporary file, and reserve its space."""
        with write_errors(self.path):
            try:
                self._fd, self._temporary = make_temporary(self.path)
                self._own = os.fstat(self._fd)
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

    def shrink(self, size: int) -> None:
        """Give the file its true length, where less was written than was reserved."""
        with write_errors(self.path):
            os.ftruncate(self._fd, size)
            self.size = size

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
        self.place(overwrite=self.overwrite)
        self._close()
        flush_folder(self.path.parent)

    def place(self, *, overwrite: bool) -> None:
        """The same, without waiting until the name is on the disk."""
        with write_errors(self.path):
            # Windows renames no open file; elsewhere it stays open, and so locked.
            if not locks_exist():
                self._close()
            if _move_into_place(self.temporary, self.path, overwrite):
                self._temporary = None

    def identity(self) -> tuple[int, int, int]:
        """What tells the finished file from others, wherever it is moved to."""
        with write_errors(self.path):
            return identity(os.fstat(self._fd))

    def discard(self) -> None:
        """Remove the temporary file, unless it has been renamed."""
        self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None

    def rollback(self) -> None:
        """Undo `commit`, where there was no other file before."""
        if self._own is not None:
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


class JoinedFile(AtomicFile):
    """What another rank gets of an AtomicFile: its temporary file, to write a part of it."""

    def __init__(self, path: Path, temporary: Path | None, size: int) -> None:
        super().__init__(path, size)
        self._place = temporary or path

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        with write_errors(self.path):
            # By a server's rules for files that are open to write only, no bytes but those just
            # written are sent: the others of their page are another rank's.
            self._fd = os.open(self._place, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            yield
        finally:
            self._close()


@contextlib.contextmanager
def opened(files: Sequence[Output], groups: Sequence[Group] = ()) -> Iterator[None]:
    """Have `files` open for a `with` block that commits one after the other; what it has not
    committed is removed. What they may replace is said by their `groups`, if they have any.

    Raises UsageError and MachineError as AtomicFile does.
    """
    try:
        for folder in {file.path.parent for file in files}:
            clean_up(folder)
        for group in groups:
            group.replaced()
        for file in () if groups else files:
            file.check_absent()
        check_space(files)
        for file in files:
            file.open()
        yield
    finally:
        for file in files:
            file.discard()


@contextlib.contextmanager
def commit_together(groups: Sequence[Group]) -> Iterator[None]:
    """Open the files of all groups for a `with` block, at the end of which all appear, or none.

    After an error all is as before. A group that a kill leaves half in its places is undone, or
    finished, by the next run that writes to its folder.

    Raises UsageError when a file must not be replaced, MachineError when a disk fails or another
    run doesn't end putting files in the same places.
    """
    files = [file for group in groups for file in group.files]
    with opened(files, groups):
        yield
        for file in files:
            file.finish()
        with contextlib.ExitStack() as locks:
            held = [
                locks.enter_context(locked_output(path, LONGEST_WAIT))
                for path in sorted({group.path for group in groups})
            ]
            _put_in_place(groups, locked=all(held))


def _put_in_place(groups: Sequence[Group], *, locked: bool) -> None:
    """Replace what is there now, as another run may have been faster."""
    for group in groups:
        recover(aside_name(group.path), group.path, locked=locked)
    plans = [(group, group.replaced()) for group in groups]
    asides: dict[Path, Aside] = {}
    placed = False
    try:
        files = [file for group in groups for file in group.files]
        old = plans[0][1] if len(files) == 1 else []
        if len(files) == 1 and (not old or (old == [files[0].path] and files[0].at_once)):
            files[0].place(overwrite=bool(old))  # one step, nothing to undo
        else:
            for group, old in plans:
                if old or len(group.files) > 1:
                    _begin(group, old, asides)
            for group in groups:
                _land(group, asides.get(group.path))
        placed = True
        for folder in {group.path.parent for group in groups}:
            flush_folder(folder)
        _end(asides, Aside.finish)
    except BaseException:  # an interrupt may come right after a rename
        _end(asides, Aside.finish if placed else Aside.undo)
        for group, old in plans if not placed else ():
            for file in group.files if not old else ():
                file.rollback()
        raise


def _begin(group: Group, old: Sequence[Path], asides: dict[Path, Aside]) -> None:
    with write_errors(group.path):
        new = {file.path.name: file.identity() for file in group.files}
        there = {path.name: identity_at(path) for path in old}
        aside = Aside(aside_name(group.path), new, there)
        try:
            aside.make()
        except FileExistsError:  # there are no locks, or they could not be had
            raise busy(group.path) from None
        asides[group.path] = aside
        aside.write_journal()


def _land(group: Group, aside: Aside | None) -> None:
    """Put a group's files in their places. Readers see the old output, then the new one; between
    the two nothing, where a part of the one has the name of one of the other.
    """
    *parts, main = group.files
    waiting = list(aside.old) if aside else []

    def set_aside(name: str, *, keep: bool = False) -> None:
        if aside:
            with write_errors(group.path.with_name(name)):
                aside.set_aside(name, keep=keep)

    if aside and aside.overlap:
        for name in waiting:
            set_aside(name)
        waiting = []
    for file in parts:
        file.place(overwrite=False)
    if main.path.name in waiting:
        set_aside(main.path.name, keep=True)
    main.place(overwrite=main.path.name in waiting)
    for name in waiting:
        if name != main.path.name:
            set_aside(name)


def _end(asides: Mapping[Path, Aside], how: Callable[[Aside], None]) -> None:
    """Finish or undo; what can't be now is for the next run."""
    for aside in reversed(list(asides.values())):
        with contextlib.suppress(OSError):
            how(aside)


def check_space(files: Sequence[Output]) -> None:
    """Raise MachineError, with how much is missing, when a disk can't hold its `files`."""
    needed: dict[int, tuple[int, Output]] = {}
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


def _move_into_place(temporary: Path, path: Path, overwrite: bool) -> bool:
    """Move the finished file to its place; without `overwrite`, never onto another file.

    Returns whether the temporary name is gone.
    """
    if overwrite:
        os.replace(temporary, path)
        return True
    try:
        os.link(temporary, path)  # unlike a rename, fails if another run got there first
    except FileExistsError:
        raise already_exists(path) from None
    except OSError:  # a file system without hard links: the check above has to do
        if os.path.lexists(path):
            raise already_exists(path) from None
        os.replace(temporary, path)
        return True
    with contextlib.suppress(OSError):  # a second name of what is in its place: for the next run
        os.unlink(temporary)
        return True
    return False
