"""What a checkpoint holds, and which dict of tensors in it is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.formats.pickles import naming, refused, shown
from posthoc_cli.formats.tensors import StoredTensor


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint holds.

    `root` is made of dicts, lists, tuples, text, numbers, None and StoredTensors, with `Span` for
    bytes (and for texts above 1 MiB) and `Call` or `Global` for what is neither, such as a numpy
    array or a device. Values may be shared, or contain themselves. `size` is the file's length
    and `modified` the time of its last change in nanoseconds.
    """

    path: Path
    root: Any
    size: int
    modified: int


def state_dict(checkpoint: Checkpoint, key: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of one dict of the checkpoint, by name, in its order.

    `key` says which: a key of the root, or several with dots between (`optimizer.ema`, `emas.0`
    for a list's first); `.` is the root itself. Without it, that is the only dict of tensors among
    the root and its entries. What isn't a tensor is left out. Names are taken as they are.

    Raises SnapshotError where there is no such dict, or more than one to choose from.
    """
    with naming(checkpoint.path):
        if key is not None:
            return _tensors_at(checkpoint.root, key)
        found = _dicts_of_tensors(checkpoint.root)
        if not found:
            raise refused(
                "holds no dict of tensors",
                f"leave it out, or name one inside with key=: {_choice(checkpoint.root)}",
            )
        if len(found) > 1:
            raise refused(
                f"holds several dicts of tensors ({_listed(list(found))})", "choose one with key="
            )
        (tensors,) = found.values()
        return tensors


def _tensors_at(root: Any, key: str) -> dict[str, StoredTensor]:
    """The tensors at `key`; at each level the longest part of it that fits is taken."""
    value = root
    parts = key.split(".") if key != "." else []
    while parts:
        entries = _entries(value)
        fits = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in entries)
        length = next(fits, 0)
        if not length:
            raise refused(f"has nothing at key='{shown(key)}'", _choice(value))
        value = entries[".".join(parts[:length])]
        parts = parts[length:]
    tensors = _tensors(value)
    if not tensors:
        raise refused(f"no dict of tensors at key='{key}'", _choice(root))
    return tensors


def _tensors(value: Any) -> dict[str, StoredTensor]:
    if not isinstance(value, dict):
        return {}
    return {
        name: tensor
        for name, tensor in value.items()
        if isinstance(name, str) and isinstance(tensor, StoredTensor)
    }


def _dicts_of_tensors(root: Any) -> dict[str, dict[str, StoredTensor]]:
    """The dicts of tensors among the root, called `.`, and its entries."""
    if not isinstance(root, dict):
        return {}
    candidates = {".": root} | {str(key): value for key, value in root.items() if _simple(key)}
    # A hostile file has one large dict under very many names.
    distinct = {id(value): value for value in candidates.values()}
    tensors = {place: _tensors(value) for place, value in distinct.items()}
    found = {name: tensors[id(value)] for name, value in candidates.items()}
    return {name: entries for name, entries in found.items() if entries}


def _simple(key: Any) -> bool:
    return isinstance(key, str | int | float)


def _entries(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {str(key): entry for key, entry in value.items() if _simple(key)}
    if isinstance(value, list | tuple):
        return {str(index): entry for index, entry in enumerate(value)}
    return {}


def _choice(value: Any) -> str:
    names = [n for n, entry in _entries(value).items() if isinstance(entry, dict | list | tuple)]
    return f"there is {_listed(names)}" if names else "there is nothing to choose from"


def _listed(names: list[str], most: int = 8) -> str:
    listed = ", ".join(shown(name) for name in names[:most])
    return f"{listed}, and {len(names) - most} more" if len(names) > most else listed
