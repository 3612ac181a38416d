"""A plan in parts, one a rank, for each of which as many bytes are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posthoc_cli.synthesis.kernels import STRIDE
from posthoc_cli.synthesis.plan import Chunk, Segment, TensorPlan


def part_of(plan: TensorPlan, rank: int, size: int) -> list[Chunk]:
    """Which chunks are the part of one of `size` ranks: they follow each other in the outputs."""
    whole = plan.whole()
    bytes_of = [plan.bytes_of(chunk) for chunk in whole]
    first, last = (sum(bytes_of) * at // size for at in (rank, rank + 1))
    found, begin = [], 0
    for chunk, count in zip(whole, bytes_of, strict=True):
        low, high = (_element(chunk, count, at - begin) for at in (first, last))
        if low < high:
            found.append(Chunk(chunk.segment, low, high))
        begin += count
    return found


def between(plan: TensorPlan, first: int, last: int) -> list[Chunk]:
    """The chunks that bytes `first` to `last` of the outputs' data come from, whole tensors."""
    found = []
    for chunk in plan.whole():
        segment = chunk.segment
        size = segment.out_size_of(segment.elements)
        low, high = (
            segment.elements * min(max(at - segment.out_start, 0), size) // size
            for at in (first, last)
        )
        if low < high:
            found.append(Chunk(segment, low, high))
    return found


def _element(chunk: Chunk, count: int, at: int) -> int:
    """The element at byte `at` of the `count` that are read for a whole segment, or its nearer
    end; packed elements begin at a byte."""
    if at >= count:
        return chunk.elements
    return max(chunk.elements * at // count, 0) // STRIDE * STRIDE


def varying(plan: TensorPlan, flags: Sequence[bytes]) -> Callable[[Segment, int], bool]:
    """Whether a tensor of a segment varies, from what an engine has as `varying`."""
    averaged = (segment for segment in plan.segments if segment.averaged)
    known = {id(segment): own for segment, own in zip(averaged, flags, strict=True)}
    return lambda segment, tensor: segment.averaged and bool(known[id(segment)][tensor])
