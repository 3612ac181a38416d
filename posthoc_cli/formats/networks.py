"""Networks in the files of any format: `READERS` is the table of the formats that there are."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from posthoc_cli.errors import NoNetworkError, SnapshotError
from posthoc_cli.formats.checkpoint import Checkpoint, auxiliary, place_of, tensor_lists
from posthoc_cli.formats.distributed import is_distributed, read_distributed
from posthoc_cli.formats.files import (
    INDEX,
    list_checkpoints,
    may_be_other,
    of_training,
    preferred,
    shards_of,
    without_ending,
)
from posthoc_cli.formats.laying import Network, make_index
from posthoc_cli.formats.ranks import is_in_ranks, refuse
from posthoc_cli.formats.tools import counter_of, kind_of, network_tensors, stated_profile
from posthoc_cli.formats.torchfile import read_checkpoint
from posthoc_cli.storage import Cache, TensorIndex, open_tensors
from posthoc_cli.storage.metadata import COUNTED, FORMAT, PLACE, STEP, TOOL
from posthoc_cli.storage.shards import find_network
from posthoc_cli.storage.stores import exists, is_folder, list_folder, open_file

_MAX_INDEX = 256 << 20


@dataclass(frozen=True, slots=True)
class How:
    """How checkpoints of other tools are read.

    `key` is where in one the network is (see `state_dict`), `tool` one of KINDS, or "auto" for what
    its contents say. Safetensors files have neither.
    """

    key: str | None = None
    tool: str = "auto"


AS_USUAL = How()


class Reader(NamedTuple):
    """A format: whether what lies at a path is of it, and what reads that."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, How, Cache | None], TensorIndex]


def open_network(path: Path, how: How = AS_USUAL, cache: Cache | None = None) -> TensorIndex:
    """The index of the network at `path`: a file of any format, an index of shards, or a folder.

    What a checkpoint says of itself is in the metadata. `cache` lets calls share what is the same.
    Raises NoNetworkError for a file that holds something else, SnapshotError for what is broken, or
    where several networks are to choose from, MachineError for what can't be read.
    """
    for reader in READERS:
        if reader.recognises(path):
            return reader.read(path, how, cache)
    return open_tensors(path, cache)


def is_there(path: Path) -> bool:
    """Whether anything is at `path`, or the shards whose index it would be."""
    return exists(path) or (_is_index(path) and bool(shards_of(path)))


def find_checkpoint(folder: Path) -> str | None:
    """The name of the one network in `folder` that is a checkpoint of torch, if there is one and
    no safetensors file."""
    names = [name for name in list_folder(folder) if not name.startswith(".")]
    if find_network(folder) is not None:
        return None
    found = [
        name
        for name in list_checkpoints(names)
        if not of_training(name) and not is_folder(folder / name)
    ]
    found = preferred(found)
    return found[0] if len(found) == 1 else None


def _is_folder(path: Path) -> bool:
    return is_folder(path) and find_checkpoint(path) is not None


def _read_folder(path: Path, how: How, cache: Cache | None) -> TensorIndex:
    inside = find_checkpoint(path) or ""
    return dataclasses.replace(open_network(path / inside, how, cache), path=path)


def _is_file(path: Path) -> bool:
    return without_ending(path.name) is not None and not path.name.endswith(INDEX)


def _read_file(path: Path, how: How, cache: Cache | None) -> TensorIndex:
    return _network(path, [path], {}, how, cache)


def _is_index(path: Path) -> bool:
    return path.name.endswith(INDEX) and without_ending(path.name) is not None


def _read_shards(path: Path, how: How, cache: Cache | None) -> TensorIndex:
    paths = shards_of(path)
    places = _weight_map(path) if exists(path) else {}
    if places:
        paths = [path.with_name(name) for name in sorted(set(places.values()))]
    return _network(path, paths, places, how, cache)


def _read_distributed(path: Path, how: How, cache: Cache | None) -> TensorIndex:
    return read_distributed(path, how.key, cache)


