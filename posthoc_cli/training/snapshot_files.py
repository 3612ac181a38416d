"""The snapshots of a run as files: their names, what is in them, and which of a folder are whose.

A run is one training run, resumed or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from posthoc_cli.errors import MachineError, PosthocError
from posthoc_cli.formats.sharding import is_shard
from posthoc_cli.snapshots import SAME_WIDTH
from posthoc_cli.storage import ENDING, TensorIndex, fingerprint, make_header, read_header
from posthoc_cli.storage.deltas import bases_of
from posthoc_cli.storage.dtypes import BY_NAME, DTYPES
from posthoc_cli.storage.metadata import (
    CONVERTED,
    DECAY,
    FORMAT,
    GAMMA,
    PACKED,
    RECIPE,
    RUN,
    SIGMA_REL,
    STEP,
)
from posthoc_cli.storage.outputs import Output
from posthoc_cli.storage.places import File, Url
from posthoc_cli.storage.shared import remove_whole
from posthoc_cli.storage.stores import exists, file_status, forget, is_folder, list_folder
from posthoc_cli.storage.writing import make_output
from posthoc_cli.synthesis.bases import Bases, Stored
from posthoc_cli.synthesis.deltas import NewFile, write_chain
from posthoc_cli.training.averaging import accumulation_dtype, gather, is_sharded
from posthoc_cli.training.chains import Chain, Kinds, chains, profile_of

_MADE = {RECIPE, CONVERTED, PACKED}
"""What only files have that were made of snapshots."""

_PIECE = 1 << 18
"""Elements that are converted and written at a time."""

_OURS = re.compile(r"-step(\d{8,})-(?:[\d.]+|raw)$")
"""What the name of a snapshot ends with that a tracker has written; of a file, before its own."""

SnapshotHeader = tuple[Path, Mapping[str, str]]
"""A file that may be a snapshot, with the metadata in its header."""


def safetensors_name(dtype: torch.dtype) -> str | None:
    """safetensors' name for a dtype; None where it has none."""
    return BY_NAME.get(str(dtype).removeprefix("torch."))


