"""Kinds of averages among snapshots: their widths, and which are the same."""

from __future__ import annotations

import math

from posthoc_cli.solver import Average, Decay, Profile, Scheduled

SAME_WIDTH = 1e-3
"""Two values of sigma_rel that differ by less than this fraction are the same EMA, written down
in two ways (sigma_rel 0.100 and gamma 6.94, which is 0.09997); three decimals that differ, differ
by more."""


class OfAverage:
    """What is an average: its `profile` says which."""

    __slots__ = ()
    profile: Average

    @property
    def step(self) -> int:
        return int(self.profile.step)

    @property
    def gamma(self) -> float:
        """A power function's exponent; infinite of a raw checkpoint, NaN of other averages."""
        return gamma_of(self.profile)

    @property
    def sigma_rel(self) -> float:
        """A power function's relative width; 0 of a raw checkpoint, NaN of other averages."""
        if isinstance(self.profile, Profile):
            return self.profile.sigma_rel
        return 0.0 if self.profile.raw else math.nan


def gamma_of(average: Average) -> float:
    """A power function's exponent; infinite of a raw checkpoint, NaN of other averages."""
    if isinstance(average, Profile):
        return average.gamma
    return math.inf if average.raw else math.nan


def width(average: Average) -> float:
    """About how much of training it spans, in parts of its step, to put averages in order."""
    if isinstance(average, Profile):
        return average.sigma_rel
    schedule = average.schedule if isinstance(average, Scheduled) else None
    beta = max(schedule.decay, schedule.min_decay) if schedule else getattr(average, "beta", 0.0)
    return min(beta / (1 - beta) / average.step, 1.0)


def same_kind(one: Average, other: Average) -> bool:
    """Whether two are the same but for their steps, and for how their numbers were rounded."""
    if isinstance(one, Profile) and isinstance(other, Profile):
        # Below gamma 0 there are two of each width.
        return (
            one.stairs == other.stairs
            and math.isclose(one.gamma + 1, other.gamma + 1, rel_tol=10 * SAME_WIDTH)
            and math.isclose(one.sigma_rel, other.sigma_rel, rel_tol=SAME_WIDTH)
        )
    if isinstance(one, Decay) and isinstance(other, Decay):
        return one.raw == other.raw and math.isclose(
            1 - one.beta, 1 - other.beta, rel_tol=SAME_WIDTH
        )
    if isinstance(one, Scheduled) and isinstance(other, Scheduled):
        return one.schedule == other.schedule
    return False
