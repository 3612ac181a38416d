from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli.solver.averages import Decay, LrDecay, Window
from posthoc_cli.solver.blup import blup_weights, expected_error
from posthoc_cli.solver.fitting import fit_trajectory
from posthoc_cli.solver.profiles import Average, Profile, decay, sigma_rel_to_gamma
from posthoc_cli.solver.quadrature import BLOCK, quadrature
from posthoc_cli.solver.trajectory import Jitter, Trajectory, moments

WIDTHS = (0.05, 0.10)


def run_of(count: int, every: int = 100, widths: Sequence[float] = WIDTHS) -> list[Profile]:
    return [
        Profile(every * (k + 1), float(sigma_rel_to_gamma(width)))
        for k in range(count)
        for width in widths
    ]


def walk_of(snapshots: Sequence[Average], seed: int = 0, noise: float = 0.0) -> Trajectory:
    steps = sorted({float(each.step) for each in snapshots})
    rates = np.exp(np.random.default_rng(seed).normal(0, 1.5, len(steps)))
    return Trajectory(np.array([0.0, *steps]), rates, np.full(len(snapshots), noise), 1.0)


def before(profile: Average, at: mpmath.mpf) -> mpmath.mpf:
    """G: the share of the average that lies before `at`."""
    if not isinstance(profile, Profile):
        return mpmath.mpf(0 if at < profile.step else 1)
    return min(mpmath.mpf(1), (at / profile.step) ** (profile.gamma + 1))


def brute_moment(trajectory: Trajectory, a: Average, b: Average, end: float) -> mpmath.mpf:
    edges = sorted({*trajectory.edges.tolist(), a.step, b.step, end})
    total = mpmath.mpf(0)
    for low, high in pairwise(edges):
        if high > end:
            break
        at = min(
            int(np.searchsorted(trajectory.edges, low, "right")) - 1, len(trajectory.rates) - 1
        )
        # Steep powers live at the upper end of an interval.
        points = [low, *(high - (high - low) * mpmath.mpf(10) ** -k for k in range(8)), high]
        points = sorted(set(points))
        total += trajectory.rates[at] * mpmath.quad(lambda u: before(a, u) * before(b, u), points)
    return total


@pytest.mark.parametrize(
    "profiles",
    [
        [Profile(100, 6.94), Profile(250, 16.97), Profile(250, 6.94), Profile(400, 0.0)],
        [Profile(30, -0.9), Profile(400, -0.3), Profile(200, 0.5)],
        [Profile(399, 1e4), Profile(400, 1e4), Profile(400, 3.0), Profile(1, 500.0)],
        [Decay(30, 0.0), Decay(200, 0.0), Decay(399, 0.0), Decay(400, 0.0)],
        [Decay(200, 0.0), Profile(200, 3.0), Profile(400, 3.0), Decay(400, 0.0)],
    ],
)
def test_moments_are_the_integrals_they_stand_for(profiles: list[Average]) -> None:
    trajectory = walk_of([Profile(step, 1.0) for step in (100, 200, 300)])
    found = moments(trajectory, profiles, [])
    for i, a in enumerate(profiles):
        for j, b in enumerate(profiles):
            exact = brute_moment(trajectory, a, b, max(each.step for each in profiles))
            assert found[i, j] == pytest.approx(float(exact), rel=1e-9)


def closedmoments(trajectory: Trajectory, profiles: list[Average]) -> npt.NDArray[np.float64]:
    """The same by the closed form for powers: each is one between two steps."""
    steps = np.array([float(each.step) for each in profiles])
    gammas = np.array([getattr(each, "gamma", np.inf) for each in profiles])
    edges = np.unique([*trajectory.edges, *steps])
    edges = edges[edges <= steps.max()]
    total = np.zeros((len(steps), len(steps)))
    for low, high in pairwise(edges):
        at = np.searchsorted(trajectory.edges, low, "right") - 1
        before, raw = steps >= high, np.isinf(gammas)
        powers = np.where(before & ~raw, gammas + 1, 0.0)
        end = np.exp(powers * np.log1p(np.where(before, high - steps, 0) / steps))
        end = np.where(before & raw, 0.0, end)  # the share at `high`, from below
        power = powers[:, None] + powers[None, :] + 1
        ratio = np.log1p((low - high) / high) if low > 0 else -np.inf
        integral = high * -np.expm1(power * ratio) / power
        rate = trajectory.rates[min(int(at), len(trajectory.rates) - 1)]
        total += rate * np.outer(end, end) * integral
    return total


