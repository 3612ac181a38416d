"""Averages as EMA libraries keep them: beside the network, or as lists without names.

    ema-pytorch, nitrous-ema    `ema_model.*`, with counters, and `online_model.*` if asked for
    diffusers, torch_ema        `shadow_params`: the parameters in the network's order, nameless

A list's names are those of the network: of its state dict in the same file, or in a file beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import PosthocError
from posthoc_cli.formats.checkpoint import Checkpoint, candidates, tensor_lists
from posthoc_cli.formats.laying import read_elements
from posthoc_cli.formats.pickles import refused
from posthoc_cli.formats.tensors import StoredTensor
from posthoc_cli.formats.torchfile import read_checkpoint
from posthoc_cli.storage import ENDING, Reader, TensorIndex, read_header
from posthoc_cli.storage.dtypes import FLOATS, bytes_of, decode
from posthoc_cli.storage.stores import list_folder

PREFIX = "ema_model."
ONLINE = "online_model."
COUNTERS = ("initted", "step")
SHADOW = "shadow_params"

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_MOST_PAIRS = 4_000_000
_MOST_ALIKE = 1000
_SAMPLE = 4096
"""Elements of a tensor that tell it from others of its shape."""

Shape = tuple[int, ...]


def without_prefix(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The average alone, of a dict that may hold the network too."""
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }


