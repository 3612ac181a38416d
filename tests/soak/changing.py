"""Snapshots that change while they are read, and a trainer that is still writing them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from posthoc_cli.storage.disk import InputFile
from tests.command import ROOT, Run, run_command
from tests.soak.fuzz import harm_of, run_here
from tests.soak.scenes import make_snapshots
from tests.soak.tally import Tally

ROUNDS = 30
"""Of each change."""

METHODS = ("edm2", "blup", "solve")
"""Of a synthesize; or weights alone, for which a sample is read."""

TRAINER_ROUNDS = 40


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _append(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _overwrite(path: Path, rng: random.Random) -> None:
    """Other values in the same place: the length stays."""
    with open(path, "r+b") as file:
        file.seek(rng.randrange(path.stat().st_size - 8))
        file.write(rng.randbytes(8))


def _replace(path: Path, rng: random.Random) -> None:
    """As a careful trainer does, by a file of the same length."""
    other = path.with_name("other")
    shutil.copyfile(path, other)
    _overwrite(other, rng)
    os.replace(other, path)


def _replace_keeping_the_time(path: Path, rng: random.Random) -> None:
    status = path.stat()
    _replace(path, rng)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def _become_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _become_a_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _dangle(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncate,
    "appended to": _append,
    "overwritten": _overwrite,
    "replaced": _replace,
    "replaced, their times kept": _replace_keeping_the_time,
    "removed": _remove,
    "turned into folders": _become_a_folder,
    "turned into pipes": _become_a_pipe,
    "turned into dangling links": _dangle,
}
"""What may become of a snapshot while it is read."""


def changing(seed: int, tally: Tally, rounds: int = ROUNDS, trainers: int = TRAINER_ROUNDS) -> None:
    """Each change at random moments of a synthesize; then trainers that write meanwhile."""
    rng = random.Random(f"changing/{seed}")
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        base = Path(scratch)
        make_snapshots(base / "whole", megabytes=4, seed=seed)
        calls = {method: _reads(base, method) for method in METHODS}
        for name, change in CHANGES.items():
            for number in range(rounds):
                method = METHODS[number % len(METHODS)]
                losses = _changed(base, change, rng, method, calls[method])
                tally.count(f"inputs {name}", losses)
        if trainers:
            _appending_trainer(base, rng, trainers, tally)
            _rewriting_trainer(base, trainers, tally)


def _synthesize(base: Path, method: str) -> Run:
    words = [str(base / "snapshots"), "--sigma-rel", "0.07"]
    if method == "solve":
        return run_here(["solve", *words])
    return run_here(["synthesize", *words, "--method", method, "-o", str(base / "x.safetensors")])


def _fresh(base: Path) -> Path:
    shutil.rmtree(base / "snapshots", ignore_errors=True)
    shutil.copytree(base / "whole", base / "snapshots")
    return base / "snapshots"


def _reads(base: Path, method: str) -> int:
    """How many reads one run makes."""
    _fresh(base)
    count = 0
    read = InputFile._read_some

    def counted(self: InputFile, fd: int, offset: int, into: memoryview) -> int:
        nonlocal count
        count += 1
        return read(self, fd, offset, into)

    with mock.patch.object(InputFile, "_read_some", counted):
        run = _synthesize(base, method)
    assert run.code == 0, run.err
    (base / "x.safetensors").unlink(missing_ok=True)
    return count


def _changed(
    base: Path,
    change: Callable[[Path, random.Random], None],
    rng: random.Random,
    method: str,
    calls: int,
) -> list[str]:
    """Change one of the snapshots at one of the reads, any but the last few."""
    folder = _fresh(base)
    victim = rng.choice(sorted(folder.iterdir()))
    left = rng.randrange(calls - 4)
    read = InputFile._read_some

    def changed_meanwhile(self: InputFile, fd: int, offset: int, into: memoryview) -> int:
        nonlocal left
        left -= 1
        if left == -1:
            change(victim, rng)
        return read(self, fd, offset, into)

    with mock.patch.object(InputFile, "_read_some", changed_meanwhile):
        run = _synthesize(base, method)
    losses = harm_of(run, codes=(3,))
    if victim.name not in run.err:
        losses.append(f"doesn't name {victim.name}: {run.err!r}")
    left_over = sorted(set(os.listdir(base)) - {"whole", "snapshots"})
    if left_over:
        losses.append(f"left {left_over}")
        for name in left_over:
            (base / name).unlink()
    return losses


_APPENDING = """
import os, sys, time
from pathlib import Path
content, path, pause = Path(sys.argv[1]).read_bytes(), sys.argv[2], float(sys.argv[3])
with open(path, "wb", buffering=0) as file:
    for at in range(0, len(content), len(content) // 20 + 1):
        file.write(content[at : at + len(content) // 20 + 1])
        time.sleep(pause)
"""

_REWRITING = """
import sys
import numpy as np
from safetensors.numpy import save_file
number = 0
while True:
    number += 1
    tensors = {f"layer{k}": np.full(64, number, np.float32) for k in range(int(sys.argv[2]))}
    save_file(tensors, sys.argv[1], {"step": "9000", "sigma_rel": "0.05"})
"""


def _appending_trainer(base: Path, rng: random.Random, rounds: int, tally: Tally) -> None:
    """The newest snapshot appears piece by piece under its name, as torch and others write it."""
    folder = _fresh(base)
    newest = folder / "ema-3000-0.10.safetensors"
    whole = base / "whole" / newest.name
    words = ["synthesize", "snapshots", "--sigma-rel", "0.07", "-o", "x.safetensors"]
    for number in range(rounds):
        newest.unlink(missing_ok=True)
        skipping = number % 2 == 1
        script = [sys.executable, "-c", _APPENDING, whole, newest, str(rng.uniform(0.01, 0.06))]
        with subprocess.Popen(script):
            while not newest.exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.3))
            run = run_command(base, *words, *(["--skip-incomplete"] if skipping else []))
        losses = harm_of(run, codes=(0, 3))
        if run.code == 3 and newest.name not in run.err:
            losses.append(f"doesn't name {newest.name}: {run.err!r}")
        if run.code == 0:
            losses += _honest(base, newest, run, skipping)
            (base / "x.safetensors").unlink(missing_ok=True)
        if left := set(os.listdir(base)) - {"whole", "snapshots"}:
            losses.append(f"left {sorted(left)}")
        tally.count("trainers that append", losses)


def _honest(base: Path, newest: Path, run: Run, skipping: bool) -> list[str]:
    """The newest snapshot is in the recipe, and was whole; or it is not, which was said."""
    used = newest.name in run_command(base, "inspect", "x.safetensors", "--all", "--json").out
    if not used and not (skipping and newest.name in run.err):
        return [f"left {newest.name} out, and said {run.err!r}"]
    return []


def _rewriting_trainer(base: Path, rounds: int, tally: Tally) -> None:
    """A file that is written in its place again and again, while its header is read."""
    folder = _fresh(base)
    path = folder / "latest.safetensors"
    for number in range(rounds):
        tensors = (3, 300, 3000)[number % 3]
        with subprocess.Popen(
            [sys.executable, "-c", _REWRITING, path, str(tensors)], cwd=ROOT
        ) as trainer:
            while not path.exists():
                time.sleep(0.001)
            runs = [run_command(base, "inspect", f"snapshots/{path.name}") for _ in range(3)]
            trainer.kill()
        losses = [loss for run in runs for loss in harm_of(run, codes=(0, 3))]
        path.unlink()
        tally.count("trainers that rewrite", losses, times=len(runs))
