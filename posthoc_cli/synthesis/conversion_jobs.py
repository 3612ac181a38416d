"""The checkpoints to convert: which files they are, what becomes of each, and which are done."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.errors import PosthocError, SnapshotError, UsageError
from posthoc_cli.formats import DEFAULT_UPDATE_EVERY, KINDS
from posthoc_cli.snapshots import (
    Identity,
    Pattern,
    check_profiles,
    choose_by_globs,
    doubted_profiles,
    identify,
)
from posthoc_cli.storage import ENDING, TensorIndex, read_header
from posthoc_cli.storage.disk import file_status, list_folder
from posthoc_cli.storage.metadata import CONVERTED, STEP
from posthoc_cli.storage.temporary import clean_up

ENDINGS = (".pt", ".pth", ".pkl", ".ckpt", ".bin")
"""Of the files in a folder that count, in capitals too."""

MAX_UPDATE_EVERY = 1_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """How to read checkpoints and what to make of them.

    `kind` is one of KINDS or "auto"; `dtype` "same" or one of OUTPUT_DTYPES; `update_every` the
    number of steps from one update of the averages to the next, as trained, where that is known;
    `profiles` the sigma_rel values by index; `key` as state_dict has it.
    """

    kind: str = "auto"
    dtype: str = "same"
    update_every: int | None = None
    profiles: tuple[float, ...] = ()
    pattern: Pattern | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """A snapshot that was made of a checkpoint, or, with `seconds` None, had been before.

    `identity` is what was written: None where nothing says step and profile. `trained` is what the
    tool that wrote the checkpoint was asked for, where that is another profile.
    """

    source: Path
    output: Path
    kind: str
    step: int | None
    identity: Identity | None
    trained: Identity | None
    dtypes: Mapping[str, int]
    parameters: int
    bytes: int
    seconds: float | None
    warnings: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        return sum(self.dtypes.values())


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint of `bytes` bytes and the snapshot to make of it; `done` if it was made.

    `doubt` is why its name can't be believed, where those of all the others say so.
    """

    source: Path
    output: Path
    bytes: int
    done: Converted | None = None
    doubt: SnapshotError | None = None


def find_jobs(
    source: Path,
    folder: Path,
    options: Options,
    *,
    only: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Job]:
    """The checkpoints in the folder `source`, or the file `source`, and what becomes of each.

    They go by name. Raises UsageError when an option doesn't fit, when two checkpoints would become
    the same snapshot, or when an output exists that is not what its checkpoint would become and
    `overwrite` is false; SnapshotError when there is no checkpoint; MachineError when the folder
    can't be listed.
    """
    _check(options)
    paths = _list(source, only)
    if options.pattern and not any(options.pattern.greedy.fullmatch(path.name) for path in paths):
        raise UsageError(
            "pattern=",
            f"'{options.pattern.text}' fits none of {len(paths)} files, such as '{paths[0].name}'",
            "write it for the whole name of the checkpoint, its ending included",
        )
    outputs = _outputs(paths, folder)
    clean_up(folder)
    inputs = {(status.st_dev, status.st_ino) for status in filter(None, map(file_status, paths))}
    doubts = doubted_profiles([path.name for path in paths])
    jobs = []
    for path, output in zip(paths, outputs, strict=True):
        there = file_status(output)
        if there is not None and (there.st_dev, there.st_ino) in inputs and there.st_ino:
            raise UsageError(str(output), "is one of the checkpoints", "choose another folder")
        status = file_status(path)
        done = _done(path, output, status, options) if there and status else None
        if done is None and not overwrite and os.path.lexists(output):
            raise UsageError(
                str(output),
                f"exists already, and is not what this makes of '{path.name}'",
                "use force=True to replace it, or choose another folder",
            )
        doubt = doubts.get(path.name)
        jobs.append(Job(path, output, status.st_size if status else 0, done, doubt))
    return jobs


