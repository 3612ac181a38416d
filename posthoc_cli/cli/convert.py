"""`posthoc convert`: make snapshots of other tools' checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    by_text,
    counted,
    describe_warnings,
    print_json,
    progress_bar,
    stdout_console,
    warn,
)
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.cli.tables import Column, Columns, shortened
from posthoc_cli.errors import MachineError, SnapshotError, in_bytes, printable

if TYPE_CHECKING:
    from rich.console import Console

    from posthoc_cli.snapshots import Identity
    from posthoc_cli.synthesis.conversion_jobs import Converted, Job, Options


@options.with_options
def convert(
    reading: options.Reading,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            show_default=False,
            help="The folder of checkpoints, or its URL, or one of them.",
        ),
    ],
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            show_default=False,
            help="Where to write the snapshots; it is made if need be.",
        ),
    ],
    dtype: options.DtypeOption = "same",
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Make snapshots of other tools' checkpoints in SOURCE: one safetensors file of each.

    Pickles are read as data: nothing in them is ever run. A snapshot appears whole or not at all,
    and what is done already is skipped, so that a run can be interrupted. A checkpoint that can't
    be used is named, the others are converted, and the exit code is 3.

    \b
    Examples:
      posthoc convert ema-run converted --profiles 0.05,0.10 --update-every 10
      posthoc convert run from-torch --key ema --pattern 'net_{step}_{sigma_rel}.pt'
      posthoc convert ema_12000_6.94.pt . --dtype float16
    """
    given = options.told_by(reading)
    options.check_choice("--dtype", dtype, options.dtypes())

    from posthoc_cli.snapshots.telling import tell
    from posthoc_cli.storage.places import place
    from posthoc_cli.synthesis.conversion import explain
    from posthoc_cli.synthesis.conversion_jobs import Options, find_jobs

    told = tell(reading.pattern, given.get("profiles"), reading.raw, reading.ema_decay)
    chosen = Options(
        reading.tool,
        dtype,
        reading.update_every,
        told.profiles,
        told.pattern,
        reading.key,
        reading.raw,
        reading.ema_decay,
        reading.run,
        reading.skip_incomplete,
    )
    left_out: list[tuple[str, str]] = []
    jobs = find_jobs(
        place(source),
        place(folder),
        chosen,
        only=reading.only or (),
        exclude=reading.exclude or (),
        overwrite=force,
        left_out=left_out,
    )
    outcome = _work(jobs, chosen, force, left_out, progress=not quiet)
    texts = [(one.job.name, text) for one in outcome.converted for text in one.warnings]
    explained = explain(outcome.converted, chosen)
    warn([*explained, *_left_out(left_out), *_grouped(texts)], quiet)
    if as_json:
        warnings = describe_warnings([*(("", text) for text in explained), *texts])
        print_json(_describe(source, folder, outcome) | {"warnings": warnings})
    elif not outcome.converted and len(outcome.problems) == 1:
        raise outcome.problems[0][1]
    elif outcome.converted or outcome.problems:
        _draw(stdout_console(), outcome)
    if outcome.problems:
        failed = any(isinstance(error, MachineError) for _, error in outcome.problems)
        raise (MachineError if failed else SnapshotError)(
            source,
            counted(len(outcome.problems), "problem") + " found",
            "the list of problems says what to do about each",
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of the jobs, in their order; problems, and files left out, by their names."""

    converted: list[Converted]
    problems: list[tuple[str, SnapshotError | MachineError]]
    left_out: list[tuple[str, str]]


def _work(
    jobs: Sequence[Job],
    chosen: Options,
    force: bool,
    left_out: list[tuple[str, str]],
    *,
    progress: bool,
) -> _Outcome:
    from posthoc_cli.synthesis.conversion import convert as convert_one

    outcome = _Outcome([job.done for job in jobs if job.done], [], left_out)
    todo = [job for job in jobs if job.done is None]
    total = sum(job.bytes for job in todo)
    with progress_bar(counted(len(todo), "checkpoint"), total, progress and bool(todo)) as advance:
        for job in todo:
            left = job.bytes

            def count(taken: int) -> None:
                nonlocal left
                taken = min(taken, left)  # tensors that share their bytes take them more than once
                left -= taken
                if advance:
                    advance(taken)

            try:
                outcome.converted.append(convert_one(job, chosen, overwrite=force, progress=count))
            except SnapshotError as error:
                outcome.problems.append((job.name, error))
            except MachineError as error:
                own = {str(file.path) for file in job.files}
                # the disk that is written to fails for all
                if error is not job.error and error.subject not in own:
                    raise
                outcome.problems.append((job.name, error))
            count(left)
    outcome.converted.sort(key=lambda one: one.job.name)
    return outcome


def _describe(source: str, folder: str, outcome: _Outcome) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    return {
        "source": source,
        "folder": folder,
        "converted": [
            {
                "file": one.job.name,
                "output": str(one.job.output),
                "from": one.job.tool,
                "step": one.job.step,
                "sigma_rel": one.job.identity.sigma_rel or None if one.job.identity else None,
                "gamma": one.job.identity.gamma if one.job.identity else None,
                "dtypes": dict(one.dtypes),
                "tensors": one.tensors,
                "parameters": one.parameters,
                "bytes": one.bytes,
                "seconds": one.seconds or 0.0,
                "skipped": one.seconds is None,
                "warnings": [printable(spelled(text)) for text in one.warnings],
            }
            for one in outcome.converted
        ],
        "problems": [
            {"file": name, "message": printable(spelled(f"{error.problem}; {error.remedy}"))}
            for name, error in outcome.problems
        ],
        "skipped": [
            {"file": name, "reason": printable(spelled(reason))}
            for name, reason in outcome.left_out
        ],
    }


def _quoted(name: str) -> str:
    """A file's name, in quotes where it could be taken for an argument: `epoch=0-step=500.ckpt`."""
    return f"'{name}'" if "=" in name else name


def _left_out(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """One line that names what was left out; many files of one kind are counted."""
    parts = []
    for reason, names in by_text(left_out).items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        parts.append(f"{', '.join(map(_quoted, names[:2]))}{more} ({reason})")
    return [f"left out: {'; '.join(parts)}"] if parts else []


def _grouped(entries: Sequence[tuple[str, str]]) -> list[str]:
    """`file: message` lines: what is the same of several files is said once."""
    lines = []
    for text, names in by_text(entries).items():
        more = f" and {counted(len(names) - 1, 'more file')}" if names[1:] else ""
        lines.append(f"{_quoted(names[0])}{more}: {text}")
    return lines


# The table


def _draw(console: Console, outcome: _Outcome) -> None:
    if outcome.converted:
        _draw_converted(console, outcome.converted)
    if outcome.problems:
        console.print("\nProblems" if outcome.converted else "Problems", style="bold")
        entries = [(name, f"{error.problem}; {error.remedy}") for name, error in outcome.problems]
        for line in _grouped(entries):
            console.print(f"  {printable(spelled(line))}", style="red", soft_wrap=True)
    if outcome.left_out:
        console.print("\nLeft out", style="bold")
        for line in _grouped(outcome.left_out):
            console.print(f"  {printable(spelled(line))}", soft_wrap=True)


def _draw_converted(console: Console, converted: Sequence[Converted]) -> None:
    widths = [_width(one.job.identity) for one in converted]
    gammas = [one.job.identity.gamma if one.job.identity else math.nan for one in converted]
    power = all(each[0] in "-0" for each in widths)
    columns = [
        Column("file", [printable(one.job.in_short) for one in converted], right=False),
        Column("from", [one.job.tool for one in converted], right=False),
        Column("step", ["-" if one.job.step is None else str(one.job.step) for one in converted]),
        Column("sigma_rel" if power else "profile", widths),
        Column("gamma", [f"{each:.2f}" if math.isfinite(each) else "-" for each in gammas]),
        Column("dtype", [_dtypes_in_short(one) for one in converted], right=False),
        Column("tensors", [f"{one.tensors:,}" for one in converted]),
        Column("size", [in_bytes(one.bytes) for one in converted]),
        Column("time", [_time(one) for one in converted]),
    ]
    table = Columns(columns, console.width)
    common = table.leave_out_common(
        {"from": "from {}", "tensors": "{} tensors", "dtype": "{}", "size": "{}"}
    )
    for heading in ("tensors", "dtype", "from", "size", "gamma"):
        if table.too_wide and table.room < 24:
            table.leave_out(heading)
    if table.too_wide:
        table.set_cells("file", shortened(columns[0].cells, max(table.room, 12)))
    table.draw(console, list(common.values()))
    made = [one for one in converted if one.seconds is not None]
    there = len(converted) - len(made)
    parts = []
    if made:
        size = in_bytes(sum(one.bytes for one in made))
        seconds = sum(one.seconds or 0.0 for one in made)
        parts.append(f"{counted(len(made), 'snapshot')}, {size}, written in {seconds:.1f} s")
    if there:
        parts.append(f"{there} done already")
    folder = printable(str(converted[0].job.output.parent))
    console.print(f"{folder}: {'; '.join(parts)}", style="bold", soft_wrap=True)


def _dtypes_in_short(one: Converted) -> str:
    """Such as `F16+F32`; of more than three, the most frequent and how many others."""
    if len(one.dtypes) <= 3:
        return "+".join(one.dtypes)
    most = max(one.dtypes, key=lambda dtype: one.dtypes[dtype])
    return f"{most}+{len(one.dtypes) - 1} more"


def _width(identity: Identity | None) -> str:
    if identity is None:
        return "-"
    return f"{identity.sigma_rel:.4f}" if identity.sigma_rel > 0 else str(identity.profile)


def _time(one: Converted) -> str:
    return "done" if one.seconds is None else f"{one.seconds:.1f} s"
