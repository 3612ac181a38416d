"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli.cli.helptext import METHODS_HERE
from posthoc_cli.errors import UsageError

if TYPE_CHECKING:
    from posthoc_cli.api import Run

MAX_VALUES = 10_000
"""Values that one option may list; more is a slip of the keyboard."""

_UNITS: dict[str, int] = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate(("", "k", "m", "g", "t")) if unit}

_READING = "Reading the folder"
_TARGETS = "Targets"


def _methods() -> list[str]:
    from posthoc_cli.solver import METHODS

    return list(METHODS)


FolderArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FOLDER",
        help="The folder of snapshots; or files and folders in it, by shell glob.",
        show_default=False,
    ),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        rich_help_panel=_READING,
        help="File-name pattern, such as 'run7_{step}_{sigma_rel}.safetensors', with the fields "
        "{step} or {kimg}, one of {sigma_rel}, {gamma} and {index} (with --raw none), and * for "
        "anything.",
    ),
]
ProfilesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=_READING,
        help="The sigma_rel values that {index} counts, from index 0 on, such as 0.05,0.10.",
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        rich_help_panel=_READING,
        help="Use only the files whose names, or paths below FOLDER, fit, such as '*/unet_ema'; "
        "repeat it to add more.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        rich_help_panel=_READING,
        help="Leave out the files whose names, or paths below FOLDER, fit; repeat it to add more.",
    ),
]
RunOption = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        rich_help_panel=_READING,
        show_default=False,
        help="Of several training runs in the folder, the one to use.",
    ),
]
RawOption = Annotated[
    bool,
    typer.Option(
        "--raw",
        rich_help_panel=_READING,
        help="The files are no EMAs but plain checkpoints, such as a LoRA trainer saves. Steps are "
        "those of their metadata, kohya's too, or the last number of their names.",
    ),
]
SkipIncompleteOption = Annotated[
    bool,
    typer.Option(
        "--skip-incomplete",
        rich_help_panel=_READING,
        help="Leave out files whose end is missing, such as one that training is still writing, "
        "instead of stopping.",
    ),
]
SigmaRelOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=_TARGETS,
        help="Relative widths of the EMAs that are wanted: 0.05, or 0.05,0.10, or "
        "0.010,0.015,...,0.250; above 0 and below 0.2887. May be repeated.",
    ),
]
GammaOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=_TARGETS,
        help="The same by exponent: 16.97 is sigma_rel 0.05. Above -0.5; with blup, above -1.",
    ),
]
StepOption = Annotated[
    int | None,
    typer.Option(
        metavar="STEP",
        rich_help_panel=_TARGETS,
        help="The step at which they are wanted; snapshots after it are not used. By default the "
        "last snapshot's.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        rich_help_panel=_TARGETS,
        autocompletion=_methods,
        show_default=False,
        help=METHODS_HERE,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        rich_help_panel=_TARGETS,
        autocompletion=lambda: ["cpu", "cuda", "auto"],
        help="Where to compute: cpu, cuda, cuda:1, or auto: cuda where there is one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No warnings and no progress: errors only.")
]


def read_list(option: str, texts: Sequence[str]) -> list[Decimal]:
    """The numbers of a LIST option, given once or more.

    A list is numbers with commas between them. Dots continue the spacing of the two numbers before
    them, up or down, and have to arrive at the number after them: `0.010,0.015,...,0.250`. The
    numbers are decimal, so that they are those that a person would type.

    Raises UsageError.
    """
    values: list[Decimal] = []
    for whole in texts:
        text = whole if len(whole) <= 60 else whole[:57] + "..."  # as messages show it
        items = [item.strip() for item in whole.replace("…", "...").split(",")]
        numbers: list[Decimal] = []
        dots = False
        for at, item in enumerate(items):
            if item == "...":
                before = [one for one in items[max(at - 2, 0) : at] if one != "..."]
                if len(before) < 2 or at == len(items) - 1 or items[at + 1] == "...":
                    raise UsageError(
                        option,
                        f"'{text}': the dots need two numbers before them and one after",
                        "write it as in 0.010,0.015,...,0.250",
                    )
                dots = True
                continue
            number = _number(option, item, text)
            if dots:
                numbers += _continued(option, numbers[-2], numbers[-1], number, text)
                dots = False
            else:
                numbers.append(number)
        values += numbers
        if len(values) > MAX_VALUES:
            raise _too_many(option, text)
    return values


