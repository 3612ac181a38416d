"""A small training run to try posthoc on: a denoiser of points in the plane.

The network learns to remove noise from the points of a two-armed spiral, as a diffusion model
does from images. Two EMAs of it are saved as snapshots, as in any training run; four more are
tracked to the end, which no user would do, to know what posthoc's results should have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from posthoc_cli.training.posthoc_ema import PostHocEMA

SNAPSHOT_PROFILES = (0.05, 0.10)
TRUE_PROFILES = (0.03, 0.07, 0.15, 0.20)
STEPS = 8000
BATCH = 256
SIGMAS = (0.02, 1.0)
"""The noise levels trained on; the data has a standard deviation of about 0.6."""


State = Mapping[str, Tensor]


class Denoiser(nn.Module):
    """Points [batch, 2] and their noise levels [batch] in, the clean points [batch, 2] out."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(4))

    frequencies: Tensor

    def forward(self, points: Tensor, sigma: Tensor) -> Tensor:
        phase = (sigma.log() / 4)[:, None] * self.frequencies
        level = torch.cat([phase.sin(), phase.cos()], dim=1)
        # Scaled as in Karras et al. 2022: near the data the network's share is small.
        scale = (1 + (sigma / 0.6) ** 2).rsqrt()[:, None]
        output: Tensor = self.layers(torch.cat([points * scale / 0.6, level], dim=1))
        return points * scale**2 + output * sigma[:, None] * scale


def spiral(count: int, generator: torch.Generator) -> Tensor:
    """`count` points [count, 2] of a spiral with two arms, of a thin normal width."""
    arm = torch.randint(0, 2, (count,), generator=generator)
    along = torch.rand(count, generator=generator).sqrt()
    angle = along * 3 * math.pi + arm * math.pi
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * along[:, None]
    return points + 0.02 * torch.randn(count, 2, generator=generator)


def _loss(model: Denoiser, count: int, generator: torch.Generator) -> Tensor:
    """Mean squared error of the denoised points, weighted so that all noise levels count."""
    clean = spiral(count, generator)
    low, high = (math.log(sigma) for sigma in SIGMAS)
    sigma = (low + (high - low) * torch.rand(count, generator=generator)).exp()
    noisy = clean + sigma[:, None] * torch.randn(count, 2, generator=generator)
    error = (model(noisy, sigma) - clean).square().mean(dim=1)
    loss: Tensor = (error * (1 / sigma**2 + 1 / 0.36)).mean()
    return loss


def train(
    folder: Path, steps: int = STEPS, progress: Callable[[int], None] | None = None
) -> tuple[State, dict[float, State]]:
    """Train a denoiser; returns its final weights, and the EMA tracked at each TRUE_PROFILES.

    Saves EMAs at SNAPSHOT_PROFILES in `folder`/snapshots, 16 times in `steps` steps, and those
    tracked to the end in `folder`/tracked. `progress` is called with the number of steps done.
    Raises what PostHocEMA raises.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    saved = PostHocEMA(
        model,
        SNAPSHOT_PROFILES,
        folder=folder / "snapshots",
        checkpoint_every=max(steps // 16, 1),
        prefix="spiral",
    )
    tracked = PostHocEMA(
        model,
        TRUE_PROFILES,
        folder=folder / "tracked",
        checkpoint_every=None,
        dtype=None,
        prefix="spiral",
    )
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        _loss(model, BATCH, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        saved.update()
        tracked.update()
        if progress is not None:
            progress(step)
    final = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    states = [load_file(path) for path in tracked.checkpoint()]
    for tracker in (saved, tracked):
        tracker.close()
    return final, dict(zip(TRUE_PROFILES, states, strict=True))


def score(state: State) -> float:
    """Loss of the network with these weights on points that it was not trained on."""
    model = Denoiser()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.inference_mode():
        return float(_loss(model, 50_000, torch.Generator().manual_seed(1)))


def sample(state: State, count: int = 3000) -> Tensor:
    """Draw points [count, 2] from the network, by Heun's steps from noise down to the data."""
    model = Denoiser()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    low, high = SIGMAS
    levels = [*(high * (low / high) ** (k / 17) for k in range(18)), 0.0]
    points = spiral(count, torch.Generator().manual_seed(2))
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(3))
    points = points + high * noise
    with torch.inference_mode():
        for sigma, lower in pairwise(levels):
            slope = (points - model(points, torch.full((count,), sigma))) / sigma
            ahead = points + (lower - sigma) * slope
            if lower:
                other = (ahead - model(ahead, torch.full((count,), lower))) / lower
                ahead = points + (lower - sigma) * (slope + other) / 2
            points = ahead
    return points


def distance(one: State, other: State) -> float:
    """Euclidean distance of two state dicts, over all floating-point tensors."""
    squares = [
        (tensor.double() - other[name].double()).square().sum()
        for name, tensor in one.items()
        if tensor.is_floating_point()
    ]
    return float(torch.stack(squares).sum().sqrt())
