"""The kinds of averages, against sums over every step."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from posthoc_cli.solver.averages import (
    KINDS,
    Decay,
    LrDecay,
    Schedule,
    Scheduled,
    Window,
    read_average,
)
from posthoc_cli.solver.profiles import Average, Profile

FloatArray = npt.NDArray[np.float64]

SCHEDULES = [
    Schedule(),
    Schedule(decay=0.99),
    Schedule(decay=0.05),
    Schedule(decay=0.0),
    Schedule(update_after_step=100, min_decay=0.5),
    Schedule(decay=0.9, min_decay=0.95),
    Schedule(decay=0.0, min_decay=0.3),
    Schedule(use_ema_warmup=True),
    Schedule(use_ema_warmup=True, power=0.75, decay=0.999),
    Schedule(use_ema_warmup=True, inv_gamma=1e4, update_after_step=7),
    Schedule(use_ema_warmup=True, power=3.0),
    Schedule(use_ema_warmup=True, power=0.1, min_decay=0.2),
]


def emas_decay(schedule: Schedule, step: int) -> float:
    """The decay of update number `step`, one at a time, as diffusers' EMAModel tells it."""
    since = max(0, step - schedule.update_after_step - 1)
    if since <= 0:
        return 0.0
    if schedule.use_ema_warmup:
        decay = 1 - (1 + since / schedule.inv_gamma) ** -schedule.power
    else:
        decay = (1 + since) / (10 + since)
    return max(min(decay, schedule.decay), schedule.min_decay)


def weights(average: Average) -> FloatArray:
    """Of the start and of each step."""
    return np.diff(average.share(np.arange(average.step + 1)), prepend=0.0)


def followed(decays: FloatArray) -> FloatArray:
    """The weights of an EMA, update by update."""
    found = np.zeros(len(decays) + 1)
    found[0] = 1.0
    for step, decay in enumerate(decays, 1):
        found *= decay
        found[step] = 1 - decay
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step", [1, 2, 50, 102, 6000])
def test_a_scheduled_ema_holds_what_its_updates_gave_it(schedule: Schedule, step: int) -> None:
    decays = np.array([emas_decay(schedule, at) for at in range(1, step + 1)])
    assert weights(Scheduled(step, schedule)) == pytest.approx(followed(decays), abs=2e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_of_very_many_steps(schedule: Schedule) -> None:
    step = 300_000
    logs = np.log([max(emas_decay(schedule, at), 1e-300) for at in range(1, step + 1)])
    exact = np.append(np.exp(np.cumsum(logs[::-1])[::-1]), 1.0)
    found = Scheduled(step, schedule).share(np.arange(step + 1.0))
    assert np.abs(found - exact).max() < 2e-11
    fine = Scheduled(step, schedule).share(np.linspace(step - 50, step, 997))
    assert np.all(np.diff(fine) >= 0)
    late = Scheduled(1e8, schedule).share(np.geomspace(1, 1e8, 9))
    assert np.all(np.diff(late) >= 0)
    assert late[-1] == 1


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.9999])
def test_a_fixed_decay_leaves_its_part_on_the_start(beta: float) -> None:
    assert weights(Decay(400, beta)) == pytest.approx(followed(np.full(400, beta)), abs=1e-14)


def test_a_raw_checkpoint_is_an_average_of_one_step() -> None:
    u = np.array([[0.0, 50.0, 99.999], [100.0, 101.0, 1e9]])
    assert Decay(100, 0.0).share(u).tolist() == [[0, 0, 0], [1, 1, 1]]
    below = np.nextafter(np.array([100.0, 2.0**53]), 0)
    assert Decay(100, 0.0).share(below[:1]) == 0
    assert Decay(2.0**53, 0.0).share(below[1:]) == 0
    assert Decay(100, 0.0).raw
    assert not Decay(100, 1e-9).raw
    assert not Profile(100, 3.0).raw


