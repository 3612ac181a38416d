"""NaN and infinity: counted in the snapshots, and in the outputs where a dtype cannot hold a sum.

A sum is finite only if all that went into it was, so it is enough to look at the results, which the
kernels do on the way. Only where one may not be are the snapshots looked at, one value at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import printable
from posthoc_cli.storage.dtypes import OUTPUT_DTYPES, decode
from posthoc_cli.storage.places import common_folder
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.plan import Chunk, Segment, TensorPlan

_BLOCK = 1 << 14
"""Elements looked at together."""

Read = Callable[[Chunk, int, memoryview], None]
"""Fills a buffer with a chunk's bytes in one of the sources."""

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


_Tensors = dict[tuple[int, int], NonfiniteTensor]
Counts = tuple[_Tensors, _Tensors]
"""By segment and tensor: of the sums, and of what was copied."""


class NonfiniteReport:
    """What is not finite, gathered chunk by chunk from several threads."""

    def __init__(self, plan: TensorPlan, weights: Weights) -> None:
        self._plan = plan
        self._weights = weights  # [groups, targets, snapshots]
        self._lock = threading.Lock()
        self._found: _Tensors = {}
        self._copies: _Tensors = {}
        self._order = {id(segment): at for at, segment in enumerate(plan.segments)}

    def look(self, chunk: Chunk, results: Sequence[npt.NDArray[np.uint8]], read: Read) -> None:
        """Look at a chunk whose `results`, one for each target as bytes, may not be finite."""
        with np.errstate(all="ignore"):
            odd = [~np.isfinite(decode(chunk.segment.out_dtype, result)) for result in results]
        for block in chunk.cut(_BLOCK):
            inside = slice(block.first - chunk.first, block.last - chunk.first)
            if any(mask[inside].any() for mask in odd):
                self._look_closer(block, [mask[inside] for mask in odd], read)

    def look_copied(self, chunk: Chunk, copied: npt.NDArray[np.uint8], read: Read) -> None:
        """The same where all results are `copied`, the newest snapshot's values as the output has
        them. In place of sums, as those of a tensor that never varies, they may overflow again.
        """
        segment = chunk.segment
        if not segment.averaged:
            self.look(chunk, [copied] * self._weights.shape[1], read)
        elif segment.dtype != segment.out_dtype:
            with np.errstate(all="ignore"):
                infinite = np.isinf(decode(segment.out_dtype, copied))
            for block in chunk.cut(_BLOCK) if infinite.any() else ():
                mask = infinite[block.first - chunk.first : block.last - chunk.first]
                self._look_for_overflow(block, mask, read)

    def _look_for_overflow(self, chunk: Chunk, infinite: BoolArray, read: Read) -> None:
        raw = np.empty(chunk.bytes_each, np.uint8)
        read(chunk, self._plan.newest, raw.data)
        with np.errstate(invalid="ignore"):
            values = np.abs(decode(chunk.segment.dtype, raw).astype(np.float64))
        with self._lock:
            mask = infinite & np.isfinite(values)
            for noted, inside in self._note(chunk, mask, "overflowed", found=self._copies):
                noted.overflowed += len(inside) * (self._weights.shape[1] - 1)
                noted.largest = max(noted.largest, float(values[inside].max()))

    def _look_closer(self, chunk: Chunk, odd: Sequence[BoolArray], read: Read) -> None:
        """Find which snapshots make the results of a chunk non-finite where `odd` says so."""
        segment = chunk.segment
        weights = np.ones((len(odd), 1))
        if segment.averaged:
            weights = self._plan.weights_of(segment, self._weights)
        sums = np.zeros((len(odd), chunk.elements))
        finite = np.ones(chunk.elements, bool)
        raw = np.empty(chunk.bytes_each, np.uint8)
        for weight, source in zip(weights.T, segment.sources, strict=True):
            read(chunk, source, raw.data)
            with np.errstate(invalid="ignore"):  # of a signalling NaN
                values = decode(segment.dtype, raw).astype(np.float64)
            nan, infinite = np.isnan(values), np.isinf(values)
            with self._lock:
                self._note(chunk, nan, "nan", source)
                self._note(chunk, infinite, "infinite", source)
            finite &= ~(nan | infinite)
            values[nan | infinite] = 0.0
            with np.errstate(over="ignore", invalid="ignore"):
                sums += weight[:, None] * values
        for target, mask in enumerate(odd):
            with self._lock:
                for noted, inside in self._note(chunk, mask & finite, "overflowed"):
                    largest = float(np.abs(sums[target, inside]).max())
                    noted.largest = max(noted.largest, largest)

    def _note(
        self,
        chunk: Chunk,
        mask: BoolArray,
        kind: str,
        source: int | None = None,
        found: _Tensors | None = None,
    ) -> list[tuple[NonfiniteTensor, npt.NDArray[np.intp]]]:
        """Count the elements of `mask` to their tensors; returns each one's, with its elements."""
        where = np.flatnonzero(mask)
        if not len(where):
            return []
        segment = chunk.segment
        tensors = segment.tensors_of(where + chunk.first)
        noted = []
        for tensor in np.unique(tensors).tolist():
            key = self._order[id(segment)], tensor
            entries = self._found if found is None else found
            entry = entries.setdefault(key, NonfiniteTensor(segment.names[tensor]))
            inside = where[tensors == tensor]
            setattr(entry, kind, getattr(entry, kind) + len(inside))
            if source is not None:
                entry.snapshots.add(source)
            noted.append((entry, inside))
        return noted

    @property
    def counts(self) -> Counts:
        """What was counted so far, for `add`."""
        return self._found, self._copies

    def add(self, counts: Counts) -> None:
        """Add what was counted in other chunks of the plan."""
        for own, theirs in zip(self.counts, counts, strict=True):
            for key, entry in theirs.items():
                mine = own.setdefault(key, NonfiniteTensor(entry.tensor))
                mine.nan += entry.nan
                mine.infinite += entry.infinite
                mine.overflowed += entry.overflowed
                mine.largest = max(mine.largest, entry.largest)
                mine.snapshots |= entry.snapshots

    def tensors(self, varies: Callable[[Segment, int], bool]) -> list[NonfiniteTensor]:
        """What was found, in the order of the outputs.

        Infinity in a tensor that is the same in all snapshots (or is copied) is taken to be meant,
        such as that of an attention mask, and doesn't count; NaN does. Nor do sums of such a tensor
        that were too large: copies take their place.
        """
        found = []
        for key in sorted(self._found.keys() | self._copies.keys()):
            segment, tensor = self._plan.segments[key[0]], key[1]
            entry = self._found.get(key) or NonfiniteTensor(segment.names[tensor])
            if not varies(segment, tensor):
                entry.infinite = 0
                if segment.averaged:
                    copies = self._copies.get(key) or NonfiniteTensor(entry.tensor)
                    entry.overflowed, entry.largest = copies.overflowed, copies.largest
            if entry.nan or entry.infinite or entry.overflowed:
                found.append(entry)
        return found


