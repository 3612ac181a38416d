"""What `posthoc solve --diagnose` shows: the error to be expected of each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posthoc_cli.cli import options
from posthoc_cli.cli.console import counted, plain_table, print_table
from posthoc_cli.cli.drawing import percent
from posthoc_cli.cli.solve import Solved, title
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.errors import printable
from posthoc_cli.solver.estimates import MethodEstimate, estimate_methods

if TYPE_CHECKING:
    from rich.console import Console


def compare_methods(solved: Solved) -> list[MethodEstimate]:
    assert solved.trajectory is not None
    return estimate_methods(
        [snapshot.profile for snapshot in solved.snapshots],
        options.at_step(solved.targets, solved.step),
        solved.trajectory,
        solved.device,
    )


def describe_diagnosis(solved: Solved, verdicts: Sequence[MethodEstimate]) -> dict[str, Any]:
    assert solved.measures is not None
    assert solved.expected is not None
    return {
        "sampled": solved.measures.sampled,
        "values": solved.measures.values,
        "not_finite": solved.measures.broken,
        "targets": [
            {
                "sigma_rel": target.sigma_rel,
                "gamma": target.gamma,
                "step": solved.step,
                "distance": float(solved.expected.distance[at]),
                "methods": [_describe_verdict(verdict, at) for verdict in verdicts],
            }
            for at, target in enumerate(solved.targets)
        ],
    }


def _describe_verdict(verdict: MethodEstimate, at: int) -> dict[str, Any]:
    if verdict.solution is None or verdict.expected is None:
        return {"method": verdict.method, "problem": spelled(verdict.problem)}
    solution, expected = verdict.solution, verdict.expected
    return {
        "method": verdict.method,
        "expected_error": float(expected.total[at]),
        "relative_error": float(expected.relative[at]),
        "approximation_error": float(expected.approximation[at]),
        "rounding_error": float(expected.rounding[at]),
        "sum_of_weights": float(solution.sum_of_weights[at]),
        "noise_gain": float(solution.noise_gain[at]),
        "profile_error": float(solution.profile_error[at]),
    }


def draw_diagnosis(console: Console, solved: Solved, verdicts: Sequence[MethodEstimate]) -> None:
    """For each target a line a method; errors relative to the distance of EMA and network."""
    assert solved.measures is not None
    assert solved.expected is not None
    raw = solved.snapshots[0].profile.raw
    for at, target in enumerate(solved.targets):
        console.print(f"{title(target)} at step {solved.step}", style="bold")
        table = plain_table()
        table.add_column("method", no_wrap=True)
        headings = ["expected", "approximation", "rounding", "sum", "noise gain", "profile"]
        if raw:
            headings.pop()  # raw checkpoints have no profile to be off by
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        problems = []
        scale = float(solved.expected.distance[at]) or math.nan
        for verdict in verdicts:
            if verdict.solution is None or verdict.expected is None:
                problems.append(f"{verdict.method}: no weights ({spelled(verdict.problem)})")
                continue
            errors = (verdict.expected.total, verdict.expected.approximation)
            table.add_row(
                verdict.method,
                *(percent(float(error[at]) / scale) for error in errors),
                percent(float(verdict.expected.rounding[at]) / scale),
                f"{verdict.solution.sum_of_weights[at]:.4f}",
                f"{verdict.solution.noise_gain[at]:.3f}",
                *([] if raw else [percent(float(verdict.solution.profile_error[at]))]),
            )
        print_table(console, table)
        for problem in problems:
            console.print(printable(problem), style="dim", soft_wrap=True)
        console.print()
    console.print(
        "expected: approximation and rounding together, relative to how far the EMA is\n"
        f"from the network of its step; by {solved.measures.values:,} values of each of "
        f"{counted(len(solved.snapshots), 'snapshot')}",
        style="dim",
        soft_wrap=True,
    )
