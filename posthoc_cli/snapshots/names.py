"""What a file's name says of the snapshot in it: known conventions, and a user's own pattern.

    sd-scripts        <anything>_<step>_<gamma>.safetensors
    edm2              <anything>-<kimg, 7 digits>-<sigma_rel, 3 decimals>.safetensors
    ema-pytorch       <index>.<step>.safetensors, where profiles= lists the sigma_rel of each index
    guided-diffusion  ema_<decay>_<step>.safetensors, and model<step>.safetensors beside it

No name fits two of them: what stands before the last number is `_`, `-` or `.`, and a decay is at
least 0.5, as no sigma_rel is.

Names of raw checkpoints only say counts: see `counts`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.kinds import SAME_WIDTH
from posthoc_cli.solver import Average, Decay, Profile, gamma_to_sigma_rel

# [0-9] throughout: \d, int() and float() also take the digits of other scripts.
_WHOLE = "[0-9]+"
_NUMBER = r"[0-9]+(?:\.(?P<{0}_decimals>[0-9]+))?(?:[eE](?P<{0}_exponent>[+-]?[0-9]{{1,4}}))?"
_FIELDS = {
    "step": _WHOLE,
    "kimg": _WHOLE,
    "sigma_rel": _NUMBER.format("sigma_rel"),
    "gamma": "-?" + _NUMBER.format("gamma"),
    "decay": _NUMBER.format("decay").replace("[0-9]+", "[0-9]*", 1),
    "index": _WHOLE,
}
_END = r"(?ai:\.safetensors)"
_CONVENTIONS = {
    name: re.compile(regex + _END, re.DOTALL)
    for name, regex in {
        "sd-scripts": rf".*_(?P<step>{_WHOLE})_(?P<gamma>{_FIELDS['gamma']})",
        "edm2": (r".*-(?P<kimg>[0-9]{7})-(?P<sigma_rel>[0-9]\.(?P<sigma_rel_decimals>[0-9]{3}))"),
        "ema-pytorch": rf"(?P<index>{_WHOLE})\.(?P<step>{_WHOLE})",
        "guided-diffusion": (
            rf"(?i:(?:.*[^A-Za-z0-9])?ema)[-_=]?(?P<decay>0?\.(?P<decay_decimals>[0-9]+))"
            rf"[-_](?P<step>{_WHOLE})"
        ),
    }.items()
}

SD_SCRIPTS = _CONVENTIONS["sd-scripts"]

_DECAY = re.compile(
    r"(?i)(?<![A-Za-z0-9])ema[-_=]?(?:decay|rate)?[-_=]?(0?\.[0-9]+)(?![0-9]|\.[0-9])"
)

MIN_NAMED_DECAY = 0.5
"""What a name has below it after `ema` may be a sigma_rel, or a version."""

_BESIDE_EMAS = re.compile(rf"model_?{_WHOLE}{_END}")

MAX_NAMED_GAMMA = 400
"""sigma_rel 0.0025. What a name has above it is a count: checkpoint_3_1500 is epoch and update."""

_LEAST_GAMMA = -1 + 1e-9

_SIGMA_REL_ROUNDING = 0.0005
"""sigma_rel is quoted with three decimals; `0.1` is 0.100 without its zeros, not 0.1 +- 0.05."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file's name (or, in the same words, its metadata) says.

    `steps` are all the steps that would be written so: kimg is rounded down to 1000 images. At
    most one of `gamma`, `sigma_rel` and `decay` is given, known to plus or minus `rounding`; none,
    when the name has an `index` that no profile is known for. The values are as written.
    """

    convention: str
    step: int
    steps: range
    gamma: float | None = None
    sigma_rel: float | None = None
    rounding: float = 0.0
    index: int | None = None
    decay: float | None = None

    def agrees(self, average: Average) -> bool:
        """Whether a snapshot of this average would be written so."""
        if self.decay is not None:
            near = isinstance(average, Decay) and abs(average.beta - self.decay) <= self.rounding
            return near and average.step in self.steps
        if isinstance(average, Profile):
            return self.agrees_with(int(average.step), average.sigma_rel)
        return average.step in self.steps and self.gamma is None and self.sigma_rel is None

    def agrees_with(self, step: int, sigma_rel: float) -> bool:
        """Whether a snapshot of this step and width would be written so."""
        if step not in self.steps:
            return False
        if self.sigma_rel is not None:
            low, high = self.sigma_rel - self.rounding, self.sigma_rel + self.rounding
        elif self.gamma is not None:
            if math.isinf(self.gamma + self.rounding):
                return False
            # The width falls as gamma grows from 0; below, it rises first and falls again.
            least = max(self.gamma - self.rounding, 0.0 if self.gamma >= 0 else _LEAST_GAMMA)
            ends = least, self.gamma + self.rounding, self.gamma
            low, *_, high = sorted(gamma_to_sigma_rel(gamma) for gamma in ends)
        else:
            return True
        return low * (1 - SAME_WIDTH) <= sigma_rel <= high * (1 + SAME_WIDTH)

    def __str__(self) -> str:
        """Such as `step 1000, gamma 6.94`."""
        for name in ("gamma", "sigma_rel", "decay"):
            if (value := getattr(self, name)) is not None:
                return f"step {self.step}, {name} {value:.{9 if name == 'decay' else 6}g}"
        return f"step {self.step}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A file-name pattern of the user's, compiled: `*` taking as much as it can, and as little."""

    text: str
    fields: frozenset[str]
    greedy: re.Pattern[str]
    lazy: re.Pattern[str]


