"""How far off an EMA is to be expected by each method's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.solver.blup import ExpectedError, expected_errors
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
    found: dict[str, SolvedWeights | str] = {}
    for method in methods_for(any(each.raw for each in snapshots)):
        try:
            found[method] = solve(snapshots, targets, method, device, trajectory)
        except (SnapshotError, UsageError) as error:
            found[method] = f"{error.subject}: {error.problem}"
    several = [each.weights for each in found.values() if not isinstance(each, str)]
    expected = iter(expected_errors(trajectory, snapshots, targets, several))
    return [
        MethodEstimate(method, None, None, each)
        if isinstance(each, str)
        else MethodEstimate(method, each, next(expected))
        for method, each in found.items()
    ]
