"""How far a LoRA's average of factors is from the average of its products, on trained LoRAs.

    python tests/benchmarks/lora.py

trains a small network to do as a random one does, then a LoRA of it to do as another, keeps 16
checkpoints as kohya's trainers do, and averages them in both ways. It takes seconds.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import posthoc_cli

SIZES, RANK, ALPHA = (32, 96, 96, 16), 8, 8.0
STEPS, EVERY = 800, 50
TARGETS = (0.05, 0.10, 0.15, 0.20, 0.25)

Weights = list[torch.Tensor]


def network(weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    for weight in weights[:-1]:
        inputs = torch.tanh(inputs @ weight.T)
    return inputs @ weights[-1].T


def random_weights(seed: int) -> Weights:
    made = torch.Generator().manual_seed(seed)
    sizes = pairwise(SIZES)
    return [torch.randn(out, in_, generator=made) / in_**0.5 for in_, out in sizes]


def loss_of(weights: Weights, teacher: Weights, seed: int, size: int = 32) -> torch.Tensor:
    """The squared error on inputs that are noisy examples of the teacher's."""
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, SIZES[0], generator=made)
    wanted = network(teacher, inputs)
    wanted += 0.3 * torch.randn(wanted.shape, generator=made)
    return (network(weights, inputs) - wanted).square().mean()


def with_products(base: Weights, tensors: dict[str, torch.Tensor]) -> Weights:
    found = []
    for at, weight in enumerate(base):
        up, down, alpha = (
            tensors[f"lora_layer_{at}.{name}"]
            for name in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        found.append(weight + alpha / up.shape[1] * up @ down)
    return found


def train(folder: Path, rate: float) -> tuple[Weights, Weights]:
    """Checkpoints of a LoRA in `folder`; the network that it changes, and what it learns from."""
    torch.manual_seed(0)
    first, second = random_weights(1), random_weights(2)
    teacher = [one + 0.5 * other for one, other in zip(first, second, strict=True)]
    base = [weight.clone().requires_grad_() for weight in random_weights(3)]
    learn = torch.optim.AdamW(base, 3e-3)
    for step in range(600):
        learn.zero_grad()
        loss_of(base, first, step).backward()
        learn.step()
    base = [weight.detach() for weight in base]
    tensors = {}
    for at, weight in enumerate(base):
        out, in_ = weight.shape
        tensors[f"lora_layer_{at}.lora_up.weight"] = torch.zeros(out, RANK)
        tensors[f"lora_layer_{at}.lora_down.weight"] = torch.randn(RANK, in_) / in_**0.5
        tensors[f"lora_layer_{at}.alpha"] = torch.tensor(ALPHA)
    factors = [each.requires_grad_() for name, each in tensors.items() if "alpha" not in name]
    learn = torch.optim.AdamW(factors, rate)
    for step in range(1, STEPS + 1):
        learn.zero_grad()
        loss_of(with_products(base, tensors), teacher, 10_000 + step).backward()
        learn.step()
        if step % EVERY == 0:
            kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            save_file(kept, folder / f"lora-{step:06d}.safetensors", {"ss_steps": str(step)})
    return base, teacher


def main() -> None:
    torch.set_num_threads(1)
    print("| rate of AdamW | sigma_rel | apart | ranks | loss: newest | factors | exact |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for rate in (1e-3, 3e-3, 1e-2):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            base, teacher = train(folder, rate)

            def loss(path: Path, base: Weights = base, teacher: Weights = teacher) -> float:
                weights = with_products(base, load_file(path))
                return float(loss_of(weights, teacher, 99_999, 20_000))

            newest = loss(folder / f"lora-{STEPS:06d}.safetensors")
            solution = posthoc_cli.open_snapshots(folder, raw=True).solve(sigma_rel=TARGETS)
            factors = solution.save(f"{folder}/factors/")
            exact = solution.save(f"{folder}/exact/", lora="exact")
            assert exact.lora is not None
            for at, target in enumerate(TARGETS):
                apart, (low, high) = exact.lora.distances[at], exact.lora.ranks[at]
                losses = [newest, loss(factors[at]), loss(exact[at])]
                shown = " | ".join(f"{each:.4f}" for each in losses)
                print(f"| {rate:g} | {target} | {apart:.2%} | {low}-{high} | {shown} |")


if __name__ == "__main__":
    main()
