"""The checkpoints in a run's folder: which files each is of, and what is left out, with why.

Folders named after a step are looked into: Trainer's `checkpoint-500/pytorch_model.bin`. Shards,
`pytorch_model-00001-of-00003.bin`, are one checkpoint. What belongs to training alone, or is of
step 0, is left out unless it is named by itself.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from posthoc_cli.errors import MachineError, SnapshotError, UsageError, either
from posthoc_cli.snapshots import Pattern, choose_by_globs, read_name
from posthoc_cli.storage import ENDING
from posthoc_cli.storage.disk import list_folder, open_file

ENDINGS = (".pt", ".pth", ".pkl", ".ckpt", ".bin")
"""Of the files in a folder that count, in capitals too; `.tar` may follow."""

_INDEX = ".index.json"
_MAX_INDEX = 256 << 20
_KNOWN = (
    *("pytorch_model", "diffusion_pytorch_model", "model", "adapter_model"),
    *("pytorch_lora_weights", "mp_rank_00_model_states"),
)
"""What libraries call the network in a folder of its own, without ending."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
_ZERO_3 = re.compile(r".*zero_pp_rank_[0-9]+_mp_rank_[0-9]+_model_states\.pt")
_COUNTED = r"(?:[-_.]?[0-9]+)*"
_OF_TRAINING = [
    (re.compile(rf"(?i:{regex})"), reason)
    for regex, reason in (
        (r"training[-_]state.*", "a state of training, to go on from"),
        (r"trainer[-_]state.*", "a state of the trainer"),
        (r"training[-_]args.*", "the arguments of training"),
        (rf"(?:.*[-_.])?(?:optimizer|optim)(?:[-_.]states?)?{_COUNTED}", "an optimizer's state"),
        (r".*_optim_states", "an optimizer's state"),
        (rf"(?:lr[-_]?)?scheduler(?:[-_.]states?)?{_COUNTED}", "a scheduler's state"),
        (rf"(?:grad[-_]?)?scaler(?:[-_.]states?)?{_COUNTED}", "a gradient scaler's state"),
        (rf"(?:rng|random)[-_.]?states?{_COUNTED}", "random states"),
        (rf"(?:sampler|dl_state_dict|dataloader)(?:[-_.]states?)?{_COUNTED}", "a sampler's state"),
    )
]
"""Names, without ending, of what training saves beside the network."""


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint: its name below the folder, what its snapshot is to be called, and its files.

    `index` says which tensor is in which of several files, where there is one. `given` is whether
    the user named it, so that nothing is left out in silence.
    """

    name: str
    stem: str
    paths: tuple[Path, ...]
    index: Path | None = None
    given: bool = False

    def title(self, pattern: Pattern | None) -> str:
        """The name that says step and profile: by `pattern` its own, else the snapshot's."""
        return self.name if pattern else f"{self.stem}{ENDING}"


def find_checkpoints(
    source: Path,
    only: Sequence[str],
    exclude: Sequence[str],
    pattern: Pattern | None,
    output: Path,
    left_out: list[tuple[str, str]],
) -> list[Found]:
    """The checkpoints in the folder `source`, or the file `source`, by name.

    What else the folder holds is added to `left_out`: name and reason; but for what lies in the
    folder `output`, which may be the same. Raises as `find_jobs` does.
    """
    if source.is_file():
        found = _grouped(source.parent, "", [source.name])
        chosen = choose_by_globs([source.name], only, "1 file")
        return [
            replace(one, given=True)
            for one in found
            if one.name in chosen or one.paths[0] == source
        ]
    found, others = _listed(source, output)
    names = choose_by_globs([one.name for one in found], only, f"{len(found)} files")
    for glob in exclude:
        if not fnmatch.filter([one.name for one in found], glob):
            raise UsageError(
                "exclude=", f"'{glob}' fits none of {len(found)} files", "leave it out"
            )
    names = [name for name in names if not any(fnmatch.fnmatch(name, glob) for glob in exclude)]
    if not names:
        raise UsageError("exclude=", "leaves no file over", "leave less out")
    wanted = set(names)
    found = [
        replace(one, given=True) if one.name in only else one for one in found if one.name in wanted
    ]
    if not only and not exclude:
        left_out += others
    kept = []
    for one in found:
        reason = None if one.given else _reason(one, pattern)
        if reason is None:
            kept.append(one)
        else:
            left_out.append((one.name, reason))
    kept = _one_a_folder(kept, bool(only or exclude), left_out)
    left_out.sort()
    if not kept:
        raise nothing_left(source, left_out)
    return kept


