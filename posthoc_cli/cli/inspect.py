"""`posthoc inspect`: what a folder of snapshots holds, or what a file was made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    counted,
    describe_warnings,
    in_short,
    plain_table,
    print_json,
    print_table,
    stdout_console,
    warn,
    warning_lines,
)
from posthoc_cli.cli.drawing import Row, draw_readings, draw_weights, kind_columns
from posthoc_cli.cli.folders import describe_manifest, draw_manifests
from posthoc_cli.cli.lora import lora_row
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.cli.suggestions import suggest
from posthoc_cli.cli.tables import Column, Columns, shortened
from posthoc_cli.errors import SnapshotError, UsageError, in_bytes, percent, printable

if TYPE_CHECKING:
    from rich.console import Console

    from posthoc_cli.api import Run
    from posthoc_cli.snapshots.folder import Snapshot
    from posthoc_cli.solver import Average
    from posthoc_cli.storage import TensorIndex


@options.with_options
def inspect(
    reading: options.Reading,
    folder: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER",
            help="The folder of snapshots, or files and folders in it, by shell glob; or a single "
            "output, to see what it is made of.",
            show_default=False,
        ),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Of a file's recipe, show negligible weights too.")
    ] = False,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Show the snapshots in FOLDER: the step and profile of each, and what is wrong with any.

    It reads the files' headers only. Given an output of posthoc, it shows the recipe: the target,
    and each source with its weight. With problems the exit code is 3.

    \b
    Examples:
      posthoc inspect snapshots
      posthoc inspect snapshots --json
      posthoc inspect snapshots --only '*0.050*'
      posthoc inspect checkpoints --raw
      posthoc inspect ema-0.07.safetensors
    """
    from posthoc_cli.formats import without_ending
    from posthoc_cli.storage import index_of_shard, is_output
    from posthoc_cli.storage.places import place
    from posthoc_cli.storage.stores import is_file

    path = place(folder[0])
    if len(folder) == 1 and is_output(path):
        _show_output(path, *_read_recipe(path), everything, as_json)
        return
    opened = options.open_folder(folder, reading)
    single = len(folder) == 1 and is_file(path)
    if single:
        path = index_of_shard(path) or path  # of a shard, that of which it is a part
        # A snapshot has no recipe: then the file, which may be large, isn't read again.
        other = opened.snapshots or without_ending(path.name) is not None
        layout, recipe = (None, None) if other else _read_recipe(path)
        if layout is not None and recipe is not None:
            _show_output(path, layout, recipe, everything, as_json)
            return
    read = partial(options.open_folder, folder)
    suggestion = suggest(folder[0], reading, opened, read) if len(folder) == 1 else None
    warn(warning_lines(opened.warnings), quiet)
    if as_json:
        document = describe(opened) | {"suggestion": suggestion}
        if single:
            document["recipe"] = None
        print_json(document)
    else:
        _draw(stdout_console(), opened)
        if suggestion:
            print(f"\nThis would work\n  {suggestion}")
    if opened.problems:
        raise SnapshotError(
            folder[0] if len(folder) == 1 else str(opened.folder),
            counted(len(opened.problems), "problem") + " found",
            "the list of problems says what to do about each",
        )


def describe(run: Run) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    return {
        "folder": str(run.folder),
        "snapshots": [
            {
                "file": snapshot.file,
                "step": snapshot.step,
                "sigma_rel": snapshot.sigma_rel,
                "gamma": snapshot.gamma,
                "profile": snapshot.profile.as_dict(),
                "dtypes": snapshot.dtypes,
                "tensors": snapshot.tensors,
                "parameters": snapshot.parameters,
                "bytes": snapshot.bytes,
                "source": snapshot.source,
                "encoding": "delta" if snapshot.chain else None,
                "chain": list(snapshot.chain),
            }
            for snapshot in run.snapshots
        ],
        "skipped": [{"file": file, "reason": spelled(text)} for file, text in run.skipped],
        "problems": [{"file": file, "message": spelled(text)} for file, text in run.problems],
        "warnings": describe_warnings(run.warnings),
    }


# A folder


def _draw(console: Console, run: Run) -> None:
    if run.snapshots:
        _draw_snapshots(console, run.snapshots)
    for heading, entries, style in (
        ("Skipped", run.skipped, "dim"),
        ("Problems", run.problems, "red"),
    ):
        if entries:
            console.print(f"\n{heading}" if run.snapshots else heading, style="bold")
        for file, text in entries:
            console.print(
                f"  {printable(file)}: {printable(spelled(text))}", style=style, soft_wrap=True
            )
    for error in run.contents.ambiguous:
        draw_readings(console, error)