def random_profiles(kind: str, count: int, seed: int) -> list[Average]:
    rng = np.random.default_rng(seed)
    gammas = {
        "power": rng.uniform(0, 50, count),
        "raw": np.full(count, np.inf),
        "mixed": np.where(rng.random(count) < 0.3, np.inf, rng.uniform(0, 50, count)),
        "low": rng.uniform(-0.99, -0.3, count),
        "steep": 10 ** rng.uniform(2, 12, count),
    }[kind]
    steps = rng.choice(10**6, count, replace=False) + 1.0
    made = zip(steps.tolist(), gammas.tolist(), strict=True)
    return [Profile(*each) if each[1] < np.inf else Decay(each[0], 0.0) for each in made]


@pytest.mark.parametrize("kind", ["power", "raw", "mixed", "low", "steep"])
@pytest.mark.parametrize("count", [2, 9, 60])
def test_the_quadrature_agrees_with_the_closed_form(kind: str, count: int) -> None:
    for seed in range(4):
        snapshots = random_profiles(kind, count, seed)
        last = max(each.step for each in snapshots)
        targets = [Profile(last, 2.0), Profile(last * 1.1, 30.0)]
        trajectory = walk_of(snapshots, seed)
        found = moments(trajectory, snapshots, targets)
        exact = closedmoments(trajectory, [*snapshots, *targets])[:count]
        # A step rounded to 16 digits is known to that part of the steepest profile's width.
        steepest = max(getattr(each, "gamma", 0.0) for each in [*snapshots, *targets])
        assert found == pytest.approx(exact, rel=1.5e-13 + 1e-16 * steepest, abs=1e-30 * last)


def test_panels_hold_few_shares_at_a_time() -> None:
    snapshots = run_of(300)
    edges = np.array([0.0, *sorted({float(each.step) for each in snapshots})])
    length = 0.0
    for _, weights, shares in quadrature(snapshots, edges):
        assert shares.size <= BLOCK
        length += weights.sum()
    assert length == pytest.approx(edges[-1], rel=1e-13)


def test_expected_error_is_the_integral_of_the_profiles_difference() -> None:
    snapshots, target = run_of(4), Profile(400, 3.0)
    trajectory = walk_of(snapshots, noise=0.01)
    weights = np.random.default_rng(1).normal(size=8)
    weights /= weights.sum()
    found = expected_error(trajectory, snapshots, [target], weights[None])
    u = (np.arange(400_000) + 0.5) / 1000
    after = [
        np.where(u < each.step, 1 - (u / each.step) ** (each.gamma + 1), 0.0)
        for each in (*snapshots, target)
    ]
    rate = trajectory.rates[np.searchsorted(trajectory.edges[1:], u)]
    off = sum(w * f for w, f in zip([*weights, -1.0], after, strict=True))
    assert found.approximation[0] ** 2 == pytest.approx(np.sum(rate * off**2) / 1000, rel=1e-5)
    assert found.rounding[0] ** 2 == pytest.approx(0.01 * np.sum(weights**2))
    assert found.total[0] == pytest.approx(np.hypot(found.approximation, found.rounding)[0])
    assert found.distance[0] ** 2 == pytest.approx(
        np.sum(rate * (1 - after[-1]) ** 2) / 1000, rel=1e-5
    )


