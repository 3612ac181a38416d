"""Doubts of what snapshots are taken for: averages that may be of another kind than is said."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

from posthoc_cli.errors import PosthocError, percent, printable
from posthoc_cli.snapshots.kinds import same_kind, width
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.solver import Decay
from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.storage.metadata import DECAY, PLACE, TOOL
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.stores import is_file, list_folder, open_file

_CALLED = re.compile(r"(?i)(?<![a-z])(?:ema|swa|shadow|polyak|averaged?)(?![a-z])")
"""What averages are called, in a path or as the key of a checkpoint."""

_AVERAGED_MODEL = "n_averaged"
"""The counter in a state dict of torch's AveragedModel."""

_BEGINNING = 0.25
"""The share of an average that the network of the first step may have at the last."""


_NOTHING = 1e-12
"""The part of the largest difference that is none."""

_PAIRS = 4
"""Neighbouring steps that it takes to see which of two averages lags."""

_CONFIGURATION = re.compile(
    r"(?i)(?:(?:train(?:ing|er)?|model|run)?[-_]?(?:args|config|hparams)|hyperparam(?:eter)?s)"
    r"\.(?:json|toml|ya?ml)"
)
"""What training keeps its settings in: timm's args.yaml, Lightning's hparams.yaml."""

_KEY = r"(?:decay|rate|beta)['\"]?\s*[:=]\s*['\"]?(0?\.[0-9]{1,20})(?![0-9])"
_SAYS = re.compile(rf"(?i)(?<![a-z])ema(?:_|['\"]?\s*[:=]\s*\{{[^}}]{{0,200}}?\b){_KEY}")
_HEADS = re.compile(
    r"(?i)\s*['\"]?(?:\w+_)?ema(?:_\w+)?['\"]?\s*[:=]?\s*\{?\s*|\s*\[(?:.*\.)?ema\]\s*"
)
_BELOW = re.compile(rf"(?i)\s*['\"]?{_KEY}")
"""`model_ema_decay: 0.9998`, `ema: {decay: 0.999}`, and a `decay` in the lines below `ema:`."""

_LINES = 10
"""Below such a heading."""

_LONGEST = 1 << 18
"""Bytes of a configuration that are looked at."""


def doubts_of_kinds(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, str]]:
    """What makes one doubt that snapshots are the raw checkpoints, or of the decay, that is said.

    The first file of each doubt, and the doubt.
    """
    called = [each for each in snapshots if each.profile.raw and _called_average(each)]
    if called:
        more = f", and so are {len(called) - 1} more" if called[1:] else ""
        yield (
            called[0].file,
            f"is called an average{more}, and taken for a raw checkpoint: of EMAs say ema_decay=, "
            "else the result is an average of averages",
        )
    fixed = [each for each in snapshots if isinstance(each.profile, Decay) and not each.profile.raw]
    if unsaid := [each for each in fixed if DECAY not in each.index.metadata]:
        last = max(unsaid, key=lambda each: each.step)
        beta = getattr(last.profile, "beta", 0.0)
        if (share := beta**last.step) > _BEGINNING:
            yield (
                last.file,
                f"at step {last.step}, {percent(share)} of an EMA of decay {beta:g} is to be "
                "expected to be the network that training began with: are steps counted in "
                "something else? The decay is that from one step to the next",
            )
    tool = [each for each in fixed if each.index.metadata.get(TOOL) == "ema-pytorch"]
    if tool:
        yield (
            tool[0].file,
            "ema-pytorch updates an EMA every 10 steps unless told otherwise, by its beta: then "
            "ema_decay= is beta to the power of 1/10",
        )


def other_decays(folder: Path, snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, str]]:
    """Where a configuration of the training, in the folder or the one above, says another decay
    than the snapshots are taken for."""
    betas = {getattr(each.profile, "beta", 0.0) for each in snapshots} - {0.0}
    if not betas or isinstance(folder, Url):
        return
    for path in _configurations(folder):
        with contextlib.suppress(PosthocError):
            with open_file(path) as (file, _):
                text = file.read(_LONGEST).decode(errors="replace")
            said = sorted({each for each in _decays(text) if 0.5 <= each < 1})
            if said and not any(math.isclose(1 - a, 1 - b) for a in betas for b in said):
                named = " and ".join(f"{beta:g}" for beta in sorted(betas))
                which = " or ".join(f"{value:g}" for value in said)
                yield (
                    "",
                    f"'{printable(path.name)}' says an EMA's decay of {which}, and snapshots are "
                    f"taken for EMAs of {named}",
                )


