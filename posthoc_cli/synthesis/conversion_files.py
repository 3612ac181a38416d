"""The checkpoints in a run's folder: which files each is of, and what is left out, with why.

Folders named after a step are looked into: Trainer's `checkpoint-500/pytorch_model.bin`. Shards,
`pytorch_model-00001-of-00003.bin`, are one checkpoint. What belongs to training alone, or is of
step 0, is left out unless it is named by itself.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError, either
from posthoc_cli.formats.distributed import is_distributed
from posthoc_cli.formats.files import (
    ENDINGS,
    INDEX,
    KNOWN,
    list_checkpoints,
    of_training,
    shards_of,
    without_ending,
)
from posthoc_cli.snapshots import Pattern, choose_by_globs, read_name
from posthoc_cli.storage import ENDING, read_header
from posthoc_cli.storage.deltas import is_delta
from posthoc_cli.storage.metadata import PACKED
from posthoc_cli.storage.stores import is_file, is_folder, list_folder, same_file


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint: its name below the folder, what its snapshot is to be called, and its files.

    `path` is that of the only file, or of the index of several. `given` is whether the user named
    it, so that nothing is left out in silence.
    """

    name: str
    stem: str
    paths: tuple[Path, ...]
    path: Path
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
    if is_file(source):
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


def _listed(source: Path, output: Path) -> tuple[list[Found], list[tuple[str, str]]]:
    names = [n for n in list_folder(source, "give the folder of checkpoints") if n[0] != "."]
    folders = [name for name in names if is_folder(source / name)]
    files = [name for name in names if name not in folders]
    found = _grouped(source, "", files)
    others: list[tuple[str, str]] = []
    steps = []
    for name in folders:
        if same_file(source / name, output):
            continue
        inside, reason = _inside(source, name)
        bare = name.removesuffix("-state")  # kohya's `lora-000001-state` beside `lora-000001.ckpt`
        if bare != name and any(os.path.splitext(file)[0] == bare for file in files):
            inside, reason = [], f"a state of training, to go on from, beside '{bare}'"
        if inside:
            steps += inside
        else:
            others.append((name, reason))
    used = {path.name for one in found for path in (*one.paths, one.path)}
    for name in files:
        if name not in used and not (name.endswith(ENDING) and same_file(source, output)):
            others.append((name, _no_checkpoint(name)))
    if steps:  # the last one of all, as Trainer saves it once more
        last = [one for one in found if one.stem in KNOWN]
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


def _inside(source: Path, folder: str) -> tuple[list[Found], str]:
    """The checkpoints in a folder below the run's, or why there is none."""
    try:
        names = [name for name in list_folder(source / folder) if name[0] != "."]
    except MachineError as error:
        return [], f"a folder that {error.problem}"
    files = [name for name in names if not is_folder(source / folder / name)]
    found = _grouped(source, f"{folder}/", files)
    if not re.search("[0-9]", folder):
        return [], "a folder whose name says no step" if found else "a folder without checkpoints"
    if [one for one in found if of_training(one.paths[0].name) is None]:
        return found, ""
    if any(name.lower().endswith(ENDING) for name in files):
        return [], f"a folder with {ENDING} files, which can be used as they are"
    deeper = [name for name in names if name not in files]
    if any(name.startswith("global_step") for name in deeper):
        return [], "only DeepSpeed's parts: make one file of them with its zero_to_fp32.py"
    for below in deeper:
        path = source / folder / below
        if any(without_ending(name) in KNOWN for name in list_folder(path)):
            return [], f"a folder with checkpoints in '{below}', one deeper: give that folder"
    return [], "a folder without checkpoints"


def _grouped(source: Path, below: str, names: Iterable[str]) -> list[Found]:
    """The checkpoints among these files, shards put together; `below` is a folder, with a slash.

    Raises SnapshotError where shards are missing.
    """
    folder = source / below if below else source
    found = []
    names = list(names)
    for name in list_checkpoints(names):
        path = folder / name
        paths = shards_of(path) if name.endswith(INDEX) else [path]
        stem = below.removesuffix("/") or without_ending(name) or ""
        found.append(Found(below + name.removesuffix(INDEX), stem, tuple(paths), path))
    packed = [name for name in names if not below and _is_packed(folder / name)]
    return found + [
        Found(name, name[: -len(ENDING)], (folder / name,), folder / name) for name in packed
    ]


def _is_packed(path: Path) -> bool:
    """Whether a safetensors file is of a folder that was packed, a difference or not."""
    if not path.name.lower().endswith(ENDING):
        return False
    try:
        metadata = read_header(path).metadata
    except PosthocError:
        return False
    return PACKED in metadata or is_delta(metadata)


def _reason(one: Found, pattern: Pattern | None) -> str | None:
    """Why a file is left out, by its name alone; None if it isn't."""
    if reason := of_training(one.paths[0].name):
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
        known = [one for one in inside if without_ending(one.name.rpartition("/")[2]) in KNOWN]
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
    distributed = any(is_distributed(folder / name) for name in ("", *list_folder(folder)))
    remedy = (
        "give the folder that they lie in: of those below it, only those named after a step are "
        "looked into"
    )
    if distributed:
        remedy = "checkpoints of torch.distributed need no copy: synthesize reads them as they are"
    if snapshots:
        remedy = f"its {snapshots} {ENDING} files can be used as they are"
    return SnapshotError(str(folder), f"holds no {either(ENDINGS)} files", remedy)
