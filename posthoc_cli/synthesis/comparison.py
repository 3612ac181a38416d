"""Values of an output beside the sums that they should be: a sample of them, or all.

What is recomputed are the same sums by the same kernels, so that the bytes of an output made on the
CPU come out again. Where they don't, it is the contract that counts: float16, bfloat16 and float8
values within one unit in the last place of the float64 result, float32 within four units in the
last place of the largest term; float64, too, and by as many units as there are terms if more.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.storage.dtypes import AVERAGED, DTYPES, FLOAT8, decode
from posthoc_cli.storage.header import TensorIndex
from posthoc_cli.storage.readers import Reader
from posthoc_cli.storage.workers import run_workers
from posthoc_cli.synthesis.accumulators import Accumulator, CpuAccumulator, Weights
from posthoc_cli.synthesis.engine import GROUP, ROW_BYTES, raise_file_limit
from posthoc_cli.synthesis.kernels import STRIDE
from posthoc_cli.synthesis.plan import Chunk, Plan, Segment

BLOCKS = 1024
"""Places that a sample has, besides the beginning of each tensor; fewer of very many sources."""

BLOCK = 256
"""Values compared at each."""

_FEWEST_BLOCKS = 64
_MOST_READS = 1 << 16
_MOST_BEGINNINGS = 4096

_GOLDEN = (5**0.5 - 1) / 2
"""As in a measure's sample, blocks never fall in step with the rows of a matrix."""

FloatArray = npt.NDArray[np.float64]

Progress = Callable[[int, int], None]
"""Called, from any thread, with the bytes just read and all that there are to read."""

