"""A plan in parts, one a rank, for each of which as many bytes are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posthoc_cli.synthesis.kernels import STRIDE
from posthoc_cli.synthesis.plan import Chunk, Segment, TensorPlan


def parts_of(plan: TensorPlan, size: int) -> list[list[Chunk]]:
    """Which chunks are the part of each of `size` ranks: they follow each other in the outputs."""
    whole = plan.whole()
    counts = [plan.bytes_of(chunk) for chunk in whole]
    total, begin, rank = sum(counts), 0, 0
    parts: list[list[Chunk]] = [[] for _ in range(size)]
    for chunk, count in zip(whole, counts, strict=True):
        first = 0
        while first < chunk.elements:
            inside = total * (rank + 1) // size - begin
            last = chunk.elements
            if inside < count and rank < size - 1:
                last = last * inside // count // STRIDE * STRIDE  # packed ones begin at a byte
            if first < last:
                parts[rank].append(Chunk(chunk.segment, first, last))
                first = last
            rank += first < chunk.elements
        begin += count
    return parts


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


def varying(plan: TensorPlan, flags: Sequence[bytes]) -> Callable[[Segment, int], bool]:
    """Whether a tensor of a segment varies, from what an engine has as `varying`."""
    averaged = (segment for segment in plan.segments if segment.averaged)
    known = {id(segment): own for segment, own in zip(averaged, flags, strict=True)}
    return lambda segment, tensor: segment.averaged and bool(known[id(segment)][tensor])
