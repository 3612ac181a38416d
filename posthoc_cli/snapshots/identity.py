"""Which step and profile a snapshot has, from its file name and its metadata.

The first source that says both decides: pattern=, then the file's own metadata (`step` with
`gamma` or `sigma_rel`), then its name by the known conventions. Where a second source says
otherwise, a warning names both.

Of a raw checkpoint (`raw=True`) only the step is asked for, and many things may count it: `clues`
gathers what one file says, `agree_on_unit` what a folder's files have in common.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posthoc_cli.errors import SnapshotError, UnknownError
from posthoc_cli.snapshots.names import Pattern, Reading, read_counts, read_name, read_number
from posthoc_cli.solver.profiles import MAX_SIGMA_REL, gamma_to_sigma_rel, sigma_rel_to_gamma

MAX_STEP = 2**53
"""Above it float64, in which the weights are solved, no longer tells each step from the next."""

MAX_GAMMA = 1e12
MIN_SIGMA_REL = 1 / MAX_GAMMA
"""Such an EMA is the network of its last step, whatever the training; beyond it sums overflow."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The step and profile of a snapshot; `source` is "pattern", "metadata" or "name"."""

    step: int
    gamma: float
    sigma_rel: float
    source: str


def identify(
    name: str,
    metadata: Mapping[str, str],
    pattern: Pattern | None = None,
    profiles: Sequence[float] = (),
) -> tuple[Identity, list[str]]:
    """The step and profile of the file `name` with `metadata`, and warnings.

    `profiles` are the sigma_rel values by index. Raises SnapshotError when nothing says them, or
    when the source that decides says what can't be.
    """
    named = read_name(name, pattern, profiles)
    if pattern is not None:
        if named is None:
            raise _not_fitting(name, pattern)
        return _checked(name, named, "pattern"), _doubts(named, metadata, "the pattern")
    stated = _read_metadata(metadata)
    if stated is not None:
        identity = _checked(name, stated, "metadata")
        # Our own `convert` has read the name, and written what the snapshot really is.
        if named is None or "converted" in metadata:
            return identity, []
        if named.agrees_with(identity.step, identity.sigma_rel):
            return identity, []
        return identity, [f"its name says {named}, its metadata {stated}; the metadata is used"]
    if named is not None:
        return _checked(name, named, "name"), _doubts(named, metadata, "the name")
    raise _nothing_said(name, metadata)


def _nothing_said(name: str, metadata: Mapping[str, str]) -> UnknownError:
    """That a step and a profile are missing; where there is a step, it may be a raw checkpoint."""
    found = [key for key in ("step", "gamma", "sigma_rel") if key in metadata]
    remedy = "give pattern=, or leave it out with only="
    # A name such as x-0 says nothing: no step is 0.
    counted = {unit: each for unit, each in _counted(name, metadata).items() if each[0] > 0}
    if counted and found in ([], ["step"]):
        remedy = f"add raw=True if it is a plain checkpoint and no EMA, else {remedy}"
    if found:
        problem = f"its metadata has only {' and '.join(found)}, and its name says nothing"
    elif counted:
        step, _, where = next(iter(counted.values()))
        problem = f"its {where} says {step}, but nothing says its profile"
    else:
        problem = "neither its name nor its metadata says its step and profile"
    return UnknownError(name, problem, remedy)


def _doubts(named: Reading, metadata: Mapping[str, str], used: str) -> list[str]:
    """A warning if the metadata doesn't say what the name does, which is used."""
    try:
        stated = _read_metadata(metadata)
        if stated is not None:
            identity = _checked("", stated, "metadata")
            agrees, says = named.agrees_with(identity.step, identity.sigma_rel), str(stated)
        else:  # a step alone is not enough to go by, but enough to doubt
            step = _whole(metadata.get("step", ""))
            agrees, says = step is None or step in named.steps, f"step {step} and no profile"
    except SnapshotError as error:
        return [f"{error.problem}; {used} is used: {named}"]
    return [] if agrees else [f"its name says {named}, its metadata {says}; {used} is used"]


