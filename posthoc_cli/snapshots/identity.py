"""Which step and profile a snapshot has, from its file name and its metadata.

The first source that says both decides: pattern=, then the file's own metadata (`step` with
`gamma`, `sigma_rel` or `decay`), then its name by the known conventions. Where a second source says
otherwise, a warning names both. Raw checkpoints and EMAs of which only the decay is known, whose
names are read together, are in raw.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from posthoc_cli.errors import SnapshotError, UnknownError, UsageError
from posthoc_cli.snapshots.counts import read_counts
from posthoc_cli.snapshots.kinds import OfAverage
from posthoc_cli.snapshots.names import Pattern, Reading, read_name, read_number
from posthoc_cli.solver import (
    MAX_GAMMA,
    MAX_SIGMA_REL,
    MIN_SIGMA_REL,
    Average,
    Decay,
    Profile,
    Scheduled,
    sigma_rel_to_gamma,
)
from posthoc_cli.storage.metadata import (
    CONVERTED,
    COUNTS,
    DECAY,
    GAMMA,
    ONE_STEP,
    SCHEDULE,
    SIGMA_REL,
    STEP,
    UPDATE_EVERY,
)

MAX_STEP = 2**53
"""Above it float64, in which the weights are solved, no longer tells each step from the next."""

UNITS = ("step", "epoch", "number")
"""What steps are counted in, the most reliable first; a name's bare number may be of either."""


@dataclass(frozen=True, slots=True)
class Identity(OfAverage):
    """Which average a snapshot is; `source` is "pattern", "metadata", "config" or "name"."""

    profile: Average
    source: str


def identify(
    name: str,
    metadata: Mapping[str, str],
    pattern: Pattern | None = None,
    profiles: Sequence[float] = (),
    doubt: SnapshotError | None = None,
) -> tuple[Identity, list[str]]:
    """The step and profile of the file `name` with `metadata`, and warnings.

    `profiles` are the sigma_rel values by index; `doubt` is why the name can't be believed, as
    `doubted_profiles` has it. Raises SnapshotError when nothing says them, or when the source that
    decides says what can't be.
    """
    identity, warnings = _identify(name, metadata, pattern, profiles, doubt)
    if UPDATE_EVERY in metadata and isinstance(identity.profile, Profile):
        text = metadata[UPDATE_EVERY]
        if not (every := whole_number(text)):
            raise bad_number(UPDATE_EVERY, text, "a whole number above 0")
        one_step = metadata.get(ONE_STEP, "").lower() == "true"
        profile = replace(identity.profile, update_every=every, one_step=one_step and every > 1)
        identity = replace(identity, profile=profile)
    return identity, warnings


def _identify(
    name: str,
    metadata: Mapping[str, str],
    pattern: Pattern | None,
    profiles: Sequence[float],
    doubt: SnapshotError | None,
) -> tuple[Identity, list[str]]:
    named = read_name(name, pattern, profiles) if pattern is not None or doubt is None else None
    if pattern is not None:
        if named is None:
            raise not_fitting(name, pattern)
        return _checked(name, named, "pattern"), _doubts(named, metadata, "the pattern")
    stated = _read_metadata(metadata)
    if stated is not None:
        identity = _checked(name, stated, "metadata")
        # Our own `convert` has read the name, and written what the snapshot really is.
        if named is None or CONVERTED in metadata:
            return identity, []
        if named.agrees(identity.profile):
            return identity, []
        return identity, [f"its name says {named}, its metadata {stated}; the metadata is used"]
    if named is not None:
        return _checked(name, named, "name"), _doubts(named, metadata, "the name")
    if doubt is not None:
        raise doubt
    raise _nothing_said(name, metadata)


def check_profiles(profiles: Sequence[float] | None, pattern: Pattern | None) -> Sequence[float]:
    """`profiles`, the sigma_rel values by index, or nothing for None.

    Raises UsageError for values out of bounds, and unless `pattern` has an index exactly when there
    are profiles.
    """
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


def _nothing_said(name: str, metadata: Mapping[str, str]) -> UnknownError:
    """The error for a file without step and profile; with a step, it may be a raw checkpoint."""
    found = [key for key in (STEP, GAMMA, SIGMA_REL, DECAY) if key in metadata]
    remedy = "give pattern=, or leave it out with only="
    # A name such as x-0 says nothing: no step is 0.
    counted = [each for each in read_steps(name, metadata).values() if each[0] > 0]
    if counted and found in ([], [STEP]):
        remedy = f"add raw=True if it is a plain checkpoint and no EMA, else {remedy}"
        remedy = remedy.replace("pattern=", "pattern= or ema_decay=")
    if found:
        problem = f"its metadata has only {' and '.join(found)}, and its name says nothing"
    elif counted:
        step, _, where = counted[0]
        problem = f"its {where} says {step}, but nothing says its profile"
    else:
        problem = "neither its name nor its metadata says its step and profile"
    return UnknownError(name, problem, remedy)


def _doubts(named: Reading, metadata: Mapping[str, str], used: str) -> list[str]:
    """A warning if the metadata says otherwise than the name, which is used."""
    try:
        stated = _read_metadata(metadata)
        if stated is not None:
            identity = _checked("", stated, "metadata")
            agrees, says = named.agrees(identity.profile), str(stated)
        else:  # a step alone is not enough to go by, but enough to doubt
            step = whole_number(metadata.get(STEP, ""))
            agrees, says = step is None or step in named.steps, f"step {step} and no profile"
    except SnapshotError as error:
        return [f"{error.problem}; {used} is used: {named}"]
    return [] if agrees else [f"its name says {named}, its metadata {says}; {used} is used"]


