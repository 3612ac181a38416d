"""Recipes: what they say, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path

from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.solver.averages import Decay
from posthoc_cli.solver.profiles import Profile
from posthoc_cli.solver.targets import make_targets
from posthoc_cli.storage.header import read_header
from posthoc_cli.synthesis.recipe import Source, ingredients, make_recipe
from tests.support import write_layout


def test_a_recipe_is_read_as_it_was_made(tmp_path: Path) -> None:
    snapshots = []
    kinds = (Profile(100, 3.0), Decay(200, 0.0), Decay(200, 0.99))
    for name, profile in zip("abc", kinds, strict=True):
        write_layout(tmp_path / name, {"w": ("F32", (2,))})
        index = read_header(tmp_path / name)
        snapshots.append(Snapshot(index, profile, "name"))
    (target,) = make_targets(0.05)
    prints = ["ab" * 16, "cd" * 16, "ef" * 16]
    recipe = make_recipe("edm2", target, 250, snapshots, [0.1, 0.7, 0.2], prints, copied=["*.w"])
    assert "dropped" not in recipe
    power = {"kind": "power", "text": "sigma-rel:0.05"}
    assert recipe["target"] == {**power, "step": 250, "sigma_rel": 0.05, "gamma": target.gamma}
    widths = [Profile(100, 3.0).sigma_rel, 0.0, None]
    assert [source["sigma_rel"] for source in recipe["sources"]] == widths
    assert [source["gamma"] for source in recipe["sources"]] == [3.0, None, None]
    assert [source["profile"] for source in recipe["sources"]] == [
        {"kind": "power", "step": 100, "gamma": 3.0},
        {"kind": "decay", "step": 200, "beta": 0.0},
        {"kind": "decay", "step": 200, "beta": 0.99},
    ]
    read = ingredients(json.loads(json.dumps(recipe, allow_nan=False)))
    size = snapshots[0].bytes
    assert read.sources == (
        Source("a", 100, 0.1, size, prints[0]),
        Source("b", 200, 0.7, size, prints[1]),
        Source("c", 200, 0.2, size, prints[2]),
    )
    assert (read.copied, read.dropped) == (("*.w",), ())


def test_one_without_fingerprints() -> None:
    source = {"file": "a", "step": 100, "weight": 1.0}
    assert ingredients({"sources": [source]}).sources == (Source("a", 100, 1.0, None, None),)
