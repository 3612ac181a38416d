"""What is written: files and objects that appear whole or not at all, and what they replace."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from posthoc_cli.errors import UsageError


class Output(Protocol):
    """A file or object of `size` bytes that appears at `path` whole, or not at all.

    `atomic.AtomicFile` is the local one and says what each method does, `uploads.ObjectFile` that
    of a bucket; `writing.commit_together` puts several in their places. Any thread may call
    `write_at`.
    """

    path: Path
    size: int
    at_once: bool

    @property
    def in_order(self) -> bool:
        """Whether each byte is to be written once, and nearly in order."""

    @property
    def by_ranks(self) -> bool:
        """Whether other ranks may write parts of it, within `joined`."""

    def joined(self) -> contextlib.AbstractContextManager[None]: ...

    def __enter__(self) -> Output: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def check_absent(self) -> None: ...

    def taken(self) -> bool: ...

    def open(self) -> None: ...

    def write_at(self, offset: int, data: bytes | memoryview) -> None: ...

    def copy_from(self, fd: int, offset: int, start: int, count: int) -> int: ...

    def flush(self) -> None: ...

    def finish(self) -> None: ...

    def commit(self) -> None: ...

    def place(self, *, overwrite: bool) -> None: ...

    def identity(self) -> tuple[int, int, int]: ...

    def discard(self) -> None: ...

    def rollback(self) -> None: ...


@dataclass(frozen=True)
class Group:
    """Files of one folder that are one output; readers see it by the last, such as an index.

    `old` gives the files that they replace, those first by which readers see the old output; or
    raises what speaks against it. By default they are what is in the files' places.
    """

    files: Sequence[Output]
    old: Callable[[], Sequence[Path]] | None = None
    output: Path | None = None
    """The output's own name, if that isn't its last file's."""

    @property
    def path(self) -> Path:
        return self.output or self.files[-1].path

    def replaced(self) -> list[Path]:
        """The files that go; raises UsageError when one must not."""
        found = list(self.old()) if self.old else []
        folders = [file.path for file in self.files if not file.at_once]
        for path in found:
            if path not in folders:
                refuse_folder(path)
        for file in self.files:
            if file.path not in found:
                file.check_absent()
                if file.taken():
                    found.append(file.path)
        return found


def refuse_folder(path: Path) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        raise UsageError(str(path), "is a folder", "move it or choose another output")
