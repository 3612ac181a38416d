"""Folders that several processes fill together, and that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from posthoc_cli.storage.aside import flush_folder, remove
from posthoc_cli.storage.disk import already_exists, write_errors
from posthoc_cli.storage.temporary import clean_up, locks_exist, make_temporary, temporary_name

_UNSEEN = 5.0
"""Seconds until what another machine has made is seen on a file system that they share."""


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
    """Remove a file, or a folder of which no half is ever seen under its name; if it is there."""
    with write_errors(path):
        if os.path.isdir(path) and not os.path.islink(path):
            hidden = temporary_name(path)
            os.rename(path, hidden)
            remove(hidden)
        else:
            path.unlink(missing_ok=True)


def is_seen(path: Path) -> bool:
    """Whether what another process has made is seen by this one, soon."""
    until = time.monotonic() + _UNSEEN
    while not os.path.lexists(path):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
