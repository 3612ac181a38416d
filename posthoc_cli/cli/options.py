"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from posthoc_cli.cli.helptext import METHODS_HERE
from posthoc_cli.cli.lists import read_lengths, read_numbers
from posthoc_cli.errors import UsageError, either

if TYPE_CHECKING:
    from posthoc_cli.api import Run

_UNITS: dict[str, int] = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate(("", "k", "m", "g", "t")) if unit}

READING, TARGETS, OUTPUT = "Reading the folder", "Targets", "Output"
METRIC, SEARCH = "The metric", "The search"
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
        help="The folder of snapshots, or its URL; or files and folders in it, by shell glob.",
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
        "Leave out the files whose names, or paths below the folder, fit; repeat it to add more.",
    ),
]
TargetForOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target-for",
        "--sigma-rel-for",
        metavar="GLOB=TARGET",
        rich_help_panel=TARGETS,
        help="Another target for the tensors whose names fit: '*.attn.*=0.15', a sigma_rel, or "
        "'*.attn.*=window:5%'. May be repeated: of several that fit, the last counts.",
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


def read_size(option: str, text: str | None) -> int | None:
    """`1.2GB`, `300 MB`, `1GiB` or a number of bytes; None for None. Raises UsageError."""
    if text is None:
        return None
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
            "{step} or {kimg}, one of {sigma_rel}, {gamma}, {decay} and {index} (with --raw or "
            "--ema-decay none), and * for anything.",
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
            "Use only the files whose names, or paths below the folder, fit, such as '*/unet_ema'; "
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
            "Files that nothing says a profile of are no EMAs but plain checkpoints, as LoRA "
            "trainers save them. Steps are those of their metadata, kohya's too, or the last "
            "number of their names.",
            READING,
        ),
    ] = False
    ema_decay: Annotated[
        float | None,
        in_panel(
            READING,
            "BETA",
            "They are EMAs of this decay a step, such as 0.9999; with --raw, those that are called "
            "ema.",
            show_default=False,
        ),
    ] = None
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


@dataclass(frozen=True, slots=True)
class Targets:
    """Which averages are wanted: the options that name them, under "Targets"."""

    sigma_rel: Annotated[
        list[str] | None,
        in_panel(
            TARGETS,
            "LIST",
            "Relative widths of the EMAs that are wanted: 0.05, or 0.05,0.10, or "
            "0.010,0.015,...,0.250; above 0 and below 0.2887. May be repeated, as those below.",
        ),
    ] = None
    gamma: Annotated[
        list[str] | None,
        in_panel(
            TARGETS,
            "LIST",
            "The same by exponent: 16.97 is sigma_rel 0.05. Above -0.5; with blup, above -1.",
        ),
    ] = None
    window: Annotated[
        list[str] | None,
        in_panel(
            TARGETS, "LIST", "Means of the last steps: 480 of them, or 5% of the target step."
        ),
    ] = None
    lr_decay: Annotated[
        list[str] | None,
        in_panel(
            TARGETS,
            "LIST",
            "What a decay of the learning rate over the last steps would have led to, by its shape "
            "(linear, 1-sqrt or cosine) and length: 1-sqrt:10%.",
        ),
    ] = None
    decay: Annotated[
        list[str] | None,
        in_panel(TARGETS, "LIST", "EMAs of a fixed decay a step, such as 0.999."),
    ] = None
    half_life: Annotated[
        list[str] | None,
        in_panel(TARGETS, "LIST", "The same by half-life: in 480 steps, or 5% of the target step."),
    ] = None

    def read(self) -> dict[str, Any]:
        """The same as the library takes them. Raises UsageError."""
        return {
            "sigma_rel": read_numbers("--sigma-rel", self.sigma_rel),
            "gamma": read_numbers("--gamma", self.gamma),
            "window": read_lengths("--window", self.window),
            "lr_decay": read_lengths("--lr-decay", self.lr_decay, shapes=True),
            "decay": read_numbers("--decay", self.decay),
            "half_life": read_lengths("--half-life", self.half_life),
        }


