"""A file that grows by lines of JSON, each of which is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path

from posthoc_cli.errors import UsageError
from posthoc_cli.storage.aside import flush_folder
from posthoc_cli.storage.disk import unreadable, unsupported_is_fine, write_errors
from posthoc_cli.storage.locks import take_lock
from posthoc_cli.storage.temporary import busy


class LineFile:
    """The file `path`, open for appending by this process alone, until `close`; `lines` holds what
    is in it.

    It is made with the first line. A half line at its end, which a kill has left, is cut off.
    Raises MachineError when another process has it or it can't be read, UsageError for what is no
    file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        with write_errors(path):
            real = Path(os.path.realpath(path))  # a link to it is the same journal
            lock = take_lock(real.with_name(f".{real.name}.lock"))
        if lock is None:
            raise busy(path)
        self._lock = lock
        try:
            self.lines, self._size = read_lines(path)
        except BaseException:
            self.close()
            raise

    def append(self, line: str) -> None:
        """Add a line; it is on the disk when this returns. Raises MachineError; then it isn't.

        Raises UsageError after `close`.
        """
        if not self._lock.held:
            raise UsageError(
                str(self.path), "is closed, and may be another's by now", "open it anew"
            )
        data = line.encode() + b"\n"
        with write_errors(self.path):
            new = self._fd < 0 and not os.path.lexists(self.path)
            if self._fd < 0:
                flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
                self._fd = os.open(self.path, flags, 0o666)
            try:
                self._cut()
                os.lseek(self._fd, self._size, os.SEEK_SET)
                view = memoryview(data)
                while view:
                    view = view[os.write(self._fd, view) :]
                with unsupported_is_fine():
                    os.fsync(self._fd)
            except OSError:
                with contextlib.suppress(OSError):
                    self._cut()
                raise
        self._size += len(data)
        self.lines.append(line)
        if new:
            flush_folder(self.path.parent)

    def restart(self) -> None:
        """Forget all lines: the next one is the first."""
        self.lines, self._size = [], 0

    def _cut(self) -> None:
        """Remove what lies after the last whole line; give it its end, if only that is missing."""
        os.ftruncate(self._fd, self._size)
        if self._size:
            os.lseek(self._fd, self._size - 1, os.SEEK_SET)
            os.write(self._fd, b"\n")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release()


def read_lines(path: Path) -> tuple[list[str], int]:
    """The whole lines of a file, none where there is no file, and their bytes.

    What comes after the last end of a line counts if it is whole JSON. Raises UsageError for what
    is no file, MachineError where it can't be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(str(path), "is no file", "give another name")
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise unreadable(path, error, "check the file and its permissions") from error
    whole, end, rest = data.rpartition(b"\n")
    lines, size = whole.decode(errors="replace").split("\n") if end else [], len(whole + end)
    try:
        json.loads(rest)
    except ValueError:
        return lines, size
    return [*lines, rest.decode(errors="replace")], len(data) + 1
