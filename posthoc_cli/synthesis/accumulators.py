"""Weighted sums of rows of bytes, chunk after chunk, on the CPU or on a torch device.

Both classes have the same four methods. A worker owns one and calls, for each chunk: `begin`; for
each batch of snapshots `staging`, which gives the rows to read into, then `add`; and `result` once
a target. Sums are held in float64 and rounded once, and each element's sum is taken in the
snapshots' order: it depends neither on the chunk nor on the batch that it falls in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import MachineError
from posthoc_cli.storage.dtypes import DTYPES, FLOAT8, bytes_of, decode, float8_values
from posthoc_cli.synthesis import kernels

Weights = npt.NDArray[np.float64]


class Accumulator(Protocol):
    """Sums up to `capacity` elements, or rows of `row_bytes`, at a time, `batch` rows a call.

    Both are multiples of kernels.STRIDE elements.
    """

    def begin(self, dtype: str, out_dtype: str, elements: int) -> None:
        """Start the sums of `elements` elements stored as `dtype`, to be rounded to `out_dtype`."""

    def staging(self, dtype: str | None = None) -> list[memoryview]:
        """Rows to read the next snapshots into, as bytes, each long enough for the chunk.

        `dtype` is theirs, if it isn't the one that `begin` was told. Of one with so many bytes that
        the chunk doesn't fit in a row there are fewer.
        """

    def add(self, weights: Weights, *, last: bool) -> None:
        """Add the rows last staged; `weights` is [rows, targets], C-contiguous.

        `last` tells that these are the last, after which `result` may be called.
        """

    def result(self, target: int) -> memoryview:
        """The bytes of one target's sums, rounded; good until the next call of any method."""

    @property
    def maybe_nonfinite(self) -> bool:
        """Whether a result may be infinite or not a number; if not, none of them is."""


