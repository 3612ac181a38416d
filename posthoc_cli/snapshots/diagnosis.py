"""How far off a synthesized EMA is to be expected, for each method: what `diagnose=` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.snapshots.sampling import SampleMoments, measure
from posthoc_cli.solver.blup import ExpectedError, Trajectory, expect, fit
from posthoc_cli.solver.methods import EMA_METHODS, RAW_METHODS, Solution, solve
from posthoc_cli.solver.profiles import Profile


@dataclass(frozen=True, slots=True)
class MethodEstimate:
    """One method's weights and their expected errors; or the `problem` why it has none."""

    method: str
    solution: Solution | None
    expected: ExpectedError | None
    problem: str = ""


def observe(
    snapshots: Sequence[Snapshot], leave_out: Sequence[str] = ()
) -> tuple[SampleMoments, Trajectory]:
    """Measure a sample of the snapshots' values, and fit how the network moved.

    `leave_out` are globs of tensors that won't be averaged. Raises what sampling.measure does.
    """
    measures = measure(snapshots, leave_out=leave_out)
    profiles = [snapshot.profile for snapshot in snapshots]
    return measures, fit(profiles, measures.differences, measures.rounding, measures.squares)


def compare(
    snapshots: Sequence[Profile],
    targets: Sequence[Profile],
    trajectory: Trajectory,
    device: str = "cpu",
) -> list[MethodEstimate]:
    """Every method's weights for the targets, with their expected errors.

    Of raw checkpoints, those of the methods for them.
    """
    verdicts = []
    for method in RAW_METHODS if any(each.raw for each in snapshots) else EMA_METHODS:
        try:
            solution = solve(snapshots, targets, method, device, trajectory)
        except (SnapshotError, UsageError) as error:
            verdicts.append(MethodEstimate(method, None, None, f"{error.subject}: {error.problem}"))
            continue
        expected = expect(trajectory, snapshots, targets, solution.weights)
        verdicts.append(MethodEstimate(method, solution, expected))
    return verdicts
