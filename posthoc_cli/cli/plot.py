"""`posthoc plot`: a figure of the profiles wanted, those the weights give, and the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import counted, note
from posthoc_cli.cli.solutions import open_and_warn, warn_of_sample
from posthoc_cli.errors import UsageError

if TYPE_CHECKING:
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
    step, in place of the profile: theirs are spikes.

    \b
    Examples:
      posthoc plot snapshots --sigma-rel 0.03,0.07,0.20 -o profiles.pdf
      posthoc plot snapshots --gamma 5 --method blup -o profiles.png
      posthoc plot checkpoints --raw --sigma-rel 0.10,0.20 -o shares.png
    """
    from posthoc_cli import plotting
    from posthoc_cli.storage.places import place
    from posthoc_cli.storage.stores import exists
    from posthoc_cli.storage.temporary import clean_up
    from posthoc_cli.storage.writing import make_output

    path = place(output)
    if path.suffix.lower() not in plotting.FORMATS:
        raise UsageError("-o", f"'{output}' doesn't end in .png, .svg or .pdf", "choose one")
    clean_up(path.parent)
    if exists(path) and not force:
        raise UsageError(str(path), "exists already", "use --force to replace it")
    make_output(path, 0, overwrite=force).check_absent()
    plotting.check_matplotlib()
    wanted = targets.read()
    if (count := sum(map(len, wanted.values()))) > MOST:
        raise UsageError("--sigma-rel", f"{count} targets", f"give up to {MOST} a figure")
    solution = open_and_warn(folder, reading, quiet).solve(
        step=step, method=method, sample=True, **wanted
    )
    warn_of_sample(solution, quiet)
    estimates = solution.estimate_methods()
    weights = {each.method: each.solved.weights for each in estimates if each.solved is not None}
    order = [name for name in ("algorithm3", "edm2", "share", "blup") if name in weights]
    picture = plotting.draw(
        [snapshot.profile for snapshot in solution.snapshots],
        [target.profile(solution.step) for target in solution.targets],
        [_title(target) for target in solution.targets],
        {name: weights[name] for name in order},
        solution.method,
        path.suffix.lower(),
    )
    with make_output(path, len(picture), overwrite=force) as file:
        file.write_at(0, picture)
    note(f"{path}: {counted(count, 'target')} drawn", quiet)


def _title(target: Target) -> str:
    symbols = {"sigma_rel": r"$\sigma_{\mathrm{rel}}$", "gamma": r"$\gamma$"}
    symbol = symbols.get(target.argument)
    return f"{symbol} = {target.text}" if symbol else str(target)
