"""Inner products of averages, against sums over every step; and what edm2 makes of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from posthoc_cli.errors import UsageError
from posthoc_cli.solver import solve
from posthoc_cli.solver.averages import Decay, LrDecay, Schedule, Scheduled, Window
from posthoc_cli.solver.blup import Trajectory
from posthoc_cli.solver.overlaps import overlaps
from posthoc_cli.solver.profiles import Average, Profile

FloatArray = npt.NDArray[np.float64]

LAST = 20_000
EVERY = [
    Profile(LAST, 6.94),
    Profile(LAST, -0.7),
    Profile(19_223, 16.97),
    Profile(LAST, 1e4),
    Decay(LAST, 0.0),
    Decay(12_345, 0.0),
    Decay(LAST, 0.5),
    Decay(12_345, 0.999),
    Decay(LAST, 0.99999),
    Window(LAST, 1000),
    Window(LAST, 1),
    Window(LAST, 7777.5),
    LrDecay(LAST, "1-sqrt", 2000),
    LrDecay(LAST, "1-sqrt", LAST),
    LrDecay(LAST, "cosine", 3000),
    LrDecay(15_000, "linear", 300),
    Scheduled(LAST, Schedule()),
    Scheduled(LAST, Schedule(decay=0.999, use_ema_warmup=True, update_after_step=100)),
    Scheduled(13, Schedule(min_decay=0.9, update_after_step=10)),
]
POWERS = [Profile(250.0 * (at + 1), gamma) for at in range(24) for gamma in (6.94, 16.97)]
TARGETS = [
    *(Window(6000, 600), Window(6000, 1800), Window(6000, 6000)),
    *(LrDecay(6000, "1-sqrt", 1200), LrDecay(6000, "cosine", 1200)),
    *(Decay(6000, 0.99), Decay(6000, 2 ** (-1 / 600))),
]


def weights_of(average: Average, last: int) -> FloatArray:
    """Of the start and of every step."""
    return np.diff(average.share(np.arange(last + 1.0)), prepend=0.0)


def test_overlaps_are_the_sums_over_all_steps() -> None:
    weights = np.stack([weights_of(each, LAST) for each in EVERY])
    exact = weights @ weights.T
    norms = np.sqrt(np.diagonal(exact))
    found = overlaps(EVERY, EVERY)
    assert np.abs(found - exact).max() <= 1e-11 * np.outer(norms, norms).max()
    assert np.all(np.abs(found - exact) <= 1e-11 * np.outer(norms, norms))
    assert found[4, 4] == found[5, 5] == found[10, 10] == 1
    assert overlaps(EVERY[:2], EVERY[3:5]).shape == (2, 2)


@pytest.mark.parametrize("last", [1, 2, 13, 47])
def test_overlaps_of_a_few_steps(last: int) -> None:
    some = [Decay(last, 0.9), Profile(last, 3.0), LrDecay(last, "1-sqrt", last), Window(last, 1)]
    weights = np.stack([weights_of(each, last) for each in some])
    assert overlaps(some, some) == pytest.approx(weights @ weights.T, rel=1e-12)


def test_sums_are_the_integrals_where_the_steps_are_many() -> None:
    powers = [Profile(1e6 * at, gamma) for at in (1, 2, 3) for gamma in (0.0, 6.94, 16.97)]
    from posthoc_cli.solver.profiles import cosine

    steps, gammas = (np.array([getattr(p, name) for p in powers]) for name in ("step", "gamma"))
    products = overlaps(powers, powers)
    norms = np.sqrt(np.diagonal(products))
    found = products / np.outer(norms, norms)
    assert found == pytest.approx(cosine(steps[:, None], gammas[:, None], steps, gammas), abs=1e-9)


@pytest.mark.parametrize("method", ["edm2", "algorithm3"])
def test_targets_of_any_kind_are_as_near_as_can_be(method: str) -> None:
    solution = solve(POWERS, TARGETS, method)
    basis = np.stack([weights_of(each, 6000) for each in POWERS])
    for at, target in enumerate(TARGETS):
        wanted = weights_of(target, 6000)
        best = np.linalg.lstsq(basis.T, wanted, rcond=None)[0]
        if method == "edm2":
            best = best / best.sum()
        off = np.linalg.norm(solution.weights[at] @ basis - wanted) / np.linalg.norm(wanted)
        least = np.linalg.norm(best @ basis - wanted) / np.linalg.norm(wanted)
        assert off == pytest.approx(least, rel=1e-6)
        assert solution.profile_error[at] == pytest.approx(off, rel=1e-6, abs=1e-9)
        if method == "edm2":
            assert solution.sum_of_weights[at] == pytest.approx(1)


def test_the_weights_of_a_target_dont_depend_on_the_others() -> None:
    power = Profile(6000, 9.0)
    mixed = solve(POWERS, [TARGETS[0], power, TARGETS[3]], "edm2")
    assert mixed.weights[1].tolist() == solve(POWERS, [power], "edm2").weights[0].tolist()
    assert mixed.weights[0] == pytest.approx(solve(POWERS, TARGETS[:1], "edm2").weights[0])


def test_edm2_from_emas_of_fixed_decay() -> None:
    emas = [Decay(100.0 * (at + 1), 0.99) for at in range(24)]
    wanted = weights_of(Window(2400, 480), 2400)
    basis = np.stack([weights_of(each, 2400) for each in emas])
    solution = solve(emas, [Window(2400, 480), Profile(2400, 9.0)], "edm2")
    off = np.linalg.norm(solution.weights[0] @ basis - wanted) / np.linalg.norm(wanted)
    assert solution.profile_error[0] == pytest.approx(off, rel=1e-9)
    assert off < 0.3


def test_blup_tells_the_profile_error_of_any_target() -> None:
    walk = Trajectory(np.array([0.0, 6000.0]), np.ones(1), np.full(len(POWERS), 1e-12), 0.0)
    targets = [TARGETS[0], Profile(6000, 9.0), TARGETS[5]]
    solution = solve(POWERS, targets, "blup", trajectory=walk)
    basis = np.stack([weights_of(each, 6000) for each in POWERS])
    for at in (0, 2):
        wanted = weights_of(targets[at], 6000)
        off = np.linalg.norm(solution.weights[at] @ basis - wanted) / np.linalg.norm(wanted)
        assert solution.profile_error[at] == pytest.approx(off, rel=1e-6)
    assert 0 < solution.profile_error[1] < 0.1


def test_of_thousands_of_snapshots_edm2_knows_power_functions_only() -> None:
    many = [Profile(100.0 * (at + 1), 6.94) for at in range(500)]
    with pytest.raises(UsageError, match="of 500 snapshots it knows power functions only; use "):
        solve(many, [Window(50_000, 500)], "edm2")
    walk = Trajectory(np.array([0.0, 50_000.0]), np.ones(1), np.full(500, 1e-12), 0.0)
    solution = solve(many, [Window(50_000, 5000)], "blup", trajectory=walk)
    assert solution.sum_of_weights[0] == pytest.approx(1)
    assert np.isnan(solution.profile_error[0])


@pytest.mark.parametrize(
    "target", [Window(1000, 300), LrDecay(1000, "1-sqrt", 500), Decay(1000, 0.99)]
)
def test_share_of_raw_checkpoints_for_any_target(target: Average) -> None:
    steps = [100, 250, 700, 1000]
    weights = solve([Decay(step, 0.0) for step in steps], [target], "share").weights[0]
    ends = target.share(np.array([0.0, *steps]))
    ends[0] = 0.0  # the first one also stands for what lies on the start
    assert weights == pytest.approx(np.diff(ends), abs=1e-15)
