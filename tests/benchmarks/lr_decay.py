"""The loss after a decay of the learning rate, and of averages in its place.

    python tests/benchmarks/lr_decay.py [--steps 4000] [--part 20] [--every 100] [--seeds 2]

A small language model learns the next byte of the Python standard library's sources, at a learning
rate that never decays. Beside it PostHocEMA saves two EMAs every so many steps. Then, from the
same weights and the same state of Adam, the last part is trained again with the rate really
decayed, by each shape. The losses on held-out files are those of

- the network as it is, and of each one whose rate was decayed;
- `posthoc`'s `lr_decay` target of the same shape and length, out of the saved EMAs alone;
- the average that the target stands for, summed up at every step of training;
- the merge of raw checkpoints at the same steps, with the coefficients of WSM (arXiv 2507.17634).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import posthoc_cli
from posthoc_cli import PostHocEMA
from posthoc_cli.solver.averages import LrDecay

SHAPES = ("linear", "1-sqrt", "cosine")
CONTEXT, BATCH, RATE, WARMUP = 16, 128, 2e-3, 100
State = dict[str, Tensor]


def network() -> nn.Module:
    """The next byte by the 16 before it; 0.12 million parameters."""
    return nn.Sequential(
        nn.Embedding(256, 32),
        nn.Flatten(),
        nn.Linear(32 * CONTEXT, 128),
        nn.GELU(),
        nn.Linear(128, 128),
        nn.GELU(),
        nn.Linear(128, 256),
    )


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and of every tenth file to test with."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]
    texts = [bytearray(file.read_bytes()) for file in files]
    parts = (b"".join(t for at, t in enumerate(texts) if (at % 10 == 9) == held) for held in (0, 1))
    train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return train, test


def batch(data: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same for a step, whichever run asks."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)
    at = torch.randint(len(data) - CONTEXT, (BATCH,), generator=random)
    windows = data[at[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


@torch.no_grad()
def loss_of(state: Mapping[str, Tensor], test: Tensor) -> float:
    model = network()
    model.load_state_dict(state)
    windows = test[: len(test) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:20_000]
    return float(nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1]))


class Training:
    """A model with its optimizer; `step` takes it a step further, with a part of the rate."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed, self.at = seed, 0
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=(0.9, 0.98))

    def step(self, data: Tensor, part: float = 1.0) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * part * min(1.0, (self.at + 1) / WARMUP)
        inputs, wanted = batch(data, self.at, self.seed)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), wanted).backward()
        self.optimizer.step()
        self.at += 1

    def weights(self) -> State:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def part_of(shape: str, x: float) -> float:
    """What a rate is multiplied with at `x`, from 0 to 1, of its decay."""
    return {"linear": 1 - x, "1-sqrt": 1 - math.sqrt(x), "cosine": (1 + math.cos(math.pi * x)) / 2}[
        shape
    ]


def losses(seed: int, steps: int, length: int, every: int, folder: Path) -> dict[str, list[float]]:
    """By kind of network, the losses for each of SHAPES; of the network as it is only one."""
    train, test = corpus()
    run = Training(seed)
    ema = PostHocEMA(run.model, (0.05, 0.10), folder=folder, checkpoint_every=every)
    fork = None
    averages = [LrDecay(steps, shape, length) for shape in SHAPES]
    at = torch.arange(steps + 1, dtype=torch.float64).numpy()
    shares = [average.share(at) for average in averages]
    true = [{name: torch.zeros_like(v) for name, v in run.weights().items()} for _ in SHAPES]
    raw: list[tuple[int, State]] = []
    for step in range(1, steps + 1):
        if step == steps - length + 1:
            fork = copy.deepcopy(run)
        run.step(train)
        ema.update()
        if step >= steps - length:
            now = run.weights()
            for sums, share in zip(true, shares, strict=True):
                weight = float(share[step] - share[step - 1])
                for name, value in now.items():
                    sums[name].add_(value, alpha=weight)
            if step % every == 0:
                raw.append((step, now))
    found = {"never decayed": [loss_of(run.weights(), test)], "really decayed": []}
    for shape in SHAPES:
        decayed = copy.deepcopy(fork)
        assert decayed is not None
        for k in range(length):
            decayed.step(train, part_of(shape, k / length))
        found["really decayed"].append(loss_of(decayed.weights(), test))
    solution = posthoc_cli.open_snapshots(folder).solve(
        lr_decay=[f"{shape}:{length}" for shape in SHAPES], method="blup"
    )
    made = [solution.state_dict(target) for target in range(len(SHAPES))]
    found["posthoc"] = [loss_of(state, test) for state in made]
    found["true average"] = [loss_of(state, test) for state in true]
    found["raw merged"] = [loss_of(merged(raw, average, length), test) for average in averages]
    last = run.weights()
    found["posthoc off by"] = [
        distance(state, sums) / distance(sums, last) for state, sums in zip(made, true, strict=True)
    ]
    found["raw off by"] = [
        distance(merged(raw, average, length), sums) / distance(sums, last)
        for average, sums in zip(averages, true, strict=True)
    ]
    return found


def merged(raw: list[tuple[int, State]], average: LrDecay, length: int) -> State:
    """Raw checkpoints, each with the share of the average since the one before (WSM's)."""
    steps = torch.tensor([step for step, _ in raw], dtype=torch.float64).numpy()
    shares = average.share(steps)
    shares = [shares[0], *(shares[1:] - shares[:-1])]
    return {
        name: sum(float(share) * state[name] for share, (_, state) in zip(shares, raw, strict=True))
        for name in raw[0][1]
    }


def distance(one: State, other: State) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--part", type=float, default=20, help="of the steps, in percent")
    parser.add_argument("--every", type=int, default=100, help="steps between snapshots")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    length = round(options.steps * options.part / 100)
    every: list[dict[str, list[float]]] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            every.append(losses(seed, options.steps, length, options.every, Path(folder)))
    print(f"{options.steps} steps, the last {length} decayed; mean of {options.seeds} seeds")
    print(f"{'':16}" + "".join(f"{shape:>10}" for shape in SHAPES))
    for kind in every[0]:
        columns = zip(*(one[kind] for one in every), strict=True)
        print(f"{kind:16}" + "".join(f"{statistics.mean(column):10.4f}" for column in columns))


if __name__ == "__main__":
    main()
