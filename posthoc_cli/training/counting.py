"""Counting steps, and checks of the numbers that a tracker is given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index

from posthoc_cli.snapshots import SAME_WIDTH
from posthoc_cli.solver import MAX_GAMMA, gamma_to_sigma_rel, sigma_rel_to_gamma


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for what is neither None nor a whole number of at least 1."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} {count!r}: not a whole number of at least 1")


def resolve_gamma(sigma_rel: float | None, gamma: float | None) -> float:
    """The exponent of a profile given either way; raises ValueError for both, none or a bad one."""
    if (sigma_rel is None) == (gamma is None):
        raise ValueError("give sigma_rel or gamma, one of the two")
    if gamma is not None:
        gamma_to_sigma_rel(gamma)  # raises unless it is a profile's
        return float(gamma)
    return float(sigma_rel_to_gamma(sigma_rel))


def resolve_profiles(
    sigma_rels: Sequence[float] | None, gammas: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The exponents and widths of profiles given either way, 0.05 and 0.10 where neither is.

    Raises ValueError for both, or for what `check_profiles` refuses.
    """
    if sigma_rels is not None and gammas is not None:
        raise ValueError("give sigma_rels or gammas, not both")
    if gammas is None:
        widths = tuple(map(float, (0.05, 0.10) if sigma_rels is None else sigma_rels))
        exponents = tuple(float(sigma_rel_to_gamma(each)) for each in widths)
    else:
        exponents = tuple(map(float, gammas))
        widths = tuple(float(gamma_to_sigma_rel(each)) for each in exponents)
    check_profiles(exponents, widths)
    return exponents, widths


def check_profiles(gammas: Sequence[float], sigma_rels: Sequence[float]) -> None:
    """Raises ValueError unless these are two or more different profiles, given both ways."""
    if len(gammas) < 2:
        raise ValueError(
            f"{len(gammas)} profile: other EMAs can only be made from two or more, "
            "such as sigma_rels=(0.05, 0.10)"
        )
    for gamma in gammas:
        if not 0 < gamma <= MAX_GAMMA:
            raise ValueError(f"gamma {gamma:g}: not above 0 and at most {MAX_GAMMA:g}")
    ordered = sorted(sigma_rels)
    for one, other in pairwise(ordered):
        if other - one <= SAME_WIDTH * other:
            raise ValueError(
                f"sigma_rel {one:g} and {other:g} are the same profile: give different ones, "
                "such as sigma_rels=(0.05, 0.10)"
            )


def next_step(previous: int, step: int | None) -> int:
    """`step`, by default one more than `previous`; raises ValueError when it is less."""
    now = previous + 1 if step is None else index(step)
    if now < previous:
        raise ValueError(
            f"update(step={now}) after step {previous}: steps can't go back; "
            "load_state_dict() what was saved at the earlier step"
        )
    return now


def crosses_multiple(every: int | None, previous: int, now: int) -> bool:
    """Whether a multiple of `every`, if given, lies after `previous` and not after `now`."""
    return every is not None and now // every > previous // every
