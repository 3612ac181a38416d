"""Which training run each snapshot is of: those of two runs are of two networks.

Metadata tells: our own `run`, and the output's name, session and times that kohya's trainers write.
A run that was resumed has several sessions, one after the other; sessions whose steps overlap are
of two runs. Where no metadata tells, the files' times and the values may, but only raise doubts.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from posthoc_cli.errors import UsageError, printable, quoted
from posthoc_cli.snapshots.kinds import same_kind
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.storage import TensorIndex
from posthoc_cli.storage.metadata import NAME, RUN, SAVED, SESSION, STARTED

_SHOWN = 4
"""Runs, and files of each, that a message names."""

_BACK = 60.0
"""Seconds by which a later step's file may be the older one: copying takes time too."""

_FARTHER = 16.0
"""How many times the squared difference to a snapshot farther off the one to a neighbour may be.
Along one trajectory the farther one differs by as much or more."""

_FASTER = 100.0
"""How many times as much a step, squared, two neighbours may differ as any others, but the first
two: training begins fast."""


_ALIKE, _UNLIKE, _UNLIKE_FASTER = 0.9, 0.5, 3.0
"""Cosines: networks of two runs are hardly alike, neighbours along one trajectory are; so they
differ but this many times faster where there are many steps between."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What metadata says of the run that a file is of: "" or NaN where it says nothing."""

    run: str
    name: str
    session: str
    started: float
    saved: float

    @property
    def labels(self) -> set[str]:
        """What `run=` may call it by."""
        return {self.run, self.name, self.session} - {""}


def origin(metadata: Mapping[str, str]) -> Origin:
    def text(*keys: str) -> str:
        found = (metadata.get(key, "").strip() for key in keys)
        return next((value for value in found if value not in ("", "None")), "")

    def seconds(key: str) -> float:
        with contextlib.suppress(ValueError):
            return float(metadata.get(key, ""))
        return math.nan

    return Origin(text(RUN), text(NAME), text(SESSION, STARTED), seconds(STARTED), seconds(SAVED))


def other_runs(opened: Mapping[str, TensorIndex], run: str | None) -> list[tuple[str, str]]:
    """The files, by name, that are not of the run `run`, and why; none where it is None.

    `run` is a run id, a session id, an output's name, or the beginning of just one. Raises
    UsageError when no file, or more than one run, has it.
    """
    if run is None or not opened:
        return []
    origins = {name: origin(index.metadata) for name, index in opened.items()}
    files: dict[str, frozenset[str]] = {}
    for label in {label for each in origins.values() for label in each.labels}:
        files[label] = frozenset(name for name, each in origins.items() if label in each.labels)
    if not files:
        remedy = "leave it out, or choose files with only="
        raise UsageError("run=", f"'{run}' fits nothing: no file says its run", remedy)
    fitting = [run] if run in files else [label for label in files if run and label.startswith(run)]
    if len({files[label] for label in fitting}) != 1:
        fits = "fits more than one run" if fitting else "is none of the runs here"
        shown = [f"'{label}'" for label in sorted(fitting or files)]
        more = f" or {len(shown) - 12} more" if len(shown) > 12 else ""
        raise UsageError("run=", f"'{run}' {fits}", f"choose {', '.join(shown[:12])}{more}")
    chosen = files[fitting[0]]
    return [
        (name, "of another run" if each.labels else "its metadata doesn't say its run")
        for name, each in origins.items()
        if name not in chosen
    ]


def mixed_runs(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, str]]:
    """The first file of a second run and which files are of which, for snapshots in order."""
    origins = {each.file: origin(each.index.metadata) for each in snapshots}
    for kind, called in (("run", "runs"), ("name", "output names"), ("session", "sessions")):
        groups = _groups(snapshots, {file: getattr(one, kind) for file, one in origins.items()})
        if len(groups) < 2:
            continue
        why = _two_runs(groups, origins)
        if kind == "run" or why:
            listed = [_described(label, group) for label, group in groups.items()]
            if more := listed[_SHOWN:]:
                listed[_SHOWN:] = [f"{len(more)} more"]
            second = list(groups.values())[1]
            plain = [each for each in groups if each.isprintable() and "'" not in each]
            choice = f"'{plain[0]}', say" if plain else ""
            yield (
                second[0].file,
                f"not of the same run as the others: {len(groups)} {called} are mixed here"
                f"{', ' + why if why else ''}: {', '.join(listed)}; "
                f"choose one with run={choice}",
            )
            return