def simulated(
    rates: npt.NDArray[np.float64], snapshots: Sequence[Profile], targets: Sequence[Profile]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A walk of many parameters; the averages tracked: [snapshots, p], [targets, p], the end."""
    rng = np.random.default_rng(0)
    every = [*snapshots, *targets]
    gammas = np.array([each.gamma for each in every])
    values = rng.normal(0, 3, 3000)
    averages = np.zeros((len(every), len(values)))
    taken = np.zeros_like(averages)
    for step, rate in enumerate(rates.tolist(), start=1):
        values = values + rng.normal(0, rate**0.5, len(values))
        beta = decay(gammas, step)[:, None]
        averages = beta * averages + (1 - beta) * values
        for at in [k for k, each in enumerate(every) if each.step == step]:
            taken[at] = averages[at]
    return taken[: len(snapshots)], taken[len(snapshots) :], values


@pytest.mark.parametrize("count", [4, 16])
def test_errors_of_a_simulated_walk_are_as_expected(count: int) -> None:
    length = 800
    rates = np.exp(-np.linspace(0, 5, length))
    snapshots = run_of(count, length // count)
    targets = [Profile(length, float(sigma_rel_to_gamma(w))) for w in (0.04, 0.07, 0.15, 0.22)]
    averages, truth, end = simulated(rates, snapshots, targets)
    noise = np.full(len(snapshots), 1e-6)
    stored = averages + np.random.default_rng(1).normal(0, 1e-3, averages.shape)
    differences = ((stored[:, None] - stored[None]) ** 2).mean(axis=2)
    trajectory = fit_trajectory(snapshots, differences, noise, (stored**2).mean(axis=1))
    middles = (trajectory.edges[1:] + trajectory.edges[:-1]) / 2
    known = rates[np.minimum(middles.astype(int), length - 1)]
    assert np.abs(np.log(trajectory.rates / known)).max() < 0.5
    assert trajectory.start == pytest.approx(9, abs=0.02 * rates.sum())
    best, _ = blup_weights(trajectory, snapshots, targets)
    other = np.zeros_like(best)
    other[:, -1], other[:, -4] = 1.5, -0.5
    for weights in (best, other, 0.9 * best):
        expected = expected_error(trajectory, snapshots, targets, weights)
        measured = np.sqrt(((weights @ stored - truth) ** 2).mean(axis=1))
        assert expected.total == pytest.approx(measured, rel=0.12)
    assert expected.distance == pytest.approx(np.sqrt(((truth - end) ** 2).mean(axis=1)), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(-0.95, 1e4)), min_size=1, max_size=7, unique=True
    ),
    st.floats(-0.95, 1e4),
    st.sampled_from([0.0, 1e-12, 1.0]),
    st.integers(0, 99),
)
def test_no_weights_are_better(
    known: list[tuple[int, float]], wanted: float, noise: float, seed: int
) -> None:
    snapshots = [Profile(*each) for each in known]
    target = [Profile(max(each.step for each in snapshots), wanted)]
    trajectory = walk_of(snapshots, seed, noise)
    weights, condition = blup_weights(trajectory, snapshots, target)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert np.isfinite(condition)
    best = expected_error(trajectory, snapshots, target, weights)
    rng = np.random.default_rng(seed)
    for scale in (1e-3, 0.1, 1.0):
        change = rng.normal(size=len(snapshots)) * scale
        trial = weights + change - change.mean()
        tried = expected_error(trajectory, snapshots, target, trial)
        # To rounding, which is relative to how far the target is from the network.
        assert best.total[0] <= tried.total[0] * (1 + 1e-6) + 1e-6 * best.distance[0]


def test_a_target_that_is_a_snapshot_is_that_snapshot() -> None:
    snapshots = run_of(6)
    weights, _ = blup_weights(walk_of(snapshots), snapshots, [snapshots[-1]])
    wanted = np.eye(len(snapshots))[-1]
    assert weights[0] == pytest.approx(wanted, abs=1e-6)
    expected = expected_error(walk_of(snapshots), snapshots, [snapshots[-1]], wanted[None])
    assert expected.total[0] < 1e-7 * expected.distance[0]


def measured_of(
    snapshots: Sequence[Profile], noise: float = 1e-6
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What sampling would measure of a walk with even rates."""
    steps = np.array([0.0, max(float(each.step) for each in snapshots)])
    known = moments(Trajectory(steps, np.ones(1), np.zeros(0), 0.0), snapshots, [])
    own = np.diagonal(known)
    differences = own[:, None] + own[None] - 2 * known + 2 * noise
    np.fill_diagonal(differences, 0.0)
    return differences, np.full(len(snapshots), noise), np.ones(len(snapshots))


def test_units_and_order_do_not_matter() -> None:
    snapshots, target = run_of(5), [Profile(500, 3.0)]
    measured = measured_of(snapshots)
    weights, _ = blup_weights(fit_trajectory(snapshots, *measured), snapshots, target)
    larger, _ = blup_weights(
        fit_trajectory(snapshots, *(1e-9 * each for each in measured)), snapshots, target
    )
    assert larger == pytest.approx(weights, abs=1e-6)

    longer = [Profile(7 * each.step, each.gamma) for each in snapshots]
    slower, _ = blup_weights(fit_trajectory(longer, *measured), longer, [Profile(3500, 3.0)])
    assert slower == pytest.approx(weights, abs=1e-6)

    order = np.random.default_rng(0).permutation(len(snapshots))
    mixed = [snapshots[at] for at in order]
    differences, noise, squares = measured
    trajectory = fit_trajectory(mixed, differences[np.ix_(order, order)], noise, squares)
    shuffled, _ = blup_weights(trajectory, mixed, target)
    assert shuffled[0] == pytest.approx(weights[0, order], abs=1e-6)


def test_noise_is_spread_over_more_snapshots() -> None:
    snapshots, target = run_of(20), [Profile(2000, 40.0)]
    gains = []
    for noise in (1e-9, 1.0, 1e3):
        weights, _ = blup_weights(walk_of(snapshots, noise=noise), snapshots, target)
        gains.append(float(np.linalg.norm(weights)))
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] < 1 < gains[0]


