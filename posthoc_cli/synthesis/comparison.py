"""Values of an output beside the sums that they should be: a sample of them, or all.

What is recomputed are the same sums by the same kernels, so that the bytes of an output made on the
CPU come out again. Where they don't, it is the contract that counts: float16, bfloat16 and float8
values within one unit in the last place of the float64 result, float32 within four units in the
last place of the largest term; float64, too, and by as many units as there are terms if more.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.snapshots.pieces import GOLDEN
from posthoc_cli.storage import Reader, TensorIndex
from posthoc_cli.storage.dtypes import AVERAGED, DTYPES, FLOAT8, FloatArray, decode
from posthoc_cli.storage.ranks import Part as RankPart
from posthoc_cli.storage.ranks import Running, check_there, share
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.engine import Engine, Part, Results
from posthoc_cli.synthesis.kernels import STRIDE
from posthoc_cli.synthesis.parts import parts_of
from posthoc_cli.synthesis.plan import Chunk, TensorPlan

BLOCKS = 1024
"""Places that a sample has, besides the beginning of each tensor; fewer of very many sources."""

BLOCK = 256
"""Values compared at each."""

_FEWEST_BLOCKS = 64
_MOST_READS = 1 << 16
_MOST_BEGINNINGS = 4096

Bytes = npt.NDArray[np.uint8]

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


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison found: how many values it `compared`, and the `problems`.

    `rounded` values are not the nearest to the sum, but within the contract.
    """

    compared: int
    rounded: int
    problems: list[Problem]


def names_in_order(layout: TensorIndex) -> list[str]:
    return sorted(layout.tensors, key=lambda name: (layout.tensors[name].start, name))


# Which values


