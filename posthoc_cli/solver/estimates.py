"""How far off a synthesized EMA is to be expected, for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.solver.blup import ExpectedError, Trajectory, expected_error
from posthoc_cli.solver.methods import EMA_METHODS, RAW_METHODS, SolvedWeights, solve
from posthoc_cli.solver.profiles import Profile


@dataclass(frozen=True, slots=True)
class MethodEstimate:
    """One method's weights and their expected errors; or the `problem` why it has none."""

    method: str
    solved: SolvedWeights | None
    expected: ExpectedError | None
    problem: str = ""


def estimate_methods(
    snapshots: Sequence[Profile],
    targets: Sequence[Profile],
    trajectory: Trajectory,
    device: str = "cpu",
) -> list[MethodEstimate]:
    """Every method's weights for the targets, with their expected errors.

    Of raw checkpoints, those of the methods for them.
    """
    estimates = []
    for method in RAW_METHODS if any(each.raw for each in snapshots) else EMA_METHODS:
        try:
            solved = solve(snapshots, targets, method, device, trajectory)
        except (SnapshotError, UsageError) as error:
            estimates.append(
                MethodEstimate(method, None, None, f"{error.subject}: {error.problem}")
            )
            continue
        expected = expected_error(trajectory, snapshots, targets, solved.weights)
        estimates.append(MethodEstimate(method, solved, expected))
    return estimates
