"""Networks in several files: Hugging Face's shards with an index, and folders that hold one.

Shards are safetensors files, and the index beside them, `<name>.safetensors.index.json`, says in
its `weight_map` which of them each tensor is in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.errors import (
    IncompleteError,
    MachineError,
    PosthocError,
    SnapshotError,
    UsageError,
    printable,
)
from posthoc_cli.storage.header import (
    MAX_HEADER,
    Cache,
    TensorIndex,
    TensorInfo,
    check_items,
    read_header,
    reason,
)
from posthoc_cli.synthesis.recipe import read_recipe

ENDING = ".safetensors"
"""Of the files that count, in capitals too."""

INDEX_ENDING = ".safetensors.index.json"


def is_index(name: str) -> bool:
    return name.lower().endswith(INDEX_ENDING)


def index_of_shard(path: Path) -> Path | None:
    """The index beside the file `path` that lists it as a shard, if there is one."""
    stem = re.sub(r"-[0-9]{5}-of-[0-9]{5}\Z", "", path.name[: -len(ENDING)])
    index = path.with_name(stem + INDEX_ENDING)
    with contextlib.suppress(PosthocError):
        if os.path.exists(index) and path.name in shard_names(index):
            return index
    return None


def open_tensors(path: Path, cache: Cache | None = None) -> TensorIndex:
    """The layout of a safetensors file, of the shards of an index, or of a folder with either.

    Raises what read_header does, and SnapshotError for an index that makes no sense or a folder
    that doesn't hold one network.
    """
    if os.path.isdir(path):
        inside = find_network(path)
        if inside is None:
            raise SnapshotError(
                str(path),
                f"a folder that doesn't hold exactly one {ENDING} file, or index of shards",
                "give the file itself",
            )
        return dataclasses.replace(open_tensors(path / inside, cache), path=path)
    if is_index(path.name):
        return _read_index(path, cache)
    return read_header(path, cache)


def find_network(folder: Path) -> str | None:
    """The name of the one safetensors file in `folder`, or of the one index; None without one.

    Raises OSError for a folder that can't be listed.
    """
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    indexes = [name for name in names if is_index(name)]
    files = [name for name in names if name.lower().endswith(ENDING)]
    found = indexes or files
    if len(found) != 1:
        return None
    if indexes and indexes[0][: -len(".index.json")] in files:
        return None  # a whole file and its shards: which of the two is meant?
    return found[0]


def shard_names(index: Path) -> set[str]:
    """The names of the shards that `index` lists.

    Raises SnapshotError for an index that makes no sense, MachineError for one that can't be read.
    """
    return set(_weight_map(index, _parse_index(index)).values())


def _parse_index(path: Path) -> dict[str, Any]:
    try:
        if not os.path.isfile(path):
            raise SnapshotError(str(path), "not a regular file", "leave it out with only=")
        with open(path, "rb") as file:
            text = file.read(MAX_HEADER + 1)
        if len(text) > MAX_HEADER:
            raise ValueError("it is too long")
        check_items(path, text)
        document = json.loads(text.decode())  # from bytes, it lets half a surrogate pair pass
        if rb"\u" in text:
            json.dumps(document, ensure_ascii=False).encode()  # and as an escape
    except OSError as error:
        raise MachineError(
            str(path), f"cannot be read ({reason(error)})", "check the file and its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _senseless(path, str(error)) from None
    if not isinstance(document, dict):
        raise _senseless(path, "not an object")
    return document


def _weight_map(path: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> shard; every name of a shard is that of a file beside the index."""
    found = document.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise _senseless(path, "no weight_map")
    for shard in set(map(str, found.values())):
        plain = shard == os.path.basename(shard) and "\\" not in shard and "\0" not in shard
        if not plain or not shard.lower().endswith(ENDING):
            raise _senseless(path, f"'{shard}' is no name of a shard")
    return {str(tensor): str(shard) for tensor, shard in found.items()}


def _senseless(path: Path, detail: str) -> SnapshotError:
    return SnapshotError(
        str(path), f"not an index of shards ({detail})", "copy it again or leave it out"
    )


