"""Write checkpoints with torch.distributed: four processes of this machine, gloo between them.

    python -m tests.formats.write_distributed FOLDER

makes a folder for each way of sharding, and in it `step-N.safetensors`, the whole network, and what
torch.distributed.checkpoint writes of it: `dcp/step-N`, or `hf/step-N` as safetensors files.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from safetensors.torch import save_file
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

STEPS = (100, 200)


class Network(torch.nn.Module):
    """Uneven in every dimension, with a tensor smaller than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 10)
        self.down = torch.nn.Linear(10, 5, bias=False)
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) * self.scale + self.conv(torch.ones(1, 3, 3, 3)).flatten()


def network(step: int) -> Network:
    """The same on every rank."""
    torch.manual_seed(step)
    made = Network()
    made.count.fill_(7)
    return made


def fsdp(step: int, mesh: DeviceMesh) -> dict[str, Any]:
    """FSDP2 of two ranks, after a step of Adam: the tutorial's nested dict."""
    model = network(step)
    fully_shard(model, mesh=mesh["column"])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    return {"app": {"model": weights, "optim": states}, "step": step}


def tensor_parallel(step: int, mesh: DeviceMesh) -> dict[str, Any]:
    """FSDP2 over tensor parallelism: some tensors are sharded twice in one dimension."""
    model = network(step).bfloat16()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["column"], plan)
    fully_shard(model, mesh=mesh["row"])
    return {"model": model.state_dict(), "ema": {"decay": 0.9}}


def placed(step: int, mesh: DeviceMesh) -> dict[str, Any]:
    """A flat dict of tensors with all kinds of placements."""
    ways = ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Shard(1), Shard(1)], [Replicate()] * 2)
    state = network(step).state_dict()
    made = {}
    for (name, tensor), way in zip(state.items(), [*ways, *ways], strict=False):
        fits = all(not isinstance(p, Shard) or p.dim < tensor.dim() for p in way)
        made[name] = distribute_tensor(tensor, mesh, way if fits else [Replicate()] * 2)
    return made


def plain(step: int, mesh: DeviceMesh) -> dict[str, Any]:
    """No DTensor: rank 0's, one of them in another memory format, a transposed one, a tied one."""
    state = network(step).state_dict()
    state["conv.weight"] = state["conv.weight"].to(memory_format=torch.channels_last)
    state["down.weight"] = state["down.weight"].t().contiguous().t()
    return {"state": {"network": state, "lists": []}, "lr": 0.1, "losses": [1.0, 2.0]}


def megatron(step: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Flat names, which nothing says the dicts of, as Megatron-LM's planner leaves them."""
    state = placed(step, mesh)
    moments = {f"optimizer.state.exp_avg.{name}": one * 0 for name, one in state.items()}
    return state | moments | {"rng_state": [1, 2]}


WAYS: Mapping[str, tuple[Callable[[int, DeviceMesh], dict[str, Any]], int]] = {
    "fsdp": (fsdp, 2),
    "tensor_parallel": (tensor_parallel, 4),
    "placed": (placed, 4),
    "plain": (plain, 4),
    "megatron": (megatron, 4),
}


def whole(state: Any) -> dict[str, torch.Tensor]:
    """The network in a checkpoint's dict, every tensor whole."""
    for key in ("app", "model", "state", "network"):
        state = state.get(key, state)
    full = {}
    for name, tensor in state.items():
        if name.startswith(("optimizer.", "rng_")):
            continue
        full[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return {name: tensor.contiguous().clone() for name, tensor in full.items()}


def save_whole(state: Any, place: Path, step: int) -> None:
    full = whole(state)
    if dist.get_rank() == 0:
        place.mkdir(exist_ok=True)
        save_file(full, place / f"step-{step}.safetensors")


def write(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", rank=rank, world_size=4, init_method=store)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    two = dist.new_group([0, 1])
    for way, (make, ranks) in WAYS.items():
        for step in STEPS:
            if rank >= ranks:
                continue
            state = make(step, mesh)
            group = two if ranks == 2 else None
            planner = DefaultSavePlanner(flatten_state_dict=way != "megatron")
            place = folder / way / f"step-{step}"
            dcp.save(state, checkpoint_id=place, process_group=group, planner=planner)
            save_whole(state, folder / f"{way}-whole", step)
            if way == "placed":
                place = folder / "hf" / f"step-{step}"
                named = {n if n == "scale" else f"model.{n}": one for n, one in state.items()}
                writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
                dcp.save(named, storage_writer=writer)
                save_whole(named, folder / "hf-whole", step)
    dist.destroy_process_group()


def main(folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.multiprocessing.start_processes(write, (folder,), nprocs=4, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
