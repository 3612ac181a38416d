"""`posthoc plot`: a figure of the profiles wanted, those the weights give, and the weights.

Or of a search: what was measured, and the curve through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import counted, note
from posthoc_cli.cli.solutions import open_and_warn, warn_of_sample
from posthoc_cli.errors import UsageError

if TYPE_CHECKING:
    from posthoc_cli.api import Solution
    from posthoc_cli.solver.targets import Target

MOST = 6
"""Targets of one figure: more can't be read."""


@options.with_options
def plot(
    reading: options.Reading,
    folder: options.FolderArgument,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=options.OUTPUT,
            show_default=False,
            help="The figure to write; its ending says as what: .png, .svg or .pdf.",
        ),
    ],
    targets: options.Targets,
    step: options.StepOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            show_default=False,
            help="Whose weights are drawn: blup (the default), edm2 or algorithm3; with --raw "
            "blup or share.",
        ),
    ] = None,
    force: Annotated[
        bool, options.flag("--force", "Replace a file that exists.", options.OUTPUT)
    ] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Draw what each method's weights give, for each target.

    Above, the profile that is wanted and the one that each method gives, over training; below it,
    their difference; at the bottom the weights, by step and profile. Needs matplotlib: pip install
    'posthoc-cli[plot]'. Of raw checkpoints it draws the share of the average that lies before each
    step, in place of the profile: theirs are spikes. Of a journal of posthoc tune it draws what was
    measured, the curve through it, and the best.

    \b
    Examples:
      posthoc plot snapshots --sigma-rel 0.03,0.07,0.20 -o profiles.pdf
      posthoc plot snapshots --gamma 5 --method blup -o profiles.png
      posthoc plot checkpoints --raw --sigma-rel 0.10,0.20 -o shares.png
      posthoc plot best.tune.jsonl -o tune.svg
    """
    from posthoc_cli import plotting
    from posthoc_cli.storage.places import place
    from posthoc_cli.storage.stores import exists
    from posthoc_cli.storage.temporary import clean_up
    from posthoc_cli.storage.writing import check_writable, make_output
    from posthoc_cli.tuning.journal import is_journal

    path = place(output)
    check_writable(path)
    if path.suffix.lower() not in plotting.FORMATS:
        raise UsageError("-o", f"'{output}' doesn't end in .png, .svg or .pdf", "choose one")
    clean_up(path.parent)
    if exists(path) and not force:
        raise UsageError(str(path), "exists already", "use --force to replace it")
    make_output(path, 0, overwrite=force).check_absent()
    plotting.check_matplotlib()
    wanted, ending = targets.read(), path.suffix.lower()
    if len(folder) == 1 and is_journal(folder[0]):
        if method is not None or step is not None or any(wanted.values()):
            raise UsageError(folder[0], "is a journal, whose search is drawn", "give only -o")
        picture, drawn = _of_journal(folder[0], ending)
    else:
        if (count := sum(map(len, wanted.values()))) > MOST:
            raise UsageError("--sigma-rel", f"{count} targets", f"give up to {MOST} a figure")
        solution = open_and_warn(folder, reading, quiet).solve(
            step=step, method=method, sample=True, **wanted
        )
        warn_of_sample(solution, quiet)
        picture, drawn = _of_solution(solution, ending), counted(count, "target")
    with make_output(path, len(picture), overwrite=force) as file:
        file.write_at(0, picture)
    note(f"{path}: {drawn} drawn", quiet)


def _of_solution(solution: Solution, ending: str) -> bytes:
    from posthoc_cli import plotting

    estimates = solution.estimate_methods()
    weights = {each.method: each.solved.weights for each in estimates if each.solved is not None}
    order = [name for name in ("algorithm3", "edm2", "share", "blup") if name in weights]
    return plotting.draw(
        [snapshot.profile for snapshot in solution.snapshots],
        [target.profile(solution.step) for target in solution.targets],
        [_title(target) for target in solution.targets],
        {name: weights[name] for name in order},
        solution.method,
        ending,
    )


def _of_journal(path: str, ending: str) -> tuple[bytes, str]:
    """The picture of a search, and how much of it is drawn."""
    from posthoc_cli import plotting
    from posthoc_cli.tuning.axis import make_axis
    from posthoc_cli.tuning.journal import read_journal
    from posthoc_cli.tuning.search import Observation, Space, posterior

    header, evaluations = read_journal(path)
    measured = [each for each in evaluations if each.metric is not None]
    if not measured:
        raise UsageError(path, "nothing was measured yet", "run posthoc tune")
    try:
        axis = make_axis(header["parameter"], *header["range"])
        steps = tuple(map(int, header["steps"]))
        sign = {"minimize": 1.0, "maximize": -1.0}[header["goal"]]
    except (KeyError, TypeError, ValueError, UsageError):
        problem = "its first line doesn't say what was searched"
        raise UsageError(path, problem, "name another journal") from None
    observations = [
        Observation((each.length, float(each.step)) if steps else (each.length,), sign * value)
        for each in measured
        for value in each.values
    ]
    known = posterior(Space(*axis.bounds, steps), observations)
    unit = f" ({'% of the target step' if axis.unit else 'steps'})"
    label = {
        "sigma_rel": r"$\sigma_{\mathrm{rel}}$",
        "window": "window" + unit,
        "half_life": "half-life" + unit,
        "decay": "half-life of the decay (steps)",
    }[axis.parameter]
    picture = plotting.draw_search(known, sign, label, lambda x: axis.target(x).text, ending)
    return picture, counted(len(measured), "evaluation")


def _title(target: Target) -> str:
    symbols = {"sigma_rel": r"$\sigma_{\mathrm{rel}}$", "gamma": r"$\gamma$"}
    symbol = symbols.get(target.argument)
    return f"{symbol} = {target.text}" if symbol else str(target)