def test_rates_are_found_from_some_of_many_pairs() -> None:
    snapshots = run_of(100)
    trajectory = fit_trajectory(snapshots, *measured_of(snapshots))
    assert trajectory.rates == pytest.approx(np.ones(100), rel=0.02)


def test_rates_of_a_walk_that_stops_are_small_but_not_zero() -> None:
    snapshots = run_of(8)
    edges = np.array([0.0, 500.0, 800.0])
    known = moments(Trajectory(edges, np.array([1.0, 0.0]), np.zeros(0), 0.0), snapshots, [])
    own = np.diagonal(known)
    differences = np.maximum(own[:, None] + own[None] - 2 * known, 0)
    trajectory = fit_trajectory(snapshots, differences, np.zeros(16), np.ones(16))
    assert (trajectory.rates > 0).all()
    assert trajectory.rates[-1] < 1e-3 < trajectory.rates[0]


def test_snapshots_that_are_all_the_same() -> None:
    snapshots, target = run_of(5), [Profile(500, 3.0)]
    trajectory = fit_trajectory(snapshots, np.zeros((10, 10)), np.zeros(10), np.ones(10))
    weights, _ = blup_weights(trajectory, snapshots, target)
    assert weights.sum() == pytest.approx(1)
    assert np.abs(weights).max() < 10
    assert expected_error(trajectory, snapshots, target, weights).relative[0] == 0


def test_differences_that_are_rounding_only() -> None:
    snapshots, target = run_of(5), [Profile(500, 3.0)]
    differences = 2.0 * (1 - np.eye(10))
    trajectory = fit_trajectory(snapshots, differences, np.ones(10), np.ones(10))
    weights, _ = blup_weights(trajectory, snapshots, target)
    assert np.linalg.norm(weights) < 0.5
    # Values that are rounded differently did differ, by half the spacing of the numbers or so.
    assert 0.1 < expected_error(trajectory, snapshots, target, weights).approximation[0] < 0.4


def test_a_single_snapshot_tells_nothing_of_its_error() -> None:
    snapshots, target = [Profile(500, 6.94)], [Profile(500, 3.0)]
    trajectory = fit_trajectory(snapshots, np.zeros((1, 1)), np.zeros(1), np.ones(1))
    weights, _ = blup_weights(trajectory, snapshots, target)
    assert weights.tolist() == [[1.0]]
    assert np.isnan(expected_error(trajectory, snapshots, target, weights).total[0])


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_duplicates_share_their_weight(noise: float) -> None:
    snapshots = run_of(4)
    target = [Profile(400, 4.0)]
    plain, _ = blup_weights(walk_of(snapshots, noise=noise), snapshots, target)
    doubled = [*snapshots, snapshots[-1]]
    weights, _ = blup_weights(walk_of(doubled, noise=noise), doubled, target)
    assert weights[0, -1] == pytest.approx(weights[0, -2], abs=1e-4)
    assert weights[0, -1] + weights[0, -2] == pytest.approx(plain[0, -1], abs=1e-3)


def test_a_target_between_the_last_snapshot_and_the_next() -> None:
    snapshots, target = run_of(4), [Profile(450, 6.94)]
    trajectory = walk_of(snapshots)
    weights, _ = blup_weights(trajectory, snapshots, target)
    assert weights.sum() == pytest.approx(1)
    found = expected_error(trajectory, snapshots, target, weights)
    # What happened since the last snapshot, nothing can tell.
    power = target[0].gamma + 1
    u = np.linspace(400, 450, 100_001)
    late = trajectory.rates[-1] * np.trapezoid((1 - (u / 450) ** power) ** 2, u)
    assert found.total[0] ** 2 >= late * 0.999