def compile_pattern(text: str, raw: bool = False) -> Pattern:
    """Compile `run7_{step}_{sigma_rel}*.safetensors`.

    A field is a number, `*` is anything, all else stands for itself; the whole file name has to
    fit. Raises UsageError unless it has one field for the step and one for the profile; for `raw`
    checkpoints, and others whose profile the names don't say, only one for the step.
    """
    pieces = re.split(r"(\{[^{}]*\}|\*+)", text)  # at odd places the fields and stars
    fields = [piece[1:-1] for piece in pieces[1::2] if piece.startswith("{")]
    if problem := _misuse(fields, pieces, raw):
        raise UsageError(
            "pattern=",
            f"{problem} in '{text}'",
            "with raw=True the only field is {step} or {kimg}, as with ema_decay=; * stands for "
            "anything"
            if raw
            else "the fields are {step} or {kimg}, with one of {sigma_rel}, {gamma}, {decay} and "
            "{index}; * stands for anything",
        )
    greedy, lazy = (
        re.compile("".join(_regex(pieces, at, star) for at in range(len(pieces))), re.DOTALL)
        for star in (".*", ".*?")
    )
    return Pattern(text, frozenset(fields), greedy, lazy)


def _misuse(fields: list[str], pieces: list[str], raw: bool) -> str | None:
    for field in fields:
        if field not in _FIELDS:
            return f"unknown field {{{field}}}"
        if fields.count(field) > 1:
            return f"{{{field}}} twice"
    counts, profiles = ("step", "kimg"), ("sigma_rel", "gamma", "decay", "index")
    if raw and (found := [f"{{{field}}}" for field in fields if field in profiles]):
        return f"a field for a profile, {found[0]},"
    for choice in (counts,) if raw else (counts, profiles):
        found = [f"{{{field}}}" for field in fields if field in choice]
        if not found:
            return f"neither {' nor '.join(f'{{{field}}}' for field in choice)}"
        if len(found) > 1:
            return f"both {' and '.join(found)}"
    for left, between, right in zip(pieces[1::2], pieces[2::2], pieces[3::2], strict=False):
        if left[0] == right[0] == "{" and not between:
            return f"nothing between {left} and {right}"
    return None


def _regex(pieces: list[str], at: int, star: str) -> str:
    """The regular expression of one piece of a pattern.

    Beside a star, a field takes the whole number that stands there: in `*{step}` the star must
    not eat the first digits of 12000.
    """
    piece = pieces[at]
    if at % 2 == 0:
        return re.escape(piece)
    if piece.startswith("*"):
        return star
    field = piece[1:-1]
    regex = f"(?P<{field}>{_FIELDS[field]})"
    decimal = field in ("sigma_rel", "gamma", "decay")
    if not pieces[at - 1] and "*" in pieces[at - 2 : at - 1]:
        inside = r"(?<![0-9]\.)(?<![0-9][eE])(?<![0-9][eE][+-])" if decimal else ""
        # After a star, a minus sign is the star's: what stands there is rather a hyphen.
        regex = "(?<![0-9])" + inside + regex.replace(">-?", ">")
    if not pieces[at + 1] and "*" in pieces[at + 2 : at + 3]:
        regex += r"(?![0-9])" + (r"(?!\.[0-9])(?![eE][+-]?[0-9])" if decimal else "")
    return regex


