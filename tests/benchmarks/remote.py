"""Reading from afar: the throughput with 50 ms to each answer, as a share of that without.

python -m tests.benchmarks.remote [--snapshots 16] [--megabytes 96] [--latency 0.05] [--rounds 5]

Snapshots lie on a server of the standard library in a process of its own, which waits before each
answer. They are summed to one average, alternately with and without the wait; the same is done from
the disk. Printed are medians: the ratio, requests, and the peak of this process' memory.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np

from posthoc_cli import open_snapshots


def serve(folder: Path) -> None:
    """Serve the files below `/<latency in ms>/`, until the standard input ends."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listening.getsockname()[1], flush=True)

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while (text := lines.readline().decode().strip()) != "":
                    name, _, value = text.partition(":")
                    headers[name.lower()] = value.strip()
                _, wait, *rest = path.split("/")
                time.sleep(int(wait) / 1000)
                _send(connection, folder.joinpath(*rest), method, headers.get("range", ""))

    def accept() -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def _send(connection: socket.socket, path: Path, method: str, asked: str) -> None:
    if path.is_dir():
        page = "".join(f'<a href="{quote(name)}">x</a>' for name in os.listdir(path)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n\r\n"
        connection.sendall(head.encode() + (page if method == "GET" else b""))
        return
    if not path.is_file():
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    size = path.stat().st_size
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
    first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
    status = (
        f"206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}" if wanted else "200 OK"
    )
    head = f'HTTP/1.1 {status}\r\nETag: "{size}"\r\nContent-Length: {last + 1 - first}\r\n\r\n'
    connection.sendall(head.encode())
    if method == "GET":
        with path.open("rb") as file:
            connection.sendfile(file, first, last + 1 - first)


def write(folder: Path, snapshots: int, size: int) -> None:
    """Snapshots of `size` bytes, in 32 tensors."""
    from safetensors.numpy import save_file

    data = np.random.default_rng(0).normal(size=size // 4).astype(np.float32)
    for step in range(1, snapshots + 1):
        tensors = {f"layer{at}": part for at, part in enumerate(np.array_split(data + step, 32))}
        metadata = {"step": str(1000 * step), "sigma_rel": "0.1"}
        save_file(tensors, folder / f"ema-{step:04d}.safetensors", metadata)


def measure(folder: str, output: str) -> None:
    """Print the seconds of opening the folder and of saving an average, and the peak of memory."""
    begin = time.perf_counter()
    solution = open_snapshots(folder).solve(sigma_rel=0.12)
    opened = time.perf_counter()
    solution.save(output, force=True)
    saved = time.perf_counter()
    [peak] = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    print(opened - begin, saved - opened, int(peak) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--measure", nargs=2)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    elif given.measure:
        measure(*given.measure)
    else:
        compare(given.snapshots, given.megabytes, given.latency, given.rounds)


def compare(snapshots: int, megabytes: int, latency: float, rounds: int) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.remote"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        folder.mkdir()
        write(folder, snapshots, megabytes << 20)
        with subprocess.Popen([*command, "--serve", place], **pipes) as server:  # type: ignore[call-overload]
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            late = f"{url}/{round(1000 * latency)}/run"
            places = {"disk": str(folder), "server": f"{url}/0/run", "late": late}
            took: dict[str, list[list[float]]] = {name: [] for name in places}
            for _ in range(rounds):
                for name, where in places.items():
                    asked = [*command, "--measure", where, f"{place}/out.safetensors"]
                    done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True)
                    took[name].append(list(map(float, done.stdout.split())))
            server.stdin.close()
    read = snapshots * megabytes * 1.048576e-3
    for name, times in took.items():
        opened, saved, peak = (statistics.median(each) for each in zip(*times, strict=True))
        print(f"{name:7} opened in {opened:.2f} s, {read / saved:.2f} GB/s, at most {peak:.0f} MB")
    ratios = [a[1] / b[1] for a, b in zip(took["server"], took["late"], strict=True)]
    print(f"late / server: {statistics.median(ratios):.2f} of the throughput")


if __name__ == "__main__":
    main()
