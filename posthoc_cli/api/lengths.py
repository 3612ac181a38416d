"""Which lengths and steps a search looks at, and what tells its snapshots from others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from posthoc_cli.api.solution import Solution
from posthoc_cli.errors import SnapshotError, UsageError, percent
from posthoc_cli.solver.targets import Target, make_target
from posthoc_cli.tuning.axis import Axis, length_of

if TYPE_CHECKING:
    from posthoc_cli.api.run import Run

_MOST_STEPS = 32


def reached(
    parameter: str, step: int, max_error: float, solve: Callable[[Sequence[Target], int], Solution]
) -> Axis:
    """The widest range of lengths whose expected errors are at most `max_error`.

    Raises SnapshotError where there is none, UsageError where no errors can be expected.
    """
    targets = _scanned(parameter, step)
    solution = solve(targets, step)
    errors = solution.expected_error
    if errors is None:
        problem = f"no error can be expected ({solution.doubt or 'no values to compare'})"
        raise UsageError("range=", problem, "give one, such as range='0.02:0.25'")
    good = [bool(error <= max_error) for error in errors]
    ends = [at for at, one in enumerate(good) if one != (at > 0 and good[at - 1])]
    ends += [len(good)] if len(ends) % 2 else []
    spans = [(targets[a], targets[b - 1]) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    low, high = max(
        spans, key=lambda span: length_of(span[1]) / length_of(span[0]), default=(None, None)
    )
    if low is None or high is None or low == high:
        known = np.where(np.isnan(errors), math.inf, errors)
        least = f"{percent(float(known.min()))} at {targets[int(known.argmin())]}"
        raise SnapshotError(
            str(solution.run.folder),
            f"no range of lengths has an expected error of at most {percent(max_error)} (the least "
            f"is {least})",
            "give a larger max_error=, or a range=",
        )
    return Axis(parameter, low, high)


def _scanned(parameter: str, step: int) -> list[Target]:
    """Lengths of which it is looked whether the snapshots reach them, in a row."""
    if parameter == "sigma_rel":
        lengths = np.geomspace(0.005, 0.28, 61)
        return _distinct(make_target(parameter, float(f"{each:.3g}")) for each in lengths)
    shares = np.geomspace(min(max(0.1, 101 / step), 50), 100, 61)
    if parameter == "decay":
        betas = (-math.expm1(-math.log(2) / (each * step / 100)) for each in shares)
        return _distinct(make_target(parameter, 1 - float(f"{beta:.3g}")) for beta in betas)
    return _distinct(make_target(parameter, f"{each:.3g}%") for each in shares)


def _distinct(targets: Iterable[Target]) -> list[Target]:
    return list(dict.fromkeys(targets))


def searched_steps(run: Run, last: int) -> tuple[int, ...]:
    """The steps that are searched: the snapshots' in the second half, thinned where very many.

    Raises UsageError where there are no two.
    """
    steps = sorted({each.step for each in run.snapshots if last / 2 <= each.step <= last})
    if len(steps) < 2:
        problem = f"no two snapshots are of different steps from {math.ceil(last / 2)} to {last}"
        raise UsageError("also=", problem, "leave it out")
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_STEPS)).round())
    return tuple(steps[int(at)] for at in kept)


def identity(run: Run, step: int) -> str:
    """What tells these snapshots, and how they are read, from others: 32 hex digits."""
    from posthoc_cli.storage.readers import fingerprints

    digest = hashlib.sha256()
    snapshots = run.until(step)[0]
    known = fingerprints([snapshot.index for snapshot in snapshots])  # of a store's many at once
    for each, snapshot in zip(known, snapshots, strict=True):
        digest.update(f"{each} {snapshot.profile.as_dict()}\n".encode())
    return digest.hexdigest()[:32]
