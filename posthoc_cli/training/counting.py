"""Steps, and what is asked of a tracker: checked, and counted.

Knows no tensors.
"""

from __future__ import annotations

from operator import index

from posthoc_cli.solver.profiles import gamma_to_sigma_rel, sigma_rel_to_gamma


def check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} {count!r}: not a whole number of at least 1")


def resolve_gamma(sigma_rel: float | None, gamma: float | None) -> float:
    if (sigma_rel is None) == (gamma is None):
        raise ValueError("give sigma_rel or gamma, one of the two")
    if gamma is not None:
        gamma_to_sigma_rel(gamma)  # raises unless it is a profile's
        return float(gamma)
    return float(sigma_rel_to_gamma(sigma_rel))


def next_step(previous: int, step: int | None) -> int:
    now = previous + 1 if step is None else index(step)
    if now < previous:
        raise ValueError(
            f"update(step={now}) after step {previous}: steps can't go back; "
            "load_state_dict() what was saved at the earlier step"
        )
    return now


def passes(every: int, previous: int, now: int) -> bool:
    """Whether a multiple of `every` lies after `previous` and not after `now`."""
    return now // every > previous // every
