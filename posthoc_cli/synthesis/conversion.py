"""A checkpoint of another tool in, a snapshot out: a safetensors file of the same name.

It is read as any snapshot is, see `formats`, and copied by the engine. The snapshot has its step
and profile in the metadata, and under `converted` what it was made of; by that a run that was
interrupted knows what is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace

from posthoc_cli.errors import NoNetworkError, UnknownError
from posthoc_cli.formats import DEFAULT_UPDATE_EVERY, How, open_network
from posthoc_cli.snapshots import Contents, Identity, read_name
from posthoc_cli.snapshots.trained import Trained, explanations, identify_trained, unused
from posthoc_cli.solver import Average, Decay, Profile, Scheduled, sigma_rel_to_gamma
from posthoc_cli.storage import TensorIndex
from posthoc_cli.storage.disk import make_folder
from posthoc_cli.storage.metadata import (
    CONVERTED,
    DECAY,
    GAMMA,
    ONE_STEP,
    SCHEDULE,
    SIGMA_REL,
    STEP,
    TOOL,
    UPDATE_EVERY,
    carried_over,
)
from posthoc_cli.synthesis.conversion_jobs import (
    Converted,
    Job,
    Options,
    has_number,
    options_used,
    uses_profiles,
)
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.outputs import write_copy
from posthoc_cli.synthesis.plan import plan_tensors


def convert(
    job: Job,
    options: Options,
    earlier: Sequence[Converted] = (),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Make the snapshot of one checkpoint; its folder is made if need be.

    Beside `earlier` ones of the same folder, which have numbers in their names, one without is left
    out if it is of a step that they have, or of none that is known: NoNetworkError says so.

    Needs little memory, whatever the tensors' sizes; the snapshot appears whole or not at all.
    `progress` is called, from any thread, with the bytes just taken from the checkpoint.

    Raises SnapshotError when the checkpoint can't be used, MachineError when it can't be read
    (then the error's subject is its path) or the snapshot can't be written.
    """
    begin = time.perf_counter()
    index = _open(job, options)
    kept = {} if TOOL in index.metadata else carried_over(index.metadata)
    if kept:  # a snapshot of ours that was packed
        index = replace(index, metadata={**index.metadata, TOOL: "torch"})
    tool = index.metadata[TOOL]
    trained, warnings = _identify(job, index, options)
    identity = trained.identity
    step = identity.step if identity else _step(job, index, options)
    if identity is None and not (job.found.given or job.numbered):
        _check_last(step, earlier)
    plan = plan_tensors([index], 0, index.tensors, set(index.tensors), options.dtype)
    make_folder(job.output.parent)
    metadata = kept | _metadata(job, tool, step, identity, options)
    size, overflowed = write_copy(
        plan, job.output, metadata, overwrite=overwrite, progress=progress
    )
    if overflowed:
        more = f" and {len(overflowed) - 1} more" if len(overflowed) > 1 else ""
        warnings = [
            *warnings,
            f"values of '{overflowed[0]}'{more} are too large for {options.dtype}: infinite now",
        ]
    contents = Contents.of_layout(plan.tensors)
    return Converted(
        job.source,
        job.output,
        tool,
        step,
        identity,
        trained.asked if trained.asked != identity else None,
        contents.dtypes,
        contents.parameters,
        size,
        time.perf_counter() - begin,
        tuple(warnings),
        job.name,
        uses_profiles(job.found, options),
    )


def _open(job: Job, options: Options) -> TensorIndex:
    how = How(options.key, options.kind)
    try:
        return open_network(job.found.path, how)
    except NoNetworkError:
        if not job.found.given or how.tool != "auto":
            raise
    return open_network(job.found.path, How(options.key, "torch"))  # says what it holds instead


def _identify(job: Job, index: TensorIndex, options: Options) -> tuple[Trained, list[str]]:
    """The step and profile, and warnings. What isn't an EMA has none; raises SnapshotError when a
    checkpoint that must have a profile has none, or when something impossible is said."""
    title, tool = job.found.title(options.pattern), index.metadata[TOOL]
    try:
        return identify_trained(job.name, title, index.metadata, options.reading, job.doubt)
    except UnknownError:
        # Of a library's checkpoint, an average by a fixed decay has none; who names it, knows it.
        of_library = tool in DEFAULT_UPDATE_EVERY and options.kind == "auto"
        if options.pattern is not None or of_library:
            raise
    lacking = (
        "nothing says its profile, so it is only good for raw=True: give pattern= if it is an EMA"
    )
    return Trained(job.name, tool, None, None, uses_profiles(job.found, options)), [lacking]


def _step(job: Job, index: TensorIndex, options: Options) -> int | None:
    """The step of what has no profile, where anything says it."""
    if STEP in index.metadata:
        return int(index.metadata[STEP])
    if job.doubt is not None and options.pattern is None:
        return None
    named = read_name(job.found.title(options.pattern), options.pattern, options.profiles)
    return named.step if named else None


def _check_last(step: int | None, earlier: Sequence[Converted]) -> None:
    """Raise NoNetworkError for a file such as last.ckpt that seems a copy of an earlier one."""
    numbered = [one for one in earlier if has_number(one.name)]
    same = [one.name for one in numbered if one.step == step and step is not None]
    if same:
        raise NoNetworkError("", f"of step {step}, as '{same[0]}' is", "give it by itself")
    if numbered and step is None:
        reason = "nothing says its step, beside files whose names have numbers: give it by itself"
        raise NoNetworkError("", reason, "")


def _metadata(
    job: Job,
    kind: str,
    step: int | None,
    identity: Identity | None,
    options: Options,
) -> dict[str, str]:
    metadata = {} if step is None else {STEP: str(step)}
    if identity is not None:
        metadata |= stated(identity.profile)
    entry = {
        "from": kind,
        "file": job.name,
        "bytes": job.bytes,
        "modified": job.modified,
        "options": {"from": options.kind, **options_used(kind, job.found, options)},
    }
    return metadata | {CONVERTED: json.dumps(entry)}


def stated(profile: Average) -> dict[str, str]:
    """What kind of average it is, as metadata have it.

    A power function is by its exponent or width, whichever is shorter, which is the one that was
    given; below gamma 0 there are two exponents of each width.
    """
    if isinstance(profile, Scheduled):
        return {key: str(getattr(profile.schedule, key)) for key in (DECAY, *SCHEDULE)}
    if isinstance(profile, Decay):
        return {DECAY: repr(profile.beta)}
    assert isinstance(profile, Profile)
    texts = {SIGMA_REL: repr(float(profile.sigma_rel)), GAMMA: repr(float(profile.gamma))}
    exact = profile.gamma > 0 and sigma_rel_to_gamma(profile.sigma_rel) == profile.gamma
    key = min(texts, key=lambda key: len(texts[key])) if exact else GAMMA
    told = {key: texts[key]}
    if profile.stairs is not None:
        told |= {UPDATE_EVERY: str(profile.update_every), ONE_STEP: str(profile.one_step)}
    return told


def explain(converted: Sequence[Converted], options: Options) -> list[str]:
    """What isn't about a single file: profiles that were not what was asked for, unused options."""
    found = [
        Trained(one.name, one.kind, one.trained or one.identity, one.identity, one.indexed)
        for one in converted
    ]
    if not found:
        return []
    told = explanations(found, options.reading, "written")
    if options.profiles and options.pattern is None:
        others = [one for one in found if not one.indexed]
        told += unused("profiles=", others, found, "no file's name has an index")
    return told
