"""Writing a snapshot as a difference to another, in one pass and flat memory.

What was rounded away of one snapshot is in the difference to the next, so that of a chain only the
last rounding remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import SnapshotError, printable
from posthoc_cli.storage import File, Reader, TensorIndex, TensorInfo, fingerprint
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.deltas import header_of, links_of, terms
from posthoc_cli.storage.dtypes import (
    DTYPES,
    FLOAT8,
    FLOATS,
    FloatArray,
    bytes_of,
    decode,
)
from posthoc_cli.storage.header import Link
from posthoc_cli.synthesis.accumulators import CpuAccumulator
from posthoc_cli.synthesis.engine import BATCH
from posthoc_cli.synthesis.kernels import STRIDE, accumulate

DELTA_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
"""What differences can be stored as."""

_AT_ONCE = 1 << 16
"""Elements taken at a time."""

_HELD = 1 << 22
"""Differences of a tensor that are held until its scale is known; those of a larger one are made
twice."""

_NOTHING = np.full((1, _AT_ONCE), -0.0)
"""What leaves the sign of a zero alone when added."""

_ROOM = 6
"""Powers of two above the first tensor's largest difference that one scale of float16 is good for;
and 11 below it lose nothing either."""

Bytes = npt.NDArray[np.uint8]

ReadElements = Callable[[str, int, Bytes], None]
"""Fills an array with the bytes of a tensor's elements, by name, from the element on."""


class Differences:
    """What snapshots are more than `base`, in float64; a context manager that has its files open.

    The sum of the base's chain is that of storage.deltas, in the same order.
    """

    def __init__(self, base: TensorIndex) -> None:
        self.base = base
        self._links = links_of(base)
        self._sums = CpuAccumulator(8 * _AT_ONCE, _AT_ONCE, 1, BATCH)

    def __enter__(self) -> Differences:
        with ExitStack() as stack:
            self._readers = [stack.enter_context(Reader(link.index)) for link in self._links]
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def check_unchanged(self) -> None:
        for reader in self._readers:
            reader.check_unchanged()

    def terms(self, name: str) -> list[tuple[int, int]]:
        return terms(self._links, name)

    def same(self, name: str, first: int, dtype: str, data: Bytes) -> bool:
        """Whether elements `data` are to the bit what the base holds, not as a sum."""
        at, *more = (at for at, _ in self.terms(name))
        if more or self._links[at].index.tensors[name].dtype != dtype:
            return False
        return np.array_equal(self.stored(at, name, first, _count(dtype, data))[1], data)

    def stored(self, at: int, name: str, first: int, count: int) -> tuple[str, Bytes]:
        """The dtype and bytes of elements of a tensor in link `at`."""
        info = self._links[at].index.tensors[name]
        data = np.empty(bytes_of(info.dtype, count), np.uint8)
        self._readers[at].read(info.start + bytes_of(info.dtype, first), data.data)
        return info.dtype, data

    def of(self, name: str, first: int, count: int, dtype: str, data: Bytes) -> FloatArray:
        """Elements `data` of a tensor minus those of the base; good until the next call."""
        sums = self._sums
        sums.begin(dtype, "F64", count)
        every = [(self._links[at].index.tensors[name], at, e) for at, e in self.terms(name)]
        for code, alike in groupby(every, key=lambda term: term[0].dtype):
            several = list(alike)
            for begin in range(0, len(several), BATCH):
                batch = several[begin : begin + BATCH]
                for row, (info, at, _) in zip(sums.staging(), batch, strict=False):
                    start = info.start + bytes_of(code, first)
                    self._readers[at].read(start, row[: bytes_of(code, count)])
                weights = np.array([[-(2.0**exponent)] for _, _, exponent in batch])
                sums.add(weights, last=False, dtype=code)
        sums.staging()[0][: data.size] = data.data
        sums.add(np.ones((1, 1)), last=True, dtype=dtype)
        return np.frombuffer(sums.result(0), np.float64)