READERS = (
    Reader(is_distributed, _read_distributed),
    Reader(is_in_ranks, lambda path, how, cache: refuse(path)),
    Reader(_is_index, _read_shards),
    Reader(_is_file, _read_file),
    Reader(_is_folder, _read_folder),
)
"""The formats, but for safetensors, which all else is taken for; the first that fits reads it."""


def _network(
    path: Path, paths: Sequence[Path], places: Mapping[str, str], how: How, cache: Cache | None
) -> TensorIndex:
    """The index of the network in one file, or in several; `places` says which tensor is where."""
    single = len(paths) == 1
    networks = []
    checkpoint = None
    for each in paths:
        part = _checkpoint(each, cache if single else None)
        shared = single and cache is not None and cache.get("auxiliary") is part.root
        reason = auxiliary(part) if single and how == AS_USUAL and not shared else None
        if reason is not None:
            raise NoNetworkError(str(path), reason, "leave it out")
        if single and cache is not None:
            cache["auxiliary"] = part.root  # known to be none
        kind = how.tool
        if kind == "auto":
            kind = kind_of(part) if how.key is None and single else "torch"
        checkpoint = checkpoint or part
        networks.append((part, _tensors(part, kind, how, cache if single else None)))
    assert checkpoint is not None
    if not single:
        networks = _together(path, networks, places)
    metadata = {FORMAT: "pt", TOOL: kind}
    if kind != "edm2" and (place := how.key or place_of(*networks[0])) != ".":
        metadata[PLACE] = place
    if kind in ("torch", "posthoc-ema") or how.key not in (None, "."):
        metadata |= stated_profile(checkpoint)
    if kind == "posthoc-ema":  # whose own counter starts when its averages do
        metadata.pop(STEP, None)
        metadata[COUNTED] = counter_of(checkpoint)
    return make_index(path, networks, metadata, cache)


def _checkpoint(path: Path, cache: Cache | None) -> Checkpoint:
    try:
        return read_checkpoint(path, cache)
    except SnapshotError as error:
        if may_be_other(path.name) and error.problem.startswith(("neither a", "is a tar archive")):
            raise NoNetworkError(str(path), error.problem, "leave it out") from None
        raise


def _tensors(part: Checkpoint, kind: str, how: How, cache: Cache | None) -> Network:
    """The network's tensors; of files with the same pickle they are looked for once."""
    key = "network", kind, how
    root, shared = (cache or {}).get(key, (None, None))
    if root is not None and root is part.root:
        found: Network = shared
        return found
    tensors = network_tensors(part, kind, how.key, sure=how.tool != "auto")
    if cache is not None and not tensor_lists(part, "shadow_params"):  # named by what lies beside
        cache[key] = part.root, tensors
    return tensors


def _together(
    path: Path, networks: list[tuple[Checkpoint, Network]], places: Mapping[str, str]
) -> list[tuple[Checkpoint, Network]]:
    """The tensors of each shard, without those that the index gives to another.

    Raises SnapshotError where shards and index don't fit, or where two shards have one tensor.
    """
    kept: list[tuple[Checkpoint, Network]] = []
    seen: set[str] = set()
    for part, network in networks:
        own = part.path.name
        network = {n: one for n, one in network.items() if places.get(n, own) == own}
        if twice := seen & network.keys():
            raise SnapshotError(
                str(part.path),
                f"has '{min(twice)}', which another of its shards has too",
                "copy the shards of one checkpoint, with their index, again",
            )
        seen |= network.keys()
        kept.append((part, network))
    if lacking := places.keys() - seen:
        raise SnapshotError(
            str(path),
            f"has '{min(lacking)}', which none of its shards has",
            "copy the shards again, with their index",
        )
    return kept


def _weight_map(index: Path) -> dict[str, str]:
    """Which of a checkpoint's files has which tensor; raises SnapshotError for no such index."""
    with open_file(index) as (file, status):
        data = file.read(_MAX_INDEX) if status.size <= _MAX_INDEX else b""
    try:
        places = json.loads(data)["weight_map"]
        for name in places.values():
            if not isinstance(name, str) or name != os.path.basename(name):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SnapshotError(
            str(index), "is not an index of shards", "copy it again, or remove it"
        ) from None
    return dict(places)
