"""What speaks against trusting the best that a search has found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from posthoc_cli.errors import percent

if TYPE_CHECKING:
    from posthoc_cli.api.tuner import Trial, Tuner
    from posthoc_cli.tuning.search import Posterior

_LENGTHS = 65


def doubts(tuner: Tuner, best: Trial, belief: Posterior) -> Iterator[str]:
    """That the best is at an edge, the curve flat, or the networks too far off: a line each."""
    if belief.flat:
        yield (
            f"the metric is flat within its noise: no {str(best.target).split()[0]} is better than "
            "others by more than chance"
        )
    elif belief.at_edge:
        yield (
            f"the best, {best.target}, lies at the edge of the range: what lies beyond may be "
            "better; a wider range= would tell"
        )
    if blurred := _blurred(tuner, best, belief):
        yield blurred


def _blurred(tuner: Tuner, best: Trial, belief: Posterior) -> str:
    """That the network may be as far from the average it stands for as those are whose metrics
    differ.

    Its expected error is a distance between networks, and so is that between the averages of two
    lengths. What the metric does over lengths as far from the best as the error is large is about
    what the error may do to it.
    """
    from posthoc_cli.solver.blup import expected_errors

    trajectory, errors = best.solution.trajectory, best.solution.expected
    if trajectory is None or errors is None or not math.isfinite(errors.total[best.at]):
        return ""
    low, high = tuner.axis.bounds
    lengths = np.geomspace(low, high, _LENGTHS).tolist()
    targets = [tuner.axis.target(each) for each in lengths]
    averages = [target.profile(best.step) for target in targets]
    exact = replace(trajectory, noise=np.zeros(1))
    own = [best.target.profile(best.step)]
    away = expected_errors(exact, own, averages, [np.ones((len(averages), 1))])[0].approximation
    near = away <= errors.total[best.at]
    mean, _ = belief.curve([tuner.point(each, best.step) for each in lengths])
    whole, part = float(np.ptp(mean)), float(np.ptp(mean[near])) if near.any() else 0.0
    if whole <= 0 or part < whole / 2:
        return ""
    ends = [target.text for target, inside in zip(targets, near, strict=True) if inside]
    return (
        f"an error of {percent(best.expected_error or 0.0)} is to be expected at {best.target}, as "
        f"far as from there to {ends[0]} and {ends[-1]}: over these the metric changes by "
        f"{part:.3g} of the {whole:.3g} found in all, so that the error may have done it"
    )