def nothing_left(source: Path, left_out: Sequence[tuple[str, str]]) -> SnapshotError:
    name, reason = left_out[0]
    return SnapshotError(
        str(source),
        f"holds no checkpoint: all {len(left_out)} files are left out ('{name}': {reason})",
        "give the folder that training wrote its checkpoints to, or one file",
    )


def index_of(one: Found) -> dict[str, str]:
    """Which of a checkpoint's files has which tensor, by its index; empty without one.

    Raises SnapshotError for an index that is none, or that is of other files.
    """
    if one.index is None:
        return {}
    with open_file(one.index) as (file, status):
        data = file.read(_MAX_INDEX) if status.st_size <= _MAX_INDEX else b""
    try:
        places = json.loads(data)["weight_map"]
        if not all(isinstance(file, str) for file in places.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SnapshotError(
            str(one.index), "is not an index of shards", "copy it again, or remove it"
        ) from None
    return dict(places)


def without_ending(name: str) -> str | None:
    """A checkpoint's name without its ending; None for what doesn't end as one does."""
    bare = name[:-4] if name.lower().endswith(".tar") else name
    stem, ending = os.path.splitext(bare)
    if ending.lower() in ENDINGS and stem:
        return stem
    return bare if bare != name else None  # `name.tar`, as torch's tutorials have it


def may_be_other(one: Found) -> bool:
    """Whether a file's name is as usual for quite other things: `vocab.bin`, `images.tar`."""
    name = one.paths[0].name.lower()
    bare = os.path.splitext(name)[0]
    other = name.endswith(".bin") or (name.endswith(".tar") and not bare.endswith(ENDINGS))
    return other and not one.given and bare not in _KNOWN and len(one.paths) == 1


def _listed(source: Path, output: Path) -> tuple[list[Found], list[tuple[str, str]]]:
    names = [n for n in list_folder(source, "give the folder of checkpoints") if n[0] != "."]
    folders = [name for name in names if os.path.isdir(source / name)]
    files = [name for name in names if name not in folders]
    found = _grouped(source, "", files)
    others: list[tuple[str, str]] = []
    steps = []
    for name in folders:
        if _same(source / name, output):
            continue
        inside, reason = _inside(source, name)
        bare = name.removesuffix("-state")  # kohya's `lora-000001-state` beside `lora-000001.ckpt`
        if bare != name and any(os.path.splitext(file)[0] == bare for file in files):
            inside, reason = [], f"a state of training, to go on from, beside '{bare}'"
        if inside:
            steps += inside
        else:
            others.append((name, reason))
    used = {path.name for one in found for path in (*one.paths, *filter(None, [one.index]))}
    for name in files:
        if name not in used and not (name.endswith(ENDING) and _same(source, output)):
            others.append((name, _no_checkpoint(name)))
    if steps:  # the last one of all, as Trainer saves it once more
        last = [one for one in found if one.stem in _KNOWN]
        found = [one for one in found if one not in last]
        others += [
            (one.name, "no step in its name, beside the folders of steps: give it by itself")
            for one in last
        ]
    found += steps
    if not found:
        raise _none_found(source, files)
    return sorted(found, key=lambda one: one.name), others


def _no_checkpoint(name: str) -> str:
    if name.lower().endswith(ENDING):
        return f"a {ENDING} file, which can be used as it is"
    return "not a checkpoint, by its ending"


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _inside(source: Path, folder: str) -> tuple[list[Found], str]:
    """The checkpoints in a folder below the run's, or why there is none."""
    try:
        names = [name for name in list_folder(source / folder) if name[0] != "."]
    except MachineError as error:
        return [], f"a folder that {error.problem}"
    files = [name for name in names if not os.path.isdir(source / folder / name)]
    found = _grouped(source, f"{folder}/", files)
    if not re.search("[0-9]", folder):
        return [], "a folder whose name says no step" if found else "a folder without checkpoints"
    if [one for one in found if _of_training(one) is None]:
        return found, ""
    if any(name.lower().endswith(ENDING) for name in files):
        return [], f"a folder with {ENDING} files, which can be used as they are"
    deeper = [name for name in names if name not in files]
    if any(name.startswith("global_step") for name in deeper):
        return [], "only DeepSpeed's parts: make one file of them with its zero_to_fp32.py"
    for below in deeper:
        path = source / folder / below
        if any(without_ending(name) in _KNOWN for name in list_folder(path)):
            return [], f"a folder with checkpoints in '{below}', one deeper: give that folder"
    return [], "a folder without checkpoints"


def _grouped(source: Path, below: str, names: Iterable[str]) -> list[Found]:
    """The checkpoints among these files, shards put together; `below` is a folder, with a slash.

    Raises SnapshotError where shards are missing.
    """
    names = list(names)
    there = set(names)
    folder = source / below if below else source
    found, shards = [], dict[tuple[str, str, int], dict[int, str]]()
    ranks = [name for name in names if _ZERO_3.fullmatch(name)]
    for name in names:
        stem = without_ending(name)
        if stem is None or name in ranks[1:]:  # of which none has values
            continue
        match = _SHARD.fullmatch(stem)
        if match is None:
            found.append(Found(below + name, below.removesuffix("/") or stem, (folder / name,)))
        else:
            ending = name[len(stem) :]
            group = shards.setdefault((match["stem"], ending, int(match["count"])), {})
            group[int(match["number"])] = name
    for (stem, ending, count), group in shards.items():
        paths = tuple(folder / group[number] for number in sorted(group))
        index = f"{stem}{ending}{_INDEX}"
        found.append(
            Found(
                f"{below}{stem}{ending}",
                below.removesuffix("/") or stem,
                paths,
                folder / index if index in there or (folder / index).is_file() else None,
            )
        )
        if len(names) == 1:  # a shard that was given by itself: its siblings are needed too
            listed = set(list_folder(folder))
            every = [f"{stem}-{n:05}-of-{count:05}{ending}" for n in range(1, count + 1)]
            paths = tuple(folder / name for name in every if name in listed)
            found[-1] = replace(found[-1], paths=paths)
        if len(paths) != count:
            lacking = next(n for n in range(1, count + 1) if n not in group)
            raise SnapshotError(
                str(folder / f"{stem}-{lacking:05}-of-{count:05}{ending}"),
                f"missing: {len(paths)} of {count} shards are there",
                "wait until it is written, copy it again, or leave it out with exclude=",
            )
    return found


def _of_training(one: Found) -> str | None:
    stem = without_ending(one.paths[0].name) or ""
    return next((reason for regex, reason in _OF_TRAINING if regex.fullmatch(stem)), None)


def _reason(one: Found, pattern: Pattern | None) -> str | None:
    """Why a file is left out, by its name alone; None if it isn't."""
    if reason := _of_training(one):
        return reason
    try:
        named = read_name(one.title(pattern), pattern)
    except SnapshotError:
        return None
    if named is not None and named.step == 0:
        return "of step 0, where training has not begun and nothing is averaged"
    return None


def _one_a_folder(found: list[Found], chosen: bool, left_out: list[tuple[str, str]]) -> list[Found]:
    """Of each folder of a step one checkpoint: the one by a name that libraries give, or the only.

    Raises SnapshotError where there are several and none is `chosen` by the user.
    """
    folders: dict[str, list[Found]] = {}
    for one in found:
        folders.setdefault(one.name.rpartition("/")[0], []).append(one)
    kept = folders.pop("", [])
    for folder, inside in folders.items():
        known = [one for one in inside if without_ending(one.name.rpartition("/")[2]) in _KNOWN]
        if len(inside) > 1 and len(known) == 1 and not chosen:
            hint = "beside '{}': only='*/{}' takes it instead"
            left_out += [
                (one.name, hint.format(known[0].name.rpartition("/")[2], one.paths[0].name))
                for one in inside
                if one not in known
            ]
            inside = known
        if len(inside) > 1:
            names = [one.name.rpartition("/")[2] for one in inside]
            raise SnapshotError(
                folder,
                f"holds several checkpoints ({', '.join(names[:4])})",
                f"choose one of each folder, as only='*/{names[0]}' does",
            )
        kept += inside
    return sorted(kept, key=lambda one: one.name)


def _none_found(folder: Path, names: Sequence[str]) -> SnapshotError:
    snapshots = sum(name.lower().endswith(ENDING) for name in names)
    return SnapshotError(
        str(folder),
        f"holds no {either(ENDINGS)} files",
        f"its {snapshots} {ENDING} files can be used as they are"
        if snapshots
        else "give the folder that they lie in: of those below it, only those named after a step "
        "are looked into",
    )
