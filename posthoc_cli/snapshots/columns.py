"""Which of the numbers in the names of a folder's files is the step: they are read together.

Of names that have the same text between their numbers, the numbers that stand at one place are a
column. One that is constant (a seed, a network's dimension) says nothing; words go before numbers
without one; of those that are different in each file, one that goes back in time is no step. If
more than one is left, and they lead to other weights, nobody can know: AmbiguousError.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from posthoc_cli.errors import AmbiguousError, SnapshotError, UnknownError, UsageError, either
from posthoc_cli.snapshots.counts import (
    EPOCH,
    NUMBER,
    SCALED,
    STEP,
    Count,
    find_counts,
    in_thousands,
    stem_of,
)
from posthoc_cli.snapshots.names import MAX_NAMED_GAMMA, SD_SCRIPTS, compile_pattern, read_name

Clock = Callable[[str], float | None]
"""What is known of when a file was written, by its name: later is more."""

_MOST_GAMMAS = 6
_SAME_RATIO = 1e-3
_COPYING = 0.5
"""Files whose times are less than these seconds apart, on average, are copies: their order is
that of copying."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A file's name and its numbers that count."""

    file: str
    stem: str
    counts: tuple[Count, ...]

    @property
    def form(self) -> tuple[str, ...]:
        """What names of one kind have in common: the units, and the text between the numbers."""
        units = [NUMBER if count.unit == SCALED else count.unit for count in self.counts]
        texts = [self.stem[one.end : other.start] for one, other in pairwise(self.counts)]
        return *units, *(re.sub("[0-9.]+", "#", text) for text in texts)


@dataclass(frozen=True, slots=True)
class _Column:
    """The numbers at one place of several names."""

    place: int
    unit: str
    values: tuple[int, ...]

    @property
    def varies(self) -> bool:
        return len(set(self.values)) > 1

    @property
    def distinct(self) -> bool:
        return len(set(self.values)) == len(self.values)


class _Unclear(Exception):
    """More than one column may be the step."""

    def __init__(self, columns: Sequence[_Column]) -> None:
        super().__init__()
        self.columns = columns


def read_together(
    files: Sequence[str], clocks: Sequence[Clock] = (), written: Clock | None = None
) -> tuple[dict[str, dict[str, int]], list[AmbiguousError], dict[str, str]]:
    """What the names of raw checkpoints count, as `read_counts` has it, read together.

    And what can be read in more than one way: an error for each kind of names, which lists them
    in its `rows`; they are in the first as they would be without the others. And warnings, by file.
    `clocks` count training, `written` gives the times of files.
    """
    said: dict[str, dict[str, int]] = {}
    unclear, warnings = [], {}
    forms = _of_one_form(_without_heads(_named(files)))
    epochs: list[tuple[_Column, _Column]] = []
    for names in forms:
        columns, times = _columns(names), _times(names, clocks)
        try:
            chosen = _decide(columns, times)
        except _Unclear as error:
            try:
                if written is None:
                    raise
                chosen = _decide(columns, times + _times(names, [written]))
                warnings[names[0].file] = _by_time(names, error.columns, chosen)
            except _Unclear as error:
                unclear.append(_ambiguous(names, error.columns))
                chosen = {column.unit: column for column in columns}
        for row, name in enumerate(names):
            said[name.file] = {unit: column.values[row] for unit, column in chosen.items()}
        if (step := chosen.get(NUMBER)) and len(chosen) == 1:
            epochs += [(each, step) for each in columns if each.varies and _far_below(each, step)]
    for names in forms:
        numbers = [said[name.file].get(NUMBER, 0) for name in names]
        # Beside checkpoint_1_400 and checkpoint_2_1200, checkpoint2 is of an epoch.
        if any(0 < min(numbers) ** 2 < max(one.values) * min(step.values) for one, step in epochs):
            for name, number in zip(names, numbers, strict=True):
                said[name.file] = {EPOCH: number}
    return said, unclear, warnings


def from_zero(unit: str, values: Iterable[int]) -> bool:
    """Whether numbers of names count what has been saved from 0 on: 0, 1, 2.

    0, 500, 1000 are steps: the first is the network before training.
    """
    known = sorted(set(values))
    together = functools.reduce(math.gcd, known, 0)
    return bool(known) and known[0] == 0 and unit != STEP and (unit == EPOCH or together <= 1)


