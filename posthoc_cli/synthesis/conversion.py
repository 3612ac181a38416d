"""Other tools' checkpoints in, snapshots out: what each file is, what it says, and one by one.

    ema-pytorch    <index>.<step>.pt       of ema-pytorch's PostHocEMA
    posthoc-ema    <index>.<step>.pt       of pytorch-posthoc-ema's
    edm2           <prefix>-<kimg>-<sigma_rel>.pkl
    torch          any state dict that torch.save wrote

Nothing in them is ever run: see checkpoints.py. Each becomes one safetensors file of the same name,
with its step and profile in the metadata, and under `converted` what it was made of; by that a run
that was interrupted knows what is done.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import PosthocError, SnapshotError, UnknownError, UsageError
from posthoc_cli.formats.checkpoints import Checkpoint, StoredTensor, read_checkpoint, state_dict
from posthoc_cli.formats.edm2 import is_edm2, network_state
from posthoc_cli.snapshots.identity import Identity, check_profiles, identify
from posthoc_cli.snapshots.listing import choose_by_globs
from posthoc_cli.snapshots.names import Pattern, read_name
from posthoc_cli.solver.profiles import gamma_to_sigma_rel, sigma_rel_to_gamma
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.disk import file_status, list_folder, make_folder, open_file
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, OUTPUT_DTYPES, bytes_of, decode
from posthoc_cli.storage.header import TensorIndex, make_header, read_header
from posthoc_cli.storage.metadata import CONVERTED, GAMMA, SIGMA_REL, STEP
from posthoc_cli.storage.shards import ENDING
from posthoc_cli.synthesis.gathering import Progress, write_tensors

ENDINGS = (".pt", ".pth", ".pkl", ".ckpt", ".bin")
"""Of the files in a folder that count, in capitals too."""

KINDS = ("ema-pytorch", "posthoc-ema", "edm2", "torch")
"""What `tool` can be, and what a file is found to be."""

MAX_UPDATE_EVERY = 1_000_000

_PREFIX = "ema_model."
_COUNTERS = ("initted", "step")
_DEFAULT_UPDATE_EVERY = {"ema-pytorch": 100, "posthoc-ema": 10}


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
    """A checkpoint of `bytes` bytes and the snapshot to make of it; `done` if it was made."""

    source: Path
    output: Path
    bytes: int
    done: Converted | None = None


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
    inputs = {(status.st_dev, status.st_ino) for status in filter(None, map(file_status, paths))}
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
        jobs.append(Job(path, output, status.st_size if status else 0, done))
    return jobs


def convert(
    job: Job, options: Options, *, overwrite: bool = False, progress: Progress | None = None
) -> Converted:
    """Make the snapshot of one checkpoint; its folder is made if need be.

    Needs little memory, whatever the tensors' sizes; the snapshot appears whole or not at all.
    `progress` is called, from any thread, with the bytes just taken from the checkpoint.

    Raises SnapshotError when the checkpoint can't be used, MachineError when it can't be read
    (then the error's subject is its path) or the snapshot can't be written.
    """
    begin = time.perf_counter()
    checkpoint = read_checkpoint(job.source)
    kind = _kind(checkpoint, options)
    tensors = _tensors(checkpoint, kind, options)
    step, trained, warnings = _identity(checkpoint, kind, options)
    identity = _effective_profile(checkpoint, kind, trained, options)
    step = identity.step if identity else step
    metadata = _metadata(checkpoint, kind, step, identity, options)
    dtypes = {name: _out_dtype(tensor.dtype, options) for name, tensor in tensors.items()}
    layout = {name: (dtypes[name], tensor.shape) for name, tensor in tensors.items()}
    header, infos = make_header(layout, metadata)
    size = len(header) + max((info.end for info in infos.values()), default=0)
    make_folder(job.output.parent)
    with AtomicFile(job.output, size, overwrite=overwrite) as file:
        file.write_at(0, header)
        overflowed = write_tensors(checkpoint, tensors, infos, file, len(header), progress)
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
    )


# Which files


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
        if options.kind not in ("auto", *_DEFAULT_UPDATE_EVERY):
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


# What is done already


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
            and made_with == _made_with(kind, options)
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


def _made_with(kind: str, options: Options) -> dict[str, Any]:
    """The options that make a difference to a checkpoint of this kind, as JSON has them."""
    made: dict[str, Any] = {"dtype": options.dtype}
    if options.pattern is not None:
        made["pattern"] = options.pattern.text
    if options.profiles and (kind in _DEFAULT_UPDATE_EVERY or options.pattern is not None):
        made["profiles"] = list(options.profiles)
    if options.update_every is not None and kind in _DEFAULT_UPDATE_EVERY:
        made["update_every"] = options.update_every
    if options.key is not None and kind == "torch":
        made["key"] = options.key
    return made


# What a checkpoint is


def _kind(checkpoint: Checkpoint, options: Options) -> str:
    """What wrote it, by its contents."""
    if options.kind != "auto":
        return options.kind
    if options.key is not None:
        return "torch"
    if is_edm2(checkpoint):
        return "edm2"
    root = checkpoint.root
    if isinstance(root, dict) and all(isinstance(root.get(n), StoredTensor) for n in _COUNTERS):
        prefixed = Counter(name.startswith(_PREFIX) for name in _network(root))
        if len(prefixed) == 1:  # with both, it is the network beside an ordinary EMA of it
            return "ema-pytorch" if prefixed[True] and "sigma_rel" not in root else "posthoc-ema"
    return "torch"


def _network(root: Any) -> dict[str, StoredTensor]:
    """The tensors of a post-hoc EMA's checkpoint that are not its counters."""
    return {
        name: tensor
        for name, tensor in (root.items() if isinstance(root, dict) else ())
        if isinstance(name, str) and isinstance(tensor, StoredTensor) and name not in _COUNTERS
    }


def _tensors(checkpoint: Checkpoint, kind: str, options: Options) -> dict[str, StoredTensor]:
    """The network's tensors, by the network's own names."""
    if kind == "edm2":
        tensors = network_state(checkpoint)
    elif kind == "torch":
        tensors = state_dict(checkpoint, options.key)
    else:
        tensors = _network(checkpoint.root)
        inner = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_PREFIX)
        }
        if kind == "ema-pytorch" or len(inner) == len(tensors):
            tensors = inner
        if not tensors:
            raise SnapshotError(
                str(checkpoint.path), f"is not a checkpoint of {kind}", "leave out tool="
            )
    for name in tensors:
        if name == "__metadata__" or not _is_text(name):
            raise SnapshotError(
                str(checkpoint.path),
                f"a tensor's name, '{name}', is none that safetensors can have",
                "save it under another name",
            )
    return tensors


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _out_dtype(dtype: str, options: Options) -> str:
    """Real floating-point tensors get the dtype asked for; all others keep theirs."""
    return OUTPUT_DTYPES[options.dtype] if options.dtype != "same" and dtype in FLOATS else dtype


