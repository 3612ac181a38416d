"""What an update costs, beside the memory floor and the libraries that do the same.

    python tests/benchmarks/tracking.py [--parameters 100e6] [--rounds 25] [--device cpu]

Two profiles, float32, the parameters in 50 tensors and in 5,000. The floor is the memory traffic
that can't be avoided (the network read once, each average read and written once), at the bandwidth
that a torch copy of as many numbers reaches in the same round. Contestants take turns, so that
what else the machine does hits all alike. ema-pytorch and nitrous-ema are measured where they are
installed: `pip install ema-pytorch nitrous-ema`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from posthoc_cli import PostHocEMA

WIDTHS = (0.05, 0.10)
PEERS = {"ema-pytorch": "ema_pytorch", "nitrous-ema": "nitrous_ema"}


class Network(nn.Module):
    """So many parameters in so many equal tensors, a hundred to a layer at most."""

    def __init__(self, parameters: int, tensors: int, device: str) -> None:
        super().__init__()
        each = parameters // tensors
        shape = (each // 100, 100)
        self.layers = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(torch.randn(shape, device=device)) for _ in range(min(10, tensors))
            )
            for _ in range(tensors // min(10, tensors))
        )


def contestants(model: nn.Module, folder: Path) -> dict[str, Callable[[], object]]:
    """An update of each library that is installed, the averages begun."""
    ours = PostHocEMA(model, WIDTHS, folder=folder / "posthoc", checkpoint_every=None)
    updates: dict[str, Callable[[], object]] = {"posthoc": ours.update}
    for name, module in PEERS.items():
        try:
            peer = importlib.import_module(module).PostHocEMA
        except ImportError:
            print(f"{name} isn't installed: left out")
            continue
        options = {
            "sigma_rels": WIDTHS,
            "update_every": 1,
            "checkpoint_every_num_steps": 10**9,
            "checkpoint_folder": str(folder / module),
        }
        updates[name] = peer(model, **options).update
    return updates


def measure(parameters: int, tensors: int, device: str, rounds: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = Network(parameters, tensors, device)
    source = torch.randn(parameters, device=device)
    target = torch.empty_like(source)
    updates = {"copy": lambda: target.copy_(source), **contestants(model, folder)}

    def timed(update: Callable[[], object]) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        update()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for update in updates.values():
        for _ in range(2):
            update()
    times: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(rounds):
        for name, update in updates.items():
            times[name].append(timed(update))
    traffic = (1 + 2 * len(WIDTHS)) / 2  # in copies, which read and write
    times = {"memory floor": [each * traffic for each in times.pop("copy")], **times}
    print(f"\n{parameters:,} parameters in {tensors:,} tensors on {device}, {rounds} rounds")
    print(f"{'':14}{'best ms':>9}{'median ms':>11}{'x floor':>9}{'x posthoc':>11}")
    for name, values in times.items():
        floor, ours = (ratio(values, times[other]) for other in ("memory floor", "posthoc"))
        best, median = min(values) * 1e3, statistics.median(values) * 1e3
        print(f"{name:14}{best:9.1f}{median:11.1f}{floor:9.2f}{ours:11.2f}")


def ratio(times: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--tensors", type=int, nargs="*", default=[50, 5000])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads{load}")
    for tensors in options.tensors:
        with tempfile.TemporaryDirectory() as folder:
            measure(int(options.parameters), tensors, options.device, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