class Held:
    """What a chain comes to, held in memory: of tensors that are sums in 8 bytes an element.

    It does what Differences does, to the bit, and of a chain that has grown reads only what is new.
    """

    def __init__(self) -> None:
        self._files: list[File] = []
        self._values: dict[str, tuple[str | None, Bytes]] = {}

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
                data = np.empty(info.end - info.start, np.uint8)
                reader.read(info.start, data.data)
                if (exponent := link.exponent(name)) is None:
                    self._values[name] = info.dtype, data
                    continue
                dtype, before = self._values[name]
                total = _decoded(dtype or "F64", before)
                for first in range(0, info.elements, _AT_ONCE):
                    part = slice(first, min(first + _AT_ONCE, info.elements))
                    stored = _decoded(info.dtype, _elements(info.dtype, data, part))
                    total[part] += stored * 2.0**exponent
                self._values[name] = None, total.view(np.uint8)
            reader.check_unchanged()

    def same(self, name: str, first: int, dtype: str, data: Bytes) -> bool:
        known, values = self._values[name]
        if known != dtype:
            return False
        part = slice(first, first + _count(dtype, data))
        return np.array_equal(_elements(dtype, values, part), data)

    def of(self, name: str, first: int, count: int, dtype: str, data: Bytes) -> FloatArray:
        known, values = self._values[name]
        part = slice(first, first + count)
        base = _decoded(known or "F64", _elements(known or "F64", values, part))
        with np.errstate(all="ignore"):
            # As Differences adds it up: the sign of a zero goes by that.
            difference: FloatArray = (0.0 - base) + _decoded(dtype, data)
        return difference

    def check_unchanged(self) -> None:
        """What it was read from was checked then."""


def _elements(dtype: str, data: Bytes, part: slice) -> Bytes:
    return data[bytes_of(dtype, part.start) : bytes_of(dtype, part.stop)]


def _decoded(dtype: str, data: Bytes) -> FloatArray:
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        return decode(dtype, data).astype(np.float64)


def _count(dtype: str, data: Bytes) -> int:
    return data.size * 8 // DTYPES[dtype].bits


def write_delta(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: ReadElements,
    base: TensorIndex,
    dtype: str,
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    held: Held | None = None,
) -> int:
    """Write the snapshot that `read` gives as a difference to `base`; returns the file's bytes.

    `tensors` are its tensors, those of the base; `base` lies in the same folder, as one file.
    `dtype` is one of DELTA_DTYPES. The base is read from its files, or from what is `held` of them,
    which is brought up to it. A tensor with NaN or infinity, of another kind than real
    floating point, or of no more bits than `dtype` has, is written as it is; one that is what it
    is in the base not at all. The file appears whole or not at all.

    Raises SnapshotError when a file changes meanwhile, UsageError when the file exists and
    `overwrite` is false, MachineError when the disk fails.
    """
    code = DELTA_DTYPES[dtype]
    order = {each: place for place, each in enumerate(DTYPES)}
    differ = {
        name
        for name, info in tensors.items()
        if info.dtype in FLOATS and DTYPES[info.dtype].bits > DTYPES[code].bits
    }
    kinds = {name: code if name in differ else info.dtype for name, info in tensors.items()}
    names = sorted(tensors, key=lambda name: (order[kinds[name]], name))
    own = links_of(base)[-1].index
    where = own.files[0].path.name, fingerprint(base)
    most = sum(info.end - info.start for info in tensors.values())
    # Room for a header that names a scale for each tensor: only the data tell which there are.
    room = len(
        header_of(
            {name: TensorInfo("F8_E4M3FNUZ", tensors[name].shape, most, most) for name in names},
            {name: -300 - at for at, name in enumerate(names)},
            where,
            metadata,
        )
    )
    file = AtomicFile(path, room + most, overwrite=overwrite)
    places: dict[str, TensorInfo] = {}
    scales: dict[str, int | None] = {}
    position = 0
    usual: int | None = 0 if code == "BF16" else None
    with file, Differences(base) if held is None else held.at(base) as differences:
        for name in names:
            info = tensors[name]
            parts: _Pieces = _parts(differences, name, info, read, whole=name not in differ)
            peak, pieces = _largest(parts, info.elements)
            if peak == 0.0:
                continue
            stored, exponent = info.dtype, None
            if name in differ and math.isfinite(peak):
                exponent = _exponent(code, peak, usual)
                if usual is None and code == "F16":
                    usual = exponent = exponent + _ROOM
                stored = code
            if info.dtype in FLOATS:
                scales[name] = exponent
            end = position + bytes_of(stored, info.elements)
            places[name] = TensorInfo(stored, info.shape, position, end)
            if pieces is None:
                pieces = _parts(differences, name, info, read, whole=exponent is None)
            elif exponent is None:
                pieces = _parts(differences, name, info, read, whole=True)
            for data, values in pieces:
                out = data if exponent is None else _rounded(values, code, exponent)
                file.write_at(room + position, out.data)
                position += out.size
        differences.check_unchanged()
        file.write_at(0, header_of(places, scales, where, metadata, room))
        file.shrink(room + position)
    return file.size


