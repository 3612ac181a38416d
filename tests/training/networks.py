"""Networks for the tests of training, and a training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from posthoc_cli import PostHocEMA
from posthoc_cli.training.claim import LOCK

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Counter(nn.Module):
    """A network whose one weight is what it is set to."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)


class Tied(nn.Module):
    """Shared, transposed and channels-last tensors, whole numbers, and a transient buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.randn(3), persistent=False)


def train(model: nn.Module, ema: PostHocEMA, steps: int) -> None:
    """A random walk, the same whenever it goes on from the same step; written out at the end."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(ema.step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
        ema.update()
    ema.wait()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the lock that a tracker has on it."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != LOCK]
    return {path.name: path.read_bytes() for path in paths}