def doubts_of_runs(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, str]]:
    """What makes one doubt that snapshots in order are of one run, where nothing proves it."""
    origins = {each.file: origin(each.index.metadata) for each in snapshots}
    unsaid = [file for file, one in origins.items() if not one.labels]
    if unsaid and len(unsaid) < len(snapshots):
        yield (
            "",
            f"{len(unsaid)} of {len(snapshots)} snapshots don't say their run, as the others do: "
            f"{quoted(unsaid, _SHOWN)}; they are taken for the same run's",
        )
    names = _groups(snapshots, {file: one.name for file, one in origins.items()})
    if len(names) > 1:
        listed = ", then ".join(_described(label, group) for label, group in names.items())
        yield "", f"the output's name changes, and is taken for one run's, resumed: {listed}"
    sure = all(one.run or one.session for one in origins.values())
    if not sure and (back := _back_in_time(snapshots)):
        earlier, later, seconds = back
        yield (
            later.file,
            f"step {later.step}, but {_duration(seconds)} older than '{earlier.file}' of step "
            f"{earlier.step}: of two runs? (copies lose times)",
        )
    if not sure and (kinds := _kinds_of_names(snapshots)):
        listed = " and ".join(quoted([each.file for each in group], _SHOWN) for group in kinds)
        yield (
            "",
            f"steps of files that are named in two ways overlap: {listed}: of two runs? (only= and "
            "exclude= choose)",
        )


def jumps(
    snapshots: Sequence[Snapshot], differences: FloatArray, squares: FloatArray | None = None
) -> list[tuple[str, str]]:
    """A warning if two neighbours differ far more than one of them does from another beyond; or
    where they are not alike at all, as all others are.

    `differences` [snapshots, snapshots] and `squares` [snapshots] are means. Only snapshots of one
    profile are compared.
    """
    found = []
    for series in _series(snapshots):
        pairs = list(pairwise(series))
        gaps = [max(snapshots[b].step - snapshots[a].step, 1) for a, b in pairs]
        pace = [float(differences[pair]) / gap for pair, gap in zip(pairs, gaps, strict=True)]
        # Straight on, as training begins, the squared difference grows with the square of steps.
        straight = [each / gap for each, gap in zip(pace, gaps, strict=True)]
        alike = [1.0 if squares is None else _cosine(differences, squares, *pair) for pair in pairs]
        for at, (left, right) in enumerate(pairs):
            rest = alike[1:at] + alike[at + 1 :]
            faster = all(
                each[at] > _UNLIKE_FASTER * max(each[1:at] + each[at + 1 :], default=math.inf)
                for each in (pace, straight)
            )
            if at and faster and alike[at] < _UNLIKE and min(rest) > _ALIKE:
                found.append((left, right, pairs[alike.index(min(rest))]))
                continue
            others_pace = pace[:at] + pace[at + 1 :]
            slow = any(
                each[at] <= _FASTER * max(each[:at] + each[at + 1 :], default=0.0)
                for each in (pace, straight)
            )
            if at and len(pairs) > 3 and not slow and max(others_pace) > 0:
                found.append((left, right, pairs[pace.index(max(others_pace))]))
                continue
            others = [(left, far) for far in series[at + 2 : at + 4]]
            others += [(far, right) for far in series[max(at - 2, 0) : at]]
            between = differences[left, right]
            near = min(others, key=lambda pair: float(differences[pair]), default=None)
            if near is not None and between > _FARTHER * differences[near]:
                found.append((left, right, near))
    if not found:
        return []
    (left, right, near), more = found[0], len(found) - 1
    one, other = (snapshots[at] for at in (left, right))
    nearer, far = (snapshots[at] for at in near)
    also = f", and {more} more such" if more else ""
    return [
        (
            other.file,
            f"differs far more from '{one.file}', its neighbour, than '{nearer.file}' from "
            f"'{far.file}'{also}: of two runs, or broken? (only= and exclude= choose)",
        )
    ]


