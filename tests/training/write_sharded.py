"""Train sharded networks and save their snapshots: four processes of this machine, then two.

    python -m tests.training.write_sharded FOLDER

makes a folder of snapshots for each way of sharding, and `plain`, of one process that trained the
same. What process R of N was told is in `said-N-R.json`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
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
from posthoc_cli.errors import MachineError
from posthoc_cli.storage import atomic
from posthoc_cli.training import ranks, sharded
from posthoc_cli.training.adapters import state_of
from posthoc_cli.training.averaging import is_sharded
from posthoc_cli.training.snapshot_files import TensorToSave

EVERY, STEPS, LAST = 2, 6, 10


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


def tracker(model: nn.Module, folder: Path | str, **options: Any) -> PostHocEMA:
    options = {"checkpoint_every": EVERY, "dtype": torch.float32, "raw": True} | options
    return PostHocEMA(model, folder=folder, **options)


# Four processes


def four(folder: Path, said: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    if dist.get_rank() == 0:
        plain = tracker(network(), folder / "plain")
        walk(plain, LAST)
        plain.close()
    for way, shard in WAYS.items():
        ema = tracker(shard(network(), mesh), folder / way, background=way != "fsdp")
        walk(ema, STEPS)
        if way == "fsdp":
            save(ema, folder / "state")
            whole = state_of(ema)
            if dist.get_rank() == 0:
                torch.save(whole, folder / "state.pt")
        if way in ("fsdp", "replicated"):
            model, options = shard(network(), mesh), {"store": "delta", "dtype": torch.float16}
            delta = tracker(model, folder / f"{way} delta", background=way == "fsdp", **options)
            walk(delta, STEPS)
            said[f"run of {way} delta"] = delta.state_dict()["run"]
            delta.close()
        walk(ema, LAST)
        if way in ("fsdp", "both"):
            said[f"lent to {way}"] = lent(ema)
        ema.close()
    # By four the run goes on to step 6, with two of its steps kept.
    kept = tracker(fsdp(network(), mesh), folder / "kept", keep=2, prefix="my")
    walk(kept, STEPS)
    kept.close()
    if "AWS_ENDPOINT_URL" in os.environ:
        said["bucket"] = in_a_bucket(mesh)
    said["full disk"] = full_disk(folder, mesh)
    said["no part"] = no_part(folder, mesh)
    said["refused"] = {name: message(scene, folder / name, mesh) for name, scene in REFUSED.items()}


def save(ema: PostHocEMA, place: Path) -> None:
    dcp.save({"model": ema.model.state_dict(), "ema": ema}, checkpoint_id=place)


def lent(ema: PostHocEMA) -> dict[str, Any]:
    """What is synthesized, what the network has of it, and whether it has its own values again."""
    made, before = ema.synthesize(sigma_rel=0.07), whole_of(ema.model)
    with ema.lend(sigma_rel=0.07) as model:
        same = [torch.equal(value, made[name]) for name, value in whole_of(model).items()]
    after = whole_of(ema.model)
    return {
        "lent": all(same),
        "back": all(torch.equal(after[name], before[name]) for name in after),
    }


def whole_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: each.full_tensor().clone() if is_sharded(each) else each.clone()
        for name, each in model.state_dict().items()
    }


def in_a_bucket(mesh: DeviceMesh) -> list[str]:
    """At step 2 an object of process 1 can't be completed; step 6 is written twice."""
    from posthoc_cli.storage.remote.uploads import ObjectFile

    placed = ObjectFile.place
    ema = tracker(fsdp(network(), mesh), "s3://bucket/run", keep=2, background=True)

    def place(file: ObjectFile, *, overwrite: bool) -> None:
        if ema.step == 2 and dist.get_rank() == 1 and "0.100" in str(file.path):
            raise MachineError(str(file.path), "cannot be written", "try again")
        placed(file, overwrite=overwrite)

    ObjectFile.place = place  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        walk(ema, 2)
        ema.wait()
    walk(ema, STEPS)
    ema.checkpoint()
    ema.close()
    return [str(each.message) for each in caught]


