"""An output and its snapshots in, what is wrong with it out: its recipe is followed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import IncompleteError, SnapshotError, UsageError
from posthoc_cli.formats import is_there, open_network
from posthoc_cli.snapshots.lora import without_rank
from posthoc_cli.snapshots.wrappers import agree_on_names
from posthoc_cli.storage import (
    Cache,
    TensorIndex,
    TensorInfo,
    fingerprint,
    fits_any,
    index_path,
    open_tensors,
)
from posthoc_cli.storage.dtypes import FLOATS, OUTPUT_DTYPES, UNAVERAGEABLE
from posthoc_cli.storage.manifest import read_manifest
from posthoc_cli.storage.metadata import read_recipe
from posthoc_cli.storage.readers import of_each
from posthoc_cli.storage.stores import exists, file_status, is_folder, will_open
from posthoc_cli.synthesis.comparison import ANEW, Problem, Progress, compare, names_in_order
from posthoc_cli.synthesis.plan import TensorPlan, newest_of, plan_tensors
from posthoc_cli.synthesis.product_check import compare_products, written_ranks
from posthoc_cli.synthesis.products import Products, make_products
from posthoc_cli.synthesis.recipe import RecipeSources, Source, ingredients

_REMEDY = "give a file or folder that synthesize wrote"

Form = tuple[str, tuple[int, ...]]
"""The dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found: `compared` of the output's `values`, a complex number counting as two.

    Of its `sources`, `known` could be told to be the very files it was made of, or not. `rounded`
    values are not the nearest to the sum, but within the contract, as those made on a GPU may be.
    `output` is the file itself, the index of its shards, or the folder.
    """

    sources: int
    known: int
    tensors: int
    values: int
    compared: int
    rounded: int
    problems: list[Problem]
    output: Path = field(default=Path(), compare=False)


def find_output(path: Path) -> TensorIndex:
    """Open the output at `path`: a file, the shards that it became, or a folder.

    Raises UsageError when there is neither, and what `open_tensors` raises.
    """
    if not exists(path) and exists(index_path(path)):
        path = index_path(path)
    if file_status(path) is None:
        raise UsageError(str(path), "there is no such file", _REMEDY)
    try:
        return open_tensors(path)
    except IncompleteError:
        raise
    except SnapshotError as error:  # whose remedy is for a snapshot
        raise SnapshotError(error.subject, error.problem, _REMEDY) from None


def verify(
    out: TensorIndex,
    folder: Path | None = None,
    *,
    full: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check that the sources of an output are what they were, and that it is what they give.

    `folder` is where the sources lie, by default beside the output. A sample of the values is
    compared, some of every tensor unless there are thousands; with `full` all of them, in constant
    memory. With a problem in the sources, or in the tensors' names, shapes and dtypes, no value is.

    Raises UsageError when `folder` isn't there or must be given; SnapshotError for an output
    without a recipe, or whose recipe makes no sense, and when a file changes meanwhile;
    MachineError when one can't be read.
    """
    recipe = _ingredients(out)
    folder = _folder(out, folder, recipe)
    sources, problems = _open_sources(folder, recipe)
    known = sum(source.fingerprint is not None for source in recipe.sources)
    problems += _wrong_copies(out.path)
    report = Report(len(recipe.sources), known, len(out.tensors), 0, 0, 0, problems, out.path)
    if problems:
        return report
    (out, *sources), _ = agree_on_names([out, *sources])
    newest = newest_of([int(source.step) for source in recipe.sources])
    problems = _other_tensors(sources, sources[newest], recipe)
    problems = problems or _wrong_tensors(out, sources[newest], recipe)
    if problems:
        return dataclasses.replace(report, problems=problems)
    found, problems = _find_plan(out, sources, newest, recipe)
    products, plan = (found, found.plan) if isinstance(found, Products) else (None, found)
    values = sum(segment.elements for segment in plan.segments)
    if products is not None:
        names = [name for pair in products.pairs for name in pair.names]
        values += sum(out.tensors[name].elements for name in names)
    report = dataclasses.replace(report, values=values, problems=problems)
    if problems:
        return report
    weights = np.array(recipe.weights)[:, None]  # [groups, one target, sources]
    parts = [compare(plan, weights, out, full=full, workers=workers, progress=progress)]
    if products is not None:
        parts.append(compare_products(products, weights, out, full=full))
    return dataclasses.replace(
        report,
        compared=sum(part.compared for part in parts),
        rounded=sum(part.rounded for part in parts),
        problems=[problem for part in parts for problem in part.problems],
    )


# The recipe and its sources


def _ingredients(out: TensorIndex) -> RecipeSources:
    recipe = read_recipe(out.metadata)
    if recipe is None:
        raise SnapshotError(
            str(out.path),
            "posthoc didn't make it: it carries no recipe",
            _REMEDY,
        )
    try:
        return ingredients(recipe)
    except ValueError as error:
        raise _senseless(out, error) from None


def _folder(out: TensorIndex, folder: Path | None, recipe: RecipeSources) -> Path:
    if folder is None:
        beside = out.path.parent
        if not any(exists(beside / source.file) for source in recipe.sources):
            raise UsageError(
                "FOLDER", f"no snapshot of {out.path} lies beside it", "give the snapshots' folder"
            )
        return beside
    if not is_folder(folder):
        problem = "is not a folder" if exists(folder) else "there is no such folder"
        raise UsageError(str(folder), problem, "give the folder of the snapshots")
    return folder