def doubted_profiles(
    files: Sequence[str], clocks: Sequence[Clock] = ()
) -> dict[str, SnapshotError]:
    """Of names by sd-scripts' convention, those that can't be believed, and why not."""
    doubted: dict[str, SnapshotError] = {}
    groups: dict[tuple[str, bool], list[tuple[str, re.Match[str]]]] = defaultdict(list)
    for file in files:
        if match := SD_SCRIPTS.fullmatch(stem_of(file) + ".safetensors"):
            before = re.sub("[0-9.]+", "#", match[0][: match.start("step")])
            groups[before, match["gamma"].isdigit()].append((file, match))
    for (_, whole), members in groups.items():
        if not _are_gammas([(int(m["step"]), m["gamma"]) for _, m in members], whole):
            for file, match in members:
                doubted[file] = _no_profile(file, match, whole)
            continue
        stems = {file: match[0][: match.end("step")] for file, match in members}
        names = [_Name(file, stem, tuple(find_counts(stem))) for file, stem in stems.items()]
        for group in _of_one_form(names):
            # Several gammas of one step are one row.
            rows = {tuple(count.value for count in name.counts): name for name in reversed(group)}
            if error := _other_step(list(rows.values())[::-1], clocks):
                doubted |= dict.fromkeys((name.file for name in group), error)
    return doubted


def _are_gammas(found: Sequence[tuple[int, str]], whole: bool) -> bool:
    """Whether the last of two numbers may be a gamma: trackers have few, and save all at a step."""
    steps: dict[str, set[int]] = defaultdict(set)
    for step, gamma in found:
        steps[gamma].add(step)
    largest = max(map(float, steps))
    all_steps = set().union(*steps.values())
    once_a_step = len(found) == len(all_steps) > 1 and len(steps) > 1
    if whole:
        return not (
            largest > MAX_NAMED_GAMMA
            or len(steps) > _MOST_GAMMAS
            or once_a_step
            or len(found) == len(steps) > 1 < len(all_steps)
            or largest >= max(all_steps) > 0
        )
    repeated = all(len(each) > 1 for each in steps.values())
    if len(steps) > _MOST_GAMMAS:
        return repeated
    return not (once_a_step and len(steps) == len(found) > 2)


def _no_profile(file: str, match: re.Match[str], whole: bool) -> SnapshotError:
    step, gamma = match["step"], match["gamma"]
    return UnknownError(
        file,
        f"its name says two counts, {step} and {gamma}, and no profile"
        if whole
        else f"its name says {step} and {gamma}, which is no gamma: no two files share it",
        "add raw=True if it is a plain checkpoint and no EMA, else give pattern=, "
        "or leave it out with only=",
    )


def _other_step(names: Sequence[_Name], clocks: Sequence[Clock]) -> AmbiguousError | None:
    """Of names with a gamma: the error where the number before it need not be the step."""
    columns = _columns(names)
    if len(names) < 2 or not columns:
        return None
    last = columns[-1]
    if names[0].counts[-1].end != len(names[0].stem) or not last.varies:
        return None
    try:
        chosen = _decide(columns, _times(names, clocks))
    except _Unclear as error:
        return _ambiguous(names, error.columns, "_{gamma}")
    other = chosen.get(STEP) or chosen.get(NUMBER)
    if other in (None, last) or _proportional(other, last):
        return None
    return _ambiguous(names, (other, last), "_{gamma}")


# Names


def _named(files: Sequence[str]) -> list[_Name]:
    names = [_Name(file, stem_of(file), tuple(find_counts(stem_of(file)))) for file in files]
    named = []
    for group in _of_one_form(names):
        counts = in_thousands([(name.stem, name.counts) for name in group])
        named += [_Name(one.file, one.stem, each) for one, each in zip(group, counts, strict=True)]
    return named


