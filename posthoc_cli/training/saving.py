"""Tensors out of a training process and into a safetensors file, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.dtypes import BY_NAME
from posthoc_cli.storage.header import make_header
from posthoc_cli.training.averaging import gather, is_sharded


def code_of(dtype: torch.dtype) -> str | None:
    """safetensors' name for a dtype; None where it has none."""
    return BY_NAME.get(str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file to be: its value, the dtype to save it in, and the network's own tensor.

    `value` is sharded as `like` is.
    """

    value: Tensor
    dtype: torch.dtype
    like: Tensor

    @property
    def sharded(self) -> bool:
        return is_sharded(self.like)

    def on_host(self, *, copy: bool = False) -> Tensor:
        """The whole tensor in its final dtype, in host memory.

        Every process must call it if it is sharded.
        """
        whole = gather(self.value.detach(), self.like)
        return whole.to("cpu", self.dtype, copy=copy)


def stage(entries: Mapping[str, Entry], *, hold: bool) -> dict[str, Entry]:
    """`entries` copied to host memory, each once however many names it has.

    A process that doesn't `hold` the result takes part in gathering what is sharded, and gets
    nothing.
    """
    staged: dict[int, Entry] = {}
    result = {}
    for name, entry in entries.items():
        if not (hold or entry.sharded):
            continue
        if id(entry.value) not in staged:
            value = entry.on_host(copy=True)
            if not hold:
                continue
            staged[id(entry.value)] = Entry(value, entry.dtype, value)
        result[name] = staged[id(entry.value)]
    return result


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> list[str]:
    """Write `entries` to `path`, whole or not at all, replacing what is there.

    Tensors with several names are written under each, since the format has no shared ones.
    Returns the names of tensors with values that float16, if they are in it, made infinite.
    Raises MachineError when the disk is full or the folder can't be written.
    """
    header, places = make_header(
        {
            name: (code_of(entry.dtype) or "", tuple(entry.like.shape))
            for name, entry in entries.items()
        },
        metadata,
    )
    size = len(header) + max((info.end for info in places.values()), default=0)
    overflowing = []
    with AtomicFile(path, size, overwrite=True) as file:
        file.write_at(0, header)
        for name, info in places.items():
            if not info.elements:
                continue
            value = entries[name].on_host().contiguous().view(-1)
            # All exponent bits set: infinite or not a number. Torch's isfinite takes ten times
            # as long as the write.
            if value.dtype == torch.float16 and np.any(
                (value.view(torch.int16).numpy() & 0x7C00) == 0x7C00
            ):
                overflowing.append(name)
            file.write_at(len(header) + info.start, value.view(torch.uint8).numpy().data)
    return overflowing
