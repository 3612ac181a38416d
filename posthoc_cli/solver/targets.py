"""The averages that are wanted, as a caller names them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from posthoc_cli.errors import UsageError
from posthoc_cli.solver.profiles import (
    MAX_GAMMA,
    MAX_SIGMA_REL,
    MIN_SIGMA_REL,
    Profile,
    gamma_to_sigma_rel,
    sigma_rel_to_gamma,
)


@dataclass(frozen=True, slots=True)
class Target:
    """An EMA that is wanted: by `argument`, "sigma_rel" or "gamma", with the `value` as given."""

    argument: str
    value: float
    sigma_rel: float
    gamma: float

    def __str__(self) -> str:
        return f"{self.argument} {self.text}"

    @property
    def text(self) -> str:
        """The value in as few digits as tell it: `0.05`."""
        return plain_number(self.value)

    def profile(self, step: int) -> Profile:
        return Profile(step, self.gamma)


def make_targets(
    sigma_rel: float | Iterable[float] | None = None, gamma: float | Iterable[float] | None = None
) -> list[Target]:
    """The targets by relative width (0 < sigma_rel < 12^-0.5) and by exponent (gamma > -1).

    Those by `sigma_rel` come first, each in the order given; a value that is given again counts
    once. Raises UsageError for a value out of bounds, and when there is none.
    """
    targets = []
    for value in _distinct(sigma_rel):
        if not MIN_SIGMA_REL <= value < MAX_SIGMA_REL:
            remedy = "give values above 0 and below 12^-0.5 = 0.2887"
            raise UsageError("sigma_rel=", f"{plain_number(value)} is out of bounds", remedy)
        targets.append(Target("sigma_rel", value, value, float(sigma_rel_to_gamma(value))))
    for value in _distinct(gamma):
        if not -1 < value <= MAX_GAMMA:
            remedy = f"give values above -1, and up to {MAX_GAMMA:g}"
            raise UsageError("gamma=", f"{plain_number(value)} is out of bounds", remedy)
        targets.append(Target("gamma", value, float(gamma_to_sigma_rel(value)), value))
    if not targets:
        raise UsageError("sigma_rel=", "no target is given", "add, say, sigma_rel=0.05")
    return targets


def plain_number(value: float) -> str:
    """A number in as few digits as tell it, without an exponent: `0.05`, `12`."""
    return np.format_float_positional(value, trim="-")


def _distinct(values: float | Iterable[float] | None) -> list[float]:
    if values is None:
        return []
    return list(dict.fromkeys(map(float, values if isinstance(values, Iterable) else [values])))
