"""Snapshots and weights in, output files out, in one pass over the snapshots and constant memory.

Workers take chunks of the plan in turn: each chunk is read from every snapshot, summed for all
targets at once, and written to its place in every output.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from posthoc_cli import recipe
from posthoc_cli.errors import MachineError, UsageError
from posthoc_cli.kernels import STRIDE
from posthoc_cli.plan import Chunk, Plan, Run
from posthoc_cli.snapshots import Snapshot
from posthoc_cli.summing import CpuSumming, Summing, TorchSumming, Weights
from posthoc_cli.tensorfile import DTYPE_BITS, AtomicFile, changed, lay_out, reason

GROUP = 16
"""Snapshots that are read before they are summed: memory does not grow with their number. Where
all fit in one group, no sum ever goes through memory."""

ROW_BYTES = {"cpu": 1 << 19, "device": 1 << 21}
"""Bytes read from a snapshot at a time. A worker's rows should stay in the processor's last cache
until they are summed; much smaller ones cost more in calls, and write the outputs in bits."""

WORKER_BYTES = {"cpu": 12 << 20, "device": 128 << 20}
"""The most that a worker's rows, sums and results may take together: with many targets, or more
snapshots than one group has, chunks get smaller."""

FLUSH_EVERY = 0.1
"""Seconds between flushes of what was written meanwhile."""

MAX_WORKERS = 8
"""Each worker has buffers of its own, up to 40 MB of them."""

Progress = Callable[[int], None]


def execute(
    plan: Plan,
    weights: Weights,
    outputs: Sequence[Path],
    recipes: Sequence[Mapping[str, Any]],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    workers: int | None = None,
    row_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[int]:
    """Write one output for each row of `weights` [targets, snapshots]; returns their sizes, bytes.

    All outputs come out of the same single pass over the snapshots. Each lands whole or not at
    all; when anything fails none does. The bytes written do not depend on `workers` (default: one
    a processor) nor on `row_bytes`. `progress` is called, from any thread, with the number of input
    bytes just read.

    Raises UsageError when an output exists and `overwrite` is false or when it is one of the
    snapshots; SnapshotError when a snapshot changed meanwhile; MachineError when the disk or the
    device fails.
    """
    _refuse_inputs(plan.snapshots, outputs)
    newest = plan.snapshots[plan.newest]
    headers = [lay_out(plan.tensors, _metadata(newest, entry))[0] for entry in recipes]
    where = "cpu" if device == "cpu" else "device"
    row_bytes = max(row_bytes or ROW_BYTES[where], 8 * STRIDE)
    group = min(GROUP, len(plan.snapshots))
    sums = 8 * len(outputs) if group < len(plan.snapshots) or where == "device" else 0

    def elements(run: Run) -> int:
        """Elements of a chunk: as many as fit in a row, and in all that a worker may take."""
        stored, result = DTYPE_BITS[run.dtype] // 8 or 1, DTYPE_BITS[run.out_dtype] // 8 or 1
        most = WORKER_BYTES[where] // (group * stored + sums + len(outputs) * result)
        return max(min(row_bytes // stored, most) // STRIDE, 1) * STRIDE

    capacity = max(map(elements, plan.runs), default=STRIDE)

    def summing() -> Summing:
        if device == "cpu":
            return CpuSumming(row_bytes, capacity, len(outputs), group)
        return TorchSumming(row_bytes, capacity, len(outputs), group, device)

    with contextlib.ExitStack() as stack:
        inputs = stack.enter_context(_Inputs(plan.snapshots))
        files = [
            stack.enter_context(
                AtomicFile(path, len(header) + plan.bytes_to_write, overwrite=overwrite)
            )
            for path, header in zip(outputs, headers, strict=True)
        ]
        for file, header in zip(files, headers, strict=True):
            file.write_at(0, header)
        job = _Job(plan, weights, inputs, files, [len(h) for h in headers], progress)
        with _device_errors(device), _flushed_behind(files):
            _share(plan.chunks(elements), job.sum_chunk, summing, workers or _default_workers())
            _share(job.constant_chunks(elements), job.copy_chunk, summing, 1)
        inputs.check_unchanged()
    return [len(header) + plan.bytes_to_write for header in headers]


class _Job:
    """What the workers of one synthesis share; its methods may run in several threads at once."""

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        inputs: _Inputs,
        files: Sequence[AtomicFile],
        data_starts: Sequence[int],
        progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._weights = np.ascontiguousarray(weights.T)  # [snapshots, targets]
        self._inputs = inputs
        self._files = files
        self._data_starts = data_starts
        self._progress = progress
        # For each tensor of each averaged run, whether two snapshots were seen to differ in it.
        self._varies = {id(run): bytearray(len(run.names)) for run in plan.runs if run.averaged}

    def sum_chunk(self, chunk: Chunk, summing: Summing) -> None:
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
                self._inputs.read(i, self._input_offset(chunk, i), row[:size])
            if unsettled:
                reference = reference or bytes(rows[0][:size])
                self._compare(chunk, unsettled, reference, rows[: len(group)])
            last = group.stop == snapshots.stop
            summing.add(self._weights[group.start : group.stop], last=last)
            self._report(len(group) * size)
        for t in range(len(self._files)):
            self._write(chunk, t, summing.result(t))

    def copy_chunk(self, chunk: Chunk, summing: Summing) -> None:
        """Take a chunk from the newest snapshot, for every output, in the dtype of the output."""
        run, newest, size = chunk.run, self._plan.newest, chunk.bytes_each
        converted = run.dtype != run.out_dtype
        if converted:
            summing.begin(run.dtype, run.out_dtype, chunk.elements)
        row = summing.staging()[0][:size]
        self._inputs.read(newest, self._input_offset(chunk, newest), row)
        if converted:
            summing.add(np.ones((1, len(self._files))), last=True)
        for t in range(len(self._files)):
            self._write(chunk, t, summing.result(t) if converted else row)
        self._report(0 if run.averaged else size)

    def constant_chunks(self, elements: Callable[[Run], int]) -> Iterator[Chunk]:
        """The chunks of those tensors that are the same in all snapshots.

        Weights that sum to one give them back only up to rounding, and `algorithm3`'s not even
        that; they are copied over their sums.
        """
        for run in self._plan.runs:
            for tensor, varies in enumerate(self._varies.get(id(run), b"")):
                if not varies:
                    yield from run.chunks(elements, run.bounds[tensor], run.bounds[tensor + 1])

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

    def _input_offset(self, chunk: Chunk, snapshot: int) -> int:
        start = chunk.run.starts[self._plan.layouts[snapshot]]
        data_start = self._plan.snapshots[snapshot].layout.data_start
        return data_start + start + chunk.run.size_of(chunk.first)

    def _write(self, chunk: Chunk, target: int, data: memoryview) -> None:
        offset = chunk.run.out_start + chunk.run.out_size_of(chunk.first)
        self._files[target].write_at(self._data_starts[target] + offset, data)

    def _report(self, read: int) -> None:
        if self._progress is not None and read:
            self._progress(read)


class _Inputs:
    """The snapshots' files, open for reading."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots
        self._fds: list[int] = []
        self._locks = [threading.Lock() for _ in snapshots]

    def __enter__(self) -> _Inputs:
        _raise_file_limit(len(self._snapshots))
        try:
            for snapshot in self._snapshots:
                flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                with _reading(snapshot):
                    self._fds.append(os.open(snapshot.layout.path, flags))
            self.check_unchanged()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fd in self._fds:
            os.close(fd)

    def read(self, snapshot: int, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a snapshot's file from `offset` on."""
        with _reading(self._snapshots[snapshot]):
            while into:
                count = self._read_some(snapshot, offset, into)
                if count == 0:
                    raise changed(self._snapshots[snapshot].layout.path)
                into, offset = into[count:], offset + count

    def _read_some(self, snapshot: int, offset: int, into: memoryview) -> int:
        fd = self._fds[snapshot]
        if hasattr(os, "preadv"):
            return os.preadv(fd, [into], offset)
        with self._locks[snapshot]:  # a file has one position, which the threads share
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(into))
        into[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        """Raise SnapshotError for a file that is not as it was when its header was read."""
        for snapshot, fd in zip(self._snapshots, self._fds, strict=True):
            status = os.fstat(fd)
            layout = snapshot.layout
            if (status.st_size, status.st_mtime_ns) != (layout.size, layout.modified):
                raise changed(snapshot.layout.path)


def _share(
    chunks: Iterator[Chunk],
    work: Callable[[Chunk, Summing], None],
    summing: Callable[[], Summing],
    workers: int,
) -> None:
    """Have `workers` threads do `work` on the chunks, each with a `summing` of its own.

    The first exception stops all of them and is raised, an interrupt included.
    """
    lock, stop = threading.Lock(), threading.Event()

    def take() -> Chunk | None:
        with lock:
            return None if stop.is_set() else next(chunks, None)

    def worker() -> None:
        chunk = take()
        own = summing() if chunk is not None else None
        while chunk is not None and own is not None:
            work(chunk, own)
            chunk = take()

    with ThreadPoolExecutor(workers, thread_name_prefix="posthoc") as pool:
        try:
            tasks = [pool.submit(worker) for _ in range(workers)]
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for task in tasks:
        task.result()


@contextlib.contextmanager
def _flushed_behind(files: Sequence[AtomicFile]) -> Iterator[None]:
    """Flush what is written to disk while the work goes on.

    Left to itself the system gathers gigabytes, and the flush at the end waits for all of them
    while the processors have nothing to do.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(FLUSH_EVERY):
            for file in files:
                file.flush()

    with ThreadPoolExecutor(1, thread_name_prefix="posthoc-flush") as pool:
        task = pool.submit(flush)
        try:
            yield
        finally:
            done.set()
    task.result()


def _default_workers() -> int:
    """One for each processor that this process may run on, up to MAX_WORKERS."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    return min(os.cpu_count() or 1, MAX_WORKERS)


def _metadata(newest: Snapshot, entry: Mapping[str, Any]) -> dict[str, str]:
    """The newest snapshot's metadata, less what no longer holds, plus the recipe."""
    gone = {"step", "gamma", "sigma_rel", recipe.KEY}
    carried = {
        key: value
        for key, value in newest.layout.metadata.items()
        if key not in gone and not key.startswith("sshs_")
    }
    return carried | {recipe.KEY: json.dumps(entry)}


def _refuse_inputs(snapshots: Sequence[Snapshot], outputs: Sequence[Path]) -> None:
    """Never write over a snapshot, whatever name or link it goes by."""
    existing = [path for path in outputs if path.exists()]
    for path in existing:
        for snapshot in snapshots:
            if os.path.samefile(path, snapshot.layout.path):
                raise UsageError(str(path), "is one of the snapshots", "choose another output")


def _raise_file_limit(files: int) -> None:
    """Let this process open `files` files more, as far as the system allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + 256
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _reading(snapshot: Snapshot) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise changed(snapshot.layout.path) from None
    except OSError as error:
        raise MachineError(
            str(snapshot.layout.path),
            f"cannot be read ({reason(error)})",
            "check the disk and the permissions",
        ) from error


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
            f"--device {device}", text, "free some of its memory, or use --device cpu"
        ) from error
