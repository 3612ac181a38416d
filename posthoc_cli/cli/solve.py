"""`posthoc solve`: the weights for each target, and how good they are."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    counted,
    note,
    plain_table,
    print_json,
    print_table,
    stdout_console,
    warn,
)
from posthoc_cli.cli.drawing import Bars, Row, draw_weights, percent
from posthoc_cli.errors import SnapshotError, UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from posthoc_cli.snapshots.folder import Snapshot
    from posthoc_cli.snapshots.sampling import SampleMoments
    from posthoc_cli.solver.blup import ExpectedError, Trajectory
    from posthoc_cli.solver.methods import SolvedWeights

TABLES = 3
"""With more targets than this, each gets a line instead of a table."""


FAR_OFF = 0.05
"""Of a profile error or an expected one: what is beyond it is said without being asked."""

LONE = 0.9
"""The weight of a single raw checkpoint beyond which an EMA is hardly more than that one."""

LOUD = 4
"""The noise gain beyond which snapshots of half precision don't give half precision."""

HALF = frozenset({"F16", "BF16"})


@dataclass(frozen=True)
class Solved:
    """The snapshots used, the targets, and the weights between them.

    The last three are there when a sample of the snapshots was read.
    """

    folder: str
    snapshots: list[Snapshot]
    targets: list[options.Target]
    step: int
    device: str
    solution: SolvedWeights
    measures: SampleMoments | None = None
    trajectory: Trajectory | None = None
    expected: ExpectedError | None = None


