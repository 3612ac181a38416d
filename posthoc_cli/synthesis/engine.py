"""Snapshots and weights in, output files out, in one pass over the snapshots and constant memory.

Workers take chunks of the plan in turn: each chunk is read from every snapshot, summed for all
targets at once, and written to its place in every output.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.storage.atomic import AtomicFile, commit_together
from posthoc_cli.storage.dtypes import AVERAGED, DTYPES
from posthoc_cli.storage.header import Part, make_header, spans
from posthoc_cli.storage.metadata import FORMAT, RECIPE, carried_over
from posthoc_cli.storage.readers import Reader
from posthoc_cli.storage.shards import (
    index_path,
    made_by_posthoc,
    make_index,
    replaced_files,
    shard_paths,
    split,
)
from posthoc_cli.storage.workers import background_flush, default_workers, run_workers
from posthoc_cli.synthesis.accumulators import (
    Accumulator,
    CpuAccumulator,
    TorchAccumulator,
    Weights,
)
from posthoc_cli.synthesis.kernels import STRIDE
from posthoc_cli.synthesis.nonfinite import NonfiniteReport, NonfiniteTensor, complaint
from posthoc_cli.synthesis.plan import Chunk, Plan, Segment

GROUP = 16
"""Snapshots that are read before they are summed: memory does not grow with their number. Where
all fit in one group, no sum ever goes through memory."""

ROW_BYTES = {"cpu": 1 << 19, "device": 1 << 21}
"""Bytes read from a snapshot at a time. A worker's rows should stay in the processor's last cache
until they are summed; much smaller ones cost more in calls, and write the outputs in bits."""

WORKER_BYTES = {"cpu": 12 << 20, "device": 128 << 20}
"""The most that a worker's rows, sums and results may take together: with many targets, or more
snapshots than one group has, chunks get smaller."""

_OTHER_FILES = 64
"""Files that a process has open besides snapshots and outputs, at the most."""

Progress = Callable[[int], None]


def execute(
    plan: Plan,
    weights: Weights,
    outputs: Sequence[Path],
    recipes: Sequence[Mapping[str, Any]],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    shard_bytes: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    row_bytes: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write one output for each row of `weights` [targets, snapshots].

    All outputs come out of the same single pass over the snapshots. Each lands whole or not at
    all; when anything fails none does. One with more than `shard_bytes` of data becomes several
    files of at most so much, and an index. With `strict`, NaN or infinity in the snapshots or the
    sums is an error. The bytes written do not depend on `workers` (default:
    one a processor) nor on `row_bytes`. `progress` is called, from any thread, with the number of
    input bytes just read.

    Raises UsageError when an output exists and `overwrite` is false or when it is one of the
    snapshots; SnapshotError when a snapshot changed meanwhile, or by `strict`; MachineError when
    the disk or the device fails.
    """
    carried = carried_over(plan.snapshots[plan.newest].index.metadata)
    wanted = [
        _output(plan, path, carried | {RECIPE: json.dumps(entry)}, shard_bytes, overwrite)
        for path, entry in zip(outputs, recipes, strict=True)
    ]
    files = [file for output in wanted for file in output.files]
    gone = [path for output in wanted for path in output.stale]
    _refuse_inputs(plan.snapshots, [*(file.path for file in files), *gone])
    where = "cpu" if device == "cpu" else "device"
    row_bytes = max(row_bytes or ROW_BYTES[where], 8 * STRIDE)
    group = min(GROUP, len(plan.snapshots))
    sums = 8 * len(outputs) if group < len(plan.snapshots) or where == "device" else 0

    def elements(run: Segment) -> int:
        """Elements of a chunk: as many as fit in a row, and in all that a worker may take."""
        stored, result = DTYPES[run.dtype].bits // 8 or 1, DTYPES[run.out_dtype].bits // 8 or 1
        most = WORKER_BYTES[where] // (group * stored + sums + len(outputs) * result)
        return max(min(row_bytes // stored, most) // STRIDE, 1) * STRIDE

    capacity = max(map(elements, plan.runs), default=STRIDE)

    def summing() -> Accumulator:
        if device == "cpu":
            return CpuAccumulator(row_bytes, capacity, len(outputs), group)
        return TorchAccumulator(row_bytes, capacity, len(outputs), group, device)

    with contextlib.ExitStack() as stack:
        keep_open = raise_file_limit(sum(len(s.index.parts) for s in plan.snapshots) + len(files))
        readers = [
            stack.enter_context(Reader(snapshot.index, keep_open=keep_open))
            for snapshot in plan.snapshots
        ]
        stack.enter_context(commit_together(files, gone))
        for output in wanted:
            output.write_headers()
        job = _Job(plan, weights, readers, wanted, progress)
        with _device_errors(device), background_flush(files):
            run_workers(plan.chunks(elements), job.sum_chunk, summing, workers or default_workers())
            run_workers(job.constant_chunks(elements), job.copy_chunk, summing, 1)
        for reader in readers:
            reader.check_unchanged()
        findings = job.findings()
        if strict and findings:
            raise SnapshotError(
                *complaint(plan, findings), "nothing is written, as strict=True says"
            )
    return Written(
        [tuple(file.path for file in output.files) for output in wanted],
        [sum(file.size for file in output.files) for output in wanted],
        findings,
    )


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: for each target its `files`, an index last, and their bytes together."""

    files: list[tuple[Path, ...]]
    sizes: list[int]
    findings: list[NonfiniteTensor]


@dataclass(frozen=True, slots=True)
class _Output:
    """The files of one output, in the order in which they land, and the places of its data.

    Of one in shards the index comes last, and has no part. `stale` are files that contradict it.
    """

    files: Sequence[AtomicFile]
    contents: Sequence[bytes]
    parts: Sequence[Part]
    stale: Sequence[Path]

    def write_headers(self) -> None:
        """Write what stands at the beginning of each file."""
        for file, content in zip(self.files, self.contents, strict=True):
            file.write_at(0, content)

    def write(self, start: int, data: memoryview) -> None:
        """Write `data` from byte `start` of the output's data on."""
        for at, offset, count in spans(self.parts, start, len(data)):
            self.files[at].write_at(offset, data[:count])
            data = data[count:]


def _output(
    plan: Plan,
    path: Path,
    metadata: Mapping[str, str],
    shard_bytes: int | None,
    overwrite: bool,
) -> _Output:
    """One output: a file, or shards with an index where one would hold more than `shard_bytes`."""
    places = make_header(plan.tensors, {})[1]
    shards = [list(places)] if shard_bytes is None else split(places, shard_bytes)
    if len(shards) > 1:
        metadata = {FORMAT: "pt", **metadata}  # without it transformers loads no shard
    paths = [path] if len(shards) == 1 else shard_paths(path, len(shards))
    stale = replaced_files(path, paths, overwrite)
    files, contents, parts = [], [], []
    for name, names in zip(paths, shards, strict=True):
        header, _ = make_header({tensor: plan.tensors[tensor] for tensor in names}, metadata)
        first, last = places[names[0]].start, places[names[-1]].end
        size = len(header) + last - first
        files.append(AtomicFile(name, size, overwrite=overwrite or name in stale))
        contents.append(header)
        parts.append(Part(name, first, last - first, len(header), size))
    if len(shards) > 1:
        index = make_index(list(zip(paths, shards, strict=True)), plan.bytes_to_write)
        files.append(AtomicFile(index_path(path), len(index), overwrite=overwrite))
        contents.append(index)
    return _Output(files, contents, parts, [old for old in stale if old not in paths])


class _Job:
    """What the workers of one synthesis share; its methods may run in several threads at once."""

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        readers: Sequence[Reader],
        outputs: Sequence[_Output],
        progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._weights = np.ascontiguousarray(weights.T)  # [snapshots, targets]
        self._readers = readers
        self._outputs = outputs
        self._progress = progress
        # For each tensor of each averaged run, whether two snapshots were seen to differ in it.
        self._varies = {id(run): bytearray(len(run.names)) for run in plan.runs if run.averaged}
        self._census = NonfiniteReport(plan, weights)

    def sum_chunk(self, chunk: Chunk, summing: Accumulator) -> None:
        """Read a chunk from every snapshot, and write its weighted sum to every output."""
        run = chunk.run
        if not run.averaged:
            self.copy_chunk(chunk, summing)
            return
        size = chunk.bytes_each
        unsettled = self._unsettled_tensors(chunk)
        reference = b""
        summing.begin(run.dtype, run.out_dtype, chunk.elements)
        snapshots = range(len(self._plan.snapshots))
        for group in (snapshots[i : i + GROUP] for i in snapshots[::GROUP]):
            rows = summing.staging()
            for row, i in zip(rows, group, strict=False):
                self._read(i, run, chunk.first, row[:size])
            if unsettled:
                reference = reference or bytes(rows[0][:size])
                self._compare(chunk, unsettled, reference, rows[: len(group)])
            last = group.stop == snapshots.stop
            summing.add(self._weights[group.start : group.stop], last=last)
            self._report(len(group) * size)
        self._write_results(chunk, summing)

    def copy_chunk(self, chunk: Chunk, summing: Accumulator) -> None:
        """Take a chunk from the newest snapshot, for every output, in the dtype of the output."""
        run, newest, size = chunk.run, self._plan.newest, chunk.bytes_each
        converted = run.dtype != run.out_dtype
        if converted:
            summing.begin(run.dtype, run.out_dtype, chunk.elements)
        row = summing.staging()[0][:size]
        self._read(newest, run, chunk.first, row)
        if converted:
            summing.add(np.ones((1, len(self._outputs))), last=True)
        if converted:
            self._write_results(chunk, summing, settled=run.averaged)
        else:
            for t in range(len(self._outputs)):
                self._write(chunk, t, row)
            if run.dtype in AVERAGED and not run.averaged:
                self._census.look(chunk, [np.asarray(row)], self._read)
        self._report(0 if run.averaged else size)

    def _write_results(self, chunk: Chunk, summing: Accumulator, *, settled: bool = False) -> None:
        """Write the sums of a chunk; look at those that aren't finite, unless `settled` before."""
        targets = range(len(self._outputs))
        for t in targets:
            self._write(chunk, t, summing.result(t))
        if summing.suspicious and not settled:
            results = [np.array(summing.result(t), np.uint8) for t in targets]
            self._census.look(chunk, results, self._read)

    def constant_chunks(self, elements: Callable[[Segment], int]) -> Iterator[Chunk]:
        """The chunks of those tensors that are the same in all snapshots.

        Weights that sum to one give them back only up to rounding, and `algorithm3`'s not even
        that; they are copied over their sums.
        """
        for run in self._plan.runs:
            for tensor, varies in enumerate(self._varies.get(id(run), b"")):
                if not varies:
                    yield from run.chunks(elements, run.bounds[tensor], run.bounds[tensor + 1])

    def findings(self) -> list[NonfiniteTensor]:
        """The tensors with values that are no finite numbers, in the outputs' order."""
        return self._census.findings(lambda run, tensor: not self._varies[id(run)][tensor])

    def _unsettled_tensors(self, chunk: Chunk) -> list[int]:
        """The tensors within a chunk that have been the same in all snapshots so far."""
        varies, bounds = self._varies[id(chunk.run)], chunk.run.bounds
        inside = range(
            bisect.bisect_right(bounds, chunk.first) - 1, bisect.bisect_left(bounds, chunk.last)
        )
        return [tensor for tensor in inside if not varies[tensor]]

    def _compare(
        self, chunk: Chunk, tensors: Sequence[int], reference: bytes, rows: Sequence[memoryview]
    ) -> None:
        """Note which of `tensors` are not in all rows what they are in `reference`."""
        varies, bounds = self._varies[id(chunk.run)], chunk.run.bounds
        wanted = np.frombuffer(reference, np.uint8)
        for tensor in tensors:
            first = chunk.run.size_of(max(bounds[tensor] - chunk.first, 0))
            last = chunk.run.size_of(min(bounds[tensor + 1], chunk.last) - chunk.first)
            for row in rows:
                if not np.array_equal(wanted[first:last], np.asarray(row)[first:last]):
                    varies[tensor] = True
                    break

    def _read(self, snapshot: int, run: Segment, first: int, into: memoryview) -> None:
        """Fill `into` with the elements of a run in a snapshot from `first` on."""
        start = run.starts[self._plan.layouts[snapshot]]
        self._readers[snapshot].read(start + run.size_of(first), into)

    def _write(self, chunk: Chunk, target: int, data: memoryview) -> None:
        start = chunk.run.out_start + chunk.run.out_size_of(chunk.first)
        self._outputs[target].write(start, data)

    def _report(self, read: int) -> None:
        if self._progress is not None and read:
            self._progress(read)


def _refuse_inputs(snapshots: Sequence[Snapshot], outputs: Sequence[Path]) -> None:
    """Never write over a snapshot, whatever name or link it goes by, nor over one not used."""
    sources = [part.path for snapshot in snapshots for part in snapshot.index.parts]
    folders = {snapshot.index.path.parent for snapshot in snapshots}
    for path in outputs:
        if not path.exists():
            continue
        if any(os.path.samefile(path, source) for source in sources):
            raise UsageError(str(path), "is one of the snapshots", "choose another output")
        among = any(os.path.samefile(path.parent, folder) for folder in folders)
        if among and not made_by_posthoc(path):
            raise UsageError(
                str(path),
                "lies among the snapshots, and posthoc didn't make it",
                "choose another output",
            )


def raise_file_limit(files: int) -> bool:
    """Let this process open `files` files more, if the system allows; returns whether it does."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return True
    with contextlib.suppress(ValueError, OSError):
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most >= wanted
    return False


@contextlib.contextmanager
def _device_errors(device: str) -> Iterator[None]:
    """Turn a device's failures into one line; on the CPU nothing of the kind can happen."""
    if device == "cpu":
        yield
        return
    try:
        yield
    except RuntimeError as error:  # of which torch derives its own, more of them in each version
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        if "out of memory" in text.lower():
            text = "out of memory"
        raise MachineError(
            f"device='{device}'", text, "free some of its memory, or use device='cpu'"
        ) from error
