"""Names of tensors that say how a network was wrapped for training.

torch.compile, DistributedDataParallel, FSDP and activation checkpointing put parts of their own
into the names. Where some files of a folder have them and others don't, the names are compared
without them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from posthoc_cli.storage import TensorIndex, TensorInfo

_ANYWHERE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What may stand before any part of a name, as parts of a network can be wrapped."""

_AROUND = "module."
"""What DistributedDataParallel and DataParallel put before all names."""

_MOST_AROUND = 3
"""How often they may do so."""


def agree_on_names(indexes: Sequence[TensorIndex]) -> tuple[list[TensorIndex], list[int]]:
    """The indexes, those of a wrapped network with its own names if other indexes have those.

    Also the places of those that are renamed. Nothing is where it would not make the names of more
    tensors agree.
    """
    distinct = list({id(each.tensors): each.tensors for each in indexes}.values())
    if len(distinct) < 2 or all(each.keys() == distinct[0].keys() for each in distinct):
        return list(indexes), []
    own = [_own_names(tensors) for tensors in distinct]
    if all(len(set(names.values())) == len(names) for names in own):
        renamed = [
            {own[at][name]: info for name, info in tensors.items()}
            for at, tensors in enumerate(distinct)
        ]
        if _agreeing(renamed) > _agreeing(distinct):
            return _replaced(indexes, distinct, renamed)
    return list(indexes), []


def describe_wrappers(names: Sequence[str]) -> str:
    """What wraps the tensors `names`: `'_orig_mod.' and 'module.'`."""
    found = {part for name in names for part in _ANYWHERE.findall(name)}
    if any(_ANYWHERE.sub("", name).startswith(_AROUND) for name in names):
        found.add(_AROUND)
    return " and ".join(f"'{part}'" for part in sorted(found))


def _own_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Each tensor's name without what wraps it."""
    names = {name: _ANYWHERE.sub("", name) for name in tensors}
    for _ in range(_MOST_AROUND):
        if names and all(own.startswith(_AROUND) for own in names.values()):
            names = {name: own.removeprefix(_AROUND) for name, own in names.items()}
    return names


def _agreeing(distinct: Sequence[Mapping[str, TensorInfo]]) -> int:
    """How many names the others share with the first."""
    first = distinct[0].keys()
    return sum(len(first & each.keys()) for each in distinct[1:])


def _replaced(
    indexes: Sequence[TensorIndex],
    distinct: Sequence[Mapping[str, TensorInfo]],
    renamed: Sequence[Mapping[str, TensorInfo]],
) -> tuple[list[TensorIndex], list[int]]:
    place = {id(tensors): at for at, tensors in enumerate(distinct)}
    # What is the same now is one mapping, as it is for files whose headers agree.
    shared = [next(one for one in renamed if one == each) for each in renamed]
    results, changed = [], []
    for at, index in enumerate(indexes):
        which = place[id(index.tensors)]
        if renamed[which].keys() != distinct[which].keys():
            changed.append(at)
        results.append(dataclasses.replace(index, tensors=shared[which]))
    return results, changed
