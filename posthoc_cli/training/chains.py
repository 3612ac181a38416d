"""A run's snapshots as chains of differences: what the next one is a difference to, and which files
are nothing without which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posthoc_cli.errors import SnapshotError, either
from posthoc_cli.solver import Average, Decay
from posthoc_cli.solver import Profile as PowerFunction
from posthoc_cli.storage import Cache, TensorIndex, open_tensors
from posthoc_cli.storage.deltas import MOST_LINKS, bases_of, links_of
from posthoc_cli.storage.metadata import DECAY, GAMMA
from posthoc_cli.synthesis.bases import Held
from posthoc_cli.synthesis.deltas import DELTA_DTYPES
from posthoc_cli.synthesis.prediction import predictors

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


Earlier = list[tuple[Profile, Average, Path]]
"""A chain's snapshots from the keyframe on, in the order in which they were written."""


class Chain:
    """How a run's snapshots are chained: of the first profile one is a keyframe, and all that come
    after it, of whatever profile, are predicted from those before them.

    What there is, the files say: so a run that resumes goes on with them.
    """

    def __init__(self, dtype: torch.dtype | None, keyframe_every: int, *, memory: bool) -> None:
        self.dtype = _name(dtype)
        self.keyframe_every = keyframe_every
        self.held = Held() if memory else None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"held": None if self.held is None else Held()}

    def earlier(
        self, before: Sequence[tuple[int, Profile, Path]], main: Profile, kinds: Kinds
    ) -> Earlier:
        """The chain that the next snapshots go on with; none where a keyframe is due.

        `before` are the run's earlier snapshots with their steps, `kinds` the tensors. Raises
        SnapshotError or MachineError when a link is missing, broken or replaced.
        """
        newest = {profile: (step, path) for step, profile, path in sorted(before, key=_step)}
        if main not in newest:
            return []
        first, path = newest[main]
        step, _, last = max(before, key=_step)
        if step > first:
            name = f"{last.name.rpartition('-')[0]}-{path.name.rpartition('-')[2]}"
            raise SnapshotError(str(last.with_name(name)), "is missing", "copy it again")
        cache: Cache = {}
        base = open_tensors(path, cache)
        links = links_of(base)
        there = {name: (info.dtype, info.shape) for name, info in base.tensors.items()}
        if len(links) >= self.keyframe_every or there != dict(kinds):
            return []
        keyframe = links[0].index.path
        began = next((step for step, _, path in before if path == keyframe), first)
        for step, path in newest.values():
            if step >= began:
                open_tensors(path, cache)
        chain = sorted(before, key=lambda each: (each[0], each[1] != main))
        return [
            (profile, _average(profile, step), path)
            for step, profile, path in chain
            if step >= began
        ]

    def bases(
        self, earlier: Earlier, step: int, profile: Profile
    ) -> list[tuple[TensorIndex, float]]:
        """What the next snapshot is a difference to, each with its coefficient.

        Raises SnapshotError or MachineError when a link is missing, broken or replaced.
        """
        if not earlier:
            return []
        chain = [(profile, average) for profile, average, _ in earlier]
        found = predictors(chain, profile, _average(profile, step))
        cache: Cache = {}
        return [(open_tensors(earlier[at][2], cache), number) for at, number in found]

    def note(self, earlier: Earlier, step: int, profile: Profile, path: Path) -> None:
        """Note that a snapshot has been written."""
        earlier.append((profile, _average(profile, step), path))


def _average(profile: Profile, step: int) -> Average:
    gamma, decay = profile
    return (
        PowerFunction(float(step), float(gamma)) if gamma else Decay(float(step), float(decay or 0))
    )


def _step(each: tuple[int, Profile, Path]) -> int:
    return each[0]


def chains(found: Iterable[tuple[Path, Mapping[str, str]]]) -> list[list[Path]]:
    """Files of one folder by the chain they are of, in each those first that none builds on.

    One that is no difference is a chain by itself, with those that build on it.
    """
    headers = {
        path.name: (path, [base.name for base in bases_of(metadata)]) for path, metadata in found
    }
    depth = dict.fromkeys(headers, 0)
    for _ in headers:  # once, mostly: names are in order
        known = dict(depth)
        for name in sorted(headers):
            depth[name] = 1 + max((depth.get(each, 0) for each in headers[name][1]), default=0)
        if depth == known:
            break
    by_root: dict[str, list[tuple[int, str]]] = {}
    for name in headers:
        way = [name]
        while way[-1] in headers and (bases := headers[way[-1]][1]) and bases[0] not in way:
            way.append(bases[0])
        by_root.setdefault(way[-1], []).append((depth[name], name))
    return [
        [headers[name][0] for _, name in sorted(each, reverse=True)] for each in by_root.values()
    ]
