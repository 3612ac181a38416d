"""The compiled loops, against exact arithmetic and against each other."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from posthoc_cli.synthesis import kernels

STORED = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def rows_of(dtype: str, snapshots: int, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((snapshots, count)).astype(STORED[dtype])


def padded(rows: np.ndarray) -> np.ndarray:
    """`rows` [any, count] with as many columns as the kernels demand."""
    capacity = -(-rows.shape[1] // kernels.STRIDE) * kernels.STRIDE
    wide = np.zeros((len(rows), capacity), rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide


def accumulate(
    dtype: str,
    rows: np.ndarray,
    weights: np.ndarray,
    out_dtype: str = "F64",
    before: np.ndarray | None = None,
) -> np.ndarray:
    """`rows` [snapshots, count], `weights` [snapshots, targets] -> sums [targets, count]."""
    count, targets = rows.shape[1], weights.shape[1]
    rows = padded(rows)
    addresses = np.array([row.ctypes.data for row in rows], np.uintp)
    sums = None if before is None else padded(before)
    out = np.zeros((targets, rows.shape[1] * 8), np.uint8)
    weights = np.ascontiguousarray(weights)
    kernels.accumulate(dtype, addresses, weights, sums, out, out_dtype, count)
    return out.view(STORED[out_dtype])[:, :count]


def narrow(dtype: str, values: np.ndarray) -> np.ndarray:
    """`values`, with a negative zero added, which changes no value, rounded to `dtype`."""
    rows, weights = np.zeros((1, len(values))), np.full((1, 1), -1.0)
    return accumulate("F64", rows, weights, dtype, before=values[None, :])[0]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("targets", [1, 2, 3, 5, 8, 9, 17])
def test_sums_agree_with_a_matrix_product(dtype: str, targets: int) -> None:
    rows = rows_of(dtype, 7, 1000)
    weights = np.random.default_rng(1).standard_normal((7, targets))
    expected = weights.T @ rows.astype(np.float64)
    assert np.allclose(accumulate(dtype, rows, weights), expected, rtol=0, atol=1e-13)


def test_every_16_bit_pattern_is_widened_exactly() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    for dtype in ("F16", "BF16"):
        stored = patterns.view(STORED[dtype])
        sums = accumulate(dtype, stored[None, :], np.ones((1, 1)))[0]
        with np.errstate(invalid="ignore"):
            assert np.array_equal(sums, stored.astype(np.float64), equal_nan=True)


def test_every_float8_is_widened_exactly() -> None:
    patterns = np.arange(256, dtype=np.uint8)
    rows, out = padded(patterns[None]), np.zeros((1, 2048), np.uint8)
    addresses = np.array([rows.ctypes.data], np.uintp)
    kernels.accumulate("F8_E4M3", addresses, np.ones((1, 1)), None, out, "F64", 256)
    wanted = patterns.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.array_equal(out[0].view(np.float64), wanted, equal_nan=True)


def test_a_sum_does_not_depend_on_its_position_or_on_other_targets() -> None:
    rows = rows_of("F16", 16, 640)
    weights = np.random.default_rng(1).standard_normal((16, 11)) * 1e3
    together = accumulate("F16", rows, weights)
    for target in range(11):
        for start in (0, 1, 37):
            alone = accumulate("F16", rows[:, start:], weights[:, target : target + 1])
            assert np.array_equal(alone[0], together[target, start:])


@pytest.mark.parametrize("out_dtype", STORED)
@pytest.mark.parametrize("targets", [1, 3, 9])
def test_sums_go_on_from_one_group_of_snapshots_to_the_next(out_dtype: str, targets: int) -> None:
    rows = rows_of("F32", 10, 100)
    weights = np.random.default_rng(1).standard_normal((10, targets))
    whole = accumulate("F32", rows, weights, out_dtype)
    first = accumulate("F32", rows[:3], weights[:3])
    both = accumulate("F32", rows[3:], weights[3:], out_dtype, before=first)
    assert both.tobytes() == whole.tobytes()
    assert np.array_equal(whole, accumulate("F32", rows, weights).astype(STORED[out_dtype]))


def test_sums_may_be_written_where_they_were_read() -> None:
    rows = rows_of("F16", 4, 128)
    weights = np.random.default_rng(1).standard_normal((4, 2))
    sums = np.zeros((2, 128))
    addresses = np.array([row.ctypes.data for row in rows], np.uintp)
    for k in range(4):
        part = addresses[k : k + 1], weights[k : k + 1], sums if k else None
        kernels.accumulate("F16", *part, sums.view(np.uint8), "F64", 128)
    assert np.array_equal(sums, accumulate("F16", rows, weights))


def nearest(value: float, dtype: str) -> float:
    """`value` rounded to nearest, ties to even, by exact arithmetic."""
    digits, lowest = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149)}[dtype]
    if value == 0:
        return value
    exact = Fraction(value)
    _, exponent = np.frexp(abs(value))
    quantum = Fraction(2) ** max(int(exponent) - digits, lowest)
    rounded = round(exact / quantum) * quantum  # Python's round takes ties to even
    limit = {"F16": Fraction(65504), "BF16": None, "F32": None}[dtype]
    if limit is None:
        limit = (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** 127
    return float(np.copysign(np.inf, value)) if abs(rounded) > limit else float(rounded)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_rounding_is_to_nearest_with_ties_to_even(dtype: str) -> None:
    rng = np.random.default_rng(2)
    scattered = rng.standard_normal(3000) * 10.0 ** rng.uniform(-46, 39, 3000)
    # Ties of the narrow format, and values a hair beside them that float32 cannot tell apart.
    grid = rng.standard_normal(3000).astype(STORED[dtype]).astype(np.float64)
    half = {"F16": 2.0**-12, "BF16": 2.0**-9, "F32": 2.0**-25}[dtype]
    hair = rng.choice([0, 2.0**-45, -(2.0**-45)], 3000)
    ties = grid * (1 + half) * (1 + hair)
    edges = [
        0.0,
        -0.0,
        65519.999,
        65520.0,
        3.4e38,
        3.4028235677973366e38,
        1e-45,
        5e-46,
        6e-8,
        1e300,
    ]
    values = np.concatenate([scattered, ties, edges, np.negative(edges)])
    expected = [nearest(float(v), dtype) for v in values]
    assert np.array_equal(narrow(dtype, values).astype(np.float64), expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_not_a_number_and_infinity_survive_rounding(dtype: str) -> None:
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0])
    out = narrow(dtype, values).astype(np.float64)
    assert np.isnan(out[:2]).all()
    assert list(out[2:4]) == [np.inf, -np.inf]
    assert np.signbit(out[4])


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("out_dtype", ["F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("exponent", [-30, 0, 7])
def test_differences_are_rounded_and_taken_off(dtype: str, out_dtype: str, exponent: int) -> None:
    """All that float8 can be, ties and what is next to them, zeros of both signs; an odd end."""
    kind = (STORED | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)})[out_dtype]
    known = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    known = np.sort(known[np.isfinite(known)])
    wanted = np.concatenate([known, (known[1:] + known[:-1]) / 2, rows_of("F64", 1, 500)[0]])
    wanted = np.concatenate([wanted, wanted * (1 + 2.0**-40), [1e-9, -1e-9, 0.0, -0.0]])
    rest = np.ldexp(wanted, exponent)
    data = rows_of(dtype, 1, len(rest))[0] * 0
    data[::3] = 2.0**exponent if dtype != "F16" or exponent > -20 else 0
    minus = rest - data.astype(np.float64)
    capacity = -(-len(rest) // kernels.STRIDE) * kernels.STRIDE
    rows, out, sums = padded(data[None]), np.zeros(8 * capacity, np.uint8), np.zeros(capacity)
    room = np.full(capacity, np.nan)  # what lies beyond the end doesn't count
    room[: len(rest)] = minus
    minus, stored = room[: len(rest)], rows.view(np.uint8)[0]
    peak = kernels.quantize(dtype, stored, [(1.0, minus)], exponent, out_dtype, out, sums)
    rest = data.astype(np.float64) + minus
    assert peak == np.abs(rest).max()
    assert kernels.quantize(dtype, stored, [(1.0, minus)], None, out_dtype, out, sums) == peak
    scaled = np.ldexp(rest, -exponent)
    rounded = scaled.astype(kind) if out_dtype != "BF16" else narrow("BF16", scaled)
    assert out.view(kind)[: len(rest)].tobytes() == rounded.tobytes()
    left = minus - np.ldexp(rounded.astype(np.float64), exponent)
    assert np.array_equal(sums[: len(rest)], left)
    for odd in (np.inf, np.nan):
        minus[5] = odd
        found = kernels.quantize(dtype, stored, [(1.0, minus)], exponent, out_dtype, out, sums)
        assert np.array_equal(found, odd, equal_nan=True)
