"""A folder in, a consistent set of snapshots out.

What is wrong with single files is collected, so that a user sees all of it at once.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from posthoc_cli.errors import (
    AmbiguousError,
    IncompleteError,
    LinkError,
    MachineError,
    NoNetworkError,
    SnapshotError,
    UnknownError,
    UsageError,
    in_line,
    printable,
)
from posthoc_cli.formats import (
    AS_USUAL,
    How,
    as_snapshot,
    is_distributed,
    open_network,
    without_ending,
)
from posthoc_cli.snapshots.chains import broken_links
from posthoc_cli.snapshots.choosing import choose
from posthoc_cli.snapshots.columns import Clock, doubted_profiles, file_times
from posthoc_cli.snapshots.consistency import different_dtypes, inconsistencies
from posthoc_cli.snapshots.copies import other_formats, settle_copies
from posthoc_cli.snapshots.doubts import doubts_of_kinds, other_decays
from posthoc_cli.snapshots.identity import Identity, identify
from posthoc_cli.snapshots.images import out_of_range
from posthoc_cli.snapshots.kinds import width
from posthoc_cli.snapshots.listing import MADE_BY_POSTHOC, folder_of, list_candidates, title
from posthoc_cli.snapshots.meaning import meaningless, misfitting
from posthoc_cli.snapshots.names import Pattern, beside_emas, read_name
from posthoc_cli.snapshots.raw import StepCounts, agree_on_unit
from posthoc_cli.snapshots.runs import doubts_of_runs, mixed_runs, other_runs
from posthoc_cli.snapshots.series import missing_steps
from posthoc_cli.snapshots.snapshot import Contents, Snapshot
from posthoc_cli.snapshots.telling import Telling, listen, tell
from posthoc_cli.snapshots.trained import Reading, Trained, explanations, settle_trained
from posthoc_cli.snapshots.wrappers import agree_on_names, describe_wrappers
from posthoc_cli.storage import Cache, TensorIndex
from posthoc_cli.storage.disk import is_gone
from posthoc_cli.storage.metadata import TOOL, read_recipe
from posthoc_cli.storage.stores import exists, file_status, is_folder, will_open

OF_STEP_0 = "of step 0, where training has not begun and nothing is averaged"

__all__ = ["Contents", "FolderContents", "Snapshot", "read_folder", "select"]


@dataclass(slots=True)
class FolderContents:
    """What a folder holds. File names are as they are; all messages can go to a terminal.

    `how` is how checkpoints of other tools were read. `snapshots` are those with a step and a
    profile, by step, width and file name; with `problems`, that is not yet a set that can be
    summed: `usable` says so. A warning that is about no single file has "" in its place.
    """

    folder: Path
    how: How = AS_USUAL
    snapshots: list[Snapshot] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    ambiguous: list[AmbiguousError] = field(default_factory=list)

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
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    pattern: str | None = None,
    profiles: Sequence[float] | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    run: str | None = None,
    raw: bool = False,
    ema_decay: float | None = None,
    skip_incomplete: bool = False,
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
    lora: str = "factors",
    key: str | None = None,
    tool: str = "auto",
    update_every: int | None = None,
) -> FolderContents:
    """Read what the snapshots in `folder` hold: files of any format, shards and folders.

    The arguments are those of `api.open_snapshots`, which raises the same. Names that start with a
    dot, as our unfinished outputs have, never count.
    """
    folder, given = folder_of(folder)
    told = tell(pattern, profiles, raw, ema_decay)
    compiled = told.pattern
    reading = Reading(compiled, told.profiles, How(key, tool), update_every)
    reading.check()
    deep = any("/" in each for each in (pattern or "", *only))
    choice = choose(list_candidates(folder, compiled, given, deep), only, exclude, compiled, given)
    names = choice.names
    will_open([folder / name for name in names])
    contents = FolderContents(folder, reading.how, skipped=choice.left_out)
    contents.problems += [(name, in_line(text)) for name, text in choice.problems]
    # With a pattern that has no {index}, profiles= has been refused.
    if told.profiles and compiled is None and not any(_has_index(name) for name in names):
        contents.warnings.append(("", "profiles= isn't used: no file name has an index"))
    headers: Cache = {}
    opened: dict[str, TensorIndex] = {}
    counts: dict[str, StepCounts] = {}
    found: dict[str, tuple[Identity, list[str]]] = {}
    unsaid: dict[str, TensorIndex] = {}
    trained: list[Trained] = []
    ask = asking(folder, names, told, reading, trained)
    failed: dict[str, SnapshotError] = {}
    broken: list[tuple[str, LinkError]] = []
    for name in names:
        if without_ending(name) and not raw and of_step_0(title(name, compiled), compiled):
            contents.skipped.append((name, OF_STEP_0))
            continue
        try:
            index = open_one(folder / name, headers, reading.how)
            if read_recipe(index.metadata) is not None:
                contents.skipped.append((name, MADE_BY_POSTHOC))
                continue
            opened[name] = index
            said = ask(name, index)
            if isinstance(said, StepCounts):
                counts[name] = said
                if not told.raw and TOOL in index.metadata:
                    trained.append(Trained(name, index.metadata[TOOL], None, None, False))
            else:
                found[name] = said
        except SnapshotError as error:
            if without_ending(name) or (name in opened and TOOL in opened[name].metadata):
                failed[name] = error
            if isinstance(error, UnknownError) and compiled is None:
                unsaid[name] = opened[name]
            if isinstance(error, LinkError) and not skip_incomplete:
                broken.append((name, error))
            else:
                _leave_out(contents, name, error, skip_incomplete)
    broken_links(contents.problems, broken)
    _say_once(contents, failed)
    if others := dict(other_runs(opened, run)):
        contents.skipped += others.items()
        contents.problems = [each for each in contents.problems if each[0] not in others]
        counts = {name: each for name, each in counts.items() if name not in others}
        found = {name: each for name, each in found.items() if name not in others}
        unsaid = {name: each for name, each in unsaid.items() if name not in others}
    for name, outcome in agree_on_unit(counts, clock_of(folder), bool(found)).items():
        if isinstance(outcome, SnapshotError):
            unsaid[name] = opened[name]
            _leave_out(contents, name, outcome, skip_incomplete)
        else:
            found[name] = outcome, counts[name].warnings
    decays = {getattr(each.profile, "beta", None) for each, _ in found.values()}
    if ema_decay is not None and found and ema_decay not in decays:
        reason = "names, metadata or a config.json say the profile of each file, and count"
        contents.warnings.append(("", f"ema_decay= isn't used: {reason}"))
    contents.warnings += _unwrap(opened, list(found))
    shared: dict[int, Contents] = {}
    for name, (identity, warnings) in found.items():
        index = opened[name]
        if id(index.tensors) not in shared:
            shared[id(index.tensors)] = Contents.of(index.tensors)
        which = identity.profile, identity.source, shared[id(index.tensors)]
        contents.snapshots.append(Snapshot(index, *which, name))
        contents.warnings += [(name, printable(warning)) for warning in warnings]
    contents.snapshots.sort(key=lambda each: (each.step, width(each.profile), each.file))
    settle_copies(contents, unsaid)
    other_formats(contents, failed)
    contents.warnings += [("", text) for text in explanations(trained, reading)]
    settled = (*copy, *drop)
    odd = list(misfitting(contents.snapshots, settled))
    wrong = list(mixed_runs(contents.snapshots))
    if not wrong:  # of two runs, anything may be different
        odd += doubts_of_runs(contents.snapshots)
        odd += doubts_of_kinds(contents.snapshots)
        odd += other_decays(folder, contents.snapshots)
        wrong += meaningless(contents.snapshots, settled)
        wrong += inconsistencies(contents.snapshots, settled, products=lora == "exact")
        odd += different_dtypes(contents.snapshots, settled)
    contents.problems += [(name, in_line(message)) for name, message in wrong]
    contents.warnings += [(name, in_line(message)) for name, message in odd]
    if not contents.problems and not exclude:  # of what was left out on purpose nothing is missing
        contents.warnings += [("", text) for text in missing_steps(contents.snapshots)]
    return contents


def select(snapshots: Sequence[Snapshot], step: int | None) -> tuple[list[Snapshot], int]:
    """The snapshots not after the target step, and that step: by default the last snapshot's.

    Raises UsageError when `step` is after the last snapshot's or before the first's.
    """
    steps = [snapshot.step for snapshot in snapshots]
    if step is None:
        return list(snapshots), max(steps)
    if not min(steps) <= step <= max(steps):
        where = "after the last" if step > max(steps) else "before the first"
        problem = f"{step} is {where} snapshot's"
        raise UsageError("step=", problem, out_of_range(snapshots, step))
    return [snapshot for snapshot in snapshots if snapshot.step <= step], step


def asking(
    folder: Path,
    names: Sequence[str],
    told: Telling,
    reading: Reading,
    trained: list[Trained],
) -> Callable[[str, TensorIndex], StepCounts | tuple[Identity, list[str]]]:
    """What asks a network of `folder`, one of `names`, for its average: see `listen`.

    What the tool of a checkpoint was asked for in training is added to `trained`.
    """
    doubts = {}
    if told.pattern is None:
        doubts = doubted_profiles(names, [file_times(names, clock_of(folder))])
    beside = beside_emas(map(as_snapshot, names))

    def ask(name: str, index: TensorIndex) -> StepCounts | tuple[Identity, list[str]]:
        called, doubt, first = title(name, told.pattern), doubts.get(name), index.files[0].path
        settle = partial(identify, called, index.metadata, told.pattern, told.profiles, doubt)
        if TOOL in index.metadata:
            settle = partial(settle_trained, trained, name, called, index.metadata, reading, doubt)
        return listen(
            first.relative_to(folder).as_posix(),
            *(called, index, told, settle, doubt),
            plain=as_snapshot(name) in beside,
            own_folder=first.parent != folder or len(names) == 1,
        )

    return ask


def open_one(path: Path, headers: Cache, how: How) -> TensorIndex:
    """The index of the network at `path`. Raises SnapshotError also for what is gone, or empty."""
    try:
        index = open_network(path, how, headers)
    except (MachineError, UsageError) as error:
        if exists(path) and not is_gone(error):
            raise
        problem = "vanished while the folder was read"
        remedy = "read the folder again, or use skip_incomplete=True"
        raise IncompleteError(path.name, problem, remedy) from None
    if not index.tensors:
        raise SnapshotError(path.name, "holds no tensors", "leave it out with only=")
    return index


def _leave_out(
    contents: FolderContents, name: str, error: SnapshotError, skip_incomplete: bool
) -> None:
    """Note why a file is no snapshot: as a problem, or as skipped where that is no mistake."""
    if isinstance(error, AmbiguousError):
        if error in contents.ambiguous:  # one error of several files
            return
        contents.ambiguous.append(error)
    if skip_incomplete and isinstance(error, IncompleteError):
        contents.skipped.append((name, printable(f"incomplete: {error.problem}")))
    elif isinstance(error, NoNetworkError):
        contents.skipped.append((name, printable(error.problem)))
    elif isinstance(error, UnknownError) and _may_be_other(contents.folder / name):
        contents.skipped.append((name, f"a folder, and {error.problem}"))
    else:
        message = f"{in_line(error.problem)}; {error.remedy}"
        contents.problems.append((name, in_line(message)))


def _may_be_other(path: Path) -> bool:
    """Whether a network that nothing is said of may be none of the snapshots: one of a folder."""
    return is_folder(path) and not is_distributed(path)


def _say_once(contents: FolderContents, failed: Mapping[str, SnapshotError]) -> None:
    """Make one problem of the same choice that several checkpoints leave to the user."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, error in failed.items():
        if "key=" in error.remedy:
            alike[error.problem, error.remedy].append(name)
    for (problem, remedy), (first, *others) in alike.items():
        if others:
            more = f", as {len(others)} more do" if others[1:] else ", as one more does"
            left = {first, *others}
            contents.problems[:] = [each for each in contents.problems if each[0] not in left]
            contents.problems.append((first, in_line(f"{problem}{more}; {remedy}")))


def _unwrap(opened: dict[str, TensorIndex], names: Sequence[str]) -> list[tuple[str, str]]:
    """Give the tensors of wrapped networks their own names where others have those; a warning."""
    indexes, places = agree_on_names([opened[name] for name in names])
    if not places:
        return []
    wrappers = describe_wrappers([name for at in places for name in opened[names[at]].tensors])
    opened.update(zip(names, indexes, strict=True))
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return [
        (
            "",
            f"'{printable(names[places[0]])}'{more}: the names of tensors have {wrappers} in them, "
            "as those of other files don't; it is left out",
        )
    ]


def clock_of(folder: Path) -> Clock:
    """When a file of `folder` was written."""

    def written(name: str) -> float | None:
        status = file_status(folder / name)
        return status.modified / 1e9 if status else None

    return written


def of_step_0(name: str, pattern: Pattern | None) -> bool:
    """Whether a title says step 0: see OF_STEP_0."""
    try:
        named = read_name(name, pattern)
    except SnapshotError:  # told where it is read again
        return False
    return named is not None and named.step == 0


def _has_index(name: str) -> bool:
    reading = read_name(title(name, None))
    return reading is not None and reading.index is not None
