"""The one loop over the snapshots' bytes: chunks are read, summed, and handed to a sink.

Workers take chunks of the plan in turn. Each chunk is read from every snapshot and summed for all
targets at once, in one pass and constant memory; what becomes of the sums is the sink's business: a
file, tensors in memory, or a comparison with what is there.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from posthoc_cli.storage import Reader
from posthoc_cli.storage.dtypes import AVERAGED, DTYPES, bytes_of, decode
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.readers import can_open, check_unchanged, reading_ahead
from posthoc_cli.storage.workers import default_workers, run_workers
from posthoc_cli.synthesis.accumulators import (
    Accumulator,
    CpuAccumulator,
    TorchAccumulator,
    Weights,
    device_errors,
)
from posthoc_cli.synthesis.kernels import STRIDE, WIDENED
from posthoc_cli.synthesis.nonfinite import NonfiniteReport
from posthoc_cli.synthesis.plan import Chunk, Segment, TensorPlan
from posthoc_cli.synthesis.rounding import round_to

BATCH = 16
"""Snapshots that are read before they are summed: memory does not grow with their number. Where
all fit in one batch, no sum ever goes through memory."""

ROW_BYTES = {"cpu": 1 << 19, "store": 1 << 20, "device": 1 << 21}
"""Bytes read from a snapshot at a time. A worker's rows should stay in the processor's last cache
until they are summed; much smaller ones cost more in calls, and write the outputs in bits. Of
hundreds of snapshots in a store each row is a request, which may take as long as a row of twice
the size."""

WORKER_BYTES = {"cpu": 12 << 20, "store": 24 << 20, "device": 128 << 20}
"""The most that a worker's rows, sums and results may take together: with many targets, or more
snapshots than one batch has, chunks get smaller."""

_BEGINNING = 16 * STRIDE
"""Elements of a tensor that are looked at in two snapshots, by so many threads: each may be a
request to a store."""

_PROBES = 16

Progress = Callable[[int], None]
"""Called, from any thread, with the number of input bytes just read."""

Part = tuple[int, Chunk]
"""The place of a tensor in its segment, and the part of a chunk that is the tensor's."""

Results = Callable[[int], memoryview]
"""The bytes of a chunk for one target; good until the next call."""


class Sink(Protocol):
    """What becomes of the sums. Several threads call it at once, each with another chunk."""

    def take_sums(self, chunk: Chunk, results: Results, unsettled: Sequence[Part]) -> None:
        """Take the weighted sums of a chunk.

        `unsettled` are the parts whose tensors have been the same in all snapshots so far: at the
        end they may turn out to be copies.
        """

    def take_copies(self, chunk: Chunk, results: Results) -> None:
        """Take the values of the newest snapshot, in the dtype of the output."""


class _Nothing:
    """A sink for what is only read."""

    def take_sums(self, chunk: Chunk, results: Results, unsettled: Sequence[Part]) -> None: ...

    def take_copies(self, chunk: Chunk, results: Results) -> None: ...


