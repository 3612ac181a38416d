"""The checkpoints to convert: which files they are, what becomes of each, and which are done."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli.errors import PosthocError, SnapshotError, UsageError
from posthoc_cli.formats import DEFAULT_UPDATE_EVERY, KINDS, How
from posthoc_cli.snapshots import (
    Identity,
    Pattern,
    check_profiles,
    doubted_profiles,
    identify,
    read_name,
)
from posthoc_cli.snapshots.trained import Reading
from posthoc_cli.storage import ENDING, TensorIndex, read_header
from posthoc_cli.storage.metadata import CONVERTED, STEP
from posthoc_cli.storage.stores import exists, file_status, identity, is_folder, will_open
from posthoc_cli.storage.temporary import clean_up
from posthoc_cli.synthesis.conversion_files import Found, find_checkpoints


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

    @property
    def reading(self) -> Reading:
        how = How(self.key, self.kind)
        return Reading(self.pattern, self.profiles, how, self.update_every)


@dataclass(frozen=True, slots=True)
class Converted:
    """A snapshot that was made of a checkpoint, or, with `seconds` None, had been before.

    `name` is that below the folder, and `indexed` whether it has an index that profiles= are for.
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
    name: str = ""
    indexed: bool = False

    @property
    def tensors(self) -> int:
        return sum(self.dtypes.values())


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint of `bytes` bytes and the snapshot to make of it; `done` if it was made.

    `source` is its file, or the first of its shards; `doubt` is why its name can't be believed,
    where those of all the others say so.
    """

    found: Found
    output: Path
    bytes: int
    modified: int
    done: Converted | None = None
    doubt: SnapshotError | None = None

    @property
    def source(self) -> Path:
        return self.found.paths[0]

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def numbered(self) -> bool:
        return has_number(self.name)


def has_number(name: str) -> bool:
    """Whether a checkpoint's name may say its step: `last.ckpt` and `model_best.pth.tar` do not."""
    return re.search("[0-9]", name) is not None


def _title(found: Found) -> str:
    """The name that says what a checkpoint is, and that pattern= is for where it is a file's."""
    return found.name if found.name.startswith(f"{found.stem}.") else f"{found.stem}{ENDING}"


def find_jobs(
    source: Path,
    folder: Path,
    options: Options,
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    left_out: list[tuple[str, str]] | None = None,
) -> list[Job]:
    """The checkpoints in the folder `source`, or the file `source`, and what becomes of each.

    They go by name; what else the folder holds is added to `left_out`, with the reason.

    Raises UsageError when an option doesn't fit, when two checkpoints would become the same
    snapshot, or when an output exists that is not what its checkpoint would become and `overwrite`
    is false; SnapshotError when there is no checkpoint; MachineError when the folder can't be
    listed.
    """
    check_profiles(options.profiles or None, options.pattern)
    options.reading.check()
    rest = left_out if left_out is not None else []
    found = find_checkpoints(source, only, exclude, options.pattern, folder, rest)
    if options.pattern and not any(options.pattern.greedy.fullmatch(one.name) for one in found):
        raise UsageError(
            "pattern=",
            f"'{options.pattern.text}' fits none of {len(found)} files, such as '{found[0].name}'",
            "write it for the whole name of the checkpoint, its ending included",
        )
    outputs = _outputs(found, folder)
    will_open([path for one in found for path in one.paths])
    clean_up(folder)
    statuses = [[file_status(path) for path in one.paths] for one in found]
    inputs = {identity(path) for one in found for path in one.paths}
    doubts = doubted_profiles([_title(one) for one in found])
    jobs = []
    for one, output, several in zip(found, outputs, statuses, strict=True):
        there = file_status(output)
        if there is not None and identity(output) in inputs:
            raise UsageError(str(output), "is one of the checkpoints", "choose another folder")
        size = sum(status.size for status in several if status)
        modified = max((status.modified for status in several if status), default=0)
        job = Job(one, output, size, modified)
        done, differs = _done(job, options) if there and all(several) else (None, "")
        if done is None and not overwrite and exists(output):
            raise UsageError(
                str(output),
                f"exists already, and is not what this makes of '{one.name}'{differs}",
                "use force=True to replace it, or choose another folder",
            )
        jobs.append(replace(job, done=done, doubt=doubts.get(_title(one))))
    return jobs