def sample(plan: TensorPlan) -> list[Chunk] | None:
    """The beginning of each tensor, and blocks spread over all values; None for all when few."""
    whole = plan.whole()
    ends = np.cumsum([chunk.elements for chunk in whole], dtype=np.int64).tolist()
    total = ends[-1] if ends else 0
    if total <= BLOCKS * BLOCK:
        return None
    picked: list[list[tuple[int, int]]] = [[] for _ in whole]
    blocks = min(max(_MOST_READS // len(plan.sources), _FEWEST_BLOCKS), BLOCKS)
    edges = [total * k // blocks for k in range(blocks + 1)]
    for k, (low, high) in enumerate(pairwise(edges)):
        first = low + int((k * GOLDEN) % 1.0 * (high - low))
        at = bisect.bisect_right(ends, first)
        inside = first - (ends[at] - whole[at].elements)
        inside -= inside % STRIDE  # packed elements begin at a byte
        picked[at].append((inside, min(inside + BLOCK, whole[at].elements)))
    beginnings = [
        (at, part.first, min(part.first + BLOCK, part.last))
        for at, chunk in enumerate(whole)
        for _, part in chunk.parts()
    ]
    for at, first, last in beginnings[:: -(-len(beginnings) // _MOST_BEGINNINGS)]:
        picked[at].append((first, last))
    return [
        Chunk(chunk.segment, first, last)
        for chunk, ranges in zip(whole, picked, strict=True)
        for first, last in _merged(ranges)
    ]


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


# Comparing


@dataclass(frozen=True, slots=True)
class _Difference:
    """At `element` of a tensor, what is there and what should be."""

    element: int
    found: str
    wanted: str


class ComparisonSink:
    """Holds the sums against the values of an output.

    A tensor that is the same in all snapshots is no sum, but a copy; that it is, is only known at
    the end. Until then the parts in which it is not the sum are remembered: should it vary after
    all, they are checked again.
    """

    def __init__(self, engine: Engine, weights: Weights, there: Reader, out: TensorIndex) -> None:
        self._engine = engine
        self._plan = engine.plan
        self._weights = weights  # [groups, 1, snapshots]
        self._there = there
        self._out = out
        self._no_sums: dict[str, _Difference] = {}
        self._no_copies: dict[str, _Difference] = {}
        self._not_sums_yet: list[Part] = []
        self._lock = threading.Lock()
        self.rounded = 0

    def take_sums(self, chunk: Chunk, results: Results, unsettled: Sequence[Part]) -> None:
        code = chunk.segment.out_dtype
        there = self._read_output(chunk)
        wanted = _elements(code, np.frombuffer(results(0), np.uint8))
        differs = _elements(code, there) != wanted
        for tensor, part in unsettled:
            inside = slice(part.first - chunk.first, part.last - chunk.first)
            if differs[inside].any():
                with self._lock:
                    self._not_sums_yet.append((tensor, part))
                differs[inside] = False
        off = np.flatnonzero(differs)
        if off.size:
            off = off[self._beyond_bounds(chunk, off, there)]
            self._note(self._no_sums, chunk, off, there, wanted[off])

    def take_copies(self, chunk: Chunk, results: Results) -> None:
        """Compare bit for bit; of converted ones the values, as those have no bits of their own."""
        segment = chunk.segment
        there, data = self._read_output(chunk), np.frombuffer(results(0), np.uint8)
        wanted = _elements(segment.out_dtype, data)
        differs = _elements(segment.out_dtype, there) != wanted
        if segment.dtype != segment.out_dtype and differs.any():
            one, other = (decode(segment.out_dtype, each) for each in (there, data))
            differs &= (one != other) & ~(np.isnan(one) & np.isnan(other))
        off = np.flatnonzero(differs)
        if off.size:
            self._note(self._no_copies, chunk, off, there, wanted[off])

    def undecided(self, *, sampled: bool) -> list[Chunk]:
        """The parts that must be sums after all.

        Of a sample, tensors that never vary may vary elsewhere: then they may be either.
        """
        if sampled:
            for segment in self._plan.segments:
                for tensor, name in enumerate(segment.names):
                    if segment.averaged and name in self._no_copies:
                        self._engine.note_varying(segment, tensor)
        return [
            part for tensor, part in self._not_sums_yet if self._engine.varies(part.segment, tensor)
        ]

    def problems(self) -> list[Problem]:
        """The tensors that are not what they should be, in the output's order."""
        wrong: dict[str, _Difference] = {}
        for segment in self._plan.segments:
            for tensor, name in enumerate(segment.names):
                varies = self._engine.varies(segment, tensor)
                if off := (self._no_sums if varies else self._no_copies).get(name):
                    wrong[name] = off
        return [
            self._problem(name, wrong[name]) for name in names_in_order(self._out) if name in wrong
        ]

    def _problem(self, name: str, off: _Difference) -> Problem:
        info = self._out.tensors[name]
        element = off.element // 2 if info.dtype == "C64" else off.element
        index = tuple(int(i) for i in np.unravel_index(element, info.shape or (1,)))
        problem = f"is {off.found} and should be {off.wanted}"
        return Problem(self._out.path, problem, ANEW, name, index if info.shape else ())

    def _beyond_bounds(
        self, chunk: Chunk, elements: npt.NDArray[Any], there: Bytes
    ) -> npt.NDArray[np.bool_]:
        """Which of `elements` of the chunk are further from the sum than the contract allows."""
        segment = chunk.segment
        sums, largest = np.zeros(elements.size), np.zeros(elements.size)
        row = np.empty(chunk.bytes_each, np.uint8)
        with np.errstate(all="ignore"):
            weights = self._plan.weights_of(segment, self._weights)[0]
            for weight, source in zip(weights, segment.sources, strict=True):
                self._engine.read(chunk, source, row.data)
                terms = weight * _values(segment.dtype, row, elements)
                sums += terms
                largest = np.maximum(largest, np.abs(terms))
            found = _values(segment.out_dtype, there, elements)
            beyond = ~allowed(segment.out_dtype, found, sums, largest, len(segment.sources))
        with self._lock:
            self.rounded += int(np.count_nonzero(~beyond))
        return beyond

    def _note(
        self,
        differences: dict[str, _Difference],
        chunk: Chunk,
        elements: npt.NDArray[Any],
        there: Bytes,
        wanted: npt.NDArray[Any],
    ) -> None:
        """Remember the first of `elements` of each tensor; packed ones go by bytes."""
        segment = chunk.segment
        bits = DTYPES[segment.out_dtype].bits
        places = chunk.first + (elements * 8 // bits if bits < 8 else elements)
        tensors = segment.tensors_of(places)
        found = _elements(segment.out_dtype, there)[elements]
        for tensor, at in zip(*np.unique(tensors, return_index=True), strict=True):
            element = int(places[at]) - segment.bounds[tensor]
            name = segment.names[tensor]
            texts = (_shown(segment.out_dtype, each[at : at + 1]) for each in (found, wanted))
            with self._lock:
                if name not in differences or element < differences[name].element:
                    differences[name] = _Difference(element, *texts)

    def _read_output(self, chunk: Chunk) -> Bytes:
        """The output's bytes of a chunk, wherever its tensors lie in it."""
        segment = chunk.segment
        into = np.empty(segment.out_size_of(chunk.elements), np.uint8)
        for tensor, part in chunk.parts():
            start = self._out.tensors[segment.names[tensor]].start
            begin = segment.out_size_of(part.first - segment.bounds[tensor])
            first, last = (segment.out_size_of(at - chunk.first) for at in (part.first, part.last))
            self._there.read(start + begin, into.data[first:last])
        return into


def compare(
    plan: TensorPlan,
    weights: Weights,
    out: TensorIndex,
    *,
    full: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Compared:
    """Compare the output `out` with the sums of `weights` [groups, 1, snapshots]; with `full` all.

    Raises SnapshotError when a file changes meanwhile, MachineError when one can't be read.
    """
    chunks = None if full else sample(plan)
    whole = plan.whole() if chunks is None else chunks
    total = sum(map(plan.bytes_of, whole))
    parts = share(
        *(_compare_part, plan, weights, out, chunks, workers),
        progress=progress and (lambda count: progress(count, total)),
        together=full,
    )
    first: dict[str | None, Problem] = {}
    for problem in (each for part in parts for each in part.problems):
        known = first.setdefault(problem.tensor, problem)
        if (problem.element or ()) < (known.element or ()):
            first[problem.tensor] = problem
    return Compared(
        sum(part.compared for part in parts),
        sum(part.rounded for part in parts),
        [first[name] for name in names_in_order(out) if name in first],
    )


def _compare_part(
    part: RankPart,
    plan: TensorPlan,
    weights: Weights,
    out: TensorIndex,
    sampled: Sequence[Chunk] | None,
    workers: int | None,
) -> Running:
    """What the comparison of a rank's part found: of all values, unless some are `sampled`."""
    chunks = parts_of(plan, part.size)[part.rank] if sampled is None else sampled
    check_there(part, [*plan.sources, out])
    engine = Engine(plan, weights, workers=workers, progress=part.count, other_files=len(out.files))
    with engine, Reader(out) as there:
        sink = ComparisonSink(engine, weights, there, out)
        engine.sum(sink, chunks)
        engine.note_all((yield engine.varying))
        engine.copy(sink, chunks)
        if undecided := sink.undecided(sampled=sampled is not None):
            engine.progress = None  # these were read before
            engine.sum(sink, undecided)
        engine.check_unchanged()
        there.check_unchanged()
    return Compared(sum(chunk.elements for chunk in chunks), sink.rounded, sink.problems())


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


def _values(dtype: str, data: Bytes, elements: npt.NDArray[Any]) -> FloatArray:
    return decode(dtype, _elements(dtype, data)[elements].view(np.uint8)).astype(np.float64)


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
