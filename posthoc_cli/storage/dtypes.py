"""The dtypes of safetensors: the one table of them.

Every other module asks here for an element's size, for its name in torch, NumPy or ml_dtypes, and
for the limits of a floating-point format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype: `code` is safetensors' name for it, `name` that of torch, NumPy and ml_dtypes.

    `name` is None where torch has no such elements. A real floating-point format also has
    `exponent_bits`, `mantissa_bits` (stored ones) and the `largest` finite value.
    """

    code: str
    bits: int
    name: str | None
    exponent_bits: int = 0
    mantissa_bits: int = 0
    largest: float = 0.0

    @property
    def bias(self) -> int:
        """What is subtracted from a stored exponent: the formats without -0 have one more."""
        return (1 << (self.exponent_bits - 1)) - (0 if self.code.endswith("FNUZ") else 1)

    @property
    def has_infinity(self) -> bool:
        """Whether a stored exponent of all ones means infinity or NaN, as IEEE 754 has it."""
        return self.code in _IEEE

    def numpy(self) -> Any:
        """The little-endian NumPy dtype of its values; ml_dtypes has those that NumPy lacks."""
        if self.code == "BF16" or self.code in FLOAT8:
            import ml_dtypes  # only here: few snapshots need it

            return np.dtype(getattr(ml_dtypes, self.name or ""))
        return np.dtype(self.name or "V1").newbyteorder("<")

    def unsigned(self) -> np.dtype[Any]:
        """The NumPy dtype of its bits as whole numbers; of packed elements, of their bytes."""
        return np.dtype(f"<u{self.bits // 8 or 1}")

    def torch(self) -> Any:
        """torch's dtype; raises AttributeError where this torch has none."""
        import torch  # only here: it takes a second

        return getattr(torch, self.name or "")

    def spacing(self, values: FloatArray) -> FloatArray:
        """The distance of neighbouring numbers of this format at `values`: one unit in the last
        place."""
        least = 1 - self.bias
        exponents = np.where(values == 0, least, np.frexp(values)[1] - 1)
        distances: FloatArray = np.ldexp(1.0, np.maximum(exponents, least) - self.mantissa_bits)
        return distances


DTYPES = {
    dtype.code: dtype
    for dtype in (
        DType("U64", 64, "uint64"),
        DType("I64", 64, "int64"),
        DType("F64", 64, "float64", 11, 52, float(np.finfo(np.float64).max)),
        DType("C64", 64, "complex64"),
        DType("F32", 32, "float32", 8, 23, float(np.finfo(np.float32).max)),
        DType("U32", 32, "uint32"),
        DType("I32", 32, "int32"),
        DType("BF16", 16, "bfloat16", 8, 7, 255 * 2.0**120),
        DType("F16", 16, "float16", 5, 10, 65504.0),
        DType("U16", 16, "uint16"),
        DType("I16", 16, "int16"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", 5, 2, 57344.0),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", 4, 3, 240.0),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3", 8, "float8_e4m3fn", 4, 3, 448.0),
        DType("F8_E5M2", 8, "float8_e5m2", 5, 2, 57344.0),
        DType("I8", 8, "int8"),
        DType("U8", 8, "uint8"),
        DType("BOOL", 8, "bool"),
        DType("F6_E3M2", 6, None),
        DType("F6_E2M3", 6, None),
        DType("F4", 4, None),
    )
}
"""By code. A file has its tensors in this order, as the safetensors library writes them: the
largest elements first, so that each is aligned."""

_IEEE = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2"})

FLOATS = frozenset(code for code, dtype in DTYPES.items() if dtype.exponent_bits)
"""Real floating-point formats."""

FLOAT8 = frozenset(code for code in FLOATS if DTYPES[code].bits == 8)

AVERAGED = FLOATS | {"C64"}
"""Dtypes whose tensors are averaged; a complex number is two floats."""

UNAVERAGEABLE = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
"""Packed or exponent-only floats: parts of block formats, whose average means nothing."""

OUTPUT_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What a user can ask for, and the dtype that real floating tensors then have in the output."""

BY_NAME = {dtype.name: code for code, dtype in DTYPES.items() if dtype.name}
"""The code of each of torch's dtypes that safetensors has, by torch's name without `torch.`."""


def bytes_of(code: str, elements: int) -> int:
    """Bytes that `elements` elements take."""
    return elements * DTYPES[code].bits // 8


def widest(codes: Iterable[str]) -> str:
    """The dtype that holds the values of all of `codes`, which are real floating-point formats or
    just one."""
    first, *others = set(codes)
    if not others:
        return first
    formats = [DTYPES[code] for code in (first, *others)]
    exponent, mantissa = (
        max(getattr(each, bits) for each in formats) for bits in ("exponent_bits", "mantissa_bits")
    )
    return min(
        (DTYPES[code] for code in OUTPUT_DTYPES.values()),
        key=lambda to: (to.exponent_bits < exponent or to.mantissa_bits < mantissa, to.bits),
    ).code


def decode(code: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """The values in the bytes `data`, of a real floating dtype, in a NumPy dtype that holds them
    exactly."""
    if code == "BF16":  # the upper half of a float32
        shifted: npt.NDArray[np.uint32] = data.view("<u2").astype("<u4") << np.uint32(16)
        return shifted.view("<f4")
    if code in FLOAT8:
        looked_up: npt.NDArray[np.float32] = float8_values(code)[data]
        return looked_up
    return data.view(DTYPES[code].numpy())


def float8_values(code: str) -> npt.NDArray[np.float32]:
    """The value of each of the 256 bytes of a float8 dtype."""
    values: npt.NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(DTYPES[code].numpy())
    return values.astype(np.float32)


def rounding_variances(code: str, data: npt.NDArray[np.uint8]) -> FloatArray:
    """spacing^2 / 12 at each value in `data`: the variance of an even spread over all that rounds
    to it. 0 for NaN, for infinity, and where the square overflows."""
    dtype = DTYPES[code]
    exponents = np.maximum(np.arange(1 << dtype.exponent_bits), 1)
    with np.errstate(over="ignore", under="ignore"):
        table = np.ldexp(1.0, 2 * (exponents - dtype.bias - dtype.mantissa_bits)) / 12
    if dtype.has_infinity:
        table[-1] = 0.0
    table[np.isinf(table)] = 0.0
    bits = data.view(dtype.unsigned())
    found: FloatArray = table[(bits >> dtype.mantissa_bits) & (len(table) - 1)]
    return found
