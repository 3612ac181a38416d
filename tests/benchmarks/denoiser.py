"""The length that `tune` finds for a denoiser trained here, beside a sweep of 50 lengths.

    python tests/benchmarks/denoiser.py [FOLDER] [--steps 8000]

The metric is the denoiser's loss on points it wasn't trained on, 100,000 of them, drawn anew each
time, as an FID is of samples; the sweep measures each of 50 lengths with 200,000 points.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import posthoc_cli
from posthoc_cli.training import demo

LOW, HIGH = 0.01, 0.25
FEW, MANY = 100_000, 200_000


def loss(state: demo.State, points: int, seed: int) -> float:
    """Loss of the network with these weights, on so many points."""
    model = demo.Denoiser()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.inference_mode():
        return float(demo._loss(model, points, torch.Generator().manual_seed(seed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="where the snapshots are, or are to be made")
    parser.add_argument("--steps", type=int, default=demo.STEPS)
    parser.add_argument("--runs", type=int, default=5, help="searches, each with noise of its own")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or scratch)
        if not (folder / "snapshots").exists():
            demo.train(folder, given.steps)
        compare(folder / "snapshots", given.runs)


def compare(folder: Path, runs: int) -> None:
    run = posthoc_cli.open_snapshots(folder)
    lengths = np.geomspace(LOW, HIGH, 50)
    solution = run.solve(sigma_rel=lengths.tolist())
    curve = np.array([loss(solution.state_dict(at), MANY, 1) for at in range(50)])
    best = int(curve.argmin())
    noise = np.std([loss(solution.state_dict(best), FEW, seed) for seed in range(2, 22)])
    depth = float(np.ptp(curve))
    print(f"sweep: {curve[best]:.5f} at {lengths[best]:.4f}; ends {curve[0]:.5f}, {curve[-1]:.5f}")
    print(f"one measurement: {noise:.5f}, {noise / depth:.0%} of the depth")
    within = lengths[curve <= curve[best] + 0.01 * depth]
    print(f"within 1% of the depth: {within[0]:.4f} to {within[-1]:.4f}")
    for number in range(runs):
        seeds = iter(range(1000 * (number + 1), 10**9))
        begin = time.perf_counter()
        tuned = run.tune(
            lambda state, seeds=seeds: loss(state, FEW, next(seeds)),
            minimize=True,
            range=(LOW, HIGH),
        )
        assert tuned.best is not None
        found = loss(tuned.best.solution.state_dict(), MANY, 1)
        low, high = (each.text for each in tuned.best.interval)
        lucky = min(tuned.evaluations, key=lambda one: one.metric or 0.0)
        fooled = loss(run.solve(sigma_rel=lucky.sigma_rel).state_dict(), MANY, 1)
        print(
            f"tune {number + 1}: {found:.5f} at {tuned.best.target.text} ({low} to {high}), "
            f"{(found - curve[best]) / depth:.2%} of the depth above the sweep's best; the "
            f"luckiest of its 14 {(fooled - curve[best]) / depth:.2%} "
            f"({time.perf_counter() - begin:.1f} s) {'; '.join(tuned.notes)}"
        )


if __name__ == "__main__":
    main()