# Which step and profile it has


def _identity(
    checkpoint: Checkpoint, kind: str, options: Options
) -> tuple[int | None, Identity | None, list[str]]:
    """The step, the step with the profile that was asked for in training, and warnings.

    Either may be None where nothing says it: what isn't an EMA has no profile. Raises SnapshotError
    when a checkpoint that must have a profile has none, or when something impossible is said.
    """
    path = checkpoint.path
    title = path.name if options.pattern else f"{path.stem}{ENDING}"
    named = read_name(title, options.pattern, options.profiles)
    said = _said(checkpoint) if kind in ("torch", "posthoc-ema") else {}
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
        identity, warnings = identify(title, said, options.pattern, options.profiles)
    except UnknownError:
        if options.pattern is not None or kind not in ("torch", "edm2"):
            raise
        return step, None, [lacking]
    return identity.step, identity, warnings


def _said(checkpoint: Checkpoint) -> dict[str, str]:
    """The step and profile that numbers in the checkpoint itself tell, as metadata has them."""
    root = checkpoint.root if isinstance(checkpoint.root, dict) else {}
    said = {}
    for key in ("global_step", "step"):
        value = _number(checkpoint, root.get(key))
        if value is not None and value >= 1 and value == math.floor(value):
            said["step"] = str(int(value))
    for key in ("gamma", "sigma_rel"):
        value = _number(checkpoint, root.get(key))
        if value is not None:
            said[key] = repr(float(value))
    return said


