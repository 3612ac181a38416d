"""Files and folders of the local disk, with the system's errors as one line each."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from posthoc_cli.errors import MachineError, SnapshotError, UsageError, printable
from posthoc_cli.storage.sniffing import where_link_leads


def list_folder(
    folder: Path, remedy: str = "give the folder it lies in, and only= its name"
) -> list[str]:
    """The names in `folder`, sorted; `remedy` says what to do where it is a file.

    Raises UsageError where there is no such folder, MachineError where it can't be listed.
    """
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        raise UsageError(str(folder), "there is no such folder", "check the path") from None
    except NotADirectoryError:
        raise UsageError(str(folder), "is not a folder", remedy) from None
    except OSError as error:
        raise MachineError(
            str(folder), f"cannot be listed ({reason(error)})", "check the folder's permissions"
        ) from None


def make_folder(folder: Path, *, parents: bool = False) -> None:
    """Make `folder` unless it is there; with `parents`, also those it lies in."""
    with write_errors(folder):
        folder.mkdir(parents=parents, exist_ok=True)


def remove_file(path: Path) -> None:
    """Remove `path` if it is there."""
    with write_errors(path):
        path.unlink(missing_ok=True)


def set_aside(paths: Sequence[Path], place: Path, *, replace: bool = False) -> None:
    """Move files into the folder `place`, which is made, on the same disk.

    A file of that name there is replaced with `replace`; otherwise the moved one gets a number.
    Raises MachineError when that fails.
    """
    make_folder(place, parents=True)
    for path in paths:
        target = place / path.name
        numbers = itertools.count(2)
        while not replace and os.path.lexists(target):
            target = place / f"{path.stem}.{next(numbers)}{path.suffix}"
        with write_errors(path):
            os.replace(path, target)


def file_status(path: Path) -> os.stat_result | None:
    """The size, times and number of the file at `path`; None where none can be seen."""
    try:
        return os.stat(path)
    except OSError:
        return None


@contextlib.contextmanager
def open_file(
    path: Path, remedy: str = "leave it out with only="
) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """The file `path`, open for reading in a `with` block, and its status.

    Raises SnapshotError for what is no regular file or a link that leads nowhere, MachineError for
    what can't be read.
    """
    try:
        # A FIFO would block on open, and a device has no length.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SnapshotError(str(path), "not a regular file", remedy)
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno())
    except OSError as error:
        if os.path.islink(path) and not os.path.exists(path):
            raise SnapshotError(str(path), *where_link_leads(path)) from None
        raise unreadable(path, error, "check the file and its permissions") from error


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
