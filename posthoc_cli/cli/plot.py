"""`posthoc plot`: a figure of the profiles wanted, those the weights give, and the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import counted, note
from posthoc_cli.cli.solve import solve_folder
from posthoc_cli.errors import UsageError

MOST = 6
"""Targets of one figure: more can't be read."""


def plot(
    folder: options.FolderArgument,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel="Output",
            show_default=False,
            help="The figure to write; its ending says as what: .png, .svg or .pdf.",
        ),
    ],
    sigma_rel: options.SigmaRelOption = None,
    gamma: options.GammaOption = None,
    step: options.StepOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            show_default=False,
            help="Whose weights are drawn: edm2 (the default), algorithm3 or blup; with --raw "
            "share (the default there) or blup.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", rich_help_panel="Output", help="Replace a file that exists.")
    ] = False,
    pattern: options.PatternOption = None,
    profiles: options.ProfilesOption = None,
    only: options.OnlyOption = None,
    raw: options.RawOption = False,
    skip_incomplete: options.SkipIncompleteOption = False,
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
    from posthoc_cli.solver.estimates import estimate_methods

    path = Path(output)
    if path.suffix.lower() not in plotting.FORMATS:
        raise UsageError("-o", f"'{output}' doesn't end in .png, .svg or .pdf", "choose one")
    if path.exists() and not force:
        raise UsageError(str(path), "exists already", "use --force to replace it")
    plotting.check_matplotlib()
    targets = options.read_targets(sigma_rel, gamma)
    if len(targets) > MOST:
        raise UsageError("--sigma-rel", f"{len(targets)} targets", f"give up to {MOST} a figure")
    solved = solve_folder(
        folder,
        targets,
        step=step,
        method=method,
        device="cpu",
        reading=options.Reading(pattern, profiles, only, raw, skip_incomplete),
        quiet=quiet,
        sample=True,
    )
    assert solved.trajectory is not None
    snapshots = [snapshot.profile for snapshot in solved.snapshots]
    wanted = options.at_step(targets, solved.step)
    verdicts = estimate_methods(snapshots, wanted, solved.trajectory)
    weights = {each.method: each.solution.weights for each in verdicts if each.solution is not None}
    order = [name for name in ("algorithm3", "edm2", "share", "blup") if name in weights]
    plotting.draw(
        snapshots,
        wanted,
        [_title(target) for target in targets],
        {name: weights[name] for name in order},
        solved.solution.method,
        path,
    )
    note(f"{path}: {counted(len(targets), 'target')} drawn", quiet)


def _title(target: options.Target) -> str:
    symbol = r"$\gamma$" if target.option == "--gamma" else r"$\sigma_{\mathrm{rel}}$"
    return f"{symbol} = {target.text}"
