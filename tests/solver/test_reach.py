from __future__ import annotations

import numpy as np
import pytest

from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile, sigma_rel_to_gamma
from posthoc_cli.solver.reach import (
    MOST_STEPS,
    best_extra_width,
    least_profile_error,
    planned,
    reachable,
)


def test_least_profile_error_is_that_of_algorithm3() -> None:
    snapshots = planned(8000, 500, (0.05, 0.10))
    widths = np.array([0.02, 0.04, 0.07, 0.15, 0.25])
    targets = [Profile(8000, float(sigma_rel_to_gamma(width))) for width in widths]
    error = least_profile_error(snapshots, 8000)(widths)
    assert error == pytest.approx(solve(snapshots, targets, "algorithm3").profile_error, rel=1e-4)


def test_snapshots_too_alike_to_solve_for_have_a_reach() -> None:
    snapshots = planned(30000, 100, (0.05, 0.10, 0.15, 0.20))
    ((low, high),) = reachable(snapshots, 30000, 0.01)
    assert low < 0.02
    assert high > 0.25


@pytest.mark.parametrize("within", [0.01, 0.05])
def test_ranges_end_where_the_error_is_as_given(within: float) -> None:
    snapshots = planned(8000, 500, (0.05, 0.10))
    ((low, high),) = reachable(snapshots, 8000, within)
    error = least_profile_error(snapshots, 8000)
    assert error(np.array([low, high])) == pytest.approx([within, within], rel=1e-3)
    assert (error(np.linspace(low, high, 50)) <= within * 1.001).all()


def test_profiles_far_apart_have_a_range_each() -> None:
    snapshots = planned(1000, 500, (0.01, 0.25))
    ranges = reachable(snapshots, 1000, 0.05)
    assert len(ranges) == 2
    assert ranges[0][0] <= 0.01 <= ranges[0][1] < ranges[1][0] <= 0.25 <= ranges[1][1]


def test_nothing_is_in_reach_long_after_the_last_snapshot() -> None:
    assert reachable(planned(1000, 500, (0.05, 0.10)), 2000, 0.05) == []


def test_planned_snapshots() -> None:
    steps = [each.step for each in planned(1050, 300, (0.05, 0.10))]
    assert steps == [900, 900, 600, 600, 300, 300]
    assert [each.step for each in planned(1050, 300, (0.05,), at=650)] == [600, 300]
    many = planned(10**6, 100, (0.05,))
    assert len(many) <= MOST_STEPS
    assert many[0].step == 10**6


def test_the_best_extra_width_widens_most() -> None:
    extra = best_extra_width(10000, 500, (0.05, 0.10), 0.01)
    spans = {}
    for width in (0.02, 0.20, extra):
        ranges = reachable(planned(10000, 500, (0.05, 0.10, width)), 10000, 0.01)
        spans[width] = sum(np.log(high / low) for low, high in ranges)
    assert spans[extra] == max(spans.values())