def _without_heads(names: list[_Name]) -> list[_Name]:
    """The names without the counts that are a part of what all names of a kind begin with.

    Beside style_64-000001 and style_64-000002, style_64 is no step 64.
    """
    heads = set()
    for group in _of_one_form(names):
        columns = _columns(group)
        if any(column.varies for column in columns):
            for column in columns:
                ends = {each.stem[: each.counts[column.place].end] for each in group}
                heads |= ends if len(ends) == 1 else set()
    return [
        _Name(
            each.file,
            each.stem,
            tuple(count for count in each.counts if each.stem[: count.end] not in heads),
        )
        for each in names
    ]


def _of_one_form(names: Sequence[_Name]) -> list[list[_Name]]:
    groups: dict[tuple[str, ...], list[_Name]] = defaultdict(list)
    for name in names:
        groups[name.form].append(name)
    return list(groups.values())


def _columns(names: Sequence[_Name]) -> list[_Column]:
    """The columns of names of one form; of 5k and 8k only what varies."""
    columns = []
    for place, counts in enumerate(zip(*(name.counts for name in names), strict=True)):
        units = {count.unit for count in counts}
        values = tuple(count.value for count in counts)
        column = _Column(place, NUMBER if SCALED in units else counts[0].unit, values)
        if SCALED not in units or column.varies:
            columns.append(column)
    return columns


def _times(names: Sequence[_Name], clocks: Sequence[Clock]) -> list[list[float | None]]:
    return [[clock(name.file) for name in names] for clock in clocks]


def file_times(files: Sequence[str], written: Clock) -> Clock:
    """The times at which `files` were written, unless they are those of copying."""
    times = {file: written(file) for file in files}
    known = [time for time in times.values() if time is not None]
    if len(known) < 2 or max(known) - min(known) < _COPYING * (len(known) - 1):
        return lambda file: None
    return times.get


# Columns


def _decide(columns: Sequence[_Column], times: Sequence[list[float | None]]) -> dict[str, _Column]:
    """The column of each unit, of those that say something. Raises _Unclear."""
    varying = [column for column in columns if column.varies]
    if not varying:
        return _last_of_each(columns)
    of = {unit: [each for each in varying if each.unit == unit] for unit in (STEP, EPOCH, NUMBER)}
    for step in of[STEP]:
        for epoch in of[EPOCH]:
            # Steps that go back from one epoch to the next are counted within it.
            if (step.distinct or epoch.distinct) and _crossed(step.values, epoch.values):
                raise _Unclear((step, epoch))
    said = {unit: _one_of(of[unit], times) for unit in (STEP, EPOCH) if of[unit]}
    if any(column.distinct for column in said.values()):
        return said | ({NUMBER: of[NUMBER][-1]} if of[NUMBER] else {})
    numbers = [
        number
        for number in of[NUMBER]
        if number.distinct and not any(_crossed(number.values, e.values) for e in of[EPOCH])
    ]
    return {NUMBER: _one_of(numbers, times)} if numbers else _last_of_each(varying)


def _last_of_each(columns: Sequence[_Column]) -> dict[str, _Column]:
    said: dict[str, _Column] = {}
    for column in columns:
        said.pop(NUMBER, None)  # as read_counts has it
        said[column.unit] = column
    return said


def _one_of(columns: Sequence[_Column], times: Sequence[list[float | None]]) -> _Column:
    """The one of columns of one unit that is the step; raises _Unclear."""
    candidates = [column for column in columns if column.distinct]
    if not candidates:
        return columns[-1]
    for time in times:
        if len(candidates) > 1:
            candidates = [each for each in candidates if _in_order(each, time)] or candidates
    if not all(_proportional(each, candidates[-1]) for each in candidates):
        raise _Unclear(candidates)
    return candidates[-1]


def _far_below(one: _Column, step: _Column) -> bool:
    return one.unit == NUMBER and 10 * max(one.values) < min(step.values)


def _crossed(ones: Sequence[int], others: Sequence[int]) -> bool:
    """Whether one column goes back where the other rises."""
    highest, before, at = -1, -1, None
    for one, other in sorted(zip(ones, others, strict=True)):
        if one != at:
            at, before = one, highest
        if other < before:
            return True
        highest = max(highest, other)
    return False


