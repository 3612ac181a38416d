"""`posthoc solve`: the weights for each target, and how good they are."""

from __future__ import annotations

import csv
import math
import sys
from typing import TYPE_CHECKING, Annotated

from posthoc_cli.cli import options
from posthoc_cli.cli.console import plain_table, print_json, print_table, stdout_console
from posthoc_cli.cli.drawing import Bars, Row, draw_weights
from posthoc_cli.cli.lists import read_target_for
from posthoc_cli.cli.lora import load_numpy
from posthoc_cli.cli.solutions import (
    best_known_error,
    describe,
    note_large_errors,
    open_and_warn,
    sources,
    titles,
    warn_of_sample,
)
from posthoc_cli.errors import UsageError, percent, printable

if TYPE_CHECKING:
    from rich.console import Console

    from posthoc_cli.api import Solution

TABLES = 3
"""With more targets than this, each gets a line instead of a table."""


@options.with_options
def solve(
    reading: options.Reading,
    folder: options.FolderArgument,
    targets: options.Targets,
    target_for: options.TargetForOption = None,
    step: options.StepOption = None,
    method: options.MethodOption = None,
    device: options.DeviceOption = "cpu",
    everything: Annotated[
        bool,
        options.flag(
            "--all",
            "Show negligible weights too, and a table for each target however many there are.",
        ),
    ] = False,
    diagnose: Annotated[
        bool,
        options.flag(
            "--diagnose",
            "Read a sample of the values, and show how far off each method's EMA is to be "
            "expected.",
        ),
    ] = False,
    as_json: options.JsonOption = False,
    as_csv: Annotated[
        bool, options.flag("--csv", "Print the weights as CSV, a line for each.")
    ] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Show the weights that rebuild an EMA from the snapshots in FOLDER.

    Nothing is written: it reads the files' headers, and a sample of the values unless --method is
    edm2, algorithm3 or share, so it is a quick way to see how well a target can be had. The
    expected error says how far the EMA that the weights give is from the one that is wanted,
    relative to how far that is from the network; the noise gain, how much rounding noise of the
    snapshots is amplified.

    \b
    Examples:
      posthoc solve snapshots --sigma-rel 0.07
      posthoc solve snapshots --sigma-rel 0.02,0.03,...,0.25
      posthoc solve snapshots --gamma 16.97,6.94 --step 2000 --json
      posthoc solve snapshots --window 5%,10% --lr-decay 1-sqrt:20%
      posthoc solve snapshots --sigma-rel 0.07 --csv > weights.csv
      posthoc solve snapshots --sigma-rel 0.07 --target-for '*.bias=0.10'
      posthoc solve snapshots --sigma-rel 0.03,0.07,0.20 --diagnose
      posthoc solve checkpoints --raw --sigma-rel 0.10,0.20
    """
    if as_json and as_csv:
        raise UsageError("--csv", "doesn't go with --json", "leave out one of the two")
    if diagnose and as_csv:
        raise UsageError("--csv", "doesn't go with --diagnose", "use --json, which has all")
    load_numpy()
    solution = open_and_warn(folder, reading, quiet).solve(
        step=step,
        method=method,
        device=device,
        sample=diagnose,
        target_for=read_target_for(target_for),
        **targets.read(),
    )
    warn_of_sample(solution, quiet)
    if diagnose:
        from posthoc_cli.cli.diagnose import describe_estimates, draw_estimates

        estimates = solution.estimate_methods()
        if as_json:
            diagnosis = describe_estimates(solution, estimates)
            print_json(describe(folder, solution) | {"diagnosis": diagnosis})
        else:
            draw_estimates(stdout_console(), solution, estimates)
        return
    note_large_errors(solution, quiet)
    if as_json:
        print_json(describe(folder, solution))
    elif as_csv:
        _write_csv(solution)
    else:
        _draw(stdout_console(), solution, everything)


_CSV_COLUMNS = (
    *("target_sigma_rel", "target_gamma", "target_step"),
    *("file", "step", "sigma_rel", "gamma", "weight", "target"),
)


def _write_csv(solution: Solution) -> None:
    # A terminal gets no control characters; a file gets the names as they are.
    shown = printable if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout, lineterminator="\n")
    # Only of an output in groups there is a column that says whose the weights are.
    tensors = [[""] for _ in solution.targets if solution.groups]
    tensors += [[shown(" ".join(group.globs))] for group in solution.groups]
    writer.writerow([*_CSV_COLUMNS, *["tensors"][: len(tensors)]])
    for at, target in enumerate(solution.wanted):
        weights = solution.solved.weights[at].tolist()
        for snapshot, weight in zip(solution.snapshots, weights, strict=True):
            wanted = (target.sigma_rel, target.gamma, solution.step)
            widths = (snapshot.sigma_rel, snapshot.gamma)
            source = (snapshot.step, *("" if each != each else each for each in widths))
            whose = tensors[at] if tensors else []
            row = [*wanted, shown(snapshot.file), *source, weight, target.named, *whose]
            writer.writerow(row)


def _draw(console: Console, solution: Solution, everything: bool) -> None:
    if len(solution.wanted) > TABLES and not everything:
        _draw_lines(console, solution)
        return
    for at, heading in enumerate(titles(solution)):
        if at:
            console.print()
        console.print(
            f"{printable(heading)} at step {solution.step}, from {sources(solution)} "
            f"({solution.solved.method})",
            style="bold",
        )
        rows = [
            Row(snapshot.file, snapshot.profile, weight)
            for snapshot, weight in zip(
                solution.snapshots, solution.solved.weights[at].tolist(), strict=True
            )
        ]
        draw_weights(console, rows, everything=everything)
        _draw_totals(console, solution, at)


def _draw_totals(console: Console, solution: Solution, at: int) -> None:
    solved = solution.solved
    table = plain_table()
    table.show_header = False
    totals = [
        ("sum of weights", f"{solved.sum_of_weights[at]:.6f}", ""),
        ("noise gain", f"{solved.noise_gain[at]:.4g}", "times the snapshots' rounding noise"),
    ]
    if not solution.run.raw:  # which have no profile to be off by
        error = percent(solved.profile_error[at])
        totals.append(("profile error", error, "off the profile that is wanted"))
    if solved.method != "share":  # which solves no system
        totals.append(("condition number", f"{solved.condition_number:.3g}", ""))
    if solution.expected is not None:
        meaning = "of how far the EMA is from the network"
        if (plain := solution.plain) is not None:
            meaning += f"; {plain}'s: {percent(float(solution.errors[plain].relative[at]))}"
        totals.insert(
            0, ("expected error", percent(float(solution.expected.relative[at])), meaning)
        )
    for total, value, meaning in totals:
        table.add_row(total, value, meaning)
    table.columns[2].style = "dim"
    console.print()
    print_table(console, table)


def _draw_lines(console: Console, solution: Solution) -> None:
    """A line a target: how well each can be had."""
    from rich.text import Text

    solved = solution.solved
    kind, errors = best_known_error(solution)
    powers = all(target.gamma is not None for target in solution.wanted)
    first = ["sigma_rel", "gamma"] if powers else []
    table = plain_table(
        [] if powers else ["target"], right=[*first, "sum of weights", "noise gain", kind]
    )
    table.add_column(no_wrap=True)
    table.add_column("tensors" if solution.groups else "", no_wrap=True)
    tensors = [Text("")] * len(solution.targets)
    tensors += [Text(printable(" ".join(group.globs))) for group in solution.groups]
    lengths = [error if math.isfinite(error) else 0.0 for error in errors]
    bars = Bars(lengths, 13, console.encoding)
    for at, (target, error) in enumerate(zip(solution.wanted, errors, strict=True)):
        table.add_row(
            *([f"{target.sigma_rel:.4f}", f"{target.gamma:.2f}"] if powers else [str(target)]),
            f"{solved.sum_of_weights[at]:.6f}",
            f"{solved.noise_gain[at]:.3f}",
            f"{100 * error:.2f}%" if math.isfinite(error) else "unknown",
            bars.draw(lengths[at]),
            tensors[at],
        )
    print_table(console, table)
    console.print()
    console.print(
        f"at step {solution.step}, from {sources(solution)} ({solved.method})"
        + (f"; condition number {solved.condition_number:.3g}" if solved.method != "share" else "")
    )
    console.print("--all shows the weights of each target, or name up to three", style="dim")
