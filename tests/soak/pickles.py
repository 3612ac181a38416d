"""Hostile checkpoints through convert: a corpus made by hand, and good ones with bytes changed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.command import Run
from tests.hostile_pickles import CORPUS, GOOD, SENTINEL
from tests.soak.fuzz import MOST_BYTES, harm_of, refusals, run_here
from tests.soak.heavy import measured
from tests.soak.tally import Tally

CHANGED = 3_000
"""Good checkpoints of which a few bytes are changed."""

MOST_SECONDS = 2.0

_LARGE = 1_000_000
"""Bytes of a checkpoint from which on it gets a process of its own, whose memory is looked at."""

_ENDINGS = (".pt", ".pkl", ".ckpt")


def pickles(seed: int, tally: Tally, changed: int = CHANGED) -> None:
    """Each by itself through `convert FILE`: refused in one line, or converted; nothing is run."""
    rng = random.Random(f"pickles/{seed}")
    slowest, most = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch, _working_in(scratch):
        base = Path(scratch)
        for number, (kind, make) in enumerate(CORPUS.items()):
            losses, seconds, held = _converted(base, make(), _ENDINGS[number % 3], codes=(3,))
            tally.count("hostile pickles", [f"{kind}: {loss}" for loss in losses])
            slowest, most = max(slowest, seconds), max(most, held)
        good = {**GOOD, **dict(_of_torch())}
        for number in range(changed):
            kind = list(good)[number % len(good)]
            content = _spoilt(rng, good[kind])
            losses, seconds, _ = _converted(base, content, rng.choice(_ENDINGS), codes=(0, 3))
            tally.count("changed checkpoints", [f"{number}, {kind}: {loss}" for loss in losses])
            slowest = max(slowest, seconds)
    tally.figures += [f"slowest {slowest:.2f} s", f"at most {most / 1e6:.0f} MB"]


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """Whatever is run by a pickle leaves its mark in the working folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _of_torch() -> Iterator[tuple[str, bytes]]:
    """What torch itself writes of a small network, in both of its formats."""
    import torch

    network = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)}
    for kind, new in (("archive of torch", True), ("legacy file of torch", False)):
        stream = io.BytesIO()
        whole = {"ema": network, "step": 7, "lr": 0.1, "note": ["a", None, (1, 2)]}
        torch.save(whole, stream, _use_new_zipfile_serialization=new)
        yield kind, stream.getvalue()


def _spoilt(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, bytes replaced, pieces moved, doubled or cut out."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at, length = rng.randrange(len(changed)), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(min(length, len(changed) - at))
        elif kind == 2:
            changed[at : at + length] = rng.choice((b"\xff", b"\0", b"\x7f")) * length
        elif kind == 3:
            piece = changed[at : at + length]
            to = rng.randrange(len(changed))
            changed[to:to] = piece
        elif len(changed) > 2 * length:
            del changed[at : at + length]
    return bytes(changed)


def _converted(
    base: Path, content: bytes, ending: str, codes: tuple[int, ...]
) -> tuple[list[str], float, int]:
    """What was lost, the processor's seconds, and for a large one the most bytes held."""
    source, output = base / f"net_500_6.94{ending}", base / "out" / "net_500_6.94.safetensors"
    source.write_bytes(content)
    words = ["convert", source.name, "out", "--update-every", "1"]
    if len(content) >= _LARGE:
        done = measured(words, base)
        run, seconds, held = done.run, done.processor, done.bytes
    else:
        begin = time.process_time()
        run, held = run_here(words), 0
        seconds = time.process_time() - begin
    losses = harm_of(run, codes=codes) + _harm(base, source, output, run)
    if source.read_bytes() != content:
        losses.append("the checkpoint is no longer what it was")
    if seconds > MOST_SECONDS or held > MOST_BYTES:
        losses.append(f"took {seconds:.1f} s and {held / 1e6:.0f} MB")
    source.unlink()
    output.unlink(missing_ok=True)
    return losses, seconds, held


def _harm(base: Path, source: Path, output: Path, run: Run) -> list[str]:
    losses = []
    found = {path.name for path in (base, base / "out") if path.is_dir() for path in path.iterdir()}
    if SENTINEL in found:
        losses.append("it was run")
        (base / SENTINEL).unlink()
    if output.exists() != (run.code == 0):
        losses.append(f"exit code {run.code}, and {sorted(found)}")
    if extra := found - {SENTINEL, source.name, "out", output.name}:
        losses.append(f"left {sorted(extra)}")
    return losses + (refusals(output) if output.exists() else [])
