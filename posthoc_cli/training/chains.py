"""A run's snapshots as chains of differences: what the next one is a difference to, and which files
are nothing without which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from posthoc_cli.errors import either
from posthoc_cli.storage import TensorIndex, open_tensors
from posthoc_cli.storage.deltas import MOST_LINKS, links_of
from posthoc_cli.storage.metadata import BASE
from posthoc_cli.synthesis.deltas import DELTA_DTYPES, Held

STORES = ("whole", "delta")
"""How snapshots can be stored: each by itself, or as the difference to another."""

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
"""The dtype, by safetensors' name, and shape of each tensor."""


def check_store(
    store: str, dtype: torch.dtype | None, keyframe_every: int, delta_memory: bool
) -> None:
    """Raise ValueError for arguments that don't go together."""
    if store not in STORES:
        raise ValueError(f"store {store!r}: give {either(map(repr, STORES))}")
    if not 1 <= keyframe_every < MOST_LINKS:
        raise ValueError(f"keyframe_every {keyframe_every}: give 1 to {MOST_LINKS - 1}")
    if store == "delta" and _name(dtype) not in DELTA_DTYPES:
        known = either(f"torch.{each}" for each in DELTA_DTYPES)
        raise ValueError(f"dtype {dtype}: differences are stored as {known}")
    if store == "whole" and delta_memory:
        raise ValueError("delta_memory: of whole snapshots nothing is held; give store='delta'")


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


class Chain:
    """How a run's snapshots are chained: of each step the first is the difference to that of the
    step before, or a keyframe, and the others are differences to the first.

    What there is, the files say: so a run that resumes goes on with them.
    """

    def __init__(self, dtype: torch.dtype | None, keyframe_every: int, *, memory: bool) -> None:
        self.dtype = _name(dtype)
        self.keyframe_every = keyframe_every
        self.held = Held() if memory else None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"held": None if self.held is None else Held()}

    def base(
        self, before: Mapping[Path, int], main: Callable[[Path], bool], kinds: Kinds
    ) -> TensorIndex | None:
        """What the first snapshot of a step is a difference to; None for a keyframe.

        `before` are the run's earlier snapshots with their steps, of which `main` tells those that
        are the first of theirs; `kinds` are the tensors. Raises SnapshotError or MachineError when
        a link of the chain is missing, broken or replaced.
        """
        step = max(before.values(), default=0)
        # Those that build on it know what it was.
        last = {path: open_tensors(path) for path, its in before.items() if its == step}
        base = next((index for path, index in last.items() if main(path)), None)
        if base is None or len(links_of(base)) >= self.keyframe_every:
            return None
        there = {name: (info.dtype, info.shape) for name, info in base.tensors.items()}
        return base if there == dict(kinds) else None


def chains(found: Iterable[tuple[Path, Mapping[str, str]]]) -> list[list[Path]]:
    """Files of one folder by the chain they are of, in each those first that none builds on.

    One that is no difference is a chain by itself, with those that build on it.
    """
    headers = {path.name: (path, metadata.get(BASE)) for path, metadata in found}
    by_root: dict[str, list[tuple[int, str]]] = {}
    for name in headers:
        way = [name]
        while way[-1] in headers and (base := headers[way[-1]][1]) and base not in way:
            way.append(base)
        by_root.setdefault(way[-1], []).append((len(way), name))
    return [
        [headers[name][0] for _, name in sorted(each, reverse=True)] for each in by_root.values()
    ]
