"""How fast `posthoc convert` is beside `cp`, its memory, and whether what it says is true.

    python tests/benchmarks/converting.py speed [--folder DIR] [--gigabytes 0.5] [--files 8]
    python tests/benchmarks/converting.py memory [--folder DIR]
    python tests/benchmarks/converting.py peers [--folder DIR] [--python PYTHON]

`speed` converts a folder of checkpoints in each form, and copies the same files with `cp`, in turn;
`cp` leaves the data to the system to write, posthoc waits for the disk: so `cp` is also measured
with a `sync` after it. `memory` converts single files of growing size.

`peers` trains a network with the trackers of ema-pytorch and pytorch-posthoc-ema beside it, at
update_every 10, converts their checkpoints and rebuilds EMAs that were tracked exactly meanwhile.
They are installed in a virtual environment of their own, or found in that of PYTHON.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
REPEATS = 5


# What is converted


def tensors(size: int, form: str) -> dict[str, torch.Tensor]:
    """About `size` bytes in float16: convolutions and matrices, as a diffusion model has them."""
    made: dict[str, torch.Tensor] = {}
    left = size // 2
    shapes = [(1280, 1280, 3, 3), (1280,), (5120, 1280), (640, 640, 3, 3), (1280, 1280)]
    for number in range(10**6):
        shape = shapes[number % len(shapes)]
        count = torch.Size(shape).numel()
        if left < count:
            break
        left -= count
        weight = torch.rand(shape).half()
        if form == "channels last" and len(shape) == 4:
            weight = weight.to(memory_format=torch.channels_last)
        made[f"blocks.{number}.weight"] = weight
    made["rest"] = torch.rand(left).half()
    return made


def persistent(meta: dict) -> None:
    """What EDM2's pickles name to rebuild a module; here only its name counts."""
    raise AssertionError


class Persistent(torch.nn.Module):
    def __reduce__(self):
        meta = {
            "type": "class", "version": 6, "module_src": "# source code\n" * 3000,
            "class_name": "Network", "state": self.__dict__,
        }  # fmt: skip
        return persistent, (meta,), None


def write(path: Path, size: int, form: str) -> None:
    """A checkpoint of about `size` bytes."""
    content = tensors(size, form)
    if form == "edm2":
        names = "torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"
        modules = {name: types.ModuleType(name) for name in names}
        easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
        modules["dnnlib.util"].EasyDict = easy  # type: ignore[attr-defined]
        persistent.__module__ = "torch_utils.persistence"
        persistent.__qualname__ = persistent.__name__ = "_reconstruct_persistent_obj"
        modules["torch_utils.persistence"]._reconstruct_persistent_obj = persistent  # type: ignore[attr-defined]
        sys.modules.update(modules)
        network = Persistent()
        for name, tensor in content.items():
            network.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor, False))
        with open(path, "wb") as file:
            pickle.dump(easy(ema=network), file)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")


def make(path: Path, size: int, form: str) -> None:
    """The same in a process of its own: its memory must not count for those measured later."""
    call = [sys.executable, __file__, "write", str(path), str(size), form]
    subprocess.run(call, check=True)


NAMES = {"edm2": "run-{:07d}-0.050.pkl"}


# Measuring


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds, and peak memory in MB, of a command; from a small parent, as a child counts the
    parent's memory until it has become the command."""
    script = (
        "import resource, subprocess, sys, time; begin = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(time.perf_counter() - begin,"
        " resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *command], check=True, capture_output=True, text=True
    )
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def converting(source: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "posthoc_cli", "convert", str(source), str(output), "-q"]


def speed(folder: Path, size: int, files: int) -> None:
    for form in ("zip", "channels last", "legacy", "edm2"):
        source, output = folder / "source", folder / "output"
        source.mkdir()
        first = source / NAMES.get(form, "net_{}_6.94.pt").format(1)
        make(first, size, form)
        for number in range(2, files + 1):
            shutil.copy(first, source / NAMES.get(form, "net_{}_6.94.pt").format(number))
        total = sum(path.stat().st_size for path in source.iterdir())
        times: dict[str, list[float]] = {"convert": [], "cp": [], "cp and sync": []}
        memory = 0.0
        for _ in range(REPEATS):
            for name in times:
                os.sync()
                begin = time.perf_counter()
                if name == "convert":
                    memory = max(memory, measure(converting(source, output))[1])
                else:
                    subprocess.run(["cp", "-r", str(source), str(output)], check=True)
                    if name != "cp":
                        os.sync()
                times[name].append(time.perf_counter() - begin)
                shutil.rmtree(output)
        middle = {name: statistics.median(each) for name, each in times.items()}
        print(
            f"{form}: {files} files, {total / 1e9:.2f} GB; "
            + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in middle.items())
            + f"; {middle['cp'] / middle['convert']:.2f} of cp's speed, "
            f"{middle['cp and sync'] / middle['convert']:.2f} with its sync; peak {memory:.0f} MB",
            flush=True,
        )
        shutil.rmtree(source)


