"""What `posthoc solve --diagnose` shows: the error to be expected of each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posthoc_cli.cli.console import counted, plain_table, print_table
from posthoc_cli.cli.solutions import titles
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.errors import percent, printable

if TYPE_CHECKING:
    from rich.console import Console

    from posthoc_cli.api import Solution
    from posthoc_cli.solver.estimates import MethodEstimate


def describe_estimates(solution: Solution, estimates: Sequence[MethodEstimate]) -> dict[str, Any]:
    assert solution.sample is not None
    assert solution.expected is not None
    return {
        "sampled": solution.sample.moments.sampled,
        "values": solution.sample.moments.values,
        "not_finite": solution.sample.moments.broken,
        "misfit": solution.sample.trajectory.misfit,
        "left_out": solution.sample.trajectory.left_out,
        "raised": solution.sample.trajectory.raised,
        "targets": [
            _describe_target(solution, at, estimates) for at, _ in enumerate(solution.targets)
        ],
        "groups": [
            {"tensors": list(group.globs), **_describe_target(solution, at, estimates)}
            for at, group in enumerate(solution.groups, len(solution.targets))
        ],
    }


def _describe_target(
    solution: Solution, at: int, estimates: Sequence[MethodEstimate]
) -> dict[str, Any]:
    assert solution.expected is not None
    target = solution.wanted[at]
    return {
        "target": target.as_dict(solution.step),
        "sigma_rel": target.sigma_rel,
        "gamma": target.gamma,
        "step": solution.step,
        "distance": float(solution.expected.distance[at]),
        "methods": [_describe_estimate(estimate, at) for estimate in estimates],
    }


def _describe_estimate(estimate: MethodEstimate, at: int) -> dict[str, Any]:
    if estimate.solved is None or estimate.expected is None:
        return {"method": estimate.method, "problem": spelled(estimate.problem)}
    solved, expected = estimate.solved, estimate.expected
    return {
        "method": estimate.method,
        "expected_error": float(expected.total[at]),
        "relative_error": float(expected.relative[at]),
        "approximation_error": float(expected.approximation[at]),
        "rounding_error": float(expected.rounding[at]),
        "sum_of_weights": float(solved.sum_of_weights[at]),
        "noise_gain": float(solved.noise_gain[at]),
        "profile_error": float(solved.profile_error[at]),
    }


def draw_estimates(
    console: Console, solution: Solution, estimates: Sequence[MethodEstimate]
) -> None:
    """For each target a line a method; errors relative to the distance of EMA and network."""
    assert solution.sample is not None
    assert solution.expected is not None
    raw = solution.run.raw
    for at, heading in enumerate(titles(solution)):
        console.print(f"{printable(heading)} at step {solution.step}", style="bold")
        headings = ["expected", "approximation", "rounding", "sum", "noise gain", "profile"]
        if raw:
            headings.pop()  # raw checkpoints have no profile to be off by
        table = plain_table(["method"], headings)
        problems = []
        scale = float(solution.expected.distance[at]) or math.nan
        for estimate in estimates:
            if estimate.solved is None or estimate.expected is None:
                problems.append(f"{estimate.method}: no weights ({spelled(estimate.problem)})")
                continue
            errors = (estimate.expected.total, estimate.expected.approximation)
            table.add_row(
                estimate.method,
                *(percent(float(error[at]) / scale) for error in errors),
                percent(float(estimate.expected.rounding[at]) / scale),
                f"{estimate.solved.sum_of_weights[at]:.4f}",
                f"{estimate.solved.noise_gain[at]:.3f}",
                *([] if raw else [percent(float(estimate.solved.profile_error[at]))]),
            )
        print_table(console, table)
        for problem in problems:
            console.print(printable(problem), style="dim", soft_wrap=True)
        console.print()
    console.print(
        "expected: approximation and rounding together, relative to how far the EMA is\n"
        f"from the network of its step; by {solution.sample.moments.values:,} values of each of "
        f"{counted(len(solution.sample.moments.rounding), 'snapshot')}",
        style="dim",
        soft_wrap=True,
    )
    trajectory = solution.sample.trajectory
    if math.isfinite(trajectory.left_out):
        raised = f";\nall errors are raised by {trajectory.raised:.3g}" * (trajectory.raised > 1)
        console.print(
            "left out and rebuilt from the others, snapshots are "
            f"{trajectory.left_out:.3g} times as far\noff as expected{raised}",
            style="dim",
            soft_wrap=True,
        )