def _read_metadata(metadata: Mapping[str, str]) -> Reading | None:
    """What `step` with `gamma` or `sigma_rel` says; None unless both are there.

    Raises SnapshotError for a text that is no number, and for a gamma and a sigma_rel that
    contradict one another.
    """
    texts = {key: metadata[key] for key in ("gamma", "sigma_rel") if key in metadata}
    if not texts or "step" not in metadata:
        return None
    step = _whole(metadata["step"])
    if step is None:
        raise _unusable("step", metadata["step"], "a whole number")
    readings = []
    for key, text in texts.items():
        number = read_number(text, key)
        if number is None:
            raise _unusable(key, text, "a plain number")
        gamma, sigma_rel = (number[0], None) if key == "gamma" else (None, number[0])
        steps = range(step, step + 1)
        readings.append(Reading("metadata", step, steps, gamma, sigma_rel, rounding=number[1]))
    one = _checked("", readings[0], "metadata")
    agree = readings[-1].agrees_with(step, one.sigma_rel)
    if not agree and one.gamma > 0:  # below, its width need not be that of any gamma above
        other = _checked("", readings[-1], "metadata")
        agree = readings[0].agrees_with(step, other.sigma_rel)
    if not agree:
        raise SnapshotError(
            "",
            f"its metadata's gamma {texts['gamma']} is sigma_rel {one.sigma_rel:.4g}, "
            f"but its sigma_rel is {texts['sigma_rel']}",
            "correct the metadata, or give pattern=",
        )
    return readings[0]


def _checked(name: str, reading: Reading, source: str) -> Identity:
    """The identity that `reading` says; raises SnapshotError when no snapshot can have it."""
    where = "metadata" if source == "metadata" else "name"
    gamma, sigma_rel = reading.gamma, reading.sigma_rel
    if not 0 < reading.step <= MAX_STEP:
        problem = f"its {where} says step {reading.step:.6g}, not one from 1 to 2^53"
    elif gamma is not None and not -1 < gamma <= MAX_GAMMA:
        problem = f"its {where} says gamma {gamma:g}, not above -1 and at most {MAX_GAMMA:g}"
    elif sigma_rel is not None and not MIN_SIGMA_REL <= sigma_rel < MAX_SIGMA_REL:
        problem = f"its {where} says sigma_rel {sigma_rel:g}, not between 0 and 12^-0.5 = 0.2887"
    elif gamma is not None:
        return Identity(reading.step, gamma, float(gamma_to_sigma_rel(gamma)), source)
    elif sigma_rel is not None:
        return Identity(reading.step, float(sigma_rel_to_gamma(sigma_rel)), sigma_rel, source)
    else:
        raise SnapshotError(
            name,
            f"its name says index {reading.index}, for which profiles= has no sigma_rel",
            "list the values from index 0 on, such as profiles=[0.05, 0.10]",
        )
    raise SnapshotError(name, problem, "correct it, or leave the file out with only=")


def _unusable(key: str, text: str, wanted: str) -> SnapshotError:
    shown = text if len(text) <= 40 else text[:40] + "..."
    return SnapshotError(
        "", f"its metadata's {key} is '{shown}', not {wanted}", "correct it, or give pattern="
    )


def _whole(text: str) -> int | None:
    """A whole number; of no more digits than int() takes on any Python."""
    return int(text) if re.fullmatch("[0-9]{1,100}", text) else None


# Raw checkpoints

UNITS = ("step", "epoch", "number")
"""What steps may be counted in, the best first. A name's bare number may be steps or epochs."""

