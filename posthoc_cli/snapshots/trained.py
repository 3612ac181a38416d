"""Which step and profile a checkpoint of another tool has: what it was asked for, and what it is.

ema-pytorch and posthoc-ema update their averages at every N-th step, by the decay of one: these
have another profile than was asked for. posthoc-ema counts steps from where its averages start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError, UnknownError, UsageError
from posthoc_cli.formats import AS_USUAL, DEFAULT_UPDATE_EVERY, How, averaged_steps, effective_gamma
from posthoc_cli.snapshots.identity import Identity, identify
from posthoc_cli.snapshots.names import Pattern, read_name
from posthoc_cli.solver import Profile
from posthoc_cli.storage.metadata import COUNTED, DECAY, GAMMA, SIGMA_REL, STEP, TOOL

MAX_UPDATE_EVERY = 1_000_000


@dataclass(frozen=True, slots=True)
class Reading:
    """How names and checkpoints of a folder say steps and profiles.

    `profiles` are the sigma_rel values by index; `update_every` is the number of steps from one
    update of the averages to the next, as trained, where that is known.
    """

    pattern: Pattern | None = None
    profiles: Sequence[float] = ()
    how: How = AS_USUAL
    update_every: int | None = None

    def check(self) -> None:
        """Raise UsageError for what is out of bounds or doesn't go together."""
        tool = self.how.tool
        if self.update_every is not None:
            if not 1 <= self.update_every <= MAX_UPDATE_EVERY:
                raise UsageError(
                    "update_every=",
                    f"{self.update_every} is out of bounds",
                    "give the steps from one update of the averages to the next, from 1 on",
                )
            if tool not in ("auto", *DEFAULT_UPDATE_EVERY):
                raise UsageError("update_every=", f"doesn't go with tool='{tool}'", "leave it out")
        if self.how.key is not None and tool == "edm2":
            raise UsageError("key=", f"doesn't go with tool='{tool}'", "leave it out")


@dataclass(frozen=True, slots=True)
class Trained:
    """What is known of one checkpoint: its file's name, the tool, and the identities.

    `asked` is what the tool was asked for in training, `identity` what that became. `indexed` says
    whether its name has an index, which profiles= has the width of.
    """

    name: str
    tool: str
    asked: Identity | None
    identity: Identity | None
    indexed: bool


def identify_trained(
    name: str,
    title: str,
    metadata: Mapping[str, str],
    reading: Reading,
    doubt: SnapshotError | None = None,
) -> tuple[Trained, list[str]]:
    """The step and profile of a checkpoint by the `title` of its file, and warnings.

    `metadata` is that of its index. Raises SnapshotError when nothing says them, UnknownError where
    it may well be no average, or when something impossible is said.
    """
    tool, pattern = metadata[TOOL], reading.pattern
    doubt = doubt if pattern is None else None
    named = read_name(title, pattern, reading.profiles) if doubt is None else None
    said = dict(metadata)
    if tool == "posthoc-ema":
        if named and pattern is None:
            said[STEP] = str(named.step)
        if "sigma_rel" not in said or STEP not in said:
            said = {}
    unsure = named is not None and named.gamma is named.sigma_rel is named.decay is None
    profile = {GAMMA, SIGMA_REL, DECAY} & said.keys()
    if tool == "torch" and unsure and not (profile and STEP in said):
        raise unknown(title)
    asked, warnings = identify(title, said, pattern, reading.profiles, doubt)
    identity = asked
    if tool in DEFAULT_UPDATE_EVERY:
        step, gamma, source = asked.step, asked.gamma, asked.source
        if tool == "posthoc-ema":
            step = averaged_steps(metadata[COUNTED], step)
        if reading.update_every is not None and reading.update_every > 1:
            gamma = effective_gamma(gamma, reading.update_every)
        if gamma == gamma:
            every = reading.update_every or 1
            identity = Identity(Profile(step, gamma, every, one_step=every > 1), source)
    indexed = named is not None and named.index is not None
    return Trained(name, tool, asked, identity, indexed), warnings


def settle_trained(
    found: list[Trained],
    name: str,
    title: str,
    metadata: Mapping[str, str],
    reading: Reading,
    doubt: SnapshotError | None,
) -> tuple[Identity, list[str]]:
    """The identity by `identify_trained`, whose answer is added to `found`."""
    one, warnings = identify_trained(name, title, metadata, reading, doubt)
    assert one.identity is not None
    found.append(one)
    return one.identity, warnings


def unknown(name: str) -> UnknownError:
    return UnknownError(
        name,
        "nothing says its profile",
        "add raw=True if it is a plain checkpoint and no EMA, else give pattern= or ema_decay=, or "
        "leave it out with only=",
    )


def explanations(found: Sequence[Trained], reading: Reading, done: str = "used") -> list[str]:
    """What isn't about a single file: profiles that were not what was asked for, which is what is
    `done` with the true ones; and update_every= where it is not used."""
    told = []
    pairs = [(one.asked, one.identity) for one in found if one.asked and one.identity]
    changed = {(asked.gamma, true.gamma): (asked, true) for asked, true in pairs}
    changed = {key: both for key, both in changed.items() if key[0] != key[1] and key[0] == key[0]}
    if changed:
        truths = [
            f"sigma_rel {asked.sigma_rel:.4g} is gamma {true.gamma:.4g} in truth, "
            f"sigma_rel {true.sigma_rel:.4g}"
            for _, (asked, true) in sorted(changed.items(), reverse=True)
        ]
        tools = " and ".join(sorted({one.tool for one in found if one.asked != one.identity}))
        told.append(
            f"update_every={reading.update_every}: {tools} didn't average over the lengths asked "
            f"for ({'; '.join(truths)}); the true ones are {done}"
        )
        if min(true for _, true in changed) <= -0.5:
            told.append("of gamma -0.5 and below, only method='blup' can synthesize")
    if late := [(asked, true) for asked, true in pairs if asked.step != true.step]:
        asked, true = late[-1]
        told.append(
            f"posthoc-ema's averages started late, and count their steps from there: "
            f"step {asked.step} is their step {true.step}"
        )
    if reading.update_every is None:
        tools_here = {one.tool for one in found if one.identity}
        told += [
            f"{tool} averages with another profile than asked for unless update_every is 1, as is "
            f"taken here; its default is {default}: give update_every= as it was in training"
            for tool, default in DEFAULT_UPDATE_EVERY.items()
            if tool in tools_here
        ]
    else:
        others = [one for one in found if one.tool not in DEFAULT_UPDATE_EVERY]
        told += unused("update_every=", others, found, "no file is of a tool that needs it")
    return told


def unused(
    option: str, others: Sequence[Trained], found: Sequence[Trained], reason: str
) -> list[str]:
    """That an option is not used for `others`, of all that were found."""
    if not others and found:
        return []
    if len(others) == len(found):
        return [f"{option} isn't used: {reason}"]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return [f"{option} isn't used for '{others[0].name}'{more}, of {others[0].tool}"]
