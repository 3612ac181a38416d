"""What a section tried, and what was lost."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts of what was tried, by kind; a line for each thing lost; what could not be tried."""

    section: str
    tried: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def count(self, kind: str, losses: list[str] | None = None, times: int = 1) -> None:
        """Something of this `kind` was tried, and `losses` came of it."""
        self.tried[kind] += times
        for loss in losses or ():
            self.losses.append(f"{kind}: {loss}")
            print(f"  LOST {kind}: {loss}", file=sys.stderr, flush=True)

    def skip(self, kind: str, why: str) -> None:
        """Something could not be tried on this machine."""
        self.skipped.append(f"{kind} ({why})")

    @property
    def total(self) -> int:
        return self.tried.total()

    def __str__(self) -> str:
        """One line: `fuzz: 10,000 files, 40,000 runs: 0 lost; slowest 0.3 s (612 s)`."""
        tried = ", ".join(f"{count:,} {kind}" for kind, count in self.tried.items()) or "nothing"
        line = f"{self.section}: {tried}: {len(self.losses):,} lost"
        for label, texts in (("", self.figures), ("not tried: ", self.skipped)):
            if texts:
                line += f"; {label}{', '.join(texts)}"
        return f"{line} ({time.monotonic() - self.begin:.0f} s)"
