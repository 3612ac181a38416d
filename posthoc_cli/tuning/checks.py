"""Checks of what a caller gives: numbers that are none, and the like, in one line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from posthoc_cli.errors import UsageError, in_line


def check_whole(argument: str, value: Any, such: str) -> None:
    """Raise UsageError unless `value` is a whole number."""
    if not hasattr(value, "__index__") or isinstance(value, bool):
        problem = f"{shown(value)} is no whole number"
        raise UsageError(f"{argument}=", problem, f"give, say, {such}")


def check_positive(argument: str, value: Any, such: str) -> None:
    """Raise UsageError unless `value` is a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        problem = f"{shown(value)} is {'out of bounds' if number else 'no number'}"
        raise UsageError(f"{argument}=", problem, f"give, say, {such}")


def values_of(metric: Any) -> list[float]:
    """The numbers that a function has given as its metric: one, or a list or array of several.

    Raises UsageError for anything else; what isn't finite is returned as it is.
    """
    try:
        text = isinstance(metric, (str, bytes))
        several = list(metric) if isinstance(metric, Iterable) and not text else [metric]
    except TypeError:  # an array without axes
        several = [metric]
    try:
        values = [_number(each) for each in several]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        values = []
    if not values:
        problem = f"{shown(metric)} is no number"
        raise UsageError("metric=", problem, "give a number, or a list of several measurements")
    return values


def _number(value: Any) -> float:
    if hasattr(value, "item"):  # an array or tensor of one
        value = value.item()
    if isinstance(value, (bool, str, bytes)):
        raise TypeError
    return float(value)


def shown(value: Any) -> str:
    """A value that makes no sense, for a message."""
    if getattr(value, "shape", ()):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    return in_line(repr(value))
