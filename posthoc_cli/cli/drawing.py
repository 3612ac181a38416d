"""Weights drawn for people: a line a snapshot, with a bar that grows to the side of its sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posthoc_cli.cli.console import plain_table, print_table
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.errors import AmbiguousError, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from posthoc_cli.solver import Average

NEGLIGIBLE, SMALL = 1e-6, 1e-3
"""Weights below this fraction of the largest are only summed up: the negligible always, the small
where more than LONG lines would be left."""

LONG = 40

_BAR_WIDTH = 36
_READINGS = 8
_PLUS, _MINUS = "cyan", "red"


@dataclass(frozen=True, slots=True)
class Row:
    """One snapshot with its weight."""

    file: str
    profile: Average
    weight: float


def draw_readings(console: Console, error: AmbiguousError) -> None:
    """Draw the steps of files whose names can be read in several ways, and the option for each."""
    from rich.text import Text

    readings = [f"reading {number}" for number in range(1, len(error.patterns) + 1)]
    table = plain_table(["file"], readings)
    for file, steps in error.rows[:_READINGS]:
        table.add_row(*(Text(text) for text in (printable(file), *map(str, steps))))
    console.print()
    print_table(console, table)
    if (more := len(error.rows) - _READINGS) > 0:
        console.print(f"and {more} more")
    for reading, pattern in zip(readings, error.patterns, strict=True):
        text = spelled(f"pattern='{pattern}'") if pattern else "no pattern can say it"
        console.print(f"{reading}: {printable(text)}", soft_wrap=True)


def draw_weights(console: Console, rows: Sequence[Row], *, everything: bool = False) -> None:
    """Draw `rows`, oldest first; unless `everything`, leave out what is negligible and say so."""
    from rich.text import Text

    largest = max((abs(row.weight) for row in rows), default=0.0)

    def those_above(fraction: float) -> list[Row]:
        return [row for row in rows if abs(row.weight) >= fraction * largest]

    fraction = 0.0 if everything else NEGLIGIBLE
    if not everything and len(those_above(fraction)) > LONG:
        fraction = SMALL
    shown = those_above(fraction)
    columns = {"step": [f"{row.profile.step:.15g}" for row in shown]}
    columns |= kind_columns([row.profile for row in rows], [row.profile for row in shown])
    columns["weight"] = [signed(row.weight) for row in shown]
    table = plain_table(right=list(columns))
    left = console.width - sum(
        max(len(text) for text in (heading, *texts)) + 2 for heading, texts in columns.items()
    )
    bar_width = min(left, _BAR_WIDTH)
    if bar_width >= 8:
        left -= bar_width + 2
        table.add_column("", no_wrap=True)
    else:
        bar_width = 0
    files = [printable(row.file) for row in shown]
    with_file = max(map(len, files), default=0) <= left
    if with_file:
        table.add_column("file", no_wrap=True)
    bars = Bars([row.weight for row in shown], bar_width, console.encoding)
    for at, row in enumerate(shown):
        cells = [Text(texts[at]) for texts in columns.values()]
        cells[-1].stylize(_PLUS if row.weight > 0 else _MINUS if row.weight < 0 else "dim")
        if bar_width:
            cells.append(bars.draw(row.weight))
        if with_file:
            cells.append(Text(files[at]))
        table.add_row(*cells)
    print_table(console, table)
    if hidden := len(rows) - len(shown):
        rest = sum(row.weight for row in rows) - sum(row.weight for row in shown)
        console.print(
            f"and {hidden} more below {'a millionth' if fraction == NEGLIGIBLE else 'a thousandth'}"
            f" of the largest, {signed(rest)} together (see --all)",
            style="dim",
        )


class Bars:
    """Bars on both sides of an axis, placed so that the longest of either side just fits."""

    def __init__(self, values: Sequence[float], width: int, encoding: str) -> None:
        lowest, highest = min([0.0, *values]), max([0.0, *values])
        span = highest - lowest
        # Beyond it are recipes that someone else made up: their bars are none.
        self.scale = (width - 1) / span if 1e-300 < span < 1e300 else 0.0
        self.left = round(-lowest * self.scale)
        self.right = width - 1 - self.left
        blocks = encoding.lower().startswith("utf")
        self.full, self.axis = ("█", "│") if blocks else ("#", "|")
        self.half_left, self.half_right = ("▐", "▌") if blocks else ("", "")

    def draw(self, value: float) -> Text:
        from rich.text import Text

        halves = round(abs(value) * self.scale * 2)
        minus = plus = ""
        if value < 0:
            minus = (self.half_left * (halves % 2) + self.full * (halves // 2))[-self.left or 99 :]
        else:
            plus = (self.full * (halves // 2) + self.half_right * (halves % 2))[: self.right]
        before, after = " " * (self.left - len(minus)), " " * (self.right - len(plus))
        return Text.assemble(before, (minus, _MINUS), (self.axis, "dim"), (plus, _PLUS), after)


def kind_columns(averages: Sequence[Average], shown: Sequence[Average]) -> dict[str, list[str]]:
    """What the averages `shown` are, by heading: `0.0500`, `raw`, `decay 0.9999`; and the gamma.

    Nothing where all `averages` are raw checkpoints, no gamma where none has one.
    """
    from posthoc_cli.snapshots import gamma_of
    from posthoc_cli.solver import Profile

    if all(each.raw for each in averages):
        return {}
    others = [each for each in averages if not (each.raw or isinstance(each, Profile))]
    columns = {
        "profile" if others else "sigma_rel": [
            f"{each.sigma_rel:.4f}" if isinstance(each, Profile) else str(each) for each in shown
        ]
    }
    if any(isinstance(each, Profile) for each in averages):
        gammas = [gamma_of(each) for each in shown]
        columns["gamma"] = [f"{gamma:.2f}" if math.isfinite(gamma) else "" for gamma in gammas]
    if any(each.stairs for each in averages):
        columns["every"] = [str(each.stairs[1]) if each.stairs else "" for each in shown]
    return columns


def signed(weight: float) -> str:
    """A weight with its sign, decimals in line with those of the others: `+0.599153`."""
    if weight == 0 or abs(weight) >= 5e-7:
        return f"{weight:+.6f}"
    return f"{weight:+.1e}"
