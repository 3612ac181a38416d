"""Tables of files that fit their terminal: what is the same for all goes below, names get short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from posthoc_cli.cli.console import plain_table, print_table

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Column:
    heading: str
    cells: list[str]
    right: bool = True

    @property
    def width(self) -> int:
        return max(map(len, (self.heading, *self.cells)))


class Columns:
    """The columns of a table `width` wide, of which the first has the files' names."""

    def __init__(self, columns: Sequence[Column], width: int) -> None:
        self.width = width
        self.columns = list(columns)

    @property
    def too_wide(self) -> bool:
        return self.room < self.columns[0].width

    @property
    def room(self) -> int:
        """What the other columns leave for the names."""
        return self.width - sum(column.width + 2 for column in self.columns[1:])

    def leave_out(self, heading: str) -> None:
        self.columns = [column for column in self.columns if column.heading != heading]

    def leave_out_common(self, phrases: Mapping[str, str]) -> dict[str, str]:
        """Leave out columns that are the same for all, as far as need be; what they say, by
        heading, in the words of `phrases`."""
        common = {}
        cells = {column.heading: column.cells for column in self.columns}
        for heading, phrase in phrases.items():
            if self.too_wide and len(set(cells[heading])) == 1:
                self.leave_out(heading)
                common[heading] = phrase.format(cells[heading][0])
        return common

    def set_cells(self, heading: str, cells: list[str]) -> None:
        self.columns = [
            replace(column, cells=cells) if column.heading == heading else column
            for column in self.columns
        ]

    def draw(self, console: Console, common: Sequence[str]) -> None:
        """Draw the table, and below it what is `common` to all."""
        from rich.text import Text

        table = plain_table()
        for column in self.columns:
            table.add_column(
                column.heading, justify="right" if column.right else "left", no_wrap=True
            )
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            table.add_row(*(Text(cell) for cell in cells))
        print_table(console, table)
        console.print()
        if common:
            console.print("each: " + ", ".join(common), soft_wrap=True)


def shortened(names: Sequence[str], room: int) -> list[str]:
    """Names of at most `room` characters: of longer ones the middle is cut out."""
    return [
        name if len(name) <= room else name[: room // 3] + "…" + name[room // 3 + 1 - room :]
        for name in names
    ]
