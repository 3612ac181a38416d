"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from posthoc_cli.cli.helptext import METHODS_HERE
from posthoc_cli.errors import UsageError, either

if TYPE_CHECKING:
    from posthoc_cli.api import Run

MAX_VALUES = 10_000
"""Values that one option may list; more is a slip of the keyboard."""

_UNITS: dict[str, int] = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate(("", "k", "m", "g", "t")) if unit}

READING, TARGETS, OUTPUT = "Reading the folder", "Targets", "Output"
"""The headings of the help."""


def _methods() -> list[str]:
    from posthoc_cli.solver import METHODS

    return list(METHODS)


def tools() -> list[str]:
    """What --from may be."""
    from posthoc_cli.formats import KINDS

    return ["auto", *KINDS]


def dtypes() -> list[str]:
    """What --dtype may be."""
    from posthoc_cli.storage.dtypes import OUTPUT_DTYPES

    return ["same", *OUTPUT_DTYPES]


FolderArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FOLDER",
        help="The folder of snapshots; or files and folders in it, by shell glob.",
        show_default=False,
    ),
]


def in_panel(panel: str, metavar: str | None, help: str, **more: Any) -> Any:
    """An option under the heading `panel` of the help."""
    return typer.Option(metavar=metavar, rich_help_panel=panel, help=help, **more)


def flag(name: str, help: str, panel: str | None = None) -> Any:
    """An option without a value and without a `--no-...`."""
    return typer.Option(name, rich_help_panel=panel, help=help)


ExcludeOption = Annotated[
    list[str] | None,
    in_panel(
        READING,
        "GLOB",
        "Leave out the files whose names, or paths below FOLDER, fit; repeat it to add more.",
    ),
]
SigmaRelOption = Annotated[
    list[str] | None,
    in_panel(
        TARGETS,
        "LIST",
        "Relative widths of the EMAs that are wanted: 0.05, or 0.05,0.10, or "
        "0.010,0.015,...,0.250; above 0 and below 0.2887. May be repeated.",
    ),
]
GammaOption = Annotated[
    list[str] | None,
    in_panel(
        TARGETS,
        "LIST",
        "The same by exponent: 16.97 is sigma_rel 0.05. Above -0.5; with blup, above -1.",
    ),
]
StepOption = Annotated[
    int | None,
    in_panel(
        TARGETS,
        "STEP",
        "The step at which they are wanted; snapshots after it are not used. By default the "
        "last snapshot's.",
    ),
]
MethodOption = Annotated[
    str | None,
    in_panel(TARGETS, "METHOD", METHODS_HERE, autocompletion=_methods, show_default=False),
]
DeviceOption = Annotated[
    str,
    in_panel(
        TARGETS,
        "DEVICE",
        "Where to compute: cpu, cuda, cuda:1, or auto: cuda where there is one.",
        autocompletion=lambda: ["cpu", "cuda", "auto"],
    ),
]
DtypeOption = Annotated[
    str,
    in_panel(
        OUTPUT,
        "DTYPE",
        "Of the tensors written: same, float64, float32, float16 or bfloat16.",
        autocompletion=dtypes,
    ),
]
ForceOption = Annotated[bool, flag("--force", "Replace outputs that exist.", OUTPUT)]
JsonOption = Annotated[bool, flag("--json", "Print the result as JSON.")]
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


def read_numbers(option: str, texts: Sequence[str] | None) -> list[float]:
    """The same as `read_list`, as floats; empty where the option wasn't given."""
    return [float(value) for value in read_list(option, texts or ())]


def read_targets(sigma_rel: Sequence[str] | None, gamma: Sequence[str] | None) -> dict[str, Any]:
    """The averages that are wanted, as the library takes them."""
    return {
        "sigma_rel": read_numbers("--sigma-rel", sigma_rel),
        "gamma": read_numbers("--gamma", gamma),
    }


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
        raise UsageError(option, f"'{value}' is not known", f"choose {either(choices)}")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a folder is to be read: the options under "Reading the folder"."""

    pattern: Annotated[
        str | None,
        in_panel(
            READING,
            "PATTERN",
            "File-name pattern, such as 'run7_{step}_{sigma_rel}.safetensors', with the fields "
            "{step} or {kimg}, one of {sigma_rel}, {gamma} and {index} (with --raw none), and * "
            "for anything.",
        ),
    ] = None
    profiles: Annotated[
        list[str] | None,
        in_panel(
            READING,
            "LIST",
            "The sigma_rel values that {index} counts, from index 0 on, such as 0.05,0.10.",
        ),
    ] = None
    only: Annotated[
        list[str] | None,
        in_panel(
            READING,
            "GLOB",
            "Use only the files whose names, or paths below FOLDER, fit, such as '*/unet_ema'; "
            "repeat it to add more.",
        ),
    ] = None
    exclude: ExcludeOption = None
    run: Annotated[
        str | None,
        in_panel(
            READING,
            "RUN",
            "Of several training runs in the folder, the one to use.",
            show_default=False,
        ),
    ] = None
    raw: Annotated[
        bool,
        flag(
            "--raw",
            "The files are no EMAs but plain checkpoints, such as a LoRA trainer saves. Steps are "
            "those of their metadata, kohya's too, or the last number of their names.",
            READING,
        ),
    ] = False
    skip_incomplete: Annotated[
        bool,
        flag(
            "--skip-incomplete",
            "Leave out files whose end is missing, such as one that training is still writing, "
            "instead of stopping.",
            READING,
        ),
    ] = False
    key: Annotated[
        str | None,
        in_panel(
            READING,
            "KEY",
            "Where in a checkpoint of torch the network is: ema, or outer.inner.",
            show_default=False,
        ),
    ] = None
    tool: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="TOOL",
            rich_help_panel=READING,
            autocompletion=tools,
            help="What wrote such checkpoints: ema-pytorch, posthoc-ema (pytorch-posthoc-ema), "
            "edm2, torch for any other state dict, or auto: by the contents of each.",
        ),
    ] = "auto"
    update_every: Annotated[
        int | None,
        in_panel(
            READING,
            "N",
            "The update_every of training with ema-pytorch (100 if it wasn't set) or posthoc-ema "
            "(10), taken to be 1 without this. Above 1 their averages have another width than was "
            "asked for, and that is what is used.",
            show_default=False,
        ),
    ] = None
    copy: Sequence[str] | None = None
    drop: Sequence[str] | None = None
    lora: str = "factors"


def reads_folder(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options of Reading, in place of its argument `reading`."""
    hints = get_type_hints(Reading, include_extras=True)
    names = [name for name, hint in hints.items() if get_origin(hint) is Annotated]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        reading = Reading(**{name: given.pop(name) for name in names})
        command(reading=reading, **given)

    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "reading"]
    reading = [
        each.replace(annotation=hints[each.name])
        for each in inspect.signature(Reading).parameters.values()
        if each.name in names
    ]
    parameters = [each.replace(kind=each.KEYWORD_ONLY) for each in (*own, *reading)]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def open_folder(paths: Sequence[str], reading: Reading) -> Run:
    """The snapshots of a folder, or of files and folders in one."""
    from posthoc_cli.api import open_snapshots

    if reading.raw and reading.profiles:
        raise UsageError("--profiles", "not used, as --raw checkpoints have none", "leave it out")
    check_choice("--from", reading.tool, tools())
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
        lora=reading.lora,
        key=reading.key,
        tool=reading.tool,
        update_every=reading.update_every,
    )
