"""Targets as a caller names them."""

from __future__ import annotations

from typing import Any

import pytest

from posthoc_cli.errors import UsageError
from posthoc_cli.solver.averages import Decay, LrDecay, Window
from posthoc_cli.solver.profiles import Average, Profile
from posthoc_cli.solver.targets import make_targets, read_target


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


def test_targets_of_every_kind_in_one_call() -> None:
    targets = make_targets(
        half_life=[24, "1%"],
        decay=0.999,
        lr_decay=("1-sqrt:10%", "linear:480", "1-sqrt:10.0%"),
        window=["5%", 480, "480", "5%"],
        sigma_rel=0.15,
    )
    assert [target.named for target in targets] == [
        "sigma-rel:0.15",
        *("window:5%", "window:480"),
        *("lr-decay:1-sqrt:10%", "lr-decay:linear:480"),
        "decay:0.999",
        *("half-life:24", "half-life:1%"),
    ]
    assert [target.tag for target in targets] == [
        "sigma0.15",
        *("window5pct", "window480"),
        *("lr-decay-1-sqrt-10pct", "lr-decay-linear-480"),
        "decay0.999",
        *("half-life24", "half-life1pct"),
    ]
    assert str(targets[3]) == "lr-decay 1-sqrt:10%"
    assert [read_target(target.named) for target in targets] == targets
    assert all(target.sigma_rel is target.gamma is None for target in targets[1:])


@pytest.mark.parametrize(
    ("text", "average"),
    [
        ("gamma:3", Profile(2400, 3.0)),
        ("window:480", Window(2400, 480)),
        ("window:5%", Window(2400, 120)),
        ("window:100%", Window(2400, 2400)),
        ("window:0.05%", Window(2400, 1)),
        ("window:2400", Window(2400, 2400)),
        ("window:1", Window(2400, 1)),
        ("window:1e3", Window(2400, 1000)),
        ("lr-decay:cosine:20%", LrDecay(2400, "cosine", 480)),
        ("lr_decay:1-sqrt:7", LrDecay(2400, "1-sqrt", 7)),
        ("decay:0.999", Decay(2400, 0.999)),
        ("half-life:24", Decay(2400, 2 ** (-1 / 24))),
        ("half-life:1%", Decay(2400, 2 ** (-1 / 24))),
        ("half-life:0.0001", Decay(2400, 0.0)),
        ("half-life:1e12", Decay(2400, 2 ** (-1e-12))),
        ("half-life:500%", Decay(2400, 2 ** (-1 / 12000))),
    ],
)
def test_the_average_at_a_step(text: str, average: Average) -> None:
    target = read_target(text)
    assert target.profile(2400) == average
    widths = {"sigma_rel": target.sigma_rel, "gamma": target.gamma}
    assert target.as_dict(2400) == {**average.as_dict(), **widths, "text": target.named}


def test_a_part_of_the_step_is_a_whole_number_of_steps() -> None:
    assert read_target("window:5%").profile(333) == Window(333, 17)
    assert read_target("half-life:5%").profile(333) == Decay(333, 2 ** (-1 / 16.65))


@pytest.mark.parametrize("value", ["0", "-0.1", "0.2887", "1", "0.0000000000001"])
def test_sigma_rel_has_bounds(value: str) -> None:
    with pytest.raises(UsageError, match=rf"^sigma_rel=: {value} is out of bounds; .*0\.2887"):
        make_targets(float(value))


@pytest.mark.parametrize("value", ["-1", "-2", "10000000000000"])
def test_gamma_has_bounds(value: str) -> None:
    with pytest.raises(UsageError, match=rf"^gamma=: {value} is out of bounds; .* above -1,"):
        make_targets(gamma=float(value))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"decay": 1}, "decay=: 1 is out of bounds; give values above 0 and below 1, .*"),
        ({"decay": 0}, "decay=: 0 is out of bounds; .*"),
        ({"decay": -0.5}, r"decay=: -0\.5 is out of bounds; .*"),
        ({"decay": "99%"}, r"decay=: '99%' is no number; give, say, 0\.999"),
        ({"decay": float("nan")}, "decay=: nan is out of bounds; .*"),
        ({"window": "5 %"}, "window=: '5 %' is no number; give, say, 480 or 5%"),
        ({"window": "%"}, "window=: '%' is no number; .*"),
        ({"window": "0%"}, "window=: 0% is no length; give, say, 480 or 5%"),
        ({"window": 0}, "window=: 0 is no length; .*"),
        ({"window": -480}, "window=: -480 is no length; .*"),
        ({"window": "inf"}, "window=: inf is no length; .*"),
        ({"window": "101%"}, "window=: 101% is more than there is; give up to 100%"),
        ({"window": 0.05}, r"window=: 0\.05 is less than one step; .* ends in %"),
        ({"window": 480.5}, r"window=: 480\.5 is no whole number of steps; .*"),
        ({"window": [None]}, "window=: None is no number; .*"),
        ({"lr_decay": "1-sqrt"}, "lr_decay=: '1-sqrt' has no length; give, say, 1-sqrt:480 or .*"),
        ({"lr_decay": "10%"}, "lr_decay=: '10%' has no shape; give, say, 1-sqrt:480 or .*"),
        ({"lr_decay": 480}, "lr_decay=: '480' has no shape; .*"),
        ({"lr_decay": "wsd:5%"}, "lr_decay=: 'wsd' is no shape; choose linear, 1-sqrt or cosine"),
        ({"lr_decay": ":5%"}, "lr_decay=: '' is no shape; .*"),
        ({"lr_decay": "linear:"}, "lr_decay=: 'linear:' is no number; .*"),
        ({"lr_decay": "linear:5:6"}, "lr_decay=: 'linear:5:6' is no number; .*"),
        ({"lr_decay": "cosine:0%"}, "lr_decay=: cosine:0% is no length; .*"),
        ({"half_life": 0}, "half_life=: 0 is no length; .*"),
        ({"half_life": 1e13}, "half_life=: 10000000000000 is out of bounds; .*"),
        ({"sigma_rel": "5%"}, r"sigma_rel=: '5%' is no number; give, say, 0\.05"),
    ],
)
def test_what_is_no_target_is_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=f"^{line}$"):
        make_targets(**given)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("window:301", "window=: 301 is longer than the 300 steps up to the target; .*"),
        ("lr-decay:linear:301", "lr_decay=: linear:301 is longer than the 300 steps .*"),
        ("window:0.1%", r"window=: 0\.1% of step 300 is less than one step; give 0\.34% or more"),
    ],
)
def test_a_length_has_to_fit_the_step(text: str, line: str) -> None:
    with pytest.raises(UsageError, match=f"^{line}$"):
        read_target(text).profile(300)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0.05", "it has no kind"),
        ("wide:5%", "'wide' is no kind of target"),
        ("window:", "'' is no number"),
        ("lr-decay:1-sqrt", "'1-sqrt' has no length"),
        ("sigma-rel:0.3", r"0\.3 is out of bounds"),
    ],
)
def test_a_text_that_is_no_target(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=f"^'{text}': {problem}; "):
        read_target(text)


def test_a_target_is_needed() -> None:
    with pytest.raises(UsageError, match="no target"):
        make_targets(None, [])
