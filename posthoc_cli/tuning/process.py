"""A Gaussian process over few noisy values, with everything that is not known integrated out.

Fourteen values don't tell length scale and noise: their most likely values are often far off. So
the process is an average over a grid of them, each weighted by what the values say for it.

For one choice the covariance of values at `x` and `x'` (each in [0, 1]) is, up to a scale s²,

    (1 - noise) [ (1 - bowl) Matern_5/2(|w - w'| / length) + bowl q(w)·q(w') + c ] + noise (x is x')

where w is `x` with one end stretched, as a bowl may be steeper on one side; q holds linear,
quadratic and cubic terms; and the constant c is large, so that the mean may be anything. The scale
s² has an inverse gamma prior and is integrated out in closed form (Rasmussen and Williams 2006,
sections 2.2 and 2.7; Gelman et al., Bayesian Data Analysis, section 3.3).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LENGTHS = (0.15, 0.3, 0.6, 1.2)
OTHER_LENGTHS = (0.4, 1.2)
"""Of all dimensions but the first."""
STRETCHES = (-4.0, 0.0, 4.0)
"""`exp` of it is how much longer one end of the first dimension is than the other, per length."""
BOWLS = (0.2, 0.8, 0.98)
NOISES = np.array([1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 0.97])
CONSTANT = 100.0
SHAPE, SCALE = 1.1, 0.1
"""Of the inverse gamma prior of s², for values whose variance is about 1."""
NEGLIGIBLE = 0.01
"""Choices that are less likely than the likeliest by this are left out."""

Shape = tuple[float, ...]
"""A stretch and the length of each dimension."""


@dataclass(frozen=True)
class Belief:
    """What the values say of the curve on a grid: mean [G], covariance [G, G], noise variance."""

    mean: FloatArray
    covariance: FloatArray
    noise: float


@functools.cache
def _choices(dimensions: int) -> tuple[list[Shape], IntArray, FloatArray]:
    """The shapes of the curve; and for each choice [C] which of them it has, and its bowl."""
    lengths = [LENGTHS, *[OTHER_LENGTHS] * (dimensions - 1)]
    shapes = list(itertools.product(STRETCHES, *lengths))
    which = np.repeat(np.arange(len(shapes)), len(BOWLS))
    return shapes, which, np.tile(BOWLS, len(shapes))


def fit(x: FloatArray, y: FloatArray, grid: FloatArray) -> Belief:
    """The belief about the curve at `grid` [G, D] after the values `y` [N] at `x` [N, D].

    `y` has a mean of about 0 and a variance of about 1.
    """
    shapes, which, bowls = _choices(x.shape[1])
    shares = np.stack([1.0 - bowls, bowls])[:, :, None, None]
    # All noises have the same eigenvectors.
    values, vectors = np.linalg.eigh(_mixed(_kernels(x, x, shapes)[which], shares))
    along = y @ vectors  # [choices, N]
    noises = NOISES[:, None]
    variances = (1.0 - noises) * np.maximum(values, 0.0)[:, None] + noises  # [choices, noises, N]
    shape = SHAPE + len(x) / 2
    rate = SCALE + (along[:, None] ** 2 / variances).sum(axis=2) / 2
    evidence = -np.log(variances).sum(axis=2) / 2 - shape * np.log(rate)
    likely = np.exp(evidence - evidence.max())
    choice, noise = np.nonzero(likely > NEGLIGIBLE)  # from here on these, [K]
    weights = likely[choice, noise] / likely[choice, noise].sum()
    scales = weights * rate[choice, noise] / (shape - 1)
    signal, root = 1.0 - NOISES[noise], np.sqrt(variances[choice, noise])
    shares = shares[:, choice]
    some, at = np.unique(which[choice], return_inverse=True)
    across = _mixed(_kernels(x, grid, [shapes[each] for each in some])[at], shares)
    seen = (vectors[choice] / root[:, None, :]).swapaxes(1, 2) @ across * signal[:, None, None]
    means = np.einsum("kn,kng->kg", along[choice] / root, seen)
    mean = weights @ means
    # What is between the points: before any value, less what the values tell, and how far the
    # choices lie apart.
    covariance = np.full((len(grid), len(grid)), (scales * signal).sum() * CONSTANT)
    sums = [np.bincount(at, scales * signal * share[:, 0, 0]) for share in shares]
    for index, rough, smooth in zip(some, *sums, strict=True):
        ((matern, terms),) = _kernels(grid, grid, [shapes[index]])
        covariance += rough * matern + smooth * terms
    flat = (np.sqrt(scales)[:, None, None] * seen).reshape(-1, len(grid))
    apart = np.sqrt(weights)[:, None] * (means - mean)
    covariance += apart.T @ apart - flat.T @ flat
    return Belief(mean, covariance, float(scales @ NOISES[noise]))


def _mixed(kernels: FloatArray, shares: FloatArray) -> FloatArray:
    """Covariances without noise, [C, A, B], of both kernels [C, 2, A, B] and the constant."""
    mixed: FloatArray = (
        shares[0] * kernels[:, 0] + shares[1] * kernels[:, 1] + CONSTANT  # s² is 1 here
    )
    return mixed


def _kernels(a: FloatArray, b: FloatArray, shapes: Sequence[Shape]) -> FloatArray:
    """For each shape the Matern kernel and that of the terms, [S, 2, A, B]."""
    found = np.empty((len(shapes), 2, len(a), len(b)))
    for stretch, group in itertools.groupby(enumerate(shapes), lambda each: each[1][0]):
        v, w = _stretched(a, stretch), _stretched(b, stretch)
        terms = _terms(v) @ _terms(w).T
        squares = (v[:, None, :] - w[None, :, :]) ** 2
        for at, (_, *lengths) in group:
            r = np.sqrt(squares @ (5.0 / np.square(lengths)))
            found[at] = (1.0 + r + r * r / 3.0) * np.exp(-r), terms
    return found


def _stretched(x: FloatArray, by: float) -> FloatArray:
    if not by:
        return x
    first = np.expm1(by * x[:, :1]) / np.expm1(by)
    return np.concatenate([first, x[:, 1:]], axis=1)


def _terms(x: FloatArray) -> FloatArray:
    """Linear, quadratic and (of the first dimension) cubic terms, [N, T]."""
    x = 2.0 * x - 1.0
    columns = x.T
    pairs = itertools.combinations_with_replacement(columns, 2)
    return np.stack([*columns, *(2.0 * a * b for a, b in pairs), 0.7 * columns[0] ** 3], axis=1)
