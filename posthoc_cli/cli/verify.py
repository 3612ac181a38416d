"""`posthoc verify`: whether an output is what its recipe says, and its snapshots what they were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import counted, describe_warnings, print_json, progress_bar
from posthoc_cli.cli.lora import load_numpy
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.errors import SnapshotError, printable

if TYPE_CHECKING:
    from posthoc_cli.synthesis.comparison import Problem
    from posthoc_cli.synthesis.verification import Report


def verify(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A file or folder that synthesize wrote.", show_default=False
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="The folder of its snapshots; by default the one that OUT lies in.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Compare every value, not a sample of them.")
    ] = False,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Check an output: is it what its recipe says, and are the snapshots the same files?

    Follows the recipe again and compares: some values of every tensor, or with --full all of them.
    With anything else than it should be the exit code is 3.

    \b
    Examples:
      posthoc verify ema-0.07.safetensors snapshots
      posthoc verify ema-0.07.safetensors snapshots --full
    """
    load_numpy()
    from posthoc_cli.api import verify as verify_output
    from posthoc_cli.storage.places import place

    with progress_bar("verify", None, not quiet) as advance:
        report = verify_output(out, folder, full=full, progress=advance)
    output = str(report.output)
    if as_json:
        where = report.output.parent if folder is None else place(folder)
        print_json(_describe(output, str(where), full, report))
    elif not report.problems:
        _say(output, report)
    if report.problems:
        raise _complaint(report.problems)


def _describe(output: str, folder: str, full: bool, report: Report) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    return {
        "output": output,
        "folder": folder,
        "full": full,
        "ok": not report.problems,
        "sources": report.sources,
        "fingerprints": report.known,
        "tensors": report.tensors,
        "values": report.values,
        "compared": report.compared,
        "rounded": report.rounded,
        "warnings": describe_warnings(_warnings(report)),
        "problems": [
            {
                "file": problem.path.name
                if problem.path == report.output
                else _below(problem.path, folder),
                "tensor": problem.tensor,
                "element": None if problem.element is None else list(problem.element),
                "message": printable(spelled(f"{problem.problem}; {problem.remedy}")),
            }
            for problem in report.problems
        ],
    }


def _below(path: Path, folder: str) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _warnings(report: Report) -> list[tuple[str, str]]:
    """What keeps the answer from being a full one."""
    if report.known == report.sources:
        return []
    which = "some sources" if report.known else "the sources"
    return [(report.output.name, f"its recipe doesn't tell whether {which} are unchanged")]


def _say(output: str, report: Report) -> None:
    """That all is well, and how much was looked at."""
    print(
        f"{printable(output)}: {report.compared:,} of {counted(report.values, 'value')} "
        f"{'is' if report.compared == 1 else 'are'} as the recipe says"
    )
    if report.rounded:
        print(f"{report.rounded:,} of them not rounded to the nearest, but within the bounds")
    if report.known == report.sources:
        sources = "the source is" if report.sources == 1 else f"all {report.sources} sources are"
        more = "; --full compares every value" if report.compared < report.values else ""
        print(f"{sources} unchanged{more}")
    else:
        print(
            f"the recipe is an old one: nothing in it tells whether {report.sources} sources "
            "are unchanged"
        )


def _complaint(problems: list[Problem]) -> SnapshotError:
    first = problems[0]
    problem, remedy = first.problem, first.remedy
    if first.tensor is not None:
        index = f" {list(first.element)}" if first.element else ""
        problem = f"tensor '{first.tensor}'{index} {problem}"
    if more := len(problems) - 1:
        remedy += f" ({counted(more, 'more problem')}: --json lists them)"
    return SnapshotError(str(first.path), problem, remedy)
