"""What a checkpoint holds, and which dict of tensors in it is meant."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.errors import in_bytes
from posthoc_cli.formats.pickles import Call, Global, naming, needed, refused, shown
from posthoc_cli.formats.tensors import StoredTensor
from posthoc_cli.storage import File


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint holds.

    `root` is made of dicts, lists, tuples, text, numbers, None and StoredTensors, with `Span` for
    bytes (and for texts above 1 MiB) and `Call` or `Global` for what is neither, such as a numpy
    array or a device. Values may be shared, or contain themselves. `structure` is the digest of
    all in the file but the tensors.
    """

    path: Path
    root: Any
    file: File
    structure: bytes = b""


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
        if _mapping(checkpoint.root) is None and isinstance(checkpoint.root, Call | Global):
            raise needed(_named(checkpoint.root))
        found = candidates(checkpoint)
        if not found:
            inside = _nested(checkpoint.root)
            if not inside and (module := _whole_module(checkpoint.root)):
                raise needed(module)
            choice = _each(inside) if inside else f"key=: {_choice(checkpoint.root)}"
            raise refused(
                "holds no dict of tensors", f"leave it out, or name one inside with {choice}"
            )
        if len(found) > 1:
            raise refused(
                f"holds several dicts of tensors ({_listed(list(found))})",
                f"choose one with {_each(found, checkpoint.root)}",
            )
        ((place, tensors),) = found.items()
        if place != "." and (parts := _nested(_entries(checkpoint.root)[place])):
            raise refused(
                f"has tensors at '{shown(place)}', and more below it ('{shown(min(parts))}'), as "
                "no state dict has",
                f"say key='{place}' if those are none of the network's; else save it as one dict",
            )
        if parts := _other_parts(checkpoint.root, place, tensors):
            found |= parts
            raise refused(
                f"holds several dicts of tensors ({_listed(list(found))})",
                f"choose one with {_each(found, checkpoint.root)}, or save them as one dict",
            )
        if lists := _lists_like(checkpoint.root, tensors):
            raise refused(
                f"holds a list of tensors without names ({shown(lists[0])}), such as an average's, "
                f"that are like those of '{shown(place)}'",
                f"say key='{shown(place)}' if that is what you mean, or save the other as a dict",
            )
        return tensors


