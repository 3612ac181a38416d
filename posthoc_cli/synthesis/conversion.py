"""A checkpoint of another tool in, a snapshot out: a safetensors file of the same name.

Nothing in a checkpoint is ever run: see `formats`. The snapshot has its step and profile in the
metadata, and under `converted` what it was made of; by that a run that was interrupted knows what
is done.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence

from posthoc_cli.errors import SnapshotError, UnknownError
from posthoc_cli.formats import (
    DEFAULT_UPDATE_EVERY,
    Checkpoint,
    StoredTensor,
    auxiliary,
    averaged_steps,
    effective_gamma,
    kind_of,
    network_tensors,
    read_checkpoint,
    stated_profile,
)
from posthoc_cli.snapshots import Identity, identify, read_name
from posthoc_cli.solver import gamma_to_sigma_rel, sigma_rel_to_gamma
from posthoc_cli.storage import make_header
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.disk import make_folder
from posthoc_cli.storage.dtypes import FLOATS, OUTPUT_DTYPES
from posthoc_cli.storage.metadata import CONVERTED, GAMMA, SIGMA_REL, STEP
from posthoc_cli.synthesis.conversion_files import Found, index_of, may_be_other
from posthoc_cli.synthesis.conversion_jobs import (
    Converted,
    Job,
    LeftOutError,
    Options,
    has_number,
    options_used,
    uses_profiles,
)
from posthoc_cli.synthesis.gathering import Progress, write_tensors


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
    out if it is of a step that they have, or of none that is known: LeftOutError says so.

    Needs little memory, whatever the tensors' sizes; the snapshot appears whole or not at all.
    `progress` is called, from any thread, with the bytes just taken from the checkpoint.

    Raises SnapshotError when the checkpoint can't be used, MachineError when it can't be read
    (then the error's subject is its path) or the snapshot can't be written.
    """
    begin = time.perf_counter()
    try:
        parts = [read_checkpoint(path) for path in job.found.paths]
    except SnapshotError as error:
        if may_be_other(job.found) and error.problem.startswith(("neither a", "is a tar archive")):
            raise LeftOutError(str(job.source), error.problem, "leave it out") from None
        raise
    if not job.found.given and all(auxiliary(part) for part in parts):
        raise LeftOutError(str(job.source), auxiliary(parts[0]) or "", "leave it out")
    checkpoint = parts[0]
    kind = options.kind
    if kind == "auto":
        kind = kind_of(checkpoint) if options.key is None and len(parts) == 1 else "torch"
    sure = options.kind != "auto"
    pieces = [network_tensors(part, kind, options.key, sure=sure) for part in parts]
    tensors = _together(job.found, pieces)
    step, trained, warnings = _identity(job, checkpoint, kind, options)
    identity = _effective_profile(checkpoint, kind, trained, options)
    step = identity.step if identity else step
    if identity is None and not (job.found.given or job.numbered):
        _check_last(step, earlier)
    metadata = _metadata(job, kind, step, identity, options)
    dtypes = {name: _out_dtype(tensor.dtype, options) for name, tensor in tensors.items()}
    layout = {name: (dtypes[name], tensor.shape) for name, tensor in tensors.items()}
    header, infos = make_header(layout, metadata)
    size = len(header) + max((info.end for info in infos.values()), default=0)
    make_folder(job.output.parent)
    with AtomicFile(job.output, size, overwrite=overwrite) as file:
        file.write_at(0, header)
        overflowed = []
        for part, piece in zip(parts, pieces, strict=True):
            places = {name: infos[name] for name in piece}
            overflowed += write_tensors(part, piece, places, file, len(header), progress)
    if overflowed:
        more = f" and {len(overflowed) - 1} more" if len(overflowed) > 1 else ""
        warnings = [
            *warnings,
            f"values of '{overflowed[0]}'{more} are too large for {options.dtype}: infinite now",
        ]
    return Converted(
        job.source,
        job.output,
        kind,
        step,
        identity,
        trained if trained != identity else None,
        dict(sorted(Counter(dtypes.values()).items())),
        sum(tensor.elements for tensor in tensors.values()),
        size,
        time.perf_counter() - begin,
        tuple(warnings),
        job.name,
        uses_profiles(job.found, options),
    )


def _check_last(step: int | None, earlier: Sequence[Converted]) -> None:
    """Raise LeftOutError for a file such as last.ckpt that seems a copy of an earlier one."""
    numbered = [one for one in earlier if has_number(one.name)]
    same = [one.name for one in numbered if one.step == step and step is not None]
    if same:
        raise LeftOutError("", f"of step {step}, as '{same[0]}' is", "give it by itself")
    if numbered and step is None:
        reason = "nothing says its step, beside files whose names have numbers: give it by itself"
        raise LeftOutError("", reason, "")


