"""Several runs at once that want the same output."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from tests.command import Run
from tests.soak.fuzz import harm_of
from tests.soak.scenes import Scene, scenes
from tests.soak.tally import Tally

ROUNDS = 30


def races(seed: int, tally: Tally, rounds: int = ROUNDS, megabytes: float = 4) -> None:
    """Two or three runs of each command, started within a moment of each other."""
    rng = random.Random(f"races/{seed}")
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        for scene in scenes(Path(scratch), megabytes, seed):
            for number in range(rounds):
                tally.count(f"races of {scene.name}", _race(scene, rng, 2 + number % 2))


def _race(scene: Scene, rng: random.Random, runners: int) -> list[str]:
    """One wins whole; the others say that it exists already. With --force, all may win."""
    scene.reset()
    processes = []
    for _ in range(runners):
        processes.append(scene.start())
        time.sleep(rng.choice((0, rng.uniform(0, 0.7 * scene.seconds))))
    runs = []
    for process in processes:
        out, err = process.communicate()
        runs.append(Run(process.returncode, out, err))
    losses = [loss for run in runs for loss in harm_of(run, codes=(0, 2))]
    won = sum(run.code == 0 for run in runs)
    replaces = "--force" in scene.arguments or scene.several
    if won == 0 or (won > 1 and not replaces):
        losses.append(f"{won} won: {runs}")
    losses += [
        f"lost with {run}" for run in runs if run.code != 0 and "exists already" not in run.err
    ]
    if scene.files() != scene.new:
        found = {name: len(content) for name, content in scene.files().items()}
        losses.append(f"then there is {found}; {[run.code for run in runs]}")
    return losses + [f"left {name}" for name in scene.left_behind()]
