"""Where files lie: the local disk, or a store that a URL names. One interface for both.

All other rooms ask here what is at a path, read it and write to it. `Store` is what a kind of place
has to do; `disk.Disk` is the local one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from posthoc_cli.errors import MachineError, UsageError
from posthoc_cli.storage.disk import Disk, reason
from posthoc_cli.storage.places import File, Url


class Input(Protocol):
    """A file or object open for reading in a `with` block, from several threads at once.

    Raises SnapshotError when it isn't as it was found, MachineError when it can't be read.
    """

    remote: bool
    """Whether each read may be a request, which `readers.reading_ahead` is for."""

    def __enter__(self) -> Input: ...

    def __exit__(self, *_: object) -> None: ...

    def fileno(self) -> int:
        """Its descriptor, where the system has one for it; else -1."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on."""

    def check_unchanged(self) -> None:
        """Raise SnapshotError if it is not as it was."""


class Store(Protocol):
    """A kind of place. Where something can't be told, its methods raise MachineError or OSError."""

    def list(self, folder: Path) -> list[str]:
        """The names in a folder, in any order; raises FileNotFoundError, NotADirectoryError."""

    def is_folder(self, path: Path) -> bool: ...

    def is_file(self, path: Path) -> bool: ...

    def exists(self, path: Path) -> bool:
        """Whether anything is there, be it a link that leads nowhere."""

    def status(self, path: Path) -> File | None:
        """The size, time and version of what is there; None where none can be seen."""

    def identity(self, path: Path) -> Hashable | None:
        """The same for all names of one file; None where there is none."""

    def open(
        self, path: Path, remedy: str
    ) -> contextlib.AbstractContextManager[tuple[BinaryIO, File]]: ...

    def input(self, file: File, keep_open: bool) -> Input: ...


_DISK = Disk()


def store_of(path: Path) -> Store:
    """The store that a path or Url is of. Raises UsageError where what it needs isn't installed."""
    if not isinstance(path, Url):
        return _DISK
    from posthoc_cli.storage.remote.objects import remote_store

    return remote_store(path)


def list_folder(
    folder: Path, remedy: str = "give the folder it lies in, and only= its name"
) -> list[str]:
    """The names in `folder`, sorted; `remedy` says what to do where it is a file.

    Raises UsageError where there is no such folder, MachineError where it can't be listed.
    """
    try:
        return sorted(store_of(folder).list(folder))
    except FileNotFoundError:
        pattern = set("*?[") & set(folder.name)
        there = "give the folder, and only= the pattern" if pattern else "check the path"
        raise UsageError(str(folder), "there is no such folder", there) from None
    except NotADirectoryError:
        raise UsageError(str(folder), "is not a folder", remedy) from None
    except OSError as error:
        raise MachineError(
            str(folder), f"cannot be listed ({reason(error)})", "check the folder's permissions"
        ) from None


def is_folder(path: Path) -> bool:
    return store_of(path).is_folder(path)


def is_file(path: Path) -> bool:
    return store_of(path).is_file(path)


def exists(path: Path) -> bool:
    """Whether anything is at `path`, be it a link that leads nowhere."""
    return store_of(path).exists(path)


def file_status(path: Path) -> File | None:
    """The size, time and version of the file or folder at `path`; None where none can be seen."""
    return store_of(path).status(path)


def size_of(path: Path) -> int:
    """The bytes of the file at `path`, 0 where there is none."""
    status = file_status(path)
    return status.size if status else 0


def same_file(one: Path, other: Path) -> bool:
    """Whether both are names of one file or folder that is there."""
    known = identity(one)
    return known is not None and known == identity(other)


def identity(path: Path) -> Hashable | None:
    """What all names of the file or folder at `path` have in common; None where there is none."""
    return store_of(path).identity(path)


def will_open(paths: Sequence[Path]) -> None:
    """Say that files and folders are going to be opened, in this order: a store begins with it."""
    if paths and isinstance(paths[0], Url):
        from posthoc_cli.storage.remote.objects import remote_store

        remote_store(paths[0]).will_open(paths)


def forget() -> None:
    """Look anew for what lies in the stores: what was listed is as old as the last call."""
    import sys

    if remote := sys.modules.get("posthoc_cli.storage.remote.objects"):
        remote.forget()


def abandon() -> None:
    """Wait for no store any longer, as an interrupt asks for it."""
    import sys

    if fetching := sys.modules.get("posthoc_cli.storage.remote.fetching"):
        fetching.abandon()


def own_name(folder: Path) -> str:
    """The name of a folder that may have been given as `.` or by a link."""
    return folder.resolve().name


def open_file(
    path: Path, remedy: str = "leave it out with only="
) -> contextlib.AbstractContextManager[tuple[BinaryIO, File]]:
    """The file `path`, open for reading in a `with` block, and its size, time and version.

    Raises SnapshotError for what is no regular file or a link that leads nowhere, MachineError for
    what can't be read.
    """
    return store_of(path).open(path, remedy)


def open_input(file: File, *, keep_open: bool = True) -> Input:
    """A file for reading its data, from several threads at once.

    It must still be as it was found. With `keep_open` false each read opens it anew.
    """
    return store_of(file.path).input(file, keep_open)
