"""What reaches the terminal: results on stdout, all else on stderr; rich only when drawing."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from posthoc_cli.cli.spelling import spelled
from posthoc_cli.errors import in_units, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_WARNINGS = 5

PIPED_WIDTH = 10_000
"""Columns of a table that isn't for a terminal: no line is ever broken."""


def stdout_console() -> Console:
    """A console on stdout: colour on a terminal only, and never with NO_COLOR."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def plain_table(left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """A table without borders: columns two spaces apart, headings above.

    Those headed `left` are for words, then those headed `right` for numbers; no line is broken.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_table(console: Console, table: Table) -> None:
    """Print `table` without the spaces that rich leaves at the ends of lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_json(document: Any) -> None:
    """Print `document` as JSON: numbers with all their digits, null for what is not a number."""
    print(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def note(message: str, quiet: bool, files: str = "") -> None:
    """Say on stderr what happened, to these files, unless the user wants to hear of errors only."""
    if not quiet:
        about = f"{files}: " if files else ""  # a name is as it is: step=100.ckpt is no argument
        print(f"posthoc: {printable(about + spelled(message))}", file=sys.stderr)


def warn(messages: Sequence[str], quiet: bool) -> None:
    """Say the first few on stderr: what is wrong with one file is often wrong with 600."""
    for message in messages[:MAX_WARNINGS]:
        note(f"warning: {message}", quiet)
    if (more := len(messages) - MAX_WARNINGS) > 0:
        note(f"warning: {counted(more, 'more warning')} such as these", quiet)


def warning_lines(warnings: Sequence[tuple[str, str]]) -> list[str]:
    """Warnings as lines: `file: what is odd`."""
    return [f"{file}: {text}" if file else text for file, text in warnings]


def describe_warnings(warnings: Sequence[tuple[str, str]]) -> list[dict[str, str | None]]:
    """Warnings as JSON has them; one that is about no single file has null in its place."""
    return [
        {"file": printable(file) or None, "message": printable(spelled(text))}
        for file, text in warnings
    ]


def in_short(count: float) -> str:
    """A large number for people: `268.4M`."""
    return in_units(count, ("", "k", "M", "G", "T", "P"))


def by_text(entries: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The files of (file, text) pairs by what is said of them."""
    files: dict[str, list[str]] = {}
    for file, text in entries:
        files.setdefault(text, []).append(file)
    return files


def counted(count: int, noun: str) -> str:
    """`1 snapshot`, `16 snapshots`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextlib.contextmanager
def progress_bar(
    label: str, total: int | None, wanted: bool
) -> Iterator[Callable[..., None] | None]:
    """A bar on stderr of `total` bytes to read, gone when done; nothing unless on a terminal.

    Gives what to call, from any thread, with the number of bytes just read, and with the total if
    that is only known then.
    """
    console = stderr_console() if wanted else None
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        expand=True,
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count, total=None: bar.update(task, advance=count, total=total)
