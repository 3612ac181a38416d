"""The averages that are wanted, as a caller names them.

Each has an argument: `sigma_rel`, `gamma`, `window`, `lr_decay`, `decay` or `half_life`. As one
text a target is `KIND:VALUE`: `window:5%`, `lr-decay:1-sqrt:10%`, `sigma-rel:0.15`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from posthoc_cli.errors import UsageError, either
from posthoc_cli.solver.averages import SHAPES, Decay, LrDecay, Window
from posthoc_cli.solver.profiles import (
    MAX_GAMMA,
    MAX_SIGMA_REL,
    MIN_SIGMA_REL,
    Profile,
    gamma_to_sigma_rel,
    sigma_rel_to_gamma,
)

ARGUMENTS = ("sigma_rel", "gamma", "window", "lr_decay", "decay", "half_life")
"""What targets are named by, in the order in which they are made."""

LENGTHS = ("window", "lr_decay", "half_life")
"""Those whose values are lengths: of steps, or a part of the target step such as "5%"."""

LONGEST = 1e12
"""A half-life in steps: beyond it a decay is no longer told from 1."""

Value = float | str
Values = Value | Iterable[Value] | None
"""A number, a text such as "5%" or "1-sqrt:10%", several of them, or none."""


@dataclass(frozen=True, slots=True)
class Target:
    """An average that is wanted: by `argument`, one of ARGUMENTS, with the `value` as given.

    A length is one of steps, or with `percent` of hundredths of the target step; `shape` is an
    lr_decay's.
    """

    argument: str
    value: float
    percent: bool = False
    shape: str = ""

    def __str__(self) -> str:
        kind = self.argument if self.argument == "sigma_rel" else self.argument.replace("_", "-")
        return f"{kind} {self.text}"

    @property
    def text(self) -> str:
        """The value in as few digits as tell it: `0.05`, `5%`, `1-sqrt:10%`."""
        shape = f"{self.shape}:" if self.shape else ""
        return shape + plain_number(self.value) + "%" * self.percent

    @property
    def named(self) -> str:
        """Its one text, which `read_target` reads: `window:5%`."""
        return f"{self.argument.replace('_', '-')}:{self.text}"

    @property
    def tag(self) -> str:
        """What tells it apart in the name of a file: `sigma0.05`, `window5pct`."""
        kind = "sigma" if self.argument == "sigma_rel" else self.argument.replace("_", "-")
        shape = f"-{self.shape}-" if self.shape else ""
        return kind + shape + plain_number(self.value) + "pct" * self.percent

    @property
    def sigma_rel(self) -> float | None:
        """The relative width of a power function; None for other kinds."""
        if self.argument == "gamma":
            return float(gamma_to_sigma_rel(self.value))
        return self.value if self.argument == "sigma_rel" else None

    @property
    def gamma(self) -> float | None:
        """The exponent of a power function; None for other kinds."""
        if self.argument == "sigma_rel":
            return float(sigma_rel_to_gamma(self.value))
        return self.value if self.argument == "gamma" else None

    def profile(self, step: int) -> Profile | Decay | Window | LrDecay:
        """The average at the target step; raises UsageError where its length doesn't fit there."""
        if (gamma := self.gamma) is not None:
            return Profile(step, gamma)
        if self.argument == "decay":
            return Decay(step, self.value)
        length = step * self.value / 100 if self.percent else self.value
        if self.argument == "half_life":
            return Decay(step, 2.0 ** (-1 / length))
        if self.percent and length < 1:
            remedy = f"give {plain_number(math.ceil(1e4 / step) / 100)}% or more"
            raise self._error(f"{self.text} of step {step} is less than one step", remedy)
        length = round(length)
        if length > step:
            problem = f"{self.text} is longer than the {step} steps up to the target"
            raise self._error(problem, "give a shorter one, or a part such as 5%")
        return LrDecay(step, self.shape, length) if self.shape else Window(step, length)

    def title(self, step: int) -> str:
        """Both ways: `sigma_rel 0.05 (gamma 16.97)`, `window 5% (120 steps)`."""
        average = self.profile(step)
        if isinstance(average, Profile):
            named = self.argument == "gamma"
            other = f"sigma_rel {self.sigma_rel:.4g}" if named else f"gamma {self.gamma:.4g}"
        elif isinstance(average, (Window, LrDecay)):
            length = f"{average.length:g} steps"
            other = length if self.percent else f"{100 * average.length / step:.3g}% of {step}"
        elif self.argument == "decay":
            other = f"half-life {-math.log(2) / math.log(self.value):.4g} steps"
        else:
            other = f"decay {average.beta:.6g}"
        return f"{self} ({other})"

    def as_dict(self, step: int) -> dict[str, Any]:
        """As JSON: what `profile(step)` tells of itself, with the target's own `text`.

        `sigma_rel` and `gamma` are None but for power functions.
        """
        told = self.profile(step).as_dict()
        return {**told, "sigma_rel": self.sigma_rel, "gamma": self.gamma, "text": self.named}

    def _error(self, problem: str, remedy: str) -> UsageError:
        return UsageError(f"{self.argument}=", problem, remedy)


