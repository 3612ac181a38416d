"""Tensors out of a checkpoint and into a safetensors file, in memory that no tensor's size changes.

A tensor that lies in its file as it shall lie in the output is copied by byte ranges, inside the
system where it can do that. Any other is cut into tiles that fit in memory: of a transposed matrix,
a tile is a square whose rows are long enough in both files for reads and writes to be few. Files
are never mapped: mapped pages count as memory, and one that is cut off meanwhile kills the process.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.formats import Checkpoint, StoredTensor
from posthoc_cli.storage import File, InputFile, TensorInfo
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.dtypes import DTYPES, bytes_of
from posthoc_cli.storage.workers import background_flush, run_workers

COPY_BYTES = 16 << 20
"""Bytes that a worker copies at a time where they need not be looked at."""

TILE_BYTES = 16 << 20
"""Bytes of a tile; a worker holds it up to three times, and once or twice what was read for it."""

CACHED_BYTES = 1 << 21
"""Bytes of a tile that needn't be larger for its runs to be long: from a cache it is written
faster."""

GAP_BYTES = 1 << 12
"""Runs with a gap of at most this between them are read at once, gap included."""

WORKERS = 2
"""More would not help: it is the disk, or the memory's speed, that sets the limit."""

Progress = Callable[[int], None]
Bytes = npt.NDArray[np.uint8]
Elements = npt.NDArray[Any]


def write_tensors(
    checkpoint: Checkpoint,
    tensors: Mapping[str, StoredTensor],
    infos: Mapping[str, TensorInfo],
    file: AtomicFile,
    data_start: int,
    progress: Progress | None = None,
) -> list[str]:
    """Write `tensors` to their places in `file`, `infos` from byte `data_start` on.

    Where the dtype in `infos` is another than the tensor's own, each element is rounded to the
    nearest, ties to even. `progress` is called, from any thread, with the bytes just taken.
    Returns the names of the tensors in which a finite element became infinite, sorted.

    Raises SnapshotError when the checkpoint isn't what it was when its structure was read,
    MachineError when it can't be read or `file` can't be written.
    """
    source = InputFile(File(checkpoint.path, checkpoint.size, checkpoint.modified))
    with source, background_flush([file]):
        job = _Job(source, file, data_start, progress or (lambda count: None))
        run_workers(_pieces(tensors, infos), job, _Scratch, WORKERS)
        source.check_unchanged()
    return sorted(job.overflowed)


# What is to be done.


@dataclass(frozen=True, slots=True)
class _Copy:
    """Bytes that are the same in both files: `size` of them, from `offset` to `start`."""

    offset: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Tile:
    """A block of a tensor: elements `first` to `first + sizes` of each of its `dims`.

    `dims` are those of the tensor, as few as tell where its elements lie: (size, stride) pairs.
    """

    name: str
    tensor: StoredTensor
    info: TensorInfo
    dims: tuple[tuple[int, int], ...]
    first: tuple[int, ...]
    sizes: tuple[int, ...]


def _pieces(
    tensors: Mapping[str, StoredTensor], infos: Mapping[str, TensorInfo]
) -> Iterator[_Copy | _Tile]:
    """All there is to do, in the order of the output."""
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        tensor = tensors[name]
        if tensor.contiguous and tensor.dtype == info.dtype:
            for at in range(0, info.end - info.start, COPY_BYTES):
                size = min(COPY_BYTES, info.end - info.start - at)
                yield _Copy(tensor.offset + at, info.start + at, size)
        elif tensor.elements:
            yield from _tiles(name, tensor, info)


def _tiles(name: str, tensor: StoredTensor, info: TensorInfo) -> Iterator[_Tile]:
    dims = _collapsed(tensor.shape, tensor.strides)
    block = _block(dims, bytes_of(tensor.dtype, 1), bytes_of(info.dtype, 1))
    for first in itertools.product(
        *(range(0, size, step) for (size, _), step in zip(dims, block, strict=True))
    ):
        sizes = tuple(
            min(step, size - at) for (size, _), step, at in zip(dims, block, first, strict=True)
        )
        yield _Tile(name, tensor, info, dims, first, sizes)