def _read_index(path: Path, cache: Cache | None) -> TensorIndex:
    document = _parse_index(path)
    weight_map = _weight_map(path, document)
    shards = []
    for name in sorted(set(weight_map.values())):
        if not os.path.lexists(path.with_name(name)):
            raise IncompleteError(
                str(path), f"its shard '{name}' is missing", "copy it again or leave it out"
            )
        shards.append(read_header(path.with_name(name), cache))
    key = tuple(id(shard.tensors) for shard in shards)  # alive as long as the cache that has them
    tensors = cache.get(key) if cache is not None else None
    if tensors is None:
        tensors = _joined(path, shards)
        if cache is not None:
            cache[key] = tensors
    where = {name: shard.path.name for shard in shards for name in shard.tensors}
    for name in sorted(where.keys() | weight_map.keys()):
        if where.get(name) != weight_map.get(name):
            raise SnapshotError(
                str(path),
                f"tensor '{name}' is in {_shard(where, name)}, but by the index in "
                f"{_shard(weight_map, name)}",
                "copy index and shards again, together",
            )
    metadata: dict[str, str] = {}
    for shard in reversed(shards):
        metadata |= shard.metadata
    stated = document.get("metadata")
    if isinstance(stated, dict):
        metadata |= {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in stated.items()
            if isinstance(value, (str, int, float)) and not key.startswith("total_")
        }
    first, parts = 0, []
    for shard in shards:
        parts.append(dataclasses.replace(shard.parts[0], first=first))
        first += shard.parts[0].length
    return TensorIndex(path, tensors, metadata, tuple(parts))


def _shard(where: Mapping[str, str], name: str) -> str:
    return f"'{printable(where[name])}'" if name in where else "none"


def _joined(path: Path, shards: Sequence[TensorIndex]) -> dict[str, TensorInfo]:
    """The tensors of all shards, their data sections thought to lie end to end."""
    joined: dict[str, TensorInfo] = {}
    first = 0
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in joined:
                raise SnapshotError(
                    str(path), f"tensor '{name}' is in two shards", "leave one of the two out"
                )
            joined[name] = dataclasses.replace(info, start=first + info.start, end=first + info.end)
        first += shard.parts[0].length
    return joined


# Outputs in shards


def split(tensors: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    """The names of each shard's tensors: in their order, at most `most` bytes of data together.

    A tensor larger than that gets a shard of its own.
    """
    shards: list[list[str]] = []
    size = 0
    for name, info in tensors.items():
        length = info.end - info.start
        if not shards or size + length > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


def shard_paths(path: Path, count: int) -> list[Path]:
    """`a.safetensors` -> `a-00001-of-00003.safetensors` and so on, as Hugging Face names them."""
    stem = path.name[: -len(ENDING)]
    return [
        path.with_name(f"{stem}-{at:05d}-of-{count:05d}{path.suffix}") for at in range(1, count + 1)
    ]


def index_path(path: Path) -> Path:
    """`a.safetensors` -> `a.safetensors.index.json`."""
    return path.with_name(path.name + ".index.json")


def make_index(shards: Sequence[tuple[Path, Sequence[str]]], size: int) -> bytes:
    """The index of `shards`, each a path and the names of its tensors; `size` is their bytes."""
    weight_map = {name: path.name for path, names in shards for name in names}
    document = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def standing(path: Path) -> list[Path]:
    """What is there of an output `path`: the file itself, or the index of its shards."""
    return [name for name in (path, index_path(path)) if os.path.lexists(name)]


def made_by_posthoc(path: Path) -> bool:
    """Whether `path` is an output of ours, a shard or an index of one."""
    try:
        return read_recipe(open_tensors(path).metadata) is not None
    except PosthocError:
        return False


def replaced(path: Path, files: Sequence[Path], overwrite: bool) -> list[Path]:
    """What has to go when output `path` lands as `files`: what else stands for it.

    That is the file or the index of the output before it and that one's shards; and shards of ours
    without an index, which a run that was killed has left. Raises UsageError when there is an
    output and `overwrite` is false.
    """
    found = standing(path)
    if found and not overwrite:
        raise UsageError(
            str(found[0]),
            "exists already",
            "use force=True to replace it or skip_existing=True to keep it",
        )
    stale = [name for name in found if name not in files]
    shard = re.compile(re.escape(path.name[: -len(ENDING)]) + rf"-[0-9]{{5}}-of-[0-9]{{5}}{ENDING}")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if shard.fullmatch(name) and made_by_posthoc(path.with_name(name)):
                stale.append(path.with_name(name))
    return stale
