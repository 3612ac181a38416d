"""Writing to a bucket: peak memory and time beside a local file's, and what 50 ms a request cost.

python -m tests.benchmarks.uploads [--megabytes 200] [--latency 0.05] [--rounds 3]

The command makes one average, and four, of two snapshots of that size and of four times it: to a
disk, to a server of the standard library in a process of its own, and to one that waits before each
answer. Printed are medians: the process' peak memory, and its seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.command import ENVIRONMENT
from tests.servers.buckets import Buckets, environment

ONE, FOUR = ("--sigma-rel", "0.07"), ("--sigma-rel", "0.05,0.07,0.1,0.15")


def serve(latency: float) -> None:
    """Serve the bucket `bucket` until the standard input ends."""
    with Buckets("bucket") as server:
        server.latency = latency
        print(server.url, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def server(latency: float) -> Iterator[dict[str, str]]:
    """The variables that lead to one in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.uploads", "--serve", str(latency)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        yield environment(process.stdout.readline().strip())
        process.stdin.close()


def write(folder: Path, megabytes: int) -> None:
    """Two snapshots of that size."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    values = np.random.default_rng(0).standard_normal(megabytes * 250_000).astype(np.float32)
    for step in (1000, 2000):
        tensors = {f"layer{at}": part + step for at, part in enumerate(np.split(values, 8))}
        save_file(tensors, folder / f"s{step}.safetensors", {"step": str(step)})


def run(
    folder: Path, run: str, targets: tuple[str, ...], out: str, **env: str
) -> tuple[float, int]:
    """Seconds and peak memory in kB of a synthesis."""
    command = [sys.executable, "-m", "posthoc_cli", "synthesize", run, "--raw", *targets]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "-o", out, "-q", "--force"],
        cwd=folder,
        env=ENVIRONMENT | env,
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - begin, used.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=float)
    parser.add_argument("--write", nargs=2)
    given = parser.parse_args()
    if given.write:
        write(Path(given.write[0]), int(given.write[1]))
        return
    if given.serve is not None:
        serve(given.serve)
        return
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        # By other processes: what this one has held would count as the command's peak.
        for times in (1, 4):
            size = str(times * given.megabytes)
            where = str(folder / f"x{times}")
            module = "tests.benchmarks.uploads"
            subprocess.run([sys.executable, "-m", module, "--write", where, size], check=True)
        bucket, late = (stack.enter_context(server(each)) for each in (0.0, given.latency))
        (folder / "out").mkdir()
        places = {"disk": ("out/", {}), "bucket": ("s3://bucket/out/", bucket)}
        places["late"] = "s3://bucket/out/", late
        for runs, targets in (("x1", ONE), ("x4", ONE), ("x1", FOUR)):
            found: dict[str, list[tuple[float, int]]] = {name: [] for name in places}
            for _ in range(given.rounds):
                for name, (out, env) in places.items():
                    found[name].append(run(folder, runs, targets, out, **env))
            many = 1 if targets is ONE else 4
            size = given.megabytes * int(runs[1:])
            told = []
            for name, each in found.items():
                seconds, peak = (statistics.median(values) for values in zip(*each, strict=True))
                told.append(f"{name} {seconds:.1f} s, {peak / 1e3:.0f} MB")
            print(f"{many} x {size} MB: {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