def _open_sources(folder: Path, recipe: RecipeSources) -> tuple[list[TensorIndex], list[Problem]]:
    layouts: list[TensorIndex] = []
    problems: list[Problem] = []
    headers: Cache = {}
    will_open([folder / source.file for source in recipe.sources])
    stated: dict[int, Source] = {}
    for source in recipe.sources:
        path = folder / source.file
        if not is_there(path):
            remedy = "give the folder that has all the snapshots it was made of"
            problems.append(Problem(path, "is not there", remedy))
            continue
        try:
            layouts.append(open_network(path, recipe.how, headers))
            stated[id(layouts[-1])] = source
        except SnapshotError as error:
            problems.append(Problem(path, error.problem, error.remedy))

    def check(layout: TensorIndex) -> Problem | None:
        source = stated[id(layout)]
        path = folder / source.file
        try:
            same = source.size in (None, layout.size)
            if same and source.fingerprint is not None:
                same = source.fingerprint == fingerprint(layout)
        except SnapshotError as error:
            return Problem(path, error.problem, error.remedy)
        remedy = "put that one in its place, or synthesize the output anew"
        problem = "is not the file that the output was made of"
        return None if same else Problem(path, problem, remedy)

    problems += filter(None, of_each(layouts, check))
    order = {folder / source.file: at for at, source in enumerate(recipe.sources)}
    return layouts, sorted(problems, key=lambda each: order[each.path])


def _other_tensors(
    sources: Sequence[TensorIndex], newest: TensorIndex, recipe: RecipeSources
) -> list[Problem]:
    """The sources whose tensors are not those of the newest, as far as they were averaged; they
    can't be its own any more."""
    settled = (*recipe.copied, *recipe.dropped)

    def shape_of(name: str, info: TensorInfo) -> tuple[int, ...]:
        return without_rank(name, info.shape) if recipe.lora else info.shape

    def averaged(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            name: ("float" if info.dtype in FLOATS else info.dtype, shape_of(name, info))
            for name, info in tensors.items()
            if not fits_any(name, settled)
        }

    wanted = averaged(newest.tensors)
    same = {id(newest.tensors): True}
    problems = []
    for source in sources:
        key = id(source.tensors)
        if key not in same:
            same[key] = averaged(source.tensors) == wanted
        if not same[key]:
            problem = f"has other tensors than '{newest.path.name}'"
            problems.append(Problem(source.path, problem, "put the right file in its place"))
    return problems


def _wrong_copies(out: Path) -> list[Problem]:
    """What is wrong with the files that were copied into an output that is a folder."""
    manifest = read_manifest(out)
    problems = []
    for entry in manifest["copied"] if manifest else ():
        status = file_status(out / entry["file"])
        if status is None:
            problems.append(Problem(out / entry["file"], "is not there", ANEW))
        elif status.size != entry["bytes"]:
            problem = f"has {status.size:,} bytes, not the {entry['bytes']:,} that were copied"
            problems.append(Problem(out / entry["file"], problem, ANEW))
    return problems


# The output's tensors


def _wrong_tensors(out: TensorIndex, newest: TensorIndex, recipe: RecipeSources) -> list[Problem]:
    source = newest.tensors
    problems = [
        Problem(out.path, "is not in its snapshots", ANEW, name)
        for name in names_in_order(out)
        if name not in source
    ]
    # Older recipes don't say what was dropped.
    if any(each.fingerprint is not None for each in recipe.sources):
        problems += [
            Problem(out.path, "is missing", ANEW, name)
            for name in source
            if name not in out.tensors and not fits_any(name, recipe.dropped)
        ]
    if not problems and not out.tensors:
        problems.append(Problem(out.path, "holds no tensors", ANEW))
    return problems


def _find_plan(
    out: TensorIndex, sources: Sequence[TensorIndex], newest: int, recipe: RecipeSources
) -> tuple[TensorPlan | Products, list[Problem]]:
    """The plan by which the output was made, and those of its tensors that don't fit it.

    Recipes don't say the dtype: it is the one that fits best.
    """
    copied = {
        name
        for name, info in sources[newest].tensors.items()
        if info.dtype in UNAVERAGEABLE or fits_any(name, recipe.copied)
    }
    there = {name: (info.dtype, info.shape) for name, info in out.tensors.items()}
    names = names_in_order(out)
    best: tuple[TensorPlan | Products, Mapping[str, Form], list[str]] | None = None
    for dtype in ("same", *OUTPUT_DTYPES):
        plan: TensorPlan | Products
        if recipe.lora is None:
            plan = plan_tensors(sources, newest, names, copied, dtype, recipe.groups)
            tensors = plan.tensors
        else:
            plan = _products(out, sources, newest, recipe, dtype)
            tensors = plan.tensors(written_ranks(plan, out))
        wrong = [name for name in names if there[name] != tensors.get(name, there[name])]
        if best is None or len(wrong) < len(best[2]):
            best = plan, tensors, wrong
        if not wrong:
            break
    assert best is not None
    plan, tensors, wrong = best
    return plan, [
        Problem(
            out.path,
            f"is {_form(there[name])} and should be {_form(tensors[name])}",
            ANEW,
            name,
        )
        for name in wrong
    ]


def _products(
    out: TensorIndex,
    sources: Sequence[TensorIndex],
    newest: int,
    recipe: RecipeSources,
    dtype: str,
) -> Products:
    assert recipe.lora is not None
    tolerance, most = recipe.lora
    how: dict[str, Any] = {"copy": recipe.copied, "drop": recipe.dropped, "dtype": dtype}
    how["groups"] = recipe.groups
    try:
        return make_products(sources, newest, tolerance=tolerance, most=most, **how)
    except UsageError as error:
        raise _senseless(out, error.problem) from None


def _senseless(out: TensorIndex, why: object) -> SnapshotError:
    problem = f"its recipe doesn't make sense ({why})"
    return SnapshotError(str(out.path), problem, "synthesize it anew")


def _form(tensor: Form) -> str:
    return f"{tensor[0]} {list(tensor[1])}"
