"""Several runs at once that want the same output."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from tests.command import Run
from tests.soak.fuzz import harm_of
from tests.soak.scenes import Scene, make_snapshots, scenes
from tests.soak.tally import Tally

ROUNDS = 30


def races(seed: int, tally: Tally, rounds: int = ROUNDS, megabytes: float = 4) -> None:
    """Two or three runs of each command, started within a moment of each other."""
    rng = random.Random(f"races/{seed}")
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        for scene in scenes(Path(scratch), megabytes, seed):
            for number in range(rounds):
                tally.count(f"races of {scene.name}", _race(scene, rng, 2 + number % 2))
        replacing(rng, tally, Path(scratch) / "replacing", rounds, megabytes)


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


def replacing(
    rng: random.Random, tally: Tally, base: Path, rounds: int = ROUNDS, megabytes: float = 4
) -> None:
    """Two runs that replace one output by --force, with other sums and in other numbers of shards:
    what stands then is wholly that of one of them."""
    make_snapshots(base / "snapshots", 4, megabytes)
    kinds = [
        ["--sigma-rel", width, *(["--max-shard-size", f"{megabytes / n:g}MB"] if n else [])]
        for width, n in (("0.06", 3), ("0.07", 3), ("0.08", 6), ("0.09", 0))
    ]
    words = ["synthesize", "../snapshots", "-o", "written/x.safetensors", "--force"]
    (base / "race").mkdir()
    wanted = []
    for kind in kinds:
        scene = Scene("", base / "race", [*words, *kind])
        scene.reset()
        assert scene.run().code == 0
        wanted.append(scene.files())
    for _ in range(rounds):
        first, second = rng.sample(range(len(kinds)), 2)
        both = [Scene("", base / "race", [*words, *kinds[at]]) for at in (first, second)]
        both[0].reset(wanted[rng.randrange(len(kinds))])
        processes = [scene.start() for scene in both]
        codes = []
        losses = []
        for process in processes:
            _, err = process.communicate()
            codes.append(process.returncode)
            if process.returncode and "another run is writing it" not in err:
                losses.append(err)
        found = both[0].files()
        if found not in [
            wanted[at] for at, code in zip((first, second), codes, strict=True) if code == 0
        ]:
            losses.append(f"{kinds[first]} and {kinds[second]}: {codes}, {sorted(found)}")
        tally.count("two that replace", losses + [f"left {x}" for x in both[0].left_behind()])
