"""The `posthoc` program: its commands, and how typer's complaints become one line of ours."""

from __future__ import annotations

import re
from typing import Annotated, Any, cast

import typer

from posthoc_cli._version import __version__
from posthoc_cli.cli.convert import convert
from posthoc_cli.cli.demo import demo
from posthoc_cli.cli.helptext import Command, Group
from posthoc_cli.cli.inspect import inspect
from posthoc_cli.cli.pack import pack
from posthoc_cli.cli.plan import plan
from posthoc_cli.cli.plot import plot
from posthoc_cli.cli.solve import solve
from posthoc_cli.cli.synthesize import synthesize
from posthoc_cli.cli.tune import tune
from posthoc_cli.cli.verify import verify
from posthoc_cli.errors import UsageError

PROGRAM = "posthoc"

app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,  # plain help: the same everywhere, and fast
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, short_help="Show which snapshots a folder holds.")(inspect)
app.command(cls=Command, short_help="Make snapshots of other tools' checkpoints.")(convert)
app.command(cls=Command, short_help="Store snapshots as differences: fewer bytes.")(pack)
app.command(cls=Command, short_help="Show the weights that give an EMA.")(solve)
app.command(cls=Command, short_help="Write an EMA, or several.")(synthesize)
app.command(cls=Command, short_help="Find the EMA that a metric likes best.")(tune)
app.command(cls=Command, short_help="Check an output against its snapshots.")(verify)
app.command(cls=Command, short_help="Draw profiles and weights.")(plot)
app.command(cls=Command, short_help="Show, before training, what it will give.")(plan)
app.command(cls=Command, short_help="Try it all on a network trained here.")(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def posthoc(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Post-hoc EMA: rebuild an EMA of any length from the snapshots of a training run.

    \b
    Examples:
      posthoc inspect snapshots
      posthoc solve snapshots --sigma-rel 0.07
      posthoc synthesize snapshots --sigma-rel 0.07 -o ema-0.07.safetensors

    Results go to stdout, all else to stderr. Exit codes: 0 done, 1 the machine failed, 2 the
    command line is wrong, 3 the snapshots are wrong, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


# Older typers import click, newer ones carry it inside: the one name that both have leads to it.
_Complaint = cast("type[Exception]", typer.BadParameter.__mro__[1])
"""click's UsageError: the command line doesn't parse."""


def run() -> int:
    """Run the command line; returns the exit code. Raises PosthocError, KeyboardInterrupt."""
    try:
        code = typer.main.get_command(app).main(prog_name=PROGRAM, standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except SystemExit as leaving:  # typer's answer to a broken pipe
        if isinstance(leaving.__context__, BrokenPipeError):
            raise leaving.__context__ from None
        raise
    except _Complaint as complaint:
        raise _one_line(complaint) from None
    if code == 130:  # newer typers catch Ctrl-C themselves
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _one_line(complaint: Any) -> UsageError:
    """What typer says about the command line, as `<option>: <what is wrong>; <what to do>`."""
    context = getattr(complaint, "ctx", None)
    command = context.command_path if context else PROGRAM
    problem = " ".join(str(complaint.message).split()).rstrip(".")
    remedy = f"see {command} --help"
    kind = type(complaint).__name__
    if kind == "NoSuchOption":
        if close := complaint.possibilities:
            remedy = f"did you mean {' or '.join(close)}? {remedy}"
        return UsageError(complaint.option_name, "no such option", remedy)
    if kind == "BadOptionUsage":
        takes_none = "does not take a value" in problem
        problem = "takes no value" if takes_none else "needs a value after it"
        return UsageError(complaint.option_name, problem, remedy)
    if getattr(complaint, "param", None) is not None:
        param = complaint.param
        is_option = param.param_type_name == "option"
        subject = min(param.opts, key=len) if is_option else param.metavar or param.name
        if kind == "MissingParameter":
            problem = "missing"
        elif "valid int" in problem:
            problem = "not a whole number"
        return UsageError(subject, problem, remedy)
    if extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", problem):
        return UsageError(extra[1], "one argument too many", remedy)
    if unknown := re.match(r"No such command '(.*?)'", problem):
        import difflib

        commands = [getattr(each.callback, "__name__", "") for each in app.registered_commands]
        if close := difflib.get_close_matches(unknown[1].lower(), commands):
            remedy = f"did you mean {' or '.join(close)}? {remedy}"
        return UsageError(unknown[1], "no such command", remedy)
    return UsageError(command, problem[:1].lower() + problem[1:], remedy)
