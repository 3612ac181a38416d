"""What one file says of the average in it, by the first of its sources that says it.

The caller's pattern; metadata, or a config.json beside it; its name; and what the caller says of
all files that say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posthoc_cli.errors import SnapshotError, UnknownError, UsageError
from posthoc_cli.formats import DEFAULT_UPDATE_EVERY
from posthoc_cli.snapshots.identity import Identity, check_profiles, stated_profile
from posthoc_cli.snapshots.names import Pattern, compile_pattern, read_decay
from posthoc_cli.snapshots.raw import RAW, StepCounts, says_profile, step_counts
from posthoc_cli.snapshots.schedules import read_config, stated_schedule
from posthoc_cli.solver import Average, Decay
from posthoc_cli.storage import TensorIndex
from posthoc_cli.storage.metadata import EPOCH, PLACE, TOOL, UPDATES

_OF_EMA = {"inv_gamma", "use_ema_warmup", "update_after_step", UPDATES}
"""Keys of a config.json that say a schedule of an EMA's decay."""

_EMA = re.compile(r"(?i)(?<![a-z])ema(?![a-z])")


@dataclass(frozen=True, slots=True)
class Telling:
    """What the caller says: `profiles` are the sigma_rel values by index.

    Files that nothing says a profile of are raw checkpoints with `raw`, EMAs of a fixed decay a
    step with `ema_decay`; with both, those are EMAs that are called `ema`.
    """

    pattern: Pattern | None = None
    profiles: Sequence[float] = ()
    raw: bool = False
    ema_decay: float | None = None

    @property
    def of_all(self) -> bool:
        """Whether it says what files are that say nothing."""
        return self.raw or self.ema_decay is not None


def tell(
    pattern: str | None, profiles: Sequence[float] | None, raw: bool, ema_decay: float | None
) -> Telling:
    """The same, checked. Raises UsageError."""
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise UsageError(
            "ema_decay=", f"{ema_decay:g} is out of bounds", "give a decay a step, such as 0.9999"
        )
    of_all = raw or ema_decay is not None
    compiled = compile_pattern(pattern, of_all) if pattern is not None else None
    return Telling(compiled, () if of_all else check_profiles(profiles, compiled), raw, ema_decay)


def listen(
    path: str,
    called: str,
    index: TensorIndex,
    told: Telling,
    settle: Callable[[], tuple[Identity, list[str]]],
    doubt: SnapshotError | None = None,
    *,
    plain: bool = False,
    own_folder: bool = False,
) -> StepCounts | tuple[Identity, list[str]]:
    """The average in the file at `path`, with warnings; or what is to be read with the others.

    `called` is the name that says it, `doubt` why it can't be believed; `settle` is what identifies
    an average by pattern, metadata or name alone; `plain`: its name is that of a raw checkpoint;
    `own_folder`: a config.json beside it is its own. Raises SnapshotError.
    """
    metadata: Mapping[str, str] = index.metadata
    path = f"{path}/{metadata[PLACE]}" if PLACE in metadata else path
    if told.pattern is not None and not told.of_all:
        return settle()
    config: dict[str, Any] = {}
    schedule = stated_schedule(metadata)
    if schedule is None and own_folder:
        config = read_config(index.files[0].path.parent)
        # A training's own config may have a decay and a power of something else.
        schedule = stated_schedule(config) if _OF_EMA & config.keys() else None
    name = None if isinstance(doubt, UnknownError) else called
    known: Average | None = schedule[0] if schedule else None
    if known is None and told.pattern is None and says_profile(name, metadata, told.of_all):
        return settle()
    if known is None and told.of_all and metadata.get(TOOL) not in DEFAULT_UPDATE_EVERY:
        known = stated_profile(metadata)
    known = known or _decay(path, told, plain)
    if known is None:  # says what is missing
        return settle()
    counts = step_counts(called, index.metadata, told.pattern)
    if not known.raw and _are_epochs(counts, metadata.get(EPOCH)):
        counts = replace(counts, steps={"epoch": (int(metadata[EPOCH]), "metadata", "epoch")})
    updates = schedule[1] if schedule else None
    if updates is not None and not counts.steps:
        counts = replace(counts, steps={"step": (updates, "config", "config.json")})
    return replace(counts, known=known, updates=updates, source="config" if config else None)


def _are_epochs(counts: StepCounts, epoch: str | None) -> bool:
    """Whether a name's number, of no unit, is the epoch that its checkpoint says."""
    if epoch is None or "step" in counts.steps or "number" not in counts.steps:
        return False
    return abs(counts.steps["number"][0] - int(epoch)) <= 1


def _decay(path: str, told: Telling, plain: bool) -> Decay | None:
    """The EMA of fixed decay, or raw checkpoint, that a path is of; at step 1."""
    if (named := read_decay(path)) is not None:
        return Decay(1, named)
    if not plain and told.ema_decay is not None and (not told.raw or _EMA.search(path)):
        return Decay(1, told.ema_decay)
    return RAW if plain or told.of_all else None