def check_dtypes(dtype: torch.dtype | None, average_dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype that snapshots, or averages, are not of."""
    if dtype is not None and (not (safetensors_name(dtype) and dtype.is_floating_point)):
        raise ValueError(f"dtype {dtype}: snapshots are of a floating-point dtype, or None")
    if average_dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"average_dtype {average_dtype}: a decay near one is lost in fewer bits than "
            "float32 has; give torch.float32 or torch.float64"
        )


def saved_dtype(
    name: str, tensor: Tensor, floating: torch.dtype | None, chain: Chain | None = None
) -> torch.dtype:
    """The dtype to save a tensor in: `floating`, if given, for those of a floating-point dtype.

    What differences are taken of, in a `chain`, is at least float32. Raises ValueError when
    safetensors has no such dtype.
    """
    dtype = floating if floating and tensor.is_floating_point() else tensor.dtype
    if chain is not None and tensor.is_floating_point():
        dtype = accumulation_dtype(tensor.dtype, torch.float32)
    if dtype is torch.complex128:
        dtype = torch.complex64  # the one complex dtype that the format has
    if safetensors_name(dtype) is None:
        raise ValueError(
            f"tensor {name!r} is {dtype}, which safetensors doesn't have; leave it out: "
            "include= takes the names to save"
        )
    return dtype


@dataclass(frozen=True, slots=True)
class TensorToSave:
    """A tensor's value, the dtype to save it in, and the network's own tensor.

    `value` is sharded as `like` is; or it is what `fetch` returns, when it is called.
    """

    value: Tensor
    dtype: torch.dtype
    like: Tensor
    fetch: Callable[[], Tensor] | None = None

    def on_host(self, *, copy: bool = False) -> Tensor:
        """The whole tensor in its final dtype, in host memory.

        Every process must call it if it is sharded.
        """
        whole = self.fetch() if self.fetch else gather(self.value.detach(), self.like)
        return whole.to("cpu", self.dtype, copy=copy)


def dtype_name(tensor: TensorToSave) -> str:
    """safetensors' name for the dtype it is saved in."""
    return safetensors_name(tensor.dtype) or ""


@dataclass(frozen=True, slots=True)
class SnapshotToSave:
    """An average as of `step`, to be written to `folder`; of sigma_rel 0 the network itself."""

    folder: Path
    prefix: str
    run: str
    step: int
    gamma: float
    sigma_rel: float
    tensors: Mapping[str, TensorToSave]
    sharding: Mapping[str, str] = field(default_factory=dict)
    """Of what is a process' part of one, the metadata that says so."""

    @property
    def path(self) -> Path:
        """Its file, or its folder where it is written in parts."""
        ending = "" if self.sharding else ENDING
        if self.sigma_rel == 0:
            return self.folder / f"{self.prefix}-step{self.step:08d}-raw{ending}"
        places = 3  # decimals, or as many more as tell two profiles apart
        while (
            abs(round(self.sigma_rel, places) - self.sigma_rel) > SAME_WIDTH / 10 * self.sigma_rel
        ):
            places += 1
        # A name that fits no known convention, so that nobody reads something else into it.
        name = f"{self.prefix}-step{self.step:08d}-{self.sigma_rel:.{places}f}{ending}"
        return self.folder / name

    @property
    def metadata(self) -> dict[str, str]:
        profile = {GAMMA: repr(self.gamma), SIGMA_REL: repr(self.sigma_rel)}
        return {
            FORMAT: "pt",  # some libraries load nothing without it
            STEP: str(self.step),
            **({DECAY: "0"} if self.sigma_rel == 0 else profile),
            RUN: self.run,
            **self.sharding,
        }

    @property
    def kinds(self) -> Kinds:
        return {
            name: (dtype_name(tensor), tuple(tensor.like.shape))
            for name, tensor in self.tensors.items()
        }

    def on_host(self, *, hold: bool) -> SnapshotToSave:
        """The same with its tensors copied to host memory, each once however many names it has.

        A process that doesn't `hold` the result takes part in gathering what is sharded, and gets
        no tensors.
        """
        copies: dict[int, TensorToSave] = {}
        for tensor in self.tensors.values():
            if (hold or is_sharded(tensor.like)) and id(tensor.value) not in copies:
                value = tensor.on_host(copy=True)
                made = TensorToSave(value, tensor.dtype, value)
                copies[id(tensor.value)] = made if hold else tensor
        held = {name: copies[id(each.value)] for name, each in self.tensors.items() if hold}
        return replace(self, tensors=held)


def write_snapshot(snapshot: SnapshotToSave) -> list[str]:
    """Write a snapshot, whole or not at all, replacing only what the same run has written.

    Tensors with several names are written under each, since the format has no shared ones.
    Returns the names of tensors with values that float16, if they are in it, made infinite.
    Raises MachineError when the disk is full or the folder can't be written, UsageError when there
    is a file that isn't the run's.
    """
    old = own_places(snapshot)
    file, fill = make_file(snapshot, snapshot.path, overwrite=snapshot.path in old)
    with file:
        overflowing = fill()
    for other in old:
        if other != snapshot.path:
            remove_whole(other)
    return overflowing


def make_file(
    snapshot: SnapshotToSave, path: Path, *, overwrite: bool
) -> tuple[Output, Callable[[], list[str]]]:
    """The file or object at `path` to be, and what fills it and returns what float16 overflows."""
    header, places = make_header(snapshot.kinds, snapshot.metadata)
    size = len(header) + max((info.end for info in places.values()), default=0)
    file = make_output(path, size, overwrite=overwrite)

    def fill() -> list[str]:
        overflowing: dict[str, None] = {}
        file.write_at(0, header)
        for name, info in places.items():
            if not info.elements:
                continue
            at = len(header) + info.start
            for value in _pieces(snapshot.tensors[name]):
                # All exponent bits set: infinite or not a number. Torch's isfinite takes ten times
                # as long as the write.
                if value.dtype == torch.float16 and np.any(
                    (value.view(torch.int16).numpy() & 0x7C00) == 0x7C00
                ):
                    overflowing[name] = None
                file.write_at(at, value.view(torch.uint8).numpy().data)
                at += value.nbytes
        return list(overflowing)

    return file, fill


def write_difference(
    snapshot: SnapshotToSave, bases: Sequence[tuple[TensorIndex, float]], chain: Chain
) -> None:
    """Write a snapshot as the difference to `bases`, times their coefficients, whole or not at all,
    as write_snapshot does.

    Without bases it begins a chain. What is a difference to another file that was in its place is
    removed. Raises SnapshotError too, when a file of the base's changes meanwhile.
    """
    places = make_header(snapshot.kinds, {})[1]
    last: list[tuple[str, Tensor]] = []

    def read(name: str, first: int, into: npt.NDArray[np.uint8]) -> None:
        tensor = snapshot.tensors[name]
        if last and last[0][0] == name:
            value = last[0][1]
        elif tensor.fetch or not tensor.value.is_contiguous():
            last.clear()
            value = _flat(tensor)
            last[:] = [(name, value)]
        else:
            value = tensor.value.detach().view(-1)
        part = value[first : first + into.size * 8 // DTYPES[places[name].dtype].bits]
        into[:] = part.to("cpu", tensor.dtype).view(torch.uint8).numpy()

    old = own_places(snapshot)

    def remove_unfit(written: Path) -> None:
        known = fingerprint(read_header(written)) if old else ""
        for path, _ in own_snapshots(snapshot.folder, snapshot.run) if old else ():
            for base in bases_of(metadata_of(path)):
                if base.name == snapshot.path.name and base.fingerprint != known:
                    remove_whole(path)

    new = NewFile(
        snapshot.path,
        places,
        read,
        snapshot.metadata,
        [(index.path, number) for index, number in bases],
        overwrite=snapshot.path in old,
        sampled=not any(each.fetch for each in snapshot.tensors.values()),
    )
    indexes = [index for index, _ in bases]
    opened: AbstractContextManager[Bases | None] = nullcontext()
    if indexes and chain.held is None:
        opened = Stored(indexes)
    elif indexes and chain.held is not None:
        opened = chain.held.at(indexes, profile_of(snapshot.metadata))
    with opened as there:
        write_chain([new], chain.dtype, there, check=remove_unfit)
    for other in old:
        if other != snapshot.path:
            remove_whole(other)


def _flat(tensor: TensorToSave) -> Tensor:
    return tensor.on_host().contiguous().view(-1)


def _pieces(tensor: TensorToSave) -> Iterator[Tensor]:
    """The same piece by piece where memory allows it."""
    value = tensor.value.detach()
    if is_sharded(tensor.like) or not value.is_contiguous():
        yield _flat(tensor)
        return
    for piece in torch.split(value.view(-1), _PIECE):
        yield piece.to("cpu", tensor.dtype)


def own_places(snapshot: SnapshotToSave) -> list[Path]:
    """What the run has written of a snapshot before: as a file, or as a folder of parts."""
    name = snapshot.path.name.removesuffix(ENDING)
    places = [snapshot.folder / name, snapshot.folder / (name + ENDING)]
    return [
        path
        for path in places
        if exists(path) and own_step(path, metadata_of(path), snapshot.run) is not None
    ]


def own_snapshots(folder: Path, run: str) -> list[tuple[Path, int]]:
    """A run's snapshots in a folder, with their steps."""
    found = ((path, own_step(path, metadata, run)) for path, metadata in headers(folder))
    return [(path, step) for path, step in found if step is not None]


def own_step(path: Path, metadata: Mapping[str, str], run: str) -> int | None:
    """The step of a snapshot that a tracker of `run` has written; None for any other file.

    What was made of snapshots has their run too, and so has a copy under another name: that is
    the user's.
    """
    if metadata.get(RUN) != run or not metadata.keys().isdisjoint(_MADE):
        return None
    step = metadata.get(STEP, "")
    written = _OURS.search(path.name.removesuffix(ENDING))
    return int(step) if written and step == str(int(written[1])) else None


def headers(folder: Path) -> list[SnapshotHeader]:
    """The files in a folder that may be snapshots, and the folders that a tracker has made."""
    if isinstance(folder, Url):
        forget()
    names = [name for name in list_folder(folder) if name[0] != "."] if is_folder(folder) else []
    files = [(folder / name, metadata_of(folder / name)) for name in names if name.endswith(ENDING)]
    parts = [(folder / name, metadata_of(folder / name)) for name in names if _OURS.search(name)]
    return [*files, *((path, metadata) for path, metadata in parts if RUN in metadata)]


def remove_old_snapshots(folder: Path, run: str, newest: int, keep: int) -> list[str]:
    """Remove a run's oldest snapshots, so that those of `keep` steps up to `newest` are left, and
    what shares a chain with them.

    Returns a message for each that can't be removed.
    """
    steps = {path: step for path, step in own_snapshots(folder, run) if step <= newest}
    kept = sorted(set(steps.values()))[-keep:]
    failures = []
    for chain in chains([(path, metadata_of(path)) for path in steps]):
        if max(steps[path] for path in chain) >= kept[0]:
            continue
        for path in chain:
            try:
                remove_whole(path)
            except MachineError as error:
                failures.append(f"{path}: an old snapshot that can't be removed: {error}")
                break  # it needs the others
    return failures


def metadata_of(path: Path) -> Mapping[str, str]:
    """What a snapshot says of itself; nothing of what is none."""
    try:
        if is_folder(path):
            path /= next(filter(is_shard, list_folder(path)), "")
        found = file_status(path) if isinstance(path, Url) else None
        if found is None or found.version is None:
            return read_header(path).metadata
        if found not in _READ:  # of a bucket's objects what was read holds for their version
            _READ[found] = read_header(path).metadata
        return _READ[found]
    except PosthocError:
        return {}


_READ: dict[File, Mapping[str, str]] = {}