def _in_order(column: _Column, times: Sequence[float | None]) -> bool:
    known = [
        (value, time) for value, time in zip(column.values, times, strict=True) if time is not None
    ]
    return all(one[1] <= other[1] for one, other in pairwise(sorted(known)))


def _proportional(one: _Column, other: _Column) -> bool:
    """Whether two columns lead to the same weights: only the ratios of steps matter."""
    ones, others = _from_one(one), _from_one(other)
    last = max(range(len(ones)), key=ones.__getitem__)
    return all(
        math.isclose(a * others[last], b * ones[last], rel_tol=_SAME_RATIO)
        for a, b in zip(ones, others, strict=True)
    )


def _from_one(column: _Column) -> list[int]:
    first = from_zero(column.unit, column.values)
    return [value + first for value in column.values]


# What is said of names that can be read in more than one way


def _ambiguous(
    names: Sequence[_Name], columns: Sequence[_Column], tail: str = ""
) -> AmbiguousError:
    """The error that names both readings, with the pattern of each."""
    order = sorted(range(len(names)), key=lambda row: (columns[0].values[row], names[row].file))
    rows = [(names[row].file, tuple(each.values[row] for each in columns)) for row in order]
    patterns = [_pattern(names, column, tail) for column in columns]
    labels = ["" if each.unit == NUMBER else f"{each.unit} " for each in columns]

    def readings(values: Sequence[int]) -> str:
        return either(f"{label}{value}" for label, value in zip(labels, values, strict=True))

    file, values = rows[0]
    another = f" ('{rows[-1][0]}': {readings(rows[-1][1])})" if len(rows) > 1 else ""
    given = [f"pattern='{pattern}'" for pattern in patterns if pattern]
    ways = {2: "two", 3: "three"}.get(len(columns), str(len(columns)))
    return AmbiguousError(
        file,
        f"the step in its name can be read in {ways} ways, {readings(values)}{another}",
        f"give {' or '.join(given)}" if given else "say with pattern= which number it is",
        patterns,
        rows,
    )


def _by_time(names: Sequence[_Name], columns: Sequence[_Column], chosen: dict[str, _Column]) -> str:
    taken = next(column for column in columns if column in chosen.values())
    others = [str(column.values[0]) for column in columns if column is not taken]
    pattern = _pattern(names, taken, "")
    return (
        f"its step is taken to be {taken.values[0]}, not {' or '.join(others)}, as the files' "
        "times go by it" + (f" (pattern='{pattern}' says so for sure)" if pattern else "")
    )


def _pattern(names: Sequence[_Name], step: _Column, tail: str) -> str | None:
    """The pattern that takes one column of these names for the step; None if there is none."""
    pieces = [_same_text([name.stem[: name.counts[0].start] for name in names], ends=True)]
    for place in range(len(names[0].counts)):
        counts = [name.counts[place] for name in names]
        texts = [n.stem[count.start : count.end] for n, count in zip(names, counts, strict=True)]
        pieces.append("{step}" if place == step.place else _same_text(texts))
        after = [
            name.stem[count.end : (*name.counts, Count(len(name.stem), 0, 0, ""))[place + 1].start]
            for name, count in zip(names, counts, strict=True)
        ]
        pieces.append(_same_text(after))
    files = [name.file.removesuffix(".index.json") for name in names]
    endings = [file[len(stem_of(file)) :] for file in files]
    text = re.sub(r"\*+", "*", "".join(pieces) + tail + _same_text(endings))
    try:
        pattern = compile_pattern(text, raw=not tail)
        readings = [read_name(file, pattern) for file in files]
    except (SnapshotError, UsageError):
        return None
    right = [reading and reading.step for reading in readings] == list(step.values)
    return text if right and "'" not in text else None


def _same_text(texts: Sequence[str], ends: bool = False) -> str:
    """What texts have in common, as a part of a pattern: all or nothing, or also their end."""
    first, common = texts[0], ""
    if len(set(texts)) == 1 and not set(first) & set("{}*"):
        return first
    for length in range(1, len(first) + 1) if ends else ():
        if len({text[-length:] for text in texts}) > 1:
            break
        common = first[-length:]
    return "*" + re.sub("^[0-9.]+", "", re.split("[{}*]", common)[-1])
