"""A tensor's bytes out of strided blocks: shards of it in several files, views, other byte orders.

The bytes are those of the whole tensor, row by row and little-endian, as every other part of an
index has them. A range of them is cut into boxes (rows in part, whole rows, rows in part), and what
each block has of a box is read in as few reads as memory allows and copied to its place.
"""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.storage.header import Part, ReadAt

SCRATCH_BYTES = 1 << 20
"""What a thread reads at a time where it can't read to the place itself. It should stay in the
processor's cache until it is copied."""

GAP_BYTES = 1 << 14
"""Runs with a gap of at most this between them are read at once, gap included: a read of its own
costs as much."""

Elements = npt.NDArray[Any]
_scratch = threading.local()


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a tensor: elements `first` to `first + sizes` of each dimension.

    Its first element lies at byte `offset` of file `file` of the index; `strides` count elements,
    and may be zero or overlap, as views have them.
    """

    first: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    file: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Content of a part: a tensor of `shape`, of elements of `itemsize` bytes.

    Every element lies in one of `blocks`, or in several that agree. With `swapped` above 1, units
    of so many bytes have the other byte order: half an element, where that is complex.
    """

    shape: tuple[int, ...]
    itemsize: int
    blocks: tuple[Block, ...]
    swapped: int = 0

    def open(self, files: Sequence[ReadAt]) -> ReadAt:
        return _Opened(self, files).read


def whole(shape: Sequence[int], blocks: Sequence[Block]) -> bool:
    """Whether `blocks`, which lie within a tensor of `shape`, leave out no element of it.

    It takes for granted that no two have an element in common, unless they are the same box.
    """
    boxes = {(block.first, block.sizes) for block in blocks}
    return sum(math.prod(sizes) for _, sizes in boxes) == math.prod(shape)


def make_parts(content: Blocks, first: int) -> tuple[Part, ...]:
    """The parts of an index from `first` on that are the tensor: plain ones where blocks lie as
    the tensor does, such as shards of its first dimension, which then cost nothing to read."""
    plain = []
    at = first
    for block in sorted(content.blocks, key=lambda block: block.first):
        length = math.prod(block.sizes) * content.itemsize
        start = first + content.itemsize * _offset(content.shape, block.first)
        if start < at:
            continue  # the same box again, of a replica
        if start > at or not _lies_in_order(content, block):
            break
        plain.append(Part(at, length, block.offset, block.file))
        at += length
    length = math.prod(content.shape) * content.itemsize
    if at - first == length and content.swapped <= 1:
        return tuple(plain)
    return (Part(first, length, 0, content=content),)


def _offset(shape: Sequence[int], place: Sequence[int]) -> int:
    """The number of a tensor's element, row by row."""
    number = 0
    for size, at in zip(shape, place, strict=True):
        number = number * size + at
    return number


def _lies_in_order(content: Blocks, block: Block) -> bool:
    """Whether a block's bytes are a range of the tensor's."""
    inner, partial = 1, False
    for size, length, stride in reversed(
        list(zip(content.shape, block.sizes, block.strides, strict=True))
    ):
        if length > 1 and (stride != inner or partial):
            return False
        partial = partial or length < size
        inner *= length
    return True


def _merged(content: Blocks) -> tuple[tuple[int, ...], list[Block]]:
    """Shape and blocks in the fewest dimensions that have the same elements in the same order."""
    shape = [1, *content.shape]
    boxes = [
        ([0, *block.first], [1, *block.sizes], [0, *block.strides]) for block in content.blocks
    ]
    for at in range(len(shape) - 1, 0, -1):
        size = shape[at]
        if all(
            first[at] == 0
            and sizes[at] == size
            and (size == 1 or sizes[at - 1] == 1 or strides[at - 1] == size * strides[at])
            for first, sizes, strides in boxes
        ):
            shape[at - 1 : at + 1] = [shape[at - 1] * size]
            for first, sizes, strides in boxes:
                first[at - 1 : at + 1] = [first[at - 1] * size]
                sizes[at - 1 : at + 1] = [sizes[at - 1] * size]
                del strides[at if size == 1 else at - 1]
    return tuple(shape), [
        Block(tuple(first), tuple(sizes), tuple(strides), block.offset, block.file)
        for (first, sizes, strides), block in zip(boxes, content.blocks, strict=True)
    ]