@pytest.mark.parametrize("length", [1, 7, 100, 400])
def test_a_window_is_the_mean_of_the_last_steps(length: int) -> None:
    expected = np.repeat([0.0, 1 / length], [401 - length, length])
    assert weights(Window(400, length)) == pytest.approx(expected, abs=1e-15)
    assert weights(LrDecay(400, "linear", length)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_a_decay_of_the_rate_is_the_average_of_its_steps(shape: str) -> None:
    """With rates w each step counts w; the average is the network that those steps lead to."""
    step, length = 300, 120
    w = {
        "linear": lambda x: 1 - x,
        "1-sqrt": lambda x: 1 - np.sqrt(x),
        "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    }[shape]
    updates = np.random.default_rng(0).normal(size=step)  # the network's way, one value of it
    rates = np.ones(step)
    rates[step - length :] = w(np.arange(length) / length)  # of the step from k to k + 1
    network = np.concatenate([[0.0], np.cumsum(updates)])
    decayed = np.cumsum(updates * rates)[-1]
    assert weights(LrDecay(step, shape, length)) @ network == pytest.approx(decayed, abs=1e-12)


EVERY = [
    Profile(400, 6.94),
    Profile(400.0, -0.9),
    Decay(400, 0.0),
    Decay(400, 0.999),
    Window(400, 30.5),
    LrDecay(400, "1-sqrt", 40),
    LrDecay(400, "cosine", 400),
    Scheduled(400, Schedule(use_ema_warmup=True, update_after_step=10)),
]


@pytest.mark.parametrize("average", EVERY)
def test_every_kind_is_an_average(average: Average) -> None:
    u = np.linspace(0, 500, 4001)
    share = average.share(u)
    assert np.all(np.diff(share) >= 0)
    assert np.all(share[u >= 400] == 1)
    assert np.all((share >= 0) & (share <= 1))
    assert average.share(np.array(123.0)).shape == ()
    low, high = np.array([0.0, 0.0, 399.0, 17.0]), np.array([0.0, 400.0, 400.0, 18.0])
    expected = average.share(high) - average.share(low)
    assert average.between(low, high) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("average", [each for each in EVERY if each.recursive])
def test_a_running_average_holds_the_earlier_one_whole(average: Average) -> None:
    earlier = dataclasses.replace(average, step=250)
    u = np.linspace(0, 250, 251)
    expected = average.share(np.array(250.0)) * earlier.share(u)
    assert average.share(u)[:-1] == pytest.approx(expected[:-1], abs=1e-13)


@pytest.mark.parametrize("average", EVERY)
def test_every_kind_can_be_told_and_read_back(average: Average) -> None:
    document = json.loads(json.dumps(average.as_dict()))
    assert list(document)[:2] == ["kind", "step"]
    assert read_average(document) == average
    assert document["kind"] in KINDS


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"kind": "square", "step": 4},
        {"kind": ["window"], "step": 4, "length": 2},
        {"kind": "window", "step": 4},
        {"kind": "window", "step": 4, "length": 5},
        {"kind": "window", "step": 4, "length": "2"},
        {"kind": "window", "step": 4, "length": True},
        {"kind": "window", "step": float("nan"), "length": 2},
        {"kind": "power", "step": 4, "gamma": -1},
        {"kind": "power", "step": 4, "gamma": 10**400},
        {"kind": "power", "step": 0, "gamma": 1},
        {"kind": "decay", "step": 4, "beta": 1},
        {"kind": "lr-decay", "step": 4, "shape": "wsd", "length": 2},
        {"kind": "scheduled", "step": 4, "decay": 1.5},
        {"kind": "scheduled", "step": 4, "update_after_step": 1.5},
        {"kind": "scheduled", "step": 4, "use_ema_warmup": 1},
    ],
)
def test_what_is_no_average_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no kind of average|is no |out of bounds|no profile has"):
        read_average(document)
