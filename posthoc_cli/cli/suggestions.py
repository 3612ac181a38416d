"""The command that would make a folder work which was refused.

Nothing is guessed from messages: a few other ways to read the folder are tried, and the first one
that leaves no problem is what is suggested.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from posthoc_cli.cli.options import Reading
from posthoc_cli.cli.spelling import OPTIONS
from posthoc_cli.errors import PosthocError, printable

if TYPE_CHECKING:
    from posthoc_cli.api import Run

_MOST_LEFT_OUT = 4
"""Files that a suggestion leaves out by name; more need a glob of their own."""

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def suggest(folder: str, reading: Reading, run: Run, read: Callable[[Reading], Run]) -> str | None:
    """The command that reads `folder` without a problem, if one is found; `read` reads it so."""
    if not run.problems:
        return None
    for other in _others(reading, run):
        try:
            tried = read(other)
        except PosthocError:
            continue
        if tried.snapshots and not tried.problems and not (other.raw and tried.warnings):
            return command("inspect", folder, other)
    return None


def command(name: str, folder: str, reading: Reading) -> str:
    """A command line for a shell: `posthoc inspect runs --raw`."""
    words = []
    for field in dataclasses.fields(reading):
        value = getattr(reading, field.name)
        option = OPTIONS.get(field.name, "--" + field.name.replace("_", "-"))
        if value == field.default:
            continue
        if value is True:
            words.append(option)
        elif isinstance(value, str | int | float):
            words += [option, str(value)]
        elif value:
            words += [word for each in value for word in (option, str(each))]
    if folder.startswith("-"):
        folder = f"./{folder}"
    return printable(shlex.join(["posthoc", name, folder, *words]))


def _others(reading: Reading, run: Run) -> Iterator[Reading]:
    """Other ways to read the folder, the most harmless first."""
    if not reading.skip_incomplete:
        yield dataclasses.replace(reading, skip_incomplete=True)
    wrong = list(dict.fromkeys(file for file, _ in run.problems))
    good = [snapshot.file for snapshot in run.snapshots if snapshot.file not in wrong]
    if reading.raw:
        yield dataclasses.replace(reading, raw=False)
    if not run.snapshots and len(wrong) == 1 and not reading.only:
        yield dataclasses.replace(reading, only=[f"{glob.escape(wrong[0])}/*"])
    told = reading.raw or reading.ema_decay or reading.pattern or reading.profiles
    if not run.snapshots and not told:
        for pattern in _patterns(wrong):
            yield dataclasses.replace(reading, pattern=pattern)
        yield dataclasses.replace(reading, raw=True)
    if good and not any("not of the same run" in text for _, text in run.problems):
        taken = (*(reading.exclude or ()),)
        for left_out in _left_out(wrong, good):
            yield dataclasses.replace(reading, exclude=[*taken, *left_out])


def _left_out(wrong: Sequence[str], good: Sequence[str]) -> Iterator[list[str]]:
    """What to exclude so that only `good` files are left: a kind of name, or a few names."""
    if len(wrong) > len(good):  # then rather those that the others differ from
        newest = good[-1]
        if len(good) == 1:
            yield [glob.escape(newest)]
        return
    kinds = list(dict.fromkeys(_NUMBER.sub("*", glob.escape(name)) for name in wrong))
    apart = not any(fnmatch.fnmatch(name, kind) for name in good for kind in kinds)
    if len(wrong) > 1 and len(kinds) <= 2 and apart:
        yield kinds
    if len(wrong) <= _MOST_LEFT_OUT:
        yield [glob.escape(name) for name in wrong]


def _patterns(names: Sequence[str]) -> Iterator[str]:
    """The patterns in which one number of the names is the step, and another the profile."""
    skeletons = {tuple(_NUMBER.split(name)) for name in names}
    if len(skeletons) != 1:
        return
    texts = [piece.replace("*", "?") for piece in skeletons.pop()]
    columns = list(zip(*(_NUMBER.findall(name) for name in names), strict=True))
    whole = [at for at, column in enumerate(columns) if all(text.isdigit() for text in column)]
    widths = [at for at in range(len(columns)) if all(_is_width(text) for text in columns[at])]
    if len(whole) > 8 or any(set(text) & set("{}") for text in texts):
        return
    found = []
    for step, width in product(whole, widths):
        if step != width and len({int(text) for text in columns[step]}) > 1:
            fields = {step: "{step}", width: "{sigma_rel}"}
            middle = [fields.get(at, columns[at][0]) for at in range(len(columns))]
            if all(len(set(columns[at])) == 1 for at in range(len(columns)) if at not in fields):
                pieces = [text for pair in zip(texts, [*middle, ""], strict=True) for text in pair]
                found.append("".join(pieces))
    if len(found) == 1:  # of two, nobody knows which
        yield found[0]


def _is_width(text: str) -> bool:
    return "." in text and 0 < float(text) < 0.2887
