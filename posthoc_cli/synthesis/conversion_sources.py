"""The checkpoints in a folder: listed, chosen and read as every command does.

But a plain safetensors file needs no copy, and counts as if it weren't there; and a checkpoint that
nothing says a profile of is good too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from posthoc_cli.errors import (
    IncompleteError,
    MachineError,
    NoNetworkError,
    PosthocError,
    SnapshotError,
    UnknownError,
    either,
    in_line,
)
from posthoc_cli.formats import (
    DEFAULT_UPDATE_EVERY,
    How,
    index_of_shard,
    of_training,
    without_ending,
)
from posthoc_cli.formats.files import ENDINGS, INDEX
from posthoc_cli.snapshots import FolderContents, Identity, Pattern, read_name
from posthoc_cli.snapshots.choosing import choose
from posthoc_cli.snapshots.folder import OF_STEP_0, asking, clock_of, of_step_0, open_one
from posthoc_cli.snapshots.identity import whole_number
from posthoc_cli.snapshots.listing import (
    MADE_BY_POSTHOC,
    Listing,
    folder_of,
    list_candidates,
    title,
)
from posthoc_cli.snapshots.raw import StepCounts, agree_on_unit
from posthoc_cli.snapshots.runs import other_runs
from posthoc_cli.snapshots.telling import Telling
from posthoc_cli.snapshots.trained import Reading, Trained
from posthoc_cli.storage import ENDING, Cache, TensorIndex, read_header
from posthoc_cli.storage.deltas import is_delta
from posthoc_cli.storage.metadata import PACKED, STEP, TOOL, read_recipe
from posthoc_cli.storage.places import File
from posthoc_cli.storage.shards import INDEX_ENDING, is_index, list_networks, stem_of_shard
from posthoc_cli.storage.stores import is_folder, list_folder, same_file, will_open


@dataclass(frozen=True, slots=True)
class Options:
    """How to read checkpoints and what to make of them.

    `kind` is one of KINDS or "auto"; `dtype` "same" or one of OUTPUT_DTYPES; `profiles` the
    sigma_rel values by index; the others are as `read_folder` has them.
    """

    kind: str = "auto"
    dtype: str = "same"
    update_every: int | None = None
    profiles: Sequence[float] = ()
    pattern: Pattern | None = None
    key: str | None = None
    raw: bool = False
    ema_decay: float | None = None
    run: str | None = None
    skip_incomplete: bool = False

    @property
    def told(self) -> Telling:
        return Telling(self.pattern, self.profiles, self.raw, self.ema_decay)

    @property
    def reading(self) -> Reading:
        how = How(self.key, self.kind)
        return Reading(self.pattern, self.profiles, how, self.update_every)


@dataclass(frozen=True, slots=True)
class Job:
    """The checkpoint at `source`, what was read of it, and the snapshot to make of it.

    `name` is where it lies below the folder, `known` what the listing calls it. Of what is `given`,
    that is named by the user, nothing is left out. `identity` and `step` are None where nothing
    says them; `asked` is what its tool was asked for in training, where that is known. `error` is
    why it can't be used; `done` the snapshot, if it was made before.
    """

    name: str
    known: str
    source: Path
    output: Path
    given: bool
    index: TensorIndex | None = None
    identity: Identity | None = None
    asked: Identity | None = None
    step: int | None = None
    warnings: tuple[str, ...] = ()
    error: SnapshotError | MachineError | None = None
    done: Converted | None = None

    @property
    def in_short(self) -> str:
        """Its name; of the one network in a folder that folder's."""
        return min(self.known, self.name, key=len)

    @property
    def tool(self) -> str:
        return self.index.metadata.get(TOOL, "torch") if self.index else "torch"

    @property
    def numbered(self) -> bool:
        """Whether its name may say its step: `last.ckpt` and `model_best.pth.tar` do not."""
        return re.search("[0-9]", self.name) is not None

    @property
    def files(self) -> Sequence[File]:
        """Those that the checkpoint is in; none where it couldn't be read."""
        if self.index is None:
            return ()
        return self.index.links[-1].index.files if self.index.links else self.index.files

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def indexed(self) -> bool:
        """Whether its name has an index, which profiles= says the width of."""
        named = read_name(title(self.known, None))
        return named is not None and named.index is not None


@dataclass(frozen=True, slots=True)
class Converted:
    """The snapshot of `bytes` bytes that `job` is for; `seconds` is None if it was made before."""

    job: Job
    dtypes: Mapping[str, int]
    parameters: int
    bytes: int
    seconds: float | None
    warnings: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        return sum(self.dtypes.values())


