"""`posthoc plan`: what a training run will leave room for, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    describe_warnings,
    note,
    plain_table,
    print_json,
    print_table,
    stdout_console,
)
from posthoc_cli.cli.lists import read_numbers
from posthoc_cli.cli.scale import Machines, describe_costs, draw_costs
from posthoc_cli.errors import UsageError, in_bytes, percent

if TYPE_CHECKING:
    from rich.console import Console

    from posthoc_cli.solver.targets import Target
    from posthoc_cli.synthesis.cost import Cost

WITHIN = (0.01, 0.05)
"""The profile errors that a range is given for."""


Ranges = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What there is at a step of a run: how many snapshots, and what they reach, by error."""

    label: str
    step: int
    every: int
    widths: tuple[float, ...]
    snapshots: int
    reach: tuple[Ranges, ...]
    wanted: tuple[Wanted, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a plan gives of a target at its end: the expected `error` of all its snapshots, and the
    step from which on they are enough (None where that wasn't asked)."""

    target: Target
    step: int
    error: float
    since: int | None


@options.with_options
def plan(
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of the run.", show_default=False)],
    every: Annotated[
        int, typer.Option(metavar="K", help="Steps between snapshots.", show_default=False)
    ],
    targets: options.Targets,
    machines: Machines,
    profiles: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help="The sigma_rel values that are tracked.  [default: 0.05,0.10]",
        ),
    ] = None,
    bytes_per_snapshot: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default=False,
            help="Of one file, such as 1.2GB: to say how much disk the run takes.",
        ),
    ] = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Show, before training, which EMA lengths its snapshots will give.

    For each moment, the widths that can be had within 1% and 5% profile error; then what twice as
    many snapshots, or one more profile, would buy, at the end of the run. For targets that are
    named, the error that is to be expected at the end if the network moves evenly, and from which
    step on snapshots have to be kept for it. With --bandwidth, what it takes to synthesize them
    (or one) of all snapshots, on one node and on --nodes.

    \b
    Examples:
      posthoc plan --steps 100000 --every 2000
      posthoc plan --steps 100000 --every 2000 --profiles 0.05,0.10,0.20
      posthoc plan --steps 100000 --every 1000 --window 10% --lr-decay 1-sqrt:20%
      posthoc plan --steps 1000000 --every 8000 --bytes-per-snapshot 1.2GB --json
      posthoc plan --steps 900 --every 30 --bandwidth 3GB/s --bytes-per-snapshot 9GB
    """
    widths = _read_widths(profiles)
    size = options.read_size("--bytes-per-snapshot", bytes_per_snapshot)
    if not 1 <= every <= steps:
        raise UsageError("--every", f"{every} is not from 1 to {steps}", "give fewer than --steps")
    if steps > 2**53:
        raise UsageError("--steps", f"{steps} is above 2^53", "give fewer")
    asked = _read_targets(targets)
    costs = machines.costs(steps // every * len(widths), size, len(asked) or 1)
    run = [
        _outlook(share, steps, every, widths, round(steps * fraction))
        for share, fraction in (("a quarter", 0.25), ("half", 0.5), ("end", 1.0))
        if round(steps * fraction) >= every
    ]
    choices = _alternatives(steps, every, widths)
    if asked:
        run[-1] = _with_targets(run[-1], asked, keep=True)
        choices = [_with_targets(choice, asked) for choice in choices]
    warnings = []
    if left := steps % every:
        warnings.append(
            f"--every {every}: the last snapshot is {left} steps before the end; "
            "save one more there, or choose a divisor of --steps"
        )
        note(warnings[0], quiet)
    if as_json:
        told = describe_warnings([("", text) for text in warnings])
        synthesis = {"synthesis": describe_costs(costs)}
        print_json(_describe(steps, size, run, choices) | synthesis | {"warnings": told})
    else:
        _draw(size, run, choices, costs, len(asked) or 1)


def _read_widths(profiles: Sequence[str] | None) -> tuple[float, ...]:
    from posthoc_cli.solver import MAX_SIGMA_REL, MIN_SIGMA_REL

    widths = tuple(sorted(set(read_numbers("--profiles", profiles or ["0.05,0.10"]))))
    for width in widths:
        if not MIN_SIGMA_REL <= width < MAX_SIGMA_REL:
            raise UsageError(
                "--profiles",
                f"{width:g} is out of bounds",
                "give values above 0 and below 12^-0.5 = 0.2887",
            )
    if len(widths) > 16:
        raise UsageError("--profiles", f"{len(widths)} of them", "give up to 16")
    return widths


def _read_targets(targets: options.Targets) -> list[Target]:
    from posthoc_cli.solver.targets import make_targets

    given = targets.read()
    return make_targets(**given) if any(given.values()) else []


def _with_targets(one: Outlook, targets: Sequence[Target], keep: bool = False) -> Outlook:
    from posthoc_cli.solver.reach import even_error, needed, planned_near

    snapshots = planned_near(one.step, one.every, one.widths)
    wanted = []
    for target in targets:
        average = target.profile(one.step)
        error, since = needed(snapshots, average) if keep else (even_error(snapshots, average), 0)
        wanted.append(Wanted(target, one.step, error, int(since) if keep else None))
    return replace(one, wanted=tuple(wanted))


def _outlook(label: str, steps: int, every: int, widths: tuple[float, ...], at: int) -> Outlook:
    from posthoc_cli.solver.reach import planned, reachable

    snapshots = planned(steps, every, widths, at)
    step = int(snapshots[0].step)
    ranges = tuple(reachable(snapshots, step, within) for within in WITHIN)
    return Outlook(label, step, every, widths, step // every * len(widths), ranges)


def _alternatives(steps: int, every: int, widths: tuple[float, ...]) -> list[Outlook]:
    from posthoc_cli.solver.reach import best_extra_width

    choices = []
    if every > 1:
        denser = -(-every // 2)
        choices.append(_outlook(f"every {denser} steps", steps, denser, widths, steps))
    extra = best_extra_width(steps, every, widths, WITHIN[0])
    if extra is None:
        return choices
    more = tuple(sorted((*widths, extra)))
    choices.append(_outlook(f"and sigma_rel {extra:g}", steps, every, more, steps))
    if every > 1:
        choices.append(_outlook("both", steps, denser, more, steps))
    return choices


def _describe(
    steps: int, size: int | None, run: Sequence[Outlook], choices: Sequence[Outlook]
) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""

    def describe(one: Outlook) -> dict[str, Any]:
        return {
            "step": one.step,
            "every": one.every,
            "profiles": list(one.widths),
            "snapshots": one.snapshots,
            "bytes": None if size is None else size * one.snapshots,
            "reachable": [
                {
                    "profile_error": within,
                    "sigma_rel": [{"from": low, "to": high} for low, high in ranges],
                }
                for within, ranges in zip(WITHIN, one.reach, strict=True)
            ],
            "targets": [
                {
                    "target": wanted.target.as_dict(wanted.step),
                    "relative_error": wanted.error,
                    "keep_from": wanted.since,
                }
                for wanted in one.wanted
            ],
        }

    return {
        "steps": steps,
        "run": [describe(one) for one in run],
        "alternatives": [describe(one) for one in choices],
    }


def _draw(
    size: int | None,
    run: Sequence[Outlook],
    choices: Sequence[Outlook],
    costs: Sequence[Cost],
    targets: int,
) -> None:
    console = stdout_console()
    table = plain_table()
    table.add_column("", no_wrap=True)
    headings = ["step", "snapshots", *(["disk"] if size else []), "within 1%", "within 5%"]
    for heading in headings:
        table.add_column(heading, justify="right")

    def add(one: Outlook) -> None:
        disk = [in_bytes(size * one.snapshots)] if size else []
        spans = [_spans(ranges) for ranges in one.reach]
        table.add_row(one.label, str(one.step), str(one.snapshots), *disk, *spans)

    for one in run:
        add(one)
    if choices:
        table.add_row(*[""] * len(table.columns))
    for one in choices:
        add(one)
    widths = ", ".join(f"{width:g}" for width in run[-1].widths)
    console.print(
        f"sigma_rel that can be had from {widths} saved every {run[-1].every} steps", style="bold"
    )
    print_table(console, table)
    if run[-1].wanted:
        _draw_targets(console, run[-1], choices)
    if costs:
        draw_costs(console, costs, targets)
    console.print()
    console.print("posthoc solve --diagnose will tell the error itself", style="dim")


def _draw_targets(console: Console, end: Outlook, choices: Sequence[Outlook]) -> None:
    """A line for each target: its error by each plan, and which snapshots it needs."""
    table = plain_table()
    table.add_column("target", no_wrap=True)
    for label in ("expected error", *(choice.label for choice in choices), "keep snapshots"):
        table.add_column(label, justify="right")
    for at, wanted in enumerate(end.wanted):
        others = (choice.wanted[at].error for choice in choices)
        errors = [percent(error) for error in (wanted.error, *others)]
        table.add_row(str(wanted.target), *errors, f"from {wanted.since} on")
    console.print(f"\nat step {end.step}, if the network moves evenly", style="bold")
    print_table(console, table)


def _spans(ranges: Ranges) -> str:
    return ", ".join(f"{low:.3g}-{high:.3g}" for low, high in ranges) or "nothing"
