"""Groups of tensors whose target is another than the rest of an output has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from posthoc_cli.errors import UsageError
from posthoc_cli.solver.profiles import Average
from posthoc_cli.solver.targets import Target, read_target

TargetFor = Mapping[str, str | float | Target] | Iterable[tuple[str, str | float | Target]]
"""Targets by a glob of tensor names, `{"*.attn.*": "sigma-rel:0.15"}`, or as pairs; a number alone
is a sigma_rel. Of several globs that fit a tensor the last counts."""


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The tensors that one of `globs` fits and none of a later group's, and their `target`.

    `tensors` is how many there are, once they are counted.
    """

    globs: tuple[str, ...]
    target: Target
    tensors: int = 0

    def profile(self, step: int) -> Average:
        """The average at the target step; raises UsageError where its length doesn't fit there."""
        try:
            return self.target.profile(step)
        except UsageError as error:
            raise _about(self.globs[0], error) from None


def make_groups(target_for: TargetFor) -> list[TensorGroup]:
    """The groups, a later one before an earlier; neighbours of one target are one group.

    A glob that is given again counts where it was given last. Raises UsageError for what is no
    target.
    """
    rules: dict[str, Target] = {}
    for glob, wanted in _pairs(target_for):
        rules.pop(glob, None)
        rules[glob] = wanted if isinstance(wanted, Target) else _read_target(glob, wanted)
    return [
        TensorGroup(tuple(glob for glob, _ in same), target)
        for target, same in groupby(rules.items(), lambda rule: rule[1])
    ]


def _pairs(target_for: TargetFor) -> list[tuple[str, str | float | Target]]:
    pairs = target_for.items() if isinstance(target_for, Mapping) else target_for
    try:
        found = [(glob, wanted) for glob, wanted in pairs]
        if all(isinstance(glob, str) for glob, _ in found):
            return found
    except (TypeError, ValueError):
        pass
    raise UsageError("target_for=", "has no globs with targets", "write {'*.attn.*': 0.15}")


def _read_target(glob: str, wanted: str | float) -> Target:
    text = str(wanted)
    try:
        return read_target(text if ":" in text else f"sigma-rel:{text}")
    except UsageError as error:
        raise _about(glob, error) from None


def _about(glob: str, error: UsageError) -> UsageError:
    return UsageError(f"target_for='{glob}'", error.problem, error.remedy)


def globs_of(groups: Sequence[TensorGroup]) -> tuple[tuple[str, ...], ...]:
    return tuple(group.globs for group in groups)