def rows_for(rows: Any, dtype: str, elements: int) -> Any:
    """`rows` [rows, bytes], of NumPy or torch, or fewer and longer ones in their place, in which so
    many elements of `dtype` fit."""
    size = bytes_of(dtype, -(-elements // kernels.STRIDE) * kernels.STRIDE)
    if size <= rows.shape[1]:
        return rows
    count = rows.shape[0] * rows.shape[1] // size
    return rows.reshape(-1)[: count * size].reshape(count, size)


class CpuAccumulator:
    """Sums on the CPU, by the kernels compiled for it.

    As long as all snapshots fit in one batch, sums never leave the registers.
    """

    def __init__(self, row_bytes: int, capacity: int, targets: int, batch: int) -> None:
        self._all_rows = self._rows = np.zeros((batch, row_bytes), np.uint8)
        self._sums = np.zeros((targets, capacity))
        self._out = np.zeros((targets, capacity * 8), np.uint8)
        self._wide = np.zeros((0, 0), np.float32)
        self._dtype = self._row_dtype = self._out_dtype = self._table_of = ""
        self._elements = 0
        self._begun = False
        self.maybe_nonfinite = False

    def begin(self, dtype: str, out_dtype: str, elements: int) -> None:
        self._dtype, self._out_dtype, self._elements = dtype, out_dtype, elements
        self._begun = False

    def staging(self, dtype: str | None = None) -> list[memoryview]:
        self._row_dtype = dtype or self._dtype
        self._rows = rows_for(self._all_rows, self._row_dtype, self._elements)
        return [row.data for row in self._rows]

    def add(self, weights: Weights, *, last: bool) -> None:
        rows: npt.NDArray[Any] = self._rows
        dtype = self._row_dtype
        if dtype not in kernels.WIDENED:
            if dtype != self._table_of:
                self._table_of, self._table = dtype, float8_values(dtype)
                self._wide = np.zeros(self._all_rows.shape, np.float32)
            for stored, wide in zip(self._rows[: len(weights)], self._wide, strict=False):
                np.take(self._table, stored[: self._elements], out=wide[: self._elements])
            dtype, rows = "F32", self._wide
        addresses = np.uintp(rows.ctypes.data) + np.uintp(rows.strides[0]) * np.arange(
            len(rows), dtype=np.uintp
        )
        before = self._sums if self._begun else None
        out, out_dtype = self._sums.view(np.uint8), "F64"
        if last and self._out_dtype not in FLOAT8:
            out, out_dtype = self._out, self._out_dtype
        self.maybe_nonfinite = kernels.accumulate(
            dtype, addresses, weights, before, out, out_dtype, self._elements
        )
        self._begun = True

    def result(self, target: int) -> memoryview:
        row = self._out[target]
        if self._out_dtype in FLOAT8:
            with np.errstate(all="ignore"):
                sums = self._sums[target, : self._elements]
                row = sums.astype(DTYPES[self._out_dtype].numpy()).view(np.uint8)
                self.maybe_nonfinite |= not np.isfinite(decode(self._out_dtype, row)).all()
        data: memoryview = row.data[: bytes_of(self._out_dtype, self._elements)]
        return data


class TorchAccumulator:
    """Sums on a torch device, each worker on a stream of its own.

    While one worker waits for its stream the others read; within a worker, two staging buffers let
    the next batch be read while the last one is copied and summed.
    """

    def __init__(
        self, row_bytes: int, capacity: int, targets: int, batch: int, device: str
    ) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._stream: Any = None
        if self._cuda:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        on_device: dict[str, Any] = {"device": self._device}
        on_host: dict[str, Any] = {"dtype": torch.uint8, "pin_memory": self._cuda}
        self._buffers = [torch.empty(batch, row_bytes, **on_host) for _ in range(2)]
        self._free: list[Any] = [None, None]  # the event after which a staging buffer is free
        self._turn = 0
        self._received = torch.empty(batch, row_bytes, dtype=torch.uint8, **on_device)
        self._sums = torch.empty(targets, capacity, dtype=torch.float64, **on_device)
        self._out = torch.empty(capacity * 8, **on_host)
        self._dtype = self._row_dtype = self._out_dtype = ""
        self._elements = 0
        self.maybe_nonfinite = False

    def begin(self, dtype: str, out_dtype: str, elements: int) -> None:
        self._dtype, self._out_dtype, self._elements = dtype, out_dtype, elements
        self.maybe_nonfinite = False
        with self._on_stream():
            self._sums[:, :elements] = 0.0

    def staging(self, dtype: str | None = None) -> list[memoryview]:
        self._row_dtype = dtype or self._dtype
        self._turn = 1 - self._turn
        if self._free[self._turn] is not None:
            self._free[self._turn].synchronize()
        return [row.data for row in self._rows_of(self._buffers[self._turn]).numpy()]

    def _rows_of(self, buffer: Any) -> Any:
        return rows_for(buffer, self._row_dtype, self._elements)

    def add(self, weights: Weights, *, last: bool) -> None:
        rows, dtype = len(weights), self._row_dtype
        size = bytes_of(dtype, self._elements)
        with self._on_stream():
            received = self._rows_of(self._received)[:rows, :size]
            staged = self._rows_of(self._buffers[self._turn])[:rows, :size]
            received.copy_(staged, non_blocking=True)
            if self._cuda:
                self._free[self._turn] = self._torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._free[self._turn].record(self._stream)
            for row, row_weights in zip(received, weights.tolist(), strict=True):
                values = row.view(DTYPES[dtype].torch()).to(self._torch.float64)
                for sums, weight in zip(self._sums, row_weights, strict=True):
                    sums[: self._elements].add_(values, alpha=weight)

    def result(self, target: int) -> memoryview:
        with self._on_stream():
            narrowed = self._sums[target, : self._elements].to(DTYPES[self._out_dtype].torch())
            out = self._out[: bytes_of(self._out_dtype, self._elements)]
            out.copy_(narrowed.view(self._torch.uint8), non_blocking=True)
            finite = self._torch.isfinite(narrowed.to(self._torch.float64)).all()
        if self._cuda:
            self._stream.synchronize()
        self.maybe_nonfinite |= not finite.item()
        return out.numpy().data

    def _on_stream(self) -> Any:
        return self._torch.cuda.stream(self._stream)  # does nothing when the stream is None


@contextlib.contextmanager
def device_errors(device: str) -> Iterator[None]:
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
