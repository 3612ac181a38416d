"""Trackers that start at once, are killed and resumed, and train in ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.soak.tally import Tally
from tests.training.processes import lost

ROUNDS = {"pairs": 60, "kills": 150, "ranks": 3, "sharded": 60}


def trackers(seed: int, tally: Tally, share: float = 1.0) -> None:
    """A `share` of the ROUNDS of each kind; the kills are of two trainings."""
    for what, rounds in ROUNDS.items():
        with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
            count = max(int(share * rounds), 1)
            losses = lost(what, Path(scratch), count, seed)
            tally.count(f"{what} of trackers", losses, count * (2 if what == "kills" else 1))
