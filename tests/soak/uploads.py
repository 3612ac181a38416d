"""Outputs in a bucket: signals at random moments, and faults of the network among the requests."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.command import ENVIRONMENT
from tests.servers.buckets import Buckets
from tests.servers.faults import Fault, Proxy
from tests.soak.kill import none_ignored
from tests.soak.scenes import make_snapshots
from tests.soak.tally import Tally

ROUNDS = 40

LATENCY = 0.01

OUTPUTS = (
    ("--gamma", "5", "-o", "s3://bucket/a.safetensors"),
    ("--gamma", "5,9,12", "-o", "s3://bucket/several/"),
    ("--gamma", "5", "--max-shard-size", "7MB", "-o", "s3://bucket/shards.safetensors"),
)

FAULTS = (
    {"status": 500},
    {"status": 503, "count": 3},
    {"lost": True},
    {"upload": 1000, "method": "PUT"},
    {"after": 0, "method": "POST"},
)


def uploads(seed: int, tally: Tally, rounds: int = ROUNDS, megabytes: float = 20) -> None:
    """SIGINT and SIGTERM at `rounds` random moments, and as many faults at random requests."""
    rng = random.Random(f"uploads/{seed}")
    with (
        none_ignored(),
        tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch,
        Buckets("bucket") as server,
        Proxy(server.url, latency=LATENCY) as proxy,
    ):
        folder = Path(scratch)
        make_snapshots(folder / "snapshots", megabytes=megabytes, seed=seed)
        whole = []
        for output in OUTPUTS:
            begin = time.monotonic()
            code, err = _run(folder, server, proxy, output)
            tally.count("whole runs", [err] if code else None)
            whole.append((time.monotonic() - begin, len(proxy.requests), _objects(server)))
        for number in range(rounds):
            at = number % len(OUTPUTS)
            seconds, requests, wanted = whole[at]
            how = (signal.SIGINT, signal.SIGTERM)[number % 2], rng.uniform(0, seconds)
            code, err = _run(folder, server, proxy, OUTPUTS[at], *how)
            losses = [] if code in (0, 130, 143) else [f"ended in {code}: {err!r}"]
            # One that comes when all is done changes nothing of that.
            if _objects(server) != wanted and (_objects(server) or code == 0):
                losses.append(f"left {server.keys('bucket')} ({code})")
            if _parts(server) and "may be left" not in err:
                losses.append(f"left parts of {_parts(server)} ({code}): {err!r}")
            tally.count("signals", losses)
            proxy.clear()
            proxy.add(Fault(**rng.choice(FAULTS), skip=rng.randrange(requests)))
            code, err = _run(folder, server, proxy, OUTPUTS[at])
            losses = [f"ended in {code}: {err!r}"] if code else []
            if _objects(server) != wanted or _parts(server):
                losses.append(f"left {server.keys('bucket')}, {_parts(server)} uploads")
            tally.count("faults", losses)


def _run(
    folder: Path,
    server: Buckets,
    proxy: Proxy,
    output: tuple[str, ...],
    number: signal.Signals | None = None,
    after: float = 0,
) -> tuple[int, str]:
    """Exit code and stderr of a run into the empty bucket, with a signal `after` so many seconds
    from its first request on."""
    server.buckets["bucket"].clear()
    server.uploads.clear()
    proxy.requests.clear()
    command = [sys.executable, "-m", "posthoc_cli", "synthesize", "snapshots", *output, "-q"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT | server.environment(proxy.url),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        if number is not None:
            while not proxy.requests and process.poll() is None:
                time.sleep(0.001)
            time.sleep(after)
            process.send_signal(number)
        err = process.communicate(timeout=120)[1]
    return process.returncode, err


def _objects(server: Buckets) -> dict[str, bytes]:
    return {key: found.data for key, found in server.buckets["bucket"].items()}


def _parts(server: Buckets) -> int:
    """Uploads with parts that aren't completed. Nobody may know of one without: its beginning was
    answered, and the answer lost."""
    return sum(bool(upload.parts) for upload in server.uploads.values())
