"""Networks in several files: Hugging Face's shards with an index, and folders that hold one.

Shards are safetensors files. The index beside them, `<name>.safetensors.index.json`, says in its
`weight_map` in which of them each tensor is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from posthoc_cli.errors import (
    IncompleteError,
    PosthocError,
    SnapshotError,
    UsageError,
    printable,
)
from posthoc_cli.storage.deltas import is_delta, open_chain
from posthoc_cli.storage.disk import already_exists
from posthoc_cli.storage.header import (
    MAX_HEADER,
    Cache,
    Part,
    TensorIndex,
    TensorInfo,
    check_items,
    read_header,
)
from posthoc_cli.storage.manifest import read_manifest
from posthoc_cli.storage.metadata import read_recipe
from posthoc_cli.storage.stores import exists, is_file, is_folder, list_folder, open_file

ENDING = ".safetensors"
"""Of safetensors files, in capitals too."""

INDEX_ENDING = ".safetensors.index.json"

_NUMBER = "-[0-9]{5}-of-[0-9]{5}"
"""What the name of a shard has before its ending."""

_SHARD = re.compile(r"(?is)(.*)-[0-9]{5}-of-([0-9]{5})\.safetensors")

_WELL_KNOWN = re.compile(
    r"(?i)(?:model(?:_[0-9]+)?|pytorch_model|diffusion_pytorch_model|pytorch_lora_weights"
    r"|adapter_model)\.safetensors(?:\.index\.json)?"
)
"""What Hugging Face's libraries call a network in a folder; accelerate counts several."""

_TRAINING_STATE = re.compile(
    r"(?i)(?:optim(?:izer)?|(?:lr[-_]?)?scheduler|random[-_]states?|rng|(?:grad[-_]?)?scaler"
    r"|train(?:ing|er)[-_]state|custom_checkpoint|sampler|dl_state_dict)(?:[-_]?states?)?(?:[-_.]?(?:rank|of|[0-9]+))*"
)


def is_index(name: str) -> bool:
    return name.lower().endswith(INDEX_ENDING)


def index_of_shard(path: Path) -> Path | None:
    """The index beside the file `path` that lists it as a shard, if there is one."""
    stem = re.sub(_NUMBER + r"\Z", "", path.name[: -len(ENDING)])
    index = path.with_name(stem + INDEX_ENDING)
    with contextlib.suppress(PosthocError):
        if exists(index) and path.name in shard_names(index):
            return index
    return None


def open_tensors(path: Path, cache: Cache | None = None) -> TensorIndex:
    """The tensor index of a safetensors file, of an index's shards, or of a folder with either:
    one that posthoc made may hold other networks as well.

    Raises what read_header does, and SnapshotError for an index that makes no sense or a folder
    that doesn't hold one network.
    """
    if is_folder(path):
        manifest = read_manifest(path)
        inside = manifest["weights"] if manifest else None
        if inside is None or not exists(path / inside):
            inside = find_network(path)
        if inside is None:
            raise SnapshotError(
                str(path),
                f"a folder that doesn't hold exactly one {ENDING} file, or index of shards",
                "give the file itself",
            )
        return dataclasses.replace(open_tensors(path / inside, cache), path=path)
    if is_index(path.name):
        if not exists(path) and path.name in list_networks(path.parent)[1]:
            raise IncompleteError(
                str(path),
                "there are shards, but the index that lists them isn't",
                "wait until it is written, copy it too, or leave the shards out",
            )
        return _read_index(path, cache)
    index = read_header(path, cache)
    return open_chain(path, index, cache) if is_delta(index.metadata) else index


def find_network(folder: Path) -> str | None:
    """The name of the one network in `folder`: of its file, or of its index, there or not yet.

    None where there isn't exactly one, not even by well-known names. Raises what list_folder does.
    """
    found = preferred([name for names in list_networks(folder) for name in names])
    return found[0] if len(found) == 1 else None


