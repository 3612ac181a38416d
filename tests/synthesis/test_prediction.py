"""What a snapshot is predicted from: known cases, and that nothing grows along long chains."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from posthoc_cli.solver import Average, Decay, Profile
from posthoc_cli.synthesis.prediction import predictors

Kind = Callable[[float], Average]


def power(gamma: float) -> Kind:
    return lambda step: Profile(float(step), gamma)


def raw(step: float) -> Average:
    return Decay(float(step), 0.0)


NARROW, WIDE, WIDEST = power(16.97), power(6.94), power(1.6)


def chained(
    steps: Iterable[float], kinds: list[Kind]
) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Kind and step of each, and by which it is predicted."""
    chain: list[tuple[int, Average]] = []
    found: list[tuple[int, float, list[tuple[int, float]]]] = []
    for step in steps:
        for kind, make in enumerate(kinds):
            bases = predictors(chain, kind, make(step)) if chain else []
            found.append((kind, step, bases))
            chain.append((kind, make(step)))
    return found


def test_coefficients_are_those_of_least_squares() -> None:
    """Of many random walks, by averages that are tracked."""
    rng = np.random.default_rng(0)
    walks, gammas = np.zeros(20_000), (6.94, 1.6)
    averages = {gamma: np.zeros_like(walks) for gamma in gammas}
    found = {}
    for step in range(1, 121):
        walks = walks + rng.normal(size=walks.shape)
        for gamma in gammas:
            averages[gamma] += (1 - (1 - 1 / step) ** (gamma + 1)) * (walks - averages[gamma])
            found[gamma, step] = averages[gamma].copy()
    every = chained((40, 80, 120), [WIDE, WIDEST])
    for target, bases in ((-2, [(6.94, 40)]), (-1, [(6.94, 120), (6.94, 80)])):
        gamma = gammas[target]
        nearest = found[gamma, 80]
        others = np.stack([found[each] - nearest for each in bases])
        wanted = np.linalg.lstsq(others.T, found[gamma, 120] - nearest, rcond=None)[0]
        numbers = [number for _, number in every[target][2][1:]]
        np.testing.assert_allclose(numbers, wanted, atol=0.05)


def test_a_second_average_follows_the_first() -> None:
    """Over a short step both have moved in proportion to how far they were from the network."""
    *_, (_, _, bases) = chained(range(10000, 10060, 10), [NARROW, WIDE])
    own, now, last = (number for _, number in bases)
    ratio = 7.94 / 17.97
    np.testing.assert_allclose([own, now, last], [1, ratio, -ratio], atol=0.01)


def test_raw_checkpoints_are_their_last() -> None:
    assert chained((1000, 2000, 3000), [raw])[-1][2] == [(1, 1.0)]


def test_those_without_the_first_go_by_themselves() -> None:
    chain = [(0, NARROW(1000)), (1, WIDE(1000)), (0, NARROW(2000)), (1, WIDE(2000))]
    assert {at for at, _ in predictors(chain, 1, WIDE(3000))} == {3, 1}
    assert predictors(chain[:1], 1, WIDE(1000)) == [(0, 1.0)]
    assert predictors([(1, WIDE(500))], 0, NARROW(1000)) == [(0, 1.0)]


@pytest.mark.parametrize(
    "kinds",
    [
        [NARROW],
        [NARROW, WIDE],
        [WIDE, NARROW],
        [NARROW, WIDE, WIDEST],
        [NARROW, WIDE, raw],
        [raw, NARROW],
        [lambda step: Decay(float(step), 0.999), lambda step: Decay(float(step), 0.9999)],
    ],
    ids=["one", "two", "wide first", "three", "and raw", "raw first", "decays"],
)
@pytest.mark.parametrize(
    "steps",
    [
        range(1000, 61_000, 1000),
        range(1_000_000, 1_000_600, 10),
        [*range(1000, 5000, 1000), *range(5000, 5020), 6000, 6001, 9000, 9001, 100_000, 100_001],
        [1, 2, 3, 4, 1000, 1001, 2_000_000],
        range(10**12, 10**12 + 20),
    ],
    ids=["even", "close", "uneven", "few", "all but the same"],
)
def test_coefficients_stay_small(kinds: list[Kind], steps: Iterable[float]) -> None:
    """And so do the weights of the files in what they come to: they grow as the number of files,
    at most."""
    weights: list[dict[int, float]] = []
    for at, (_, _, bases) in enumerate(chained(steps, kinds)):
        assert sum(number for _, number in bases) in (0, 1)
        assert all(number * 2**16 == int(number * 2**16) for _, number in bases)
        assert sum(abs(number) for _, number in bases) < 40
        own = {at: 1.0}
        for base, number in bases:
            for file, weight in weights[base].items():
                own[file] = own.get(file, 0.0) + number * weight
        assert max(map(abs, own.values())) < 40 + 3 * at
        weights.append(own)
