"""Tensors of checkpoints as an index: where their bytes lie, in order or to be put in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posthoc_cli.formats.checkpoint import Checkpoint
from posthoc_cli.formats.tensors import StoredTensor
from posthoc_cli.storage import Cache, Content, Part, Reader, TensorIndex, TensorInfo
from posthoc_cli.storage.blocks import Block, Blocks
from posthoc_cli.storage.deflated import Within
from posthoc_cli.storage.dtypes import DTYPES

Network = Mapping[str, StoredTensor]

_MOST_ALIKE = 8
"""Tables of tensors that are kept to be shared with files that lie alike."""


def make_index(
    path: Path,
    networks: Sequence[tuple[Checkpoint, Network]],
    metadata: Mapping[str, str],
    cache: Cache | None = None,
) -> TensorIndex:
    """The index of a network whose tensors lie in these checkpoints, a file each.

    Tensors that lie in their file as they are become places in one part of it; all others get a
    part with content. Of files that lie alike, `cache` lets the indexes share one table.
    """
    known = cache.get("laid") if cache is not None and len(networks) == 1 else None
    if known is not None and _same(known[0], networks[0][1]):
        index = _laid_again(path, *networks[0], metadata, known)
        if index is not None:
            return index
    parts: list[Part] = []
    tensors: dict[str, TensorInfo] = {}
    first = 0
    for at, (_, network) in enumerate(networks):
        plain = {name: one for name, one in network.items() if _lies_in_order(one)}
        base = min((one.offset for one in plain.values()), default=0)
        end = max((one.offset + one.bytes for one in plain.values()), default=0)
        parts.append(Part(first, end - base, base, at))
        shift = first - base
        first += end - base
        places: dict[tuple[int, int, tuple[int, ...], tuple[int, ...], str], int] = {}
        for name, one in network.items():
            if name in plain:
                start = one.offset + shift
            else:
                key = id(one.storage), one.start, one.shape, one.strides, one.dtype
                if key not in places:  # tied tensors are one
                    places[key] = first
                    parts.append(Part(first, one.bytes, 0, content=_content(one, at)))
                    first += one.bytes
                start = places[key]
            tensors[name] = TensorInfo(one.dtype, one.shape, start, start + one.bytes)
    digests = b"".join(checkpoint.structure for checkpoint, _ in networks)
    files = tuple(checkpoint.file for checkpoint, _ in networks)
    shared = _shared(tensors, cache)
    if len(parts) == 1 and cache is not None:
        storages = [one.storage for one in networks[0][1].values()]
        offsets = [storage.offset - parts[0].data_start for storage in storages]
        cache["laid"] = networks[0][1], offsets, shared, parts[0]
    return TensorIndex(path, shared, metadata, files, tuple(parts), digests)


def _same(one: Network, other: Network) -> bool:
    """Whether two networks have the same tensors at the same places of storages that lie as they
    are; those of two files often are the very same objects."""
    return one is other or (
        [*one] == [*other]
        and all(
            a is b
            or (a.dtype, a.shape, a.strides, a.start) == (b.dtype, b.shape, b.strides, b.start)
            for a, b in zip(one.values(), other.values(), strict=True)
        )
    )


def _laid_again(
    path: Path, checkpoint: Checkpoint, network: Network, metadata: Mapping[str, str], known: Any
) -> TensorIndex | None:
    """The index of a file with the same network as the one before, if it lies alike."""
    _, before, tensors, part = known
    storages = [one.storage for one in network.values()]
    if any(storage.swapped or storage.content is not None for storage in storages):
        return None
    offsets = [storage.offset for storage in storages]
    base = offsets[0] - before[0] if offsets else 0
    if base < 0 or [offset - base for offset in offsets] != before:
        return None
    parts = (replace(part, data_start=base),)
    return TensorIndex(path, tensors, metadata, (checkpoint.file,), parts, checkpoint.structure)


def _lies_in_order(tensor: StoredTensor) -> bool:
    storage = tensor.storage
    return storage.content is None and not storage.swapped and tensor.contiguous


def _content(tensor: StoredTensor, file: int) -> Content:
    """What gives the elements of a tensor in their order, the bytes of each little-endian."""
    storage, itemsize = tensor.storage, DTYPES[tensor.dtype].bits // 8
    inside = storage.content is not None
    zeros = (0,) * len(tensor.shape)
    offset = tensor.start if inside else tensor.offset
    block = Block(zeros, tensor.shape, tensor.strides, offset, 0 if inside else file)
    unit = itemsize // 2 if tensor.dtype.startswith("C") else itemsize
    blocks = Blocks(tensor.shape, itemsize, (block,), swapped=unit if storage.swapped else 0)
    if storage.content is None:
        return blocks
    return Within(blocks, replace(storage.content, file=file))


def _shared(tensors: dict[str, TensorInfo], cache: Cache | None) -> Mapping[str, TensorInfo]:
    if cache is None:
        return tensors
    alike: list[Mapping[str, TensorInfo]] = cache.setdefault("alike", [])
    for known in reversed(alike):
        if len(known) == len(tensors) and known == tensors and [*known] == [*tensors]:
            return known
    alike.append(tensors)
    del alike[:-_MOST_ALIKE]
    return tensors


def read_elements(checkpoint: Checkpoint, tensor: StoredTensor, count: int) -> bytes:
    """The bytes of the first `count` elements of a tensor; raises what Reader does."""
    index = make_index(checkpoint.path, [(checkpoint, {"": tensor})], {})
    (info,) = index.tensors.values()
    data = bytearray(min(count * DTYPES[tensor.dtype].bits // 8, info.end - info.start))
    with Reader(index) as reader:
        reader.read(info.start, memoryview(data))
    return bytes(data)
