"""Weights of very many snapshots: those of the plain matrices, without the matrices."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from posthoc_cli.errors import SnapshotError
from posthoc_cli.solver import chains, solve
from posthoc_cli.solver.averages import Decay, Schedule, Scheduled
from posthoc_cli.solver.blup import expected_error
from posthoc_cli.solver.chains import find_chains, solve_band, times_band, to_amounts, to_weights
from posthoc_cli.solver.choice import choose, usable
from posthoc_cli.solver.profiles import Profile, sigma_rel_to_gamma
from posthoc_cli.solver.reach import least_profile_error, reachable
from posthoc_cli.solver.trajectory import Jitter, Trajectory

Either = Callable[..., tuple[Any, Any]]

SIGMAS = (0.02, 0.07, 0.15, 0.25)
FLOAT32, BFLOAT16 = 1e-15, 1e-5
"""Variances of the rounding of weights whose mean square is one."""


def gamma(sigma_rel: float) -> float:
    return float(sigma_rel_to_gamma(sigma_rel))


def widths(count: int, *sigmas: float, every: float = 200.0) -> list[Profile]:
    return [
        Profile(every * (at + 1), gamma(sigma))
        for at in range(count // len(sigmas))
        for sigma in sigmas
    ]


def checkpoints(count: int) -> list[Decay]:
    return [Decay(100.0 * (at + 1), 0.0) for at in range(count)]


def uneven(count: int) -> list[Profile]:
    """Two profiles saved at steps of their own, some missing."""
    rng = np.random.default_rng(1)
    ends = [np.cumsum(rng.integers(1, 30, size)) for size in (count * 2 // 3, count // 3)]
    scales = [100_000 / end[-1] for end in ends]
    every = [
        Profile(float(round(step * scale)), gamma(sigma))
        for end, scale, sigma in zip(ends, scales, (0.05, 0.12), strict=True)
        for step in end
    ]
    return sorted(every, key=lambda each: each.step)


JITTER = ((1.0, 0.3), (150.0, 0.01))
"""How many steps it lasts, and its variance in units of how far the network goes."""


def moving(snapshots: list[Profile], noise: float) -> Trajectory:
    """A run that slows down, and is restless at times."""
    last = max(each.step for each in snapshots)
    edges = np.linspace(0, last, 41)
    rates = np.exp(np.sin(np.arange(40)) - np.arange(40) / 20) / last
    jitter = tuple(Jitter(lag, share * last * rates) for lag, share in JITTER)
    return Trajectory(edges, rates, np.full(len(snapshots), noise), 1.0, jitter)


@pytest.fixture
def either(monkeypatch: pytest.MonkeyPatch) -> Either:
    """What a function gives by chains, however few the snapshots, and by plain matrices."""

    def call(function: Callable[..., Any], *arguments: object) -> tuple[Any, Any]:
        monkeypatch.setattr(chains, "MANY", 1)
        found = function(*arguments)
        monkeypatch.setattr(chains, "MANY", 10**9)
        return found, function(*arguments)

    return call


SETS = {
    "pairs": widths(160, 0.05, 0.10),
    "one": widths(160, 0.05),
    "three": widths(120, 0.03, 0.08, 0.20),
    "uneven": uneven(150),
    "raw": checkpoints(160),
    "decay": [Decay(100.0 * (at + 1), 0.99) for at in range(160)],
    "scheduled": [Scheduled(100.0 * (at + 1), Schedule(decay=0.995)) for at in range(160)],
}
EMAS = ("pairs", "one", "three", "uneven")


@pytest.mark.parametrize(("after", "noise"), [(1.0, FLOAT32), (1.03, BFLOAT16)])
@pytest.mark.parametrize("kind", SETS)
def test_no_method_loses_anything(kind: str, after: float, noise: float, either: Either) -> None:
    snapshots = SETS[kind]
    targets = [Profile(snapshots[-1].step * after, gamma(sigma)) for sigma in SIGMAS]
    trajectory = moving(snapshots, noise)
    for method in ("edm2", "algorithm3", "blup") if kind in EMAS else ("blup",):
        found, plain = either(solve, snapshots, targets, method, "cpu", trajectory)
        said, ours = either(expected_error, trajectory, snapshots, targets, found.weights)
        theirs = expected_error(trajectory, snapshots, targets, plain.weights)
        assert np.all(ours.total <= 1.001 * theirs.total)
        # What is said of the errors doesn't depend on how it was computed either.
        # (Chains take rounding for independent, which of close snapshots it isn't quite.)
        assert said.total == pytest.approx(ours.total, rel=1e-4 if noise == BFLOAT16 else 1e-6)
        assert said.distance == pytest.approx(ours.distance, rel=1e-9)
        if kind in EMAS and method != "blup":
            better = found.profile_error <= 1.001 * plain.profile_error
            assert np.all(better | (found.profile_error < 1e-7))
            assert found.weights == pytest.approx(plain.weights, abs=1e-6)


def test_exponents_without_a_norm_and_steep_ones(either: Either) -> None:
    snapshots = [Profile(50.0 * (at + 1), exponent) for at in range(60) for exponent in (-0.8, 2e4)]
    targets = [Profile(50.0 * 60, exponent) for exponent in (-0.6, 3.0, 500.0)]
    trajectory = moving(snapshots, 1e-7)
    found, plain = either(solve, snapshots, targets, "blup", "cpu", trajectory)
    assert found.weights == pytest.approx(plain.weights, abs=1e-6)
    assert np.all(np.isnan(found.profile_error))


def test_a_network_that_never_moved() -> None:
    snapshots = widths(500, 0.05, 0.10)
    still = Trajectory(np.array([0.0, 1.0]), np.zeros(1), np.zeros(500), 1.0)
    found = solve(snapshots, [Profile(50_000.0, gamma(0.07))], "blup", "cpu", still)
    assert found.sum_of_weights == pytest.approx(1.0)
    assert np.all(np.abs(found.weights) < 20)


def test_profiles_too_alike_are_named() -> None:
    sigmas = 0.05, 0.05 * (1 + 1e-12)
    with pytest.raises(SnapshotError, match=r"at step \d+, sigma_rel 0.05 and step \d+, sigma_rel"):
        solve(widths(500, *sigmas), [Profile(50_000.0, gamma(0.07))])


def test_what_is_in_reach_is_the_same(either: Either) -> None:
    snapshots = widths(100, 0.05, 0.10)
    found, plain = either(lambda: least_profile_error(snapshots, 10_000)(np.array(SIGMAS)))
    assert found == pytest.approx(plain, abs=1e-6, rel=1e-3)
    (found,), (plain,) = either(reachable, snapshots, 10_000, 0.05)
    assert found == pytest.approx(plain, rel=1e-4)


def test_weights_and_pieces_are_inverse() -> None:
    snapshots = uneven(480)
    found = find_chains(snapshots)
    assert found is not None
    weights = np.random.default_rng(2).standard_normal((3, len(snapshots)))
    assert to_weights(found, to_amounts(found, weights)) == pytest.approx(weights)


@pytest.mark.parametrize(("size", "width"), [(5, 1), (16, 3), (17, 16), (50, 20), (40, 39)])
def test_bands(size: int, width: int) -> None:
    rng = np.random.default_rng(size)
    factor = np.triu(np.tril(rng.standard_normal((size, size))), -(width // 2))
    matrix = factor @ factor.T + np.eye(size)
    band = np.zeros((size, width + 1))
    for apart in range(width + 1):
        band[apart:, apart] = np.diagonal(matrix, -apart)
    right = rng.standard_normal((size, 2))
    assert times_band(band, right) == pytest.approx(matrix @ right)
    assert solve_band(band, right)[0] == pytest.approx(np.linalg.solve(matrix, right))


@pytest.mark.parametrize("kind", ["pairs", "raw"])
def test_memory_is_linear(kind: str) -> None:
    peaks = []
    for count in (600, 2400):
        snapshots = checkpoints(count) if kind == "raw" else widths(count, 0.05, 0.10)
        targets = [Profile(snapshots[-1].step, gamma(sigma)) for sigma in (0.07, 0.2)]
        trajectory = moving(snapshots, FLOAT32)
        tracemalloc.start()
        found = solve(snapshots, targets, "blup", "cpu", trajectory)
        expected_error(trajectory, snapshots, targets, found.weights)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4.5 * peaks[0]
    assert peaks[1] < 30e6


def test_few_snapshots_and_wide_bands_are_no_chains() -> None:
    assert find_chains(widths(400, 0.05, 0.10)) is None
    many = [Profile(100.0 * (at // 100 + 1), 1.0 + at % 100) for at in range(500)]
    assert find_chains(many) is None
    twice = sorted(widths(500, 0.05) * 2, key=lambda each: each.step)
    assert find_chains(twice) is None


def test_only_what_makes_no_chains_is_thinned() -> None:
    for each in (widths(500, 0.05, 0.10), uneven(450), checkpoints(500)):
        assert usable(each) == list(range(len(each)))
    many = [Profile(100.0 * (at // 10 + 1), 1.0 + at * 0.001) for at in range(2000)]
    chosen = usable(many)
    assert 300 < len(chosen) <= chains.MANY
    assert chosen[0] == 0
    assert chosen[-100:] == list(range(1900, 2000))
    gaps = np.diff(np.unique([many[at].step for at in chosen]))
    assert np.all(np.diff(gaps) <= 100)  # they grow with the distance, up to rounding


@pytest.mark.parametrize("most", [6, 100, 256])
@pytest.mark.parametrize("count", [257, 1000, 5000])
def test_a_choice_has_the_ends_and_whole_steps(count: int, most: int) -> None:
    steps = [float(at // 2) for at in range(count)]
    chosen = choose(steps, most)
    assert 0.5 * most <= len(chosen) <= most + 2
    assert {0, count - 1} <= set(chosen)
    assert all((at % 2 == 0 and at == count - 1) or at ^ 1 in chosen for at in chosen)