def check_layout(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise SnapshotError where a dict looks like an EMA library's, but not in all.

    Its average is only a part of it, under other names: as a plain state dict it fits no network.
    """
    names = [name for name in tensors if name not in COUNTERS and name != "_extra_state"]
    averaged = sum(name.startswith(PREFIX) for name in names)
    online = sum(name.startswith(ONLINE) for name in names)
    counters = [name for name in COUNTERS if name in tensors]
    if averaged and averaged + online == len(names):
        if online:
            differs = "it holds the network too ('online_model.'), beside its average"
        elif not counters:
            differs = "it has no 'step': nitrous-ema writes such files"
        else:
            differs = f"it has no '{'step' if 'step' not in counters else 'initted'}'"
    elif averaged and counters:
        other = next(n for n in names if not n.startswith((PREFIX, ONLINE)))
        differs = f"it holds more than an average, such as '{other}'"
    elif counters == ["initted"] and len(names) > 0:
        raise refused(
            "looks like a checkpoint of posthoc-ema, but it has no 'step'",
            "say what it is: tool='posthoc-ema', or tool='torch' to take all of it as it is",
        )
    else:
        return
    raise refused(
        f"looks like a checkpoint of ema-pytorch, but {differs}",
        "say what it is: tool='ema-pytorch' for the average in it, without its prefix, or "
        "tool='torch' to take all of it as it is",
    )


def check_values(checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise SnapshotError for placeholders: parameters whose values lie elsewhere."""
    empty = sum(not tensor.elements for tensor in tensors.values())
    root = checkpoint.root if isinstance(checkpoint.root, dict) else {}
    deepspeed = checkpoint.path.name.endswith("_model_states.pt") or not {
        *("ds_version", "ds_config", "param_shapes"),
    }.isdisjoint(key for key in root if isinstance(key, str))
    if empty and (deepspeed or 2 * empty >= len(tensors)):
        raise refused(
            f"{empty} of its {len(tensors)} tensors hold no values, as DeepSpeed's ZeRO-3 saves "
            "them: the values are in the *_optim_states.pt files beside it",
            "make one file of them with DeepSpeed's zero_to_fp32.py, and convert that",
        )


# Lists.


def shadow_tensors(checkpoint: Checkpoint, key: str | None) -> dict[str, StoredTensor] | None:
    """The tensors of a list of shadow parameters, by their names in the network.

    None where there is none at `key`; without a key, also where the file holds more than the list.
    Raises SnapshotError where the names can't be told.
    """
    lists = tensor_lists(checkpoint, SHADOW)
    place = key if key is not None else next(iter(lists), ".")
    place = place.removesuffix(f".{SHADOW}") if place != SHADOW else "."
    if place not in lists:
        return None
    networks = candidates(checkpoint)
    if key is None and (networks or len(lists) > 1):
        choice = [*(f"key='{name}'" for name in networks), *(f"key='{name}'" for name in lists)]
        raise refused(
            f"holds a list of averages ({SHADOW}) beside other weights",
            f"choose one with {' or '.join(choice)}",
        )
    tensors = lists[place]
    shapes = [tensor.shape for tensor in tensors]
    found = {_names_in_order(network, shapes) for network in networks.values()}
    if not found - {None}:
        found = {_names_beside(path, checkpoint, tensors) for path in _beside(checkpoint.path)}
    names = found - {None}
    if len(names) != 1:
        raise refused(
            f"holds a list of {len(tensors)} tensors ({SHADOW}) without names, and "
            + ("files beside it give it different ones" if names else "no file beside it has them"),
            "put the network's state dict, saved by torch.save, beside it as pytorch_model.bin",
        )
    return dict(zip(names.pop() or (), tensors, strict=True))


def _beside(path: Path) -> list[Path]:
    """Files in the same folder that may hold the network: of libraries' names, and safetensors."""
    names = set(list_folder(path.parent)) - {path.name}
    known = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.pth")
    return [
        path.parent / name
        for name in sorted(names)
        if name in known or (name.endswith(ENDING) and not name.startswith("."))
    ]


def _names_beside(
    path: Path, checkpoint: Checkpoint, tensors: list[StoredTensor]
) -> tuple[str, ...] | None:
    shapes = [tensor.shape for tensor in tensors]
    try:
        if path.name.endswith(ENDING):
            return _names_in_safetensors(read_header(path), checkpoint, tensors)
        found = {_names_in_order(one, shapes) for one in candidates(read_checkpoint(path)).values()}
    except PosthocError:
        return None
    return found.pop() if len(found) == 1 else None


def _names_in_order(
    network: Mapping[str, StoredTensor], shapes: list[Shape]
) -> tuple[str, ...] | None:
    """The names of parameters with these shapes, in the order of a state dict; None if in doubt.

    A state dict also has buffers, and each tied tensor as often as it is used.
    """
    seen: set[tuple[int, int, Shape]] = set()
    entries = []
    for name, tensor in network.items():
        place = (id(tensor.storage), tensor.start, tensor.shape)
        if place not in seen and not name.endswith(_BUFFERS):
            entries.append((name, tensor.shape))
        seen.add(place)
    if [shape for _, shape in entries] == shapes:
        return tuple(name for name, _ in entries)
    if len(entries) * len(shapes) > _MOST_PAIRS:
        return None
    return _only_way(entries, shapes)


def _only_way(entries: list[tuple[str, Shape]], shapes: list[Shape]) -> tuple[str, ...] | None:
    """The names of a part of `entries`, in their order, with these shapes: if there is one way."""
    ways = [1] + [0] * len(shapes)  # to find the first so many shapes in the entries so far
    for _, shape in entries:
        for at in range(len(shapes), 0, -1):
            if shapes[at - 1] == shape:
                ways[at] = min(ways[at] + ways[at - 1], 2)
    if ways[-1] != 1:
        return None
    names, at = [], 0
    for name, shape in entries:
        if at < len(shapes) and shapes[at] == shape:
            names.append(name)
            at += 1
    return tuple(names)


def _names_in_safetensors(
    index: TensorIndex, checkpoint: Checkpoint, tensors: list[StoredTensor]
) -> tuple[str, ...] | None:
    """The names by the shapes, and where several have one shape, by the values.

    The file is sorted by name: its order isn't the network's. An average is far nearer to its own
    parameter than to any other, unless both have just begun.
    """
    by_shape: dict[Shape, list[str]] = defaultdict(list)
    for name, info in index.tensors.items():
        if not name.endswith(_BUFFERS):
            by_shape[info.shape].append(name)
    places: dict[Shape, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        places[tensor.shape].append(place)
    names = [""] * len(tensors)
    for shape, wanted in places.items():
        named = by_shape.get(shape, [])
        if len(named) != len(wanted):
            return None
        if len(named) > 1:
            named = _nearest(index, named, checkpoint, [tensors[place] for place in wanted])
        for place, name in zip(wanted, named, strict=False):
            names[place] = name
    return tuple(names) if all(names) else None


def _nearest(
    index: TensorIndex, names: list[str], checkpoint: Checkpoint, tensors: list[StoredTensor]
) -> list[str]:
    """The names of `tensors`, all of one shape, by their values; none where that isn't sure."""
    infos = [index.tensors[name] for name in names]
    dtypes = {info.dtype for info in infos} | {tensor.dtype for tensor in tensors}
    if not (dtypes <= FLOATS and len(names) <= _MOST_ALIKE):
        return []
    count = min(tensors[0].elements, _SAMPLE)
    with Reader(index) as reader:
        rows = []
        for info in infos:
            data = bytearray(bytes_of(info.dtype, count))
            reader.read(info.start, memoryview(data))
            rows.append(_values(info.dtype, data))
    network = np.stack(rows)
    averages = [_values(one.dtype, read_elements(checkpoint, one, count)) for one in tensors]
    chosen = []
    for average in averages:
        far = np.linalg.norm(network - average, axis=1)
        best, second = np.argsort(far)[:2]
        if not 2 * far[best] < far[second]:
            return []
        chosen.append(names[best])
    return chosen if len(set(chosen)) == len(names) else []


def _values(dtype: str, data: bytes | bytearray) -> npt.NDArray[np.float64]:
    return decode(dtype, np.frombuffer(data, np.uint8)).astype(np.float64)
