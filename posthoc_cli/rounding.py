"""Floating-point elements from one stored dtype to another, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli import kernels
from posthoc_cli.summing import FLOAT8
from posthoc_cli.tensorfile import DTYPE_BITS

ROUNDED = frozenset({"F64", "F32", "F16", "BF16", *FLOAT8})
"""Dtypes whose elements can be rounded to F64, F32, F16 or BF16."""

_AT_ONCE = 1 << 16
"""Elements taken at a time: a multiple of kernels.STRIDE, and few enough for a cache."""

_INFINITE = {
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
"""Of each dtype, the bits that aren't the sign, and what they are when the element is infinite."""


def round_to(
    out: npt.NDArray[np.uint8], out_dtype: str, stored: npt.NDArray[Any], dtype: str
) -> bool:
    """Round the elements `stored`, of `dtype`, to `out_dtype`, as bytes into `out`.

    `stored` has one dimension, of unsigned integers. Each becomes the nearest there is, ties to
    even; zeros keep their sign. Returns whether a finite element became infinite.
    """
    itemsize = DTYPE_BITS[out_dtype] // 8
    row, result = np.zeros((2, 1, _AT_ONCE * 8), np.uint8)
    address = np.array([row.ctypes.data], np.uintp)
    once = np.ones((1, 1))
    nothing = np.full((1, _AT_ONCE), -0.0)  # what leaves the sign of a zero alone when added
    overflow = False
    for first in range(0, stored.size, _AT_ONCE):
        elements, known = _widened(stored[first : first + _AT_ONCE], dtype)
        before = row[0, : elements.nbytes]
        before[:] = elements.view(np.uint8)
        kernels.accumulate(known, address, once, nothing, result, out_dtype, elements.size)
        after = result[0, : elements.size * itemsize]
        infinite = _infinite(after, out_dtype)
        if infinite.any():
            overflow |= bool((infinite & ~_infinite(before, known)).any())
        out[first * itemsize :][: after.size] = after
    return overflow


def _widened(elements: npt.NDArray[Any], dtype: str) -> tuple[npt.NDArray[Any], str]:
    """`elements` in a dtype that the kernels know, and that dtype: float8 becomes F32, exactly."""
    if dtype not in FLOAT8:
        return elements, dtype
    import ml_dtypes  # only here: few checkpoints need it

    kind = np.dtype(getattr(ml_dtypes, FLOAT8[dtype]))
    table = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    return table[elements], "F32"


def _infinite(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.bool_]:
    kind, mask, infinite = _INFINITE[dtype]
    found: npt.NDArray[np.bool_] = (data.view(kind) & kind(mask)) == kind(infinite)
    return found