def candidates(checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """The dicts of tensors that may be the network, by the `key` of each.

    They are the root and its entries, but for random states and counters, and what lies deeper but
    has the names and shapes of the only one of these, such as an average that a callback keeps.
    """
    found = _dicts_of_tensors(checkpoint.root)
    weights = {
        name: tensors
        for name, tensors in found.items()
        if not (_AUXILIARY.match(name) or _is_state(tensors, counters=name != "."))
    }
    if len(weights) > 1 and "." in weights and _is_state(weights["."], counters=True):
        del weights["."]  # a loss, say, beside the network
    found = weights or found
    if len(found) == 1:
        (one,) = found.values()
        if len(one) > 1 or any(tensor.elements > 1 for tensor in one.values()):
            found = found | {
                name: tensors
                for name, tensors in _nested(checkpoint.root).items()
                if tensors is not one and _resemble(one, tensors)
            }
    return found


def _other_parts(
    root: Any, place: str, tensors: dict[str, StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """What lies deeper than the only dict of tensors and may be as much of the network as that.

    Beside one that is called so, as `model` or `state_dict`, small ones are statistics, say.
    """
    whole = place == "." or _WHOLE.fullmatch(place) is not None
    least = _SMALL * sum(one.elements for one in tensors.values()) if whole else 0
    return {
        name: each
        for name, each in _nested(root).items()
        if name != place and not _is_state(each, counters=True)
        if any(one.elements > 1 for one in each.values())
        if sum(one.elements for one in each.values()) > least
    }


def place_of(checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]) -> str:
    """The key of the root's entry that has these tensors; `.` for the root, or something else."""
    some = next(iter(tensors.values()), None)
    for name, value in _entries(checkpoint.root).items():
        entries = _mapping(value)
        if entries is not None and any(each is some for each in entries.values()):
            return name
    return "."


def tensor_lists(checkpoint: Checkpoint, name: str) -> dict[str, list[StoredTensor]]:
    """The lists of tensors that are called `name` in the root or an entry of it, by their key."""
    places = {".": checkpoint.root} | _entries(checkpoint.root)
    found = {}
    for key, value in places.items():
        listed = (_mapping(value) or {}).get(name)
        if isinstance(listed, list | tuple) and listed:
            tensors = [tensor for tensor in listed if isinstance(tensor, StoredTensor)]
            if len(tensors) == len(listed):
                found[key] = tensors
    return found


def auxiliary(checkpoint: Checkpoint) -> str | None:
    """What a file is that can't be a network: an optimizer's state, random states, a log."""
    root = checkpoint.root
    if _is_optimizer(root):
        return "an optimizer's state"
    tensors = _random_states(root)
    if tensors is None:
        return None
    return "random states" if tensors else "holds no tensors"


_AUXILIARY = re.compile(r"(?i)(optim|opt\Z|sched|lr_|scaler|grad_scal|rng|random)")
"""Entries beside the weights that are none, by how their names begin."""


_WHOLE = re.compile(
    r"(?i)(?:.*[_.-])?(?:ema|model|module|net|network|params|state_dict|weights)(?:[_.-].*)?"
)
"""Entries that hold all of a network, by their names."""

_SMALL = 0.01
"""The part of a network's elements below which what lies elsewhere is no part of it."""


def is_beside(name: str) -> bool:
    """Whether an entry, by its name, is none of the weights but lies beside them."""
    return _AUXILIARY.match(name) is not None


_CONTAINERS = (dict, list, tuple, Call)
_MOST_NESTED = 4
_MOST_WALKED = 200_000


def _is_random(tensor: StoredTensor) -> bool:
    return tensor.dtype == "U8" and len(tensor.shape) == 1


def _is_state(tensors: dict[str, StoredTensor], counters: bool) -> bool:
    """Whether these are states of random number generators, or `counters`."""
    every = tensors.values()
    return all(map(_is_random, every)) or (counters and all(one.shape == () for one in every))


def _resemble(one: dict[str, StoredTensor], other: dict[str, StoredTensor]) -> bool:
    """Whether most of the `other` dict's tensors are of the `one`, by names and shapes.

    An average may be of the parameters alone, of a network with many buffers.
    """
    bare = {name.removeprefix("module."): tensor.shape for name, tensor in other.items()}
    same = sum(bare.get(name.removeprefix("module.")) == one[name].shape for name in one)
    return 2 * same > len(other)


def _nested(root: Any) -> dict[str, dict[str, StoredTensor]]:
    """The dicts of tensors some levels below the root, by their keys; each once."""
    found = ((place, _tensors(value)) for place, value in _below(root))
    return {place: tensors for place, tensors in found if tensors}


def _lists_like(root: Any, tensors: dict[str, StoredTensor]) -> list[str]:
    """The keys of lists of tensors that have the shapes of most of a network's."""
    shapes = Counter(tensor.shape for tensor in tensors.values())
    found = []
    for place, value in _below(root):
        if isinstance(value, list | tuple) and 2 * len(value) > len(tensors):
            own = Counter(getattr(each, "shape", None) for each in value)
            if own <= shapes and any(each.elements > 1 for each in value):
                found.append(place)
    return found


def _below(root: Any) -> Iterator[tuple[str, Any]]:
    """What is some levels below the root and may hold others, by its key; each once."""
    seen = {id(root)}
    level = [("", root)]  # but for what is not the network, if of the same names: its moments
    for _ in range(_MOST_NESTED):
        below = []
        for place, value in level:
            for key, entry in _entries(value).items():
                if not isinstance(entry, _CONTAINERS) or id(entry) in seen:
                    continue
                if len(seen) > _MOST_WALKED or len(place) > _MOST_WALKED or _AUXILIARY.match(key):
                    continue
                if _is_optimizer(entry):
                    continue
                seen.add(id(entry))
                below.append((f"{place}{key}.", entry))
        level = below
        yield from ((place[:-1], value) for place, value in level)


def _is_optimizer(value: Any) -> bool:
    """Whether it is an optimizer's state dict, whatever it is called."""
    return {"state", "param_groups"} <= (_mapping(value) or {}).keys()


def _random_states(root: Any) -> int | None:
    """How many tensors there are anywhere in a checkpoint; None where one of them isn't a random
    state, or where not all could be looked at."""
    tensors = 0
    seen: set[int] = set()
    pending = [root]
    while pending:
        value = pending.pop()
        if isinstance(value, StoredTensor):
            if not _is_random(value):
                return None
            tensors += 1
        if not isinstance(value, dict | list | tuple | Call) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Call):
            pending += [value.args, value.state, value.items]
        else:
            pending += value.values() if isinstance(value, dict) else value
        if len(pending) > 10 * _MOST_WALKED or tensors > 10 * _MOST_WALKED:
            return None
    return tensors


def _whole_module(root: Any) -> Global | None:
    """The class of a network that was saved as an object, in the root."""
    for value in _entries(root).values():
        if isinstance(value, Call) and isinstance(value.state, dict) and "_modules" in value.state:
            return value.function
    return None


def _named(value: Call | Global) -> Global:
    return value.function if isinstance(value, Call) else value


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


def _mapping(value: Any) -> dict[Any, Any] | None:
    """A dict, or what a dict of a class of its own holds."""
    if isinstance(value, Call) and isinstance(value.items, dict):
        return value.items
    return value if isinstance(value, dict) else None


def _tensors(value: Any) -> dict[str, StoredTensor]:
    return {
        name: tensor
        for name, tensor in (_mapping(value) or {}).items()
        if isinstance(name, str) and isinstance(tensor, StoredTensor)
    }


def _dicts_of_tensors(root: Any) -> dict[str, dict[str, StoredTensor]]:
    """The dicts of tensors among the root, called `.`, and its entries."""
    entries = _mapping(root)
    if entries is None:
        return {}
    candidates = {".": root} | {str(key): value for key, value in entries.items() if _simple(key)}
    # A hostile file has one large dict under very many names.
    distinct = {id(value): value for value in candidates.values()}
    tensors = {place: _tensors(value) for place, value in distinct.items()}
    found = {name: tensors[id(value)] for name, value in candidates.items()}
    return {name: entries for name, entries in found.items() if entries}


def _simple(key: Any) -> bool:
    return isinstance(key, str | int | float)


def _entries(value: Any) -> dict[str, Any]:
    entries = _mapping(value)
    if entries is not None:
        return {str(key): entry for key, entry in entries.items() if _simple(key)}
    if isinstance(value, list | tuple):
        return {str(index): entry for index, entry in enumerate(value)}
    return {}


def _choice(value: Any) -> str:
    names = [n for n, entry in _entries(value).items() if isinstance(entry, dict | list | tuple)]
    return f"there is {_listed(names)}" if names else "there is nothing to choose from"


def _each(found: dict[str, dict[str, StoredTensor]], root: Any = None, most: int = 4) -> str:
    """`key='ema' (12 tensors, 4.5 GB) or key='model' (...)`."""
    parts = []
    lightning = {"averaging_state", "current_model_state"} <= _entries(root).keys()
    for key, tensors in list(found.items())[:most]:
        size = in_bytes(sum(tensor.bytes for tensor in tensors.values()))
        count = f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''}"
        what = "the average: " if lightning and key == "state_dict" else ""
        parts.append(f"key='{shown(key)}' ({what}{count}, {size})")
    more = [f"{len(found) - most} more"] if len(found) > most else []
    return " or ".join(parts + more)


def _listed(names: list[str], most: int = 8) -> str:
    listed = ", ".join(shown(name) for name in names[:most])
    return f"{listed}, and {len(names) - most} more" if len(names) > most else listed
