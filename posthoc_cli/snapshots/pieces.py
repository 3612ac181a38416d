"""Which elements a sample is made of, and where they lie in each file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import numpy as np
import numpy.typing as npt

from posthoc_cli.storage import Reader, TensorInfo
from posthoc_cli.storage.dtypes import AVERAGED, DTYPES, bytes_of

_NEAR = 1 << 14
"""Bytes between two places that are read along, as that is quicker than to begin anew."""

GOLDEN = (5**0.5 - 1) / 2
"""Blocks begin at multiples of it, modulo one, within their strata: unlike equal distances, that
never falls in step with the rows of a matrix."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `first` to `first + count` of a tensor; a complex element counts as two."""

    name: str
    dtype: str
    first: int
    count: int

    @property
    def bytes(self) -> int:
        return bytes_of(self.dtype, self.count)

    def stored(self, tensors: Mapping[str, TensorInfo]) -> Piece:
        """The same piece of a file with these tensors, which may have it in another dtype."""
        dtype = tensors[self.name].dtype
        return self if dtype in (self.dtype, "C64") else replace(self, dtype=dtype)

    def start(self, tensors: Mapping[str, TensorInfo]) -> int:
        """Where the piece begins in the data section of a file with these tensors."""
        return tensors[self.name].start + bytes_of(self.dtype, self.first)


def choose_pieces(tensors: Mapping[str, TensorInfo], blocks: int, block: int) -> list[Piece]:
    """The pieces of the sample by dtype and name: wherever they lie, sums have the same digits."""
    rank = {code: place for place, code in enumerate(DTYPES)}
    averaged = [(name, info) for name, info in tensors.items() if info.dtype in AVERAGED]
    averaged.sort(key=lambda each: (rank[each[1].dtype], each[0]))
    counts = [info.elements * (2 if info.dtype == "C64" else 1) for _, info in averaged]
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if averaged else 0
    if total <= blocks * block:
        spans = [(0, total)]
    else:
        edges = [total * k // blocks for k in range(blocks + 1)]
        spans = []
        for k, (low, high) in enumerate(pairwise(edges)):
            first = low + int((k * GOLDEN) % 1.0 * (high - low - block + 1))
            spans.append((first, first + block))
    pieces = []
    for first, last in spans:
        at = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            name, info = averaged[at]
            begin = int(ends[at]) - counts[at]
            stop = min(last, int(ends[at]))
            dtype = "F32" if info.dtype == "C64" else info.dtype
            pieces += [
                Piece(name, dtype, start - begin, min(block, stop - start))
                for start in range(first, stop, block)
            ]
            first, at = stop, at + 1
    return pieces


_Run = tuple[str, int, int, int, int]
_Stretch = tuple[int, int, int]  # where it begins, its bytes, and where they go


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the pieces lie that a file has: `elements` are their places among those of all.

    `runs` are stretches of one dtype in the pieces' bytes, laid end to end, and `ranges` what is
    read of the file: where it starts, how long it is, and the stretches of it that are pieces'.
    """

    pieces: Sequence[Piece]
    elements: npt.NDArray[np.intp]
    runs: Sequence[_Run]
    ranges: Sequence[tuple[int, int, Sequence[_Stretch]]]

    def read(self, reader: Reader) -> npt.NDArray[np.uint8]:
        """The bytes of the pieces, one after the other."""
        raw = np.empty(self.runs[-1][-1] if self.runs else 0, np.uint8)
        for start, count, held in self.ranges:
            read = np.empty(count, np.uint8)
            reader.read(start, read.data)
            for inside, length, place in held:
                raw[place : place + length] = read[inside : inside + length]
        return raw

    @classmethod
    def of(
        cls, pieces: Sequence[Piece], tensors: Mapping[str, TensorInfo], own: Mapping[str, str]
    ) -> Layout:
        """`own` are the names in the file of those tensors that are called otherwise."""
        pieces = [replace(piece, name=own.get(piece.name, piece.name)) for piece in pieces]
        there = np.repeat(
            [piece.name in tensors for piece in pieces], [piece.count for piece in pieces]
        )
        stored = [piece.stored(tensors) for piece in pieces if piece.name in tensors]
        return cls(stored, np.flatnonzero(there), _runs(stored), _ranges(stored, tensors))


def _runs(pieces: Sequence[Piece]) -> list[_Run]:
    """Stretches of one dtype: dtype, first and last element, first and last byte."""
    runs = []
    first = start = 0
    for dtype, group in groupby(pieces, key=lambda piece: piece.dtype):
        count = sum(piece.count for piece in group)
        last, end = first + count, start + bytes_of(dtype, count)
        runs.append((dtype, first, last, start, end))
        first, start = last, end
    return runs


def _ranges(
    pieces: Sequence[Piece], tensors: Mapping[str, TensorInfo]
) -> list[tuple[int, int, list[_Stretch]]]:
    """What to read of a file's data section for `pieces`, those joined that lie near."""
    places = accumulate((piece.bytes for piece in pieces), initial=0)
    lying = sorted(
        (piece.start(tensors), piece.bytes, place)
        for piece, place in zip(pieces, places, strict=False)
    )
    ranges: list[tuple[int, int, list[_Stretch]]] = []
    for start, length, place in lying:
        first, count, held = ranges.pop() if ranges else (start, 0, [])
        if start - first - count > _NEAR:
            ranges.append((first, count, held))
            first, held = start, []
        held.append((start - first, length, place))
        ranges.append((first, start + length - first, held))
    return ranges
