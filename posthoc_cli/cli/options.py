"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli.errors import MachineError, UsageError

if TYPE_CHECKING:
    from posthoc_cli.snapshots.folder import FolderContents
    from posthoc_cli.solver.profiles import Profile

MAX_VALUES = 10_000
"""Values that one option may list; more is a slip of the keyboard."""

_UNITS: dict[str, int] = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate(("", "k", "m", "g", "t")) if unit}

_READING = "Reading the folder"
_TARGETS = "Targets"


def _methods() -> list[str]:
    from posthoc_cli.solver.methods import METHODS

    return list(METHODS)


FolderArgument = Annotated[
    str, typer.Argument(metavar="FOLDER", help="The folder of snapshots.", show_default=False)
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
        help="Use only the files whose names fit; repeat it to add more.",
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
        help="edm2, the default: the weights sum to one, as in the paper's code. algorithm3: not "
        "rescaled, as in the paper's text. blup: the least error to be expected, by a sample of "
        "the snapshots' values. share, the default with --raw, and only there: the share of the "
        "EMA that each checkpoint stands for.",
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


@dataclass(frozen=True, slots=True)
class Target:
    """An EMA that is wanted, as the user said it: `option` is "--sigma-rel" or "--gamma"."""

    option: str
    text: str
    sigma_rel: float
    gamma: float

    def __str__(self) -> str:
        """Such as `sigma_rel 0.05`."""
        return f"{self.option.lstrip('-').replace('-', '_')} {self.text}"

    @property
    def sigma_rel_text(self) -> str:
        return self.text if self.option == "--sigma-rel" else f"{self.sigma_rel:.6g}"

    @property
    def gamma_text(self) -> str:
        return self.text if self.option == "--gamma" else f"{self.gamma:.6g}"


def read_targets(sigma_rel: Sequence[str] | None, gamma: Sequence[str] | None) -> list[Target]:
    """The targets of the two options: those by sigma_rel first, each in the order given.

    A value that is listed again counts once. Raises UsageError for a value out of bounds, and when
    there is none.
    """
    from posthoc_cli.snapshots.identity import MAX_GAMMA, MIN_SIGMA_REL
    from posthoc_cli.solver.profiles import MAX_SIGMA_REL, gamma_to_sigma_rel, sigma_rel_to_gamma

    targets: list[Target] = []
    for value in dict.fromkeys(read_list("--sigma-rel", sigma_rel or ())):
        width = float(value)
        if not MIN_SIGMA_REL <= width < MAX_SIGMA_REL:
            raise UsageError(
                "--sigma-rel",
                f"{shortest(value)} is out of bounds",
                "give values above 0 and below 12^-0.5 = 0.2887",
            )
        exponent = float(sigma_rel_to_gamma(width))
        targets.append(Target("--sigma-rel", shortest(value), width, exponent))
    for value in dict.fromkeys(read_list("--gamma", gamma or ())):
        exponent = float(value)
        if not -1 < exponent <= MAX_GAMMA:
            raise UsageError(
                "--gamma",
                f"{shortest(value)} is out of bounds",
                f"give values above -1, and up to {MAX_GAMMA:g}",
            )
        width = float(gamma_to_sigma_rel(exponent))
        targets.append(Target("--gamma", shortest(value), width, exponent))
    if not targets:
        raise UsageError("--sigma-rel", "no target is given", "add, say, --sigma-rel 0.05")
    return targets


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


def read_method(method: str | None, raw: bool) -> str:
    """The method, by default the one for these snapshots.

    Raises UsageError for one that is unknown, or that isn't for raw checkpoints or only for them.
    """
    from posthoc_cli.solver.methods import METHODS, check_method

    if method is None:
        return "share" if raw else "edm2"
    check_choice("--method", method, list(METHODS))
    check_method(method, raw, raw)
    return method


def read_device(text: str) -> str:
    """The device to compute on; torch is only imported to look for another than the CPU.

    Raises UsageError for a word that is no device, MachineError for one that isn't there.
    """
    if text == "cpu":
        return text
    if not re.fullmatch(r"auto|cuda(:[0-9]{1,3})?", text):
        raise UsageError("--device", f"'{text}' is not known", "choose cpu, cuda, cuda:1 or auto")
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "use --device cpu, or install a torch that supports your GPU"
    if not torch.cuda.is_available():
        raise MachineError(f"--device {text}", "torch finds no CUDA device here", remedy)
    found = torch.cuda.device_count()
    if int(text.partition(":")[2] or 0) >= found:
        raise MachineError(
            f"--device {text}", f"not there: {found} found", f"give cuda:0 to cuda:{found - 1}"
        )
    return text


@dataclass(frozen=True, slots=True)
class Reading:
    """How a folder is to be read: the options under "Reading the folder"."""

    pattern: str | None = None
    profiles: Sequence[str] | None = None
    only: Sequence[str] | None = None
    raw: bool = False
    skip_incomplete: bool = False


def read_snapshots(folder: str, reading: Reading) -> FolderContents:
    """The inventory of `folder`."""
    from posthoc_cli.snapshots.folder import read_folder

    if reading.raw and reading.profiles:
        raise UsageError("--profiles", "not used, as --raw checkpoints have none", "leave it out")
    listed = read_list("--profiles", reading.profiles) if reading.profiles else None
    return read_folder(
        folder,
        pattern=reading.pattern,
        profiles=None if listed is None else [float(value) for value in listed],
        only=reading.only or (),
        raw=reading.raw,
        skip_incomplete=reading.skip_incomplete,
    )


def note_skipped(inventory: FolderContents, quiet: bool) -> None:
    """Name on stderr the snapshots that --skip-incomplete leaves out."""
    from posthoc_cli.cli.console import note

    for file, reason in inventory.skipped:
        if reason.startswith("incomplete"):
            note(f"{file}: left out: {reason}", quiet)


def at_step(targets: Sequence[Target], step: int) -> list[Profile]:
    from posthoc_cli.solver.profiles import Profile

    return [Profile(step, target.gamma) for target in targets]
