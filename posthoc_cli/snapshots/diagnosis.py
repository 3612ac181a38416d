"""How far off a synthesized EMA is to be expected, for each method: what `diagnose=` shows."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.snapshots.sampling import SampleMoments, measure
from posthoc_cli.solver.blup import Trajectory, fit


def observe(
    snapshots: Sequence[Snapshot], leave_out: Sequence[str] = ()
) -> tuple[SampleMoments, Trajectory]:
    """Measure a sample of the snapshots' values, and fit how the network moved.

    `leave_out` are globs of tensors that won't be averaged. Raises what sampling.measure does.
    """
    measures = measure(snapshots, leave_out=leave_out)
    profiles = [snapshot.profile for snapshot in snapshots]
    return measures, fit(profiles, measures.differences, measures.rounding, measures.squares)