def full_disk(folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """The disk of process 2 is full at step 2, then that of process 0, in a thread, at step 4."""
    written = atomic.AtomicFile.write_at
    found: dict[str, Any] = {}
    for full, background in ((2, False), (0, True)):

        def write_at(file: atomic.AtomicFile, offset: int, data: Any, full: int = full) -> None:
            if offset and dist.get_rank() == full and "0.100" in str(file.path):
                with atomic.write_errors(file.path):
                    raise OSError(errno.ENOSPC, "No space left on device")
            written(file, offset, data)

        atomic.AtomicFile.write_at = write_at  # type: ignore[method-assign]
        place = folder / f"full-{full}"
        ema = tracker(fsdp(network(), mesh), place, background=background)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            walk(ema, 2)
            ema.wait()
        atomic.AtomicFile.write_at = written  # type: ignore[method-assign]
        found[place.name] = [str(each.message) for each in caught]
        walk(ema, 4)
        ema.close()
    return found


def no_part(folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Of differences to be, process 2 can't give its part at step 4; nor can the first write."""
    on_host, write_at = TensorToSave.on_host, atomic.AtomicFile.write_at
    found: dict[str, Any] = {}

    def fails(*values: Any, **named: Any) -> Any:
        raise MemoryError("no room")

    def full(file: atomic.AtomicFile, offset: int, data: Any) -> None:
        with atomic.write_errors(file.path):
            raise OSError(errno.ENOSPC, "No space left on device")

    for broken, background in ((2, False), (0, True)):
        place = folder / f"part-{broken}"
        options = {"store": "delta", "dtype": torch.float16}
        ema = tracker(fsdp(network(), mesh), place, background=background, **options)
        walk(ema, 2)
        ema.wait()
        if dist.get_rank() == broken == 0:
            atomic.AtomicFile.write_at = full  # type: ignore[method-assign]
        elif dist.get_rank() == broken:
            TensorToSave.on_host = fails  # type: ignore[method-assign]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            walk(ema, 4)
            ema.wait()
        found[place.name] = [str(each.message) for each in caught]
        TensorToSave.on_host = on_host  # type: ignore[method-assign]
        atomic.AtomicFile.write_at = write_at  # type: ignore[method-assign]
        walk(ema, 6)
        ema.close()
    return found


def message(scene: Callable[[Path, DeviceMesh], None], folder: Path, mesh: DeviceMesh) -> list[Any]:
    """What this process is told, and after how many seconds."""
    began, text = time.monotonic(), ""
    try:
        scene(folder, mesh)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    dist.barrier()
    return [text, seconds]


def another_run(folder: Path, mesh: DeviceMesh) -> None:
    if dist.get_rank() == 0:
        other = tracker(network(), folder)
        walk(other, EVERY)
        other.close()
    dist.barrier()
    walk(tracker(fsdp(network(), mesh), folder), 1)


def not_shared(folder: Path, mesh: DeviceMesh) -> None:
    seen = sharded.is_seen
    sharded.is_seen = lambda path: dist.get_rank() != 3
    try:
        walk(tracker(fsdp(network(), mesh), folder), 1)
    finally:
        sharded.is_seen = seen


def one_without(folder: Path, mesh: DeviceMesh) -> None:
    model = fsdp(network(), mesh)
    ranks._PATIENCE = timedelta(seconds=1)
    if dist.get_rank() != 3:
        walk(tracker(model, folder), 1)


def other_steps(folder: Path, mesh: DeviceMesh) -> None:
    ema = tracker(fsdp(network(), mesh), folder)
    walk(ema, 1)
    ema.step += dist.get_rank() == 1
    ema.checkpoint()


def another_network(folder: Path, mesh: DeviceMesh) -> None:
    model = network()
    ema = tracker(fsdp(model, mesh), folder, checkpoint_every=None)
    walk(ema, 1)
    if dist.get_rank() == 2:
        model.scale = nn.Parameter(torch.ones(3))
    ema.checkpoint()


REFUSED = {
    "another run": another_run,
    "not shared": not_shared,
    "one without": one_without,
    "other steps": other_steps,
    "another network": another_network,
}


# Two processes


def two(folder: Path, said: dict[str, Any]) -> None:
    """Go on with what four have saved; and lose one process."""
    mesh = init_device_mesh("cpu", (2,))
    model = tensor_of_two(network(), mesh)
    ema = tracker(model, folder / "resumed")
    state = {"model": model.state_dict(), "ema": ema}
    dcp.load(state, checkpoint_id=folder / "state")
    model.load_state_dict(state["model"])
    walk(ema, LAST)
    ema.close()
    model = fsdp(network(), mesh)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "state")
    model.load_state_dict(state["model"])
    whole = tracker(model, folder / "whole")
    whole.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    walk(whole, LAST)
    whole.close()
    model = fsdp(network(), mesh)
    state = io.BytesIO()
    torch.save(ema.state_dict(), state)  # as each process does that doesn't know better
    both = [state.getvalue()]
    dist.broadcast_object_list(both, src=0)
    said["of process 0"] = ""
    try:
        again = torch.load(io.BytesIO(both[0]), weights_only=False)
        tracker(ema.model, folder / "again").load_state_dict(again)
    except ValueError as error:
        said["of process 0"] = str(error)
    read = tracker(model, folder / "both")
    said["read step"] = read.load_snapshots(STEPS)
    for average in read.state_dict()["averages"]:
        whole = {n: each.full_tensor() if is_sharded(each) else each for n, each in average.items()}
        said.setdefault("read", []).append({name: each.tolist() for name, each in whole.items()})
    (folder / f"so far-{dist.get_rank()}.json").write_text(json.dumps(said["of process 0"]))
    lost = tracker(model, folder / "lost")
    walk(lost, 1)
    if dist.get_rank() == 1:
        atomic.AtomicFile.write_at = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    said["lost"] = []
    try:
        walk(lost, EVERY)
    except RuntimeError as error:
        said["lost"] = [type(error).__name__]


def tensor_of_two(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {"up": RowwiseParallel(), "down": ColwiseParallel()}
    parallelize_module(model, mesh, plan)
    model.head.weight = model.down.weight
    return model


def run(rank: int, size: int, folder: Path, work: Callable[[Path, dict[str, Any]], None]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder / f'store{size}'}"
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=store)
    said: dict[str, Any] = {}
    try:
        work(folder, said)
    except Exception:
        said["failed"] = traceback.format_exc()
    (folder / f"said-{size}-{rank}.json").write_text(json.dumps(said))
    os._exit("failed" in said)


def main(folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = torch.multiprocessing.get_context("fork")
    for size, work in ((4, four), (2, two)):
        processes = [
            context.Process(target=run, args=(rank, size, folder, work)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
