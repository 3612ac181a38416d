"""A run's snapshots as chains of differences: what the next one is a difference to, and which files
are nothing without which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posthoc_cli.errors import SnapshotError, either
from posthoc_cli.storage import TensorIndex, open_tensors
from posthoc_cli.storage.deltas import MOST_LINKS, links_of
from posthoc_cli.storage.metadata import BASE, DECAY, GAMMA
from posthoc_cli.synthesis.bases import Held
from posthoc_cli.synthesis.deltas import DELTA_DTYPES

if TYPE_CHECKING:
    import torch

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


Profile = tuple[str | None, str | None]


def profile_of(metadata: Mapping[str, str]) -> Profile:
    """What a run's snapshots of one profile have in common."""
    return metadata.get(GAMMA), metadata.get(DECAY)


class Chain:
    """How a run's snapshots are chained: those of the first profile to the step before, or one is a
    keyframe; those of another to that profile's before, since the keyframe, or else to the first
    profile's of their step.

    What there is, the files say: so a run that resumes goes on with them.
    """

    def __init__(self, dtype: torch.dtype | None, keyframe_every: int, *, memory: bool) -> None:
        self.dtype = _name(dtype)
        self.keyframe_every = keyframe_every
        self.held: defaultdict[Profile, Held] | None = defaultdict(Held) if memory else None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"held": None if self.held is None else defaultdict(Held)}

    def bases(
        self, before: Sequence[tuple[int, Profile, Path]], main: Profile, kinds: Kinds
    ) -> dict[Profile, TensorIndex]:
        """What the next snapshots are differences to; of none of the `main` profile, a keyframe is
        due.

        `before` are the run's earlier snapshots with their steps, `kinds` the tensors. Raises
        SnapshotError or MachineError when a link is missing, broken or replaced.
        """
        newest = {profile: (step, path) for step, profile, path in sorted(before, key=_step)}
        if main not in newest:
            return {}
        first, path = newest[main]
        step, _, last = max(before, key=_step)
        if step > first:
            name = f"{last.name.rpartition('-')[0]}-{path.name.rpartition('-')[2]}"
            raise SnapshotError(str(last.with_name(name)), "is missing", "copy it again")
        base = open_tensors(path)
        links = links_of(base)
        there = {name: (info.dtype, info.shape) for name, info in base.tensors.items()}
        if len(links) >= self.keyframe_every or there != dict(kinds):
            return {}
        keyframe = links[0].index.path
        began = next((step for step, _, path in before if path == keyframe), first)
        return {
            profile: open_tensors(path) for profile, (step, path) in newest.items() if step >= began
        }


def _step(each: tuple[int, Profile, Path]) -> int:
    return each[0]


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
