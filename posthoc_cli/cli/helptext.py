"""Help that reads well at 80 columns: options under headings, and nothing that is not needed."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

METHODS_HERE = "{methods}"
"""Stands for the list of methods in a help text: reading the registry takes NumPy, which no other
help needs."""

_REST = "Other options"
_HEADINGS = ("Arguments", "The metric", "The search", "Targets", "Output", "Reading the folder")


def _format_options(command: Any, context: Any, formatter: Any, rest: str = _REST) -> None:
    """Write the arguments and options, each under the heading that its `rich_help_panel` names."""
    sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in _HEADINGS}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is None:
            continue
        heading = getattr(param, "rich_help_panel", None)
        if param.param_type_name == "argument":
            heading, record = "Arguments", (param.metavar or param.name, param.help or "")
        what, words = record  # some typers escape [default: ...] for rich, which has no say here
        if METHODS_HERE in words:
            words = words.replace(METHODS_HERE, _methods())
        sections.setdefault(heading or rest, []).append((what, words.replace("\\[", "[")))
    sections[rest] = sections.pop(rest, [])  # last
    for heading, records in sections.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def _methods() -> str:
    from posthoc_cli.solver import DEFAULT, METHODS

    said = []
    for name, method in METHODS.items():
        note = ", the default" if name == DEFAULT else ""
        if not method.takes_emas:
            note = ", with --raw only"
        said.append(f"{name}{note}: {method.help}.")
    return " ".join(said)


class Command(TyperCommand):
    """A command with its options under headings."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        arguments = [
            str(param.metavar or param.name)
            if param.required
            else f"[{param.metavar or param.name}]"
            for param in self.get_params(ctx)
            if param.param_type_name == "argument"
        ]
        formatter.write_usage(ctx.command_path, " ".join([*arguments, "[OPTIONS]"]))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _format_options(self, ctx, formatter)


class Group(TyperGroup):
    """The program: its commands, in the order of use, then its own options."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage(ctx.command_path, "COMMAND ...")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        _format_options(self, ctx, formatter, "Options")
