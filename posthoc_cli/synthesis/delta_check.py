"""Reading what was written as differences back, tensor by tensor, beside what it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from posthoc_cli.errors import SnapshotError, printable
from posthoc_cli.storage import TensorIndex
from posthoc_cli.storage.deltas import links_of
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, decode
from posthoc_cli.synthesis.bases import (
    AT_ONCE,
    Base,
    Bytes,
    Value,
    add,
    elements,
    new_buffer,
    padded,
    parts,
)
from posthoc_cli.synthesis.deltas import NewFile, ReadElements, Walk
from posthoc_cli.synthesis.engine import Progress


def check_chain(
    made: Sequence[tuple[NewFile, TensorIndex, ReadElements]],
    bases: Mapping[Path, Base],
    *,
    progress: Progress | None = None,
) -> None:
    """Read files that `write_chain` has made back: raise SnapshotError unless each value is, up to
    the rounding of its own file, that of the snapshot.

    `made` has with each what lies there, and what reads its stored elements; the files that they
    are differences to are `bases`, or among them.
    """
    walk = Walk([new for new, _, _ in made], bases)

    def step(at: int, data: Bytes, base: Value | None) -> Value:
        new, index, read = made[at]
        if progress is not None:
            progress(data.size)
        info, link = new.tensors[name], links_of(index)[-1]
        there = link.index.tensors.get(name)
        value = base
        if there is None and base is not None:
            # But for the signs of zeros it is what the base is.
            right = base.same(info.dtype, data, slice(0, count)) or (
                info.dtype in FLOATS and walk.difference(info, data, base) == 0
            )
        else:
            assert there is not None
            stored = padded(there.dtype, count)
            read(name, first, stored)
            if base is None or (exponent := link.exponent(name)) is None:
                right = there.dtype == info.dtype and np.array_equal(stored, data)
                value = Value(there.dtype, stored, None)
            else:
                minus, total = base.minus(walk.buffer, count), walk.buffer(count)
                right, rest = True, new_buffer(AT_ONCE)
                for part in parts(count):
                    here, wanted = (
                        elements(there.dtype, stored, part),
                        elements(info.dtype, data, part),
                    )
                    add(there.dtype, here, -(2.0**exponent), minus[part], total[part])
                    off = rest[: part.stop - part.start]
                    add(info.dtype, wanted, 1.0, total[part], off)
                    spacing = DTYPES[there.dtype].spacing(decode(there.dtype, here).astype(float))
                    odd = ~(np.abs(off) <= spacing * 2.0**exponent * (0.5 + 1e-6))
                    if odd.any():  # an infinity that has stayed where it was is no difference
                        values = decode(info.dtype, wanted)[odd]
                        same = np.array_equal(-total[part][odd], values, equal_nan=True)
                        right = right and same and not np.isfinite(values).any()
                value = Value(None, total.view(np.uint8), total)
        if not right:
            problem = f"tensor '{printable(name)}' is not what it was made of"
            raise SnapshotError(str(index.path), problem, "check the disk, and pack it anew")
        assert value is not None
        return value

    for name, info in made[0][0].tensors.items():
        for first, count in walk.pieces(info):
            walk.go(name, first, count, step)
    walk.check_unchanged()