def _together(found: Found, pieces: Sequence[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of all shards; those that the index gives to another are taken out of `pieces`.

    Raises SnapshotError where shards and index don't fit, or where two shards have one tensor.
    """
    places = index_of(found)
    for path, piece in zip(found.paths, pieces, strict=True):
        for name in [name for name in piece if places.get(name, path.name) != path.name]:
            del piece[name]
    tensors: dict[str, StoredTensor] = {}
    for path, piece in zip(found.paths, pieces, strict=True):
        if twice := tensors.keys() & piece.keys():
            raise SnapshotError(
                str(path),
                f"has '{min(twice)}', which another of its shards has too",
                "copy the shards of one checkpoint, with their index, again",
            )
        tensors |= piece
    if lacking := places.keys() - tensors.keys():
        raise SnapshotError(
            str(found.index),
            f"has '{min(lacking)}', which none of its shards has",
            "copy the shards again, with their index",
        )
    return tensors


def _out_dtype(dtype: str, options: Options) -> str:
    """Real floating-point tensors get the dtype asked for; all others keep theirs."""
    return OUTPUT_DTYPES[options.dtype] if options.dtype != "same" and dtype in FLOATS else dtype


def _identity(
    job: Job, checkpoint: Checkpoint, kind: str, options: Options
) -> tuple[int | None, Identity | None, list[str]]:
    """The step, the step with the profile that was asked for in training, and warnings.

    Either may be None where nothing says it: what isn't an EMA has no profile. Raises SnapshotError
    when a checkpoint that must have a profile has none, or when something impossible is said.
    """
    title = job.found.title(options.pattern)
    doubt = job.doubt if options.pattern is None else None
    named = read_name(title, options.pattern, options.profiles) if doubt is None else None
    said = stated_profile(checkpoint) if kind in ("torch", "posthoc-ema") else {}
    if kind == "posthoc-ema":  # whose own counter starts when its averages do
        said["step"] = str(named.step) if named and options.pattern is None else ""
        if "sigma_rel" not in said or not said["step"]:
            said = {}
    step = int(said["step"]) if "step" in said else named.step if named else None
    lacking = (
        "nothing says its profile, so it is only good for raw=True: give pattern= if it is an EMA"
    )
    unknown_index = named is not None and named.gamma is None and named.sigma_rel is None
    if kind == "torch" and unknown_index and not {"step"} < said.keys():
        return step, None, [lacking]
    try:
        identity, warnings = identify(title, said, options.pattern, options.profiles, doubt)
    except UnknownError:
        # Of a library's checkpoint, an average by a fixed decay has none; who names it, knows it.
        if options.pattern is not None or (kind in DEFAULT_UPDATE_EVERY and options.kind == "auto"):
            raise
        return step, None, [lacking]
    return identity.step, identity, warnings


def _effective_profile(
    checkpoint: Checkpoint, kind: str, trained: Identity | None, options: Options
) -> Identity | None:
    """The step and profile that the averages really have."""
    if kind not in DEFAULT_UPDATE_EVERY or trained is None:
        return trained
    step, gamma, sigma_rel = trained.step, trained.gamma, trained.sigma_rel
    if kind == "posthoc-ema":
        step = averaged_steps(checkpoint, step)
    if options.update_every is not None and options.update_every > 1:
        gamma = effective_gamma(gamma, options.update_every)
        sigma_rel = float(gamma_to_sigma_rel(gamma))
    return Identity(step, gamma, sigma_rel, trained.source)


def _metadata(
    job: Job,
    kind: str,
    step: int | None,
    identity: Identity | None,
    options: Options,
) -> dict[str, str]:
    metadata = {} if step is None else {STEP: str(step)}
    if identity is not None:
        # As whichever of the two is shorter, which is the one that was given; below gamma 0 there
        # are two exponents of each width.
        texts = {SIGMA_REL: repr(identity.sigma_rel), GAMMA: repr(identity.gamma)}
        exact = identity.gamma > 0 and sigma_rel_to_gamma(identity.sigma_rel) == identity.gamma
        key = min(texts, key=lambda key: len(texts[key])) if exact else GAMMA
        metadata[key] = texts[key]
    entry = {
        "from": kind,
        "file": job.name,
        "bytes": job.bytes,
        "modified": job.modified,
        "options": {"from": options.kind, **options_used(kind, job.found, options)},
    }
    return metadata | {CONVERTED: json.dumps(entry)}


def explanations(converted: Sequence[Converted], options: Options) -> list[str]:
    """What isn't about a single file: profiles that were not what was asked for, unused options."""
    told = []
    changed = {
        (one.trained.gamma, one.identity.gamma): one
        for one in converted
        if one.trained and one.identity and one.trained.gamma != one.identity.gamma
    }
    if changed:
        pairs = [
            f"sigma_rel {one.trained.sigma_rel:.4g} is gamma {one.identity.gamma:.4g} in truth, "
            f"sigma_rel {one.identity.sigma_rel:.4g}"
            for _, one in sorted(changed.items(), reverse=True)
            if one.trained and one.identity
        ]
        tools = " and ".join(sorted({one.kind for one in changed.values()}))
        told.append(
            f"update_every={options.update_every}: {tools} didn't average over the lengths asked "
            f"for ({'; '.join(pairs)}); the true ones are written"
        )
        if min(true for _, true in changed) <= -0.5:
            told.append("of gamma -0.5 and below, only method='blup' can synthesize")
    late = [
        one for one in converted if one.trained and one.identity and one.trained.step != one.step
    ]
    if late:
        assert late[-1].trained
        told.append(
            f"posthoc-ema's averages started late, and count their steps from there: "
            f"step {late[-1].trained.step} is their step {late[-1].step}"
        )
    if options.update_every is None:
        kinds = {one.kind for one in converted if one.identity}
        told += [
            f"{kind} averages with another profile than asked for unless update_every is 1, as is "
            f"taken here; its default is {default}: give update_every= as it was in training"
            for kind, default in DEFAULT_UPDATE_EVERY.items()
            if kind in kinds
        ]
    else:
        others = [one for one in converted if one.kind not in DEFAULT_UPDATE_EVERY]
        told += _unused("update_every=", others, converted, "no file is of a tool that needs it")
    if options.profiles and options.pattern is None:
        others = [one for one in converted if not one.indexed]
        told += _unused("profiles=", others, converted, "no file's name has an index")
    return told


def _unused(
    option: str, others: Sequence[Converted], converted: Sequence[Converted], reason: str
) -> list[str]:
    """That an option is not used for `others`, of all that were converted."""
    if not others:
        return []
    if len(others) == len(converted):
        return [f"{option} isn't used: {reason}"]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return [f"{option} isn't used for '{others[0].name}'{more}, of {others[0].kind}"]