_KEYS = {"step": "step", "ss_steps": "step", "ss_epoch": "epoch"}
"""What metadata counts them, ours and that of kohya's trainers, the first one first."""


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a raw checkpoint says of its step, by unit: the step, its source, and who says so."""

    steps: Mapping[str, tuple[int, str, str]]
    warnings: list[str] = field(default_factory=list)


def clues(name: str, metadata: Mapping[str, str], pattern: Pattern | None = None) -> StepCounts:
    """All that the file `name` with `metadata` says of its step, and warnings.

    Raises SnapshotError when the pattern doesn't fit, or metadata's `step` is no number.
    """
    warnings = []
    if ema := _ema_said(name, metadata):
        warnings.append(f"{ema}: an EMA, which raw=True takes for plain weights")
    if pattern is not None:
        reading = read_name(name, pattern)
        if reading is None:
            raise _not_fitting(name, pattern)
        said = _whole(metadata.get("step", ""))
        if said is not None and said not in reading.steps:
            warnings.append(
                f"its name says {reading}, its metadata step {said}; the pattern is used"
            )
        return StepCounts({"step": (reading.step, "pattern", "name")}, warnings)
    if "step" in metadata and _whole(metadata["step"]) is None:
        raise _unusable("step", metadata["step"], "a whole number")
    counted = _counted(name, metadata)
    for unit, number in read_counts(name).items():
        step, source, where = counted[unit]
        if source == "metadata" and step != number:
            warnings.append(
                f"its name says {unit} {number}, its {where} {step}; the metadata is used"
            )
    return StepCounts(counted, warnings)


def agree_on_unit(found: Mapping[str, StepCounts]) -> dict[str, Identity | SnapshotError]:
    """The identities of a folder's raw checkpoints, by name, or what is wrong with each.

    All count in the same unit: the best of UNITS that all of them have, else the one that most of
    them have, and the others are wrong.
    """
    having = Counter(unit for each in found.values() for unit in each.steps)
    most = max(having.values(), default=0)
    unit = next((unit for unit in UNITS if having[unit] == most), UNITS[0])
    settled: dict[str, Identity | SnapshotError] = {}
    for name, each in found.items():
        if unit not in each.steps:
            settled[name] = _not_counted(name, each, unit, having[unit])
            continue
        step, source, where = each.steps[unit]
        if 0 < step <= MAX_STEP:
            settled[name] = Identity(step, math.inf, 0.0, source)
        else:
            settled[name] = SnapshotError(
                name,
                f"its {where} says step {step:.6g}, not one from 1 to 2^53",
                "give pattern=, or leave it out with only=",
            )
    return settled


def _ema_said(name: str, metadata: Mapping[str, str]) -> str | None:
    """Where a file is said to be an EMA: `its metadata says sigma_rel 0.05`."""
    for key in ("sigma_rel", "gamma"):
        if key in metadata:
            return f"its metadata says {key} {metadata[key]}"
    named = read_name(name)
    # What sd-scripts' convention takes for a whole gamma may as well be a step.
    if named and named.index is None and re.search(r"\.[0-9]+\Z", name.rpartition(".")[0]):
        return f"its name says {str(named).partition(', ')[2]}"
    return None


def _counted(name: str, metadata: Mapping[str, str]) -> dict[str, tuple[int, str, str]]:
    """What the metadata counts and then what the name does, by unit, the best first."""
    counted: dict[str, tuple[int, str, str]] = {}
    for key, unit in _KEYS.items():
        number = _whole(metadata.get(key, ""))
        # kohya's trainers write "None" for what they don't know, and others 0.
        if unit not in counted and number is not None and (number or key == "step"):
            counted[unit] = number, "metadata", f"metadata's {key}"
    for unit, number in read_counts(name).items():
        counted.setdefault(unit, (number, "name", "name"))
    return {unit: counted[unit] for unit in UNITS if unit in counted}


def _not_counted(name: str, each: StepCounts, unit: str, others: int) -> SnapshotError:
    if not each.steps:
        problem = "neither its name nor its metadata says its step"
        return UnknownError(
            name, problem, "put its step at the end of its name, or leave it out with only="
        )
    _, (step, _, where) = next(iter(each.steps.items()))
    counts = {"step": "steps", "epoch": "epochs", "number": "a bare number in the name"}
    return SnapshotError(
        name,
        f"its {where} says {step}, but not in {counts[unit]}, as {others} other"
        f"{'s do' if others != 1 else ' does'}",
        "give pattern=, or leave it out with only=",
    )


def _not_fitting(name: str, pattern: Pattern) -> UnknownError:
    return UnknownError(
        name,
        f"its name doesn't fit pattern='{pattern.text}'",
        "leave it out with only=, or widen the pattern",
    )