def _number(checkpoint: Checkpoint, value: Any) -> int | float | None:
    """A finite number, or one in a tensor of one element; None for anything else."""
    if (
        isinstance(value, StoredTensor)
        and value.shape in ((), (1,))
        and value.dtype in FLOATS | {"I64", "I32"}
    ):
        size = bytes_of(value.dtype, 1)
        try:
            with open_file(checkpoint.path) as (file, _):
                file.seek(value.offset)
                data = np.frombuffer(file.read(size), np.uint8)
            kind = value.dtype
            stored = decode(kind, data) if kind in FLOATS else data.view(DTYPES[kind].numpy())
            (value,) = stored.tolist()
        except (PosthocError, ValueError):
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _effective_profile(
    checkpoint: Checkpoint, kind: str, trained: Identity | None, options: Options
) -> Identity | None:
    """The step and profile that the averages really have.

    Both tools apply the decay of one step at each update. With `update_every` steps between updates
    that leaves `prod (1 - 1 / t)^(1 + gamma)` over every N-th t, which is that of an exponent with
    `1 + gamma` divided by N.
    """
    if kind not in _DEFAULT_UPDATE_EVERY or trained is None:
        return trained
    step, gamma, sigma_rel = trained.step, trained.gamma, trained.sigma_rel
    if kind == "posthoc-ema":
        step = _own_step(checkpoint, step)
    if options.update_every is not None and options.update_every > 1:
        gamma = (1 + gamma) / options.update_every - 1
        sigma_rel = float(gamma_to_sigma_rel(gamma))
    return Identity(step, gamma, sigma_rel, trained.source)


def _own_step(checkpoint: Checkpoint, named: int) -> int:
    """The steps that pytorch-posthoc-ema has averaged over, where its file is named after `named`.

    Its averages start late, by default at step 100, and their decay goes by a counter that starts
    with them. In half precision the counter is rounded: what `named` would be rounded to is it.
    """
    counter = checkpoint.root.get("step")
    value = _number(checkpoint, counter)
    if value is None or not 1 <= value < named:
        return named
    rounding = {"F16": 2.0**-11, "BF16": 2.0**-8}.get(getattr(counter, "dtype", ""), 0.0)
    return named if named - value <= named * rounding else int(value)


def _metadata(
    checkpoint: Checkpoint,
    kind: str,
    step: int | None,
    identity: Identity | None,
    options: Options,
) -> dict[str, str]:
    """The snapshot's metadata: its step and profile, and what it was made of."""
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
        "file": checkpoint.path.name,
        "bytes": checkpoint.size,
        "modified": checkpoint.modified,
        "options": {"from": options.kind, **_made_with(kind, options)},
    }
    return metadata | {CONVERTED: json.dumps(entry)}


# What to tell


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
    kinds = {one.kind for one in converted}
    if options.update_every is None:
        told += [
            f"{kind} averages with another profile than asked for unless update_every is 1, as is "
            f"taken here; its default is {default}: give update_every= as it was in training"
            for kind, default in _DEFAULT_UPDATE_EVERY.items()
            if kind in kinds
        ]
    if converted and not kinds & set(_DEFAULT_UPDATE_EVERY):
        if options.update_every is not None:
            told.append("update_every= isn't used: no file is of a tool that needs it")
        if options.profiles and options.pattern is None:
            told.append("profiles= isn't used: no file's name has an index")
    return told
