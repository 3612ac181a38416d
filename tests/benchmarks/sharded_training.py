"""Snapshots of a sharded network: memory and time, by how many processes write them.

    python tests/benchmarks/sharded_training.py [--parameters MILLIONS] [--folder FOLDER]

For 1, 2 and 4 processes (fully_shard, gloo): what a process holds of the network, and its largest
part of a tensor; by how much its memory grows while it saves again, at its peak, in the caller's
thread and in the background; the seconds of a checkpoint of two averages, and of gathering the two
in the first process and saving them there. Then how far a save in the background overlaps with
training: the time of a training step that begins while one runs, relative to others. Last what it
takes to read them: the processor time of a synthesis from the folder that four have written,
relative to that from plain files.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posthoc_cli import PostHocEMA, open_snapshots
from posthoc_cli.training.averaging import gather, named_tensors

MB = 1e6
WIDTH = 2048
CHECKPOINTS = 6
STEPS = 4


def memory(what: str) -> float:
    """What this process has of memory, VmRSS, or has had at most, VmHWM; in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024 / MB
    raise OSError("no /proc/self/status")


def growth(work: Callable[[], object]) -> tuple[float, float]:
    """By how much memory grows at most in `work`, in MB, and its seconds."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept
    Path("/proc/self/clear_refs").write_text("5")  # from now on it is measured anew
    before, begin = memory("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    return memory("VmHWM") - before, seconds


def measure(rank: int, size: int, folder: Path, parameters: float, results: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / f'store{size}'}"
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=store)
    torch.manual_seed(0)
    count = round(parameters * 1e6 / WIDTH**2)
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))
    if size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    emas = {
        name: PostHocEMA(
            model, folder=folder / f"{name}-{size}", checkpoint_every=None, keep=CHECKPOINTS,
            background=name == "background",
        )
        for name in ("foreground", "background")
    }  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(CHECKPOINTS):
        with torch.no_grad():
            for each in model.parameters():
                local = each.to_local() if size > 1 else each  # type: ignore[operator]
                local.add_(0.01 * torch.randn_like(local))
        for name, ema in emas.items():
            ema.update()
            dist.barrier()

            found.setdefault(name, []).append(growth(partial(save, ema)))
        dist.barrier()
        found.setdefault("gathered", []).append(growth(partial(gathered, ema, folder)))
    overlap = overlapping(emas["background"])
    for ema in emas.values():
        ema.close()
    parts = [average.numel() * 2 / MB for average in ema._averages.tensors[0].values()]
    # The first one loads torch.distributed.checkpoint.
    grown = {name: statistics.median(size for size, _ in each[1:]) for name, each in found.items()}
    seconds = {name: statistics.median(s for _, s in each) for name, each in found.items()}
    results.put((rank, sum(parts), max(parts), grown, seconds, overlap))
    results.close()
    results.join_thread()
    os._exit(0)


def save(ema: PostHocEMA) -> None:
    ema.checkpoint()
    ema.wait()


def overlapping(ema: PostHocEMA) -> float:
    """The time of a training step that begins during a save, relative to one without."""
    batch = torch.randn(16, WIDTH)

    def step() -> float:
        begin = time.perf_counter()
        ema.model(batch).square().mean().backward()
        ema.model.zero_grad()
        return time.perf_counter() - begin

    step()
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(2 * CHECKPOINTS):
        dist.barrier()
        times[False] += [step() for _ in range(STEPS)]
        ema.checkpoint()
        for _ in range(STEPS):
            thread = ema._writer._thread
            times[thread is not None and thread.is_alive()].append(step())
        ema.wait()
    return statistics.median(times[True]) / statistics.median(times[False])


def gathered(ema: PostHocEMA, folder: Path) -> None:
    """What a tracker would do that has the first process write all."""
    own = named_tensors(ema.model)
    for average in ema._averages.tensors:
        whole = {}
        for name, part in average.items():
            value = gather(part, own[name])
            if dist.get_rank() == 0:
                whole[name] = value.half()
        if whole:
            save_file(whole, folder / "gathered.safetensors")
            with open(folder / "gathered.safetensors", "rb") as file:
                os.fsync(file.fileno())


def synthesis(run: Path, out: Path) -> float:
    begin = time.process_time()
    open_snapshots(run).solve(sigma_rel=0.07).save(out, force=True)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parameters", type=float, default=34, metavar="MILLIONS")
    parser.add_argument("--folder", type=Path, help="where to write, by default a temporary one")
    options = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = torch.multiprocessing.get_context("fork")
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        head = f"{'processes':>9} {'part':>9} {'largest':>9} | {'grows by':>9} {'in thread':>9}"
        head = f"{head} {'gathered':>9} | {'seconds':>8} {'in thread':>9} {'gathered':>9}"
        print(f"{head} | {'step':>5}")
        for size in (1, 2, 4):
            results = context.Queue()
            processes = [
                context.Process(
                    target=measure, args=(rank, size, folder, options.parameters, results)
                )
                for rank in range(size)
            ]
            for process in processes:
                process.start()
            said = sorted(results.get(timeout=300) for _ in processes)
            for process in processes:
                process.join(60)
            names = ("foreground", "background", "gathered")
            grown = [max(each[3][name] for each in said) for name in names]
            seconds = [max(each[4][name] for each in said) for name in names]
            overlaps = [each[5] for each in said]
            print(
                f"{size:9} {said[0][1]:6.1f} MB {said[0][2]:6.1f} MB | "
                + " ".join(f"{each:6.1f} MB" for each in grown)
                + " | "
                + " ".join(f"{each:8.3f}s" for each in seconds)
                + f" | {statistics.median(overlaps):5.2f}"
            )
        times = [
            [
                synthesis(folder / f"foreground-{size}", folder / "out.safetensors")
                for size in (4, 1)
            ]
            for _ in range(7)
        ]
        parts, whole = (min(each) for each in zip(*times, strict=True))
        print(f"synthesis from parts of four, relative to whole files: {parts / whole:.2f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
