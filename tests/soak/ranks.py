"""Ranks that share one call: each is killed in turn, and five give what one does."""

from __future__ import annotations

import random
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.ranked import RankRun, group, run_groups
from tests.soak.scenes import TEMPORARY, make_snapshots
from tests.soak.tally import Tally

SIZE = 5
MOMENTS = 20
AT_ONCE = 4
MOST_SECONDS = 30.0

CODES = {signal.SIGKILL: 1, signal.SIGINT: 130, signal.SIGTERM: 143}

WORDS = ["synthesize", "snapshots", "--sigma-rel", "0.07", "-q", "-o"]
SEVERAL = ["synthesize", "snapshots", "--gamma", "5,9", "--max-shard-size", "5MB", "-q", "-o"]


def ranks(seed: int, tally: Tally, moments: int = MOMENTS) -> None:
    """SIGKILL to each of five ranks, and SIGINT or SIGTERM to all and to one, at `moments` random
    moments from when they begin to meet at rank 0, or have met at a launcher."""
    rng = random.Random(f"ranks/{seed}")
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        folder = Path(scratch)
        make_snapshots(folder / "snapshots", megabytes=16, seed=seed)
        wanted, seconds = _whole(folder, tally)
        slowest = 0.0
        kinds = [*((rank, signal.SIGKILL) for rank in range(SIZE)), (-1, None), (None, None)]
        rounds = [
            (
                at * len(kinds) + kind,
                at % SIZE if rank is None else rank,
                sent or (signal.SIGINT, signal.SIGTERM)[at % 2],
            )
            for at in range(moments)
            for kind, (rank, sent) in enumerate(kinds)
        ]
        for first in range(0, len(rounds), AT_ONCE):
            batch = rounds[first : first + AT_ONCE]
            groups = [
                group(
                    *(SIZE, [[*WORDS, f"k{at}/x.safetensors"]], f"k{at}"),
                    dies=rank,
                    after=rng.uniform(0, seconds),
                    hosted=rng.random() < 0.5,
                    sent=sent,
                )
                for at, rank, sent in batch
            ]
            ended = run_groups(folder, *groups)
            found = [
                _losses(
                    folder / f"k{at}",
                    [run for own, run in enumerate(runs) if own != rank or sent != signal.SIGKILL],
                    wanted,
                    CODES[sent],
                )
                for (at, rank, sent), (runs,) in zip(batch, ended, strict=True)
            ]
            slowest = max(slowest, *(run.seconds for (runs,) in ended for run in runs))
            again = _again(folder, [f"k{at}" for at, _, _ in batch], wanted)
            for (_, rank, sent), losses, more in zip(batch, found, again, strict=True):
                kind = "kills of a rank" if sent == signal.SIGKILL else "signals to all"
                if kind == "signals to all" and rank >= 0:
                    kind = "signals to one"
                tally.count(kind, losses + more)
        tally.figures.append(f"all had ended after {slowest:.1f} s")


def _whole(folder: Path, tally: Tally) -> tuple[bytes, float]:
    """What the command gives, and how long five ranks take; they are to give the same."""
    outputs = {"one/x.safetensors": WORDS, "one/several/": SEVERAL}
    alone = group(1, [[*words, name] for name, words in outputs.items()], "one")
    five = group(
        SIZE, [[*words, name.replace("one", "five")] for name, words in outputs.items()], "five"
    )
    _, runs = run_groups(folder, alone, five)
    files = [
        {
            path.relative_to(folder / into).as_posix(): path.read_bytes()
            for path in (folder / into).rglob("*.safetensors*")
        }
        for into in ("one", "five")
    ]
    losses = [] if files[0] == files[1] and len(files[0]) > 3 else [f"{sorted(files[1])}, {runs}"]
    tally.count("calls of five ranks", losses, len(outputs))
    return files[0]["x.safetensors"], max(run.seconds for run in runs[0])


def _losses(into: Path, left: list[RankRun], wanted: bytes, code: int) -> list[str]:
    losses = []
    output = into / "x.safetensors"
    codes = {run.code for run in left}
    if output.exists() and output.read_bytes() != wanted:
        losses.append("something else was left")
    if codes == {0} and not output.exists():
        losses.append("done, but not written")
    if code > 1 and list(into.glob(f".*{TEMPORARY}")):
        losses.append("a temporary file was left")
    told = [line for run in left for line in run.err.splitlines()]
    if len(codes) != 1 or not codes <= {0, code} or len(told) != (codes in ({1}, {130})):
        losses.append(f"{[(run.code, run.err) for run in left]}")
    if any(run.seconds > MOST_SECONDS for run in left):
        losses.append(f"they ended after {max(run.seconds for run in left):.1f} s")
    return losses


def _again(folder: Path, names: Sequence[str], wanted: bytes) -> list[list[str]]:
    """What is wrong after another call in each of these folders."""
    groups = []
    for name in names:
        output = f"{name}/x.safetensors"
        words = [*WORDS, output, *(["--force"] if (folder / output).exists() else [])]
        groups.append(group(1, [words], f"{name}-again"))
    found = []
    for name, ((run,),) in zip(names, run_groups(folder, *groups), strict=True):
        output = folder / name / "x.safetensors"
        losses = [] if run.code == 0 else [f"another call ended in {run.err!r}"]
        if not output.exists() or output.read_bytes() != wanted:
            losses.append("another call gave something else")
        losses += [f"left {path.name}" for path in output.parent.glob(f".*{TEMPORARY}")]
        found.append(losses)
    return found
