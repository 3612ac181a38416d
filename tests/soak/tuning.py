"""Searches that are killed, interrupted, and short of disk: no evaluation lost, none done twice."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.command import Run, start_command
from tests.soak.fuzz import harm_of
from tests.soak.kill import none_ignored
from tests.soak.scenes import make_snapshots
from tests.soak.tally import Tally

ROUNDS = 40
EVALUATIONS = 9
MOST_SECONDS = 15.0
"""From a signal to the end: commands have three seconds to end by themselves."""

METRIC = (
    "echo {target} $$ >> ../log; sleep 0.0$(($$ % 7)); test -s {file} && "
    "echo {sigma_rel} | awk '{print 3 + 100 * ($1 - 0.1) * ($1 - 0.1)}'"
)
WORDS = ("tune", "../snapshots", "--minimize", "--range", "0.04:0.2", "-o", "best.safetensors")
WORDS += ("--evaluations", str(EVALUATIONS), "--metric", METRIC)


def tuning(seed: int, tally: Tally, rounds: int = ROUNDS) -> None:
    """Each round a search is stopped at random moments until it ends: three ways of doing so."""
    rng = random.Random(f"tuning/{seed}")
    with none_ignored(), tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        base = Path(scratch)
        make_snapshots(base / "snapshots", megabytes=1, seed=seed)
        search = _Search(base)
        begin = time.monotonic()
        search.finish()
        seconds = time.monotonic() - begin
        whole = search.output()
        for number in range(rounds):
            parallel = 1 + number % 3
            for kind, stop in (("kills", _killed), ("signals", _interrupted)):
                search = _Search(base, parallel)
                losses, stops = [], 0
                while stops < 6 and not search.done:
                    losses += stop(search, rng, seconds)
                    stops += 1
                losses += search.finish()
                losses += search.harm(stops, whole if parallel == 1 else None)
                tally.count(kind, losses, stops)
            losses = _short_of_disk(base, rng, tally)
            tally.count("full disks", losses)


class _Search:
    """A search in a folder of its own, `work`, with the log of its commands beside it."""

    def __init__(self, base: Path, parallel: int = 1) -> None:
        self.work, self.log = base / "work", base / "log"
        self.words = [*WORDS, "--parallel", str(parallel)]
        self.parallel = parallel
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.log.unlink(missing_ok=True)

    def start(self, *more: str) -> subprocess.Popen[str]:
        return start_command(self.work, *self.words, *more)

    def run(self, *more: str) -> Run:
        with self.start(*more) as process:
            out, err = process.communicate()
        return Run(process.returncode, out, err)

    def finish(self) -> list[str]:
        """Run it to its end, once more if it had its output: the kill may have come just then."""
        run = self.run("--force")
        return harm_of(run, codes=(0,))

    @property
    def done(self) -> bool:
        return (self.work / "best.safetensors").exists()

    def output(self) -> bytes:
        return (self.work / "best.safetensors").read_bytes()

    def journal(self) -> list[dict[str, object]]:
        path = self.work / "best.tune.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines[1:]]

    def started(self) -> list[str]:
        """The target of each command that was started."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split()[0] for line in lines]

    def harm(self, stops: int, whole: bytes | None) -> list[str]:
        """What was lost, done twice or left behind after so many stops."""
        losses = []
        measured = Counter(str(each["target"]) for each in self.journal() if each["metric"])
        started = Counter(self.started())
        if measured.total() != EVALUATIONS:
            losses.append(f"{measured.total()} evaluations")
        if measured - started:
            losses.append(f"in the journal, but never run: {measured - started}")
        if (started - measured).total() > stops * self.parallel:
            losses.append(f"done again: {started - measured}, after {stops} stops")
        left = sorted({path.name for path in self.work.iterdir()})
        if left != ["best.safetensors", "best.tune.jsonl"]:
            losses.append(f"left: {left}")
        if whole is not None and self.output() != whole:
            losses.append("another best than without a stop")
        return losses


def _killed(search: _Search, rng: random.Random, seconds: float) -> list[str]:
    before = search.journal()
    with search.start() as process:
        time.sleep(rng.uniform(0, seconds))
        process.kill()
    _wait_for_orphans(search)
    return [] if search.journal()[: len(before)] == before else ["an evaluation was lost"]


def _interrupted(search: _Search, rng: random.Random, seconds: float) -> list[str]:
    number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    before = search.journal()
    with search.start() as process:
        # Before posthoc itself runs the signals are Python's.
        time.sleep(rng.uniform(0.4 * seconds, seconds))
        process.send_signal(number)
        begin = time.monotonic()
        _, err = process.communicate()
    losses = []
    if process.returncode not in (0, 128 + number) and not search.done:
        losses.append(f"exit code {process.returncode} after {number.name}: {err[-300:]!r}")
    if (took := time.monotonic() - begin) > MOST_SECONDS:
        losses.append(f"{took:.1f} s to the end")
    if search.journal()[: len(before)] != before:
        losses.append("an evaluation was lost")
    left = {path.name for path in search.work.iterdir()}
    if left - {"best.safetensors", "best.tune.jsonl"}:
        losses.append(f"left: {sorted(left)}")
    if living := _living(search):
        losses.append(f"commands that still run: {living}")
    return losses


def _living(search: _Search) -> list[int]:
    lines = search.log.read_text().splitlines() if search.log.exists() else []
    found = []
    for pid in (int(line.split()[1]) for line in lines):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and b"../log" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def _wait_for_orphans(search: _Search) -> None:
    """What a killed search had started ends by itself: these commands are short."""
    for _ in range(500):
        if not _living(search):
            return
        time.sleep(0.01)


def _short_of_disk(base: Path, rng: random.Random, tally: Tally) -> list[str]:
    """A disk with room for some of the networks, or for none; then for all."""
    search = _Search(base)
    place = str(search.work)
    size = int(rng.uniform(0.1, 5) * 1e6)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place]
    try:
        subprocess.run(mount, check=True, stderr=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, OSError):
        tally.skip("full disks", "a tmpfs can't be mounted: needs root")
        return []
    try:
        run = search.run()
        losses = harm_of(run, codes=(0, 1))
        if run.code:
            kept = search.journal()
            subprocess.run(["mount", "-o", "remount,size=50000000", place], check=True)
            losses += search.finish()
            if search.journal()[: len(kept)] != kept:
                losses.append("an evaluation was lost")
        return [f"{size:,} bytes: {each}" for each in losses + search.harm(run.code, None)]
    finally:
        subprocess.run(["umount", place], check=True)
