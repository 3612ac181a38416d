"""Reading what was written as differences back, tensor by tensor, beside what it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posthoc_cli.errors import SnapshotError, printable
from posthoc_cli.storage import TensorIndex
from posthoc_cli.storage.deltas import links_of
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, decode
from posthoc_cli.synthesis.bases import Bases
from posthoc_cli.synthesis.deltas import NewFile, ReadElements, Walk
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.values import (
    AT_ONCE,
    Bytes,
    Value,
    add,
    combine,
    elements,
    new_buffer,
    padded,
    parts,
)


def check_chain(
    made: Sequence[tuple[NewFile, TensorIndex, ReadElements]],
    outside: Bases | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Read files that `write_chain` has made back: raise SnapshotError unless each value is, up to
    the rounding of its own file, that of the snapshot.

    `made` has with each what lies there, and what reads its stored elements; the files that they
    are differences to `outside` has, or they are among them.
    """
    walk = Walk([new for new, _, _ in made], outside)

    def step(at: int, data: Bytes, before: list[Value]) -> Value:
        new, index, read = made[at]
        if progress is not None:
            progress(data.size)
        info, link = new.tensors[name], links_of(index)[-1]
        there = link.index.tensors.get(name)
        if there is None:
            value = before[0]
            right = walk.unchanged(info, data, value, info.dtype in FLOATS)
        else:
            stored = padded(there.dtype, count)
            read(name, first, stored)
            if not before or (exponent := link.exponent(name)) is None:
                right = there.dtype == info.dtype and np.array_equal(stored, data)
                value = Value(there.dtype, stored, None)
            else:
                bases = [
                    (c, each.minus(walk.buffer, count))
                    for (_, c), each in zip(new.bases, before, strict=True)
                ]
                right, rest, total = True, new_buffer(AT_ONCE), walk.buffer(count)
                for part in parts(count):
                    here, wanted = (
                        elements(there.dtype, stored, part),
                        elements(info.dtype, data, part),
                    )
                    minus = combine([(c, each[part]) for c, each in bases], total[part])
                    add(there.dtype, here, -(2.0**exponent), minus, total[part])
                    off = rest[: part.stop - part.start]
                    add(info.dtype, wanted, 1.0, total[part], off)
                    spacing = DTYPES[there.dtype].spacing(decode(there.dtype, here).astype(float))
                    within = np.abs(off) <= spacing * 2.0**exponent * (0.5 + 1e-6)
                    right = right and bool(within.all())
                value = Value(None, total.view(np.uint8), total)
        if not right:
            problem = f"tensor '{printable(name)}' is not what it was made of"
            raise SnapshotError(
                str(index.path), problem, "check the disk, remove the file, and pack again"
            )
        return value

    for name, info in made[0][0].tensors.items():
        for first, count in walk.pieces(info):
            walk.go(name, first, count, step)
    walk.check_unchanged()