def _read_metadata(metadata: Mapping[str, str]) -> Reading | None:
    """What `step` with `gamma`, `sigma_rel` or `decay` says; None unless both are there.

    Raises SnapshotError for a text that is no number, and for a gamma and a sigma_rel that
    contradict one another.
    """
    texts = {key: metadata[key] for key in (GAMMA, SIGMA_REL, DECAY) if key in metadata}
    if not texts or STEP not in metadata:
        return None
    step = whole_number(metadata[STEP])
    if step is None:
        raise bad_number(STEP, metadata[STEP], "a whole number")
    readings = []
    for key, text in texts.items():
        number = read_number(text, key)
        if number is None:
            raise bad_number(key, text, "a plain number")
        told: dict[str, Any] = {key: number[0], "rounding": number[1]}
        readings.append(Reading("metadata", step, range(step, step + 1), **told))
    if DECAY in texts and len(texts) > 1:
        raise SnapshotError(
            "", f"its metadata has a decay and a {next(iter(texts))}", "correct the metadata"
        )
    one = _checked("", readings[0], "metadata")
    agree = readings[-1].agrees(one.profile)
    if not agree and one.gamma > 0:  # below, its width need not be that of any gamma above
        other = _checked("", readings[-1], "metadata")
        agree = readings[0].agrees(other.profile)
    if not agree:
        raise SnapshotError(
            "",
            f"its metadata's gamma {texts[GAMMA]} is sigma_rel {one.sigma_rel:.4g}, "
            f"but its sigma_rel is {texts[SIGMA_REL]}",
            "correct the metadata, or give pattern=",
        )
    return readings[0]


def stated_profile(metadata: Mapping[str, str]) -> Average | None:
    """The average at step 1 of metadata, whatever it says of the step. Raises SnapshotError."""
    stated = _read_metadata({**metadata, STEP: "1"})
    return None if stated is None else _checked("", stated, "metadata").profile


def stated(profile: Average) -> dict[str, str]:
    """What kind of average it is, as metadata have it.

    A power function is by its exponent or width, whichever is shorter, which is the one that was
    given; below gamma 0 there are two exponents of each width.
    """
    if isinstance(profile, Scheduled):
        return {key: str(getattr(profile.schedule, key)) for key in (DECAY, *SCHEDULE)}
    if isinstance(profile, Decay):
        return {DECAY: repr(profile.beta)}
    assert isinstance(profile, Profile)
    texts = {SIGMA_REL: repr(float(profile.sigma_rel)), GAMMA: repr(float(profile.gamma))}
    exact = profile.gamma > 0 and sigma_rel_to_gamma(profile.sigma_rel) == profile.gamma
    key = min(texts, key=lambda key: len(texts[key])) if exact else GAMMA
    told = {key: texts[key]}
    if profile.stairs is not None:
        told |= {UPDATE_EVERY: str(profile.update_every), ONE_STEP: str(profile.one_step)}
    return told


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
    elif reading.decay is not None and not reading.decay < 1:
        problem = f"its {where} says decay {reading.decay:g}, not one from 0 to below 1"
    elif reading.decay is not None:
        return Identity(Decay(reading.step, reading.decay), source)
    elif gamma is not None:
        return Identity(Profile(reading.step, gamma), source)
    elif sigma_rel is not None:
        return Identity(Profile(reading.step, float(sigma_rel_to_gamma(sigma_rel))), source)
    else:
        raise SnapshotError(
            name,
            f"its name says index {reading.index}, for which profiles= has no sigma_rel",
            "list the values from index 0 on, such as profiles=[0.05, 0.10]",
        )
    raise SnapshotError(name, problem, "correct it, or leave the file out with only=")


def bad_number(key: str, text: str, wanted: str) -> SnapshotError:
    shown = text if len(text) <= 40 else text[:40] + "..."
    return SnapshotError(
        "", f"its metadata's {key} is '{shown}', not {wanted}", "correct it, or give pattern="
    )


def whole_number(text: str) -> int | None:
    """A whole number; of no more digits than int() takes on any Python.

    Some write it as their language prints a float: 1200.0, 1.2e3. It has to be whole.
    """
    if re.fullmatch("[0-9]{1,100}", text):
        return int(text)
    if not re.fullmatch(r"[0-9]{1,100}(\.[0-9]{0,100})?([eE]\+?[0-9]{1,2})?", text):
        return None
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else None


def not_fitting(name: str, pattern: Pattern) -> UnknownError:
    return UnknownError(
        name,
        f"its name doesn't fit pattern='{pattern.text}'",
        "leave it out with only=, or widen the pattern",
    )


def read_steps(name: str, metadata: Mapping[str, str]) -> dict[str, tuple[int, str, str]]:
    """The steps that metadata and name say, by unit: the step, its source, and where it stands.

    The most reliable unit comes first; of one unit, the metadata goes before the name.
    """
    counted: dict[str, tuple[int, str, str]] = {}
    for key, unit in COUNTS.items():
        number = whole_number(metadata.get(key, ""))
        # kohya's trainers write "None" for what they don't know, and others 0.
        if unit not in counted and number is not None and (number or key == STEP):
            counted[unit] = number, "metadata", f"metadata's {key}"
    for unit, number in read_counts(name).items():
        counted.setdefault(unit, (number, "name", "name"))
    return {unit: counted[unit] for unit in UNITS if unit in counted}
