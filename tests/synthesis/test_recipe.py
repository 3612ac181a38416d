"""Recipes: what they say, and how they are read."""

from __future__ import annotations

import json

from posthoc_cli.solver.profiles import Profile
from posthoc_cli.synthesis.recipe import Source, ingredients, make_recipe


def test_a_recipe_is_read_as_it_was_made() -> None:
    profiles = [Profile(100, 3.0), Profile(200, float("inf"))]
    marks = [(12, "ab" * 16), (13, "cd" * 16)]
    recipe = make_recipe(
        "edm2", Profile(150, 4.0), ["a", "b"], profiles, [0.1, 0.9], marks=marks, copied=["*.w"]
    )
    assert "dropped" not in recipe
    read = ingredients(json.loads(json.dumps(recipe, allow_nan=False)))
    assert read.sources == (
        Source("a", 100, 0.1, 12, "ab" * 16),
        Source("b", 200, 0.9, 13, "cd" * 16),
    )
    assert (read.copied, read.dropped) == (("*.w",), ())


def test_one_without_marks() -> None:
    recipe = make_recipe("edm2", Profile(150, 4.0), ["a"], [Profile(100, 3.0)], [1.0])
    assert set(recipe) == {"version", "method", "target", "sources"}
    assert ingredients(recipe).sources == (Source("a", 100, 1.0, None, None),)
