"""Rounding stored elements: to the nearest, once, whatever the two dtypes are."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from posthoc_cli.synthesis.rounding import round_to
from tests.support import STORED

FLOATS = ("F64", "F32", "F16", "BF16")
SOURCES = (*FLOATS, "F8_E4M3", "F8_E5M2")
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def rounded(values: npt.NDArray, out_dtype: str, dtype: str) -> tuple[npt.NDArray, bool]:
    kind = STORED[out_dtype]
    out = np.empty(values.size * kind.itemsize, np.uint8)
    overflow = round_to(out, out_dtype, values.view(UNSIGNED[values.dtype.itemsize]), dtype)
    return out.view(kind), overflow


def nearest(value: float, kind: np.dtype) -> float:
    """The element of `kind` nearest to `value`, ties to even: by looking at all that are near."""
    with np.errstate(all="ignore"):
        guess = np.array(value).astype(np.float32).astype(kind)
    bits = guess.view(UNSIGNED[kind.itemsize])
    around = (bits.astype(np.int64) + np.arange(-2, 3)).astype(bits.dtype)
    near = [(each, float(each.view(kind))) for each in around]
    finite = [(bit, one) for bit, one in near if np.isfinite(one)]
    return min(finite, key=lambda e: (abs(Fraction(e[1]) - Fraction(value)), int(e[0]) & 1))[1]


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", SOURCES)
def test_values_that_both_have_stay_the_same(dtype: str, out_dtype: str) -> None:
    values = np.array([0.0, -0.0, 1.0, -2.5, 0.375, np.inf, -np.inf, np.nan] * 9)
    if dtype == "F8_E4M3":
        values = values[np.isfinite(values) | np.isnan(values)]  # it has no infinity
    found, overflow = rounded(values.astype(STORED[dtype]), out_dtype, dtype)
    assert not overflow
    np.testing.assert_array_equal(found.astype(np.float64), values)
    assert (np.signbit(found) == np.signbit(values)).all()


@pytest.mark.parametrize("out_dtype", ["F16", "BF16", "F32"])
def test_each_is_the_nearest(out_dtype: str) -> None:
    kind = STORED[out_dtype]
    rng = np.random.default_rng(0)
    middles = []
    for one in rng.standard_normal(200).astype(np.float32).astype(kind):
        bits = one.view(UNSIGNED[kind.itemsize])
        other = (bits + bits.dtype.type(1)).view(kind)
        middle = (float(one) + float(other)) / 2
        # At a tie, and a hair above and below: float32 on the way would lose the hair.
        middles += [middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)]
    values = np.array(middles)
    found, _ = rounded(values, out_dtype, "F64")
    assert found.astype(np.float64).tolist() == [nearest(value, kind) for value in values]


def test_float16_to_bfloat16_is_exactly_that_of_ml_dtypes() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    found, _ = rounded(values, "BF16", "F16")
    expected = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


def test_it_tells_of_finite_values_that_become_infinite() -> None:
    values = np.full(200_000, 3.0, np.float32)
    assert not rounded(values, "F16", "F32")[1]
    values[7] = np.inf
    assert not rounded(values, "F16", "F32")[1]
    values[150_000] = 65519.9
    assert not rounded(values, "F16", "F32")[1]
    values[150_000] = 65520
    found, overflow = rounded(values, "F16", "F32")
    assert overflow
    assert np.isinf(found[150_000])
