"""Old outputs set aside while new ones take their places, so that an error or a kill can be undone.

They lie in a hidden folder beside their places, with a journal that says what was to become of
them. Once all new files are in place the old ones are removed; until then they can be put back, by
the run itself or, after a kill, by the next one that writes to the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from posthoc_cli.storage.metadata import MANIFEST

_JOURNAL = ".journal"
_UNDONE = ".undone"
"""What a new folder is called that is removed again."""

Identity = tuple[int, int, int]
"""A file's number, size and time of change: some file systems have no lasting numbers."""


def identity(status: os.stat_result) -> Identity:
    return status.st_ino, status.st_size, status.st_mtime_ns


def identity_at(path: Path) -> Identity:
    """That of what is at `path`; a folder of ours goes by its manifest, as its own size and time
    change with what is put into it."""
    return identity(os.lstat(path / MANIFEST if _is_folder(path) else path))


def _status(path: Path) -> os.stat_result | None:
    """What is at `path`, if anything; a disk that doesn't answer is an error, and not nothing."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.lstat(path)
    return None


def _is_folder(path: Path) -> bool:
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _is(path: Path, known: Sequence[int]) -> bool:
    """Whether what is at `path` is the one `known`."""
    try:
        number, size, changed = identity_at(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return size == known[1] and (number == known[0] or changed == known[2])


class Aside:
    """The folder `path`, with what `new` files replace, by name: some of `old`.

    The last of `new` is the one that makes readers see all of them, as an index does; the first
    of `old` is the one that makes them see the old ones.
    """

    def __init__(self, path: Path, new: Mapping[str, Identity], old: Mapping[str, Identity]):
        self.path = path
        self.new = dict(new)
        self.old = dict(old)

    @classmethod
    def load(cls, path: Path) -> Aside | None:
        """What a killed run left at `path`; None where nothing had been moved yet."""
        try:
            document = json.loads((path / _JOURNAL).read_bytes())
            return cls(path, document["new"], document["old"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def overlap(self) -> bool:
        """Whether a new file besides the last takes the place of an old one."""
        return any(name in self.old for name in list(self.new)[:-1])

    def make(self) -> None:
        """Make the folder; raises FileExistsError where another run has."""
        os.mkdir(self.path)

    def write_journal(self) -> None:
        """Write the journal, and wait until it is on the disk."""
        written = self.path / f"{_JOURNAL}.new"
        with open(written, "wb") as file:
            file.write(json.dumps({"new": self.new, "old": self.old}).encode())
            file.flush()
            os.fsync(file.fileno())
        os.rename(written, self.path / _JOURNAL)
        flush_folder(self.path)
        flush_folder(self.path.parent)

    def set_aside(self, name: str, *, keep: bool = False) -> None:
        """Take an old file from its place; `keep`: it may stay there as well, until replaced."""
        place = self.path.parent / name
        if keep and not os.path.islink(place) and not _is_folder(place):
            with contextlib.suppress(OSError):  # a file system without hard links
                os.link(place, self.path / name)
                return
        os.rename(place, self.path / name)

    def finish(self) -> None:
        """Remove the old files, as all new ones are in their places."""
        for name, known in self.old.items():
            remove(self.path / name)
            if name not in self.new and _is(self.path.parent / name, known):
                (self.path.parent / name).unlink(missing_ok=True)
        discard(self.path)

    def undo(self) -> None:
        """Put the old files back and remove the new ones; can be gone on with after a kill."""
        if self.overlap:  # or it would name shards of both
            self._remove_new(list(self.new)[-1])
        for name in reversed(self.old):
            if _status(self.path / name) is not None:
                self._restore(name)
        for name in self.new:
            if name not in self.old:
                self._remove_new(name)
        discard(self.path)

    def recover(self) -> None:
        """Finish or undo what a killed run has left."""
        if all(_is(self.path.parent / name, known) for name, known in self.new.items()):
            self.finish()
        else:
            self.undo()

    def _remove_new(self, name: str) -> None:
        place = self.path.parent / name
        if not _is(place, self.new[name]):
            return
        if _is_folder(place):  # half of it must not look like all of it
            os.rename(place, self.path / _UNDONE)
            remove(self.path / _UNDONE)
        else:
            place.unlink(missing_ok=True)

    def _restore(self, name: str) -> None:
        aside, place = self.path / name, self.path.parent / name
        if there := _status(place):
            if os.path.samestat(os.lstat(aside), there):
                os.unlink(aside)
                return
            if name not in self.new or not _is(place, self.new[name]):
                raise FileExistsError(errno.EEXIST, "another file took its place", str(place))
            if _is_folder(place):  # which nothing can be renamed onto
                self._remove_new(name)
        try:
            os.replace(aside, place)
        except OSError:  # where renaming is what fails
            place.unlink(missing_ok=True)
            os.link(aside, place)
            os.unlink(aside)


def discard(path: Path) -> None:
    """Remove a folder in which nothing is set aside (any more)."""
    flush_folder(path.parent)
    (path / f"{_JOURNAL}.new").unlink(missing_ok=True)
    (path / _JOURNAL).unlink(missing_ok=True)
    remove(path / _UNDONE)
    os.rmdir(path)


def remove(path: Path) -> None:
    """Remove the file or the whole folder at `path`, if it is there."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where it can be flushed."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
