"""How near EMAs come to tracked ones by how snapshots are stored: whole, or as differences.

    python tests/benchmarks/storage.py [--json FILE]

On the networks of accuracy.py: averages of sigma_rel 0.05 and 0.10 are saved 24 or 96 times as
float32, and in each other dtype whole (as a trainer saves it) and packed. Errors are root mean
square distances to the tracked EMA, relative to how far that is from the network at the end;
weights are blup's. Exits with 1 when differences fall short of what is promised of them. At the end
times of packing and synthesizing are told, as ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import accuracy
import numpy as np
import torch
from accuracy import NETWORKS, TARGETS, WIDTHS, Run
from safetensors.torch import load_file, save_file

from posthoc_cli.api import Solution, open_snapshots
from posthoc_cli.synthesis.pack import pack, plan_pack

COUNTS = (24, 96)
CHAINS = (8, 16, 32)
WHOLE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PACKED = ("float16", "bfloat16", "float8_e4m3fn")


@dataclass(frozen=True)
class Case:
    """One target from snapshots stored in one way, of `bytes` bytes; errors are relative."""

    network: str
    pairs: int
    stored: str
    bytes: int
    target: float
    error: float
    expected: float


def cases(network: str, run: Run, pairs: int, root: Path) -> Iterator[Case]:
    every = len(run.saved) // pairs
    folders = {}
    for name, dtype in WHOLE.items():
        folders[name] = folder = root / name
        folder.mkdir()
        for step in list(run.saved)[every - 1 :: every]:
            for width, average in zip(WIDTHS, run.saved[step], strict=True):
                save_file(
                    {"weights": average.float().to(dtype)},
                    folder / f"{step}-{width}.safetensors",
                    {"step": str(step), "sigma_rel": str(width)},
                )
    snapshots = open_snapshots(folders["float32"]).contents.usable()
    for dtype in PACKED:
        folders[f"{dtype} differences"] = folder = root / f"{dtype}-differences"
        pack(plan_pack(snapshots, folder), dtype)
    distance = (run.truth - run.end).square().mean(1).sqrt().numpy()
    for name, folder in folders.items():
        solution = open_snapshots(folder).solve(sigma_rel=list(TARGETS), method="blup")
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert solution.expected_error is not None
        (root / "out").mkdir(exist_ok=True)
        paths = solution.save(root / "out" / "{sigma_rel}.safetensors", dtype="float64", force=True)
        for at, path in enumerate(paths):
            made = load_file(path)["weights"]
            error = (made - run.truth[at]).square().mean().sqrt().item() / distance[at]
            told = float(solution.expected_error[at])
            yield Case(network, pairs, name, size, TARGETS[at], float(error), told)


def print_table(found: list[Case]) -> None:
    print("error, in % of the distance between EMA and network (in brackets: expected)\n")
    print(f"{'network':<12}{'pairs':>6} {'stored as':<27}{'bytes':>7}", end="")
    print("".join(f"{target:>18.2f}" for target in TARGETS))
    whole = {(c.network, c.pairs): c.bytes for c in found if c.stored == "float32"}
    for case in found:
        if case.target == TARGETS[0]:
            part = case.bytes / whole[case.network, case.pairs]
            print(f"\n{case.network:<12}{case.pairs:>6} {case.stored:<27}{part:>7.1%}", end="")
        print(f"{100 * case.error:>10.3g} ({100 * case.expected:.2g})".rjust(18), end="")
    print()


def summary(found: list[Case]) -> dict[str, float]:
    def errors(
        stored: str, pairs: int | None = None
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([c.error for c in found if c.stored == stored and pairs in (None, c.pairs)])

    def mean(ratios: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return float(np.exp(np.log(ratios).mean()))

    near = errors("float16 differences", 24) / errors("float32", 24)
    told = np.array([c.expected / c.error for c in found if "differences" in c.stored])
    return {
        "worst_float16_differences_over_float32_24": float(near.max()),
        "float16_over_float16_differences": mean(errors("float16") / errors("float16 differences")),
        "bfloat16_over_bfloat16_differences": mean(
            errors("bfloat16") / errors("bfloat16 differences")
        ),
        "float8_differences_over_float16": mean(
            errors("float8_e4m3fn differences") / errors("float16")
        ),
        "expected_within_two": float(((told >= 0.5) & (told <= 2)).mean()),
    }


def speed(root: Path) -> dict[str, float]:
    """Times as ratios within this run, the best of three each: pack, in chains of 8 to 32 steps, to
    reading what it reads and writing what it writes; the sums of differences to those of plain
    float16, in wall-clock and in processor time, without the sample that is read to solve."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 1 << 20, generator=generator)
    for folder in ("float32", "float16"):
        (root / folder).mkdir()
    for step in range(max(CHAINS)):
        weights += 0.01 * torch.randn(weights.shape, generator=generator)
        for width in WIDTHS:
            metadata = {"step": str(step + 1), "sigma_rel": str(width)}
            made = {f"layers.{at}": (1 + width) * row for at, row in enumerate(weights)}
            save_file(made, root / "float32" / f"{step}-{width}.safetensors", metadata)
            made = {name: each.half() for name, each in made.items()}
            save_file(made, root / "float16" / f"{step}-{width}.safetensors", metadata)
    snapshots = open_snapshots(root / "float32").contents.usable()
    told = {}

    def pack_as(dtype: str, every: int) -> None:
        shutil.rmtree(root / dtype, ignore_errors=True)
        pack(plan_pack(snapshots, root / dtype, keyframe_every=every), dtype.split()[0])

    def floor(dtype: str) -> None:
        for snapshot in snapshots:
            data = snapshot.index.path.read_bytes()
            size = (root / dtype / snapshot.index.path.name).stat().st_size
            with (root / "floor").open("wb", 0) as file:
                file.write(data[:size])
                os.fsync(file.fileno())

    def save(solution: Solution) -> None:
        solution.save(root / "out.safetensors", force=True)

    for dtype in ("float16 differences", "float8_e4m3fn"):
        for every in CHAINS:
            times = best([partial(pack_as, dtype, every), partial(floor, dtype)])
            told[f"pack_{dtype}_{every}_over_floor"] = times[0][0] / times[1][0]
    folders = "float16", "float16 differences", "float8_e4m3fn"
    solved = [open_snapshots(root / folder).solve(sigma_rel=[0.07]) for folder in folders]
    plain, *others = best([partial(save, each) for each in solved], rounds=7)
    for folder, taken in zip(folders[1:], others, strict=True):
        told[f"synthesize_{folder}_over_float16"] = taken[0] / plain[0]
        told[f"synthesize_{folder}_over_float16_cpu"] = taken[1] / plain[1]
    return told


