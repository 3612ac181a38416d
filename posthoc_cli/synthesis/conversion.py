"""A checkpoint of another tool in, a snapshot out: a safetensors file of the same name.

It is read as any snapshot is, see `formats`, and copied by the engine. The snapshot has its step
and profile in the metadata, and under `converted` what it was made of; by that a run that was
interrupted knows what is done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from posthoc_cli.snapshots import Contents
from posthoc_cli.snapshots.trained import Trained, explanations, unused
from posthoc_cli.storage.disk import make_folder
from posthoc_cli.synthesis.conversion_jobs import Converted, Job, Options, metadata_of
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.outputs import write_copy
from posthoc_cli.synthesis.plan import plan_tensors


def convert(
    job: Job,
    options: Options,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Make the snapshot of one checkpoint; its folder is made if need be.

    Needs little memory, whatever the tensors' sizes; the snapshot appears whole or not at all.
    `progress` is called, from any thread, with the bytes just taken from the checkpoint.

    Raises SnapshotError when the checkpoint can't be used, MachineError when it can't be read
    (then the error's subject is its path) or the snapshot can't be written.
    """
    begin = time.perf_counter()
    if job.error is not None:
        raise job.error
    assert job.index is not None
    plan = plan_tensors([job.index], 0, job.index.tensors, set(job.index.tensors), options.dtype)
    make_folder(job.output.parent)
    metadata = metadata_of(job, options)
    size, overflowed = write_copy(
        plan, job.output, metadata, overwrite=overwrite, progress=progress
    )
    warnings = job.warnings
    if overflowed:
        more = f" and {len(overflowed) - 1} more" if len(overflowed) > 1 else ""
        told = f"values of '{overflowed[0]}'{more} are too large for {options.dtype}: infinite now"
        warnings = (*warnings, told)
    contents = Contents.of_layout(plan.tensors)
    seconds = time.perf_counter() - begin
    return Converted(job, contents.dtypes, contents.parameters, size, seconds, warnings)


def explain(converted: Sequence[Converted], options: Options) -> list[str]:
    """What isn't about a single file: profiles that were not what was asked for, unused options."""
    found = [
        Trained(job.name, job.tool, job.asked or job.identity, job.identity, job.indexed)
        for job in (one.job for one in converted)
    ]
    if not found:
        return []
    told = explanations(found, options.reading, "written")
    if options.profiles and options.pattern is None:
        others = [one for one in found if not one.indexed]
        told += unused("profiles=", others, found, "no file's name has an index")
    return told
