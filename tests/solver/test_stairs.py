"""Averages that are updated every N steps, against what a tracker does step by step."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.solver.averages import Decay, Window, read_average
from posthoc_cli.solver.blup import blup_weights, expected_error
from posthoc_cli.solver.chains import find_chains
from posthoc_cli.solver.fitting import fit_trajectory
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Average, Profile, decay
from posthoc_cli.solver.quadrature import MOST_STAIRS, resolved
from posthoc_cli.solver.trajectory import Jitter, Trajectory, moments


def tracked(way: FloatArray, last: int, gamma: float, every: int) -> FloatArray:
    """The average after `last` steps of `way` [steps + 1, ...], whose first is the start."""
    average = way[0]
    for step in range(1, last + 1):
        if step % every == 0 or step == last:
            beta = decay(gamma, step, step % every or every)
            average = beta * average + (1 - beta) * way[step]
    return average


def tracked_by_one(way: FloatArray, last: int, gamma: float, every: int) -> FloatArray:
    """The same as ema-pytorch has it: after steps 1, N + 1, ..., with the decay of one step."""
    average = way[1]
    for step in range(1, last + 1, every):
        beta = decay(gamma, step + 1)
        average = beta * average + (1 - beta) * way[step]
    return average


def one_step(last: float, gamma: float, every: int) -> Profile:
    return Profile(last, (1 + gamma) / every - 1, every, one_step=True)


@pytest.mark.parametrize("last", [300, 1000, 1007, 1050])
@pytest.mark.parametrize(("gamma", "every"), [(6.94, 100), (1.3, 10), (-0.5, 3)])
def test_its_share_is_what_a_tracker_weighs(last: int, gamma: float, every: int) -> None:
    each_step = np.eye(last + 1)
    steps = np.arange(last + 1.0)
    exact = np.cumsum(tracked(each_step, last, gamma, every))
    assert Profile(last, gamma, every).share(steps) == pytest.approx(exact, abs=1e-12)
    exact = np.cumsum(tracked_by_one(each_step, last, gamma, every))
    found = one_step(last, gamma, every).share(steps)
    assert found == pytest.approx(exact, rel=0.005)
    assert found[5 * every :] == pytest.approx(exact[5 * every :], rel=1e-4)
    assert list(np.flatnonzero(np.diff(found, prepend=0.0)))[:3] == [1, 1 + every, 1 + 2 * every]


def test_told_and_read() -> None:
    plain, stairs = Profile(900.0, 2.0), one_step(900.0, 6.94, 100)
    assert plain.as_dict() == {"kind": "power", "step": 900.0, "gamma": 2.0}
    assert stairs.as_dict() | {"gamma": 0} == {
        "kind": "power",
        "step": 900.0,
        "gamma": 0,
        "update_every": 100,
        "one_step": True,
    }
    for each in (plain, stairs, Profile(900.0, 2.0, 10)):
        assert read_average(each.as_dict()) == each
    with pytest.raises(ValueError, match="update_every 0 is out of bounds"):
        read_average({**plain.as_dict(), "update_every": 0})
    with pytest.raises(ValueError, match="its update_every is no number"):
        read_average({**plain.as_dict(), "update_every": "2"})


LAST = 1200
KINDS: list[Average] = [
    *(one_step(step, 6.94, 100) for step in (600, LAST)),
    *(Profile(step, 5.0, 30) for step in (555, LAST)),
    *(Profile(LAST, 9.0), Decay(700.0, 0.0), Window(LAST, 250)),
]


@pytest.mark.parametrize("lag", [None, 1.0, 40.0])
def test_moments_are_the_sums_over_all_steps(lag: float | None) -> None:
    """Of a walk of variance 1 a step, and of jitter that is forgotten after some steps."""
    weights = np.stack([np.diff(each.share(np.arange(LAST + 1.0)), prepend=0.0) for each in KINDS])
    steps = np.arange(LAST + 1)
    edges, still = np.array([0.0, LAST]), np.zeros(1)
    if lag is None:
        trajectory = Trajectory(edges, np.ones(1), np.zeros(len(KINDS)), 0.0)
        before = np.cumsum(weights, axis=1)[:, :-1]
        exact = before @ before.T  # step k of the walk enters with G(k - 1), up to a constant
    else:
        trajectory = Trajectory(edges, still, np.zeros(7), 0.0, (Jitter(lag, np.ones(1)),))
        apart = np.abs(steps[:, None] - steps)
        exact = weights @ np.maximum(1 - apart / lag, 0.0) @ weights.T
    found = moments(trajectory, KINDS, [])
    scale = np.sqrt(np.diagonal(exact))
    # Where no share is a staircase, it rises within the steps too.
    stairs = np.array([each.stairs is not None or each.raw for each in KINDS])
    close = np.where(stairs[:, None] & stairs, 1e-12, 0.02)
    assert np.all(np.abs(found - exact) <= close * np.outer(scale, scale))


def test_of_too_many_stairs_the_slope_is_seen() -> None:
    many = one_step(MOST_STAIRS, 6.94, 2)
    (smooth, raw), stairs = resolved([many, Decay(5.0, 0.0)], MOST_STAIRS + 2.0)
    assert (smooth, len(stairs)) == (many.smooth, 0)
    assert raw == Decay(5.0, 0.0)
    assert resolved([Profile(9.0, 2.0)], 9.0)[1].size == 0


def test_weights_and_errors_of_a_walk() -> None:
    """The error that comes out is the one that was expected, and smaller than by smooth shares."""
    last, gammas = 4000, (16.97, 0.24)
    rng = np.random.default_rng(0)
    way = np.cumsum(rng.standard_normal((last + 1, 400)), axis=0) / last**0.5
    saved = [(step, gamma) for step in range(250, last + 1, 250) for gamma in gammas]
    stored = np.stack([tracked_by_one(way, step, gamma, 100) for step, gamma in saved])
    targets: list[Average] = [Profile(last, 16.97), Profile(last, 6.94)]
    truth = np.stack([np.diff(each.share(np.arange(last + 1.0)), prepend=0.0) for each in targets])
    truth = truth @ way
    apart = np.mean((stored[:, None] - stored) ** 2, axis=2)
    noise = np.full(len(stored), 1e-15)

    def errors(snapshots: list[Average]) -> tuple[FloatArray, FloatArray]:
        fitted = fit_trajectory(snapshots, apart, noise, np.mean(stored**2, axis=1))
        weights, _ = blup_weights(fitted, snapshots, targets)
        told = expected_error(fitted, snapshots, targets, weights).total
        return np.sqrt(np.mean((weights @ stored - truth) ** 2, axis=1)), told

    stairs = [one_step(step, gamma, 100) for step, gamma in saved]
    true, told = errors(list(stairs))
    assert told / true == pytest.approx([1, 1], rel=0.35)
    assert np.all(true < 0.8 * errors([each.smooth for each in stairs])[0])


def test_thousands_are_solved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = [one_step(100.0 * at, gamma, 50) for at in range(2, 14) for gamma in (30.0, 90.0)]
    targets: list[Average] = [Profile(1300.0, 9.0), Window(1300.0, 300.0)]
    edges = np.array([0.0, 500.0, 1300.0])
    jitter = (Jitter(1.0, np.full(2, 0.1)), Jitter(40.0, np.full(2, 0.2)))
    noise = np.full(len(snapshots), 1e-9)
    way = Trajectory(edges, np.array([2.0, 1.0]), noise, 0.0, jitter)
    plain, _ = blup_weights(way, snapshots, targets)
    known = expected_error(way, snapshots, targets, plain)
    monkeypatch.setattr("posthoc_cli.solver.chains.MANY", 10)
    assert find_chains(snapshots)
    weights, _ = blup_weights(way, snapshots, targets)
    told = expected_error(way, snapshots, targets, weights)
    assert told.total == pytest.approx(known.total, rel=1e-3)


def test_the_papers_methods_see_the_profile() -> None:
    saved = [(100.0 * at, gamma) for at in range(2, 9) for gamma in (30.0, 90.0)]
    targets: list[Average] = [Profile(800.0, 9.0), Window(800.0, 300.0)]
    stairs = [one_step(step, gamma, 10) for step, gamma in saved]
    found = solve(stairs, targets, "edm2")
    smooth = solve([each.smooth for each in stairs], targets, "edm2")
    assert found.weights.tolist() == smooth.weights.tolist()
