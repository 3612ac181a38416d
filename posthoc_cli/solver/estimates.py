"""How far off an EMA is to be expected by each method's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.solver.blup import ExpectedError, expected_error
from posthoc_cli.solver.methods import SolvedWeights, methods_for, solve
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class MethodEstimate:
    """One method's weights and their expected errors; or the `problem` why it has none."""

    method: str
    solved: SolvedWeights | None
    expected: ExpectedError | None
    problem: str = ""


def estimate_methods(
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    trajectory: Trajectory,
    device: str = "cpu",
) -> list[MethodEstimate]:
    """Every method's weights for the targets, with their expected errors.

    Of raw checkpoints, those of the methods for them.
    """
    estimates = []
    for method in methods_for(any(each.raw for each in snapshots)):
        try:
            solved = solve(snapshots, targets, method, device, trajectory)
        except (SnapshotError, UsageError) as error:
            problem = f"{error.subject}: {error.problem}"
            estimates.append(MethodEstimate(method, None, None, problem))
            continue
        expected = expected_error(trajectory, snapshots, targets, solved.weights)
        estimates.append(MethodEstimate(method, solved, expected))
    return estimates
