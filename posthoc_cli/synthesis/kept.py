"""Outputs that are there already: whether they are what is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.errors import SnapshotError, UsageError, in_line
from posthoc_cli.storage import open_tensors
from posthoc_cli.storage.metadata import read_recipe

Forms = Mapping[str, tuple[str, tuple[int, ...] | None]]
"""Name -> dtype and shape of the tensors of an output; None for a shape that isn't known."""

_NAMED = 3
"""Refused outputs whose reasons a message tells."""

_ASKED = {"method": "method", "copied": "copy", "dropped": "drop", "lora": "lora", "read": "key"}
"""What else a recipe has of the call that made an output, and the argument for it."""

_SAME_WEIGHTS = 1e-3
"""Of the largest weight: devices and numbers of threads make a far smaller difference."""


def check_kept(paths: Sequence[Path], recipes: Sequence[Mapping[str, Any]], forms: Forms) -> None:
    """Raise UsageError where an output that is there isn't what it would be if it were made now.

    `recipes` are those that they would get, `forms` the tensors that each would have.
    """
    pairs = zip(paths, recipes, strict=True)
    found = [(path, why) for path, recipe in pairs if (why := _difference(path, recipe, forms))]
    if not found:
        return
    (path, why), *others = found
    told = [f"'{other.name}' {reason}" for other, reason in others[: _NAMED - 1]]
    told += [f"{len(others) - len(told)} more"] if len(others) > len(told) else []
    more = f" (nor are others: {', '.join(told)})" if told else ""
    raise UsageError(
        str(path),
        f"exists already, and isn't what is asked for: it {why}{more}",
        "use force=True to replace it, or choose another output",
    )


def _difference(path: Path, asked: Mapping[str, Any], forms: Forms) -> str:
    """How the output at `path` differs from what is `asked` for; "" if it doesn't."""
    try:
        index = open_tensors(path)
    except SnapshotError as error:
        return f"can't be read ({in_line(error.problem)})"
    made = read_recipe(index.metadata)
    if made is None:
        return "isn't posthoc's"
    try:
        if why := _other_recipe(made, json.loads(json.dumps(asked))):
            return in_line(why)
    except (AttributeError, LookupError, TypeError, ValueError):
        return "has a recipe that makes no sense"
    there = {name: (info.dtype, info.shape) for name, info in index.tensors.items()}
    if odd := there.keys() ^ forms.keys():
        name = min(odd)
        return f"has {'a' if name in there else 'no'} tensor '{in_line(name)}'"
    for name, (dtype, shape) in forms.items():
        if there[name][0] != dtype:
            return f"has '{in_line(name)}' as {there[name][0]}, not {dtype}"
        if shape is not None and there[name][1] != shape:
            return f"has '{in_line(name)}' in another shape"
    return ""


def _other_recipe(made: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """How a recipe differs from what is asked for; what an old one doesn't say is no difference."""
    if not _same_target(made["target"], asked["target"]):
        return f"is {_titled(made['target'])}, not {_titled(asked['target'])}"
    for key, argument in _ASKED.items():
        one, other = made.get(key), asked.get(key)
        if one != other:
            text = isinstance(one, str) and isinstance(other, str)
            told = f"{argument}='{one}', not '{other}'" if text else f"another {argument}="
            return f"was made with {told}"
    groups = made.get("groups", []), asked.get("groups", [])
    same = len(groups[0]) == len(groups[1]) and all(
        one["tensors"] == other["tensors"] and _same_target(one["target"], other["target"])
        for one, other in zip(*groups, strict=True)
    )
    if not same:
        return "was made with another target_for="
    if why := _other_sources(made["sources"], asked["sources"]):
        return why
    weights = [
        [[source["weight"] for source in recipe["sources"]], *(one["weights"] for one in group)]
        for recipe, group in zip((made, asked), groups, strict=True)
    ]
    for one, other in zip(*weights, strict=True):
        most = _SAME_WEIGHTS * max(map(abs, other))
        if not all(abs(a - b) <= most for a, b in zip(one, other, strict=True)):
            return f"has other weights, of version {made.get('version')}"
    return ""


def _same_target(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two targets are one average, whatever it was named by: `gamma:6.94`."""
    return _same(*({**each, "text": ""} for each in (one, other)))


def _titled(target: Mapping[str, Any]) -> str:
    return f"{target.get('text', target['kind'])} at step {target['step']}"


def _other_sources(made: Sequence[Any], asked: Sequence[Any]) -> str:
    if len(made) != len(asked):
        return f"was made of {len(made)} snapshots, not {len(asked)}"
    for one, other in zip(made, asked, strict=True):
        if any(one.get(key) not in (None, other[key]) for key in ("bytes", "fingerprint")):
            return f"was made of another '{one['file']}', or of other snapshots"
        if not all(_same(one[key], other[key]) for key in ("step", "profile") if key in one):
            return f"was made with another step or profile of '{one['file']}'"
    return ""


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are the same, but for the last digits of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) or isinstance(other, float):
        number = isinstance(one, int | float) and isinstance(other, int | float)
        return number and math.isclose(one, other)
    return bool(one == other)
