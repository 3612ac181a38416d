"""The recipe that every output carries: what it is, and which sources make it with what weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posthoc_cli._version import __version__
from posthoc_cli.solver.profiles import Profile


def make_recipe(
    method: str,
    target: Profile,
    files: Sequence[str],
    snapshots: Sequence[Profile],
    weights: Sequence[float],
    *,
    marks: Sequence[tuple[int, str]] = (),
    copied: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> dict[str, Any]:
    """The recipe of one output: `files`, `snapshots`, `weights` and, if any, `marks` go together.

    `marks` are each source's bytes and fingerprint (see `fingerprint`), `copied` and
    `dropped` the globs of tensors that are not averaged, and left out.
    """
    sources: list[dict[str, Any]] = [
        {"file": file, **describe(profile), "weight": float(weight)}
        for file, profile, weight in zip(files, snapshots, weights, strict=True)
    ]
    if marks:
        for source, (size, fingerprint) in zip(sources, marks, strict=True):
            source |= {"bytes": size, "fingerprint": fingerprint}
    globs = {"copied": list(copied), "dropped": list(dropped)}
    return {
        "version": __version__,
        "method": method,
        "target": describe(target),
        **{key: value for key, value in globs.items() if value},
        "sources": sources,
    }


def describe(profile: Profile) -> dict[str, float | None]:
    """A profile as JSON has it: `step`, `sigma_rel` and `gamma`; a raw checkpoint's gamma is null,
    as JSON has no infinity."""
    step = int(profile.step) if float(profile.step).is_integer() else profile.step
    gamma = None if profile.raw else profile.gamma
    return {"step": step, "sigma_rel": profile.sigma_rel, "gamma": gamma}


_MAX_GLOBS = 1_000


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
    """What a recipe says of how the bytes of an output come about."""

    sources: tuple[Source, ...]
    copied: tuple[str, ...]
    dropped: tuple[str, ...]


def ingredients(recipe: Mapping[str, Any]) -> RecipeSources:
    """The sources of a recipe and what is done with them; raises ValueError if it makes no sense.

    A file name in it is never more than that: no path leads elsewhere.
    """
    sources = recipe.get("sources")
    if not isinstance(sources, list) or not sources:
        raise ValueError("it names no sources")
    return RecipeSources(
        tuple(map(_source, sources)), _globs(recipe, "copied"), _globs(recipe, "dropped")
    )


def _source(entry: Any) -> Source:
    if not isinstance(entry, dict):
        raise ValueError("a source is no object")
    file, size, fingerprint = (entry.get(key) for key in ("file", "bytes", "fingerprint"))
    if not isinstance(file, str) or file in ("", ".", "..") or "\0" in file:
        raise ValueError(f"{json.dumps(file)} is no file name")
    if file != os.path.basename(file):
        raise ValueError(f"'{file}' is a path, not a file name")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise ValueError(f"the bytes of '{file}' are no number")
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise ValueError(f"the fingerprint of '{file}' is no text")
    step, weight = (_number(entry, key) for key in ("step", "weight"))
    return Source(file, step, weight, size, fingerprint)


def _number(source: Mapping[str, Any], key: str) -> float:
    value = source.get(key)
    try:
        number = math.nan if isinstance(value, (str, bool)) or value is None else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the {key} of '{source['file']}' is no number")
    return number


def _globs(recipe: Mapping[str, Any], key: str) -> tuple[str, ...]:
    globs = recipe.get(key, [])
    if not isinstance(globs, list) or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"'{key}' is no list of names")
    if len(globs) > _MAX_GLOBS:  # each is held against the name of each tensor
        raise ValueError(f"'{key}' has more than {_MAX_GLOBS:,} names")
    return tuple(globs)
