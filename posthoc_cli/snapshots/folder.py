"""A folder in, a consistent set of snapshots out.

Whatever is wrong with single files is collected, so that a user sees all of it at once.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from posthoc_cli.errors import (
    IncompleteError,
    MachineError,
    PosthocError,
    SnapshotError,
    UnknownError,
    UsageError,
    brief,
    printable,
)
from posthoc_cli.snapshots.identity import (
    MIN_SIGMA_REL,
    Identity,
    StepCounts,
    agree_on_unit,
    clues,
    identify,
)
from posthoc_cli.snapshots.lora import different_alphas
from posthoc_cli.snapshots.names import SAME_WIDTH, Pattern, compile_pattern, read_name
from posthoc_cli.solver.profiles import MAX_SIGMA_REL, Profile
from posthoc_cli.storage.header import Cache, TensorIndex, TensorInfo, reason
from posthoc_cli.storage.shards import ENDING, find_network, is_index, open_tensors, shard_names
from posthoc_cli.synthesis.recipe import read_recipe

_OTHER_FORMATS = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".npz")


@dataclass(frozen=True, slots=True)
class Contents:
    """What the tensors of a file add up to: `dtypes` counts tensors, `parameters` all elements."""

    dtypes: Mapping[str, int]
    parameters: int

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo]) -> Contents:
        dtypes = Counter(info.dtype for info in tensors.values())
        elements = sum(info.elements for info in tensors.values())
        return cls(dict(sorted(dtypes.items())), elements)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One EMA of the network at one step with one profile; `source` says how we know.

    A raw checkpoint is an EMA of no width: its gamma is infinite, its sigma_rel 0.
    `contents` is shared between snapshots that share their tensors mapping.
    """

    index: TensorIndex
    step: int
    gamma: float
    sigma_rel: float
    source: str
    contents: Contents | None = field(default=None, repr=False, compare=False)

    @property
    def file(self) -> str:
        """The name of the file in its folder, as it is: pass it through `printable` to show it."""
        return self.index.path.name

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype."""
        return dict((self.contents or Contents.of(self.index.tensors)).dtypes)

    @property
    def tensors(self) -> int:
        """How many tensors the file holds."""
        return len(self.index.tensors)

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors, whatever their dtype."""
        return (self.contents or Contents.of(self.index.tensors)).parameters

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return self.index.size

    @property
    def profile(self) -> Profile:
        return Profile(self.step, self.gamma)


@dataclass(slots=True)
class FolderContents:
    """What a folder holds. File names are as they are; all messages can go to a terminal.

    `snapshots` are those with a step and a profile, by step, sigma_rel and file name; with
    `problems`, that is not yet a set that can be summed: `usable` says so.
    """

    folder: Path
    snapshots: list[Snapshot] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def usable(self) -> list[Snapshot]:
        """The snapshots; raises SnapshotError if anything is wrong with any of them."""
        if self.problems:
            file, message = self.problems[0]
            problem, _, remedy = message.rpartition("; ")
            if more := len(self.problems) - 1:
                others = f"{more} more problem{'s' if more > 1 else ''}"
                remedy += f" (and {others}: posthoc inspect lists them)"
            raise SnapshotError(str(self.folder / file), problem, remedy)
        if not self.snapshots:
            raise SnapshotError(
                str(self.folder),
                f"holds no snapshots: all {len(self.skipped)} files are left out "
                f"('{self.skipped[0][0]}': {self.skipped[0][1]})",
                "give the folder that training wrote its snapshots to",
            )
        return self.snapshots