class Engine:
    """The pass over the snapshots of a plan; a context manager, within which files are open.

    `weights` is [groups, targets, snapshots], of which each segment has those of its group. The
    bytes that come out do not depend on `workers` (default: one a processor) nor on `row_bytes`.
    With `report`, values that are not finite are counted. `other_files` are those that the sink has
    open meanwhile.

    Raises SnapshotError when a snapshot changed since its header was read, MachineError when one
    can't be read or the device fails.
    """

    def __init__(
        self,
        plan: TensorPlan,
        weights: Weights,
        *,
        device: str = "cpu",
        workers: int | None = None,
        row_bytes: int | None = None,
        report: NonfiniteReport | None = None,
        progress: Progress | None = None,
        other_files: int = 0,
    ) -> None:
        self.plan = plan
        self._weights = {  # [sources, targets]
            id(segment): np.ascontiguousarray(plan.weights_of(segment, weights).T)
            for segment in plan.segments
            if segment.averaged
        }
        self._device = device
        self._workers = workers or default_workers()
        afar = any(isinstance(file.path, Url) for source in plan.sources for file in source.files)
        where = "device" if device != "cpu" else "store" if afar else "cpu"
        self._row_bytes = max(row_bytes or ROW_BYTES[where], 8 * STRIDE)
        self._worker_bytes = WORKER_BYTES[where]
        several = any(segment.exponents for segment in plan.segments)
        self._batch = BATCH if several else min(BATCH, len(plan.sources))
        self._targets = int(weights.shape[1])
        self._report = report
        self.progress = progress
        files = sum(len(source.files) for source in plan.sources)
        self._keep_open = can_open(files + other_files)
        self._settled = False
        # For each tensor of each averaged segment, whether two snapshots were seen to differ in it;
        # of differences that is known.
        self._varies = {
            id(segment): bytearray([bool(segment.exponents)]) * len(segment.names)
            for segment in plan.segments
            if segment.averaged
        }

    def __enter__(self) -> Engine:
        with contextlib.ExitStack() as stack:
            self._readers = [
                stack.enter_context(Reader(source, keep_open=self._keep_open))
                for source in self.plan.sources
            ]
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def run(self, sink: Sink) -> None:
        """Hand all sums to `sink`; then the tensors that never vary.

        Weights that sum to one give the latter back only up to rounding, and `algorithm3`'s not
        even that: they come again, as copies.
        """
        chunks = self.plan.whole()
        self.sum(sink, chunks)
        self.copy(sink, chunks)
        self.check_unchanged()

    def sum_in_order(self, sink: Sink, chunks: Sequence[Chunk]) -> None:
        """The same in the outputs' order, all bytes once, when it is known which tensors vary: by
        `settle`, of these chunks, and `note_all`."""
        self._settled = True
        self.sum(sink, list(self._alike(chunks)))

    def check_unchanged(self) -> None:
        """Raise SnapshotError for a snapshot that is not as it was when its header was read."""
        check_unchanged(self._readers)

    def sum(self, sink: Sink, chunks: Sequence[Chunk]) -> None:
        """Hand the sums of `chunks` to `sink`, whether their tensors vary or not."""
        with device_errors(self._device), self._ahead(chunks):
            run_workers(
                self._cut(chunks),
                lambda chunk, accumulator: self._sum(sink, chunk, accumulator),
                self._accumulator,
                self._workers,
            )

    def copy(self, sink: Sink, chunks: Iterable[Chunk]) -> None:
        """Hand those of `chunks` to `sink` whose tensors don't vary, though they were summed."""
        constant = list(self._constant_parts(chunks))
        with device_errors(self._device), self._ahead(constant, copies=True):
            run_workers(
                self._cut(constant),
                lambda chunk, accumulator: self._copy(sink, chunk, accumulator),
                self._accumulator,
                1,
            )

    @property
    def varying(self) -> list[bytes]:
        """For each averaged segment, which of its tensors were seen to vary."""
        return list(map(bytes, self._varies.values()))

    def note_all(self, varying: Iterable[Sequence[bytes]]) -> None:
        """Note what the engines of other ranks, which had other chunks, have as `varying`."""
        for each in varying:
            for own, theirs in zip(self._varies.values(), each, strict=True):
                own[:] = bytes(map(operator.or_, own, theirs))

    def _ahead(
        self, chunks: Iterable[Chunk], *, copies: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Have what the workers will read of `chunks`, or copy of them, fetched from a store."""

        def reads() -> Iterator[tuple[int, Reader, int, int]]:
            for step, chunk in enumerate(self._cut(chunks)):
                copied = copies or self._only_copied(chunk)
                for source in [self.plan.newest] if copied else chunk.segment.sources:
                    size = bytes_of(self.plan.stored(chunk.segment, source), chunk.elements)
                    yield step, self._readers[source], self.plan.start_of(chunk, source), size

        return reading_ahead(self._readers, reads)

    def varies(self, segment: Segment, tensor: int) -> bool:
        """Whether two snapshots were seen to differ in a tensor; always False of one not
        averaged."""
        return segment.averaged and bool(self._varies[id(segment)][tensor])

    def note_varying(self, segment: Segment, tensor: int) -> None:
        """Take a tensor that is averaged for one that varies, though no difference was seen."""
        self._varies[id(segment)][tensor] = True

    def read(self, chunk: Chunk, source: int, into: memoryview, *, as_stored: bool = False) -> None:
        """Fill `into` with a chunk's bytes in one of the sources, in the segment's dtype or, with
        `as_stored`, its own."""
        start, stored = self.plan.start_of(chunk, source), self.plan.stored(chunk.segment, source)
        if as_stored or stored == chunk.segment.dtype:
            self._readers[source].read(start, into[: bytes_of(stored, chunk.elements)])
            return
        narrow = np.empty(bytes_of(stored, chunk.elements), np.uint8)
        self._readers[source].read(start, narrow.data)
        wide = np.frombuffer(into, DTYPES[chunk.segment.dtype].numpy(), chunk.elements)
        with np.errstate(invalid="ignore"):  # of a signalling NaN
            wide[:] = decode(stored, narrow)

    def _elements(self, segment: Segment) -> int:
        """Elements of a chunk: as many as fit in a row, and in all that a worker may take."""
        stored, result = (
            DTYPES[code].bits // 8 or 1 for code in (self._usual(segment), segment.out_dtype)
        )
        several = self._batch < len(self.plan.sources) or bool(segment.exponents)
        with_sums = several or self._device != "cpu"
        sums = 8 * self._targets if with_sums else 0
        most = self._worker_bytes // (self._batch * stored + sums + self._targets * result)
        return max(min(self._row_bytes // stored, most) // STRIDE, 1) * STRIDE

    def _usual(self, segment: Segment) -> str:
        """The dtype that most of a segment's sources have, if they are summed as they are."""
        codes = Counter(self.plan.stored(segment, source) for source in segment.sources)
        usual = max(codes, key=lambda code: codes[code], default=segment.dtype)
        return usual if segment.exponents and usual in WIDENED else segment.dtype

    def _cut(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            yield from chunk.cut(self._elements(chunk.segment))

    def _accumulator(self) -> Accumulator:
        capacity = max(map(self._elements, self.plan.segments), default=STRIDE)
        sizes = self._row_bytes, capacity, self._targets, self._batch
        if self._device == "cpu":
            return CpuAccumulator(*sizes)
        return TorchAccumulator(*sizes, self._device)

    def _only_copied(self, chunk: Chunk) -> bool:
        return not chunk.segment.averaged or (self._settled and not self._varies_in(chunk))

    def _sum(self, sink: Sink, chunk: Chunk, accumulator: Accumulator) -> None:
        """Read a chunk from every snapshot, and hand its weighted sums to the sink."""
        segment = chunk.segment
        if self._only_copied(chunk):
            self._copy(sink, chunk, accumulator)
            return
        varies, weights = self._varies[id(segment)], self._weights[id(segment)]
        unsettled = [part for part in chunk.parts() if not varies[part[0]]]
        reference = b""
        accumulator.begin(segment.dtype, segment.out_dtype, chunk.elements)
        first = 0
        while first < len(segment.sources):
            dtype, alike = self._alike_sources(segment, first)
            size = bytes_of(dtype, chunk.elements)
            rows = accumulator.staging(dtype)
            batch = alike[: len(rows)]
            for row, source in zip(rows, batch, strict=False):
                self.read(chunk, source, row[:size], as_stored=bool(segment.exponents))
            if unsettled:
                reference = reference or bytes(rows[0][:size])
                self._note_differences(chunk, unsettled, reference, rows[: len(batch)])
            end = first + len(batch)
            last = end == len(segment.sources)
            accumulator.add(weights[first:end], last=last)
            self._count(len(batch) * size)
            first = end
        unsettled = [part for part in unsettled if not varies[part[0]]]
        sink.take_sums(chunk, accumulator.result, unsettled)
        if self._report is not None and accumulator.maybe_nonfinite:
            results = [np.array(accumulator.result(t), np.uint8) for t in range(self._targets)]
            self._report.look(chunk, results, self.read)

    def _alike_sources(self, segment: Segment, first: int) -> tuple[str, Sequence[int]]:
        """The sources from `first` on that are read and summed as one dtype, and that.

        Differences are summed as they are stored, which is in order of their dtypes.
        """
        sources = segment.sources[first:]
        if not segment.exponents:
            return segment.dtype, sources
        dtype = self.plan.stored(segment, sources[0])
        alike = (self.plan.stored(segment, each) == dtype for each in sources)
        return dtype, sources[: sum(itertools.takewhile(bool, alike))]

    def _copy(self, sink: Sink, chunk: Chunk, accumulator: Accumulator) -> None:
        """Hand a chunk of the newest snapshot to the sink, in the dtype of the output."""
        segment, size = chunk.segment, chunk.bytes_each
        accumulator.begin(segment.dtype, segment.out_dtype, chunk.elements)
        row = accumulator.staging()[0][:size]
        self.read(chunk, self.plan.newest, row)
        copied = np.asarray(row)
        if segment.dtype != segment.out_dtype:  # not by a sum, which has no negative zero
            stored = copied.view(DTYPES[segment.dtype].unsigned())
            copied = np.empty(segment.out_size_of(chunk.elements), np.uint8)
            round_to(copied, segment.out_dtype, stored, segment.dtype)
        sink.take_copies(chunk, lambda target: copied.data)
        if self._report is not None and segment.dtype in AVERAGED:
            if self._settled and segment.averaged:  # there are no sums to look at
                self._report.look(chunk, [copied] * self._targets, self.read)
            self._report.look_copied(chunk, copied, self.read)
        if not segment.averaged:  # counted when it was read for the sums
            self._count(size)
        elif self._settled:
            self._count(self.plan.bytes_of(chunk))

    # Which tensors vary, before anything is summed

    def settle(self, chunks: Sequence[Chunk]) -> None:
        """Find out which tensors of `chunks` vary: most by their beginnings in two snapshots."""
        parts = [part for part in self._constant_parts(chunks) if part.elements]
        run_workers(iter(parts), self._look_at_beginning, tuple, _PROBES)
        left = [part for part in parts if not self._varies_in(part)]
        report, progress = self._report, self.progress
        self._report = self.progress = None  # it is all read again
        try:
            self.sum(_Nothing(), left)
        finally:
            self._report, self.progress = report, progress

    def _look_at_beginning(self, tensor: Chunk, _: object) -> None:
        segment, part = tensor.segment, next(tensor.cut(_BEGINNING))
        rows = np.empty((2, part.bytes_each), np.uint8)
        for row, source in zip(rows, (segment.sources[0], segment.sources[-1]), strict=True):
            self.read(part, source, row.data)
        if not np.array_equal(*rows):
            self.note_varying(segment, self._tensor_of(part))

    def _varies_in(self, chunk: Chunk) -> bool:
        """Whether the tensors of `chunk` vary; they do all or none, or it is a part of one."""
        return self.varies(chunk.segment, self._tensor_of(chunk))

    @staticmethod
    def _tensor_of(chunk: Chunk) -> int:
        """The place in its segment of the tensor with which `chunk` begins."""
        return next(chunk.parts())[0]

    def _alike(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """`chunks` cut where tensors that vary meet others."""
        for chunk in chunks:
            if not chunk.segment.averaged:
                yield chunk
                continue
            for _, parts in itertools.groupby((part for _, part in chunk.parts()), self._varies_in):
                first, *_, last = [*parts] * 2
                yield Chunk(chunk.segment, first.first, last.last)

    def _constant_parts(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The parts of `chunks` that belong to tensors which are the same in all snapshots."""
        for chunk in chunks:
            if chunk.segment.averaged:
                varies = self._varies[id(chunk.segment)]
                yield from (part for at, part in chunk.parts() if not varies[at])

    def _note_differences(
        self,
        chunk: Chunk,
        unsettled: Sequence[Part],
        reference: bytes,
        rows: Sequence[memoryview],
    ) -> None:
        """Note which tensors of a chunk are not in all rows what they are in `reference`."""
        segment, varies = chunk.segment, self._varies[id(chunk.segment)]
        wanted = np.frombuffer(reference, np.uint8)
        for tensor, part in unsettled:
            first = segment.size_of(part.first - chunk.first)
            last = segment.size_of(part.last - chunk.first)
            if not varies[tensor] and not all(
                np.array_equal(wanted[first:last], np.asarray(row)[first:last]) for row in rows
            ):
                varies[tensor] = True

    def _count(self, read: int) -> None:
        if self.progress is not None:
            self.progress(read)