_Pieces = Iterable[tuple[Bytes, FloatArray]]
"""The bytes of a tensor, piece by piece, and what they are more than the base's."""


def _parts(
    differences: Differences | Held, name: str, info: TensorInfo, read: ReadElements, *, whole: bool
) -> _Pieces:
    """With `whole`, the differences are 0 where the bytes are the same, else 1."""
    for first in range(0, info.elements, _AT_ONCE):
        count = min(_AT_ONCE, info.elements - first)
        data = np.empty(bytes_of(info.dtype, count), np.uint8)
        read(name, first, data)
        if differences.same(name, first, info.dtype, data):
            yield data, np.zeros(count)
        elif whole:
            yield data, np.ones(count)
        else:
            yield data, differences.of(name, first, count, info.dtype, data)


def _largest(parts: _Pieces, elements: int) -> tuple[float, _Pieces | None]:
    """The largest difference, infinite or NaN if one is; and the pieces, of no large tensor."""
    held: list[tuple[Bytes, FloatArray]] = []
    peak = 0.0
    for data, values in parts:
        here = float(np.abs(values).max())
        peak = here if not here <= peak else peak
        if math.isnan(peak):
            return peak, None
        if elements <= _HELD:
            held.append((data, values.copy()))
    return peak, held if elements <= _HELD else None


def _exponent(code: str, peak: float, usual: int | None) -> int:
    """That of the scale by which the largest difference fits `code`; the usual one if it is good
    enough."""
    largest = DTYPES[code].largest
    least = max(math.frexp(peak / largest)[1], -300)
    if code == "BF16":
        return max(least, 0)
    if usual is not None and usual - 11 <= least + _ROOM <= usual + _ROOM:
        return usual
    return least


def _rounded(values: FloatArray, code: str, exponent: int) -> Bytes:
    if code in FLOAT8:
        found: Bytes = (values * 2.0**-exponent).astype(DTYPES[code].numpy()).view(np.uint8)
        return found
    padded = values if values.size % STRIDE == 0 else np.pad(values, (0, -values.size % STRIDE))
    out = np.empty((1, bytes_of(code, padded.size)), np.uint8)
    address = np.array([padded.ctypes.data], np.uintp)
    scale = np.full((1, 1), 2.0**-exponent)
    accumulate("F64", address, scale, _NOTHING, out, code, values.size)
    rounded: Bytes = out[0, : bytes_of(code, values.size)]
    return rounded


def check_delta(made: TensorIndex, tensors: Mapping[str, TensorInfo], read: ReadElements) -> None:
    """Read a delta back: raise SnapshotError unless each value is, up to the rounding of its own
    file, that of the snapshot which `read` gives."""
    own = made.links[-1]
    with Differences(made) as differences:
        for name, info in tensors.items():
            found = differences.terms(name)
            for first in range(0, info.elements, _AT_ONCE):
                count = min(_AT_ONCE, info.elements - first)
                data = np.empty(bytes_of(info.dtype, count), np.uint8)
                read(name, first, data)
                dtype, stored = differences.stored(found[-1][0], name, first, count)
                same = len(found) == 1 and dtype == info.dtype and np.array_equal(stored, data)
                here = name in own.index.tensors
                if same or info.dtype not in FLOATS or (len(found) == 1 and here):
                    right = same
                elif not here:  # but for the signs of zeros it is what the base is
                    right = not differences.of(name, first, count, info.dtype, data).any()
                else:
                    values = decode(dtype, stored).astype(np.float64)
                    bound = DTYPES[dtype].spacing(values) * 2.0 ** found[-1][1] / 2
                    off = np.abs(differences.of(name, first, count, info.dtype, data))
                    right = bool((off <= bound * (1 + 1e-6)).all())
                if not right:
                    problem = f"tensor '{printable(name)}' is not what it was made of"
                    raise SnapshotError(str(made.path), problem, "check the disk, and pack it anew")
