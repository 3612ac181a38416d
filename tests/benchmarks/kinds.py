"""How near averages of any kind come, from snapshots of any kind: ordinary EMAs, raw checkpoints.

    python tests/benchmarks/kinds.py [--seed N]

Two of the networks of accuracy.py train for 2,400 steps. Every 100 steps an ordinary EMA of decay
0.99 is saved, with the network itself and power-function EMAs of sigma_rel 0.05 and 0.10, all in
float32. The table has the error of blup's weights for each target and set of snapshots, in per cent
of the distance between the target and the last weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accuracy import Training, mlp, transformer
from safetensors.torch import save_file
from torch import Tensor

from posthoc_cli import open_snapshots
from posthoc_cli.solver import Average, Decay, Profile, sigma_rel_to_gamma
from posthoc_cli.solver.targets import make_targets

STEPS, EVERY = 2400, 100
SETS = {"decay 0.99": "fixed*", "raw": "raw*", "power": "power*", "all of them": "*"}
TARGETS = make_targets(sigma_rel=[0.07], window=["10%", "20%"], lr_decay=["1-sqrt:10%"])


def saved(step: int) -> dict[str, Average]:
    """What is saved at a step, by the beginning of its name."""
    widths = {f"power{width}": Profile(step, float(sigma_rel_to_gamma(width))) for width in WIDTHS}
    return {"fixed": Decay(step, 0.99), "raw": Decay(step, 0.0), **widths}


WIDTHS = (0.05, 0.10)


def weights_of(averages: list[Average]) -> Tensor:
    """The weight of each step's network, the first of all included; [averages, STEPS + 1]."""
    shares = np.stack([each.share(np.arange(STEPS + 1.0)) for each in averages])
    ends = np.array([each.step for each in averages])[:, None]
    weights = np.diff(shares, prepend=0.0, axis=1)
    return torch.as_tensor(np.where(np.arange(STEPS + 1) <= ends, weights, 0.0))


def train(make: Callable[[int], Training], folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Save the snapshots; the targets [targets, p] and the last weights [p]."""
    torch.manual_seed(seed)
    model, optimizer, rate, loss = make(STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    kinds = list(saved(STEPS))
    steps = range(EVERY, STEPS + 1, EVERY)
    files = [(f"{kind}-{step:06d}", saved(step)[kind]) for step in steps for kind in kinds]
    targets = [target.profile(STEPS) for target in TARGETS]
    weights = weights_of([*(average for _, average in files), *targets])

    def now() -> Tensor:
        return torch.cat([each.detach().reshape(-1) for each in model.parameters()]).double()

    sums = weights[:, :1] * now()
    for step in range(1, STEPS + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        used = weights[:, step].nonzero()[:, 0]
        sums[used] += weights[used, step, None] * now()
    for (name, average), values in zip(files, sums, strict=False):
        told = {"step": str(int(average.step))}
        if isinstance(average, Profile):
            told["gamma"] = repr(average.gamma)
        elif isinstance(average, Decay):
            told["decay"] = repr(average.beta)
        save_file({"w": values.float()}, folder / f"{name}.safetensors", told)
    return sums[len(files) :], now()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    print(f"{'network':<12} {'snapshots':<12}" + "".join(f"{each!s:>22}" for each in TARGETS))
    for name, make in {"mlp": mlp, "transformer": transformer}.items():
        with tempfile.TemporaryDirectory() as folder:
            truth, end = train(make, Path(folder), seed)
            distance = (truth - end).norm(dim=1)
            for called, only in SETS.items():
                run = open_snapshots(folder, only=[only])
                solution = run.solve(
                    sigma_rel=0.07, window=["10%", "20%"], lr_decay="1-sqrt:10%", method="blup"
                )
                made = torch.stack([solution.state_dict(at)["w"] for at in range(len(TARGETS))])
                off = 100 * (made.double() - truth).norm(dim=1) / distance
                told = solution.expected_error
                assert told is not None
                cells = zip(off.tolist(), (100 * told).tolist(), strict=True)
                texts = "".join(f"{error:>14.3g} ({known:.3g})".rjust(22) for error, known in cells)
                print(f"{name:<12} {called:<12}{texts}")


if __name__ == "__main__":
    main()