def best(work: Sequence[Callable[[], None]], rounds: int = 3) -> list[tuple[float, float]]:
    """The least seconds that each takes in rounds by turns: by the clock, and of processors."""
    times: list[list[tuple[float, float]]] = [[] for _ in work]
    for _ in range(rounds):
        for each, taken in zip(work, times, strict=True):
            begin = time.perf_counter(), time.process_time()
            each()
            taken.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return [(min(wall for wall, _ in each), min(cpu for _, cpu in each)) for each in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all cases there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    accuracy.COUNTS = (max(COUNTS),)  # how often it saves
    found: list[Case] = []
    for network, (make, steps) in NETWORKS.items():
        run = accuracy.train(make, steps // 96 * 96)
        for pairs in COUNTS:
            with tempfile.TemporaryDirectory() as folder:
                found += cases(network, run, pairs, Path(folder))
    print_table(found)
    told = summary(found)
    with tempfile.TemporaryDirectory() as folder:
        told |= speed(Path(folder))
    print()
    for name, value in told.items():
        print(f"{name:<55}{value:.3g}")
    if options.json:
        document = {"summary": told, "cases": [asdict(case) for case in found]}
        options.json.write_text(json.dumps(document, indent=1))
    met = told["worst_float16_differences_over_float32_24"] <= 1.5
    return 0 if met and told["float8_differences_over_float16"] <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
