"""The search for the best length."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from posthoc_cli.tuning.search import Space, first_points


def test_first_points_are_even_in_log() -> None:
    logs = [math.log(length) for (length,) in first_points(Space(0.02, 0.25))]
    assert math.exp(logs[0]) == pytest.approx(0.02)
    assert math.exp(logs[-1]) == pytest.approx(0.25)
    gaps = [high - low for low, high in pairwise(logs)]
    assert gaps == pytest.approx([math.log(12.5) / 6] * 6)
    assert first_points(Space(0.01, 0.04), 1) == [(pytest.approx(0.02),)]
    assert first_points(Space(0.01, 0.04), 0) == []


def test_first_points_take_every_step_in_turn() -> None:
    points = first_points(Space(0.02, 0.25, (100, 200, 300)), 9)
    assert sorted(step for _, step in points) == [100] * 3 + [200] * 3 + [300] * 3
