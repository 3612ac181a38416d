"""`posthoc synthesize`: write the EMAs that are wanted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    note,
    plain_table,
    print_json,
    print_table,
    stderr_console,
    stdout_console,
)
from posthoc_cli.cli.drawing import percent
from posthoc_cli.cli.outputs import make_folder, output_paths
from posthoc_cli.cli.solve import Solved, say_what_is_doubtful, solve_folder
from posthoc_cli.cli.solve import describe as describe_solved
from posthoc_cli.errors import SnapshotError, UsageError, in_bytes, printable

if TYPE_CHECKING:
    from posthoc_cli.plan import Plan

_OUTPUT = "Output"


def _dtypes() -> list[str]:
    from posthoc_cli.plan import OUTPUT_DTYPES

    return ["same", *OUTPUT_DTYPES]


@dataclass(frozen=True, slots=True)
class Written:
    """One target's output; `seconds` is None where an output was there and is kept."""

    path: Path
    bytes: int
    seconds: float | None


def synthesize(
    folder: options.FolderArgument,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            rich_help_panel=_OUTPUT,
            show_default=False,
            help="The file to write; with several targets a folder, or a template with "
            "{sigma_rel}, {gamma} or {step}. A path that ends in / is made if need be.",
        ),
    ],
    sigma_rel: options.SigmaRelOption = None,
    gamma: options.GammaOption = None,
    step: options.StepOption = None,
    method: options.MethodOption = None,
    device: options.DeviceOption = "cpu",
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel="Targets",
            show_default=False,
            help="Write nothing when a larger error is to be expected, relative to how far the EMA "
            "is from the network: 0.05 is 5%.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel=_OUTPUT,
            autocompletion=_dtypes,
            help="Of the tensors written: same, float64, float32, float16 or bfloat16.",
        ),
    ] = "same",
    copy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            rich_help_panel=_OUTPUT,
            help="Tensors to take from the newest snapshot instead of averaging; may be repeated.",
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", rich_help_panel=_OUTPUT, help="Tensors to leave out; may be repeated."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", rich_help_panel=_OUTPUT, help="Replace outputs that exist.")
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            rich_help_panel=_OUTPUT,
            help="Keep outputs that exist, and write the others.",
        ),
    ] = False,
    pattern: options.PatternOption = None,
    profiles: options.ProfilesOption = None,
    only: options.OnlyOption = None,
    raw: options.RawOption = False,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Write EMAs of any length, as weighted sums of the snapshots in FOLDER.

    All targets come out of one pass over the snapshots. An output appears whole or not at all, and
    carries its recipe: posthoc inspect shows it.

    \b
    Examples:
      posthoc synthesize snapshots --sigma-rel 0.07 -o ema-0.07.safetensors
      posthoc synthesize snapshots --sigma-rel 0.02,0.03,...,0.25 -o emas/
      posthoc synthesize snapshots --gamma 16.97,6.94 -o 'ema-{gamma}.safetensors'
      posthoc synthesize snapshots --gamma 5 --dtype float32 -o ema.safetensors
      posthoc synthesize checkpoints --raw --sigma-rel 0.15 -o lora.safetensors
    """
    if force and skip_existing:
        raise UsageError("--force", "doesn't go with --skip-existing", "leave out one of the two")
    options.check_choice("--dtype", dtype, _dtypes())
    if max_error is not None and not 0 < max_error < float("inf"):
        raise UsageError("--max-error", f"{max_error:g} is out of bounds", "give, say, 0.05 for 5%")
    solved = solve_folder(
        folder,
        options.read_targets(sigma_rel, gamma),
        step=step,
        method=method,
        device=device,
        reading=(pattern, profiles, only, raw),
        quiet=quiet,
        sample=max_error is not None,
        leave_out=(*(copy or ()), *(drop or ())),
    )
    if max_error is not None:
        _check_error(solved, max_error)
    paths = output_paths(output, folder, solved.targets, solved.step)
    kept = {path for path in paths if skip_existing and path.exists()}
    for path in paths:
        if path in kept:
            note(f"{path}: exists already; skipped", quiet)

    from posthoc_cli.plan import make_plan

    plan = make_plan(solved.snapshots, dtype=dtype, copy=copy or (), drop=drop or ())
    say_what_is_doubtful(solved, quiet)
    make_folder(output)
    written = _write(plan, solved, paths, kept, force, progress=not quiet)
    if as_json:
        print_json(_describe(solved, written))
    else:
        _draw(solved, written)


def _check_error(solved: Solved, most: float) -> None:
    """Raise SnapshotError for the first target that is to be expected further off than `most`."""
    assert solved.expected is not None
    for target, error in zip(solved.targets, solved.expected.relative.tolist(), strict=True):
        if not error <= most:
            known = f"{percent(error)}, more than" if error == error else "unknown, so not within"
            better = "" if solved.solution.method == "blup" else "use --method blup, or "
            raise SnapshotError(
                str(target),
                f"its expected error is {known} --max-error {percent(most)}",
                f"{better}see solve --diagnose for what these snapshots can give",
            )


def _write(
    plan: Plan,
    solved: Solved,
    paths: Sequence[Path],
    kept: set[Path],
    force: bool,
    *,
    progress: bool,
) -> list[Written]:
    """Write those of `paths`, one for each target, that are not `kept`, in one pass."""
    wanted = [at for at, path in enumerate(paths) if path not in kept]
    written = {
        at: Written(path, path.stat().st_size, None)
        for at, path in enumerate(paths)
        if path in kept
    }
    if wanted:
        from posthoc_cli.synthesis import execute

        with _progress_bar(plan.bytes_to_read, len(wanted), progress) as advance:
            begin = time.perf_counter()
            sizes = execute(
                plan,
                solved.solution.weights[wanted],
                [paths[at] for at in wanted],
                [_recipe(solved, at) for at in wanted],
                device=solved.device,
                overwrite=force,
                progress=advance,
            )
            seconds = time.perf_counter() - begin
        for at, size in zip(wanted, sizes, strict=True):
            written[at] = Written(paths[at], size, seconds)
    return [written[at] for at in range(len(paths))]


def _recipe(solved: Solved, at: int) -> dict[str, Any]:
    from posthoc_cli.recipe import make_recipe

    recipe = make_recipe(
        solved.solution.method,
        solved.solution.targets[at],
        [snapshot.file for snapshot in solved.snapshots],
        solved.solution.snapshots,
        solved.solution.weights[at].tolist(),
    )
    # A profile holds gamma only: what was said as 0.05 shall not come out as 0.04999999999999999.
    recipe["target"]["sigma_rel"] = solved.targets[at].sigma_rel
    for source, snapshot in zip(recipe["sources"], solved.snapshots, strict=True):
        source["sigma_rel"] = snapshot.sigma_rel
    return recipe


@contextlib.contextmanager
def _progress_bar(total: int, outputs: int, wanted: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr of `total` bytes to read, gone when done; nothing unless on a terminal."""
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
        task = bar.add_task("1 file" if outputs == 1 else f"{outputs} files", total=total)
        yield lambda count: bar.advance(task, count)