def _outputs(found: Sequence[Found], folder: Path) -> list[Path]:
    if exists(folder) and not is_folder(folder):
        raise UsageError(str(folder), "is not a folder", "give the folder to write to")
    outputs = [folder / f"{one.stem}{ENDING}" for one in found]
    taken: dict[str, Found] = {}
    for one, output in zip(found, outputs, strict=True):
        place = os.path.normcase(output)
        if place in taken:
            raise UsageError(
                str(one.paths[0]),
                f"would become '{output.name}', as '{taken[place].name}' would",
                "leave one of the two out with only=",
            )
        taken[place] = one
        if is_folder(output):
            raise UsageError(str(output), "is a folder", "choose another folder to write to")
    return outputs


def _done(job: Job, options: Options) -> tuple[Converted | None, str]:
    """What is at the output, if it is what the checkpoint would become; else how it differs."""
    try:
        layout = read_header(job.output)
        entry = json.loads(layout.metadata[CONVERTED])
        kind, made_with = entry["from"], dict(entry["options"])
        asked = options_used(kind, job.found, options)
        if [entry["file"], entry["bytes"]] != [job.name, job.bytes] or kind not in KINDS:
            return None, ""
        if entry["modified"] != job.modified:
            return None, ", which has changed since"
        tool = made_with.pop("from")
        if tool != options.kind and options.kind not in ("auto", kind):
            asked, made_with = asked | {"tool": options.kind}, made_with | {"tool": kind}
        elif tool != options.kind and options.kind == "auto":
            asked, made_with = asked | {"tool": "auto"}, made_with | {"tool": tool}
        if made_with == asked:
            return _describe(job, layout, kind, options), ""
        keys = sorted(key for key in asked | made_with if asked.get(key) != made_with.get(key))
        told = [_option(key, made_with.get(key)) for key in keys]
        return None, f" (it was made {' and '.join(told)})"
    except (PosthocError, KeyError, TypeError, ValueError, RecursionError):
        return None, ""  # nobody's, or meddled with


def _option(key: str, value: object) -> str:
    if value is None:
        return f"without {key}="
    if isinstance(value, list):
        return f"with {key}=[{', '.join(f'{one:g}' for one in value)}]"
    return f"with {key}='{value}'" if isinstance(value, str) else f"with {key}={value}"


def _describe(job: Job, layout: TensorIndex, kind: str, options: Options) -> Converted:
    try:
        identity: Identity | None = identify("", layout.metadata)[0]
    except SnapshotError:
        identity = None
    step = identity.step if identity else max(int(layout.metadata.get(STEP, "0")), 0) or None
    dtypes = Counter(info.dtype for info in layout.tensors.values())
    elements = sum(info.elements for info in layout.tensors.values())
    return Converted(
        job.source,
        layout.path,
        kind,
        step,
        identity,
        None,
        dict(sorted(dtypes.items())),
        elements,
        layout.size,
        None,
        name=job.name,
        indexed=uses_profiles(job.found, options),
    )


def options_used(kind: str, found: Found, options: Options) -> dict[str, Any]:
    """The options that make a difference to a checkpoint of this kind, as JSON has them."""
    made: dict[str, Any] = {"dtype": options.dtype}
    if options.pattern is not None:
        made["pattern"] = options.pattern.text
    if options.profiles and uses_profiles(found, options):
        made["profiles"] = list(options.profiles)
    if options.update_every is not None and kind in DEFAULT_UPDATE_EVERY:
        made["update_every"] = options.update_every
    if options.key is not None:
        made["key"] = options.key
    return made


def uses_profiles(found: Found, options: Options) -> bool:
    """Whether a checkpoint's name has an index, which profiles= says the width of."""
    try:
        named = read_name(found.title(options.pattern), options.pattern)
    except SnapshotError:
        return False
    return named is not None and named.index is not None