PLANNED = ("dtype", "copy", "drop", "lora", "lora_rank", "lora_tolerance")
"""Of what `Writing` reads, that which `Run.plan` takes."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How outputs are written: the options under "Output", but for where."""

    dtype: DtypeOption = "same"
    copy: Annotated[
        list[str] | None,
        in_panel(
            OUTPUT,
            "GLOB",
            "Tensors to take from the newest snapshot instead of averaging; may be repeated.",
        ),
    ] = None
    drop: Annotated[
        list[str] | None, in_panel(OUTPUT, "GLOB", "Tensors to leave out; may be repeated.")
    ] = None
    force: ForceOption = False
    skip_existing: Annotated[
        bool,
        flag(
            "--skip-existing",
            "Keep outputs that exist and are what is asked for, by their recipes; write the "
            "others.",
            OUTPUT,
        ),
    ] = False
    layout: Annotated[
        str,
        in_panel(
            OUTPUT,
            "LAYOUT",
            "What each output is: file; or folder, with the config, tokenizer and other parts that "
            "lie beside the newest snapshot, as from_pretrained loads it.",
            autocompletion=lambda: ["file", "folder"],
        ),
    ] = "file"
    max_shard_size: Annotated[
        str | None,
        in_panel(
            OUTPUT,
            "SIZE",
            "Write outputs larger than this, such as 5GB, as shards with an index, as Hugging "
            "Face's libraries load them.",
            show_default=False,
        ),
    ] = None
    strict: Annotated[
        bool,
        flag(
            "--strict",
            "Write nothing when there is NaN or infinity in the snapshots, or would be in an "
            "output; without it, that is a warning.",
            OUTPUT,
        ),
    ] = False
    lora: Annotated[
        str,
        in_panel(
            OUTPUT,
            "MODE",
            "Of a LoRA: factors averages its factors as they are; exact writes the factors of the "
            "average of their products.",
            autocompletion=lambda: ["factors", "exact"],
        ),
    ] = "factors"
    lora_rank: Annotated[
        int | None,
        in_panel(
            OUTPUT, "N", "With --lora exact, the highest rank of a module.", show_default=False
        ),
    ] = None
    lora_tolerance: Annotated[
        float,
        in_panel(
            OUTPUT,
            "X",
            "With --lora exact, leave out singular values below this part of the largest.",
        ),
    ] = 1e-3

    def read(self) -> dict[str, Any]:
        """The same as the library takes them. Raises UsageError."""
        if self.force and self.skip_existing:
            remedy = "leave out one of the two"
            raise UsageError("--force", "doesn't go with --skip-existing", remedy)
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        given["max_shard_size"] = read_size("--max-shard-size", self.max_shard_size)
        return given | {"copy": self.copy or (), "drop": self.drop or ()}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options of a dataclass of them in place of its argument of that type."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {
        each.name: each.annotation for each in own if is_dataclass(each.annotation)
    }
    options: dict[str, dict[str, inspect.Parameter]] = {}
    for name, group in groups.items():
        hints = get_type_hints(group, include_extras=True)
        options[name] = {
            each.name: each.replace(annotation=hints[each.name])
            for each in inspect.signature(group).parameters.values()
            if get_origin(hints[each.name]) is Annotated
        }

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{option: given.pop(option) for option in options[name]})
            for name, group in groups.items()
        }
        command(**made, **given)

    spread = [options.get(each.name, {each.name: each}).values() for each in own]
    parameters = [each.replace(kind=each.KEYWORD_ONLY) for some in spread for each in some]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def told_by(reading: Reading) -> dict[str, Any]:
    """The same as the library takes them, without what isn't given. Raises UsageError."""
    if reading.profiles and (reading.raw or reading.ema_decay is not None):
        kind = "--raw checkpoints" if reading.raw else "EMAs of --ema-decay"
        raise UsageError("--profiles", f"not used, as {kind} have none", "leave it out")
    check_choice("--from", reading.tool, tools())
    given: dict[str, Any] = {each.name: getattr(reading, each.name) for each in fields(reading)}
    if reading.profiles:
        given["profiles"] = read_numbers("--profiles", reading.profiles)
    return {name: each for name, each in given.items() if each is not None}


def open_folder(paths: Sequence[str], reading: Reading) -> Run:
    """The snapshots of a folder, or of files and folders in one."""
    from posthoc_cli.api import open_snapshots

    return open_snapshots(paths, **told_by(reading))
