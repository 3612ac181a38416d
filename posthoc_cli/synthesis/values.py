"""Values of tensors as they are stored, or as sums of differences in float64; and what they lead to
expect.

Sums are kept as minus what they come to: then a difference is one fused addition to them. They are
added up in the order and by the roundings of `storage.deltas`: a difference times its scale is
exact.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.storage.dtypes import FloatArray, bytes_of, float8_values
from posthoc_cli.synthesis.kernels import STRIDE, WIDENED, accumulate, compiled, splat

AT_ONCE = 1 << 16
"""Elements summed at a time: what is done with them stays in the processor's cache."""

_LOOK = 1 << 12
"""Bytes by which most that differs is told to."""

Bytes = npt.NDArray[np.uint8]

Buffer = Callable[[int], FloatArray]
"""Gives room for the sums of so many elements, and for those up to the next multiple of STRIDE."""


@dataclass(slots=True, eq=False)
class Value:
    """Elements of a tensor: `data` of a dtype as they are stored, or of none: a sum, minus which is
    `sums`."""

    dtype: str | None
    data: Bytes
    sums: FloatArray | None

    def minus(self, buffer: Buffer, count: int) -> FloatArray:
        """Minus its `count` elements, in float64; they are kept."""
        if self.sums is None:
            self.sums = buffer(count)
            for part in parts(count):
                self._widen(part, self.sums[part])
        return self.sums

    def part(self, part: slice) -> FloatArray:
        """The same of a part; they are not kept."""
        if self.sums is not None:
            return self.sums[part]
        minus = new_buffer(part.stop - part.start)
        self._widen(part, minus)
        return minus

    def _widen(self, part: slice, into: FloatArray) -> None:
        assert self.dtype is not None
        add(self.dtype, elements(self.dtype, self.data, part), -1.0, None, into)

    def same(self, dtype: str, data: Bytes, part: slice) -> bool:
        """Whether elements `data` are to the bit what it has in their place, not as a sum."""
        if self.dtype != dtype:
            return False
        there = elements(dtype, self.data, part)
        return np.array_equal(there[:_LOOK], data[:_LOOK]) and np.array_equal(there, data)


def combine(rows: Sequence[tuple[float, FloatArray]], room: FloatArray) -> FloatArray:
    """The sum of rows times their coefficients, in `room` unless it is one row as it is.

    Each product is rounded, and each sum; all have room for a multiple of STRIDE.
    """
    if len(rows) == 1 and rows[0][0] == 1.0:
        return rows[0][1]
    addresses = np.array([row.ctypes.data for _, row in rows], np.uintp)
    weights = np.array([number for number, _ in rows])
    _combining()(addresses.ctypes.data, weights.ctypes.data, len(rows), room.ctypes.data, room.size)
    return room


def parts(count: int) -> list[slice]:
    return [slice(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE)]


def elements(dtype: str, data: Bytes, part: slice) -> Bytes:
    return data[bytes_of(dtype, part.start) : bytes_of(dtype, part.stop)]


def padded(dtype: str, count: int) -> Bytes:
    """Room for elements, within such for a multiple of STRIDE."""
    return np.empty(bytes_of(dtype, -(-count // STRIDE) * STRIDE), np.uint8)[
        : bytes_of(dtype, count)
    ]


def add(
    dtype: str, data: Bytes, weight: float, before: FloatArray | None, into: FloatArray
) -> None:
    """into = before + weight * data, rounded once; all have room for a multiple of STRIDE."""
    count = into.size
    if dtype not in WIDENED:
        wide = padded("F32", count)
        np.take(float8_values(dtype), data, out=wide.view(np.float32))
        dtype, data = "F32", wide
    address, sums = np.array([data.ctypes.data], np.uintp), None if before is None else before[None]
    out = into.view(np.uint8)[None]
    accumulate(dtype, address, np.array([[weight]]), sums, out, "F64", count)


def new_buffer(count: int) -> FloatArray:
    return padded("F64", count).view(np.float64)


@functools.cache
def _combining() -> Callable[..., int]:
    lines = [
        "define i32 @kernel(ptr %rows, ptr %weights, i64 %n, ptr %out, i64 %count) {",
        "entry:",
        "  br label %block",
        "block:",
        "  %j = phi i64 [0, %entry], [%next_j, %done_row]",
        "  br label %row",
        "row:",
        "  %i = phi i64 [0, %block], [%next_i, %row]",
        "  %sum = phi <V x double> [splat (double -0.0), %block], [%more, %row]",
        "  %row_p = getelementptr ptr, ptr %rows, i64 %i",
        "  %row_at = load ptr, ptr %row_p, align 8",
        "  %x_p = getelementptr double, ptr %row_at, i64 %j",
        "  %x = load <V x double>, ptr %x_p, align 8",
        "  %w_p = getelementptr double, ptr %weights, i64 %i",
        "  %w = load double, ptr %w_p, align 8",
        *splat("w", "double"),
        "  %product = fmul <V x double> %x, %w_v",
        "  %more = fadd <V x double> %sum, %product",
        "  %next_i = add i64 %i, 1",
        "  %again_i = icmp ult i64 %next_i, %n",
        "  br i1 %again_i, label %row, label %done_row",
        "done_row:",
        "  %out_p = getelementptr double, ptr %out, i64 %j",
        "  store <V x double> %more, ptr %out_p, align 8",
        "  %next_j = add i64 %j, V",
        "  %again = icmp ult i64 %next_j, %count",
        "  br i1 %again, label %block, label %done",
        "done:",
        "  ret i32 0",
        "}",
    ]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, integer, pointer, integer)
    return compiled("\n".join(lines), 32, ctypes.c_int32, *arguments)