def _number(option: str, item: str, text: str) -> Decimal:
    try:
        number = Decimal(item)
    except InvalidOperation:
        number = Decimal("nan")
    # Far exponents would make sums of decimals fail, and mean nothing here.
    if not number.is_finite() or abs(number.adjusted()) > 30 or len(number.as_tuple().digits) > 25:
        what = f"'{item}' in '{text}'" if item != text else f"'{item}'"
        raise UsageError(
            option,
            f"{what} is not a number" if item else f"a number is missing in '{text}'",
            "give numbers with commas between them, such as 0.05,0.10",
        )
    return number


def _continued(
    option: str, first: Decimal, second: Decimal, last: Decimal, text: str
) -> list[Decimal]:
    """The numbers after `second`, at the spacing of the two, to `last`."""
    spacing = second - first
    rest = last - second
    if spacing == 0 or rest * spacing <= 0:
        raise UsageError(
            option,
            f"'{text}': from {first} and {second} the dots don't lead to {last}",
            "write it as in 0.010,0.015,...,0.250",
        )
    if rest / spacing > MAX_VALUES:
        raise _too_many(option, text)
    count, left_over = divmod(rest, spacing)
    if left_over:
        below = second + count * spacing
        raise UsageError(
            option,
            f"'{text}': steps of {abs(spacing)} from {second} miss {last}",
            f"end the list at {shortest(below)} or {shortest(below + spacing)}",
        )
    return [second + spacing * k for k in range(1, int(count) + 1)]


def _too_many(option: str, text: str) -> UsageError:
    return UsageError(option, f"'{text}': more than {MAX_VALUES} values", "give a wider spacing")


def shortest(number: Decimal) -> str:
    """`number` without an exponent or zeros that say nothing: 0.050 -> 0.05."""
    plain = f"{number.normalize():f}"
    return "0" if plain == "-0" else plain


def read_size(option: str, text: str) -> int:
    """`1.2GB`, `300 MB`, `1GiB` or a number of bytes. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([kmgt]i?)?b?", text.strip().lower())
    if match is None or not float(match[1]):
        raise UsageError(option, f"'{text}' is no size", "give, say, 1.2GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raises UsageError unless `value` is one of `choices`."""
    if value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise UsageError(option, f"'{value}' is not known", f"choose {listed}")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a folder is to be read: the options under "Reading the folder"."""

    pattern: str | None = None
    profiles: Sequence[str] | None = None
    only: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    run: str | None = None
    raw: bool = False
    skip_incomplete: bool = False
    copy: Sequence[str] | None = None
    drop: Sequence[str] | None = None


def open_folder(paths: Sequence[str], reading: Reading) -> Run:
    """The snapshots of a folder, or of files and folders in one."""
    from posthoc_cli.api import open_snapshots

    if reading.raw and reading.profiles:
        raise UsageError("--profiles", "not used, as --raw checkpoints have none", "leave it out")
    return open_snapshots(
        paths,
        pattern=reading.pattern,
        profiles=read_numbers("--profiles", reading.profiles) if reading.profiles else None,
        only=reading.only or (),
        exclude=reading.exclude or (),
        run=reading.run,
        raw=reading.raw,
        skip_incomplete=reading.skip_incomplete,
        copy=reading.copy or (),
        drop=reading.drop or (),
    )


def read_numbers(option: str, texts: Sequence[str] | None) -> list[float]:
    """The same as `read_list`, as floats; empty where the option wasn't given."""
    return [float(value) for value in read_list(option, texts or ())]
