"""Commands that are killed, interrupted and terminated at random moments."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tests.soak.scenes import Scene, scenes
from tests.soak.tally import Tally

ROUNDS = 100

MOST_SECONDS = 1.0
"""From a signal to the end; on a machine so busy that a whole run takes longer, half of that."""


def kill(
    seed: int, tally: Tally, rounds: int = ROUNDS, megabytes: float = 16, most: int = 8
) -> None:
    """`kill -9` at `rounds` random moments of each of the first `most` commands."""
    rng = random.Random(f"kill/{seed}")
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        for scene in islice(scenes(Path(scratch), megabytes, seed), most):
            for number in range(rounds):
                losses = _kill(scene, rng, early=number % 2 == 0, again=number % 4 < 2)
                tally.count(f"kills of {scene.name}", losses)


def _kill(scene: Scene, rng: random.Random, *, early: bool, again: bool) -> list[str]:
    """One round: half of the kills come while there is something to be written."""
    scene.reset()
    with scene.start() as process:
        if early:
            time.sleep(rng.uniform(0, scene.seconds))
        else:
            _wait_for_writing(scene, process)
            time.sleep(rng.uniform(0, 1.2 * scene.writing))
        process.kill()
    losses = scene.harm()
    if again:
        losses += scene.harm_of_another_run()
    return losses


def _wait_for_writing(scene: Scene, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not scene.left_behind():
        time.sleep(0.0005)


def interrupt(
    seed: int, tally: Tally, rounds: int = ROUNDS, megabytes: float = 8, most: int = 8
) -> None:
    """SIGINT, SIGTERM and SIGHUP in turn, at `rounds` random moments of each command.

    They come once posthoc runs: before, while Python itself starts, they are Python's.
    """
    rng = random.Random(f"interrupt/{seed}")
    slowest, running = 0.0, 0
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with none_ignored(), tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        for scene in islice(scenes(Path(scratch), megabytes, seed), most):
            for number in range(rounds):
                losses, seconds = _interrupt(scene, rng, numbers[number % 3], number % 2 == 0)
                tally.count(f"signals to {scene.name}", losses)
                running += seconds is not None
                slowest = max(slowest, seconds or 0.0)
    if running < tally.total / 2:
        tally.count("signals that came too late", times=tally.total - running, losses=["most"])
    tally.figures += [f"{running} came before the end", f"ended within {slowest:.2f} s"]


@contextlib.contextmanager
def none_ignored() -> Iterator[None]:
    """What is started now shall heed signals, also below nohup or in a shell's background."""
    before = {
        number: signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_IGN
    }
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(
    scene: Scene, rng: random.Random, number: signal.Signals, early: bool
) -> tuple[list[str], float | None]:
    """One round: what was lost, and seconds from signal to end; None if that came first."""
    scene.reset()
    with scene.start() as process:
        while process.poll() is None and not _handles_signals(process.pid):
            time.sleep(0.0005)
        if early:
            time.sleep(rng.uniform(0, scene.seconds))
        else:
            _wait_for_writing(scene, process)
            time.sleep(rng.uniform(0, scene.writing))
        done = process.poll() is not None
        begin = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate()
        seconds = time.monotonic() - begin
    losses = scene.harm() + [f"left {name}" for name in scene.left_behind()]
    expected = 130 if number == signal.SIGINT else 128 + number
    if process.returncode == 0:
        if scene.files() != scene.new:
            losses.append("done, but not written")
    elif process.returncode == -number:  # Python was leaving: its handlers were gone
        if scene.files() != scene.new:
            losses.append(f"{number.name} ended it, and nothing was written")
    elif done or process.returncode != expected:
        losses.append(f"{number.name} ended in {process.returncode}: {err!r}")
    elif expected == 130 and not err.endswith("posthoc: interrupted\n"):
        losses.append(f"{number.name} said {err!r}")
    if "Traceback" in err or "Exception ignored" in err:
        losses.append(f"{number.name} said {err!r}")
    if seconds > max(MOST_SECONDS, scene.seconds / 2):
        losses.append(f"{number.name} took {seconds:.1f} s")
    return losses, None if done else seconds


def _handles_signals(pid: int) -> bool:
    """Whether the process has handlers for what it is sent: by /proc, where there is one."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return True
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1)
