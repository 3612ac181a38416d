"""Snapshots of a sharded network: each process writes what it has, and nobody has the whole.

A snapshot is a folder as torch.distributed's HuggingFaceStorageWriter makes it: a safetensors file
of each process, with the parts of tensors that it has, and where in them these begin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from posthoc_cli.errors import MachineError, PosthocError
from posthoc_cli.formats.sharding import shard_name, sharding_metadata
from posthoc_cli.storage.blocks import Block, whole
from posthoc_cli.storage.dtypes import bytes_of
from posthoc_cli.storage.shared import SharedFolder, is_seen
from posthoc_cli.training.averaging import box_of, is_sharded
from posthoc_cli.training.ranks import Ranks
from posthoc_cli.training.snapshot_files import (
    SnapshotToSave,
    TensorToSave,
    dtype_name,
    own_places,
    remove_old_snapshots,
    write_snapshot,
)


class Piece(NamedTuple):
    """What a process has of a tensor: the box from element `first` on, of so many `sizes`.

    A tensor that isn't `sharded`, and each process has, need not be the same in all of them.
    """

    dtype: str
    shape: tuple[int, ...]
    first: tuple[int, ...]
    sizes: tuple[int, ...]
    sharded: bool


def piece_of(tensor: TensorToSave) -> Piece | None:
    """What this process has of a tensor, if anything; raises ValueError for what is no box."""
    shape, (first, sizes) = tuple(tensor.like.shape), box_of(tensor.like)
    if 0 in sizes and 0 not in shape:
        return None
    return Piece(dtype_name(tensor), shape, first, sizes, is_sharded(tensor.like))


def share_out(held: Sequence[Mapping[str, Piece]]) -> list[list[str]]:
    """The tensors of which each process writes what it has, by what each process has.

    Of copies one is written, so that all write about as much; of what isn't sharded the first.
    Raises ValueError where they don't make up whole tensors.
    """
    holders: dict[tuple[str, Piece], list[int]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, pieces in enumerate(held):
        for name, piece in pieces.items():
            holders.setdefault((name, piece), []).append(rank)
            kind = piece.dtype, piece.shape
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(
                    f"tensor {name!r} is {kinds[name]} in one process, {kind} in {rank}"
                )
    sizes = {key: bytes_of(key[1].dtype, math.prod(key[1].sizes)) for key in holders}
    boxes: dict[str, list[Block]] = {name: [] for name in kinds}
    shares: list[list[str]] = [[] for _ in held]
    load = [0] * len(held)
    for key in sorted(holders, key=lambda key: (len(holders[key]) > 1, -sizes[key], key)):
        name, piece = key
        ranks = holders[key]
        rank = min(ranks, key=lambda rank: (load[rank], rank)) if piece.sharded else ranks[0]
        load[rank] += sizes[key]
        shares[rank].append(name)
        boxes[name].append(Block(piece.first, piece.sizes, (), 0))
    for name, (_, shape) in kinds.items():
        if not whole(shape, boxes[name]):
            raise ValueError(
                f"tensor {name!r} of {list(shape)} is not whole in the processes that track it"
            )
    return shares


class Parts:
    """The parts of a network's snapshots that this process writes."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._held: dict[str, Piece] | None = None
        self._mine: Sequence[str] = ()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a tracker meets the other processes anew

    def of(self, snapshots: Sequence[SnapshotToSave]) -> list[SnapshotToSave]:
        """The snapshots of a step with what this process writes of them.

        Raises ValueError in all processes where the tensors, or the steps, don't fit together.
        """
        first, ranks = snapshots[0], self.ranks
        with ranks.raised_in_all():
            found = {name: piece_of(each) for name, each in first.tensors.items()}
        held = {name: piece for name, piece in found.items() if piece is not None}
        said = ranks.exchange((first.step, held != self._held))
        steps = sorted({step for step, _ in said})
        if len(steps) > 1:
            raise ValueError(f"the processes are at different steps: {steps[0]} and {steps[-1]}")
        if any(changed for _, changed in said):
            everything = ranks.exchange(held)
            self._held = None
            self._mine = ranks.from_first(lambda: share_out(everything))[ranks.rank]
            self._held = held
        firsts = {name: held[name].first for name in self._mine}
        sharding = sharding_metadata(firsts, ranks.size)
        return [
            replace(
                each,
                sharding=sharding,
                tensors={
                    name: TensorToSave(own.value.detach(), own.dtype, own.value.detach())
                    for name, own in ((name, each.tensors[name]) for name in firsts)
                },
            )
            for each in snapshots
        ]

    def write(
        self, snapshots: Sequence[SnapshotToSave], keep: int | None
    ) -> tuple[list[Path], list[str], list[tuple[str, Path]]]:
        """Write this process' part of the snapshots of a step; all processes must call it.

        Returns the paths of those that are there, what went wrong, and tensors that float16 made
        infinite, each with the first such snapshot: in all processes the same.
        """
        ranks = self.ranks
        folders: dict[Path, SharedFolder] = {}
        try:
            places = ranks.from_first(lambda: [_open(each, folders) for each in snapshots])
            said = ranks.exchange(
                [self._part(*each) for each in zip(snapshots, places, strict=True)]
            )
            return ranks.from_first(lambda: _place(snapshots, said, folders, keep))
        finally:
            for folder in folders.values():
                folder.discard()

    def _part(self, snapshot: SnapshotToSave, place: Path | str) -> tuple[str, list[str]]:
        """Why this process' part can't be written, if so; and what float16 made infinite."""
        if isinstance(place, str):
            return place if self.ranks.first else "", []
        try:
            check_seen(place, snapshot.folder)
            return "", write_snapshot(snapshot, place / shard_name(self.ranks.rank))
        except PosthocError as error:
            problem = f"{snapshot.path}: {error.problem} (process {self.ranks.rank})"
            return f"{problem}; {error.remedy}", []
        except Exception as error:  # all must hear of it
            return f"{error!r} (process {self.ranks.rank})", []


def check_seen(path: Path, folder: Path) -> None:
    """Raise MachineError unless what the first process has made in `folder` is seen in this one."""
    if not is_seen(path):
        raise MachineError(
            str(folder),
            "is another folder than the first process', or on another disk",
            "choose one on a file system that all processes share",
        )


def _open(snapshot: SnapshotToSave, folders: dict[Path, SharedFolder]) -> Path | str:
    try:
        folder = folders[snapshot.path] = SharedFolder(snapshot.path)
    except PosthocError as error:
        return str(error)
    return folder.temporary


def _place(
    snapshots: Sequence[SnapshotToSave],
    said: Sequence[Sequence[tuple[str, list[str]]]],
    folders: Mapping[Path, SharedFolder],
    keep: int | None,
) -> tuple[list[Path], list[str], list[tuple[str, Path]]]:
    """Give those snapshots their names that all processes have written."""
    written, failures = [], []
    overflowing: dict[str, Path] = {}
    for snapshot, parts in zip(snapshots, zip(*said, strict=True), strict=True):
        problems = [problem for problem, _ in parts if problem]
        if not problems:
            try:
                folders[snapshot.path].place(own_places(snapshot))
            except PosthocError as error:
                problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            failures.append(f"no snapshot of step {snapshot.step}: {problems[0]}{more}")
            continue
        written.append(snapshot.path)
        for name in (name for _, names in parts for name in names):
            overflowing.setdefault(name, snapshot.path)
    if keep is not None and len(written) == len(snapshots):
        first = snapshots[0]
        failures += remove_old_snapshots(first.folder, first.run, first.step, keep)
    return written, failures, list(overflowing.items())