def read_folder(
    folder: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    profiles: Sequence[float] | None = None,
    only: Sequence[str] = (),
    raw: bool = False,
    skip_incomplete: bool = False,
) -> FolderContents:
    """Read the headers of the snapshots in `folder`: safetensors files, shards and folders.

    `pattern` is that of `compile_pattern`, `profiles` the sigma_rel values by index, `only` globs
    for the names of the files to use: no other is opened. `raw` says that they are no EMAs but
    plain checkpoints, of which only the steps are to be known. With `skip_incomplete`, files whose
    end is missing are left out instead of being problems. Names that start with a dot, as our
    unfinished outputs do, never count.

    Raises UsageError when an option or `folder` doesn't fit, SnapshotError when there is no
    .safetensors file, MachineError when one can't be read.
    """
    folder = Path(folder)
    compiled = compile_pattern(pattern, raw) if pattern is not None else None
    widths = () if raw else _check_profiles(profiles, compiled)
    inventory = FolderContents(folder)
    names = _choose(folder, _list(folder, inventory), only, compiled)
    if widths and not any(_has_index(folder / name, compiled) for name in names):
        inventory.warnings.append("profiles= isn't used: no file name has an index")
    headers: Cache = {}
    found: dict[str, tuple[TensorIndex, Identity, list[str]]] = {}
    unsettled: dict[str, tuple[TensorIndex, StepCounts]] = {}

    def leave_out(name: str, error: SnapshotError) -> None:
        if skip_incomplete and isinstance(error, IncompleteError):
            inventory.skipped.append((name, printable(f"incomplete: {error.problem}")))
        elif isinstance(error, UnknownError) and os.path.isdir(folder / name):
            inventory.skipped.append((name, f"a folder, and {error.problem}"))
        else:
            message = f"{error.problem}; {error.remedy}"
            inventory.problems.append((name, brief(printable(message))))

    for name in names:
        try:
            layout = _open(folder / name, headers)
            if recipe_of(layout) is not None:
                inventory.skipped.append((name, "made by posthoc: it carries a recipe"))
                continue
            title = _title(folder / name, compiled)
            if raw:
                unsettled[name] = layout, clues(title, layout.metadata, compiled)
            else:
                found[name] = layout, *identify(title, layout.metadata, compiled, widths)
        except SnapshotError as error:
            leave_out(name, error)
    settled = agree_on_unit({name: said for name, (_, said) in unsettled.items()})
    for name, outcome in settled.items():
        if isinstance(outcome, SnapshotError):
            leave_out(name, outcome)
        else:
            found[name] = unsettled[name][0], outcome, unsettled[name][1].warnings
    shared: dict[int, Contents] = {}
    for name, (layout, identity, warnings) in found.items():
        key = id(layout.tensors)
        if key not in shared:
            shared[key] = Contents.of(layout.tensors)
        inventory.snapshots.append(
            Snapshot(
                layout,
                identity.step,
                identity.gamma,
                identity.sigma_rel,
                identity.source,
                shared[key],
            )
        )
        inventory.warnings += [printable(f"{name}: {warning}") for warning in warnings]
    inventory.snapshots.sort(key=lambda each: (each.step, each.sigma_rel, each.file))
    for check in (_duplicates, _differences, _other_alphas):
        problems = check(inventory.snapshots)
        inventory.problems += [(file, brief(printable(message))) for file, message in problems]
    return inventory


def select(snapshots: Sequence[Snapshot], step: int | None) -> tuple[list[Snapshot], int]:
    """The snapshots not after the target step, and that step: by default the last snapshot's.

    Raises UsageError when `step` is after the last snapshot's or before the first's.
    """
    steps = [snapshot.step for snapshot in snapshots]
    if step is None:
        return list(snapshots), max(steps)
    if not min(steps) <= step <= max(steps):
        where = "after the last" if step > max(steps) else "before the first"
        raise UsageError(
            "step=", f"{step} is {where} snapshot's", f"give one from {min(steps)} to {max(steps)}"
        )
    return [snapshot for snapshot in snapshots if snapshot.step <= step], step


def recipe_of(layout: TensorIndex) -> dict[str, Any] | None:
    """The recipe in a file that posthoc made; None in any other."""
    return read_recipe(layout.metadata)


# Which files


def _list(folder: Path, inventory: FolderContents) -> list[str]:
    try:
        found = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        raise UsageError(str(folder), "there is no such folder", "check the path") from None
    except NotADirectoryError:
        raise UsageError(
            str(folder), "is not a folder", "give the folder it lies in, and only= its name"
        ) from None
    except OSError as error:
        raise MachineError(
            str(folder), f"cannot be listed ({reason(error)})", "check the folder's permissions"
        ) from None
    names, shards = [], set()
    for name in found:
        path = folder / name
        if os.path.isdir(path):
            held = _held_by(path)
            if held is None:
                names.append(name)
            elif held or name.lower().endswith(ENDING):
                inventory.skipped.append((name, held or "a folder, not a file"))
        elif is_index(name):
            names.append(name)
            with contextlib.suppress(PosthocError):  # what is wrong with it will be told
                shards |= shard_names(path)
        elif name.lower().endswith(ENDING):
            names.append(name)
    if not names and not inventory.skipped:
        raise _none_found(folder, found)
    return [name for name in names if name not in shards]


def _held_by(folder: Path) -> str | None:
    """Why a folder is no snapshot: None if it is one, "" if nothing in it looks like one."""
    try:
        if find_network(folder) is not None:
            return None
        count = sum(name.lower().endswith(ENDING) for name in os.listdir(folder))
    except OSError as error:
        return f"a folder that cannot be listed ({reason(error)})"
    return f"a folder with {count} {ENDING} files and not one index" if count else ""


def _title(path: Path, pattern: Pattern | None) -> str:
    """The name that says a snapshot's step and profile: an index's without its own ending.

    Folders have no ending: the conventions want one, a pattern of the user's is for what is there.
    """
    if is_index(path.name):
        return path.name[: -len(".index.json")]
    if pattern is None and not path.name.lower().endswith(ENDING):
        return path.name + ENDING
    return path.name


def _none_found(folder: Path, names: Iterable[str]) -> SnapshotError:
    endings = Counter(os.path.splitext(name)[1].lower() for name in names)
    for ending in _OTHER_FORMATS:
        if count := endings[ending]:
            return SnapshotError(
                str(folder),
                f"holds no {ENDING} files, but {count} {ending} file{'s' if count > 1 else ''}",
                "make snapshots of them with posthoc convert",
            )
    return SnapshotError(
        str(folder),
        f"holds no {ENDING} files",
        "give the folder that they lie in",
    )