def test_the_same_on_torch() -> None:
    snapshots, target = run_of(6), [Profile(600, 3.0), Profile(600, 30.0)]
    trajectory = walk_of(snapshots, noise=1e-3)
    one, _ = blup_weights(trajectory, snapshots, target)
    other, _ = blup_weights(trajectory, snapshots, target, "cpu:0")
    assert isinstance(other, np.ndarray)
    assert other == pytest.approx(one, rel=1e-6, abs=1e-9)


# Raw checkpoints


def raws(*steps: float) -> list[Decay]:
    return [Decay(step, 0.0) for step in steps]


def hats(steps: list[float], target: Profile) -> npt.NDArray[np.float64]:
    """The weights of straight lines between checkpoints, and the first one before it."""
    u = (np.arange(400_000) + 0.5) / 400_000 * target.step
    share = (target.gamma + 1) * (u / target.step) ** target.gamma / 400_000
    return np.array([share @ np.interp(u, steps, row) for row in np.eye(len(steps))])


def test_of_an_even_walk_seen_exactly_the_weights_are_those_of_straight_lines() -> None:
    steps, target = [100.0, 250.0, 700.0, 1000.0], Profile(1000, 3.0)
    walk = Trajectory(np.array([0.0, 1000.0]), np.ones(1), np.zeros(4), 0.0)
    weights, condition = blup_weights(walk, raws(*steps), [target])
    assert weights[0] == pytest.approx(hats(steps, target), abs=1e-6)
    assert condition < 1e3


