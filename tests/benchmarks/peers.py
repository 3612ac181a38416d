"""The other tools that `speed.py --peers` measures: installed apart, given the same numbers.

    python tests/benchmarks/peers.py        # is what they write what posthoc writes? on small data

What is compared is the way from a folder of snapshots to one float16 file with one target, as a
whole process. The peers get the settings that were fastest where the result is still right (each
driver script says which and why). Their threads are torch's default, one a processor: torch slows
down several times when something else keeps a processor busy, so measure on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
TARGET = "0.07"


def prepare(folder: Path, scratch: Path) -> list[tuple[str, list[str], list[Path]]]:
    """Install the peers in `scratch`, and write there what they read.

    Returns a name, a command and what it writes for each peer that could be installed; the others
    are named in a printed line.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    python = _environment(scratch / "venv")
    if python is None:
        return []
    solved = scratch / "weights.json"
    solved.write_text(json.dumps(_solve(folder, "edm2")))
    target = json.loads(solved.read_text())["targets"][0]
    profiles = ",".join(str(s) for s in sorted({entry["sigma_rel"] for entry in target["weights"]}))
    # pytorch-posthoc-ema grew out of ema-pytorch: its checkpoints have the same names and, but for
    # a prefix to each tensor's name, the same content. One copy serves both, so that less of the
    # page cache is needed for all to find their input in it.
    checkpoints = scratch / "checkpoints"
    peers = []
    for package, module, script in (
        ("ema-pytorch", "ema_pytorch", "peer_ema_pytorch.py"),
        ("pytorch-posthoc-ema", "posthoc_ema", "peer_posthoc_ema.py"),
    ):
        version = _install(python, package, module)
        if version is None:
            continue
        if not checkpoints.exists():
            checkpoints.mkdir()
            arguments = [str(folder), str(solved), str(checkpoints)]
            # In a process of its own: see make_snapshots in speed.py.
            subprocess.run(
                [sys.executable, str(HERE / "peer_checkpoints.py"), *arguments], check=True
            )
        output = scratch / f"{package}.safetensors"
        arguments = [str(checkpoints), profiles, TARGET, str(output)]
        command = [str(python), str(HERE / script), *arguments]
        peers.append((f"{package} {version}", command, [output]))
    version = _install(python, "mergekit", "mergekit.scripts.merge_raw_pytorch")
    if version is not None:
        recipe = scratch / "mergekit.yaml"
        recipe.write_text(_mergekit_recipe(folder, target["weights"]))
        output = scratch / "mergekit"
        # With its progress bar held back, which can't be turned off. --async-write with smaller
        # shards, one thread and --clone-tensors made no difference; --lazy-unpickle is for pickles,
        # and the other options for speed are for GPUs. Most of a short run is its imports.
        merge = [str(python.parent / "mergekit-pytorch"), str(recipe), str(output)]
        peers.append((f"mergekit {version}", ["env", "TQDM_MININTERVAL=600", *merge], [output]))
    return peers


def _mergekit_recipe(folder: Path, weights: list[dict]) -> str:
    """What mergekit-pytorch reads: the snapshots themselves, in place, with posthoc's weights.

    It maps them and sums in float32. (mergekit-yaml wants a transformers config beside each.) JSON
    is YAML.
    """
    models = [
        {"model": str(folder / entry["file"]), "parameters": {"weight": entry["weight"]}}
        for entry in weights
    ]
    recipe = {"merge_method": "linear", "dtype": "float16", "parameters": {"normalize": False}}
    return json.dumps({**recipe, "models": models}, indent=1)


def _solve(folder: Path, method: str) -> dict:
    solve = [sys.executable, "-m", "posthoc_cli", "solve", str(folder), "--sigma-rel", TARGET]
    done = subprocess.run(
        [*solve, "--method", method, "--json", "-q"], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def _environment(folder: Path) -> Path | None:
    """A new virtual environment's Python, with what the drivers themselves import."""
    done = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True)
    if done.returncode:
        print("peers left out: no virtual environment could be made")
        return None
    python = folder / "bin" / "python"
    return python if _install(python, "torch", "torch", "numpy", "safetensors") else None


def _install(python: Path, package: str, module: str, *more: str) -> str | None:
    """Install a package beside the torch that the others use; its version, or None with a line.

    The constraint matters: without it pip may take a torch with gigabytes of CUDA libraries.
    """
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*pip, "-c", str(CONSTRAINTS), package, *more], capture_output=True, text=True
    )
    if done.returncode == 0:
        ask = f"import {module}, importlib.metadata as m; print(m.version({package!r}))"
        done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True)
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if "ERROR" in line or "Error" in line] or [
            "no reason given"
        ]
        print(f"{package} left out: it can't be installed with this torch: {why[-1].strip()}")
        return None
    return done.stdout.split()[-1]


def check(parameters: int) -> bool:
    """Run each peer once on small snapshots; print how far its numbers are from the exact ones.

    In units in the last place of the exact sum or its largest term: half a unit is the rounding to
    float16. ema-pytorch and pytorch-posthoc-ema solve for their own weights, as algorithm 3 has
    them; mergekit is given posthoc's, which sum to one.
    """
    from speed import make_snapshots

    agree = True
    with tempfile.TemporaryDirectory(prefix="posthoc-peers-") as scratch:
        folder = Path(scratch) / "snapshots"
        make_snapshots(folder, 16, parameters)
        begin = time.perf_counter()
        peers = prepare(folder, Path(scratch) / "peers")
        print(f"prepared in {time.perf_counter() - begin:.0f} s")
        for name, command, (output,) in peers:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            method = "edm2" if name.startswith("mergekit") else "algorithm3"
            exact, unit = _exact(folder, method)
            written = load_file(output / "model.safetensors" if output.is_dir() else output)
            off = [np.abs(written[key] - exact[key]) / unit[key] for key in exact]
            worst = max(float(array.max()) for array in off)
            mean = sum(float(array.sum()) for array in off) / sum(array.size for array in off)
            same = written.keys() == exact.keys() and {a.dtype for a in written.values()} == {
                np.dtype(np.float16)
            }
            print(f"{name}: off by {worst:.2f} units at most, {mean:.3f} on average ({method})")
            agree &= same and worst <= 1
    return agree


def _exact(folder: Path, method: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weighted sums in float64, and a half-precision unit of each or its largest term."""
    total: dict[str, np.ndarray] = {}
    largest: dict[str, np.ndarray] = {}
    for entry in _solve(folder, method)["targets"][0]["weights"]:
        for name, array in load_file(folder / entry["file"]).items():
            term = array.astype(np.float64) * entry["weight"]
            total[name] = total.get(name, 0) + term
            largest[name] = np.maximum(largest.get(name, 0), np.abs(term))
    scales = {name: np.maximum(largest[name], np.abs(total[name])) for name in total}
    return total, {n: np.spacing(a.astype(np.float16)).astype(float) for n, a in scales.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=2_000_000, help="of a snapshot")
    sys.exit(not check(parser.parse_args().parameters))
