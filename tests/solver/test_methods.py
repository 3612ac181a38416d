"""The solve, against the reference numbers and against what the weights mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.solver.averages import Decay
from posthoc_cli.solver.blup import expected_error
from posthoc_cli.solver.estimates import estimate_methods
from posthoc_cli.solver.methods import (
    METHODS,
    check_method,
    choose_method,
    methods_for,
    plain_method,
    solve,
)
from posthoc_cli.solver.profiles import Profile, sigma_rel_to_gamma
from posthoc_cli.solver.trajectory import Trajectory

CASES = json.loads((Path(__file__).parent / "reference_weights.json").read_text())["cases"]
TARGETS = [(case, target) for case in CASES for target in case["targets"]]
NAMES = [f"{case['name']}: {target['sigma_rel']}" for case, target in TARGETS]

PROFILE_METHODS = [name for name in methods_for(raw=False) if not METHODS[name].needs_values]

DEVICES = ["cpu", "torch-cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def profile(step: float, sigma_rel: float) -> Profile:
    return Profile(step, sigma_rel_to_gamma(sigma_rel))


def pairs(count: int, spacing: int = 1000) -> list[Profile]:
    return [profile(spacing * k, s) for k in range(1, count + 1) for s in (0.05, 0.10)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "target"), TARGETS, ids=NAMES)
def test_the_reference_numbers(case: dict, target: dict, device: str) -> None:
    snapshots = [
        profile(case["snapshots"][i]["step"], case["snapshots"][i]["sigma_rel"])
        for i in target["used"]
    ]
    targets = [profile(target["step"], target["sigma_rel"])]
    device = device.removeprefix("torch-") + (":0" if device.startswith("torch-") else "")
    for method, expected in (
        ("edm2", target["edm2_weights"]),
        ("algorithm3", target["algorithm3_weights_exact"]),
    ):
        solution = solve(snapshots, targets, method, device)
        error = np.abs(solution.weights[0] - expected).max() / np.abs(expected).max()
        assert error < 1e-9
    assert solution.profile_error[0] == pytest.approx(target["profile_error_exact"], rel=1e-6)


def test_several_targets_are_each_what_they_are_alone() -> None:
    snapshots = pairs(8)
    targets = [profile(8000, s) for s in (0.03, 0.07, 0.2)] + [profile(9000, 0.1)]
    for method in PROFILE_METHODS:
        together = solve(snapshots, targets, method)
        assert together.weights.shape == (4, 16)
        for k, target in enumerate(targets):
            alone = solve(snapshots, [target], method)
            assert np.allclose(alone.weights[0], together.weights[k], rtol=0, atol=1e-12)
            assert alone.profile_error[0] == pytest.approx(together.profile_error[k], abs=1e-9)


def test_a_target_that_is_a_snapshot_is_that_snapshot() -> None:
    snapshots = pairs(4)
    for method in PROFILE_METHODS:
        solution = solve(snapshots, [snapshots[6]], method)
        assert np.allclose(solution.weights[0], np.eye(8)[6], rtol=0, atol=1e-12)
        assert solution.profile_error[0] < 1e-7
        assert solution.noise_gain[0] == pytest.approx(1)


def test_diagnostics_are_those_of_the_weights() -> None:
    snapshots, target = pairs(5), profile(5000, 0.2)
    grid = (np.arange(200_000) + 0.5) / 200_000 * 5000

    def density(p: Profile) -> np.ndarray:
        inside = (p.gamma + 1) / p.step * (grid / p.step) ** p.gamma
        return np.where(grid < p.step, inside, 0)

    for method in PROFILE_METHODS:
        solution = solve(snapshots, [target], method)
        weights = solution.weights[0]
        difference = density(target) - weights @ np.array([density(p) for p in snapshots])
        expected = np.sqrt(np.sum(difference**2) / np.sum(density(target) ** 2))
        assert solution.profile_error[0] == pytest.approx(expected, rel=1e-4)
        assert solution.noise_gain[0] == pytest.approx(np.linalg.norm(weights))
        assert solution.sum_of_weights[0] == pytest.approx(weights.sum(), abs=1e-13)
    assert abs(solve(snapshots, [target], "edm2").sum_of_weights[0] - 1) < 1e-13
    assert abs(solve(snapshots, [target], "algorithm3").sum_of_weights[0] - 1) > 1e-3


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_snapshots_does_not_matter(random: object) -> None:
    snapshots = pairs(6)
    order = list(range(12))
    random.shuffle(order)  # type: ignore[attr-defined]
    target = [profile(6000, 0.15)]
    straight = solve(snapshots, target).weights[0]
    shuffled = solve([snapshots[i] for i in order], target).weights[0]
    assert np.allclose(shuffled, straight[order], rtol=0, atol=1e-12)


@given(st.floats(1e-3, 1e6))
def test_the_unit_of_the_steps_does_not_matter(unit: float) -> None:
    snapshots, target = pairs(4), profile(4000, 0.07)
    scaled = [Profile(p.step * unit, p.gamma) for p in (*snapshots, target)]
    one, other = solve(snapshots, [target]), solve(scaled[:-1], scaled[-1:])
    assert np.allclose(one.weights, other.weights, rtol=0, atol=1e-10)
    assert one.condition_number == pytest.approx(other.condition_number, rel=1e-6)


def test_six_hundred_snapshots() -> None:
    snapshots = pairs(300)
    solution = solve(snapshots, [profile(300_000, 0.08)])
    assert 1 <= solution.condition_number < 1e10
    assert solution.profile_error[0] < 1e-3
    assert abs(solution.sum_of_weights[0] - 1) < 1e-12


def test_profiles_too_alike_are_named() -> None:
    snapshots = [*pairs(3), Profile(2000, sigma_rel_to_gamma(0.05) * (1 + 1e-13))]
    with pytest.raises(SnapshotError, match=r"step 2000, sigma_rel 0.05 and step 2000, sigma_rel"):
        solve(snapshots, [profile(3000, 0.07)])


def test_what_cannot_be_solved() -> None:
    with pytest.raises(ValueError, match="after the target's step"):
        solve(pairs(3), [profile(2500, 0.07)])
    for method in PROFILE_METHODS:
        with pytest.raises(UsageError, match=f"method='{method}': has no weights for gamma -0.6"):
            solve([*pairs(2), Profile(1500, -0.6)], [profile(2000, 0.07)], method)
    with pytest.raises(ValueError, match="needs a trajectory"):
        solve(pairs(2), [profile(2000, 0.07)], "blup")
    with pytest.raises(ValueError, match="unknown method"):
        solve(pairs(2), [profile(2000, 0.07)], "magic")


@pytest.mark.parametrize("device", DEVICES)
def test_blup_is_one_more_method(device: str) -> None:
    snapshots, target = pairs(8), [profile(8000, 0.03), profile(8000, 0.2)]
    device = device.removeprefix("torch-") + (":0" if device.startswith("torch-") else "")
    edges, rates = np.arange(9) * 1000.0, np.linspace(2, 1, 8)
    trajectory = Trajectory(edges, rates, np.full(16, 1e-3), 1.0)
    blup = solve(snapshots, target, "blup", device, trajectory)
    assert isinstance(blup.weights, np.ndarray)
    assert blup.method == "blup"
    assert np.allclose(blup.sum_of_weights, 1, rtol=0, atol=1e-12)
    assert np.allclose(blup.noise_gain, np.linalg.norm(blup.weights, axis=1))
    assert np.allclose(
        blup.weights, solve(snapshots, target, "blup", "cpu", trajectory).weights, atol=1e-7
    )
    # The profile it gives is not the nearest there is: that is algorithm 3's.
    nearest = solve(snapshots, target, "algorithm3")
    assert (blup.profile_error > nearest.profile_error).all()
    expected = expected_error(trajectory, snapshots, target, blup.weights).total
    assert (expected < expected_error(trajectory, snapshots, target, nearest.weights).total).all()


def test_blup_takes_profiles_without_a_norm() -> None:
    snapshots = [*pairs(3), Profile(3000, -0.7)]
    trajectory = Trajectory(np.arange(4) * 1000.0, np.ones(3), np.zeros(7), 1.0)
    blup = solve(snapshots, [Profile(3000, -0.8), Profile(3000, 3.0)], "blup", "cpu", trajectory)
    assert np.allclose(blup.sum_of_weights, 1)
    assert np.isnan(blup.profile_error).all()


# The registry


@pytest.mark.parametrize("name", METHODS)
def test_every_method_solves_what_it_says_it_takes(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.help
    taken = [pairs(2)] * method.takes_emas + [raws(500, 1000, 1500, 2000)] * method.takes_raw
    assert taken
    walk = Trajectory(np.array([0.0, 2000.0]), np.ones(1), np.full(4, 1e-6), 0.0)
    for snapshots in taken:
        trajectory = walk if method.needs_values else None
        solution = solve(snapshots, [profile(2000, 0.1)], name, trajectory=trajectory)
        assert solution.method == name
        assert solution.weights.shape == (1, 4)
        assert solution.sum_of_weights[0] == pytest.approx(1, abs=0.01)
    for raw, snapshots in ((False, pairs(2)), (True, raws(500, 1000, 1500, 2000))):
        if name not in methods_for(raw):
            with pytest.raises(UsageError, match=f"method='{name}'"):
                check_method(name, raw, raw)
            with pytest.raises(UsageError, match=f"method='{name}'"):
                solve(snapshots, [profile(2000, 0.1)], name, trajectory=walk)


def test_methods_and_their_defaults() -> None:
    assert list(METHODS) == ["edm2", "algorithm3", "blup", "share"]
    assert methods_for(raw=False) == ("edm2", "algorithm3", "blup")
    assert methods_for(raw=True) == ("share", "blup")
    assert plain_method(raw=False) == "edm2"
    assert plain_method(raw=True) == "share"
    assert choose_method(None, [Profile(9, 3.0)]) == choose_method(None, [Decay(9, 0.0)]) == "blup"


def test_the_registry_loads_nothing_that_only_some_methods_need() -> None:
    code = (
        "import sys, posthoc_cli.solver; found = set(sys.modules);"
        "print(sorted(found & {'torch', 'llvmlite', 'posthoc_cli.solver.blup'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_estimates_are_those_of_every_method() -> None:
    walk = Trajectory(np.array([0.0, 2000.0]), np.ones(1), np.full(4, 1e-6), 0.0)
    target = [profile(2000, 0.07)]
    estimates = estimate_methods(pairs(2), target, walk)
    assert [each.method for each in estimates] == ["edm2", "algorithm3", "blup"]
    totals = [each.expected.total[0] for each in estimates if each.expected]
    assert min(totals) == totals[2]
    alike = [*pairs(1), *pairs(1)]
    edm2, _, blup = estimate_methods(alike, target, walk)
    assert (edm2.solved, edm2.expected) == (None, None)
    assert "too alike to be told apart" in edm2.problem
    assert blup.problem == ""
    estimates = estimate_methods(raws(500, 1000, 1500, 2000), target, walk)
    assert [each.method for each in estimates] == ["share", "blup"]


# Raw checkpoints


def raws(*steps: float) -> list[Decay]:
    return [Decay(step, 0.0) for step in steps]


def test_share_is_the_share_of_the_profile_in_each_interval() -> None:
    steps = [100, 250, 700, 1000]
    targets = [Profile(1000, -0.9), Profile(1000, 0.0), Profile(1000, 6.94)]
    solution = solve(raws(*steps), targets, "share")
    for target, weights in zip(targets, solution.weights, strict=True):
        power = target.gamma + 1
        ends = np.array([0, *steps]) ** power / 1000**power
        assert weights == pytest.approx(np.diff(ends), rel=1e-13)
    assert solution.method == "share"
    assert solution.condition_number == 1
    assert np.isnan(solution.profile_error).all()
    assert solution.noise_gain == pytest.approx(np.linalg.norm(solution.weights, axis=1))


def test_the_last_checkpoint_also_stands_for_what_is_after_it() -> None:
    solution = solve(raws(100, 200), [Profile(400, 1.0)], "share")
    assert solution.weights[0] == pytest.approx([1 / 16, 15 / 16])


@given(
    st.lists(st.integers(1, 2**53), min_size=1, max_size=8, unique=True),
    st.floats(-0.999, 1e12),
    st.floats(1, 2),
)
@example([1, 2114712712], -0.5, 1.0)
def test_shares_sum_to_one_whatever_the_steps(steps: list[int], gamma: float, on: float) -> None:
    target = Profile(max(steps) * on, gamma)
    solution = solve(raws(*steps), [target], "share")
    assert (solution.weights >= 0).all()
    assert solution.sum_of_weights[0] == pytest.approx(1, abs=1e-12)
    shuffled = solve(raws(*sorted(steps)), [target], "share").weights[0]
    assert solution.weights[0].tolist() == shuffled[np.argsort(np.argsort(steps))].tolist()


def test_shares_of_steps_side_by_side_keep_their_digits() -> None:
    first, last = 2**53 - 1, 2**53
    weights = solve(raws(first, last), [Profile(last, 9.0)], "share").weights[0]
    assert weights[1] == pytest.approx(10 / 2**53, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_for_emas_or_for_raw_checkpoints(method: str) -> None:
    emas = pairs(2)
    target = [profile(9000, 0.1)]
    walk = Trajectory(np.array([0.0, 9000.0]), np.ones(1), np.zeros(4), 0.0)
    if not METHODS[method].takes_raw:
        with pytest.raises(UsageError, match="raw checkpoints have no profile; use blup"):
            solve([*emas[:3], *raws(3000)], target, method, trajectory=walk)
    if method == "share":
        with pytest.raises(UsageError, match="is for raw checkpoints only; use blup"):
            solve([*emas[:3], *raws(3000)], target, method)


def test_blup_takes_emas_and_raw_checkpoints_together() -> None:
    mixed = [*pairs(1), *raws(500, 2000)]
    walk = Trajectory(np.array([0.0, 2000.0]), np.ones(1), np.full(4, 1e-9), 0.0)
    solution = solve(mixed, [Profile(2000, 3.0)], "blup", trajectory=walk)
    assert solution.sum_of_weights[0] == pytest.approx(1)
    assert np.isnan(solution.profile_error[0])