class _Opened:
    """A tensor's blocks with the files that they lie in; any thread may call `read`."""

    def __init__(self, content: Blocks, files: Sequence[ReadAt]) -> None:
        self._files = files
        self._itemsize = content.itemsize
        self._swapped = content.swapped
        self._shape, blocks = _merged(content)
        self._blocks = sorted(blocks, key=lambda block: block.first)
        self._firsts = [block.first[0] for block in self._blocks]
        self._row = math.prod(self._shape[1:]) * self._itemsize
        self._kind = np.dtype(f"V{self._itemsize}")
        if self._itemsize in (1, 2, 4, 8):
            self._kind = np.dtype(f"u{self._itemsize}")

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `start` on."""
        unit = self._itemsize
        if (
            self._row * 8 <= SCRATCH_BYTES
        ):  # whole rows are fewer boxes, for a copy of what is cached
            unit = self._row
        most = max(SCRATCH_BYTES // unit, 1) * unit
        while into:
            first = start // unit * unit
            last = min(-(-(start + len(into)) // unit) * unit, first + most)
            count = min(last - start, len(into))
            if (first, last) == (start, start + count):
                self._read_units(first, last, np.frombuffer(into[:count], np.uint8))
            else:
                units = _buffer("units", last - first)
                self._read_units(first, last, units)
                into[:count] = units.data[start - first :][:count]
            start, into = start + count, into[count:]

    def _read_units(self, start: int, stop: int, data: npt.NDArray[np.uint8]) -> None:
        """Fill `data` with bytes `start` to `stop`, which are whole elements."""
        size = self._itemsize
        elements = data.view(self._kind)
        for place, sizes in _boxes(self._shape, start // size, stop // size):
            count = math.prod(sizes)
            self._read_box(place, elements[:count].reshape(sizes))
            elements = elements[count:]
        if self._swapped > 1:
            data.view(f"u{self._swapped}").byteswap(inplace=True)

    def _read_box(self, place: Sequence[int], out: Elements) -> None:
        """Fill `out` with the box of its shape from element `place` on."""
        stop = bisect.bisect_left(self._firsts, place[0] + out.shape[0])
        for block in self._blocks[:stop]:
            from_, to = [], []
            for at, length, first, size in zip(
                place, out.shape, block.first, block.sizes, strict=True
            ):
                begin, end = max(at, first), min(at + length, first + size)
                if begin >= end:
                    break
                from_.append(begin - first)
                to.append(slice(begin - at, end - at))
            else:
                inside = sum(map(int.__mul__, from_, block.strides)) * self._itemsize
                self._gather(
                    self._files[block.file], block.offset + inside, block.strides, out[tuple(to)]
                )

    def _gather(self, read: ReadAt, base: int, strides: Sequence[int], out: Elements) -> None:
        """Fill `out` with elements `strides` apart, the first of which lies at byte `base`."""
        itemsize = self._itemsize
        dims = [
            (stride, size, at)
            for at, (size, stride) in enumerate(zip(out.shape, strides, strict=True))
            if size > 1 and stride
        ]
        dims.sort()
        extent, apart = 1, len(dims)  # from dims[apart] on, each step is a read of its own
        for number, (stride, size, _) in enumerate(dims):
            if (stride - extent) * itemsize > GAP_BYTES:
                apart = number
                break
            extent += (size - 1) * stride
        if (
            extent == out.size
            and out.flags.c_contiguous
            and all(a[2] > b[2] for a, b in itertools.pairwise(dims))
        ):
            read(base, out.reshape(-1).view(np.uint8).data)
            return
        rows = math.prod(size for _, size, _ in dims[apart:])
        if rows * extent * itemsize > SCRATCH_BYTES and dims:
            self._gather_halves(read, base, strides, out, dims[-1])
            return
        row = extent * itemsize
        data = _buffer("read", rows * row).data
        for number, steps in enumerate(itertools.product(*(range(s) for _, s, _ in dims[apart:]))):
            inside = sum(step * dim[0] for step, dim in zip(steps, dims[apart:], strict=True))
            read(base + inside * itemsize, data[number * row : (number + 1) * row])
        apart_by = [0] * out.ndim
        for stride, _, at in dims[:apart]:
            apart_by[at] = stride * itemsize
        for _, size, at in reversed(dims[apart:]):
            apart_by[at] = row
            row *= size
        out[...] = np.ndarray(out.shape, self._kind, data, 0, apart_by)

    def _gather_halves(
        self,
        read: ReadAt,
        base: int,
        strides: Sequence[int],
        out: Elements,
        dim: tuple[int, int, int],
    ) -> None:
        stride, size, at = dim
        middle = size // 2
        for begin, end in ((0, middle), (middle, size)):
            half = (*(slice(None) for _ in range(at)), slice(begin, end))
            self._gather(read, base + begin * stride * self._itemsize, strides, out[half])


def _buffer(purpose: str, count: int) -> npt.NDArray[np.uint8]:
    """`count` bytes of this thread's memory, used again and again: new memory costs more."""
    buffer: npt.NDArray[np.uint8] | None = getattr(_scratch, purpose, None)
    if buffer is None or buffer.size < count:
        buffer = np.empty(max(count, SCRATCH_BYTES), np.uint8)
        setattr(_scratch, purpose, buffer)
    return buffer[:count]


def _boxes(
    shape: tuple[int, ...], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes, place and sizes, of which elements `first` to `last` of an array are made."""
    if len(shape) == 1:
        yield (first,), (last - first,)
        return
    inner = math.prod(shape[1:])
    row, column = divmod(first, inner)
    if column:
        end = min(last - row * inner, inner)
        for place, sizes in _boxes(shape[1:], column, end):
            yield (row, *place), (1, *sizes)
        first, row = row * inner + end, row + 1
    if rows := (last - first) // inner:
        yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
        first, row = first + rows * inner, row + rows
    if first < last:
        for place, sizes in _boxes(shape[1:], 0, last - first):
            yield (row, *place), (1, *sizes)
