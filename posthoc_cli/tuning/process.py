"""A Gaussian process over few noisy values, with everything that is not known integrated out.

Fourteen values don't tell length scale and noise: their most likely values are often far off. So
the process is an average over a grid of them, each weighted by what the values say for it.

For one choice the covariance of values at `x` and `x'` (each in [0, 1]) is, up to a scale s²,

    (1 - noise) [ (1 - bowl) Matern_5/2(|x - x'| / length) + bowl q(x)·q(x') ] + noise (x is x')

where q holds linear and quadratic terms, plus a constant that may be anything. The scale s² has an
inverse gamma prior and is integrated out in closed form (Rasmussen and Williams 2006, 2.2 and 2.7).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

LENGTHS = (0.12, 0.2, 0.35, 0.6, 1.0)
NOISES = (1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 0.97)
BOWLS = (0.1, 0.5, 0.9, 0.98)
ANYTHING = 100.0
"""Variance of the constant, with that of the values about 1."""
SHAPE, SCALE = 1.5, 0.5
"""Of the inverse gamma prior of s²."""


@dataclass(frozen=True)
class Belief:
    """What the values say of the curve on a grid: mean [G], covariance [G, G], noise variance."""

    mean: FloatArray
    covariance: FloatArray
    noise: float


@functools.cache
def _choices(dimensions: int) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    lengths = list(itertools.product(LENGTHS, repeat=dimensions))
    rows = list(itertools.product(lengths, NOISES, BOWLS))
    prior = np.array([(1.0 if length[0] >= 0.2 else 0.5) for length, noise, bowl in rows])
    return (
        np.array([each for each, _, _ in rows]),
        np.array([each for _, each, _ in rows]),
        np.array([each for _, _, each in rows]),
        np.log(prior / prior.sum()),
    )


def _terms(x: FloatArray) -> FloatArray:
    centred = 2.0 * x - 1.0
    pairs = itertools.combinations_with_replacement(range(x.shape[1]), 2)
    products = [centred[:, a] * centred[:, b] for a, b in pairs]
    return np.stack([*centred.T, *[2 * p for p in products]], axis=1)


def _kernels(a: FloatArray, b: FloatArray, lengths: FloatArray, bowls: FloatArray) -> FloatArray:
    """Covariances without noise, [choices, A, B], with s² = 1."""
    apart = (a[:, None, :] - b[None, :, :]) ** 2
    unique, which = np.unique(lengths, axis=0, return_inverse=True)
    r = np.sqrt(5.0 * np.einsum("abd,cd->cab", apart, 1.0 / unique**2))
    matern = (1.0 + r + r * r / 3.0) * np.exp(-r)
    terms = _terms(a) @ _terms(b).T
    share = bowls[:, None, None]
    kernels: FloatArray = (1.0 - share) * matern[which.reshape(-1)] + share * terms
    return kernels


def fit(x: FloatArray, y: FloatArray, grid: FloatArray) -> Belief:
    """The belief about the curve at `grid` [G, D] after the values `y` [N] at `x` [N, D]."""
    lengths, noises, bowls, prior = _choices(x.shape[1])
    signal = (1.0 - noises)[:, None, None]
    matrices = signal * _kernels(x, x, lengths, bowls) + ANYTHING
    matrices[:, np.arange(len(x)), np.arange(len(x))] += noises[:, None]
    roots = np.linalg.cholesky(matrices)
    inverse = np.linalg.inv(roots)
    white = inverse @ y
    shape = SHAPE + len(x) / 2
    rate = SCALE + (white**2).sum(axis=1) / 2
    evidence = prior - np.log(np.einsum("cii->ci", roots)).sum(axis=1) - shape * np.log(rate)
    weights = np.exp(evidence - evidence.max())
    keep = weights > 1e-3
    weights = weights[keep] / weights[keep].sum()
    scale = (rate / (shape - 1))[keep]
    signal, lengths, bowls = signal[keep], lengths[keep], bowls[keep]
    across = signal * _kernels(x, grid, lengths, bowls) + ANYTHING
    spread = inverse[keep] @ across  # [choices, N, G]
    means = np.einsum("cn,cng->cg", white[keep], spread)
    mean = weights @ means
    # The kernel is linear in what is kept of each length and in the terms.
    unique, which = np.unique(lengths, axis=0, return_inverse=True)
    factor = weights * scale
    which = which.reshape(-1)
    matern = np.bincount(which, factor * signal[:, 0, 0] * (1.0 - bowls), len(unique))
    covariance = np.einsum("u,uab->ab", matern, _kernels(grid, grid, unique, np.zeros(len(unique))))
    terms = _terms(grid)
    covariance += (factor * signal[:, 0, 0] * bowls).sum() * (terms @ terms.T)
    covariance += factor.sum() * ANYTHING
    flat = (np.sqrt(factor)[:, None, None] * spread).reshape(-1, len(grid))
    covariance -= flat.T @ flat
    off = np.sqrt(weights)[:, None] * (means - mean)
    covariance += off.T @ off
    return Belief(mean, covariance, float((factor * noises[keep]).sum()))