def _check(options: Options) -> None:
    """Raise UsageError for options that are out of bounds or don't go together."""
    check_profiles(options.profiles or None, options.pattern)
    if options.update_every is not None:
        if not 1 <= options.update_every <= MAX_UPDATE_EVERY:
            raise UsageError(
                "update_every=",
                f"{options.update_every} is out of bounds",
                "give the steps from one update of the averages to the next, from 1 on",
            )
        if options.kind not in ("auto", *DEFAULT_UPDATE_EVERY):
            raise UsageError(
                "update_every=", f"doesn't go with tool='{options.kind}'", "leave it out"
            )
    if options.key is not None and options.kind not in ("auto", "torch"):
        raise UsageError("key=", f"doesn't go with tool='{options.kind}'", "leave it out")


def _list(source: Path, only: Sequence[str]) -> list[Path]:
    if source.is_file():
        folder, names = source.parent, [source.name]
    else:
        folder, names = source, _names(source)
    names = choose_by_globs(names, only, f"{len(names)} files")
    return [folder / name for name in names]


def _names(folder: Path) -> list[str]:
    listed = list_folder(folder, "give the folder of checkpoints")
    found = [name for name in listed if not os.path.isdir(folder / name)]
    names = [name for name in found if name.lower().endswith(ENDINGS) and name[0] != "."]
    if not names:
        snapshots = sum(name.lower().endswith(ENDING) for name in found)
        raise SnapshotError(
            str(folder),
            f"holds no {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} files",
            f"its {snapshots} {ENDING} files can be used as they are"
            if snapshots
            else "give the folder that they lie in: folders below it are not searched",
        )
    return names


def _outputs(paths: Sequence[Path], folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise UsageError(str(folder), "is not a folder", "give the folder to write to")
    outputs = [folder / f"{path.stem}{ENDING}" for path in paths]
    taken: dict[str, Path] = {}
    for path, output in zip(paths, outputs, strict=True):
        place = os.path.normcase(output)
        if place in taken:
            raise UsageError(
                str(path),
                f"would become '{output.name}', as '{taken[place].name}' would",
                "leave one of the two out with only=",
            )
        taken[place] = path
        if output.is_dir():
            raise UsageError(str(output), "is a folder", "choose another folder to write to")
    return outputs


def _done(source: Path, output: Path, status: os.stat_result, options: Options) -> Converted | None:
    """What is at `output`, if it is what `source` would become."""
    try:
        layout = read_header(output)
        entry = json.loads(layout.metadata[CONVERTED])
        kind, made_with = entry["from"], dict(entry["options"])
        same = (
            [entry["file"], entry["bytes"], entry["modified"]]
            == [source.name, status.st_size, status.st_mtime_ns]
            and options.kind in (made_with.pop("from"), kind)
            and made_with == options_used(kind, options)
            and kind in KINDS
        )
        return _describe(source, layout, kind) if same else None
    except (PosthocError, KeyError, TypeError, ValueError, RecursionError):
        return None  # nobody's, or meddled with


def _describe(source: Path, layout: TensorIndex, kind: str) -> Converted:
    try:
        identity: Identity | None = identify("", layout.metadata)[0]
    except SnapshotError:
        identity = None
    step = identity.step if identity else max(int(layout.metadata.get(STEP, "0")), 0) or None
    dtypes = Counter(info.dtype for info in layout.tensors.values())
    elements = sum(info.elements for info in layout.tensors.values())
    return Converted(
        source,
        layout.path,
        kind,
        step,
        identity,
        None,
        dict(sorted(dtypes.items())),
        elements,
        layout.size,
        None,
    )


def options_used(kind: str, options: Options) -> dict[str, Any]:
    """The options that make a difference to a checkpoint of this kind, as JSON has them."""
    made: dict[str, Any] = {"dtype": options.dtype}
    if options.pattern is not None:
        made["pattern"] = options.pattern.text
    if options.profiles and (kind in DEFAULT_UPDATE_EVERY or options.pattern is not None):
        made["profiles"] = list(options.profiles)
    if options.update_every is not None and kind in DEFAULT_UPDATE_EVERY:
        made["update_every"] = options.update_every
    if options.key is not None and kind == "torch":
        made["key"] = options.key
    return made
