"""Where outputs go: what a folder, a path or a template says for each target."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from posthoc_cli.errors import UsageError, either
from posthoc_cli.solver.targets import Target
from posthoc_cli.storage import ENDING, disk, stores
from posthoc_cli.storage.manifest import read_manifest
from posthoc_cli.storage.places import Url, place
from posthoc_cli.storage.writing import check_writable

LAYOUTS = ("file", "folder")
"""What an output may be."""

_FORMAT = re.compile(r"0?[0-9]{0,2}(\.[0-9]{1,2})?[dfeg]?")


def is_folder(output: str) -> bool:
    """Whether an output names a folder: one that exists, or a path that ends in a separator.

    Raises UsageError for a URL of what can only be read.
    """
    check_writable(place(output))
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return output.endswith(separators) or stores.is_folder(place(output))


def output_paths(
    output: str, run: str, targets: Sequence[Target], step: int, *, layout: str = "file"
) -> list[Path]:
    """The file or folder of each target. Raises UsageError unless each gets one of its own.

    `output` is a folder, where each is named after the `run` and its target; or else a path in
    which `{sigma_rel}`, `{gamma}`, `{target}` and `{step}` stand for the target's. A single
    target's folder is `output` itself.
    """
    if layout not in LAYOUTS:
        raise UsageError("layout=", f"'{layout}' is not known", f"choose {either(LAYOUTS)}")
    folders = layout == "folder"
    gathered = collects(output, targets, layout)
    if gathered:
        ending = "" if folders else ENDING
        names = [f"{run or 'ema'}-step{step}-{target.tag}{ending}" for target in targets]
        paths = [place(output) / name for name in names]
    else:
        paths = [place(_filled(output, target, step)) for target in targets]
    if folders:
        _check_folders(output, paths)
    for path in () if folders else paths:
        if path.suffix.lower() != ENDING:
            raise UsageError(
                "output=",
                f"'{path}' doesn't end in {ENDING}",
                "add it: what loads the file goes by it (a folder ends in / or exists)",
            )
        if stores.is_folder(path):
            raise UsageError("output=", f"'{path}' is a folder", "give a file name within it")
    for parent in {place(output).parent} if gathered else {path.parent for path in paths}:
        if not isinstance(parent, Url) and not stores.is_folder(parent):  # a store needs none
            raise UsageError("output=", f"there is no folder '{parent}'", "create it first")
    _check_distinct(output, targets, paths)
    return paths


def collects(output: str, targets: Sequence[Target], layout: str) -> bool:
    """Whether `output` names a folder for the outputs, each of which gets a name in it."""
    if layout == "folder":
        return len(targets) > 1 and "{" not in output
    return is_folder(output)


def _check_folders(output: str, paths: Sequence[Path]) -> None:
    for path in paths:
        if path.name in ("", ".."):
            problem = f"'{path}' is no name for a folder to be made"
            raise UsageError("output=", problem, f"give one, such as '{path / 'ema'}'")
        if path.suffix.lower() == ENDING:
            raise UsageError(
                "output=",
                f"'{path}' ends as a file does, and layout='folder' writes a folder",
                f"leave out {ENDING}, or the layout",
            )
    if paths[0].parent == place(output) and read_manifest(place(output)) is not None:
        raise UsageError("output=", f"'{output}' is an output itself", "give another folder")


def make_folder(output: str, targets: Sequence[Target] = (), layout: str = "file") -> None:
    """Make the folder that is to hold the outputs, if there is one and it isn't there yet."""
    if collects(output, targets, layout):
        disk.make_folder(place(output))


def _filled(template: str, target: Target, step: int) -> str:
    values: dict[str, tuple[str, float | None]] = {
        "step": (str(step), step),
        "target": (target.tag, None),
    }
    for argument in ("sigma_rel", "gamma"):
        value = getattr(target, argument)
        short = target.text if target.argument == argument else f"{value or 0:.6g}"
        values[argument] = short, value
    known = "the fields are {sigma_rel}, {gamma}, {target}, {step}; for a brace write {{ or }}"
    try:
        pieces = list(Formatter().parse(template))
    except ValueError:
        raise UsageError("output=", f"a brace in '{template}' stands alone", known) from None
    filled = ""
    for text, field, spec, conversion in pieces:
        filled += text
        if field is None:
            continue
        if field not in values or conversion is not None:
            raise UsageError("output=", f"unknown field {{{field}}} in '{template}'", known)
        as_text, number = values[field]
        if number is None and field != "target":
            problem = f"{{{field}}} in '{template}' says nothing of {target}"
            raise UsageError("output=", problem, "write {target} in its place")
        try:
            if not _FORMAT.fullmatch(spec or "") or (spec and number is None):
                raise ValueError
            filled += format(number, spec) if spec else as_text
        except ValueError:
            raise UsageError(
                "output=",
                f"'{spec}' is no format for {{{field}}}",
                "write, say, {step:07d} or {sigma_rel:.3f}",
            ) from None
    return filled


def _check_distinct(output: str, targets: Sequence[Target], paths: Sequence[Path]) -> None:
    taken: dict[str, Target] = {}
    for target, path in zip(targets, paths, strict=True):
        place = os.path.normcase(path.absolute())
        if place not in taken:
            taken[place] = target
            continue
        if "{" not in output and not is_folder(output):
            raise UsageError(
                "output=",
                f"one file for {len(targets)} targets",
                "give a folder, or a template such as 'ema-{target}.safetensors'",
            )
        raise UsageError(
            "output=",
            f"{taken[place]} and {target} would both become '{path}'",
            "put {target} into it",
        )
