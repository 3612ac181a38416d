"""Floating-point elements from one stored dtype to another, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.storage.dtypes import FLOAT8, bytes_of, decode
from posthoc_cli.synthesis import kernels

_AT_ONCE = 1 << 16
"""Elements taken at a time: a multiple of kernels.STRIDE, and few enough for a cache."""


def round_to(
    out: npt.NDArray[np.uint8], out_dtype: str, stored: npt.NDArray[Any], dtype: str
) -> bool:
    """Round the elements `stored`, of `dtype`, to `out_dtype`, as bytes into `out`.

    `stored` has one dimension, of unsigned integers. Each becomes the nearest there is, ties to
    even; zeros keep their sign. Returns whether a finite element became infinite.
    """
    itemsize = bytes_of(out_dtype, 1)
    row, result = np.zeros((2, 1, _AT_ONCE * 8), np.uint8)
    address = np.array([row.ctypes.data], np.uintp)
    once = np.ones((1, 1))
    nothing = np.full((1, _AT_ONCE), -0.0)  # what leaves the sign of a zero alone when added
    overflow = False
    for first in range(0, stored.size, _AT_ONCE):
        elements, known = stored[first : first + _AT_ONCE], dtype
        if dtype in FLOAT8:
            elements, known = decode(dtype, elements), "F32"
        before = row[0, : elements.nbytes]
        before[:] = elements.view(np.uint8)
        suspicious = kernels.accumulate(
            known, address, once, nothing, result, out_dtype, elements.size
        )
        after = result[0, : elements.size * itemsize]
        if suspicious:
            infinite = np.isinf(decode(out_dtype, after))
            overflow |= bool((infinite & ~np.isinf(decode(known, before))).any())
        out[first * itemsize :][: after.size] = after
    return overflow
