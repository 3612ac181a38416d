"""What is searched."""

from __future__ import annotations

import pytest

from posthoc_cli.errors import UsageError
from posthoc_cli.tuning.axis import Axis, length_of, make_axis, read_axis


@pytest.mark.parametrize(
    ("parameter", "text", "bounds", "length", "named"),
    [
        ("sigma_rel", "0.02:0.25", (0.02, 0.25), 0.0714285, "sigma-rel:0.07143"),
        ("sigma_rel", "0.1:0.28866", (0.1, 0.28866), 0.28865, "sigma-rel:0.28866"),
        ("window", "100:2000", (100, 2000), 447.2, "window:447"),
        ("window", "1%:50%", (1, 50), 7.0711, "window:7.071%"),
        ("half_life", "10:2e3", (10, 2000), 141.4213, "half-life:141.4"),
        ("decay", "0.9:0.9999", (6.5788, 6931.1), 693.147, "decay:0.9990005"),
    ],
)
def test_ranges(
    parameter: str, text: str, bounds: tuple[float, float], length: float, named: str
) -> None:
    axis = read_axis(parameter, text)
    assert axis.bounds == pytest.approx(bounds, rel=1e-4)
    target = axis.target(length)
    assert target.named == named
    assert length_of(target) == pytest.approx(length, rel=1e-3)
    for at in (*bounds, bounds[0] / 2, bounds[1] * 2):
        assert axis.bounds[0] <= length_of(axis.target(at)) <= axis.bounds[1]
    assert make_axis(parameter, axis.low.text, axis.high.text) == axis
    assert isinstance(axis, Axis)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        ("sigma_rel", "0.02"),
        ("sigma_rel", "0.2:0.1"),
        ("sigma_rel", "0.1:0.1"),
        ("sigma_rel", "0.1:0.3"),
        ("sigma_rel", ":0.2"),
        ("sigma_rel", "a:b"),
        ("window", "1%:100"),
        ("window", "0.5:100"),
        ("decay", "0.9:1"),
    ],
)
def test_what_is_no_range(parameter: str, text: str) -> None:
    with pytest.raises(UsageError, match=r"^range=: .*; give, say, range='"):
        read_axis(parameter, text)


def test_what_cant_be_searched() -> None:
    with pytest.raises(UsageError, match="'gamma' can't be searched; choose"):
        read_axis("gamma", "1:2")