def _collapsed(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The fewest (size, stride) dimensions with the same elements in the same order."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = dims[-1][0] * size, stride
        else:
            dims.append((size, stride))
    return tuple(dims) or ((1, 1),)


def _block(dims: Sequence[tuple[int, int]], itemsize: int, out_itemsize: int) -> list[int]:
    """The sizes of a tile: long runs in the output and in the input, then what fits."""
    nearest = min((stride for _, stride in dims if stride), default=1)
    read_over = nearest if (nearest - 1) * itemsize <= GAP_BYTES else 1
    most = max(TILE_BYTES // max(itemsize, out_itemsize) // read_over, 1)
    block = [1] * len(dims)
    in_output = list(reversed(range(len(dims))))
    in_input = sorted((at for at in in_output if dims[at][1]), key=lambda at: dims[at][1])
    for order in (in_output, in_input):
        run, wanted = 1, math.isqrt(most)
        for at in order:
            block[at] = max(block[at], min(dims[at][0], -(-wanted // run)))
            run *= block[at]
            if run >= wanted:
                break
    cached = min(CACHED_BYTES // max(itemsize, out_itemsize), most)
    for at in in_output:
        others = math.prod(block) // block[at]
        block[at] = max(block[at], min(dims[at][0], cached // others))
    return block


# Doing it.


class _Scratch:
    """A worker's memory, used again and again: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def take(self, purpose: str, count: int) -> Bytes:
        """`count` bytes; what was there for the same purpose is lost."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.size < count:
            self._buffers.pop(purpose, None)
            buffer = self._buffers[purpose] = np.empty(count, np.uint8)
        return buffer[:count]


class _Job:
    """What the workers share; each calls it with one piece after the other."""

    def __init__(
        self, source: InputFile, file: AtomicFile, data_start: int, progress: Progress
    ) -> None:
        self._source = source
        self._file = file
        self._data_start = data_start
        self._progress = progress
        self._writing = threading.Lock()  # the system lets one write a file; others would spin
        self.overflowed: set[str] = set()

    def __call__(self, piece: _Copy | _Tile, scratch: _Scratch) -> None:
        if isinstance(piece, _Copy):
            copied = 0
            while copied < piece.size:
                with self._writing:
                    copied += self._copy(piece, copied, scratch)
            self._progress(piece.size)
            return
        elements = _gather(self._source, piece, scratch)
        data = elements.view(np.uint8)
        if piece.info.dtype != piece.tensor.dtype:
            from posthoc_cli.synthesis.rounding import round_to  # only here: it compiles

            data = scratch.take("rounded", bytes_of(piece.info.dtype, elements.size))
            if round_to(data, piece.info.dtype, elements, piece.tensor.dtype):
                self.overflowed.add(piece.name)
        with self._writing:
            self._write(piece, data.data)
        self._progress(elements.nbytes)

    def _copy(self, piece: _Copy, done: int, scratch: _Scratch) -> int:
        """Copy some more of a piece of which `done` bytes are; returns how many."""
        offset, start = piece.offset + done, self._data_start + piece.start + done
        left = piece.size - done
        if copied := self._file.copy_from(self._source.fileno(), offset, start, left):
            return copied
        data = scratch.take("read", min(left, TILE_BYTES)).data
        self._source.read(offset, data)
        self._file.write_at(start, data)
        return len(data)

    def _write(self, tile: _Tile, data: memoryview) -> None:
        """Write a tile's elements, in order: in as many runs as it has in the output."""
        itemsize = len(data) // math.prod(tile.sizes)
        whole = len(tile.dims)  # from this dimension on, the tile is as wide as the tensor
        while whole > 1 and tile.sizes[whole - 1] == tile.dims[whole - 1][0]:
            whole -= 1
        run = math.prod(tile.sizes[whole - 1 :]) * itemsize
        steps = [math.prod(size for size, _ in tile.dims[at + 1 :]) for at in range(len(tile.dims))]
        base = self._data_start + tile.info.start + itemsize * _dot(tile.first, steps)
        position = 0
        for start in _starts(tile.sizes[: whole - 1], steps):
            self._file.write_at(base + start * itemsize, data[position : position + run])
            position += run


def _dot(places: Sequence[int], steps: Sequence[int]) -> int:
    return sum(place * step for place, step in zip(places, steps, strict=True))


def _starts(sizes: Sequence[int], steps: Sequence[int]) -> Iterator[int]:
    """The sum of index times step, of every index of an array of `sizes`, in their order."""
    if not sizes:
        yield 0
        return
    *outer, last = sizes
    for start in _starts(outer, steps):
        step = steps[len(outer)]
        yield from range(start, start + last * step, step)


def _gather(source: InputFile, tile: _Tile, scratch: _Scratch) -> Elements:
    """The elements of a tile in the order of the output, as unsigned integers, in one dimension."""
    itemsize = bytes_of(tile.tensor.dtype, 1)
    dims = [
        (at, size, stride)
        for at, (size, (_, stride)) in enumerate(zip(tile.sizes, tile.dims, strict=True))
        if size > 1 and stride
    ]
    dims.sort(key=lambda dim: dim[2])
    extent, apart = 1, len(dims)  # from dims[apart] on, each step is a read of its own
    total = math.prod(size for _, size, _ in dims)
    for number, (_, size, stride) in enumerate(dims):
        wider = (size - 1) * stride + extent
        total //= size
        fits = wider * total * itemsize <= 2 * TILE_BYTES
        if (stride - extent) * itemsize > GAP_BYTES or not fits:
            apart = number
            break
        extent = wider
    loops = dims[apart:]
    rows = math.prod(size for _, size, _ in loops)
    kind = DTYPES[tile.tensor.dtype].unsigned()
    buffer = scratch.take("read", rows * extent * itemsize).view(kind).reshape(rows, extent)
    base = tile.tensor.offset + itemsize * _dot(tile.first, [stride for _, stride in tile.dims])
    data, position = buffer.reshape(-1).view(np.uint8).data, 0
    inner = extent * itemsize
    for start in _starts([size for _, size, _ in loops], [stride for _, _, stride in loops]):
        source.read(base + start * itemsize, data[position : position + inner])
        position += inner
    strides = [0] * len(tile.sizes)
    for at, _, stride in dims[:apart]:
        strides[at] = stride * itemsize
    for at, size, _ in reversed(loops):
        strides[at] = inner
        inner *= size
    view = np.lib.stride_tricks.as_strided(buffer, tile.sizes, strides, writeable=False)
    if view.flags.c_contiguous:
        return buffer.reshape(-1)
    gathered = scratch.take("gathered", view.size * itemsize).view(kind)
    gathered.reshape(tile.sizes)[...] = view
    return gathered