def memory(folder: Path) -> None:
    for form in ("zip", "channels last", "legacy", "edm2"):
        for size in (5 * 10**8, 2 * 10**9, 5 * 10**9):
            path = folder / NAMES.get(form, "net_{}_6.94.pt").format(1)
            make(path, size, form)
            seconds, peak = measure(converting(path, folder / "output"))
            print(f"{form}, {size / 1e9:.1f} GB: {seconds:.1f} s, peak {peak:.0f} MB", flush=True)
            shutil.rmtree(folder / "output")
            if form == "zip":
                options = ["--dtype", "float32"]
                _, peak = measure([*converting(path, folder / "output"), *options])
                print(f"{form}, {size / 1e9:.1f} GB, to float32: peak {peak:.0f} MB", flush=True)
                shutil.rmtree(folder / "output")
            path.unlink()
    for size in (5 * 10**8, 2 * 10**9):
        path = folder / "net_1_6.94.pt"
        side = int((size / 4) ** 0.5)
        code = f"import torch; torch.save({{'w': torch.rand({side}, {side}).t()}}, {str(path)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds, peak = measure(converting(path, folder / "output"))
        print(f"one transposed tensor, {size / 1e9:.1f} GB: {seconds:.1f} s, peak {peak:.0f} MB")
        shutil.rmtree(folder / "output")
        path.unlink()


# Other tools' own checkpoints

STEPS, EVERY, UPDATE_EVERY = 4000, 200, 10
TRAINED, TARGETS = "0.05,0.10", (0.05, 0.07, 0.10, 0.15)


def peers(folder: Path, python: Path) -> None:
    listed = ",".join(map(str, TARGETS))
    numbers = [str(STEPS), str(EVERY), str(UPDATE_EVERY), TRAINED, listed]
    training = [str(python), str(HERE / "peer_training.py"), str(folder), *numbers]
    subprocess.run(training, check=True)
    state = torch.load(folder / "exact.pt", weights_only=True)
    loaded = torch.load(folder / "loaded.pt", weights_only=True)
    for tool in ("ema-pytorch", "posthoc-ema"):
        for update_every in (UPDATE_EVERY, 1):
            output = folder / f"{tool}-{update_every}"
            options = ["--profiles", TRAINED, "--update-every", str(update_every)]
            subprocess.run(
                [*converting(folder / tool, output), *options],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            errors = [
                off(rebuilt(output, target, folder), exact, state["network"])
                for target, exact in zip(TARGETS, state["exact"], strict=True)
            ]
            print(
                f"{tool}, update_every {UPDATE_EVERY}, told to be {update_every}: "
                + ", ".join(f"{t}: {e:.1%}" for t, e in zip(TARGETS, errors, strict=True)),
                flush=True,
            )
        for name, tensors in loaded.items():
            if name.startswith(tool):
                found = load_file(
                    (folder / f"{tool}-1" / Path(name).name).with_suffix(".safetensors")
                )
                assert found.keys() == tensors.keys()
                for key, tensor in tensors.items():
                    assert found[key].shape == tensor.shape
                    assert torch.equal(found[key].to(tensor.dtype), tensor)
                print(f"{name}: what the tool itself loads, to the bit")


def rebuilt(snapshots: Path, target: float, folder: Path) -> dict[str, torch.Tensor]:
    output = folder / "ema.safetensors"
    subprocess.run(
        [
            *(sys.executable, "-m", "posthoc_cli", "synthesize", str(snapshots), "-q", "--force"),
            *("--sigma-rel", str(target), "--method", "blup", "--dtype", "float64"),
            *("-o", str(output)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return load_file(output)


def off(found: dict, exact: dict, network: dict) -> float:
    """The error, relative to how far the EMA is from the network."""
    error = sum(float((found[name].double() - exact[name]).square().sum()) for name in exact)
    distance = sum(float((network[name] - exact[name]).square().sum()) for name in exact)
    return (error / distance) ** 0.5


def environment(folder: Path) -> Path:
    from peers import _environment, _install

    python = _environment(folder / "venv")
    if python is None:
        sys.exit(1)
    for package, module in (("ema-pytorch", "ema_pytorch"), ("pytorch-posthoc-ema", "posthoc_ema")):
        if _install(python, package, module) is None:
            sys.exit(1)
    return python


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "memory", "peers"])
    parser.add_argument("--folder", help="a disk with room, for data that is removed at the end")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of a checkpoint")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--python", type=Path, help="of an environment that has the other tools")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="posthoc-", dir=chosen.folder) as scratch:
        if chosen.what == "speed":
            speed(Path(scratch), int(chosen.gigabytes * 1e9), chosen.files)
        elif chosen.what == "memory":
            memory(Path(scratch))
        else:
            peers(Path(scratch), chosen.python or environment(Path(scratch)))
