"""What chains of differences come to, tensor by tensor: read from their files, or held in memory.

Sums are kept as minus what they come to: then a difference is one fused addition to them. They are
added up in the order and by the roundings of `storage.deltas`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from posthoc_cli.storage import File, Reader, TensorIndex
from posthoc_cli.storage.deltas import links_of, terms
from posthoc_cli.storage.dtypes import FloatArray, bytes_of, float8_values
from posthoc_cli.storage.header import Link
from posthoc_cli.synthesis.accumulators import CpuAccumulator
from posthoc_cli.synthesis.engine import BATCH
from posthoc_cli.synthesis.kernels import STRIDE, WIDENED, accumulate

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
        """Minus its `count` elements, in float64."""
        if self.sums is None:
            assert self.dtype is not None
            self.sums = buffer(count)
            for part in parts(count):
                add(self.dtype, elements(self.dtype, self.data, part), -1.0, None, self.sums[part])
        return self.sums

    def same(self, dtype: str, data: Bytes, part: slice) -> bool:
        """Whether elements `data` are to the bit what it has in their place, not as a sum."""
        if self.dtype != dtype:
            return False
        there = elements(dtype, self.data, part)
        return np.array_equal(there[:_LOOK], data[:_LOOK]) and np.array_equal(there, data)


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


class Stored:
    """What the file `base` comes to, a chain's or a plain one; a context manager that has the
    chain's files open."""

    def __init__(self, base: TensorIndex) -> None:
        self._links = links_of(base)
        self._sums = CpuAccumulator(8 * AT_ONCE, AT_ONCE, 1, BATCH)

    def __enter__(self) -> Stored:
        with ExitStack() as stack:
            self._readers = [stack.enter_context(Reader(link.index)) for link in self._links]
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def check_unchanged(self) -> None:
        for reader in self._readers:
            reader.check_unchanged()

    def value(self, name: str, first: int, count: int, buffer: Buffer) -> Value:
        """A tensor's elements from `first` on."""
        every = [(self._links[at].index.tensors[name], at, e) for at, e in terms(self._links, name)]
        if len(every) == 1:
            info, at, _ = every[0]
            data = padded(info.dtype, count)
            self._readers[at].read(info.start + bytes_of(info.dtype, first), data.data)
            return Value(info.dtype, data, None)
        total = buffer(count)
        for part in parts(count):
            size = part.stop - part.start
            self._sums.begin("", "F64", size)
            for code, alike in groupby(every, key=lambda term: term[0].dtype):
                several = list(alike)
                for begin in range(0, len(several), BATCH):
                    batch = several[begin : begin + BATCH]
                    rows = self._sums.staging(code)
                    for row, (info, at, _) in zip(rows, batch, strict=False):
                        start = info.start + bytes_of(code, first + part.start)
                        self._readers[at].read(start, row[: bytes_of(code, size)])
                    weights = np.array([[-(2.0**exponent)] for _, _, exponent in batch])
                    self._sums.add(weights, last=batch[-1] is every[-1])
            total[part] = np.frombuffer(self._sums.result(0), np.float64)
        return Value(None, total.view(np.uint8), total)


class Held:
    """What a chain comes to, held in memory: of tensors that are sums in 8 bytes an element.

    Of a chain that has grown only what is new is read.
    """

    def __init__(self) -> None:
        self._files: list[File] = []
        self._values: dict[str, Value] = {}

    def at(self, base: TensorIndex) -> AbstractContextManager[Held]:
        """Itself, brought to the value of `base`."""
        links = links_of(base)
        files = [link.index.files[0] for link in links]
        known, self._files = self._files, []  # not of what is half read
        if not known or files[: len(known)] != known:
            known, self._values = [], {}
        for link in links[len(known) :]:
            self._add(link)
        self._files = files
        return nullcontext(self)

    def _add(self, link: Link) -> None:
        with Reader(link.index) as reader:
            for name, info in link.index.tensors.items():
                data = padded(info.dtype, info.elements)
                reader.read(info.start, data.data)
                if (exponent := link.exponent(name)) is None:
                    self._values[name] = Value(info.dtype, data, None)
                    continue
                total = self._values[name].minus(new_buffer, info.elements)
                for part in parts(info.elements):
                    stored = elements(info.dtype, data, part)
                    add(info.dtype, stored, -(2.0**exponent), total[part], total[part])
                self._values[name] = Value(None, total.view(np.uint8), total)
            reader.check_unchanged()

    def value(self, name: str, first: int, count: int, buffer: Buffer) -> Value:
        whole, part = self._values[name], slice(first, first + count)
        if whole.dtype is None:
            total = buffer(count)
            total[:] = whole.minus(buffer, count)[part]
            return Value(None, total.view(np.uint8), total)
        data = padded(whole.dtype, count)
        data[:] = elements(whole.dtype, whole.data, part)
        return Value(whole.dtype, data, None)

    def check_unchanged(self) -> None:
        """What it was read from was checked then."""


Base = Stored | Held


def new_buffer(count: int) -> FloatArray:
    return padded("F64", count).view(np.float64)