def read_name(
    name: str, pattern: Pattern | None = None, profiles: Sequence[float] = ()
) -> Reading | None:
    """What the file name `name` says, by `pattern` if there is one, else by the conventions.

    `profiles` are the sigma_rel values by index. None when the name doesn't fit; raises
    SnapshotError when it fits the pattern in two ways.
    """
    if pattern is not None:
        match, other = pattern.greedy.fullmatch(name), pattern.lazy.fullmatch(name)
        if match is None or other is None:
            return None
        if match.groupdict() != other.groupdict():
            raise SnapshotError(
                name,
                f"its name fits pattern='{pattern.text}' in two ways",
                "put more of the name into the pattern",
            )
        return _reading("pattern", match.groupdict(), profiles)
    for convention, regex in _CONVENTIONS.items():
        if match := regex.fullmatch(name):
            reading = _reading(convention, match.groupdict(), profiles)
            small = reading.decay is not None and reading.decay < MIN_NAMED_DECAY
            return None if small or (reading.gamma or 0) > MAX_NAMED_GAMMA else reading
    return None


def read_decay(path: str) -> float | None:
    """The decay of an EMA that a path says: `ema_0.9999/1000`, `step5k-ema-0.999`.

    Raises SnapshotError where it says two.
    """
    found = {float(text) for text in _DECAY.findall(path[-1000:])}
    found = {decay for decay in found if MIN_NAMED_DECAY <= decay < 1}
    if len(found) > 1:
        raise SnapshotError(
            path,
            f"its name says two decays, {' and '.join(map(str, sorted(found)))}",
            "say with pattern= which it is, with {decay}",
        )
    return found.pop() if found else None


def beside_emas(names: Iterable[str]) -> set[str]:
    """The raw checkpoints among files, as guided-diffusion names them: `model<step>`.

    They are such only beside `ema_<decay>_<step>`.
    """
    files = list(names)
    homes = {
        file.rpartition("/")[0]
        for file in files
        if (said := read_name(file.rpartition("/")[2])) and said.decay is not None
    }
    return {
        file
        for file in files
        if _BESIDE_EMAS.fullmatch(file.rpartition("/")[2]) and file.rpartition("/")[0] in homes
    }


def read_number(text: str, field: str) -> tuple[float, float] | None:
    """A `gamma`, `sigma_rel` or `decay` as text -> its value, and half a unit of its last digit."""
    match = re.fullmatch(_FIELDS[field], text) if len(text) <= 100 else None
    return _value(text, match.groupdict(), field) if match else None


def _reading(convention: str, fields: dict[str, str | None], profiles: Sequence[float]) -> Reading:
    if kimg := fields.get("kimg"):
        step, steps = images_of(int(kimg))
    else:
        step = int(fields["step"] or 0)
        steps = range(step, step + 1)
    if gamma := fields.get("gamma"):
        value, rounding = _value(gamma, fields, "gamma")
        return Reading(convention, step, steps, gamma=value, rounding=rounding)
    if sigma_rel := fields.get("sigma_rel"):
        value, rounding = _value(sigma_rel, fields, "sigma_rel")
        return Reading(convention, step, steps, sigma_rel=value, rounding=rounding)
    if decay := fields.get("decay"):
        value, rounding = _value(decay, fields, "decay")
        return Reading(convention, step, steps, decay=value, rounding=rounding)
    if "index" not in fields:
        return Reading(convention, step, steps)
    index = int(fields["index"] or 0)
    width = profiles[index] if index < len(profiles) else None
    return Reading(
        convention, step, steps, sigma_rel=width, rounding=_SIGMA_REL_ROUNDING, index=index
    )


def images_of(kimg: int) -> tuple[int, range]:
    """The step of a kimg, in images, and all steps that round down to it.

    Batches are powers of two, so of the 1000 images the multiple of 1024 is the likely one.
    """
    steps = range(1000 * kimg, 1000 * kimg + 1000)
    multiple = -(-steps.start // 1024) * 1024
    return (multiple if multiple in steps else steps.start), steps


def _value(text: str, fields: dict[str, str | None], field: str) -> tuple[float, float]:
    decimals = len(fields.get(f"{field}_decimals") or "")
    exponent = int(fields.get(f"{field}_exponent") or 0)
    rounding = float(f"5e{exponent - decimals - 1}")  # unlike 10.0 ** n, inf rather than an error
    if field == "sigma_rel":
        rounding = min(rounding, _SIGMA_REL_ROUNDING)
    return float(text), rounding