ANEW = "synthesize it anew"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the file at `path`, the output or one of its sources.

    `tensor`, and the index of the first `element` of it that differs, where there is one.
    """

    path: Path
    problem: str
    remedy: str
    tensor: str | None = None
    element: tuple[int, ...] | None = None


def names_in_order(layout: TensorIndex) -> list[str]:
    """The names of the tensors, as they lie in the file."""
    return sorted(layout.tensors, key=lambda name: (layout.tensors[name].start, name))


# Which values


def sample(plan: Plan) -> list[Chunk] | None:
    """The beginning of each tensor, and blocks spread over all values; None for all when few."""
    lengths = [run.bounds[-1] for run in plan.runs]
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    total = ends[-1] if ends else 0
    if total <= BLOCKS * BLOCK:
        return None
    picked: list[list[tuple[int, int]]] = [[] for _ in plan.runs]
    blocks = min(max(_MOST_READS // len(plan.snapshots), _FEWEST_BLOCKS), BLOCKS)
    edges = [total * k // blocks for k in range(blocks + 1)]
    for k, (low, high) in enumerate(pairwise(edges)):
        first = low + int((k * _GOLDEN) % 1.0 * (high - low))
        at = bisect.bisect_right(ends, first)
        inside = first - (ends[at] - lengths[at])
        inside -= inside % STRIDE  # packed elements begin at a byte
        picked[at].append((inside, min(inside + BLOCK, lengths[at])))
    beginnings = [
        (at, first, min(first + BLOCK, last))
        for at, run in enumerate(plan.runs)
        for first, last in pairwise(run.bounds)
    ]
    for at, first, last in beginnings[:: -(-len(beginnings) // _MOST_BEGINNINGS)]:
        picked[at].append((first, last))
    return [
        Chunk(run, first, last)
        for run, spans in zip(plan.runs, picked, strict=True)
        for first, last in _merged(spans)
    ]


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _most(run: Segment) -> int:
    """Elements of `run` that are taken at a time."""
    return ROW_BYTES["cpu"] // (DTYPES[run.dtype].bits // 8 or 1) // STRIDE * STRIDE


# Comparing


@dataclass(frozen=True, slots=True)
class _Difference:
    """At `element` of a tensor, what is there and what should be."""

    element: int
    found: str
    wanted: str


class Comparison:
    """An output beside the sums that it should be; several threads may check chunks at once.

    A tensor that is the same in all snapshots is no sum, but a copy; that it is, is only known at
    the end. So as long as a tensor has not been seen to vary, its values are held against the
    copy, and the chunks in which they are not also the sum are remembered: should it vary after
    all, they are checked again.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        out: TensorIndex,
        sample: list[Chunk] | None,
        progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._weights = weights  # [snapshots, 1]
        self._out = out
        self._sample = sample
        self._progress = progress
        self._varies = {id(run): bytearray(len(run.names)) for run in plan.runs if run.averaged}
        self._no_sums: dict[str, _Difference] = {}
        self._no_copies: dict[str, _Difference] = {}
        self._later: list[tuple[Segment, int, Chunk]] = []
        self._lock = threading.Lock()
        self._buffers = threading.local()
        chunks = sample or [Chunk(run, 0, run.bounds[-1]) for run in plan.runs]
        self._bytes = sum(
            chunk.bytes_each * (len(plan.snapshots) if chunk.run.averaged else 1)
            for chunk in chunks
        )
        self.compared = sum(chunk.elements for chunk in chunks)
        self.rounded = 0

    def run(self, workers: int) -> None:
        """Compare all that is to be compared. Raises SnapshotError when a file changes."""
        plan = self._plan
        capacity = max(map(_most, plan.runs), default=STRIDE)

        def summing() -> Accumulator:
            return CpuAccumulator(ROW_BYTES["cpu"], capacity, 1, min(GROUP, len(plan.snapshots)))

        with contextlib.ExitStack() as stack:
            layouts = [*(snapshot.index for snapshot in plan.snapshots), self._out]
            keep_open = raise_file_limit(sum(len(layout.parts) for layout in layouts))
            readers = [
                stack.enter_context(Reader(layout, keep_open=keep_open)) for layout in layouts
            ]
            *self._readers, self._there = readers
            run_workers(self._chunks(), self._check, summing, workers)
            self._progress = None
            run_workers(iter(self._doubtful()), self._check, summing, workers)
            for reader in readers:
                reader.check_unchanged()

    def problems(self) -> list[Problem]:
        """The tensors that are not what they should be, in the output's order."""
        wrong: dict[str, _Difference] = {}
        for run in self._plan.runs:
            for name, varies in zip(run.names, self._varies_in(run), strict=True):
                off = (self._no_sums if varies else self._no_copies).get(name)
                if off is not None:
                    wrong[name] = off
        return [
            self._problem(name, wrong[name]) for name in names_in_order(self._out) if name in wrong
        ]

    def _problem(self, name: str, off: _Difference) -> Problem:
        info = self._out.tensors[name]
        element = off.element // 2 if info.dtype == "C64" else off.element
        index = tuple(int(i) for i in np.unravel_index(element, info.shape or (1,)))
        index = index if info.shape else ()
        problem = f"is {off.found} and should be {off.wanted}"
        return Problem(self._out.path, problem, ANEW, name, index)

    def _varies_in(self, run: Segment) -> bytearray:
        return self._varies.get(id(run)) or bytearray(len(run.names))

    def _chunks(self) -> Iterator[Chunk]:
        if self._sample is None:
            yield from self._plan.chunks(_most)
            return
        for chunk in self._sample:
            yield from chunk.run.chunks(_most, chunk.first, chunk.last)

    def _doubtful(self) -> list[Chunk]:
        """The chunks that must be sums after all.

        In a sample, tensors that never vary may vary elsewhere: then they may be either.
        """
        if self._sample is not None:
            for run in self._plan.runs:
                for tensor, name in enumerate(run.names):
                    if run.averaged and name in self._no_copies:
                        self._varies[id(run)][tensor] = True
        return [chunk for run, tensor, chunk in self._later if self._varies[id(run)][tensor]]

    # A chunk

    def _check(self, chunk: Chunk, summing: Accumulator) -> None:
        there = self._buffer("there", chunk.run.out_size_of(chunk.elements))
        self._read_output(chunk, there)
        if chunk.run.averaged:
            self._check_sum(chunk, summing, there)
        else:
            row = self._buffer("row", chunk.bytes_each)
            self._readers[self._plan.newest].read(self._offset(chunk, self._plan.newest), row.data)
            self._report(row.size)
            self._check_copy(chunk, summing, there, row, [(0, chunk.elements)])

    def _check_sum(self, chunk: Chunk, summing: Accumulator, there: npt.NDArray[np.uint8]) -> None:
        run, size, varies = chunk.run, chunk.bytes_each, self._varies[id(chunk.run)]
        unsettled = [tensor for tensor in self._tensors_in(chunk) if not varies[tensor]]
        reference = self._buffer("row", size)
        summing.begin(run.dtype, run.out_dtype, chunk.elements)
        snapshots = range(len(self._plan.snapshots))
        for group in (snapshots[i : i + GROUP] for i in snapshots[::GROUP]):
            rows = summing.staging()
            for row, i in zip(rows, group, strict=False):
                self._readers[i].read(self._offset(chunk, i), row[:size])
                if unsettled and i == 0:
                    reference[:] = np.asarray(row)[:size]
                for tensor in unsettled:
                    if not varies[tensor]:
                        first, last = map(run.size_of, self._within(chunk, tensor))
                        same = np.array_equal(reference[first:last], np.asarray(row)[first:last])
                        varies[tensor] = not same
            summing.add(self._weights[group.start : group.stop], last=group.stop == snapshots.stop)
            self._report(len(group) * size)
        wanted = _elements(run.out_dtype, np.frombuffer(summing.result(0), np.uint8))
        off = np.flatnonzero(_elements(run.out_dtype, there) != wanted)
        nearest = wanted[off]
        still = [tensor for tensor in unsettled if not varies[tensor]]
        for tensor in still:
            first, last = self._within(chunk, tensor)
            low, high = np.searchsorted(off, (first, last))
            if low < high:
                part = Chunk(run, chunk.first + first, chunk.first + last)
                with self._lock:
                    self._later.append((run, tensor, part))
                off, nearest = (
                    np.delete(off, slice(low, high)),
                    np.delete(nearest, slice(low, high)),
                )
        if still:
            ranges = [self._within(chunk, tensor) for tensor in still]
            self._check_copy(chunk, summing, there, reference, ranges)
        if off.size:
            beyond = self._beyond_bounds(chunk, off, there)
            self._note(self._no_sums, chunk, off[beyond], there, nearest[beyond])

    def _check_copy(
        self,
        chunk: Chunk,
        summing: Accumulator,
        there: npt.NDArray[np.uint8],
        row: npt.NDArray[np.uint8],
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        """Compare `ranges` of the chunk's elements with those in `row`, bit for bit.

        Of converted ones the values are compared, as those have no bits of their own.
        """
        run, wanted = chunk.run, row
        if run.dtype != run.out_dtype:
            summing.begin(run.dtype, run.out_dtype, chunk.elements)
            summing.staging()[0][: row.size] = row.data
            summing.add(np.ones((1, 1)), last=True)
            wanted = np.frombuffer(summing.result(0), np.uint8)
        bits = _elements(run.out_dtype, wanted)
        differ = _elements(run.out_dtype, there) != bits
        if run.dtype != run.out_dtype and differ.any():
            one, other = (decode(run.out_dtype, data) for data in (there, wanted))
            differ &= (one != other) & ~(np.isnan(one) & np.isnan(other))
        for first, last in ranges:
            if DTYPES[run.dtype].bits < 8:
                first, last = run.size_of(first), run.size_of(last)
            off = first + np.flatnonzero(differ[first:last])
            if off.size:
                self._note(self._no_copies, chunk, off, there, bits[off])

    def _beyond_bounds(
        self, chunk: Chunk, elements: npt.NDArray[Any], there: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.bool_]:
        """Which of `elements` of the chunk are further from the sum than the contract allows."""
        run = chunk.run
        sums, largest = np.zeros(elements.size), np.zeros(elements.size)
        row = self._buffer("beyond", chunk.bytes_each)
        with np.errstate(all="ignore"):
            for i, weight in enumerate(self._weights[:, 0].tolist()):
                self._readers[i].read(self._offset(chunk, i), row.data)
                bits = _elements(run.dtype, row)[elements]
                terms = weight * decode(run.dtype, bits.view(np.uint8)).astype(np.float64)
                sums += terms
                largest = np.maximum(largest, np.abs(terms))
            bits = _elements(run.out_dtype, there)[elements]
            found = decode(run.out_dtype, bits.view(np.uint8)).astype(np.float64)
            beyond = ~allowed(run.out_dtype, found, sums, largest, len(self._weights))
        with self._lock:
            self.rounded += int(np.count_nonzero(~beyond))
        return beyond

    def _note(
        self,
        differences: dict[str, _Difference],
        chunk: Chunk,
        elements: npt.NDArray[Any],
        there: npt.NDArray[np.uint8],
        wanted: npt.NDArray[Any],
    ) -> None:
        """Remember the first of `elements` of each tensor; packed ones go by bytes."""
        if not elements.size:
            return
        run = chunk.run
        bits = DTYPES[run.out_dtype].bits
        places = chunk.first + (elements * 8 // bits if bits < 8 else elements)
        tensors = np.searchsorted(run.bounds, places, side="right") - 1
        found = _elements(run.out_dtype, there)[elements]
        for tensor, at in zip(*np.unique(tensors, return_index=True), strict=True):
            element = int(places[at]) - run.bounds[tensor]
            name = run.names[tensor]
            texts = (_shown(run.out_dtype, each[at : at + 1]) for each in (found, wanted))
            with self._lock:
                if name not in differences or element < differences[name].element:
                    differences[name] = _Difference(element, *texts)

    def _read_output(self, chunk: Chunk, into: npt.NDArray[np.uint8]) -> None:
        """Read the output's bytes of a chunk, wherever its tensors lie in it."""
        run = chunk.run
        for tensor in self._tensors_in(chunk):
            first, last = self._within(chunk, tensor)
            begin = chunk.first + first - run.bounds[tensor]
            start = self._out.tensors[run.names[tensor]].start + run.out_size_of(begin)
            self._there.read(start, into.data[run.out_size_of(first) : run.out_size_of(last)])

    def _tensors_in(self, chunk: Chunk) -> range:
        bounds = chunk.run.bounds
        return range(
            bisect.bisect_right(bounds, chunk.first) - 1, bisect.bisect_left(bounds, chunk.last)
        )

    def _within(self, chunk: Chunk, tensor: int) -> tuple[int, int]:
        """Which of the chunk's elements are the tensor's: the first, and the one after the last."""
        bounds = chunk.run.bounds
        first, last = max(bounds[tensor], chunk.first), min(bounds[tensor + 1], chunk.last)
        return first - chunk.first, last - chunk.first

    def _offset(self, chunk: Chunk, snapshot: int) -> int:
        start = chunk.run.starts[self._plan.layouts[snapshot]]
        return start + chunk.run.size_of(chunk.first)

    def _buffer(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes of this thread's own, the same ones for the same name."""
        buffers: dict[str, npt.NDArray[np.uint8]] = self._buffers.__dict__
        if name not in buffers or buffers[name].size < size:
            buffers[name] = np.empty(size, np.uint8)
        return buffers[name][:size]

    def _report(self, read: int) -> None:
        if self._progress is not None:
            self._progress(read, self._bytes)


# Numbers


def allowed(
    dtype: str,
    found: FloatArray,
    sums: FloatArray,
    largest: FloatArray,
    terms: int,
) -> npt.NDArray[np.bool_]:
    """Whether the values `found`, of `dtype`, are as near to `sums` as the contract wants them.

    `sums` of that many `terms`, of which `largest` has the largest magnitudes, are only known up to
    the order in which they were added. NaN is right where the sum is none; an infinity counts as
    the number after the largest, so that it is right where the sum rounds to it.
    """
    format_ = DTYPES[dtype]
    most = np.array(format_.largest)
    after = most + format_.spacing(most)
    known = np.clip(sums, -after, after)
    if dtype == "F64":
        bound = max(4, terms) * format_.spacing(largest)
    elif dtype == "F32":
        bound = 4 * format_.spacing(largest)
    else:
        bound = format_.spacing(known) + terms * 2.0**-52 * largest
    seen = np.where(np.isinf(found), np.copysign(after, found), found)
    if dtype in FLOAT8:  # most have no infinity; and some tools keep to the largest number instead
        too_large = np.isnan(found) | (np.abs(found) == most)
        beyond = too_large & (np.abs(sums) >= most)
        seen = np.where(beyond & ~(found * sums < 0), known, seen)
    near: npt.NDArray[np.bool_] = np.where(
        np.abs(sums) >= after, seen == known, np.abs(seen - known) <= bound
    )
    return near | (np.isnan(found) & np.isnan(sums))


def _elements(dtype: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """`data` as one whole number an element; packed ones as their bytes."""
    return data.view(DTYPES[dtype].unsigned())


def _shown(dtype: str, element: npt.NDArray[Any]) -> str:
    """An element for people, with the digits that tell it from its neighbours."""
    data = element.view(np.uint8)
    if dtype in AVERAGED:
        return f"{float(decode(dtype, data)[0]):.{17 if dtype == 'F64' else 9}g}"
    if dtype[0] in "IU":
        return str(data.view(f"<{dtype[0].lower()}{DTYPES[dtype].bits // 8}")[0])
    return f"0x{data[0]:02x}"