@pytest.mark.parametrize("count", [4, 16, 200])
def test_raw_checkpoints_of_a_simulated_walk(count: int) -> None:
    length = 800
    rates = np.exp(-np.linspace(0, 5, length))
    snapshots = raws(*range(length // count, length + 1, length // count))
    targets = [Profile(length, float(sigma_rel_to_gamma(w))) for w in (0.04, 0.07, 0.15, 0.22)]
    rng = np.random.default_rng(0)
    values = rng.normal(0, 3, 1000)
    truth, stored, gammas = np.zeros((4, 1000)), [], np.array([each.gamma for each in targets])
    for step, rate in enumerate(rates.tolist(), start=1):
        values = values + rng.normal(0, rate**0.5, 1000)
        beta = decay(gammas, step)[:, None]
        truth = beta * truth + (1 - beta) * values
        if step % (length // count) == 0:
            stored.append(values)
    stored = np.array(stored)
    squares = (stored**2).mean(axis=1)
    differences = np.maximum(squares[:, None] + squares - 2 * stored @ stored.T / 1000, 0)
    fitted = fit_trajectory(snapshots, differences, np.full(count, 1e-9), squares)
    assert np.isfinite(fitted.rates).all()
    weights, _ = blup_weights(fitted, snapshots, targets)
    expected = expected_error(fitted, snapshots, targets, weights)
    measured = np.sqrt(((weights @ stored - truth) ** 2).mean(axis=1))
    assert expected.total == pytest.approx(measured, rel=0.25)
    distance = np.sqrt(((values - truth) ** 2).mean(axis=1))
    assert expected.distance == pytest.approx(distance, rel=0.25)


def test_raw_checkpoints_that_never_moved_or_are_one() -> None:
    for count in (1, 3):
        snapshots = raws(*range(100, 100 * count + 1, 100))
        none = fit_trajectory(snapshots, np.zeros((count, count)), np.zeros(count), np.ones(count))
        weights, _ = blup_weights(none, snapshots, [Profile(100 * count, 6.94)])
        assert weights.sum() == pytest.approx(1)
        assert np.isfinite(weights).all()


# Jitter


@pytest.mark.parametrize("target", ["window", "1-sqrt"])
def test_jitter_is_looked_at_where_a_target_begins(target: str) -> None:
    snapshots: list[Average] = [Decay(step, 0.99) for step in range(300, 2401, 300)]
    wanted = Window(2400, 480) if target == "window" else LrDecay(2400, target, 480)
    still = np.full(8, 1e-30)
    white = Jitter(1.0, np.ones(8))
    trajectory = Trajectory(np.arange(9) * 300.0, still, np.zeros(8), 0.0, (white,))
    weights, _ = blup_weights(trajectory, snapshots, [wanted])
    steps = np.arange(1, 2401.0)
    densities = [each.share(steps) - each.share(steps - 1) * (steps > 1) for each in snapshots]
    off = weights[0] @ np.array(densities) - (wanted.share(steps) - wanted.share(steps - 1))
    expected = expected_error(trajectory, snapshots, [wanted], weights)
    assert expected.total[0] == pytest.approx(np.sqrt(off @ off), rel=0.1)


def test_jitter_of_the_first_steps_is_none_of_the_last() -> None:
    """A network that comes to rest: its beginning may be taken for jitter, its end may not."""
    steps = np.arange(0, 2401.0)
    way = -np.expm1(-steps / 300)

    def of(average: Average) -> float:
        share = average.share(steps)
        return float(way[1:] @ np.diff(share) + share[0] * way[0])

    snapshots: list[Average] = [Decay(step, 0.99) for step in range(300, 2401, 300)]
    values = np.array([of(each) for each in snapshots])
    differences = (values[:, None] - values) ** 2
    trajectory = fit_trajectory(snapshots, differences, np.full(8, 1e-15), values**2)
    targets: list[Average] = [Window(2400, 120), Profile(2400, 20.0)]
    weights, _ = blup_weights(trajectory, snapshots, targets)
    true = np.array([of(each) for each in targets])
    off = np.abs(weights @ values - true) / np.abs(true - way[-1])
    expected = expected_error(trajectory, snapshots, targets, weights).relative
    assert np.all(expected > 0.4 * off), expected / off


# Other kinds of averages


@dataclass
class Mean:
    """Of the last `length` steps: a kind that the solver doesn't know."""

    step: float
    length: float

    def share(self, u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.clip((u - self.step + self.length) / self.length, 0.0, 1.0)


@pytest.mark.parametrize(
    "target",
    [Mean(1000, 130.0), Decay(1000, 0.97), Decay(1000, 0.0), LrDecay(1000, "1-sqrt", 170.0)],
)
def test_any_average_that_has_a_share_can_join(target: Average) -> None:
    steps = range(100, 1001, 100)
    snapshots: list[Average] = [Decay(step, 0.99) for step in steps]
    snapshots += [Mean(step, 37.0) for step in steps]
    snapshots += [Profile(step, 6.94) for step in steps]
    edges = np.array([0.0, *steps])
    rates = np.exp(-np.linspace(0, 2, len(steps)))
    true = Trajectory(edges, rates, np.full(30, 1e-4), 0.0)

    # Brute force: 400,000 pieces, a thousand times finer than anything in these averages.
    u = (np.arange(400_000) + 0.5) / 400
    amounts = rates[np.searchsorted(edges[1:], u)] / 400
    shares = np.array([each.share(u) for each in snapshots])
    wanted = target.share(u)
    known = moments(true, snapshots, [target])
    assert known[:, :30] == pytest.approx(shares * amounts @ shares.T, rel=1e-5, abs=1e-6)
    assert known[:, 30] == pytest.approx(shares * amounts @ wanted, rel=1e-5, abs=1e-6)

    own = np.diagonal(known)
    differences = np.maximum(own[:, None] + own - 2 * known[:, :30], 0) + 2e-4
    np.fill_diagonal(differences, 0)
    trajectory = fit_trajectory(snapshots, differences, true.noise, np.full(30, 9.0))
    middles = (trajectory.edges[1:] + trajectory.edges[:-1]) / 2
    assert trajectory.rates == pytest.approx(rates[np.searchsorted(edges[1:], middles)], rel=0.3)

    weights, _ = blup_weights(true, snapshots, [target])
    found = expected_error(true, snapshots, [target], weights)
    off = weights[0] @ shares - wanted
    assert found.approximation[0] ** 2 == pytest.approx(amounts @ off**2, rel=1e-3)
    assert found.distance[0] ** 2 == pytest.approx(amounts @ wanted**2, rel=1e-5, abs=1e-9)
    assert weights.sum() == pytest.approx(1)
    other = np.random.default_rng(1).normal(size=30)
    tried = weights + 1e-3 * (other - other.mean())
    assert found.total[0] < expected_error(true, snapshots, [target], tried).total[0]
