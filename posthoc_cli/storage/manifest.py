"""The manifest of an output that is a folder: what says that posthoc made it, and of what."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from posthoc_cli.errors import SnapshotError
from posthoc_cli.storage.metadata import MANIFEST
from posthoc_cli.storage.stores import exists, is_file, is_folder, list_folder, open_file

_LONGEST = 8 << 20
"""Bytes of the longest manifest that is read."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What posthoc says of a folder it made; None for a folder of others.

    `weights` is the file or index with the average, `from` the folder that the rest came from;
    `copied` are those files, each with `file`, `bytes` and `from`, `left_out` others, each with a
    `reason`, and `missing` what was not there. Raises MachineError when it can't be read.
    """
    try:
        if not is_file(folder / MANIFEST):
            return None
        with open_file(folder / MANIFEST) as (file, _):
            document = json.loads(file.read(_LONGEST))
        names = [document["weights"], *(each["file"] for each in document["copied"])]
        texts = [document["posthoc"], document["from"], *document["missing"]]
        texts += [each["from"] for each in document["copied"]]
        texts += [each[key] for each in document["left_out"] for key in ("file", "reason")]
        sizes = [each["bytes"] for each in document["copied"]]
    except (SnapshotError, ValueError, RecursionError, LookupError, TypeError):
        return None
    sensible = all(map(_is_inside, names)) and all(isinstance(text, str) for text in texts)
    return document if sensible and all(isinstance(size, int) for size in sizes) else None


def _is_inside(name: object) -> bool:
    """Whether it is a path that leads to something below a folder, and nowhere else."""
    return isinstance(name, str) and all(
        part not in ("", ".", "..") and part == os.path.basename(part) and "\0" not in part
        for part in name.split("/")
    )


def is_taken(path: Path) -> bool:
    """Whether there is something at the output `path`, other than an empty folder."""
    if is_folder(path) and not os.path.islink(path):
        return bool(list_folder(path))
    return exists(path)
