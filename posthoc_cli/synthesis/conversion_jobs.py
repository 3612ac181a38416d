"""The checkpoints to convert: what becomes of each, and which are done."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posthoc_cli.errors import PosthocError, UsageError
from posthoc_cli.formats import DEFAULT_UPDATE_EVERY
from posthoc_cli.snapshots import Contents, check_profiles
from posthoc_cli.snapshots.identity import stated
from posthoc_cli.storage import read_header
from posthoc_cli.storage.metadata import CONVERTED, STEP, TOOL, carried_over
from posthoc_cli.storage.shards import index_path
from posthoc_cli.storage.stores import exists, identity, is_folder
from posthoc_cli.storage.temporary import clean_up
from posthoc_cli.synthesis.conversion_sources import Converted as Converted
from posthoc_cli.synthesis.conversion_sources import Job as Job
from posthoc_cli.synthesis.conversion_sources import Options as Options
from posthoc_cli.synthesis.conversion_sources import find_checkpoints


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
    is false; SnapshotError when there is no checkpoint, or a choice that is the user's;
    MachineError when the folder can't be listed.
    """
    if not options.told.of_all:
        check_profiles(options.profiles or None, options.pattern)
    options.reading.check()
    rest = left_out if left_out is not None else []
    jobs = find_checkpoints(source, folder, options, only, exclude, rest)
    _check_outputs(jobs, folder)
    clean_up(folder)
    inputs = {identity(file.path) for job in jobs for file in job.files}
    inputs |= {identity(job.source) for job in jobs}
    for at, job in enumerate(jobs):
        there = [path for path in (job.output, index_path(job.output)) if exists(path)]
        if not there:
            continue
        if any(identity(path) in inputs for path in there):
            problem = "is one of the checkpoints"
            raise UsageError(str(there[0]), problem, "choose another folder")
        if job.index is None:
            continue
        done, differs = _done(job, options)
        if done is None and not overwrite:
            raise UsageError(
                str(there[0]),
                f"exists already, and is not what this makes of '{job.name}'{differs}",
                "use force=True to replace it, or choose another folder",
            )
        jobs[at] = replace(job, done=done)
    return jobs


def _check_outputs(jobs: Sequence[Job], folder: Path) -> None:
    if exists(folder) and not is_folder(folder):
        raise UsageError(str(folder), "is not a folder", "give the folder to write to")
    taken: dict[str, Job] = {}
    for job in jobs:
        place = os.path.normcase(job.output)
        if place in taken:
            raise UsageError(
                str(job.source),
                f"would become '{job.output.name}', as '{taken[place].name}' would",
                "leave one of the two out with only=",
            )
        taken[place] = job
        if is_folder(job.output):
            raise UsageError(str(job.output), "is a folder", "choose another folder to write to")


def metadata_of(job: Job, options: Options) -> dict[str, str]:
    """The metadata of the snapshot of a job; what it is made of is in the entry `converted`."""
    assert job.index is not None
    # A safetensors file or torch.distributed checkpoint may say more than its step and profile.
    metadata = {} if TOOL in job.index.metadata else carried_over(job.index.metadata)
    if job.step is not None:
        metadata[STEP] = str(job.step)
    if job.identity is not None:
        metadata |= stated(job.identity.profile)
    used: dict[str, Any] = {"from": options.kind, "dtype": options.dtype}
    if options.pattern is not None:
        used["pattern"] = options.pattern.text
    if options.profiles and (options.pattern or job.indexed):
        used["profiles"] = list(options.profiles)
    if options.update_every is not None and job.tool in DEFAULT_UPDATE_EVERY:
        used["update_every"] = options.update_every
    if options.key is not None:
        used["key"] = options.key
    modified = max((file.modified for file in job.files), default=0)
    made_of = {"from": job.tool, "file": job.name, "bytes": job.bytes, "modified": modified}
    return metadata | {CONVERTED: json.dumps(made_of | {"options": used})}


def _done(job: Job, options: Options) -> tuple[Converted | None, str]:
    """What is at the output, if it is what the checkpoint would become; else how it differs."""
    wanted = metadata_of(job, options)
    made_of = json.loads(wanted.pop(CONVERTED))
    try:
        layout = read_header(job.output)
        metadata = dict(layout.metadata)
        entry = json.loads(metadata.pop(CONVERTED))
        for each in (made_of, entry):  # what is asked for makes no difference, but what it is
            each["options"]["from"] = each["from"]
        if [entry["file"], entry["bytes"]] != [made_of["file"], made_of["bytes"]]:
            return None, ""
        if entry["modified"] != made_of["modified"]:
            return None, ", which has changed since"
        asked, before = made_of["options"], entry["options"]
        keys = sorted(key for key in asked | before if asked.get(key) != before.get(key))
        if keys:
            told = " and ".join(_option(key, before.get(key)) for key in keys)
            return None, f" (it was made {told})"
        if metadata != wanted:
            return None, ""
    except (PosthocError, KeyError, TypeError, ValueError, RecursionError):
        return None, ""  # nobody's, or meddled with
    contents = Contents.of(layout.tensors)
    return Converted(job, contents.dtypes, contents.parameters, layout.size, None), ""


def _option(key: str, value: object) -> str:
    key = "tool" if key == "from" else key
    if value is None:
        return f"without {key}="
    if isinstance(value, list):
        return f"with {key}=[{', '.join(f'{one:g}' for one in value)}]"
    return f"with {key}='{value}'" if isinstance(value, str) else f"with {key}={value}"
