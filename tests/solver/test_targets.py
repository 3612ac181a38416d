"""Targets as a caller names them."""

from __future__ import annotations

import pytest

from posthoc_cli.errors import UsageError
from posthoc_cli.solver.targets import make_targets


def test_targets() -> None:
    targets = make_targets([0.050, 0.10, 0.05], [16.970, -0.3])
    assert [str(target) for target in targets] == [
        "sigma_rel 0.05",
        "sigma_rel 0.1",
        "gamma 16.97",
        "gamma -0.3",
    ]
    assert targets[0].sigma_rel == 0.05
    assert targets[0].gamma == pytest.approx(16.9721986)
    assert targets[2].gamma == 16.97
    assert targets[2].sigma_rel == pytest.approx(0.0500055, rel=1e-6)
    assert make_targets(0.05) == targets[:1]
    assert make_targets(gamma=-0.3) == targets[3:]


@pytest.mark.parametrize("value", ["0", "-0.1", "0.2887", "1", "0.0000000000001"])
def test_sigma_rel_has_bounds(value: str) -> None:
    with pytest.raises(UsageError, match=rf"^sigma_rel=: {value} is out of bounds; .*0\.2887"):
        make_targets(float(value))


@pytest.mark.parametrize("value", ["-1", "-2", "10000000000000"])
def test_gamma_has_bounds(value: str) -> None:
    with pytest.raises(UsageError, match=rf"^gamma=: {value} is out of bounds; .* above -1,"):
        make_targets(gamma=float(value))


def test_a_target_is_needed() -> None:
    with pytest.raises(UsageError, match="no target"):
        make_targets(None, [])
