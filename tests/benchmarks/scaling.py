"""What `posthoc plan --bandwidth` predicts, beside what is measured.

    python tests/benchmarks/scaling.py [ranks] [requests] [--snapshots 4] [--megabytes 64]

`ranks`: one rank and two, of snapshots on the disk: what each reads, by /proc, beside an equal
part. `requests`: snapshots in a bucket, whose server answers so late as is said, with so many
requests of one row under way, as with hundreds of snapshots: seconds by the model, and true. The
model's bandwidth is what was measured without latency. What the same command takes of smaller
snapshots, which it looks at in as many places before it sums them, is taken off. Exits with 1 when
a prediction is off by more than a half. All on this machine, which the server shares.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

sys.path.insert(0, str(Path(__file__).parents[2]))

from posthoc_cli.synthesis import cost as model_of
from posthoc_cli.synthesis.cost import cost
from tests.servers.buckets import Buckets

model_of.LARGEST = 1 << 19  # as in the processes that are measured

COMMAND = """
import os, sys
import posthoc_cli.storage.remote.fetching as fetching
from posthoc_cli.cli import main
fetching.MOST_IN_FLIGHT = int(sys.argv.pop(1)) or fetching.MOST_IN_FLIGHT
fetching.LARGEST = 1 << 19

def leave(code, exit=os._exit):  # as ranks do
    print(open("/proc/self/io").readline(), file=sys.stderr, flush=True)  # rchar: N
    exit(code)

os._exit = leave
leave(main())
"""
SMALL = 48_000_000

SYNTHESIZE = ["--sigma-rel", "0.07", "--method", "edm2", "--force", "-q", "-o"]


def snapshots(count: int, size: int) -> Mapping[str, bytes]:
    """Snapshots of two profiles, of `size` bytes of float16 in four tensors."""
    made = {}
    for at in range(count):
        rng = np.random.default_rng(at)
        tensors = {f"w{k}": rng.random(size // 8, np.float32).astype(np.float16) for k in range(4)}
        step, sigma_rel = 1000 * (at // 2 + 1), ("0.05", "0.10")[at % 2]
        metadata = {"step": str(step), "sigma_rel": sigma_rel}
        made[f"ema-{step}-{sigma_rel}.safetensors"] = save(tensors, metadata)
    return made


def timed(
    folder: str, output: Path, ranks: int = 1, in_flight: int = 0, **environment: str
) -> tuple[float, list[int]]:
    """Seconds from start to end, and the bytes that each rank read."""
    words = [sys.executable, "-c", COMMAND, str(in_flight), "synthesize", folder, *SYNTHESIZE]
    begin = time.perf_counter()
    running = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        env = {**os.environ, **environment, **(place if ranks > 1 else {})}
        running.append(
            subprocess.Popen(
                [*words, str(output)],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [each.communicate()[1] for each in running]
    seconds = time.perf_counter() - begin
    assert not any(each.returncode for each in running), errors
    return seconds, [int(error.rpartition("rchar:")[2]) for error in errors]


def compare_ranks(place: Path, count: int, size: int) -> bool:
    """Bytes read by each of one and two ranks, beyond those of small snapshots."""
    for name, bytes_each in (("small", SMALL), ("large", SMALL + size)):
        (place / name).mkdir()
        for file, data in snapshots(count, bytes_each).items():
            (place / name / file).write_bytes(data)
    print(f"{count} snapshots on the disk, {size / 1e6:.0f} MB of each\n")
    print("| ranks | each reads, by the model | measured | off | seconds |")
    print("| --- | --- | --- | --- | --- |")
    good = True
    for ranks in (1, 2):
        _, empty = timed(str(place / "small"), place / "x.safetensors", ranks)
        seconds, read = timed(str(place / "large"), place / "x.safetensors", ranks)
        expected = cost(count, size, 1, ranks, 1.0).bytes_read
        for own, other in zip(read, empty, strict=True):
            off = (own - other) / expected - 1
            good &= abs(off) < 0.1
            mega = f"{expected / 1e6:.1f} MB | {(own - other) / 1e6:.1f} MB"
            print(f"| {ranks} | {mega} | {100 * off:+.1f} % | {seconds:.2f} |")
    return good


def compare_requests(place: Path, count: int, size: int) -> bool:
    """Seconds beyond those of small snapshots, and requests, by latency and requests at once."""
    good = True
    with Buckets("bucket") as server:
        for name, bytes_each in (("small", SMALL), ("large", SMALL + size)):
            for file, data in snapshots(count, bytes_each).items():
                server.put("bucket", f"{name}/{file}", data)

        def measured(latency: float, in_flight: int) -> tuple[float, int]:
            server.latency = latency
            taken, asked = [], []
            for name in ("small", "large"):
                server.requests.clear()
                taken.append(
                    timed(
                        f"s3://bucket/{name}",
                        place / "x.safetensors",
                        in_flight=in_flight,
                        **server.environment(),
                    )[0]
                )
                asked.append(len(server.requests))
            return taken[1] - taken[0], asked[1] - asked[0]

        measured(0, 0)
        plain = max(min(measured(0, 0)[0] for _ in range(2)), 0.05)
        bandwidth = count * size / plain
        request = cost(count, size, 1, 1, bandwidth).request_bytes
        print(f"\n{count} snapshots in a bucket, {size / 1e6:.0f} MB of each; requests of", end=" ")
        print(f"{request / 1e6:.2f} MB; {bandwidth / 1e6:.0f} MB/s without latency\n")
        print(
            "| latency | at once | requests, model | measured | seconds, model | measured | off |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for latency, in_flight in ((0.5, 32), (0.5, 16), (0.2, 16), (0.2, 8)):
            model = cost(count, size, 1, 1, bandwidth, latency, in_flight or None)
            seconds, asked = measured(latency, in_flight)
            off = seconds / model.seconds - 1
            good &= -0.5 < off < 0.5
            print(
                f"| {1000 * latency:.0f} ms | {model.in_flight} | {model.requests} | {asked} | "
                f"{model.seconds:.2f} | {seconds:.2f} | {100 * off:+.0f} % |"
            )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["ranks", "requests"])
    parser.add_argument("--snapshots", type=int, default=4)
    parser.add_argument("--megabytes", type=float, default=64)
    given = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            compare = {"ranks": compare_ranks, "requests": compare_requests}[part]
            good &= compare(Path(folder), given.snapshots, int(given.megabytes * 1e6))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
