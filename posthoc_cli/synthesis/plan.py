"""Which output bytes come from which input bytes: the plan of a synthesis, apart from doing it.

A plan is plain data and opens no file. It can be split anywhere between chunks, and whoever carries
out a chunk needs nothing but the byte ranges it names.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError, UsageError, printable
from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.storage.dtypes import AVERAGED, DTYPES, OUTPUT_DTYPES, UNAVERAGEABLE
from posthoc_cli.storage.header import TensorInfo, make_header


@dataclass(frozen=True, slots=True)
class Segment:
    """Tensors that follow each other without a gap in the output and in every snapshot.

    `bounds[k]` is the first element of tensor `names[k]` within the run, and `bounds[-1]` the
    run's elements. `starts[l]` is the byte at which the run begins in the data section of the
    snapshots with layout `l` (see `Plan.layouts`), `out_start` in that of the outputs. A run that
    is not `averaged` is copied from the newest snapshot. Complex elements count as two floats.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    dtype: str
    out_dtype: str
    averaged: bool
    starts: tuple[int, ...]
    out_start: int

    def size_of(self, elements: int) -> int:
        """Bytes that `elements` elements of the run take in a snapshot."""
        return elements * DTYPES[self.dtype].bits // 8

    def out_size_of(self, elements: int) -> int:
        """Bytes that `elements` elements of the run take in an output."""
        return elements * DTYPES[self.out_dtype].bits // 8

    def chunks(
        self, most: Callable[[Segment], int], first: int = 0, last: int | None = None
    ) -> Iterator[Chunk]:
        """Elements `first` to `last` of the run, at most `most(run)` at a time."""
        last = self.bounds[-1] if last is None else last
        step = most(self)
        for start in range(first, last, step):
            yield Chunk(self, start, min(start + step, last))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements `first` to `last` (excluded) of a run."""

    run: Segment
    first: int
    last: int

    @property
    def elements(self) -> int:
        return self.last - self.first

    @property
    def bytes_each(self) -> int:
        """Bytes of the chunk in one snapshot."""
        return self.run.size_of(self.elements)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `synthesize` will do, whatever the weights.

    `snapshots` in the order in which they are summed; `layouts[i]` says which of a run's `starts`
    are snapshot i's. `tensors` maps each name of the output to its dtype and shape. `newest` is
    the index of the snapshot that copied tensors and metadata come from.
    """

    snapshots: tuple[Snapshot, ...]
    layouts: tuple[int, ...]
    newest: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    runs: tuple[Segment, ...]

    @property
    def bytes_to_read(self) -> int:
        """Bytes that will be read from all snapshots together."""
        count = len(self.snapshots)
        return sum(
            run.size_of(run.bounds[-1]) * (count if run.averaged else 1) for run in self.runs
        )

    @property
    def bytes_to_write(self) -> int:
        """Bytes of each output's data section."""
        return sum(run.out_size_of(run.bounds[-1]) for run in self.runs)

    def chunks(self, most: Callable[[Segment], int]) -> Iterator[Chunk]:
        """All the work, in the outputs' order, at most `most(run)` elements of each at a time."""
        for run in self.runs:
            yield from run.chunks(most)


def make_plan(
    snapshots: Sequence[Snapshot],
    *,
    dtype: str = "same",
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> Plan:
    """Plan the outputs of a consistent set of snapshots.

    `dtype` is "same" or a key of OUTPUT_DTYPES; `copy` and `drop` are globs of tensor names.
    Raises UsageError for a glob that no tensor matches, or when no tensor is left; SnapshotError
    for a tensor whose dtype has no average.
    """
    newest = max(range(len(snapshots)), key=lambda i: (snapshots[i].step, -i))
    source = snapshots[newest].index.tensors
    dropped = _matching(source, drop, "drop=")
    copied = _matching(source, copy, "copy=")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, info in source.items():
        if name in dropped:
            continue
        if info.dtype in UNAVERAGEABLE and name not in copied:
            raise SnapshotError(
                f"tensor {printable(name)}",
                f"its dtype {info.dtype} has no average",
                "take it from the newest snapshot with copy=, or leave it out with drop=",
            )
        tensors[name] = (_output_dtype(info, dtype), info.shape)
    if not tensors:
        raise UsageError("drop=", "leaves no tensor to write", "drop fewer")

    distinct: list[Mapping[str, TensorInfo]] = []
    layouts = []
    for snapshot in snapshots:
        mapping = snapshot.index.tensors
        known = next((k for k, other in enumerate(distinct) if other is mapping), None)
        if known is None:
            known = len(distinct)
            distinct.append(mapping)
        layouts.append(known)
    return Plan(
        snapshots=tuple(snapshots),
        layouts=tuple(layouts),
        newest=newest,
        tensors=tensors,
        runs=tuple(_runs(make_header(tensors, {})[1], source, distinct, copied)),
    )


def _matching(tensors: Mapping[str, TensorInfo], globs: Sequence[str], option: str) -> set[str]:
    matching: set[str] = set()
    for glob in globs:
        found = {name for name in tensors if fnmatch.fnmatchcase(name, glob)}
        if not found:
            raise UsageError(f"{option}'{glob}'", "matches no tensor", "see the names with inspect")
        matching |= found
    return matching


def _output_dtype(info: TensorInfo, wanted: str) -> str:
    if wanted == "same" or info.dtype not in AVERAGED or info.dtype == "C64":
        return info.dtype
    return OUTPUT_DTYPES[wanted]


def _runs(
    output: Mapping[str, TensorInfo],
    source: Mapping[str, TensorInfo],
    layouts: Sequence[Mapping[str, TensorInfo]],
    copied: set[str],
) -> Iterator[Segment]:
    """Join the output's tensors, in their order, into the longest possible runs."""
    names: list[str] = []
    kind: tuple[str, str, bool] | None = None
    ends: list[int] = []

    def run() -> Segment:
        assert kind is not None
        dtype, out_dtype, averaged = kind
        bounds = [0]
        for name in names:
            bounds.append(bounds[-1] + _elements(output[name]))
        if dtype == "C64":
            dtype = out_dtype = "F32"
        return Segment(
            names=tuple(names),
            bounds=tuple(bounds),
            dtype=dtype,
            out_dtype=out_dtype,
            averaged=averaged,
            starts=tuple(layout[names[0]].start for layout in layouts),
            out_start=output[names[0]].start,
        )

    for name, info in output.items():
        if info.start == info.end:
            continue  # no elements, nothing to do
        before = source[name].dtype
        averaged = before in AVERAGED and name not in copied
        if kind != (before, info.dtype, averaged) or ends != [o[name].start for o in layouts]:
            if names:
                yield run()
            names, kind = [], (before, info.dtype, averaged)
        names.append(name)
        ends = [layout[name].end for layout in layouts]
    if names:
        yield run()


def _elements(info: TensorInfo) -> int:
    """Elements as a run counts them: a complex number is two floats, packed formats go by bytes."""
    if info.dtype == "C64":
        return 2 * info.elements
    return (info.end - info.start) * 8 // DTYPES[info.dtype].bits
