"""NaN and infinity: counted in the snapshots, and in the outputs where a dtype cannot hold a sum.

A sum is finite only if all that went into it was, so it is enough to look at the results, which the
kernels do on the way. Only where one looks odd are the snapshots looked at, one value at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import printable
from posthoc_cli.storage.dtypes import AVERAGED, OUTPUT_DTYPES, decode
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.plan import Chunk, Plan, Segment

_BLOCK = 1 << 14
"""Elements looked at together."""

Read = Callable[[int, Segment, int, memoryview], None]
"""Fills a buffer with the elements of a snapshot's run, from one of them on."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(slots=True)
class NonfiniteTensor:
    """What is wrong with one tensor.

    `nan` and `infinite` count its values in all `snapshots` (indices) that have such; `overflowed`
    those of the outputs that are infinite although the snapshots' are not, as their dtype holds no
    sum as large as `largest`.
    """

    tensor: str
    nan: int = 0
    infinite: int = 0
    overflowed: int = 0
    largest: float = 0.0
    snapshots: set[int] = field(default_factory=set)


class NonfiniteReport:
    """Findings, gathered chunk by chunk from several threads."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._plan = plan
        self._weights = weights  # [targets, snapshots]
        self._lock = threading.Lock()
        self._found: dict[tuple[int, int], NonfiniteTensor] = {}
        self._order = {id(run): at for at, run in enumerate(plan.runs)}

    def look(self, chunk: Chunk, results: Sequence[npt.NDArray[np.uint8]], read: Read) -> None:
        """Look at a chunk whose `results`, one for each target as bytes, may not be finite."""
        run = chunk.run
        if run.dtype not in AVERAGED:
            return
        with np.errstate(all="ignore"):
            values = [decode(run.out_dtype, result) for result in results]
            odd = np.logical_or.reduce([~np.isfinite(each) for each in values])
        for first in range(0, chunk.elements, _BLOCK):
            last = min(first + _BLOCK, chunk.elements)
            if odd[first:last].any():
                block = [~np.isfinite(each[first:last]) for each in values]
                self._look_closer(run, chunk.first + first, block, read)

    def _look_closer(self, run: Segment, first: int, odd: Sequence[BoolArray], read: Read) -> None:
        """Of the elements from `first` on, find which snapshots make the results of `odd` so."""
        count = len(odd[0])
        used = range(len(self._plan.snapshots)) if run.averaged else [self._plan.newest]
        weights = self._weights if run.averaged else np.ones((len(odd), len(self._plan.snapshots)))
        sums = np.zeros((len(odd), count))
        finite = np.ones(count, bool)
        raw = np.empty(run.size_of(count), np.uint8)
        for snapshot in used:
            read(snapshot, run, first, raw.data)
            with np.errstate(invalid="ignore"):  # of a signalling NaN
                values = decode(run.dtype, raw).astype(np.float64)
            nan, infinite = np.isnan(values), np.isinf(values)
            with self._lock:
                self._note(run, first, nan, "nan", snapshot)
                self._note(run, first, infinite, "infinite", snapshot)
            finite &= ~(nan | infinite)
            values[nan | infinite] = 0.0
            with np.errstate(over="ignore", invalid="ignore"):
                sums += weights[:, snapshot, None] * values
        for target, mask in enumerate(odd):
            over = mask & finite
            with self._lock:
                for finding, inside in self._note(run, first, over, "overflowed"):
                    largest = float(np.abs(sums[target, inside]).max())
                    finding.largest = max(finding.largest, largest)

    def _note(
        self, run: Segment, first: int, mask: BoolArray, kind: str, snapshot: int | None = None
    ) -> list[tuple[NonfiniteTensor, npt.NDArray[np.intp]]]:
        """Count the elements of `mask` to their tensors; returns each one's, with its elements."""
        where = np.flatnonzero(mask)
        if not len(where):
            return []
        tensors = np.searchsorted(run.bounds, where + first, side="right") - 1
        noted = []
        for tensor in np.unique(tensors).tolist():
            key = self._order[id(run)], tensor
            finding = self._found.setdefault(key, NonfiniteTensor(run.names[tensor]))
            inside = where[tensors == tensor]
            setattr(finding, kind, getattr(finding, kind) + len(inside))
            if snapshot is not None:
                finding.snapshots.add(snapshot)
            noted.append((finding, inside))
        return noted

    def findings(self, constant: Callable[[Segment, int], bool]) -> list[NonfiniteTensor]:
        """What was found, in the order of the outputs.

        Infinity in a tensor that `constant` says to be the same in all snapshots is taken to be
        meant, such as that of an attention mask, and doesn't count; NaN does.
        """
        findings = []
        for (at, tensor), finding in sorted(self._found.items()):
            run = self._plan.runs[at]
            if finding.infinite and (not run.averaged or constant(run, tensor)):
                finding.infinite = 0
            if finding.nan or finding.infinite or finding.overflowed:
                findings.append(finding)
        return findings


def complaint(plan: Plan, findings: Sequence[NonfiniteTensor]) -> tuple[str, str]:
    """The findings in a few words: the first tensor concerned, and what is wrong."""
    broken = [finding for finding in findings if finding.nan or finding.infinite]
    first = (broken or findings)[0]
    more = len(broken or findings) - 1
    others = f", and so in {more} more tensor{'s' if more > 1 else ''}" if more else ""
    if not broken:
        dtype = _asked_for(plan.tensors[first.tensor][0])
        return (
            f"tensor '{printable(first.tensor)}'",
            f"{first.overflowed:,} values, of up to {first.largest:.3g}, are too large for {dtype}"
            f"{others}; {_holding(findings)}",
        )
    kinds = [
        f"{count:,} {kind}"
        for kind, count in (("NaN", first.nan), ("infinite", first.infinite))
        if count
    ]
    files = sorted({at for finding in broken for at in finding.snapshots})
    where = f"'{printable(plan.snapshots[files[0]].file)}'"
    if len(files) > 1:
        where += f" and {len(files) - 1} more snapshot{'s' if len(files) > 2 else ''}"
    return (
        f"tensor '{printable(first.tensor)}'",
        f"{' and '.join(kinds)} values in {where}{others}",
    )


def _asked_for(code: str) -> str:
    """The name that a user gives an output's dtype."""
    return next((name for name, stored in OUTPUT_DTYPES.items() if stored == code), code)


def _holding(findings: Sequence[NonfiniteTensor]) -> str:
    """Which of the output dtypes hold all sums that overflowed."""
    largest = max(finding.largest for finding in findings)
    if not largest < float("inf"):
        return "no dtype holds them"
    return f"dtype={'float64' if largest > 3.38e38 else 'bfloat16 or float32'} holds them"
