"""LoRA networks: their `.alpha` tensors, which are no weights.

Trainers store the factors of each module, `X.lora_down.weight` and `X.lora_up.weight`, with
`X.alpha`, the scale of their product. It is set before training: checkpoints that differ in it are
of different networks, and their average would be of neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

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


def different_alphas(snapshots: Sequence[Snapshot]) -> Iterator[tuple[Snapshot, str]]:
    """Those of `snapshots` that have other alphas than the newest, and the first difference.

    Only the alphas are read. Raises what Reader does.
    """
    if not snapshots or not (names := sorted(alphas(snapshots[-1].index.tensors))):
        return
    newest = snapshots[-1].index
    with Reader(newest) as reader:
        wanted = {name: _read(reader, newest.tensors[name]) for name in names}
    for snapshot in snapshots[:-1]:
        tensors = snapshot.index.tensors
        with Reader(snapshot.index) as reader:
            for name in names:
                info = tensors.get(name)
                if info is None or info.dtype != newest.tensors[name].dtype:
                    continue  # tensors that aren't the same are told elsewhere
                here = _read(reader, info)
                if here != wanted[name]:
                    values = (_value(info.dtype, data) for data in (here, wanted[name]))
                    yield snapshot, "tensor '{}' is {} here and {}".format(name, *values)
                    break


def _read(reader: Reader, info: TensorInfo) -> bytes:
    data = bytearray(info.end - info.start)
    reader.read(info.start, memoryview(data))
    return bytes(data)


def _value(dtype: str, data: bytes) -> str:
    """The number that an alpha is, for people; its bytes where it is of a rare dtype."""
    if dtype in FLOATS:
        return f"{float(decode(dtype, np.frombuffer(data, np.uint8))[0]):.9g}"
    if dtype[0] in "IU":
        return str(np.frombuffer(data, DTYPES[dtype].numpy())[0])
    return f"0x{data[::-1].hex()}"