def _cosine(differences: FloatArray, squares: FloatArray, one: int, other: int) -> float:
    """Of the angle between two networks; 1 where there is none."""
    lengths = math.sqrt(float(squares[one]) * float(squares[other]))
    product = float(squares[one] + squares[other] - differences[one, other]) / 2
    return product / lengths if lengths > 0 else 1.0


def _groups(snapshots: Sequence[Snapshot], labels: Mapping[str, str]) -> dict[str, list[Snapshot]]:
    """The snapshots of each label, in the order of the first of each; those without one are in
    none."""
    groups: dict[str, list[Snapshot]] = {}
    for snapshot in snapshots:
        if label := labels[snapshot.file]:
            groups.setdefault(label, []).append(snapshot)
    return groups


def _two_runs(groups: Mapping[str, Sequence[Snapshot]], origins: Mapping[str, Origin]) -> str:
    """Why groups of snapshots can't be a run and how it was resumed; "" if they can."""
    last, saved, started = 0, -math.inf, -math.inf
    for group in groups.values():
        if group[0].step <= last:
            return "and their steps overlap"
        begun = min((origins[each.file].started for each in group), default=math.nan)
        if begun < max(saved, started):
            return "and the later steps' began before the earlier steps' ended"
        last = group[-1].step
        times = [origins[each.file].saved for each in group]
        saved = max([saved, *(time for time in times if time == time)])
        started = max([started, *([begun] if begun == begun else [])])
    return ""


def _described(label: str, group: Sequence[Snapshot]) -> str:
    shown = label if len(label) <= 40 else label[:40] + "..."
    first, last = group[0].step, group[-1].step
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"'{printable(shown)}' ({steps}: {quoted([each.file for each in group], _SHOWN)})"


def _back_in_time(snapshots: Sequence[Snapshot]) -> tuple[Snapshot, Snapshot, float] | None:
    """The first two snapshots of which the later step's was written earlier; by how much."""

    def written(snapshot: Snapshot) -> float:
        return max(file.modified for file in snapshot.index.files) / 1e9

    by_time = sorted(snapshots, key=written)
    shapes = {re.sub(r"[0-9]+", "0", each.file) for each in snapshots}
    if len(shapes) == 1 and [each.file for each in by_time] == sorted(s.file for s in snapshots):
        return None  # copied one after the other, in the order of their names
    newest: Snapshot | None = None
    for snapshot in snapshots:
        if newest is not None and snapshot.step > newest.step:
            seconds = written(newest) - written(snapshot)
            if seconds > _BACK:
                return newest, snapshot, seconds
        if newest is None or written(snapshot) > written(newest):
            newest = snapshot
    return None


def _kinds_of_names(snapshots: Sequence[Snapshot]) -> list[list[Snapshot]]:
    """Two kinds of names, but for their numbers, of files that are of one profile and overlap."""
    for series in _series(snapshots):
        kinds: dict[str, list[Snapshot]] = {}
        for at in series:
            kinds.setdefault(re.sub(r"[0-9]+", "0", snapshots[at].file), []).append(snapshots[at])
        several = [group for group in kinds.values() if len(group) > 1]
        for one, other in pairwise(several):
            if other[0].step <= one[-1].step:
                return [one, other]
    return []


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _series(snapshots: Sequence[Snapshot]) -> list[list[int]]:
    """The places of the snapshots of each profile, in order."""
    series: list[list[int]] = []
    for at, snapshot in enumerate(snapshots):
        for places in series:
            if same_kind(snapshots[places[0]].profile, snapshot.profile):
                places.append(at)
                break
        else:
            series.append([at])
    return series
