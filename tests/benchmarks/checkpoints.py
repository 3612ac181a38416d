"""What a checkpoint takes: snapshots stored whole, or as differences, streamed or held in memory.

    python tests/benchmarks/checkpoints.py [--parameters MILLIONS] [--steps N]

The trackers follow one network and take turns, so that their times compare. Shown are the median
seconds of a checkpoint of two averages over one chain of N steps, and of its last step, each also
relative to whole float16; the bytes of a chain; and what the tracker holds beside the averages.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posthoc_cli import PostHocEMA

WAYS: dict[str, dict[str, Any]] = {
    "whole float16": {},
    "whole float32": {"dtype": torch.float32},
    "float16 differences": {"store": "delta"},
    "... held in memory": {"store": "delta", "delta_memory": True},
    "float8 differences": {"store": "delta", "dtype": torch.float8_e4m3fn},
    "... held in memory ": {"store": "delta", "dtype": torch.float8_e4m3fn, "delta_memory": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parameters", type=float, default=16, metavar="MILLIONS")
    parser.add_argument("--steps", type=int, default=16, metavar="N")
    options = parser.parse_args()
    width = 1024
    model = nn.ParameterList(
        torch.randn(width, width) for _ in range(round(options.parameters * 1e6 / width**2))
    )
    with tempfile.TemporaryDirectory() as root:
        trackers = {
            name: PostHocEMA(
                model, folder=Path(root) / name, checkpoint_every=None,
                keyframe_every=options.steps, **ways,
            )
            for name, ways in WAYS.items()
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(options.steps):
            with torch.no_grad():
                for each in model:
                    each += 0.01 * torch.randn_like(each)
            for name, ema in trackers.items():
                ema.update()
                begin = time.perf_counter()
                ema.checkpoint()
                seconds[name].append(time.perf_counter() - begin)
        print(f"{'stored as':<22}{'median s':>10}{'last s':>10}{'x float16':>16}{'bytes':>9}")
        plain = seconds["whole float16"]
        whole = size(Path(root) / "whole float16")
        for name, times in seconds.items():
            middle, last = statistics.median(times), times[-1]
            ratios = f"{middle / statistics.median(plain):.1f}, {last / plain[-1]:.1f}"
            part = size(Path(root) / name) / whole
            print(f"{name:<22}{middle:>10.2f}{last:>10.2f}{ratios:>16}{part:>9.1%}")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
