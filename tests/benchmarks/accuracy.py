"""How near synthesized EMAs come to tracked ones, by method, on networks that are trained here.

    python tests/benchmarks/accuracy.py [--raw] [--json FILE]

Three small networks are trained on synthetic data: a CNN by SGD with a cosine schedule, a
transformer by AdamW with warm-up and a falling rate, an MLP by Adam at a constant rate. While they
train, EMAs of sigma_rel 0.05 and 0.10 are saved as snapshots, 8 or 32 times, in three dtypes; the
EMAs that are to be rebuilt are tracked beside them, all in float64. An error is the root mean
square distance to the tracked EMA, relative to how far that is from the network at the end. What
was expected of it comes from the snapshots alone, as in `posthoc solve --diagnose`. Exits with 1
when blup falls short of what is promised of it.

With --raw the snapshots are the networks themselves, saved 8 to 64 times, and the methods share and
blup.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from posthoc_cli.snapshots.folder import Snapshot, read_folder
from posthoc_cli.snapshots.sampling import fit_snapshots
from posthoc_cli.solver.estimates import estimate_methods
from posthoc_cli.solver.profiles import Profile, decay, sigma_rel_to_gamma

WIDTHS = (0.05, 0.10)
TARGETS = (0.03, 0.07, 0.15, 0.20, 0.25)
COUNTS = (8, 32)
RAW_COUNTS = (8, 16, 32, 64)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One target from one set of snapshots by one method; errors relative to the distance."""

    network: str
    snapshots: int
    dtype: str
    target: float
    method: str
    error: float
    expected: float


# The networks: each a module, what makes its step, and its schedule

Training = tuple[nn.Module, torch.optim.Optimizer, Callable[[int], float], Callable[[], Tensor]]


def cnn(steps: int) -> Training:
    """Tells noisy patterns apart; SGD with momentum, cosine to zero."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    patterns = torch.randn(10, 3, 8, 8)

    def loss() -> Tensor:
        labels = torch.randint(10, (32,))
        images = patterns[labels] + 4.0 * torch.randn(32, 3, 8, 8)
        return cross_entropy(model(images), labels)

    return model, optimizer, lambda step: 0.5 + 0.5 * float(np.cos(np.pi * step / steps)), loss


class Transformer(nn.Module):
    """Two causal layers."""

    def __init__(self, vocabulary: int = 32, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, vocabulary)
        self.mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.position
        return self.out(self.layers(hidden, mask=self.mask))


def transformer(steps: int) -> Training:
    """Predicts a language of word pairs; AdamW with warm-up, falling to a tenth."""
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    follows = torch.randint(32, (32, 32))

    def loss() -> Tensor:
        text = torch.randint(32, (16, 17))
        for at in range(2, 17):
            regular = torch.rand(16) < 0.9
            text[:, at] = torch.where(
                regular, follows[text[:, at - 2], text[:, at - 1]], text[:, at]
            )
        return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return model, optimizer, lambda step: min((step + 1) / 100, 1 - 0.9 * step / steps), loss


def mlp(steps: int) -> Training:
    """Fits a noisy function; Adam at a constant rate."""
    model = nn.Sequential(
        *(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 8))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    mixing = torch.randn(16, 8)

    def loss() -> Tensor:
        x = torch.randn(64, 16)
        return mse_loss(model(x), torch.sin(x @ mixing) + 0.3 * torch.randn(64, 8))

    return model, optimizer, lambda step: 1.0, loss


NETWORKS = {"cnn": (cnn, 3200), "transformer": (transformer, 2400), "mlp": (mlp, 3200)}


@dataclass(frozen=True)
class Run:
    """What was tracked: at the steps of `saved` the averages [widths, p], at those of `raw` the
    network [p]; at the end, the targets' [targets, p], the network [p], and the loss."""

    saved: dict[int, Tensor]
    raw: dict[int, Tensor]
    truth: Tensor
    end: Tensor
    loss: float


