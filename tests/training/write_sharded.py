"""Train sharded networks and save their snapshots: four processes of this machine, then two.

    python -m tests.training.write_sharded FOLDER

makes a folder of snapshots for each way of sharding, and `plain`, of one process that trained the
same. What the processes said is in `said.json`.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from posthoc_cli import PostHocEMA
from posthoc_cli.storage import atomic

STEPS = 6
EVERY = 2


class Network(nn.Module):
    """Uneven in every dimension, with tied weights, a tensor smaller than there are processes, an
    empty one, and whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 10)
        self.down = nn.Linear(10, 5, bias=False)
        self.conv = nn.Conv2d(3, 5, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(10, 5, bias=False)
        self.head.weight = self.down.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("empty", torch.zeros(3, 0))


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def walk(ema: PostHocEMA, until: int) -> None:
    """A random walk that is the same whatever the sharding."""
    while ema.step < until:
        generator = torch.Generator().manual_seed(ema.step)
        with torch.no_grad():
            for parameter in ema.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if hasattr(parameter, "to_local"):
                    (box,) = parameter.__create_chunk_list__()
                    for dim, (first, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                        noise = noise.narrow(dim, min(first, noise.shape[dim]), size)
                    parameter.to_local().add_(noise)
                else:
                    parameter.add_(noise)
            for buffer in ema.model.buffers():
                buffer.add_(1)
        ema.update()


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def both(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 over tensor parallelism: some tensors are sharded twice in one dimension."""
    return fully_shard(tensor(model, mesh), mesh=mesh["row"])


def hybrid(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def tensor(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallelism in two groups that train copies, as data-parallel ones do."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["column"], plan)
    model.head.weight = model.down.weight  # which has been replaced
    return model


def replicated(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WAYS: Mapping[str, Callable[[nn.Module, DeviceMesh], nn.Module]] = {
    "fsdp": fsdp,
    "both": both,
    "hybrid": hybrid,
    "tensor": tensor,
    "replicated": replicated,
}


def tracker(model: nn.Module, folder: Path, **options: Any) -> PostHocEMA:
    options = {"checkpoint_every": EVERY, "dtype": torch.float32, "raw": True} | options
    return PostHocEMA(model, folder=folder, **options)


def four(rank: int, folder: Path) -> None:
    join(rank, 4, folder)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    if rank == 0:
        plain = tracker(network(), folder / "plain")
        walk(plain, STEPS)
    for way, shard in WAYS.items():
        ema = tracker(shard(network(), mesh), folder / way, background=way != "fsdp")
        walk(ema, STEPS)
        ema.close()
    dist.destroy_process_group()


def join(rank: int, size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder / f'store{size}'}"
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=store)


def main(folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.multiprocessing.start_processes(four, (folder,), nprocs=4, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
