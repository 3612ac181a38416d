"""Snapshots of a sharded network: each process writes what it has, and nobody has the whole.

A snapshot is a folder as torch.distributed's HuggingFaceStorageWriter makes it: a safetensors file
of each process, with the parts of tensors that it has, and where in them these begin. Differences
are whole files, which the first process writes; the others send it one tensor at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from posthoc_cli.errors import MachineError, PosthocError
from posthoc_cli.formats.sharding import shard_name, sharding_metadata
from posthoc_cli.storage.blocks import Block, whole
from posthoc_cli.storage.dtypes import DTYPES, bytes_of
from posthoc_cli.storage.outputs import Output
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.shared import SharedFolder, is_seen, remove_whole
from posthoc_cli.training.averaging import box_of, is_sharded
from posthoc_cli.training.ranks import Ranks
from posthoc_cli.training.snapshot_files import (
    SnapshotToSave,
    TensorToSave,
    dtype_name,
    make_file,
    own_places,
    remove_old_snapshots,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


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
    """The parts of a network's snapshots that this process writes, or sends to the first, which
    writes files that are whole."""

    def __init__(self, ranks: Ranks, *, send: bool = False) -> None:
        self.ranks = ranks
        self.send = send
        self._held: dict[str, Piece] | None = None
        self._everything: Sequence[Mapping[str, Piece]] = ()
        self._shares: Sequence[Sequence[str]] = ()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a tracker meets the other processes anew

    def of(self, snapshots: Sequence[SnapshotToSave]) -> list[SnapshotToSave]:
        """The snapshots of a step with what this process writes, or sends, of them.

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
            self._held = None
            self._everything = ranks.exchange(held)
            self._shares = ranks.from_first(lambda: share_out(self._everything))
            self._held = held
        firsts = {name: held[name].first for name in self._shares[ranks.rank]}
        sharding = {} if self.send else sharding_metadata(firsts, ranks.size)
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

    def written_by_first(
        self, snapshots: Sequence[SnapshotToSave], write: Callable[[list[SnapshotToSave]], T]
    ) -> T:
        """What `write` returns, or raises, in the first process, in all; all must call it.

        It gets the snapshots with whole tensors, each of which is sent when it is asked for.
        """
        ranks = self.ranks

        def write_first() -> T:
            try:
                return write([replace(each, tensors=self._whole(each, at)) for at, each in known])
            finally:
                ranks.broadcast(None)

        known = list(enumerate(snapshots))
        while not ranks.first and (asked := ranks.broadcast(None)) is not None:
            with contextlib.suppress(Exception):  # the first process has it too
                at, name = asked
                self._collect(snapshots[at], name)
        return ranks.from_first(write_first)

    def _collect(self, snapshot: SnapshotToSave, name: str) -> Tensor:
        """A tensor, whole in the first process; all must call it."""
        ranks = self.ranks
        pieces = [
            (rank, self._everything[rank][name])
            for rank, share in enumerate(self._shares)
            if name in share
        ]
        with ranks.raised_in_all():
            parts = [
                snapshot.tensors[name].on_host().contiguous()
                if rank == ranks.rank
                else _empty(piece, piece.sizes if ranks.first else (0,))
                for rank, piece in pieces
            ]
            whole = _empty(pieces[0][1], pieces[0][1].shape if ranks.first else (0,))
        for (rank, piece), part in zip(pieces, parts, strict=True):
            ranks.send_to_first(part, rank)
            if ranks.first:
                ends = zip(piece.first, piece.sizes, strict=True)
                whole[tuple(slice(first, first + size) for first, size in ends)] = part
        return whole

    def _whole(self, snapshot: SnapshotToSave, at: int) -> dict[str, TensorToSave]:
        """The tensors of snapshot `at` as the first process writes them."""

        def fetch(name: str) -> Tensor:
            self.ranks.broadcast((at, name))
            return self._collect(snapshot, name)

        kinds = {name: piece for pieces in self._everything for name, piece in pieces.items()}
        likes = {name: _empty(piece, piece.shape, "meta") for name, piece in kinds.items()}
        return {
            name: TensorToSave(like, like.dtype, like, partial(fetch, name))
            for name, like in likes.items()
        }

    def write(
        self, snapshots: Sequence[SnapshotToSave], keep: int | None
    ) -> tuple[list[Path], list[str], list[tuple[str, Path]]]:
        """Write this process' part of the snapshots of a step; all processes must call it.

        Returns the paths of those that are there, what went wrong, and tensors that float16 made
        infinite, each with the first such snapshot: in all processes the same.
        """
        ranks = self.ranks
        folders: dict[Path, SharedFolder] = {}
        files: list[Output | None] = []
        try:
            places = ranks.from_first(lambda: [_open(each, folders) for each in snapshots])
            pairs = zip(snapshots, places, strict=True)
            said = ranks.exchange([self._part(*each, files) for each in pairs])
            problems = [[each[0] for each in parts if each[0]] for parts in zip(*said, strict=True)]
            if isinstance(snapshots[0].folder, Url):  # else the folder takes the place of the old
                ranks.from_first(lambda: _make_room(snapshots, problems))
            placed = ranks.exchange(
                [
                    "" if found else self._told(each, file.commit if file else None)
                    for each, file, found in zip(snapshots, files, problems, strict=True)
                ]
            )
            for found, told in zip(problems, zip(*placed, strict=True), strict=True):
                found += [each for each in told if each]
            for file, found in zip(files, problems, strict=True):
                if file is not None and found:
                    file.rollback()
            written, failures = ranks.from_first(lambda: _place(snapshots, problems, folders, keep))
        finally:
            for file in files:
                if file is not None:
                    file.discard()
            for folder in folders.values():
                folder.discard()
        infinite: dict[str, Path] = {}
        for at, snapshot in enumerate(snapshots):
            if snapshot.path in written:
                for name in (name for parts in said for name in parts[at][1]):
                    infinite.setdefault(name, snapshot.path)
        return written, failures, list(infinite.items())

    def _part(
        self, snapshot: SnapshotToSave, place: Path | str, files: list[Output | None]
    ) -> tuple[str, list[str]]:
        """Why this process' part can't be written, if so; and what float16 made infinite.

        Its file, all written but without its name, is put to `files`.
        """
        files.append(None)
        if isinstance(place, str):
            return place if self.ranks.first else "", []
        infinite: list[str] = []

        def write() -> None:
            check_seen(place, snapshot.folder)
            path = place / shard_name(self.ranks.rank)
            file, fill = make_file(snapshot, path, overwrite=False)
            files[-1] = file
            file.open()
            infinite.extend(fill())
            file.finish()

        return self._told(snapshot, write), infinite

    def _told(self, snapshot: SnapshotToSave, work: Callable[[], object] | None) -> str:
        """What goes wrong in `work`, if anything, for all to hear of it."""
        try:
            if work is not None:
                work()
        except PosthocError as error:
            problem = f"{snapshot.path}: {error.problem} (process {self.ranks.rank})"
            return f"{problem}; {error.remedy}"
        except Exception as error:
            return f"{error!r} (process {self.ranks.rank})"
        return ""


