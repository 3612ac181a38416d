"""A tensor's bytes out of strided blocks: shards of it in several files, views, other byte orders.

The bytes are those of the whole tensor, row by row and little-endian, as every other part of an
index has them. A range of them is cut into boxes (rows in part, whole rows, rows in part), and what
each block has of a box is read in as few reads as memory allows and copied to its place.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.storage import bands
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
        if 1 < content.swapped < content.itemsize:
            content = _in_units(content)
        self._itemsize = content.itemsize
        self._shape, blocks = _merged(content)
        self._blocks = sorted(blocks, key=lambda block: block.first)
        self._firsts = [block.first[0] for block in self._blocks]
        self._kind = self._stored = np.dtype(f"V{self._itemsize}")
        if self._itemsize in (1, 2, 4, 8):
            self._kind = self._stored = np.dtype(f"<u{self._itemsize}")
        if content.swapped > 1:
            self._stored = np.dtype(f">u{self._itemsize}")
        row = math.prod(self._shape[1:]) * self._itemsize
        # Whole rows are fewer boxes: that is worth a copy of what is in the cache.
        self._unit = row if 8 * row <= SCRATCH_BYTES else self._itemsize
        scattered = any(
            size > 1 and stride > block.strides[0]
            for block in blocks
            for size, stride in zip(block.sizes[1:], block.strides[1:], strict=True)
        )
        self._bands: bands.Bands | None = None
        if scattered:
            size = math.prod(self._shape) * self._itemsize
            self._bands = bands.Bands(size, self._unit, self._fill)

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `start` on."""
        most = max(SCRATCH_BYTES // self._unit, 1) * self._unit
        while into:
            count = self._bands.read(start, into) if self._bands else 0
            if not count:
                first = start // self._unit * self._unit
                last = min(-(-(start + len(into)) // self._unit) * self._unit, first + most)
                count = min(last - start, len(into))
                if whole_units := (first, last) == (start, start + count):
                    data = np.frombuffer(into[:count], np.uint8)
                else:
                    data = _buffer("units", last - first)
                for work in self._fill(first, data):
                    work()
                if not whole_units:
                    into[:count] = data.data[start - first :][:count]
            start, into = start + count, into[count:]

    def _fill(self, start: int, data: npt.NDArray[np.uint8]) -> Iterator[Callable[[], None]]:
        """What fills `data` with the bytes from `start` on, all of them whole elements."""
        elements, first = data.view(self._kind), start // self._itemsize
        for place, sizes in _boxes(self._shape, first, first + len(elements)):
            count = math.prod(sizes)
            yield from self._fill_box(place, elements[:count].reshape(sizes))
            elements = elements[count:]

    def _fill_box(self, place: Sequence[int], out: Elements) -> Iterator[Callable[[], None]]:
        """What fills `out` with the box of its shape from element `place` on."""
        stop = bisect.bisect_left(self._firsts, place[0] + out.shape[0])
        for block in self._blocks[:stop]:
            inside, to = 0, []
            for at, length, first, size, stride in zip(
                place, out.shape, block.first, block.sizes, block.strides, strict=True
            ):
                begin, end = max(at, first), min(at + length, first + size)
                if begin >= end:
                    break
                inside += (begin - first) * stride
                to.append(slice(begin - at, end - at))
            else:
                base = block.offset + inside * self._itemsize
                read = self._files[block.file]
                yield from self._gather(read, base, block.strides, out[tuple(to)])

    def _gather(
        self, read: ReadAt, base: int, strides: Sequence[int], out: Elements
    ) -> Iterator[Callable[[], None]]:
        """What fills `out` with elements `strides` apart, the first of which lies at `base`."""
        itemsize = self._itemsize
        dims = sorted(
            (stride, size, at)
            for at, (size, stride) in enumerate(zip(out.shape, strides, strict=True))
            if size > 1 and stride
        )
        extent, apart = 1, len(dims)  # from dims[apart] on, each step is a read of its own
        for number, (stride, size, _) in enumerate(dims):
            if (stride - extent) * itemsize > GAP_BYTES:
                apart = number
                break
            extent += (size - 1) * stride
        rows = math.prod(size for _, size, _ in dims[apart:])
        if rows * extent * itemsize > SCRATCH_BYTES and dims:
            stride, size, at = dims[-1]
            for begin, end in ((0, size // 2), (size // 2, size)):
                half = (*(slice(None) for _ in range(at)), slice(begin, end))
                yield from self._gather(read, base + begin * stride * itemsize, strides, out[half])
            return
        yield functools.partial(self._copy, read, base, out, dims, apart, extent)

    def _copy(
        self,
        read: ReadAt,
        base: int,
        out: Elements,
        dims: Sequence[tuple[int, int, int]],
        apart: int,
        extent: int,
    ) -> None:
        """Fill `out`, whose `dims` are (stride, size, place): a read for each step of those from
        `apart` on, of `extent` elements."""
        itemsize = self._itemsize
        if (
            extent == out.size
            and out.flags.c_contiguous
            and self._stored == self._kind
            and all(a[2] > b[2] for a, b in itertools.pairwise(dims))
        ):
            read(base, out.reshape(-1).view(np.uint8).data)
            return
        row = extent * itemsize
        data = _buffer("read", row * math.prod(size for _, size, _ in dims[apart:])).data
        for number, steps in enumerate(itertools.product(*(range(s) for _, s, _ in dims[apart:]))):
            inside = sum(step * dim[0] for step, dim in zip(steps, dims[apart:], strict=True))
            read(base + inside * itemsize, data[number * row : (number + 1) * row])
        strides = [0] * out.ndim
        for stride, _, at in dims[:apart]:
            strides[at] = stride * itemsize
        for _, size, at in reversed(dims[apart:]):
            strides[at] = row
            row *= size
        out[...] = np.ndarray(out.shape, self._stored, data, 0, strides)


def _in_units(content: Blocks) -> Blocks:
    """The same bytes, as elements that are what is swapped: a last dimension is added."""
    count = content.itemsize // content.swapped
    blocks = tuple(
        replace(
            block,
            first=(*block.first, 0),
            sizes=(*block.sizes, count),
            strides=(*(stride * count for stride in block.strides), 1),
        )
        for block in content.blocks
    )
    return Blocks((*content.shape, count), content.swapped, blocks, content.swapped)


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
