"""The recipe that every output carries: what it is, and which sources make it with what weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posthoc_cli._version import __version__
from posthoc_cli.errors import UsageError
from posthoc_cli.formats import AS_USUAL, KINDS, How
from posthoc_cli.snapshots import Snapshot
from posthoc_cli.solver.groups import TensorGroup
from posthoc_cli.solver.targets import Target
from posthoc_cli.synthesis.products import Products, check_mode


def make_recipe(
    method: str,
    target: Target,
    step: int,
    snapshots: Sequence[Snapshot],
    weights: Sequence[float],
    fingerprints: Sequence[str],
    *,
    copied: Sequence[str] = (),
    dropped: Sequence[str] = (),
    groups: Sequence[tuple[TensorGroup, Sequence[float], Mapping[str, Any]]] = (),
    lora: object = None,
    how: How | None = None,
    errors: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The recipe of one output: its target, and each snapshot with its weight.

    `snapshots`, `weights` and `fingerprints` (see storage.readers.fingerprint) go together;
    `copied` and `dropped` are the globs of tensors that are not averaged, and left out; `groups`
    those whose tensors have weights of their own, one a source, with these and their `errors`;
    `lora` is the plan, which may be one of a LoRA's products; `how` is how checkpoints of other
    tools are read, where it isn't as usual; `errors` what errors are to be expected.
    """
    globs = {"copied": list(copied), "dropped": list(dropped)}
    return {
        "version": __version__,
        "method": method,
        "target": target.as_dict(step),
        **_rounded(errors or {}),
        **{key: value for key, value in globs.items() if value},
        **({"groups": [_describe_group(step, *group) for group in groups]} if groups else {}),
        **(
            {"lora": {"mode": "exact", "tolerance": lora.tolerance, "rank": lora.most}}
            if isinstance(lora, Products)
            else {}
        ),
        **({"read": dataclasses.asdict(how)} if how and how != AS_USUAL else {}),
        "sources": [
            {
                "file": snapshot.file,
                **_describe(snapshot),
                "weight": float(weight),
                "bytes": snapshot.bytes,
                "fingerprint": fingerprint,
            }
            for snapshot, weight, fingerprint in zip(snapshots, weights, fingerprints, strict=True)
        ],
    }


def _describe_group(
    step: int, group: TensorGroup, weights: Sequence[float], errors: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "tensors": list(group.globs),
        "target": group.target.as_dict(step),
        **_rounded(errors),
        "weights": list(weights),
    }


def _describe(snapshot: Snapshot) -> dict[str, Any]:
    """Step and profile as JSON has them: what is no finite number is null."""
    widths = {"sigma_rel": snapshot.sigma_rel, "gamma": snapshot.gamma}
    told = {key: value if math.isfinite(value) else None for key, value in widths.items()}
    return {"step": snapshot.step, **told, "profile": snapshot.profile.as_dict()}


def _rounded(errors: Mapping[str, Any]) -> dict[str, Any]:
    """Errors to four digits; null where nothing is known, as JSON has no NaN."""
    told: dict[str, Any] = {}
    for key, value in errors.items():
        if isinstance(value, Mapping):
            told[key] = _rounded(value)
        elif isinstance(value, float):
            told[key] = float(f"{value:.4g}") if math.isfinite(value) else None
        else:
            told[key] = value
    return told


def _lora(entry: Any) -> tuple[float, int | None] | None:
    if entry is None:
        return None
    try:
        tolerance, rank = float(entry["tolerance"]), entry["rank"]
        if entry["mode"] == "exact" and check_mode("exact", rank, tolerance):
            return tolerance, rank
    except (TypeError, KeyError, ValueError, UsageError):
        pass
    raise ValueError("'lora' is not known")


MAX_GLOBS = 1_000


@dataclass(frozen=True, slots=True)
class Source:
    """One source of an output, as its recipe has it; of old ones `size` is not known, nor
    `fingerprint`."""

    file: str
    step: float
    weight: float
    size: int | None
    fingerprint: str | None


@dataclass(frozen=True, slots=True)
class RecipeSources:
    """What a recipe says of how the bytes of an output come about.

    `groups` has the globs of each group of tensors (see plan.Groups), `weights` those of the
    tensors of no group and of each group: [1 + groups][sources]. `lora` are tolerance and highest
    rank, where a LoRA's products were averaged.
    """

    sources: tuple[Source, ...]
    copied: tuple[str, ...]
    dropped: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    lora: tuple[float, int | None] | None = None
    how: How = AS_USUAL


def ingredients(recipe: Mapping[str, Any]) -> RecipeSources:
    """The sources of a recipe and what is done with them; raises ValueError if it makes no sense.

    A file's path in it is one below the folder: none leads elsewhere.
    """
    sources = recipe.get("sources")
    if not isinstance(sources, list) or not sources:
        raise ValueError("it names no sources")
    read = tuple(map(_source, sources))
    groups = recipe.get("groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("'groups' is no list of objects")
    globs = tuple(_globs(group, "tensors") for group in groups)
    if sum(map(len, globs)) > MAX_GLOBS:
        raise ValueError(f"'groups' has more than {MAX_GLOBS:,} names")
    own = (_weights(group, len(read)) for group in groups)
    return RecipeSources(
        read,
        _globs(recipe, "copied"),
        _globs(recipe, "dropped"),
        globs,
        (tuple(source.weight for source in read), *own),
        _lora(recipe.get("lora")),
        _how(recipe.get("read", {})),
    )


def _how(read: Any) -> How:
    key, tool = (read.get("key"), read.get("tool")) if isinstance(read, dict) else (0, 0)
    if not isinstance(key, str | None) or tool not in (None, "auto", *KINDS):
        raise ValueError("it says not how its sources are read")
    return How(key, tool or "auto")


def _weights(group: Mapping[str, Any], count: int) -> tuple[float, ...]:
    weights = group.get("weights")
    if not isinstance(weights, list) or len(weights) != count:
        raise ValueError("a group has not one weight for each source")
    return tuple(_number(weight, "a weight of a group") for weight in weights)


def _source(entry: Any) -> Source:
    if not isinstance(entry, dict):
        raise ValueError("a source is no object")
    file, size, fingerprint = (entry.get(key) for key in ("file", "bytes", "fingerprint"))
    if not isinstance(file, str) or file in ("", ".", "..") or "\0" in file:
        raise ValueError(f"{json.dumps(file)} is no file name")
    # A drive or a backslash, where they mean anything, is not of the last part alone.
    if any(part in ("", ".", "..") or part != os.path.basename(part) for part in file.split("/")):
        raise ValueError(f"'{file}' is a path that leads out of the folder")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise ValueError(f"the bytes of '{file}' are no number")
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise ValueError(f"the fingerprint of '{file}' is no text")
    step, weight = (_number(entry.get(key), f"the {key} of '{file}'") for key in ("step", "weight"))
    return Source(file, step, weight, size, fingerprint)


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, (str, bool)) or value is None else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is no number")
    return number


def _globs(recipe: Mapping[str, Any], key: str) -> tuple[str, ...]:
    globs = recipe.get(key, [])
    if not isinstance(globs, list) or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"'{key}' is no list of names")
    if len(globs) > MAX_GLOBS:  # each is held against the name of each tensor
        raise ValueError(f"'{key}' has more than {MAX_GLOBS:,} names")
    return tuple(globs)