def find_checkpoints(
    source: Path,
    folder: Path,
    options: Options,
    only: Sequence[str],
    exclude: Sequence[str],
    left_out: list[tuple[str, str]],
) -> list[Job]:
    """The jobs of `find_jobs`, which raises the same, but not yet what was made before."""
    below, found = _find(source, folder, options, only, exclude, left_out)
    jobs = _read(below, found, options, left_out)
    left_out.sort()
    if not jobs:
        raise SnapshotError(
            str(source),
            f"holds no checkpoint: all {len(left_out)} files are left out "
            f"('{left_out[0][0]}': {left_out[0][1]})",
            "give the folder that training wrote its checkpoints to, or one file",
        )
    return jobs


# Which there are


def _find(
    source: Path,
    output: Path,
    options: Options,
    only: Sequence[str],
    exclude: Sequence[str],
    left_out: list[tuple[str, str]],
) -> tuple[Path, list[Job]]:
    """The folder that `source` is or lies in, and the checkpoints in it that are to be opened."""
    folder, given = folder_of([source])
    plain: set[Path] = set()
    pattern = options.pattern
    deep = any("/" in each for each in (pattern.text if pattern else "", *only))
    try:
        listing = list_candidates(folder, pattern, given, deep, partial(_needing_copies, plain))
    except SnapshotError as error:
        raise _none_found(source, given is not None, plain, error) from None
    choice = choose(listing, only, exclude, pattern, given)
    if choice.problems:
        FolderContents(folder, problems=choice.problems).usable()
    every = [*listing.networks, *listing.others]
    places = {name: each.place for each in every for name in (each.path, each.name)}
    jobs = []
    for known in choice.names:
        place = places[known]
        name = place.removesuffix(INDEX)
        named = given is not None or not {known, name, place}.isdisjoint(only)
        job = Job(name, known, folder / place, output / title(known, None), named)
        reason = None if named else of_training(job.source.name)
        begun = named or options.raw or not of_step_0(title(known, pattern), pattern)
        if reason or not begun:
            left_out.append((name, reason or OF_STEP_0))
        else:
            jobs.append(job)
    left_out += [each for each in choice.left_out if each[0] not in choice.names]
    if not (given or only or exclude):
        left_out += _others(folder, output, listing, plain)
    return folder, jobs


def _needing_copies(plain: set[Path], folder: Path, names: list[str]) -> list[str]:
    """Those of `names` but for whole safetensors files, which are added to `plain`."""
    found, _ = list_networks(folder, [name for name in names if not name.startswith(".")])
    usable = {name for name in found if not is_index(name) and not _is_packed(folder / name)}
    plain |= {folder / name for name in usable}
    return [name for name in names if name not in usable]


def _plain(path: Path) -> str:
    """Why a safetensors file is left out: it needs no copy, or can't be read."""
    try:
        read_header(path)
    except PosthocError as error:
        return error.problem
    return f"a {ENDING} file, which can be used as it is"


def _is_packed(path: Path) -> bool:
    """Whether a safetensors file is of a folder that was packed, a difference or not."""
    try:
        metadata = read_header(path).metadata
    except PosthocError:
        return False
    return PACKED in metadata or is_delta(metadata)


def _none_found(
    source: Path, given: bool, plain: Collection[Path], error: SnapshotError
) -> SnapshotError:
    if given and plain:
        problem = f"is a {ENDING} file, which can be used as it is"
        return SnapshotError(str(source), problem, "give a checkpoint of another kind")
    if given:
        remedy = f"give one that ends in {either(ENDINGS)}, or the folder of checkpoints"
        return SnapshotError(str(source), "is not a checkpoint, by its ending", remedy)
    remedy = f"its {len(plain)} {ENDING} files can be used as they are" if plain else error.remedy
    return SnapshotError(str(source), f"holds no {either(ENDINGS)} files", remedy)


def _others(
    folder: Path, output: Path, listing: Listing, plain: Collection[Path]
) -> Iterator[tuple[str, str]]:
    """What lies in the folder beside the networks of its listing, and why it is left out."""
    paths = [*(each.path for each in listing.networks), *(name for name, _ in listing.left_out)]
    told = {path.split("/")[0] for path in paths}
    for name in list_folder(folder):
        path = folder / name
        index = index_of_shard(name) or stem_of_shard(name) + INDEX_ENDING
        if name.startswith(".") or name in told or index in told or same_file(path, output):
            continue
        if path in plain:
            if not same_file(folder, output):
                yield name, _plain(path)
        elif is_folder(path):
            usable = any(path in each.parents for each in plain)
            files = f"with {ENDING} files, which can be used as they are"
            yield name, f"a folder {files if usable else 'without checkpoints'}"
        elif without_ending(name):
            yield name, of_training(name) or f"beside {ENDING} files: give it by itself"
        else:
            yield name, "not a checkpoint, by its ending"


# What each is


