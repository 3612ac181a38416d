"""What is searched: lengths of one kind of average, from one to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from posthoc_cli.errors import UsageError, either
from posthoc_cli.solver.targets import Target, Value, make_target
from posthoc_cli.tuning.checks import shown

PARAMETERS = ("sigma_rel", "window", "half_life", "decay")
"""The arguments of `solve` whose values may be searched."""

_SUCH = {"sigma_rel": "0.02:0.25", "window": "1%:50%", "half_life": "1%:25%"}
_SUCH |= {"decay": "0.99:0.9999"}


@dataclass(frozen=True, slots=True)
class Axis:
    """The averages of `parameter` from `low` to `high`, its two targets.

    A length is the target's value: a sigma_rel, a window or half-life in steps or in percent. A
    decay's is its half-life, so that a search in the log of lengths sees them evenly.
    """

    parameter: str
    low: Target
    high: Target

    @property
    def bounds(self) -> tuple[float, float]:
        return length_of(self.low), length_of(self.high)

    @property
    def unit(self) -> str:
        return "%" if self.low.percent else ""

    def target(self, length: float) -> Target:
        """The target of this length, as a person would type it: four digits of it are kept."""
        low, high = self.bounds
        if length <= low or length >= high:
            return self.low if length <= low else self.high
        value: Value = min(max(float(f"{length:.4g}"), low), high)
        if self.parameter == "decay":
            value = 1 - float(f"{-math.expm1(-math.log(2) / length):.4g}")
        elif self.low.percent:
            value = f"{value}%"
        elif self.parameter == "window":
            value = round(length)
        made = make_target(self.parameter, value)
        rounded = length_of(made)  # which may lie beyond an end
        return self.low if rounded <= low else self.high if rounded >= high else made


def length_of(target: Target) -> float:
    """The length of a target, as Axis counts it."""
    return -math.log(2) / math.log(target.value) if target.argument == "decay" else target.value


def make_axis(parameter: str, low: Value, high: Value) -> Axis:
    """Raises UsageError for a parameter or values that don't fit."""
    check_parameter(parameter)
    try:
        ends = [make_target(parameter, each) for each in (low, high)]
    except UsageError as error:
        such = f"give, say, range='{_SUCH[parameter]}'"
        raise UsageError("range=", error.problem, such) from None
    axis = Axis(parameter, *ends)
    first, last = axis.bounds
    if ends[0].percent != ends[1].percent or not first < last:
        problem = f"'{ends[0].text}:{ends[1].text}' doesn't lead from a length to a longer one"
        raise UsageError("range=", problem, f"give, say, range='{_SUCH[parameter]}'")
    return axis


def check_parameter(parameter: str) -> None:
    if parameter not in PARAMETERS:
        raise UsageError(
            "parameter=", f"'{parameter}' can't be searched", f"choose {either(PARAMETERS)}"
        )


def read_axis(parameter: str, given: object) -> Axis:
    """An axis from `LOW:HIGH`, or a pair. Raises UsageError."""
    check_parameter(parameter)
    ends: Any = [each.strip() for each in given.split(":")] if isinstance(given, str) else given
    try:
        low, high = ends
    except (TypeError, ValueError):
        such = f"give, say, range='{_SUCH[parameter]}'"
        raise UsageError("range=", f"{shown(given)} is no range", such) from None
    return make_axis(parameter, low, high)
