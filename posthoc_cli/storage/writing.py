"""Where outputs are written: files and folders of the local disk, or objects of a bucket."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from posthoc_cli.errors import UsageError
from posthoc_cli.storage import atomic
from posthoc_cli.storage.folders import AtomicFolder
from posthoc_cli.storage.outputs import Group, Output
from posthoc_cli.storage.places import File, Url

BUCKETS = ("s3", "gs", "az")
"""The schemes of URLs that are written to."""


class OutputFolder(Protocol):
    """Files that appear together, with what lies beside them."""

    size: int

    @property
    def members(self) -> Sequence[Output]:
        """What is put in its place, in that order."""

    def copy(self, progress: Callable[[int], None]) -> None:
        """Copy what is to be copied; `progress` is told the bytes of each piece."""


def check_writable(path: Path) -> None:
    """Raise UsageError for a URL of what can only be read."""
    if isinstance(path, Url) and path.scheme not in BUCKETS:
        remedy = "write to a folder, or to s3://, gs:// or az://"
        raise UsageError(str(path), f"{path.scheme}:// can be read, but not written", remedy)


def make_output(path: Path, size: int, *, overwrite: bool = False, in_order: bool = True) -> Output:
    """A file or object to be written; without `in_order` its bytes may come in any order."""
    check_writable(path)
    if isinstance(path, Url):
        from posthoc_cli.storage.remote.uploads import (
            ObjectFile,  # only here: asyncio is slow to import
        )

        return ObjectFile(path, size, overwrite=overwrite, in_order=in_order)
    return atomic.AtomicFile(path, size, overwrite=overwrite)


def make_output_folder(
    path: Path, files: Sequence[Output], copied: Mapping[str, File], texts: Mapping[str, bytes]
) -> OutputFolder:
    """A folder with `files`, copies of others and texts; see `folders.AtomicFolder`."""
    if isinstance(path, Url):
        from posthoc_cli.storage.remote.upload_groups import ObjectFolder

        return ObjectFolder(path, files, copied, texts)
    return AtomicFolder(path, files, copied, texts)


def commit_together(groups: Sequence[Group]) -> contextlib.AbstractContextManager[None]:
    """Open the files of all groups for a `with` block, at the end of which all appear, or none."""
    if any(isinstance(group.path, Url) for group in groups):
        from posthoc_cli.storage.remote.upload_groups import upload_together

        return upload_together(groups)
    return atomic.commit_together(groups)
