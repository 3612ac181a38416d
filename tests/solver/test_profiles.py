"""The paper's equations, against exact arithmetic and against their own definitions."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posthoc_cli.solver.profiles import (
    MAX_SIGMA_REL,
    Profile,
    cosine,
    decay,
    gamma_to_sigma_rel,
    norm,
    sigma_rel_to_gamma,
)

SIGMAS = st.floats(1e-9, MAX_SIGMA_REL, exclude_max=True)


@given(SIGMAS)
def test_gamma_is_the_cubics_root_to_1e_12(sigma_rel: float) -> None:
    with mpmath.workprec(300):
        t = 1 / mpmath.mpf(sigma_rel) ** 2  # eq. 126: g^3 + 7 g^2 + (16 - t) g + (12 - t) = 0
        gamma = mpmath.mpf(sigma_rel_to_gamma(sigma_rel))
        value = gamma**3 + 7 * gamma**2 + (16 - t) * gamma + (12 - t)
        slope = 3 * gamma**2 + 14 * gamma + (16 - t)
        assert abs(value / slope) <= 1e-12 * max(1, gamma)


@given(st.floats(0, 1e9))
def test_the_inverse_of_the_inverse(gamma: float) -> None:
    sigma_rel = gamma_to_sigma_rel(gamma)
    if sigma_rel < MAX_SIGMA_REL:
        assert abs(sigma_rel_to_gamma(sigma_rel) - gamma) <= 1e-12 * max(1, gamma)


def test_known_values() -> None:
    # The paper, after eq. 126: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94.
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_to_sigma_rel(0.0) == pytest.approx(MAX_SIGMA_REL, rel=1e-15)
    assert Profile(10, 16.97).sigma_rel == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize("wrong", [0.0, -0.1, MAX_SIGMA_REL, 1.0, float("nan"), float("inf")])
def test_no_profile_has_this_width(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 12\^-0.5"):
        sigma_rel_to_gamma(wrong)
    with pytest.raises(ValueError, match="between 0"):
        sigma_rel_to_gamma(np.array([0.1, wrong]))


@pytest.mark.parametrize("wrong", [-1.0, -2.0, float("nan"), float("inf")])
def test_no_profile_has_this_exponent(wrong: float) -> None:
    with pytest.raises(ValueError, match="gamma must be"):
        gamma_to_sigma_rel(wrong)


def test_arrays_of_either_library_broadcast_and_agree() -> None:
    sigmas = np.array([[0.01], [0.2]])
    gammas = sigma_rel_to_gamma(sigmas)
    assert gammas.shape == (2, 1)
    assert isinstance(sigma_rel_to_gamma(0.1), float)
    tensor = sigma_rel_to_gamma(torch.from_numpy(sigmas))
    assert isinstance(tensor, torch.Tensor)
    assert np.allclose(tensor.numpy(), gammas, rtol=1e-15)
    assert np.allclose(gamma_to_sigma_rel(tensor).numpy(), sigmas, rtol=1e-14)


@given(st.floats(-0.9, 100), st.integers(2, 50), st.integers(1, 60))
def test_the_decay_makes_the_profile(gamma: float, updates: int, covered: int) -> None:
    """Tracking u itself, the step, gives the profile's mean, whatever an update covers."""
    share = np.zeros(updates)  # of each update's value in the average
    for k in range(updates):
        beta = decay(gamma, (k + 1) * covered, covered)
        share *= beta
        share[k] = 1 - beta
    edges = np.arange(updates + 1) / updates
    assert np.allclose(share, np.diff(edges ** (gamma + 1)), rtol=0, atol=1e-12)


@given(
    st.floats(1, 1e4), st.floats(-0.4, 60), st.floats(1, 1e4), st.floats(-0.4, 60)
)  # fmt: skip
def test_the_cosine_is_the_integral_of_the_product(
    step_a: float, gamma_a: float, step_b: float, gamma_b: float
) -> None:
    with mpmath.workprec(200):
        sa, ga, sb, gb = map(mpmath.mpf, (step_a, gamma_a, step_b, gamma_b))

        def inner(s: mpmath.mpf, g: mpmath.mpf, t: mpmath.mpf, h: mpmath.mpf) -> mpmath.mpf:
            # integral of (g+1) u^g / s^(g+1) * (h+1) u^h / t^(h+1) up to the earlier step
            e = g + h + 1
            return (g + 1) * (h + 1) * min(s, t) ** e / (e * s ** (g + 1) * t ** (h + 1))

        norms = [mpmath.sqrt(inner(s, g, s, g)) for s, g in ((sa, ga), (sb, gb))]
        expected = inner(sa, ga, sb, gb) / (norms[0] * norms[1])
    arrays = [np.array(v) for v in (step_a, gamma_a, step_b, gamma_b)]
    assert float(norm(arrays[0], arrays[1])) == pytest.approx(float(norms[0]), rel=1e-13)
    assert float(cosine(*arrays)) == pytest.approx(float(expected), rel=1e-11, abs=1e-300)


def test_the_cosine_neither_overflows_nor_exceeds_one() -> None:
    steps, gammas = np.array([1.0, 2.0**53]), np.array([0.0, 1e12])
    values = cosine(steps[:, None, None], gammas[None, :, None], steps[0], gammas[None, None, :])
    assert np.all((values >= 0) & (values <= 1))
    assert cosine(*map(np.array, (5.0, 3.0, 5.0, 3.0))) == 1.0


def test_the_share_is_the_weight_before_a_step() -> None:
    u = np.array([[0.0, 50.0, 99.999], [100.0, 101.0, 1e9]])
    assert Profile(100, 3.0).share(u) == pytest.approx(np.minimum(u / 100, 1) ** 4)
    assert Profile(100, -0.7).share(u) == pytest.approx(np.minimum(u / 100, 1) ** 0.3)
    grid = (np.arange(100_000) + 0.5) / 1000
    density = 4 * grid**3 / 100**4
    assert density[grid < 70].sum() / 1000 == pytest.approx(Profile(100, 3.0).share(np.array(70.0)))