def list_networks(folder: Path, names: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Which of `names` in `folder`, by default all, are a network each: files and indexes.

    An index stands for its shards; the second list has those that should be there, as shards are,
    but aren't. Training states are no networks. Raises what list_folder does.
    """
    if names is None:
        names = [name for name in list_folder(folder) if not name.startswith(".")]
    indexes = [name for name in names if is_index(name)]
    missing: dict[str, None] = {}
    files = []
    for name in names:
        if not name.lower().endswith(ENDING) or is_training_state(name):
            continue
        shard = _SHARD.fullmatch(name)
        if shard is None or int(shard[2]) == 1:  # the only one needs no index
            files.append(name)
        elif shard[1] + INDEX_ENDING not in indexes:
            missing[shard[1] + INDEX_ENDING] = None
    listed: set[str] = set()
    if indexes and (files or missing):  # whose shards may have names of another kind
        for index in indexes:
            with contextlib.suppress(PosthocError):  # raised again when it is opened
                listed |= shard_names(folder / index)
    known = {match[1] + INDEX_ENDING for name in listed if (match := _SHARD.fullmatch(name))}
    taken = {*indexes, *files} - listed
    networks = [name for name in names if name in taken]
    return networks, [index for index in missing if index not in known]


def preferred(names: Sequence[str]) -> list[str]:
    """Those of `names`, of networks in one folder, that Hugging Face's libraries give; else all."""
    return [name for name in names if is_known(name)] or list(names)


def is_known(name: str) -> bool:
    """Whether it is what Hugging Face's libraries call a network."""
    return _WELL_KNOWN.fullmatch(name) is not None


def stem_of_shard(name: str) -> str:
    """`a-00001-of-00003.safetensors` -> `a`; of another name, the name."""
    match = _SHARD.fullmatch(name)
    return match[1] if match else name


def is_training_state(name: str) -> bool:
    """Whether a file is by its name an optimizer's, a scheduler's or a generator's state."""
    return _TRAINING_STATE.fullmatch(os.path.splitext(name)[0]) is not None


def shard_names(index: Path) -> set[str]:
    """The names of the shards that `index` lists.

    Raises SnapshotError for an index that makes no sense, MachineError for one that can't be read.
    """
    return set(_weight_map(index, _parse_index(index)).values())


def shards_of(main: Path) -> list[Path]:
    """The shards of an output, sorted, if `main` is an index; raises what shard_names does."""
    names = sorted(shard_names(main)) if is_index(main.name) else []
    return [main.with_name(name) for name in names]


def _parse_index(path: Path) -> dict[str, Any]:
    with open_file(path) as (file, _):
        text = file.read(MAX_HEADER + 1)
    try:
        if len(text) > MAX_HEADER:
            raise ValueError("it is too long")
        check_items(path, text)
        document = json.loads(text.decode())  # from bytes, it lets half a surrogate pair pass
        if rb"\u" in text:
            json.dumps(document, ensure_ascii=False).encode()  # and as an escape
    except (ValueError, RecursionError) as error:
        raise _bad_index(path, str(error)) from None
    if not isinstance(document, dict):
        raise _bad_index(path, "not an object")
    return document


def _weight_map(path: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> shard; every name of a shard is that of a file beside the index."""
    found = document.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise _bad_index(path, "no weight_map")
    for shard in set(map(str, found.values())):
        plain = shard == os.path.basename(shard) and "\\" not in shard and "\0" not in shard
        if not plain or not shard.lower().endswith(ENDING):
            raise _bad_index(path, f"'{shard}' is no name of a shard")
    return {str(tensor): str(shard) for tensor, shard in found.items()}


def _bad_index(path: Path, detail: str) -> SnapshotError:
    return SnapshotError(
        str(path), f"not an index of shards ({detail})", "copy it again or leave it out"
    )


def _read_index(path: Path, cache: Cache | None) -> TensorIndex:
    document = _parse_index(path)
    weight_map = _weight_map(path, document)
    shards = []
    for name in sorted(set(weight_map.values())):
        if not exists(path.with_name(name)):
            raise IncompleteError(
                str(path), f"its shard '{name}' is missing", "copy it again or leave it out"
            )
        try:
            shards.append(read_header(path.with_name(name), cache))
            if is_delta(shards[-1].metadata):
                raise SnapshotError(name, "a difference to another file", "give the file itself")
        except SnapshotError as error:
            # The index is what a user has listed: it is named, and which of its shards is wrong.
            problem = f"its shard '{printable(name)}' is no shard: {error.problem}"
            raise type(error)(str(path), problem, error.remedy) from None
    firsts = accumulate((shard.parts[0].length for shard in shards), initial=0)
    parts = [
        dataclasses.replace(shard.parts[0], first=first, file=at)
        for at, (shard, first) in enumerate(zip(shards, firsts, strict=False))
    ]
    key = tuple(id(shard.tensors) for shard in shards)  # alive as long as the cache that has them
    tensors = cache.get(key) if cache is not None else None
    if tensors is None:
        tensors = _joined(path, shards, parts)
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
    files = tuple(shard.files[0] for shard in shards)
    return TensorIndex(path, tensors, metadata, files, tuple(parts))


def _shard(where: Mapping[str, str], name: str) -> str:
    return f"'{printable(where[name])}'" if name in where else "none"


def _joined(
    path: Path, shards: Sequence[TensorIndex], parts: Sequence[Part]
) -> dict[str, TensorInfo]:
    """The tensors of all shards, their data sections laid end to end."""
    joined: dict[str, TensorInfo] = {}
    for shard, part in zip(shards, parts, strict=True):
        for name, info in shard.tensors.items():
            if name in joined:
                raise SnapshotError(
                    str(path), f"tensor '{name}' is in two shards", "leave one of the two out"
                )
            start, end = part.first + info.start, part.first + info.end
            joined[name] = dataclasses.replace(info, start=start, end=end)
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


def existing_output(path: Path) -> list[Path]:
    """What exists of an output `path`: the file itself, or the index of its shards."""
    return [name for name in (path, index_path(path)) if exists(name)]


def made_by_posthoc(path: Path) -> bool:
    """Whether `path` is an output of ours, a shard or an index of one."""
    try:
        return _has_recipe(path)
    except PosthocError:
        return False


def is_output(folder: Path) -> bool:
    """Whether an output of ours is this folder as a whole; raises MachineError where it can't be
    read."""
    # A file first: a server may refuse to tell what isn't there, and errors name what was given.
    return not is_file(folder) and read_manifest(folder) is not None and _has_recipe(folder)


def _has_recipe(path: Path) -> bool:
    """The same, but raises MachineError where it can't be read."""
    try:
        return read_recipe(open_tensors(path).metadata) is not None
    except SnapshotError:
        return False


def replaced_files(path: Path, files: Sequence[Path], overwrite: bool) -> list[Path]:
    """The files that go when output `path` is written as `files`; that which makes it one first.

    These are the output before it, a file or an index; its shards; and shards of ours that no
    index lists. Others of such names stay. Raises UsageError when there is an output and
    `overwrite` is false, or when a shard would take the place of a file that isn't one of these;
    MachineError when an index or a shard can't be read.
    """
    found = existing_output(path)
    if not overwrite:
        if found:
            raise already_exists(found[0])
        return []
    main, folder = index_path(path), path.parent
    pattern = re.compile(re.escape(path.name[: -len(ENDING)]) + _NUMBER + re.escape(path.suffix))
    try:
        names = list_folder(folder)
    except PosthocError:  # told when it is written
        return found
    shards = [name for name in names if pattern.fullmatch(name)]
    indexes = [name for name in names if is_index(name) or name == main.name] if shards else []
    listed = {name: _listed(folder / name) for name in indexes}
    of_this = listed.pop(main.name, set())
    of_others = set().union(*listed.values())
    ours = [
        folder / name
        for name in shards
        if name not in of_others and (name in of_this or _has_recipe(folder / name))
    ]
    for place in files:
        if place.name in shards and place not in ours and not is_folder(place):
            raise UsageError(
                str(place),
                "exists already, and is no shard of the output to be replaced",
                "move it or choose another output",
            )
    return found + ours


def _listed(index: Path) -> set[str]:
    """The shards that an index lists, if it is one."""
    try:
        return shard_names(index)
    except SnapshotError:
        return set()