def _draw_snapshots(console: Console, snapshots: Sequence[Snapshot]) -> None:
    kinds = [snapshot.profile for snapshot in snapshots]
    columns = [
        Column("file", [printable(snapshot.file) for snapshot in snapshots], right=False),
        Column("step", [str(snapshot.step) for snapshot in snapshots]),
        *(Column(heading, texts) for heading, texts in kind_columns(kinds, kinds).items()),
        Column("dtype", ["+".join(snapshot.dtypes) for snapshot in snapshots], right=False),
        Column("stored as", [_stored(snapshot) for snapshot in snapshots], right=False),
        Column("tensors", [f"{snapshot.tensors:,}" for snapshot in snapshots]),
        Column("parameters", [in_short(snapshot.parameters) for snapshot in snapshots]),
        Column("size", [in_bytes(snapshot.bytes) for snapshot in snapshots]),
        Column("source", [snapshot.source for snapshot in snapshots], right=False),
    ]
    if not any(snapshot.chain for snapshot in snapshots):
        columns = [each for each in columns if each.heading != "stored as"]
    table = Columns(columns, console.width)
    names = columns[0].cells
    if table.too_wide:
        table.set_cells("stored as", [_stored(snapshot, short=True) for snapshot in snapshots])
    common = table.leave_out_common(
        {
            "source": "step from {}"
            if all(each.raw for each in kinds)
            else "step and profile from {}",
            "tensors": "{} tensors",
            "parameters": "{} parameters",
            "dtype": "{}",
            "size": "{}",
        }
    )
    # Then names lose their common beginning, and then the least important columns go.
    droppable = ("source", "tensors", "dtype", "parameters", "size", "stored as", "gamma")
    for heading in droppable[:-1]:
        if table.too_wide and columns[0].width > 40:
            table.leave_out(heading)
    if table.too_wide:
        table.set_cells("file", _abbreviated(names, max(table.room, 16)))
        for heading in droppable:
            if table.too_wide:
                table.leave_out(heading)
        if table.room < columns[0].width:  # those that went may have left room for longer names
            names = _abbreviated(names, max(table.room, 16))
        table.set_cells("file", names)
    order = ("tensors", "parameters", "dtype", "size", "source")
    table.draw(console, [common[heading] for heading in order if heading in common])
    console.print(_totals(snapshots), style="bold", soft_wrap=True)


def _stored(snapshot: Snapshot, short: bool = False) -> str:
    """What a snapshot is the difference to: `F16 to ema-1000.safetensors and 1 more`; in short,
    `F16 difference`."""
    if not snapshot.chain:
        return "whole"
    link = snapshot.index.links[-1]
    dtypes = {
        info.dtype for name, info in link.index.tensors.items() if link.exponent(name) is not None
    }
    stored = "+".join(sorted(dtypes))
    if short:
        return f"{stored} difference".lstrip()
    first, *others = link.bases
    more = f" and {len(others)} more" if others else ""
    return f"{stored or 'nothing more'} to {printable(first.name)}{more}"


def _abbreviated(names: list[str], room: int) -> list[str]:
    """File names of at most `room` characters: what they begin with in common goes first."""
    first, last = min(names), max(names)
    common = 0
    while len(names) > 1 and first[common : common + 1] == last[common : common + 1] != "":
        common += 1
    while common and names[0][common - 1].isalnum():  # numbers and words stay whole
        common -= 1
    if common > 1:
        names = ["…" + name[common:] for name in names]
    return shortened(names, room)


def _totals(snapshots: Sequence[Snapshot]) -> str:
    steps = sorted({snapshot.step for snapshot in snapshots})
    widths = sorted({f"{each.sigma_rel:.4f}" for each in snapshots if each.sigma_rel > 0})
    others = sorted({str(each.profile) for each in snapshots if not each.sigma_rel > 0})
    noun = "raw checkpoint" if others == ["raw"] and not widths else "snapshot"
    size = in_bytes(sum(snapshot.bytes for snapshot in snapshots))
    span = (
        f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
    )
    listed = ", ".join(widths) if len(widths) <= 4 else f"{widths[0]} to {widths[-1]}"
    kinds = [f"sigma_rel {listed}"] if widths else []
    kinds += others if noun == "snapshot" else []
    profiles = f"; {', '.join(kinds)}" if kinds else ""
    return f"{counted(len(snapshots), noun)}, {size}: {span}{profiles}"


# A file that posthoc made


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that have a target and weights of their own: their globs and number, and these."""

    tensors: str
    target: str
    rows: list[Row]
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe in a file, as far as it makes sense."""

    version: str
    method: str
    target: str
    rows: list[Row]
    groups: list[Group]
    document: dict[str, Any]


