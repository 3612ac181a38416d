"""Folders that several processes fill together, and files and folders that are moved or removed.

They are of the local disk, or objects of a bucket.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from posthoc_cli.storage.aside import flush_folder, remove
from posthoc_cli.storage.disk import already_exists, make_folder, write_errors
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.remote.uploads import copy_object, remove_object
from posthoc_cli.storage.stores import exists, forget, is_folder, list_folder
from posthoc_cli.storage.temporary import clean_up, locks_exist, make_temporary, temporary_name
from posthoc_cli.storage.writing import check_writable

_UNSEEN = 5.0
"""Seconds until what another machine has made is seen on a file system that they share."""


_TO_COME = ".posthoc-moving"
"""In a folder that files are moved into, the names of all of them, until they are there."""


class SharedFolder:
    """A folder that shall appear at `path`. One process makes it, all write into `temporary`.

    Raises MachineError when it can't be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        clean_up(path.parent)
        with write_errors(path):
            self._fd, self.temporary = make_temporary(path, folder=True)

    def place(self, old: Sequence[Path] = ()) -> None:
        """Give the finished folder its name, in place of `old` files and folders.

        Raises UsageError where something else has it.
        """
        with write_errors(self.path):
            flush_folder(self.temporary)
            for each in old:
                remove_whole(each)
            if os.path.lexists(self.path):
                raise already_exists(self.path)
            if not locks_exist():
                self._close()
            os.rename(self.temporary, self.path)
        self._close()
        flush_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the folder, unless it has its name."""
        with contextlib.suppress(OSError):
            remove(self.temporary)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def remove_whole(path: Path) -> None:
    """Remove a file, or a folder, if it is there.

    Of a folder no half is ever seen under its name; in a bucket its objects go one by one.
    """
    if isinstance(path, Url):
        for each in _objects(path):
            remove_object(each)
        return
    with write_errors(path):
        if os.path.isdir(path) and not os.path.islink(path):
            hidden = temporary_name(path)
            os.rename(path, hidden)
            remove(hidden)
        else:
            path.unlink(missing_ok=True)


def make_home(folder: Path) -> None:
    """Make the folder that files are to be written to, with those it lies in; a bucket needs none.

    Raises UsageError for a URL of what can only be read.
    """
    check_writable(folder)
    if not isinstance(folder, Url):
        make_folder(folder, parents=True)


def set_aside(paths: Sequence[Path], place: Path, along: Sequence[Path] = ()) -> Path:
    """Move files and folders into a folder of their own on the same disk or bucket; returns it.

    It is `place`, or that with a number where there is one: names stay, as differences go by them,
    and nothing is replaced. The files `along` are then there too, but stay: of one file, where the
    system has links. On a disk, what a kill has left behind is moved where the rest is. Raises
    MachineError when that fails.
    """
    if isinstance(place, Url):
        forget()
    taken = [place]
    while is_folder(taken[-1]) or exists(taken[-1]):
        taken.append(place.with_name(f"{place.name}.{len(taken) + 1}"))
    target = taken[-1]
    if isinstance(target, Url):
        make_home(target)
        for path in paths:
            for each in _objects(path):
                copy_object(each, target / path.name / each.relative_to(path))
            remove_whole(path)
        return target
    names = {path.name for path in paths}
    if taken[:-1] and names <= _still_to_come(taken[-2]):
        target = taken[-2]
    with write_errors(target):
        make_home(target)
        (target / _TO_COME).write_text(json.dumps(sorted(names)), encoding="utf-8")
        for path in along:
            if not exists(target / path.name):
                _put_along(path, target / path.name)
        for path in paths:
            os.replace(path, target / path.name)
        (target / _TO_COME).unlink()
    return target


def _still_to_come(folder: Path) -> set[str]:
    """The names of what was to be moved into a folder, and isn't there."""
    try:
        listed = json.loads((folder / _TO_COME).read_text(encoding="utf-8"))
        return {str(name) for name in listed if not exists(folder / str(name))}
    except (OSError, ValueError, TypeError):
        return set()


def _put_along(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        part = target.with_name(_TO_COME + ".copy")
        shutil.copy2(path, part)
        os.replace(part, target)


def _objects(path: Path) -> list[Path]:
    """The object at `path`, or those in the folder that it is."""
    forget()
    if not is_folder(path):
        return [path]
    return [path / name for name in list_folder(path)]


def is_seen(path: Path) -> bool:
    """Whether what another process has made is seen by this one, soon."""
    if isinstance(path, Url):
        return True
    until = time.monotonic() + _UNSEEN
    while not os.path.lexists(path):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