def _choose(
    folder: Path, names: list[str], only: Sequence[str], pattern: Pattern | None
) -> list[str]:
    """Those of `names` that a glob of only= fits; raises UsageError for options that fit none."""
    if not names:
        return names
    example = f"none of {len(names)} {ENDING} files, such as '{names[0]}'"
    for glob in only:
        if not fnmatch.filter(names, glob):
            raise UsageError(
                "only=", f"'{glob}' fits {example}", "give file names, without their folder"
            )
    if only:
        names = [name for name in names if any(fnmatch.fnmatch(name, glob) for glob in only)]
        example = f"none of {len(names)} {ENDING} files, such as '{names[0]}'"
    titles = [_title(folder / name, pattern) for name in names]
    if pattern and not any(pattern.greedy.fullmatch(title) for title in titles):
        raise UsageError(
            "pattern=",
            f"'{pattern.text}' fits {example}",
            f"write it for the whole file name, {ENDING} included",
        )
    return names


def _check_profiles(profiles: Sequence[float] | None, pattern: Pattern | None) -> Sequence[float]:
    remedy = "list the sigma_rel values by index, such as profiles=[0.05, 0.10]"
    if pattern and ("index" in pattern.fields) != (profiles is not None):
        if profiles is None:
            raise UsageError("profiles=", "missing, as pattern= has {index}", remedy)
        raise UsageError("profiles=", "not used, as pattern= has no {index}", "leave it out")
    if profiles is None:
        return ()
    if not profiles:
        raise UsageError("profiles=", "lists nothing", remedy)
    for value in profiles:
        if not MIN_SIGMA_REL <= value < MAX_SIGMA_REL:
            raise UsageError("profiles=", f"{value:g} is not between 0 and 0.2887", remedy)
    return profiles


def _has_index(path: Path, pattern: Pattern | None) -> bool:
    if pattern is not None:
        return True  # profiles= would have been refused without {index}
    reading = read_name(_title(path, None))
    return reading is not None and reading.index is not None


def _open(path: Path, headers: Cache) -> TensorIndex:
    if os.path.islink(path) and not os.path.exists(path):
        raise SnapshotError(path.name, "a link that leads nowhere", "restore the file or remove it")
    layout = open_tensors(path, headers)
    if not layout.tensors:
        raise SnapshotError(path.name, "holds no tensors", "leave it out with only=")
    return layout


# A consistent set


def _duplicates(snapshots: Sequence[Snapshot]) -> Iterable[tuple[str, str]]:
    """Two of one step and profile: no weights could tell them apart."""
    for one, other in pairwise(snapshots):
        same_width = math.isclose(one.sigma_rel, other.sigma_rel, rel_tol=SAME_WIDTH)
        # Below gamma 0 there are two of each width.
        same_gamma = math.isclose(one.gamma + 1, other.gamma + 1, rel_tol=10 * SAME_WIDTH)
        if one.step == other.step and one.profile.raw:
            yield (
                other.file,
                f"has the step ({other.step}) of '{one.file}'; leave out one of the two with "
                "only=, or say with pattern= which number of the names it is",
            )
        elif one.step == other.step and same_width and same_gamma:
            yield (
                other.file,
                f"has the step ({other.step}) and profile (sigma_rel {other.sigma_rel:.4g}) of "
                f"'{one.file}'; leave out one of the two with only=",
            )


def _differences(snapshots: Sequence[Snapshot]) -> Iterable[tuple[str, str]]:
    """Snapshots whose tensors are not those of the newest."""
    if not snapshots:
        return
    newest = snapshots[-1]
    known: dict[int, str | None] = {id(newest.index.tensors): None}
    for snapshot in snapshots:
        tensors = snapshot.index.tensors
        if id(tensors) not in known:
            known[id(tensors)] = _difference(tensors, newest.index.tensors)
        if difference := known[id(tensors)]:
            yield (
                snapshot.file,
                f"{difference} in the newest snapshot, '{newest.file}'; "
                "leave out with only= what isn't of the same network",
            )


def _other_alphas(snapshots: Sequence[Snapshot]) -> Iterable[tuple[str, str]]:
    """LoRAs that aren't scaled as the newest is."""
    for snapshot, difference in different_alphas(snapshots):
        yield (
            snapshot.file,
            f"{difference} in the newest snapshot, '{snapshots[-1].file}'; "
            "leave out with only= what isn't of the same network",
        )


def _difference(tensors: Mapping[str, TensorInfo], newest: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor, by name, in which the two differ: `tensor 'w' is F32 [2] here and ...`."""

    def describe(info: TensorInfo | None) -> str:
        return "missing" if info is None else f"{info.dtype} {list(info.shape)}"

    for name in sorted(tensors.keys() | newest.keys()):
        here, there = describe(tensors.get(name)), describe(newest.get(name))
        if here != there:
            return f"tensor '{name}' is {here} here and {there}"
    return None
