"""Ranks beside the threads of one process: work time, and what each rank reads.

    python tests/benchmarks/ranks.py [--megabytes N] [--rounds N] [--json FILE]

Eight snapshots lie in the page cache, and one target is written. Every process runs the command
twice, with torch imported, and the second run counts: starting is left out. Rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.ranked import RankRun, group, run_groups
from tests.soak.scenes import make_snapshots

SIZES = (1, 2, 3)
WORDS = ["synthesize", "snapshots", "--sigma-rel", "0.07", "-q", "--force", "-o"]


def measure(folder: Path, size: int, turn: int) -> list[RankRun]:
    into = f"r{turn}-{size}"
    command = [*WORDS, f"{into}/x.safetensors"]
    ((_, runs),) = run_groups(folder, group(size, [command, command], into))
    assert all(run.code == 0 for run in runs), runs
    (folder / into / "x.safetensors").unlink()
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=128.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    uneven = dict.fromkeys(SIZES, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_snapshots(folder / "snapshots", 8, wanted.megabytes)
        for turn in range(wanted.rounds):
            for size in SIZES:
                runs = measure(folder, size, turn)
                seconds[size].append(max(run.seconds for run in runs))
                share = sum(run.read for run in runs) / size
                uneven[size] = max(uneven[size], *(abs(run.read / share - 1) for run in runs))
    alone = statistics.median(seconds[1])
    print(f"{8 * wanted.megabytes:,.0f} MB read, {wanted.rounds} rounds, medians")
    print("ranks  seconds  of one process  reads off an equal share by up to")
    for size in SIZES:
        median = statistics.median(seconds[size])
        print(f"{size:5}  {median:7.2f}  {median / alone:14.2f}  {uneven[size]:33.1%}")
    if wanted.json:
        wanted.json.write_text(json.dumps({"seconds": seconds, "uneven": uneven}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