def _describe(solved: Solved, written: Sequence[Written]) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    document = describe_solved(solved)
    for target, one in zip(document["targets"], written, strict=True):
        target["output"] = str(one.path)
        target["bytes"] = one.bytes
        target["seconds"] = one.seconds or 0.0
        target["skipped"] = one.seconds is None
    return document


def _draw(solved: Solved, written: Sequence[Written]) -> None:
    """A line for each output; or two, when the paths are long and the terminal narrow."""
    from rich.text import Text

    console = stdout_console()
    solution = solved.solution
    headings = ("size", "time", "sum of weights", "noise gain", "profile error")
    lines = [
        (
            in_bytes(one.bytes),
            "kept" if one.seconds is None else f"{one.seconds:.1f} s",
            f"{solution.sum_of_weights[at]:.6f}",
            f"{solution.noise_gain[at]:.3f}",
            percent(solution.profile_error[at]),
        )
        for at, one in enumerate(written)
    ]
    names = [printable(str(one.path)) for one in written]
    if max(map(len, names)) + 60 > console.width:
        for name, line in zip(names, lines, strict=True):
            console.print(name, style="bold", soft_wrap=True)
            size, seconds, total, noise, error = line
            console.print(
                f"  {size}, {seconds}; sum {total}, noise gain {noise}, profile error {error}"
            )
        return
    table = plain_table()
    table.add_column("output")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, line in zip(names, lines, strict=True):
        table.add_row(Text(name), *line)
    print_table(console, table)