def _empty(piece: Piece, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    import torch

    dtype = getattr(torch, DTYPES[piece.dtype].name or "")
    return torch.empty(shape, dtype=dtype, device=device)


def check_seen(path: Path, folder: Path) -> None:
    """Raise MachineError unless what the first process has made in `folder` is seen in this one."""
    if not is_seen(path):
        raise MachineError(
            str(folder),
            "is another folder than the first process', or on another disk",
            "choose one on a file system that all processes share",
        )


def _open(snapshot: SnapshotToSave, folders: dict[Path, SharedFolder]) -> Path | str:
    """Where the parts of a snapshot are written; or why they can't be."""
    if isinstance(snapshot.folder, Url):
        return snapshot.path
    try:
        folder = folders[snapshot.path] = SharedFolder(snapshot.path)
    except PosthocError as error:
        return str(error)
    return folder.temporary


def _make_room(snapshots: Sequence[SnapshotToSave], problems: Sequence[Sequence[str]]) -> None:
    """Remove what the run has written in the place of snapshots of which no part is missing."""
    for snapshot, found in zip(snapshots, problems, strict=True):
        for path in own_places(snapshot) if not found else ():
            remove_whole(path)


def _place(
    snapshots: Sequence[SnapshotToSave],
    problems: Sequence[list[str]],
    folders: Mapping[Path, SharedFolder],
    keep: int | None,
) -> tuple[list[Path], list[str]]:
    """Give those snapshots their names that all processes have written."""
    written: list[Path] = []
    failures: list[str] = []
    for snapshot, found in zip(snapshots, problems, strict=True):
        if not found and snapshot.path in folders:
            try:
                folders[snapshot.path].place(own_places(snapshot))
            except PosthocError as error:
                found = [str(error)]
        if found:
            more = f" (and {len(found) - 1} more)" if found[1:] else ""
            failures.append(f"no snapshot of step {snapshot.step}: {found[0]}{more}")
        else:
            written.append(snapshot.path)
    if keep is not None and len(written) == len(snapshots):
        first = snapshots[0]
        failures += remove_old_snapshots(first.folder, first.run, first.step, keep)
    return written, failures
