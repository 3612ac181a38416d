"""The recipe that every output carries: what it is, and which sources make it with what weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posthoc_cli import __version__
from posthoc_cli.profiles import Profile

KEY = "posthoc"
"""The key of the recipe in an output's `__metadata__`."""


def make_recipe(
    method: str,
    target: Profile,
    files: Sequence[str],
    snapshots: Sequence[Profile],
    weights: Sequence[float],
) -> dict[str, Any]:
    """The recipe of one output: `files`, `snapshots` and `weights` go together."""
    sources = [
        {"file": file, **describe(profile), "weight": float(weight)}
        for file, profile, weight in zip(files, snapshots, weights, strict=True)
    ]
    return {
        "version": __version__,
        "method": method,
        "target": describe(target),
        "sources": sources,
    }


def describe(profile: Profile) -> dict[str, float | None]:
    """A profile as JSON has it: `step`, `sigma_rel` and `gamma`; a raw checkpoint's gamma is null,
    as JSON has no infinity."""
    step = int(profile.step) if float(profile.step).is_integer() else profile.step
    gamma = None if profile.raw else profile.gamma
    return {"step": step, "sigma_rel": profile.sigma_rel, "gamma": gamma}


def read_recipe(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The recipe in a file's metadata; None when posthoc did not write the file."""
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return recipe if isinstance(recipe, dict) and "sources" in recipe else None