def _read_recipe(path: Path) -> tuple[TensorIndex, Recipe | None]:
    """Raises SnapshotError for a recipe that posthoc can't have written."""
    from posthoc_cli.storage import open_tensors
    from posthoc_cli.storage.metadata import read_recipe
    from posthoc_cli.synthesis.plan import averaged_in_groups
    from posthoc_cli.synthesis.recipe import MAX_GLOBS

    layout = open_tensors(path)
    document = read_recipe(layout.metadata)
    if document is None:
        return layout, None
    try:
        target = _target_of(document["target"])
        rows = [
            Row(str(source["file"]), _profile_of(source), float(source["weight"]))
            for source in document["sources"]
        ]
        globs = [tuple(map(str, group["tensors"])) for group in document.get("groups", ())]
        copied = list(document.get("copied", ()))
        if len(copied) + sum(map(len, globs)) > MAX_GLOBS:
            raise ValueError
        counts = averaged_in_groups(layout.tensors, globs, copied)
        groups = [
            Group(
                f"{' '.join(own)} ({counted(count, 'tensor')})",
                _target_of(group["target"]),
                [
                    dataclasses.replace(row, weight=float(weight))
                    for row, weight in zip(rows, group["weights"], strict=True)
                ],
                group,
            )
            for own, count, group in zip(globs, counts, document.get("groups", ()), strict=True)
        ]
        version, method = str(document["version"]), str(document["method"])
        recipe = Recipe(version, method, target, rows, groups, document)
    except (KeyError, TypeError, ValueError, OverflowError, UsageError):
        raise SnapshotError(
            str(path), "its recipe doesn't make sense", "it was changed after posthoc wrote it"
        ) from None
    return layout, recipe


def _target_of(document: dict[str, Any]) -> str:
    """The target in words; that of older recipes is always a power function."""
    from posthoc_cli.solver.targets import read_target

    step = float(document["step"])
    if "text" in document:
        what = read_target(str(document["text"])).title(int(step))
    else:
        sigma_rel, gamma = float(document["sigma_rel"]), float(document["gamma"])
        what = f"sigma_rel {sigma_rel:.6g} (gamma {gamma:.4g})"
    return f"{what} at step {step:.15g}"


def _profile_of(source: dict[str, Any]) -> Average:
    """The average that a source is; older recipes tell power functions and raw checkpoints."""
    from posthoc_cli.solver import Decay, Profile, read_average

    if "profile" in source:
        return read_average(source["profile"])
    step, gamma = float(source["step"]), source["gamma"]
    return Decay(step, 0.0) if gamma is None else Profile(step, float(gamma))


def _show_output(
    path: Path, layout: TensorIndex, recipe: Recipe | None, everything: bool, as_json: bool
) -> None:
    from posthoc_cli.storage.manifest import read_manifest

    assert recipe is not None
    manifest = read_manifest(path)
    if as_json:
        document = _describe_output(path, recipe)
        print_json(document | ({"contents": describe_manifest(manifest)} if manifest else {}))
        return
    _draw_recipe(stdout_console(), layout, recipe, everything)
    if manifest:
        print()
        draw_manifests([manifest])


def _describe_output(path: Path, recipe: Recipe) -> dict[str, Any]:
    return {
        "folder": str(path.parent),
        "snapshots": [],
        "skipped": [{"file": path.name, "reason": "made by posthoc: it carries a recipe"}],
        "problems": [],
        "warnings": [],
        "suggestion": None,
        "recipe": recipe.document,
    }


def _errors_row(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The error that was expected, where the recipe says it."""
    compared = document.get("compared")
    error, other = (
        each.get("relative_error") if isinstance(each, dict) else None
        for each in (document, compared)
    )
    if not isinstance(error, (int, float)):
        return []
    text = f"{percent(error)} of how far the EMA is from the network"
    if isinstance(other, (int, float)) and isinstance(compared, dict):
        text += f"; {compared.get('method')}'s: {percent(other)}"
    return [("expected error", text)]


def _draw_recipe(console: Console, layout: TensorIndex, recipe: Recipe, everything: bool) -> None:
    from posthoc_cli.snapshots.folder import Contents

    contents = Contents.of(layout.tensors)
    table = plain_table()
    table.show_header = False
    for label, text in (
        ("file", str(layout.path)),
        (
            "holds",
            f"{counted(len(layout.tensors), 'tensor')}, {in_short(contents.parameters)} "
            f"parameters, {'+'.join(contents.dtypes)}, {in_bytes(layout.size)}",
        ),
        ("target", recipe.target),
        ("method", f"{recipe.method} (posthoc {recipe.version})"),
        *_errors_row(recipe.document),
        *lora_row(recipe.document),
        ("sources", f"{counted(len(recipe.rows), 'snapshot')}:"),
    ):
        table.add_row(label, printable(text))
    table.columns[0].style = "bold"
    print_table(console, table)
    _draw_rows(console, recipe.rows, everything)
    for group in recipe.groups:
        heading = printable(f"{group.tensors}: {group.target}")
        console.print(f"\n{heading}", style="bold", soft_wrap=True)
        _draw_rows(console, group.rows, everything)
        for label, text in _errors_row(group.document):
            console.print(f"{label}  {text}")


def _draw_rows(console: Console, rows: Sequence[Row], everything: bool) -> None:
    console.print()
    draw_weights(console, rows, everything=everything)
    console.print(f"\nsum of weights  {sum(row.weight for row in rows):.6f}")