def _read(
    folder: Path, jobs: Sequence[Job], options: Options, left_out: list[tuple[str, str]]
) -> list[Job]:
    """Those of `jobs` that are for networks, by name, with what was read of them."""
    will_open([job.source for job in jobs])
    cache: Cache = {}
    opened = [_open(job, options, cache) for job in jobs]
    indexes = {job.name: job.index for job in opened if job.index is not None}
    reasons = dict(other_runs(indexes, options.run))
    reasons |= {job.name: told for job in opened if (told := _no_network(job, options))}
    opened = [job for job in opened if job.name not in reasons]
    found = sorted(_identify(opened, folder, options), key=lambda job: job.name)
    reasons |= {job.name: told for job in found if (told := _copy_of_another(job, found, options))}
    left_out += reasons.items()
    return [job for job in found if job.name not in reasons]


def _open(job: Job, options: Options, cache: Cache) -> Job:
    hows = [options.reading.how]
    if job.given and options.kind == "auto":
        hows.append(How(options.key, "torch"))  # says what it holds instead of a network
    for how in hows:
        try:
            return replace(job, index=open_one(job.source, cache, how), error=None)
        except NoNetworkError as error:
            job = replace(job, error=error)
        except (SnapshotError, MachineError) as error:
            return replace(job, error=error)
    return job


def _no_network(job: Job, options: Options) -> str | None:
    """Why what was opened is left out; None if it isn't."""
    if isinstance(job.error, IncompleteError) and options.skip_incomplete:
        return f"incomplete: {job.error.problem}"
    if job.given:
        return None
    if isinstance(job.error, NoNetworkError):
        return job.error.problem
    made = job.index is not None and read_recipe(job.index.metadata) is not None
    return MADE_BY_POSTHOC if made else None


def _identify(jobs: Sequence[Job], folder: Path, options: Options) -> Iterator[Job]:
    """The same with their steps and averages; raises nothing."""
    trained: list[Trained] = []
    names = [job.known for job in jobs]
    ask = asking(folder, names, options.told, options.reading, trained)
    found: dict[str, Job] = {}
    counts: dict[str, StepCounts] = {}
    for job in jobs:
        found[job.known] = job
        try:
            said = ask(job.known, job.index) if job.index else None
        except SnapshotError as error:
            found[job.known] = _unidentified(job, error, options)
            continue
        if isinstance(said, StepCounts):
            counts[job.known] = said
        elif said:
            found[job.known] = _identified(job, *said)
    stepped = any(job.identity for job in found.values())
    agreed = agree_on_unit(counts, clock_of(folder), stepped)
    for known, each in counts.items():
        outcome = agreed.get(known)
        if isinstance(outcome, Identity):
            found[known] = _identified(found[known], outcome, each.warnings)
        else:
            problem = in_line(outcome.problem) if outcome else "its name doesn't say which step"
            remedy = outcome.remedy if outcome else "give pattern=, or leave it out with only="
            unknown = UnknownError(known, problem, remedy)
            found[known] = _unidentified(found[known], unknown, options, problem)
    asked = {one.name: one.asked for one in trained}
    return (replace(job, asked=asked.get(known)) for known, job in found.items())


def _identified(job: Job, identity: Identity, warnings: Sequence[str]) -> Job:
    return replace(job, identity=identity, step=identity.step, warnings=tuple(warnings))


def _unidentified(
    job: Job, error: SnapshotError, options: Options, lacking: str = "nothing says its profile"
) -> Job:
    """Without a profile, where it need not have one: what isn't an EMA has none."""
    # Of a library's checkpoint, an average by a fixed decay has none; who names it, knows it.
    of_library = job.tool in DEFAULT_UPDATE_EVERY and options.kind == "auto"
    sure = options.pattern is not None or options.told.of_all or of_library
    if sure or not isinstance(error, UnknownError):
        return replace(job, error=error)
    assert job.index is not None
    step = whole_number(job.index.metadata.get(STEP, ""))
    named = read_name(title(job.known, None))
    if step is None and named is not None and named.index is not None:
        step = named.step
    told = f"{lacking}, so it is only good for raw=True: give pattern= if it is an EMA"
    return replace(job, step=step or None, warnings=(told,))


def _copy_of_another(job: Job, jobs: Sequence[Job], options: Options) -> str | None:
    """Why one such as last.ckpt is left out, which seems a copy of another; None if it isn't."""
    others = [each for each in jobs if each.numbered and each.error is None]
    of_all = options.told.of_all and options.pattern is None
    unsure = job.error is None or (of_all and isinstance(job.error, UnknownError))
    if job.numbered or job.given or not unsure or not others:
        return None
    if job.step is None:
        below = any("/" in each.name for each in others)
        beside = "the folders of steps" if below else "files whose names have numbers"
        return f"nothing says its step, beside {beside}: give it by itself"
    for each in others:
        alike = job.identity is None or job.identity == each.identity
        if each.step == job.step and alike:
            return f"of step {job.step}, as '{each.name}' is"
    return None