def train(make: Callable[[int], Training], steps: int, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model, optimizer, rate, loss = make(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parameters = list(model.parameters())
    gammas = np.array([sigma_rel_to_gamma(width) for width in (*WIDTHS, *TARGETS)])
    averages = torch.zeros(len(gammas), sum(p.numel() for p in parameters), dtype=torch.float64)
    saved, raw, recent = {}, {}, []
    most = max(RAW_COUNTS)
    raw_steps = {steps * k // most for k in range(1, most + 1)}
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        now = torch.cat([p.detach().reshape(-1) for p in parameters]).double()
        averages.lerp_(now.expand_as(averages), torch.as_tensor(1 - decay(gammas, step))[:, None])
        recent.append(value.item())
        if step % (steps // max(COUNTS)) == 0:
            saved[step] = averages[: len(WIDTHS)].clone()
        if step in raw_steps:
            raw[step] = now.clone()
    return Run(saved, raw, averages[len(WIDTHS) :], now, float(np.mean(recent[-100:])))


def cases(network: str, run: Run, count: int, dtype: str, folder: Path) -> Iterator[Case]:
    """Save snapshots, rebuild the targets from them by every method, and compare."""
    every = len(run.saved) // count
    for step in list(run.saved)[every - 1 :: every]:
        for width, average in zip(WIDTHS, run.saved[step], strict=True):
            save_file(
                {"weights": average.float().to(DTYPES[dtype])},
                folder / f"{step}-{width}.safetensors",
                {"step": str(step), "sigma_rel": str(width)},
            )
    snapshots = read_folder(folder).usable()
    stored = torch.stack(
        [run.saved[s.step][WIDTHS.index(s.sigma_rel)].float().to(DTYPES[dtype]) for s in snapshots]
    ).double()
    yield from compared(network, run, count, dtype, snapshots, stored)


def raw_cases(network: str, run: Run, count: int, dtype: str, folder: Path) -> Iterator[Case]:
    """The same from the networks themselves."""
    every = len(run.raw) // count
    for step in list(run.raw)[every - 1 :: every]:
        tensors = {"weights": run.raw[step].float().to(DTYPES[dtype])}
        save_file(tensors, folder / f"net-{step:06d}.safetensors")
    snapshots = read_folder(folder, raw=True).usable()
    stored = torch.stack([run.raw[s.step].float().to(DTYPES[dtype]) for s in snapshots]).double()
    yield from compared(network, run, count, dtype, snapshots, stored)


def compared(
    network: str, run: Run, count: int, dtype: str, snapshots: list[Snapshot], stored: Tensor
) -> Iterator[Case]:
    """Rebuild the targets by every method from `snapshots`, which hold `stored` [snapshots, p]."""
    profiles = [snapshot.profile for snapshot in snapshots]
    targets = [Profile(profiles[-1].step, sigma_rel_to_gamma(width)) for width in TARGETS]
    distance = (run.truth - run.end).square().mean(1).sqrt().numpy()
    trajectory = fit_snapshots(snapshots).trajectory
    for verdict in estimate_methods(profiles, targets, trajectory):
        assert verdict.solved is not None
        assert verdict.expected is not None
        made = torch.as_tensor(verdict.solved.weights) @ stored
        errors = (made - run.truth).square().mean(1).sqrt().numpy() / distance
        expected = verdict.expected.total / distance
        for target, error, told in zip(TARGETS, errors.tolist(), expected.tolist(), strict=True):
            yield Case(network, count, dtype, target, verdict.method, error, told)


# What came out


def by_method(found: list[Case], method: str) -> list[Case]:
    return [case for case in found if case.method == method]


def print_table(found: list[Case]) -> None:
    print("error, in % of the distance between EMA and network (in brackets: expected)\n")
    print(f"{'network':<12}{'snapshots':>10} {'dtype':<9}{'target':>7}", end="")
    print(f"{'algorithm3':>19}{'edm2':>19}{'blup':>19}{'edm2/blup':>11}")
    three = (by_method(found, method) for method in ("algorithm3", "edm2", "blup"))
    for trio in zip(*three, strict=True):
        case = trio[0]
        print(f"{case.network:<12}{case.snapshots:>10} {case.dtype:<9}{case.target:>7.2f}", end="")
        for one in trio:
            print(f"{100 * one.error:>10.4g} ({100 * one.expected:.3g})".rjust(19), end="")
        print(f"{trio[1].error / trio[2].error:>11.2f}")


def print_raw_table(found: list[Case]) -> None:
    print("error of share -> blup, in % of the distance (in brackets: expected)\n")
    print("network      checkpoints dtype    " + "".join(f"{target:>30.2f}" for target in TARGETS))
    by_row: dict[tuple[str, int, str], str] = {}
    for one, other in zip(by_method(found, "share"), by_method(found, "blup"), strict=True):
        key = one.network, one.snapshots, one.dtype
        cell = " -> ".join(f"{100 * e.error:.3g} ({100 * e.expected:.3g})" for e in (one, other))
        by_row[key] = by_row.get(key, "") + cell.rjust(30)
    for (network, count, dtype), cells in by_row.items():
        print(f"{network:<13}{count:>11} {dtype:<9}{cells}")


def raw_summary(found: list[Case]) -> dict[str, float]:
    one, other = by_method(found, "share"), by_method(found, "blup")
    gains = np.array([a.error / b.error for a, b in zip(one, other, strict=True)])
    told = np.array([[e.expected / e.error for e in each] for each in (one, other)])
    within = ((told >= 0.5) & (told <= 2)).mean(axis=1)
    return {
        "cases": len(gains),
        "share_over_blup": float(np.exp(np.log(gains).mean())),
        "best_case": float(gains.max()),
        "worst_case": float(gains.min()),
        "nearer": float((gains > 1).mean()),
        "within_two_share": float(within[0]),
        "within_two_blup": float(within[1]),
    }


def summary(found: list[Case]) -> dict[str, float]:
    errors = {
        method: np.array([case.error for case in by_method(found, method)])
        for method in ("algorithm3", "edm2", "blup")
    }

    def within_two(method: str) -> float:
        ratios = [case.expected / case.error for case in by_method(found, method)]
        return float(np.mean([0.5 <= ratio <= 2 for ratio in ratios]))

    def gain(over: str) -> float:
        return float(np.exp(np.mean(np.log(errors[over] / errors["blup"]))))

    return {
        "cases": len(errors["blup"]),
        "edm2_over_blup": gain("edm2"),
        "algorithm3_over_blup": gain("algorithm3"),
        "best_case": float((errors["edm2"] / errors["blup"]).max()),
        "worst_case": float((errors["edm2"] / errors["blup"]).min()),
        **{f"within_two_{method}": within_two(method) for method in errors},
    }


def finish_raw(found: list[Case], path: Path | None) -> int:
    print_raw_table(found)
    told = raw_summary(found)
    print(
        f"\ngeometric mean over {told['cases']} cases: blup is {told['share_over_blup']:.2f} times "
        f"nearer than share; {told['best_case']:.1f} times at best, {told['worst_case']:.2f} at "
        f"worst, nearer in {told['nearer']:.1%} of the cases\n"
        "expected error within a factor of 2 of the measured: "
        f"share {told['within_two_share']:.1%}, blup {told['within_two_blup']:.1%} of the cases"
    )
    if path:
        path.write_text(
            json.dumps({"summary": told, "cases": [asdict(case) for case in found]}, indent=1)
        )
    return 0 if told["share_over_blup"] >= 1.5 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--raw", action="store_true", help="from the networks themselves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all cases there too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    found: list[Case] = []
    for network, (make, steps) in NETWORKS.items():
        begin = time.perf_counter()
        run = train(make, steps, options.seed)
        seconds = time.perf_counter() - begin
        size = run.end.numel()
        print(f"{network}: {size} parameters, {steps} steps, {seconds:.0f} s, loss {run.loss:.3f}")
        for count in RAW_COUNTS if options.raw else COUNTS:
            for dtype in DTYPES:
                with tempfile.TemporaryDirectory() as folder:
                    made = raw_cases if options.raw else cases
                    found += made(network, run, count, dtype, Path(folder))
    print()
    if options.raw:
        return finish_raw(found, options.json)
    print_table(found)
    told = summary(found)
    print(
        f"\ngeometric mean over {told['cases']} cases: blup is {told['edm2_over_blup']:.2f} times "
        f"nearer than edm2 and {told['algorithm3_over_blup']:.2f} times than algorithm3;\n"
        f"against edm2 {told['best_case']:.1f} times at best, {told['worst_case']:.2f} at worst\n"
        "expected error within a factor of 2 of the measured: "
        f"edm2 {told['within_two_edm2']:.1%}, blup {told['within_two_blup']:.1%}, "
        f"algorithm3 {told['within_two_algorithm3']:.1%} of the cases"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"summary": told, "cases": [asdict(case) for case in found]}, indent=1)
        )
    met = (
        told["edm2_over_blup"] >= 2.8
        and told["worst_case"] >= 1 / 1.1
        and min(told["within_two_edm2"], told["within_two_blup"]) >= 0.9
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
