"""Which output bytes come from which input bytes: the plan of a synthesis, apart from doing it.

A plan is plain data and opens no file. It can be split anywhere between chunks, and whoever carries
out a chunk needs nothing but the byte ranges it names.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import SnapshotError, UsageError, either, printable
from posthoc_cli.storage import TensorIndex, TensorInfo, fits_any, make_header
from posthoc_cli.storage.dtypes import (
    AVERAGED,
    DTYPES,
    FLOATS,
    OUTPUT_DTYPES,
    UNAVERAGEABLE,
    FloatArray,
    bytes_of,
    widest,
)
from posthoc_cli.synthesis.expansion import Terms, expand

Groups = Sequence[Sequence[str]]
"""Globs of the tensors of each group; of several that fit a tensor the last has it. Tensors that
none fits are of group 0, those of the first are of group 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tensors that follow each other without a gap in the output and in every snapshot.

    `bounds[k]` is the first element of tensor `names[k]` within the segment. `starts[l]` is the
    byte at which the segment begins in the data section of the sources with layout `l` (see
    `TensorPlan.layouts`), `out_start` in that of the outputs. A segment that is not `averaged` is
    copied from the newest source, and its other `starts` say nothing. Complex elements count as two
    floats. `stored` has the dtype of each layout, where they differ; `dtype` is the widest.
    `sources` are the places in the plan's of those that it is made of; `group` says which weights
    are theirs, as all its tensors are of one group. Of snapshots that are sums of files (see
    `expansion`), `weights` [snapshots, sources] are those of the files in each, and `exponents` has
    those of their scales where it is a sum of differences.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    dtype: str
    out_dtype: str
    averaged: bool
    starts: tuple[int, ...]
    out_start: int
    sources: Sequence[int]
    stored: tuple[str, ...] = ()
    group: int = 0
    weights: FloatArray | None = None
    exponents: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        return self.bounds[-1]

    def tensors_of(self, elements: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """The place in `names` of the tensor of each of the segment's `elements`."""
        return np.searchsorted(self.bounds, elements, side="right") - 1

    def size_of(self, elements: int) -> int:
        """Bytes that `elements` elements of the segment take in a snapshot."""
        return bytes_of(self.dtype, elements)

    def out_size_of(self, elements: int) -> int:
        """Bytes that `elements` elements of the segment take in an output."""
        return bytes_of(self.out_dtype, elements)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements `first` to `last` (excluded) of a segment."""

    segment: Segment
    first: int
    last: int

    @property
    def elements(self) -> int:
        return self.last - self.first

    @property
    def bytes_each(self) -> int:
        """Bytes of the chunk in one snapshot."""
        return self.segment.size_of(self.elements)

    @property
    def out_start(self) -> int:
        """The byte in the outputs' data section at which the chunk begins."""
        return self.segment.out_start + self.segment.out_size_of(self.first)

    def parts(self) -> Iterator[tuple[int, Chunk]]:
        """The chunk cut at the bounds of its tensors: each one's place in the segment, and part."""
        bounds = self.segment.bounds
        at = bisect.bisect_right(bounds, self.first) - 1
        while at < len(bounds) - 1 and bounds[at] < self.last:
            first, last = max(bounds[at], self.first), min(bounds[at + 1], self.last)
            yield at, Chunk(self.segment, first, last)
            at += 1

    def cut(self, most: int) -> Iterator[Chunk]:
        """The chunk in pieces of at most `most` elements."""
        for first in range(self.first, self.last, most):
            yield Chunk(self.segment, first, min(first + most, self.last))


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Which bytes make an output, whatever the weights.

    `sources` are the snapshots' tensors, in the order in which they are summed; `layouts[i]` says
    which of a segment's `starts` are source i's. `tensors` maps each name of the output to its
    dtype and shape. `newest` is the index of the source that copied tensors and metadata come from.
    Where snapshots are stored as differences, `sources` are the files, and `snapshots` are them.
    """

    sources: tuple[TensorIndex, ...]
    layouts: tuple[int, ...]
    newest: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    segments: tuple[Segment, ...]
    snapshots: tuple[TensorIndex, ...] = ()

    @property
    def bytes_to_read(self) -> int:
        """Bytes that will be read from all sources together."""
        return sum(self.bytes_of(chunk) for chunk in self.whole())

    @property
    def bytes_to_write(self) -> int:
        """Bytes of each output's data section."""
        return sum(segment.out_size_of(segment.elements) for segment in self.segments)

    def bytes_of(self, chunk: Chunk) -> int:
        """Bytes that a chunk has in all the sources that it is made of: in one dtype, unless they
        are differences."""
        segment = chunk.segment
        if not segment.exponents:
            return chunk.bytes_each * len(segment.sources)
        codes = Counter(self.stored(segment, source) for source in segment.sources)
        return sum(count * bytes_of(code, chunk.elements) for code, count in codes.items())

    def whole(self) -> list[Chunk]:
        """All the work, a chunk a segment, in the outputs' order."""
        return [Chunk(segment, 0, segment.elements) for segment in self.segments]

    def start_of(self, chunk: Chunk, source: int) -> int:
        """The byte in a source's data section at which a chunk begins."""
        before = bytes_of(self.stored(chunk.segment, source), chunk.first)
        return chunk.segment.starts[self.layouts[source]] + before

    def weights_of(self, segment: Segment, weights: FloatArray) -> FloatArray:
        """[targets, sources]: those of a segment's `sources` by the snapshots' `weights` [groups,
        targets, snapshots]."""
        own = weights[segment.group]
        found: FloatArray
        if segment.weights is None:
            found = own[:, list(segment.sources)]
            return found
        found = np.einsum("ts,sf->tf", own, segment.weights)
        return found * np.ldexp(1.0, segment.exponents) if segment.exponents else found

    def stored(self, segment: Segment, source: int) -> str:
        return segment.stored[self.layouts[source]] if segment.stored else segment.dtype


def make_plan(
    sources: Sequence[TensorIndex],
    newest: int,
    dtype: str = "same",
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
    without: Collection[str] = (),
    kept: Collection[str] = (),
    groups: Groups = (),
) -> TensorPlan:
    """Plan the outputs of a consistent set of snapshots, of which `newest` is the last.

    `dtype` is "same" or a key of OUTPUT_DTYPES; `copy` and `drop` are globs of tensor names, and
    so are those of `groups`, whose tensors have weights of their own. Of names, those of `without`
    are no part of the plan, and those `kept` are copied, too.
    Raises UsageError for a glob that no tensor matches, for an unknown dtype, or when no tensor is
    left; SnapshotError for a tensor whose dtype has no average.
    """
    tensors = sources[newest].tensors
    check_output_dtype(dtype)
    distinct = _distinct(sources)
    anywhere = dict.fromkeys(name for each in (tensors, *distinct) for name in each)
    dropped = _matching(anywhere, drop, "drop")
    copied = _matching(anywhere, copy, "copy") | {*kept}
    names = [name for name in tensors if name not in dropped and name not in without]
    for name in names:
        code = tensors[name].dtype
        if name in copied:
            continue
        if code in UNAVERAGEABLE:
            problem = f"its dtype {code} has no average"
        elif code in AVERAGED and not _can_be_summed([each.get(name) for each in distinct]):
            problem = "it is missing, or of another shape or dtype, in some of the snapshots"
        else:
            continue
        remedy = "take it from the newest snapshot with copy=, or leave it out with drop="
        raise SnapshotError(f"tensor {printable(name)}", problem, remedy)
    if not names and not without:
        raise UsageError("drop=", "leaves no tensor to write", "drop fewer")
    check_groups(tensors, groups, copied | dropped)
    return plan_tensors(sources, newest, names, copied, dtype, groups)


def plan_tensors(
    sources: Sequence[TensorIndex],
    newest: int,
    names: Iterable[str],
    copied: set[str],
    dtype: str,
    groups: Groups = (),
) -> TensorPlan:
    """The plan of an output with the tensors `names`, of which `copied` are not averaged."""
    source = sources[newest].tensors
    tensors = {name: (output_dtype(source[name], dtype), source[name].shape) for name in names}
    averaged = {
        name: group_of(name, groups)
        for name in tensors
        if source[name].dtype in AVERAGED and name not in copied
    }
    snapshots = tuple(sources)
    if any(each.links for each in sources):
        sources, newest, terms = expand(sources, newest, averaged)
    else:
        every = {group: Terms(group, range(len(sources))) for group in {*averaged.values()}}
        terms = {name: every[group] for name, group in averaged.items()}
    distinct = _distinct(sources)
    place = {id(tensors): at for at, tensors in enumerate(distinct)}
    layouts = tuple(place[id(each.tensors)] for each in sources)
    parts = _segments(make_header(tensors, {})[1], source, distinct, layouts, terms, newest)
    return TensorPlan(
        sources=tuple(sources),
        layouts=layouts,
        newest=newest,
        tensors=tensors,
        segments=tuple(parts),
        snapshots=snapshots,
    )


def group_of(name: str, groups: Groups) -> int:
    """Which of `groups`, counted from 1, a tensor is of: the last with a glob that fits, or 0."""
    return max((at for at, globs in enumerate(groups, 1) if fits_any(name, globs)), default=0)


def common_group(names: Iterable[str], groups: Groups) -> int | None:
    """The group of all `names`; None where they are of several."""
    own = {group_of(name, groups) for name in names}
    return own.pop() if len(own) == 1 else None


def averaged_in_groups(
    tensors: Mapping[str, TensorInfo], groups: Groups, left_out: Sequence[str]
) -> list[int]:
    """How many tensors of each of `groups` are averaged, without those that `left_out` fit."""
    counts = Counter(
        group_of(name, groups)
        for name, info in tensors.items()
        if info.dtype in AVERAGED and not fits_any(name, left_out)
    )
    return [counts[at] for at, _ in enumerate(groups, 1)]


def check_groups(
    tensors: Mapping[str, TensorInfo], groups: Groups, settled: Collection[str]
) -> None:
    """Raise UsageError for a glob of `groups` that fits no tensor that is averaged.

    `settled` are the tensors that are copied or dropped whatever their dtype.
    """
    for glob in itertools.chain.from_iterable(groups):
        fitting = _matching(tensors, [glob], "target_for")
        averaged = {name for name in fitting if tensors[name].dtype in AVERAGED}
        if averaged - {*settled}:
            continue
        if averaged:
            problem, remedy = "copy= or drop= has all tensors that it fits", "leave out one of them"
        else:
            name = min(fitting)
            problem = f"fits only tensors that have no average, such as '{printable(name)}', "
            problem += tensors[name].dtype
            remedy = "leave it out"
        raise UsageError(f"target_for='{glob}'", problem, remedy)


def _distinct(sources: Sequence[TensorIndex]) -> list[Mapping[str, TensorInfo]]:
    """The sources' layouts; those that share one share the very object."""
    return list({id(each.tensors): each.tensors for each in sources}.values())


def newest_of(steps: Sequence[float]) -> int:
    """The index of the last step; of several, the first."""
    return max(range(len(steps)), key=lambda at: (steps[at], -at))


def check_output_dtype(dtype: str) -> None:
    """Raise UsageError unless `dtype` is "same" or a key of OUTPUT_DTYPES."""
    if dtype != "same" and dtype not in OUTPUT_DTYPES:
        remedy = f"choose {either(['same', *OUTPUT_DTYPES])}"
        raise UsageError("dtype=", f"'{dtype}' is not known", remedy)


def _can_be_summed(there: Sequence[TensorInfo | None]) -> bool:
    """Whether what the snapshots have of a tensor is of one shape and kind."""
    forms = {info and (info.dtype, info.shape) for info in there}
    if len(forms) == 1:
        return None not in forms
    infos = [info for info in there if info is not None]
    floats = all(info.dtype in FLOATS for info in infos)
    return len(infos) == len(there) and floats and len({info.shape for info in infos}) == 1


def _matching(tensors: Iterable[str], globs: Sequence[str], argument: str) -> set[str]:
    """The tensors that one of `globs` fits; raises UsageError for a glob that fits none."""
    matching: set[str] = set()
    for glob in globs:
        found = {name for name in tensors if fits_any(name, [glob])}
        if not found:
            subject = f"{argument}='{glob}'"
            raise UsageError(subject, "matches no tensor", _such(tensors, glob))
        matching |= found
    return matching


def _such(tensors: Iterable[str], glob: str) -> str:
    """What to write in place of a glob that fits no name."""
    if any(fits_any(name, [f"*{glob}*"]) for name in tensors):
        return f"write '*{glob}*': a glob fits whole names"
    return f"give one that does; a name is '{printable(next(iter(tensors), ''))}'"


def output_dtype(info: TensorInfo, wanted: str) -> str:
    """The dtype of a tensor in an output for which `wanted` was asked."""
    if wanted == "same" or info.dtype not in AVERAGED or info.dtype == "C64":
        return info.dtype
    return OUTPUT_DTYPES[wanted]


def _segments(
    output: Mapping[str, TensorInfo],
    source: Mapping[str, TensorInfo],
    distinct: Sequence[Mapping[str, TensorInfo]],
    layouts: Sequence[int],
    terms: Mapping[str, Terms],
    newest: int,
) -> Iterator[Segment]:
    """Join the output's tensors, in their order, into the longest possible segments.

    Those of `terms` are sums; the others are copied from the `newest` source, which has `source`.
    """
    names: list[str] = []
    kind: tuple[tuple[str, ...], str, Terms | None] | None = None
    begin: list[int] = []
    ends: list[int] = []
    used: dict[Sequence[int], set[int]] = {}

    def places(name: str, own: Terms | None) -> list[TensorInfo]:
        """Where the tensor is in each layout; what is nowhere is at 0, without a dtype."""
        if own is None:
            return [source[name]] * len(distinct)
        if own.sources not in used:
            used[own.sources] = {layouts[at] for at in (*own.sources, newest)}
        here = used[own.sources]
        return [each[name] if at in here else _NOWHERE for at, each in enumerate(distinct)]

    def segment() -> Segment:
        assert kind is not None
        stored, out_dtype, own = kind
        dtype = widest(filter(None, stored))
        bounds = itertools.accumulate((_elements(output[name]) for name in names), initial=0)
        if dtype == "C64":
            dtype = out_dtype = "F32"
        return Segment(
            names=tuple(names),
            bounds=tuple(bounds),
            dtype=dtype,
            out_dtype=out_dtype,
            averaged=own is not None,
            starts=tuple(begin),
            out_start=output[names[0]].start,
            sources=own.sources if own else (newest,),
            stored=stored if len(set(stored)) > 1 else (),
            group=own.group if own else 0,
            weights=own.weights if own else None,
            exponents=own.exponents if own else (),
        )

    for name, info in output.items():
        if info.start == info.end:
            continue  # no elements, nothing to do
        own = terms.get(name)
        there = places(name, own)
        same = tuple(each.dtype for each in there), info.dtype, own
        starts = [each.start for each in there]
        if kind != same or ends != starts:
            if names:
                yield segment()
            names, kind, begin = [], same, starts
        names.append(name)
        ends = [each.end for each in there]
    if names:
        yield segment()


_NOWHERE = TensorInfo("", (), 0, 0)


def _elements(info: TensorInfo) -> int:
    """Elements as a segment counts them: a complex number is two, packed formats go by bytes."""
    if info.dtype == "C64":
        return 2 * info.elements
    return (info.end - info.start) * 8 // DTYPES[info.dtype].bits
