"""`posthoc pack`: store a folder of snapshots as differences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    counted,
    describe_warnings,
    plain_table,
    print_json,
    print_table,
    progress_bar,
    stdout_console,
    warn,
    warning_lines,
)
from posthoc_cli.errors import SnapshotError, in_bytes, percent, printable

if TYPE_CHECKING:
    from posthoc_cli.api import Run
    from posthoc_cli.synthesis.pack import Packed


def _dtypes() -> list[str]:
    return ["float16", "bfloat16", "float8_e4m3fn"]


@options.with_options
def pack(
    reading: options.Reading,
    folder: options.FolderArgument,
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            show_default=False,
            help="Where to write the packed snapshots; it is made if need be.",
        ),
    ],
    dtype: Annotated[
        str,
        options.in_panel(
            options.OUTPUT,
            "DTYPE",
            "Of the differences: float16, bfloat16 or float8_e4m3fn.",
            autocompletion=_dtypes,
        ),
    ] = "float16",
    keyframe_every: Annotated[
        int,
        options.in_panel(
            options.OUTPUT,
            "N",
            "Store each N-th snapshot of a profile whole. A lost file costs those up to the next.",
        ),
    ] = 16,
    verify: Annotated[
        bool, options.flag("--verify", "Read each file back and compare it.", options.OUTPUT)
    ] = False,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Store the snapshots in FOLDER as differences to each other: fewer bytes, or nearer values.

    Each is read once and written to OUT, where all commands read it like any other. What is there
    already is kept, so that a run can be interrupted. The expected errors, before and after, are
    those of the method blup.

    \b
    Examples:
      posthoc pack snapshots packed
      posthoc pack snapshots packed-in-8-bits --dtype float8_e4m3fn --verify
    """
    options.check_choice("--dtype", dtype, _dtypes())

    from posthoc_cli.api import open_snapshots
    from posthoc_cli.storage.places import place
    from posthoc_cli.synthesis.pack import pack as pack_all
    from posthoc_cli.synthesis.pack import plan_pack

    run = options.open_folder(folder, reading)
    warn(warning_lines(run.warnings), quiet)
    jobs = plan_pack(run.contents.usable(), place(output), keyframe_every=keyframe_every)
    total = (2 if verify else 1) * sum(job.snapshot.bytes for job in jobs)
    with progress_bar(counted(len(jobs), "snapshot"), total, not quiet) as advance:
        packed = pack_all(jobs, dtype, verify=verify, overwrite=force, progress=advance)
    made = open_snapshots([str(job.output) for job in jobs], raw=reading.raw)
    before, after = _errors(run), _errors(made)
    if as_json:
        print_json(_describe(run, output, dtype, packed, before, after))
        return
    _draw(run, output, packed, before, after, verify)


_Errors = list[tuple[float, float]] | None
"""Each target's sigma_rel and expected error."""


def _errors(run: Run) -> _Errors:
    """What is to be expected for a few targets: below, between and above the snapshots' widths."""
    widths = [snapshot.sigma_rel for snapshot in run.snapshots if snapshot.sigma_rel > 0]
    low, high = (min(widths), max(widths)) if widths else (0.05, 0.1)
    targets = sorted({0.6 * low, (low * high) ** 0.5, min(1.5 * high, 0.25)})
    targets = [float(f"{each:.2g}") for each in targets]
    try:
        solution = run.solve(sigma_rel=targets, method="blup")
    except SnapshotError:  # as of too few snapshots: what is stored is none the worse
        return None
    assert solution.expected_error is not None
    return list(zip(targets, solution.expected_error.tolist(), strict=True))


def _describe(
    run: Run, output: str, dtype: str, packed: Sequence[Packed], before: _Errors, after: _Errors
) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    return {
        "folder": str(run.folder),
        "output": output,
        "dtype": dtype,
        "packed": [
            {
                "file": one.job.snapshot.file,
                "output": str(one.job.output),
                "base": one.job.base and one.job.base.name,
                "step": one.job.snapshot.step,
                "bytes_before": one.job.snapshot.bytes,
                "bytes": one.bytes,
                "seconds": one.seconds or 0.0,
                "skipped": one.seconds is None,
            }
            for one in packed
        ],
        "bytes_before": sum(one.job.snapshot.bytes for one in packed),
        "bytes": sum(one.bytes for one in packed),
        "expected": [
            {"sigma_rel": width, "before": one, "after": other}
            for (width, one), (_, other) in zip(before or (), after or (), strict=False)
        ],
        "warnings": describe_warnings(run.warnings),
    }


def _draw(
    run: Run,
    output: str,
    packed: Sequence[Packed],
    before: _Errors,
    after: _Errors,
    verified: bool,
) -> None:
    console = stdout_console()
    if before and after:
        table = plain_table(right=["target", "expected error before", "after"])
        for (width, one), (_, other) in zip(before, after, strict=True):
            table.add_row(f"sigma_rel {width:g}", percent(one), percent(other))
        print_table(console, table)
        console.print()
    sizes = [sum(one.job.snapshot.bytes for one in packed), sum(one.bytes for one in packed)]
    there = sum(one.seconds is None for one in packed)
    seconds = sum(one.seconds or 0.0 for one in packed)
    made = f"written in {seconds:.1f} s" if there < len(packed) else "done already"
    kept = f", {there} done already" if 0 < there < len(packed) else ""
    kept += "; verified" if verified else ""
    console.print(
        f"{printable(os.fspath(output))}: {counted(len(packed), 'snapshot')}, "
        f"{in_bytes(sizes[0])} -> {in_bytes(sizes[1])}, {made}{kept}",
        style="bold",
        soft_wrap=True,
    )
