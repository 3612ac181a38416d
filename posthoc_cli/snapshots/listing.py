"""Which files and folders in a folder may be snapshots."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError
from posthoc_cli.snapshots.names import Pattern
from posthoc_cli.storage import ENDING, shard_names
from posthoc_cli.storage.disk import list_folder
from posthoc_cli.storage.shards import find_network, is_index

_OTHER_FORMATS = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".npz")


def list_candidates(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The names of what may be a snapshot in `folder`, and those left out, each with its reason.

    They are safetensors files, indexes of shards, and folders that hold one network. Raises what
    list_folder does, and SnapshotError where there is nothing of the kind.
    """
    found = [name for name in list_folder(folder) if not name.startswith(".")]
    names, left_out, shards = [], [], set()
    for name in found:
        path = folder / name
        if os.path.isdir(path):
            problem = _no_network(path)
            if problem is None:
                names.append(name)
            elif problem or name.lower().endswith(ENDING):
                left_out.append((name, problem or "a folder, not a file"))
        elif is_index(name):
            names.append(name)
            with contextlib.suppress(PosthocError):  # raised again when it is opened
                shards |= shard_names(path)
        elif name.lower().endswith(ENDING):
            names.append(name)
    if not names and not left_out:
        raise _none_found(folder, found)
    return [name for name in names if name not in shards], left_out


def choose(names: list[str], only: Sequence[str], pattern: Pattern | None) -> list[str]:
    """Those of `names` that a glob of only= fits.

    Raises UsageError for a glob that fits none, and for a pattern that fits none of them.
    """
    if not names:
        return names
    names = choose_by_globs(names, only, f"{len(names)} {ENDING} files")
    if pattern and not any(pattern.greedy.fullmatch(title(name, pattern)) for name in names):
        raise UsageError(
            "pattern=",
            f"'{pattern.text}' fits none of {len(names)} {ENDING} files, such as '{names[0]}'",
            f"write it for the whole file name, {ENDING} included",
        )
    return names


def choose_by_globs(names: list[str], only: Sequence[str], described: str) -> list[str]:
    """Those of `names`, which are `described`, that one of the globs `only` fits; all without any.

    Raises UsageError for a glob that fits none.
    """
    for glob in only:
        if not fnmatch.filter(names, glob):
            raise UsageError(
                "only=",
                f"'{glob}' fits none of {described}, such as '{names[0]}'",
                "give file names, without their folder",
            )
    return [name for name in names if not only or any(fnmatch.fnmatch(name, g) for g in only)]


def title(name: str, pattern: Pattern | None) -> str:
    """The name that says a snapshot's step and profile: an index's without its own ending.

    The conventions need the ending of a file, which folders don't have; a pattern of the user's
    is for the name as it is.
    """
    if is_index(name):
        return name[: -len(".index.json")]
    if pattern is None and not name.lower().endswith(ENDING):
        return name + ENDING
    return name


def _no_network(folder: Path) -> str | None:
    """Why a folder is no snapshot: None if it is one, "" if nothing in it looks like one."""
    try:
        found, count = find_network(folder)
    except MachineError as error:
        return f"a folder that {error.problem}"
    if found is not None:
        return None
    return f"a folder with {count} {ENDING} files and not one index" if count else ""


def _none_found(folder: Path, names: Iterable[str]) -> SnapshotError:
    endings = Counter(os.path.splitext(name)[1].lower() for name in names)
    for ending in _OTHER_FORMATS:
        if count := endings[ending]:
            return SnapshotError(
                str(folder),
                f"holds no {ENDING} files, but {count} {ending} file{'s' if count > 1 else ''}",
                "make snapshots of them with posthoc convert",
            )
    return SnapshotError(
        str(folder), f"holds no {ENDING} files", "give the folder that they lie in"
    )
