"""Which step a file is of that says no profile: a raw checkpoint, or an EMA of known decay.

Metadata or name may count it in steps or epochs: `step_counts` gathers what one file says,
`agree_on_unit` finds the unit that all files of a folder have.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from posthoc_cli.errors import AmbiguousError, SnapshotError, UnknownError
from posthoc_cli.snapshots.columns import Clock, file_times, from_zero, read_together
from posthoc_cli.snapshots.counts import read_counts
from posthoc_cli.snapshots.identity import (
    MAX_STEP,
    UNITS,
    Identity,
    bad_number,
    not_fitting,
    read_steps,
    whole_number,
)
from posthoc_cli.snapshots.names import Pattern, read_name
from posthoc_cli.snapshots.schedules import begun, no_steps
from posthoc_cli.solver import Average, Decay, Scheduled
from posthoc_cli.storage.metadata import CONVERTED, DECAY, GAMMA, SIGMA_REL, STEP

RAW = Decay(1, 0.0)
"""A raw checkpoint."""


@dataclass(frozen=True, slots=True)
class StepCounts:
    """The steps of a file as `read_steps` gives them, and warnings.

    `written` is when the checkpoint was that `convert` made it of; `known` is its average, at any
    step, `updates` the number of its updates where that is said, and `source` what says it where
    that is not what says the step.
    """

    steps: Mapping[str, tuple[int, str, str]]
    warnings: list[str] = field(default_factory=list)
    written: float | None = None
    known: Average = RAW
    updates: int | None = None
    source: str | None = None


def step_counts(
    name: str,
    metadata: Mapping[str, str],
    pattern: Pattern | None = None,
) -> StepCounts:
    """What the file `name` with `metadata` says of its step.

    Raises SnapshotError when the pattern doesn't fit, or metadata's `step` is no number.
    """
    warnings = []
    if pattern is not None:
        reading = read_name(name, pattern)
        if reading is None:
            raise not_fitting(name, pattern)
        stated = whole_number(metadata.get(STEP, ""))
        if stated is not None and stated not in reading.steps:
            warnings.append(
                f"its name says {reading}, its metadata step {stated}; the pattern is used"
            )
        return StepCounts({"step": (reading.step, "pattern", "name")}, warnings)
    if STEP in metadata and whole_number(metadata[STEP]) is None:
        raise bad_number(STEP, metadata[STEP], "a whole number")
    counted = read_steps(name, metadata)
    for unit, number in read_counts(name).items():
        step, source, where = counted[unit]
        if source == "metadata" and step != number:
            warnings.append(
                f"its name says {unit} {number}, its {where} {step}; the metadata is used"
            )
    return StepCounts(counted, warnings, _time_before(metadata))


def _time_before(metadata: Mapping[str, str]) -> float | None:
    try:
        return float(json.loads(metadata[CONVERTED])["modified"]) / 1e9
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def agree_on_unit(
    found: Mapping[str, StepCounts], written: Clock | None = None, stepped: bool = False
) -> dict[str, Identity | SnapshotError]:
    """The identities of such files of a folder, by name, or what is wrong with each.

    `stepped`: others of the folder count in steps, so that none may count epochs. They take the
    first of UNITS that all of them have, else the one that most have, and the others are wrong.
    What names say is read of all of them together; where that can't be told, the first of those
    names has an AmbiguousError and the others are left out. `written` is the time of each.
    """
    steps, unclear = _named_together(found, written)
    files = Counter(unit for each in steps.values() for unit in each)
    units = [unit for unit in UNITS if not (stepped and unit == "epoch")]
    unit = max(units, key=lambda unit: files[unit])  # the first of those that most have
    identities: dict[str, Identity | SnapshotError] = {}
    for error in unclear:
        names = [name for name, _ in error.rows]
        if any(steps[name].get(unit, ("", "name"))[1] == "name" for name in names):
            identities |= {error.subject: error}
            steps = {name: each for name, each in steps.items() if name not in names}
    identities |= _going_back(steps, unit)
    steps = {name: each for name, each in steps.items() if name not in identities}
    zero = _saved_from_zero(steps, unit)
    for name, counted in steps.items():
        if unit not in counted:
            identities[name] = _not_counted(name, counted, unit, files[unit])
            continue
        step, source, where = counted[unit]
        each = found[name]
        if name in zero:
            if not each.known.raw or stepped:
                identities[name] = no_steps(name, "saves")
                continue
            if step == 0:
                found[name].warnings.append(
                    "names count what was saved from 0 on: save 0 is taken for step 1, "
                    "and save k for step k + 1"
                )
            step += 1
        by_steps = isinstance(each.known, (Decay, Scheduled)) and not each.known.raw
        images = source == "name" and re.search(r"(?i)kimg", name)
        if by_steps and (unit == "epoch" or images):
            identities[name] = no_steps(name, "thousands of images" if images else "epochs")
        elif 0 < step <= MAX_STEP:
            average = replace(each.known, step=step)
            try:
                if isinstance(average, Scheduled) and each.updates is not None:
                    average = begun(average, each.updates)
                identities[name] = Identity(average, each.source or source)
            except SnapshotError as error:
                identities[name] = error
        else:
            identities[name] = SnapshotError(
                name,
                f"its {where} says step {step:.6g}, not one from 1 to 2^53",
                "give pattern=, or leave it out with only=",
            )
    return identities


def _going_back(steps: Steps, unit: str) -> dict[str, Identity | SnapshotError]:
    """The first file whose stated count goes back where its name's number goes on: training was
    resumed, and began to count anew."""
    both = [
        (each["number"][0], each[unit][0], name, each[unit][2])
        for name, each in steps.items()
        if unit != "number" and unit in each and each[unit][1] != "name" and "number" in each
    ]
    for (_, before, other, _), (number, step, name, where) in pairwise(sorted(both)):
        if step < before:
            return {
                name: AmbiguousError(
                    name,
                    f"its {where} says {unit} {step}, fewer than '{other}', {before}, and its name "
                    f"says {number}, which is more, as where a resumed training counts anew",
                    "say with pattern= that the names count, or leave one of the two out with "
                    "exclude=",
                )
            }
    return {}


Steps = dict[str, Mapping[str, tuple[int, str, str]]]
"""The steps of each file by unit, as `read_steps` gives them."""


def _named_together(
    found: Mapping[str, StepCounts], written: Clock | None
) -> tuple[Steps, list[AmbiguousError]]:
    """The steps of files whose names are read together, and what is unclear."""
    named = [
        name
        for name, each in found.items()
        if all(source != "pattern" for _, source, _ in each.steps.values())
    ]

    def stated(unit: str) -> Clock:
        def clock(name: str) -> float | None:
            step, source, _ = found[name].steps.get(unit, (0, "name", ""))
            return None if source == "name" else step

        return clock

    clocks = [stated("step"), stated("epoch")]
    times = None
    if written is not None:
        times = file_times(named, lambda name: found[name].written or written(name))
    said, unclear, warnings = read_together(named, clocks, times)
    for name, text in warnings.items():
        found[name].warnings.append(text)
    steps: Steps = {name: each.steps for name, each in found.items()}
    for name, counts in said.items():
        before = found[name].steps
        counted = {unit: entry for unit, entry in before.items() if entry[1] != "name"}
        for unit, number in counts.items():
            counted.setdefault(unit, (number, "name", "name"))
        steps[name] = {unit: counted[unit] for unit in UNITS if unit in counted}
    return steps, unclear


def _saved_from_zero(steps: Steps, unit: str) -> set[str]:
    """The files whose names count what was saved from 0 on."""
    counted = {name: each[unit] for name, each in steps.items() if unit in each}
    if any(source != "name" for _, source, _ in counted.values()):
        return set()
    return set(counted) if from_zero(unit, [step for step, _, _ in counted.values()]) else set()


def says_profile(name: str | None, metadata: Mapping[str, str], sure: bool) -> bool:
    """Whether metadata or name say step and profile; with `sure`, in a way that can't be another.

    `name` is None where it is doubted. Names with a decay are read together with those of others.
    """
    if STEP in metadata and any(key in metadata for key in (SIGMA_REL, GAMMA, DECAY)):
        return True
    named = read_name(name) if name is not None else None
    if name is None or named is None or named.decay is not None:
        return False
    # What sd-scripts' convention takes for a whole gamma may as well be a step.
    decimal = re.search(r"\.[0-9]+\Z", name.rpartition(".")[0])
    return not sure or (named.index is None and decimal is not None)


def _not_counted(
    name: str, counted: Mapping[str, tuple[int, str, str]], unit: str, others: int
) -> SnapshotError:
    if not counted:
        problem = "neither its name nor its metadata says its step"
        return UnknownError(
            name, problem, "put its step at the end of its name, or leave it out with only="
        )
    said, (step, _, where) = next(iter(counted.items()))
    counts = {"step": "steps", "epoch": "epochs"}
    do = "others do" if others != 1 else "other does"
    way = f"in {counts[unit]}" if unit in counts else "by a bare number"
    return SnapshotError(
        name,
        f"its {where} says {step}, but not {way}, as {others} {do}"
        if said == "number"
        else f"its {where} says {said} {step}, not counted {way} as {others} {do}",
        "give pattern=, or leave it out with only=",
    )