def solve(
    folder: options.FolderArgument,
    sigma_rel: options.SigmaRelOption = None,
    gamma: options.GammaOption = None,
    step: options.StepOption = None,
    method: options.MethodOption = None,
    device: options.DeviceOption = "cpu",
    pattern: options.PatternOption = None,
    profiles: options.ProfilesOption = None,
    only: options.OnlyOption = None,
    raw: options.RawOption = False,
    skip_incomplete: options.SkipIncompleteOption = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Show negligible weights too, and a table for each target however many there are.",
        ),
    ] = False,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Read a sample of the values, and show how far off each method's EMA is to be "
            "expected.",
        ),
    ] = False,
    as_json: options.JsonOption = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print the weights as CSV, a line for each.")
    ] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Show the weights that rebuild an EMA from the snapshots in FOLDER.

    Nothing is written: it reads the files' headers, and a sample of the values for --method blup
    and --diagnose, so it is a quick way to see how well a target can be had. The profile error says
    how far the EMA that the weights give is from the one that is wanted; the noise gain, how much
    rounding noise of the snapshots is amplified.

    \b
    Examples:
      posthoc solve snapshots --sigma-rel 0.07
      posthoc solve snapshots --sigma-rel 0.02,0.03,...,0.25
      posthoc solve snapshots --gamma 16.97,6.94 --step 2000 --json
      posthoc solve snapshots --sigma-rel 0.07 --csv > weights.csv
      posthoc solve snapshots --sigma-rel 0.03,0.07,0.20 --diagnose
      posthoc solve checkpoints --raw --sigma-rel 0.10,0.20
    """
    if as_json and as_csv:
        raise UsageError("--csv", "doesn't go with --json", "leave out one of the two")
    if diagnose and as_csv:
        raise UsageError("--csv", "doesn't go with --diagnose", "use --json, which has all")
    solved = solve_folder(
        folder,
        options.read_targets(sigma_rel, gamma),
        step=step,
        method=method,
        device=device,
        reading=options.Reading(pattern, profiles, only, raw, skip_incomplete),
        quiet=quiet,
        sample=diagnose,
    )
    if diagnose:
        from posthoc_cli.cli import diagnose as shown

        verdicts = shown.compare_methods(solved)
        if as_json:
            diagnosis = shown.describe_diagnosis(solved, verdicts)
            print_json(describe(solved) | {"diagnosis": diagnosis})
        else:
            shown.draw_diagnosis(stdout_console(), solved, verdicts)
        return
    note_large_errors(solved, quiet)
    if as_json:
        print_json(describe(solved))
    elif as_csv:
        _write_csv(solved)
    else:
        _draw(stdout_console(), solved, everything)


def solve_folder(
    folder: str,
    targets: list[options.Target],
    *,
    step: int | None,
    method: str | None,
    device: str,
    reading: options.Reading,
    quiet: bool,
    sample: bool = False,
    leave_out: Sequence[str] = (),
) -> Solved:
    """Read `folder`, warn of what is odd, and solve.

    With `sample`, and for blup, the values of the snapshots are sampled too, but for those of the
    tensors that the globs `leave_out` fit.
    """
    from posthoc_cli.snapshots.folder import select
    from posthoc_cli.solver.methods import solve

    method = options.read_method(method, reading.raw)
    device = options.read_device(device)
    inventory = options.read_snapshots(folder, reading)
    options.note_skipped(inventory, quiet)
    warn(inventory.warnings, quiet)
    snapshots, step = select(inventory.usable(), step)
    own = [snapshot.profile for snapshot in snapshots]
    wanted = options.at_step(targets, step)
    measures = trajectory = expected = None
    if sample or method == "blup":
        from posthoc_cli.snapshots.sampling import fit_snapshots

        measures, trajectory = fit_snapshots(snapshots, leave_out)
        if measures.broken:
            share = f"{measures.broken:,} of {measures.sampled:,} sampled values"
            warn([f"{share} are NaN or infinite in some snapshot, and left out"], quiet)
    solution = solve(own, wanted, method=method, device=device, trajectory=trajectory)
    for target, total in zip(targets, solution.weights.sum(axis=1), strict=True):
        if not abs(total) < float("inf"):
            raise SnapshotError(
                folder, f"no weights give {target}", "use more snapshots, or another target"
            )
    if trajectory is not None:
        from posthoc_cli.solver.blup import expected_error

        expected = expected_error(trajectory, own, wanted, solution.weights)
    return Solved(
        folder, snapshots, targets, step, device, solution, measures, trajectory, expected
    )


def note_large_errors(solved: Solved, quiet: bool) -> None:
    """One line on stderr for targets out of reach, and one for rounding that is blown up."""
    if quiet:
        return
    if solved.expected is not None:
        off = solved.expected.relative
        if far := [at for at in range(len(solved.targets)) if off[at] > FAR_OFF]:
            worst = max(far, key=lambda at: float(off[at]))
            note(
                f"{_listed(solved, far)}: an error of up to {percent(off[worst])} of the distance "
                "between EMA and network is to be expected (see --diagnose)",
                quiet,
            )
        return
    if solved.snapshots[0].profile.raw:
        _say_what_is_alone(solved)
        return
    errors, gains = solved.solution.profile_error, solved.solution.noise_gain
    if far := [at for at in range(len(solved.targets)) if errors[at] > FAR_OFF]:
        worst = max(far, key=lambda at: float(errors[at]))
        note(
            f"{_listed(solved, far)}: out of reach, with a profile error of up to "
            f"{percent(errors[worst])}; {_reach(solved)}",
            quiet,
        )
    half = sorted(HALF & {dtype for snapshot in solved.snapshots for dtype in snapshot.dtypes})
    if half and (loud := [at for at in range(len(solved.targets)) if gains[at] > LOUD]):
        note(
            f"{_listed(solved, loud)}: the rounding of {' and '.join(half)} snapshots comes out up "
            f"to {gains[loud].max():.3g} times as large; --method blup weighs that",
            quiet,
        )


def _say_what_is_alone(solved: Solved) -> None:
    """A line on stderr for EMAs that are narrower than raw checkpoints are apart."""
    largest = solved.solution.weights.max(axis=1)
    lone = [at for at in range(len(solved.targets)) if largest[at] > LONE]
    if lone and len(solved.snapshots) > 1:
        worst = max(lone, key=lambda at: float(largest[at]))
        one = solved.snapshots[int(solved.solution.weights[worst].argmax())]
        note(
            f"{_listed(solved, lone)}: narrower than the checkpoints are apart; up to "
            f"{percent(largest[worst])} of it is '{one.file}' alone",
            quiet=False,
        )


def _listed(solved: Solved, which: Sequence[int]) -> str:
    """The targets `which`, in short: `sigma_rel 0.2, 0.25 and 3 more`."""
    first = solved.targets[which[0]]
    alike = [solved.targets[at] for at in which if solved.targets[at].option == first.option]
    shown = [str(first), *(target.text for target in alike[1:3])]
    more = len(which) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _reach(solved: Solved) -> str:
    from posthoc_cli.solver.reach import reachable

    profiles = [snapshot.profile for snapshot in solved.snapshots]
    ranges = reachable(profiles, solved.step, FAR_OFF)
    if not ranges:
        return f"nothing is within {FAR_OFF:.0%} at step {solved.step}"
    spans = " and ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges)
    return f"within {FAR_OFF:.0%}, these snapshots reach sigma_rel {spans}"


def describe(solved: Solved) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    solution = solved.solution
    return {
        "folder": solved.folder,
        "method": solution.method,
        "device": solved.device,
        "condition_number": solution.condition_number,
        "targets": [
            {
                "sigma_rel": target.sigma_rel,
                "gamma": target.gamma,
                "step": solved.step,
                "sum_of_weights": float(solution.sum_of_weights[at]),
                "noise_gain": float(solution.noise_gain[at]),
                "profile_error": float(solution.profile_error[at]),
                **_describe_expected(solved, at),
                "weights": [
                    {
                        "file": snapshot.file,
                        "step": snapshot.step,
                        "sigma_rel": snapshot.sigma_rel,
                        "gamma": snapshot.gamma,
                        "weight": float(weight),
                    }
                    for snapshot, weight in zip(solved.snapshots, solution.weights[at], strict=True)
                ],
            }
            for at, target in enumerate(solved.targets)
        ],
    }


def _describe_expected(solved: Solved, at: int) -> dict[str, float]:
    if solved.expected is None:
        return {}
    return {
        "expected_error": float(solved.expected.total[at]),
        "relative_error": float(solved.expected.relative[at]),
    }


_CSV_COLUMNS = (
    *("target_sigma_rel", "target_gamma", "target_step"),
    *("file", "step", "sigma_rel", "gamma", "weight"),
)


def _write_csv(solved: Solved) -> None:
    """The weights, a line for each, with all their digits."""
    # A terminal gets no control characters; a file gets the names as they are.
    shown = printable if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for target, weights in zip(solved.targets, solved.solution.weights.tolist(), strict=True):
        for snapshot, weight in zip(solved.snapshots, weights, strict=True):
            writer.writerow(
                [
                    target.sigma_rel,
                    target.gamma,
                    solved.step,
                    shown(snapshot.file),
                    snapshot.step,
                    snapshot.sigma_rel,
                    snapshot.gamma,
                    weight,
                ]
            )


def _draw(console: Console, solved: Solved, everything: bool) -> None:
    if len(solved.targets) > TABLES and not everything:
        _draw_lines(console, solved)
        return
    for at, target in enumerate(solved.targets):
        if at:
            console.print()
        console.print(
            f"{title(target)} at step {solved.step}, "
            f"from {_sources(solved)} ({solved.solution.method})",
            style="bold",
        )
        rows = [
            Row(snapshot.file, snapshot.step, snapshot.sigma_rel, snapshot.gamma, weight)
            for snapshot, weight in zip(
                solved.snapshots, solved.solution.weights[at].tolist(), strict=True
            )
        ]
        draw_weights(console, rows, everything=everything)
        _draw_totals(console, solved, at)


def _sources(solved: Solved) -> str:
    raw = solved.snapshots[0].profile.raw
    return counted(len(solved.snapshots), "raw checkpoint" if raw else "snapshot")


def title(target: options.Target) -> str:
    if target.option == "--gamma":
        return f"{target} (sigma_rel {target.sigma_rel:.4g})"
    return f"{target} (gamma {target.gamma:.4g})"


def _draw_totals(console: Console, solved: Solved, at: int) -> None:
    solution = solved.solution
    table = plain_table()
    table.show_header = False
    totals = [
        ("sum of weights", f"{solution.sum_of_weights[at]:.6f}", ""),
        ("noise gain", f"{solution.noise_gain[at]:.4g}", "times the snapshots' rounding noise"),
    ]
    if not solved.snapshots[0].profile.raw:  # which have no profile to be off by
        error = percent(solution.profile_error[at])
        totals.append(("profile error", error, "off the profile that is wanted"))
    if solution.method != "share":  # which solves no system
        totals.append(("condition number", f"{solution.condition_number:.3g}", ""))
    if solved.expected is not None:
        error = percent(float(solved.expected.relative[at]))
        totals.insert(0, ("expected error", error, "of how far the EMA is from the network"))
    for total, value, meaning in totals:
        table.add_row(total, value, meaning)
    table.columns[2].style = "dim"
    console.print()
    print_table(console, table)


def _draw_lines(console: Console, solved: Solved) -> None:
    """A line a target: how well each can be had."""
    solution = solved.solution
    table = plain_table()
    kind, errors = "profile error", solution.profile_error.tolist()
    if solved.snapshots[0].profile.raw:
        kind, errors = "largest weight", solution.weights.max(axis=1).tolist()
    if solved.expected is not None:  # then it is known what comes of the profile error
        kind, errors = "expected error", solved.expected.relative.tolist()
    for heading in ("sigma_rel", "gamma", "sum of weights", "noise gain", kind):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    lengths = [error if math.isfinite(error) else 0.0 for error in errors]
    bars = Bars(lengths, 13, console.encoding)
    for at, (target, error) in enumerate(zip(solved.targets, errors, strict=True)):
        table.add_row(
            f"{target.sigma_rel:.4f}",
            f"{target.gamma:.2f}",
            f"{solution.sum_of_weights[at]:.6f}",
            f"{solution.noise_gain[at]:.3f}",
            f"{100 * error:.2f}%" if math.isfinite(error) else "unknown",
            bars.draw(lengths[at]),
        )
    print_table(console, table)
    console.print()
    console.print(
        f"at step {solved.step}, from {_sources(solved)} "
        f"({solution.method})"
        + (
            f"; condition number {solution.condition_number:.3g}"
            if solution.method != "share"
            else ""
        )
    )
    console.print("--all shows the weights of each target, or name up to three", style="dim")
