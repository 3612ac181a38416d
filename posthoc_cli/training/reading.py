"""A tracker's snapshots read again: averages to go on with, and EMAs of other lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats import open_network
from posthoc_cli.solver.methods import METHODS
from posthoc_cli.storage import ENDING, Reader, TensorInfo
from posthoc_cli.storage.dtypes import DTYPES
from posthoc_cli.storage.metadata import GAMMA, RUN
from posthoc_cli.training.averaging import box_of
from posthoc_cli.training.counting import resolve_gamma
from posthoc_cli.training.snapshot_files import headers, own_snapshots, own_step

_BAND = 1 << 24
"""Bytes read at a time of a tensor of which each row is wanted in part."""


def read_averages(
    folder: Path, gammas: Sequence[float], step: int | None, whole: Mapping[str, Tensor]
) -> tuple[str, int, list[dict[str, Tensor]]]:
    """The run, the step and the averages of the newest step, or of `step`, that has one for each of
    `gammas`; of what is sharded in the network, whose tensors are `whole`, this process' part.

    Raises SnapshotError where there are none, or of several runs; or without a tensor.
    """
    found: dict[tuple[str, int], dict[str, Path]] = {}
    for path, metadata in headers(folder):
        run = metadata.get(RUN, "")
        at = own_step(path, metadata, run)
        if at is not None and step in (None, at):
            found.setdefault((run, at), {})[metadata.get(GAMMA, "")] = path
    profiles = [repr(gamma) for gamma in gammas]
    usable = [key for key, paths in found.items() if paths.keys() >= {*profiles}]
    if len({run for run, _ in found}) > 1:
        raise SnapshotError(str(folder), "holds several runs' snapshots", "give one run's folder")
    if not usable:
        of = "" if step is None else f" of step {step}"
        problem = f"holds no snapshots{of} of gammas {', '.join(profiles)}"
        raise SnapshotError(
            str(folder), problem, "give the folder and the profiles that the run began with"
        )
    run, newest = max(usable, key=lambda key: key[1])
    paths = found[run, newest]
    return run, newest, [_read(paths[profile], whole) for profile in profiles]


def _read(path: Path, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    index = open_network(path)
    with Reader(index) as reader:
        for name, like in whole.items():
            info = index.tensors.get(name)
            if info is None or info.shape != tuple(like.shape):
                problem = f"has no tensor '{name}' of {list(like.shape)}"
                raise SnapshotError(str(path), problem, "make the network as it was")
            tensors[name] = _read_box(reader, info, *box_of(like))
        reader.check_unchanged()
    return tensors


def _read_box(
    reader: Reader, info: TensorInfo, first: tuple[int, ...], sizes: tuple[int, ...]
) -> Tensor:
    """A box of a tensor; of rows that are wanted in part, a band at a time is read whole."""
    dtype = DTYPES[info.dtype].torch()
    made = torch.empty(sizes, dtype=dtype)
    if not made.numel():
        return made
    if not sizes:
        return _read_box(reader, replace(info, shape=(1,)), (0,), (1,)).view(())
    inside = info.shape[1:]
    row = math.prod(inside) * dtype.itemsize
    most = max(_BAND // row, 1)
    for begin in range(0, sizes[0], most):
        count = min(most, sizes[0] - begin)
        band = torch.empty((count, *inside), dtype=dtype)
        data = band.view(-1).view(torch.uint8).numpy().data
        reader.read(info.start + (first[0] + begin) * row, data)
        for dim, (at, size) in enumerate(zip(first[1:], sizes[1:], strict=True), 1):
            band = band.narrow(dim, at, size)
        made[begin : begin + count] = band
    return made


def synthesized(
    folder: Path,
    run: str | None,
    named: Mapping[str, Tensor],
    averaged: Callable[[str], bool],
    target: Mapping[str, Any],
    step: int | None,
    method: str,
) -> dict[str, Tensor]:
    """The average that `target` says, as `Run.solve` has it, at `step`, in the dtypes of `named`,
    in host memory; of `run`'s snapshots, or of all that `folder` holds. Of tensors that aren't
    `averaged` it has the last snapshot's. Raises ValueError unless it is one average."""
    from posthoc_cli.api import open_snapshots  # only here: training itself needs none of it

    target = {key: value for key, value in target.items() if value is not None}
    if target.keys() - {"target_for"} <= {"sigma_rel", "gamma"}:
        resolve_gamma(target.get("sigma_rel"), target.get("gamma"))

    own = [path.name for path, _ in own_snapshots(folder, run)] if run is not None else []
    if method in METHODS and not METHODS[method].takes_raw:
        own = [name for name in own if not name.removesuffix(ENDING).endswith("-raw")]
    if run is not None and not own:
        raise SnapshotError(
            str(folder), "holds no snapshots of this run yet", "call checkpoint() first"
        )
    solution = open_snapshots(folder, only=[escape(name) for name in own]).solve(
        **target, step=step, method=method
    )
    if len(solution.targets) != 1:
        raise ValueError(f"give one target, not {len(solution.targets)}")
    dtypes = {name: tensor.dtype for name, tensor in named.items()}
    exact = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes.values())
    names = solution.snapshots[-1].index.tensors
    tensors = solution.state_dict(
        dtype="float64" if exact else "float32",
        copy=[escape(name) for name in names if not averaged(name)],
    )
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}
