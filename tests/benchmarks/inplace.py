"""How fast checkpoints are read where they lie, beside the same networks as safetensors files.

    python tests/benchmarks/inplace.py speed [--folder DIR] [--megabytes 256] [--files 16]
    python tests/benchmarks/inplace.py opening [--folder DIR]

`speed` makes one EMA and eight of them of a folder in each form, in turn, and takes the best of
a few runs: the ratio to safetensors, and the peak memory of the process. `opening` opens 64
checkpoints of 2,000 tensors, with one pickle and with such as count steps, in processor time.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from converting import tensors  # beside this file
from safetensors.torch import save_file

import posthoc_cli

REPEATS = 3
TARGETS = {"one": "0.1", "eight": "0.06,0.08,...,0.20"}

CHILD = """
import json, sys, time
from posthoc_cli.cli import main
begin = time.perf_counter()
sys.argv = ["posthoc", *sys.argv[1:]]
code = main()
assert not code, code
seconds = time.perf_counter() - begin
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak.split()[1]) / 1000]), file=sys.stderr)
"""


def save(form: str, network: dict[str, torch.Tensor], stem: Path) -> None:
    if form == "safetensors":
        save_file(network, f"{stem}.safetensors")
    elif form == "torch":
        torch.save(network, f"{stem}.pt")
    elif form == "pickle":
        Path(f"{stem}.pkl").write_bytes(pickle.dumps(network, 4))  # as EDM2 has them inside
    else:
        from torch.distributed.checkpoint import save as save_distributed

        save_distributed(network, checkpoint_id=str(stem))


def run(folder: Path, targets: str) -> tuple[float, float]:
    """Seconds and MB of one call."""
    out = folder.parent / "out"
    words = ["synthesize", str(folder), "--raw", "--sigma-rel", targets, "-o", f"{out}/"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words, "-q"], capture_output=True, text=True, check=True
    )
    shutil.rmtree(out)
    seconds, peak = json.loads(done.stderr.splitlines()[-1])
    return seconds, peak


def speed(folder: Path, megabytes: int, files: int) -> None:
    forms = ("safetensors", "torch", "distributed", "pickle")
    for step in range(1, files + 1):
        torch.manual_seed(step)
        network = tensors(megabytes * 10**6, "")
        for form in forms:
            (folder / form).mkdir(exist_ok=True)
            save(form, network, folder / form / f"step-{step}")
    for many, targets in TARGETS.items():
        times: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
        for _ in range(REPEATS):
            for form in forms:
                times[form].append(run(folder / form, targets))
        base = min(times["safetensors"])[0]
        for form, found in times.items():
            seconds, peak = min(found)[0], max(peak for _, peak in found)
            print(f"{many:>6} {form:>12} {seconds:6.2f} s {seconds / base:5.2f} x {peak:5.0f} MB")


def opening(folder: Path) -> None:
    for form in ("safetensors", "torch", "torch with steps"):
        place = folder / form
        place.mkdir()
        for step in range(1, 65):
            network = {
                f"blocks.{at // 10}.{at % 10}.weight": torch.full((8, 8), 1.0 * step)
                for at in range(2000)
            }
            if form == "safetensors":
                save_file(network, place / f"net-{step}.safetensors")
            else:
                said = {"model": network, "step": step} if "steps" in form else network
                torch.save(said, place / f"net-{step}.pt")
        times = []
        for _ in range(REPEATS):
            begin = time.process_time()
            opened = posthoc_cli.open_snapshots(place, raw=True)
            times.append(time.process_time() - begin)
            assert (len(opened.snapshots), opened.problems) == (64, [])
        print(f"{form:>18} {min(times):6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "opening"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--files", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if given.what == "speed":
            speed(Path(folder), given.megabytes, given.files)
        else:
            opening(Path(folder))


if __name__ == "__main__":
    main()
