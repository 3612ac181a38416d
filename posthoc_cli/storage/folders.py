"""Outputs that are folders: they appear whole or not at all, and replace only their like."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.errors import UsageError
from posthoc_cli.storage.aside import flush_folder, identity_at, remove
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.disk import already_exists, write_errors
from posthoc_cli.storage.header import File
from posthoc_cli.storage.manifest import is_taken, read_manifest
from posthoc_cli.storage.metadata import MANIFEST
from posthoc_cli.storage.outputs import Output
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.shards import is_output, shards_of
from posthoc_cli.storage.stores import is_folder, list_folder, open_input
from posthoc_cli.storage.temporary import locks_exist, make_temporary

_AT_ONCE = 1 << 26
"""Bytes that the system is asked to copy in one call, which no interrupt ends."""

_NOBODYS = {".ds_store", "thumbs.db", "desktop.ini", "__pycache__"}
"""What systems and Python put into folders by themselves."""


def own_manifest(path: Path, *, linked: bool = False) -> dict[str, Any]:
    """The manifest of the folder at `path`; raises UsageError where posthoc didn't make it, or
    where it is a link, unless it may be `linked`."""
    manifest = read_manifest(path) if linked or not os.path.islink(path) else None
    if manifest is not None and is_output(path):
        return manifest
    what, remedy = "a file", "choose another output"
    if os.path.islink(path):
        what = "a link"
    elif is_folder(path):
        what, remedy = "a folder", f"name a new one, such as '{path / 'ema'}'"
    raise UsageError(str(path), f"{what} that posthoc didn't make is in its place", remedy)


def replaced_folder(path: Path, overwrite: bool) -> list[Path]:
    """What goes when an output folder is written to `path`: the one that is there, if one is.

    That is one that posthoc made, with nothing else in it; of a bucket, its objects. Raises
    UsageError for any other, and when `overwrite` is false.
    """
    if not is_taken(path):
        return []
    manifest = own_manifest(path)
    if not overwrite:
        raise already_exists(path)
    inside = _inside(path)
    own = {MANIFEST, manifest["weights"], *(each["file"] for each in manifest["copied"])}
    own |= {each.relative_to(path).as_posix() for each in shards_of(path / manifest["weights"])}
    if lost := [name for name in inside if name not in own]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UsageError(
            str(path),
            f"'{lost[0]}'{more}, which posthoc didn't put there, would be lost with it",
            "move that elsewhere, or choose another output",
        )
    return [path / name for name in inside] if isinstance(path, Url) else [path]


def _inside(folder: Path) -> list[str]:
    """The paths of all files in `folder`; not what systems put there by themselves."""
    if isinstance(folder, Url):
        return _objects_below(folder)
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name.lower() not in _NOBODYS)
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        below = Path(place).relative_to(folder)
        found += [
            (below / name).as_posix()
            for name in sorted([*names, *links])
            if name.lower() not in _NOBODYS
        ]
    return found


def _objects_below(folder: Path) -> list[str]:
    found = []
    for name in list_folder(folder):
        if is_folder(folder / name):
            found += [f"{name}/{each}" for each in _objects_below(folder / name)]
        else:
            found.append(name)
    return found


class AtomicFolder(AtomicFile):
    """A folder that appears at `path` whole, or not at all, as a file does by AtomicFile.

    `files`, below `path`, are written by the caller; `copied` are copies of others by their paths
    below it, but for those that `texts` has: the last of these is what says that posthoc made it.
    All are written into a temporary folder beside `path`, and flushed, before that gets its name.
    """

    at_once = False

    def __init__(
        self,
        path: Path,
        files: Sequence[Output],
        copied: Mapping[str, File],
        texts: Mapping[str, bytes],
    ) -> None:
        self._texts = [(AtomicFile(path / name, len(text)), text) for name, text in texts.items()]
        self._files: list[Output] = [*files, *(file for file, _ in self._texts)]
        self._names = [file.path.relative_to(path) for file in self._files]
        self._copied = {name: file for name, file in copied.items() if name not in texts}
        self._hidden = path
        size = sum(file.size for file in self._files)
        size += sum(file.size for file in self._copied.values())
        super().__init__(path, size)

    @property
    def members(self) -> list[Output]:
        """What is put in its place: the folder as a whole."""
        return [self]

    def check_absent(self) -> None:
        if self.taken():
            raise already_exists(self.path)

    def taken(self) -> bool:
        return is_taken(self.path)

    def open(self) -> None:
        """Make the temporary folder with its files, and reserve their space."""
        with write_errors(self.path):
            try:
                self._fd, self._temporary = make_temporary(self.path, folder=True)
                for file, name in zip(self._files, self._names, strict=True):
                    file.path = self._temporary / name
                    file.path.parent.mkdir(parents=True, exist_ok=True)
                    file.open()
            except BaseException:
                self.discard()
                raise

    def copy(self, progress: Callable[[int], None]) -> None:
        """Copy what is to be copied; `progress` is told the bytes of each piece.

        Raises SnapshotError for a file that isn't as it was found, MachineError when that fails.
        """
        assert self._temporary is not None
        for name, source in self._copied.items():
            place = self._temporary / name
            with write_errors(self.path / name):
                place.parent.mkdir(parents=True, exist_ok=True)
            target = AtomicFile(place, source.size)
            try:
                target.open()
                copy_file(source, target, progress)
                target.finish()
                target.place(overwrite=True)
            finally:
                target.discard()

    def finish(self) -> None:
        """Wait until all of it is on the disk, under its name in the temporary folder."""
        assert self._temporary is not None
        for file, text in self._texts:
            file.write_at(0, text)
        for each in self._files:
            each.finish()
            each.place(overwrite=True)  # by one call: nothing else is there
            each.discard()
        for place, _, _ in os.walk(self._temporary, topdown=False):
            flush_folder(Path(place))

    def place(self, *, overwrite: bool) -> None:
        """Give the finished folder its name; what was there has been set aside."""
        assert self._temporary is not None
        with write_errors(self.path):
            if not locks_exist():
                self._close()
            with contextlib.suppress(OSError):
                os.rmdir(self.path)  # an empty one
            self._own = os.lstat(self._temporary)
            self._hidden = self._temporary
            try:
                os.rename(self._temporary, self.path)
            except OSError:
                if os.path.lexists(self.path):
                    raise already_exists(self.path) from None
                raise
            self._temporary = None

    def identity(self) -> tuple[int, int, int]:
        assert self._temporary is not None
        with write_errors(self.path):
            return identity_at(self._temporary)

    def discard(self) -> None:
        """Remove the temporary folder, unless it has been renamed."""
        for file, name in zip(self._files, self._names, strict=True):
            file.discard()
            file.path = self.path / name
        self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                remove(self._temporary)
            self._temporary = None

    def rollback(self) -> None:
        """Undo `place`, where there was nothing before."""
        if self._own is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(self.path), self._own):
                    os.rename(self.path, self._hidden)  # half of it must not look like all of it
                    remove(self._hidden)


def copy_file(source: File, target: Output, progress: Callable[[int], None]) -> None:
    """Copy a whole file, by the system where it can: it may share the blocks, or a server's."""
    buffer = memoryview(bytearray(min(source.size, 1 << 20)))
    with open_input(source) as file:
        at = 0
        while at < source.size:
            count = target.copy_from(file.fileno(), at, at, min(source.size - at, _AT_ONCE))
            if not count:
                piece = buffer[: source.size - at]
                file.read(at, piece)
                target.write_at(at, piece)
                count = len(piece)
            progress(count)
            at += count
        file.check_unchanged()
