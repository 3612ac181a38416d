"""LoRA networks: their `.alpha` tensors, which are no weights.

Trainers store the factors of each module, `X.lora_down.weight` and `X.lora_up.weight`, with
`X.alpha`, the scale of their product. It is set before training: checkpoints that differ in it are
of different networks, and their average would be of neither.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from posthoc_cli.snapshots.majority import most
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.storage import Reader, TensorInfo
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, decode

_FACTOR = re.compile(r"\.(?:lora|hada|lokr|b?oft|glora|dora)[._]")
"""What follows a module's name in those of its factors, by all trainers that store an alpha."""

_ALPHA = ".alpha"


def alphas(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names of a LoRA's alphas: one number each, beside the factors of a module."""
    modules = {name[: match.start()] for name in tensors if (match := _FACTOR.search(name))}
    return [
        name
        for name, info in tensors.items()
        if name.endswith(_ALPHA) and info.elements == 1 and name[: -len(_ALPHA)] in modules
    ]


def different_alphas(
    snapshots: Sequence[Snapshot], settled: Sequence[str] = ()
) -> Iterator[tuple[Snapshot, str]]:
    """Those of `snapshots` that have other alphas than most, and the first difference.

    Only the alphas are read, and of these none that a glob `settled` fits. Raises what Reader does.
    """
    if len(snapshots) < 2:
        return
    names = [
        name
        for name in sorted(alphas(snapshots[-1].index.tensors))
        if not any(fnmatch.fnmatchcase(name, glob) for glob in settled)
    ]
    if not names:
        return
    groups: dict[tuple[str | None, ...], list[Snapshot]] = {}
    for snapshot in snapshots:
        tensors = snapshot.index.tensors
        with Reader(snapshot.index) as reader:
            # Tensors that aren't the same are told elsewhere.
            found = tuple(
                _value(tensors[name].dtype, _read(reader, tensors[name]))
                if name in tensors and tensors[name].elements == 1
                else None
                for name in names
            )
        groups.setdefault(found, []).append(snapshot)
    place, where = most(list(groups.values()), snapshots[-1])
    right = list(groups)[place]
    for found, group in groups.items():
        for name, here, there in zip(names, found, right, strict=True):
            if here is not None and there is not None and here != there:
                for snapshot in group:
                    yield snapshot, f"tensor '{name}' is {here} here and {there} {where}"
                break


def _read(reader: Reader, info: TensorInfo) -> bytes:
    data = bytearray(info.end - info.start)
    reader.read(info.start, memoryview(data))
    return bytes(data)


def _value(dtype: str, data: bytes) -> str:
    """The number that an alpha is, for people; its bytes where it is of a rare dtype."""
    if dtype in FLOATS:
        value = float(decode(dtype, np.frombuffer(data, np.uint8))[0])
        return f"{value:.9g}" if float(f"{value:.9g}") == value else repr(value)
    if dtype[0] in "IU":
        return str(np.frombuffer(data, DTYPES[dtype].numpy())[0])
    return f"0x{data[::-1].hex()}"