def summarize(plan: TensorPlan, found: Sequence[NonfiniteTensor]) -> tuple[str, str]:
    """What was found in a few words: the first tensor concerned, and what is wrong."""
    broken = [entry for entry in found if entry.nan or entry.infinite]
    first = (broken or found)[0]
    more = len(broken or found) - 1
    others = f", and so in {more} more tensor{'s' if more > 1 else ''}" if more else ""
    if not broken:
        dtype = _asked_for(plan.tensors[first.tensor][0])
        return (
            f"tensor '{printable(first.tensor)}'",
            f"{first.overflowed:,} values, of up to {first.largest:.3g}, are too large for {dtype}"
            f"{others}; {_holding(found)}",
        )
    kinds = [
        f"{count:,} {kind}"
        for kind, count in (("NaN", first.nan), ("infinite", first.infinite))
        if count
    ]
    files = sorted({at for entry in broken for at in entry.snapshots})
    path = plan.sources[files[0]].path
    folder = common_folder([source.path.parent for source in plan.sources])
    where = f"'{printable(path.relative_to(folder).as_posix())}'"
    if len(files) > 1:
        where += f" and {len(files) - 1} more snapshot{'s' if len(files) > 2 else ''}"
    return (
        f"tensor '{printable(first.tensor)}'",
        f"{' and '.join(kinds)} values in {where}{others}",
    )


def _asked_for(code: str) -> str:
    return next((name for name, stored in OUTPUT_DTYPES.items() if stored == code), code)


def _holding(found: Sequence[NonfiniteTensor]) -> str:
    """Which of the output dtypes hold all sums that overflowed."""
    largest = max(entry.largest for entry in found)
    if not largest < float("inf"):
        return "no dtype holds them"
    return f"dtype={'float64' if largest > 3.38e38 else 'bfloat16 or float32'} holds them"