def make_targets(
    sigma_rel: Values = None,
    gamma: Values = None,
    window: Values = None,
    lr_decay: Values = None,
    decay: Values = None,
    half_life: Values = None,
) -> list[Target]:
    """The targets by each argument, in this order, and each in the order given.

    Widths (0 < sigma_rel < 12^-0.5), exponents (gamma > -1), decays a step (0 < decay < 1), and
    lengths: 480 steps, or "5%" of the target step; an lr_decay is "1-sqrt:10%". A value that is
    given again counts once. Raises UsageError for a value out of bounds, and when there is none.
    """
    given = (sigma_rel, gamma, window, lr_decay, decay, half_life)
    targets = [
        make_target(argument, value)
        for argument, values in zip(ARGUMENTS, given, strict=True)
        for value in _listed(values)
    ]
    if not targets:
        raise UsageError("sigma_rel=", "no target is given", "add, say, sigma_rel=0.05")
    return list(dict.fromkeys(targets))


def read_target(text: str) -> Target:
    """One target from one text: `sigma-rel:0.15`, `window:5%`, `lr-decay:1-sqrt:10%`.

    Raises UsageError; its subject is the text.
    """
    kind, colon, value = text.partition(":")
    argument = kind.replace("-", "_")
    if not colon or argument not in ARGUMENTS:
        problem = f"'{kind}' is no kind of target" if colon else "it has no kind"
        raise UsageError(f"'{text}'", problem, "write, say, window:5% or sigma-rel:0.15")
    try:
        return make_target(argument, value)
    except UsageError as error:
        raise UsageError(f"'{text}'", error.problem, error.remedy) from None


def make_target(argument: str, value: Value) -> Target:
    """A target from what a caller gave for one of ARGUMENTS. Raises UsageError."""
    if argument in LENGTHS:
        return _of_length(argument, value)
    number = _number(argument, value, value, f"give, say, {_SUCH[argument]}")
    good = {
        "sigma_rel": MIN_SIGMA_REL <= number < MAX_SIGMA_REL,
        "gamma": -1 < number <= MAX_GAMMA,
        "decay": 0 < number < 1,
    }
    if not good[argument]:
        bounds = {
            "sigma_rel": "above 0 and below 12^-0.5 = 0.2887",
            "gamma": f"above -1, and up to {MAX_GAMMA:g}",
            "decay": "above 0 and below 1, such as 0.999",
        }
        problem = f"{plain_number(number)} is out of bounds"
        raise UsageError(f"{argument}=", problem, f"give values {bounds[argument]}")
    return Target(argument, number)


_SUCH = {"sigma_rel": "0.05", "gamma": "6.94", "decay": "0.999"}
_SUCH |= {"window": "480 or 5%", "lr_decay": "1-sqrt:480 or 1-sqrt:10%", "half_life": "480 or 5%"}


def _of_length(argument: str, value: Value) -> Target:
    subject, such = f"{argument}=", f"give, say, {_SUCH[argument]}"
    shape, length = "", value
    if argument == "lr_decay":
        shape, colon, length = str(value).partition(":")
        if not colon:
            missing = "length" if shape in SHAPES else "shape"
            raise UsageError(subject, f"'{value}' has no {missing}", such)
        if shape not in SHAPES:
            raise UsageError(subject, f"'{shape}' is no shape", f"choose {either(SHAPES)}")
    percent = isinstance(length, str) and length.endswith("%")
    number = _number(argument, str(length)[:-1] if percent else length, value, such)
    target = Target(argument, number, percent, shape)
    if not 0 < number < math.inf:
        raise UsageError(subject, f"{target.text} is no length", such)
    if percent and number > 100 and argument != "half_life":
        raise UsageError(subject, f"{target.text} is more than there is", "give up to 100%")
    if argument == "half_life" and not percent and number > LONGEST:
        raise UsageError(subject, f"{target.text} is out of bounds", f"give up to {LONGEST:g}")
    if argument != "half_life" and not percent and number < 1:
        problem = f"{target.text} is less than one step"
        raise UsageError(subject, problem, f"{such}: a part of the target step ends in %")
    if argument != "half_life" and not percent and number != round(number):
        raise UsageError(subject, f"{target.text} is no whole number of steps", such)
    return target


def _number(argument: str, value: Value, given: Value, remedy: str) -> float:
    try:
        if isinstance(value, str) and value != value.strip():
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        shown = f"'{given}'" if isinstance(given, str) else repr(given)
        raise UsageError(f"{argument}=", f"{shown} is no number", remedy) from None


def plain_number(value: float) -> str:
    """A number in as few digits as tell it, without an exponent: `0.05`, `12`."""
    return np.format_float_positional(value, trim="-")


def _listed(values: Values) -> list[Value]:
    if values is None:
        return []
    return (
        list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    )