def doubts_of_values(
    snapshots: Sequence[Snapshot], differences: FloatArray
) -> Iterator[tuple[str, str]]:
    """What the values tell against the steps and profiles: copies, and widths mixed up.

    `differences` [snapshots, snapshots] are mean squares.
    """
    if len({each.step for each in snapshots}) < 2:
        return
    same = differences <= _NOTHING * differences.max(initial=0.0)
    pairs = [(int(i), int(j)) for i, j in zip(*same.nonzero(), strict=True) if i < j]
    across = [pair for pair in pairs if not same_kind(*(snapshots[at].profile for at in pair))]
    if len(across) <= _PAIRS:  # of a network that has hardly moved yet
        pairs = [pair for pair in pairs if pair not in across]
    if pairs:
        one, other = (snapshots[at].file for at in pairs[0])
        copies = len({j for _, j in pairs})
        more = f", and {copies - 1} more such" if copies > 1 else ""
        yield (
            other,
            f"holds the same values as '{one}'{more}: a copy, or did training stand still? "
            "(exclude= chooses)",
        )
    for narrow, wide in combinations(_by_width(snapshots), 2):
        steps = sorted(narrow.keys() & wide.keys())
        # What is wide lags behind: it is nearer to what was narrow at the step before.
        near = [float(differences[narrow[a], wide[b]]) for a, b in pairwise(steps)]
        far = [float(differences[wide[a], narrow[b]]) for a, b in pairwise(steps)]
        wrong = sum(one > other for one, other in zip(near, far, strict=True))
        if len(near) >= _PAIRS and wrong >= 0.8 * len(near) and sum(near) > 1.1 * sum(far):
            first, second = (snapshots[each[steps[-1]]].file for each in (narrow, wide))
            yield (
                first,
                f"should lag less behind training than '{second}', and lags more, as at other "
                "steps: are their profiles mixed up?",
            )


def _by_width(snapshots: Sequence[Snapshot]) -> list[dict[int, int]]:
    """The places of the snapshots of each profile by step, the narrowest profile first."""
    kinds: list[dict[int, int]] = []
    for at, each in sorted(enumerate(snapshots), key=lambda pair: width(pair[1].profile)):
        for places in kinds:
            if same_kind(snapshots[next(iter(places.values()))].profile, each.profile):
                places[each.step] = at
                break
        else:
            kinds.append({each.step: at})
    last = max((each.step for each in snapshots), default=0)
    return sorted(
        kinds,
        key=lambda places: width(
            replace(snapshots[next(iter(places.values()))].profile, step=last)
        ),
    )


def _decays(text: str) -> Iterator[float]:
    """The decays of EMAs that a configuration says, in YAML, JSON, TOML or Python."""
    lines = [line[:200] for line in text.splitlines()]
    for at, line in enumerate(lines):
        yield from map(float, _SAYS.findall(line))
        if _HEADS.fullmatch(line):
            inside = len(line) - len(line.lstrip()) + (not line.lstrip().startswith("["))
            for below in lines[at + 1 : at + 1 + _LINES]:
                if len(below) - len(below.lstrip()) < inside or below.lstrip().startswith("["):
                    break
                if match := _BELOW.match(below):
                    yield float(match[1])


def _configurations(folder: Path) -> Iterator[Path]:
    for place in (folder, folder.absolute().parent):
        with contextlib.suppress(PosthocError):
            names = [name for name in list_folder(place) if _CONFIGURATION.fullmatch(name)]
            yield from (place / name for name in sorted(names) if is_file(place / name))
        if is_file(place / ".hydra" / "config.yaml"):
            yield place / ".hydra" / "config.yaml"


def _called_average(snapshot: Snapshot) -> bool:
    index = snapshot.index
    if DECAY in index.metadata:  # it says itself that it is raw
        return False
    names = (snapshot.file, index.files[0].path.name, index.metadata.get(PLACE, ""))
    return _AVERAGED_MODEL in index.tensors or any(map(_CALLED.search, names))
