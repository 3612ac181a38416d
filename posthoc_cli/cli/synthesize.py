"""`posthoc synthesize`: write the EMAs that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    counted,
    note,
    plain_table,
    print_json,
    print_table,
    progress_bar,
    stdout_console,
)
from posthoc_cli.cli.folders import describe_manifest, draw_manifests
from posthoc_cli.cli.lists import read_target_for
from posthoc_cli.cli.lora import describe_lora, load_numpy
from posthoc_cli.cli.solutions import (
    best_known_error,
    describe,
    group_title,
    note_large_errors,
    open_and_warn,
    tell_of_outputs,
    warn_of_sample,
)
from posthoc_cli.errors import in_bytes, percent, printable

if TYPE_CHECKING:
    from posthoc_cli.api import Solution
    from posthoc_cli.synthesis.output_files import Output
    from posthoc_cli.synthesis.outputs import Saved


@options.with_options
def synthesize(
    reading: options.Reading,
    folder: options.FolderArgument,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            rich_help_panel=options.OUTPUT,
            show_default=False,
            help="The file or folder to write; with several targets a folder, or a template with "
            "{sigma_rel}, {gamma}, {target} or {step}. A path that ends in / is made if need be. "
            "Also in a bucket: s3://, gs:// or az://.",
        ),
    ],
    targets: options.Targets,
    writing: options.Writing,
    target_for: options.TargetForOption = None,
    step: options.StepOption = None,
    method: options.MethodOption = None,
    device: options.DeviceOption = "cpu",
    max_error: Annotated[
        float | None,
        options.in_panel(
            options.TARGETS,
            "X",
            "Write nothing when a larger error is to be expected, relative to how far the EMA "
            "is from the network: 0.05 is 5%.",
            show_default=False,
        ),
    ] = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Write EMAs of any length, as weighted sums of the snapshots in FOLDER.

    All targets come out of one pass over the snapshots. An output appears whole or not at all, and
    carries its recipe: posthoc inspect shows it.

    \b
    Examples:
      posthoc synthesize snapshots --sigma-rel 0.07 -o ema-0.07.safetensors
      posthoc synthesize snapshots --sigma-rel 0.02,0.03,...,0.25 -o emas/
      posthoc synthesize snapshots --gamma 16.97,6.94 -o 'ema-{gamma}.safetensors'
      posthoc synthesize snapshots --window 5%,10% -o '{target}.safetensors'
      posthoc synthesize snapshots --gamma 5 --dtype float32 -o ema.safetensors
      posthoc synthesize snapshots --gamma 9 --target-for '*.bias=0.1' -o bias/
      posthoc synthesize checkpoints --raw --sigma-rel 0.15 -o lora.safetensors
      posthoc synthesize checkpoints --raw --gamma 3 --lora exact -o exact/
      posthoc synthesize snapshots --sigma-rel 0.07 -o ema-0.07 --layout folder
    """
    load_numpy()
    from posthoc_cli.api import check_max_error

    if max_error is not None:
        check_max_error(max_error)
    how, wanted, rules = writing.read(), targets.read(), read_target_for(target_for)
    opened = open_and_warn(folder, reading, quiet, writing)
    # What is wrong with the output is told before anything is read.
    opened.paths(output, step=step, layout=writing.layout, **wanted)
    made = {name: how[name] for name in options.PLANNED}
    plan = opened.plan(step, target_for=rules, **made)
    solution = opened.solve(
        step=step,
        method=method,
        device=device,
        sample=max_error is not None,
        try_sample=True,
        target_for=rules,
        **wanted,
    )
    warn_of_sample(solution, quiet, broken=False)  # those are counted when all are read
    if max_error is not None:  # first, so that a refusal is one line
        solution.check_error(max_error)
    note_large_errors(solution, quiet)
    with progress_bar(counted(len(solution.targets), "file"), plan.bytes_to_read, not quiet) as bar:
        saved = solution.save(output, max_error=max_error, progress=bar, **how)
    for one in saved.outputs:
        if one.seconds is None:
            note(f"{one.path}: exists already; skipped", quiet)
    tell_of_outputs(solution, saved, quiet)
    if as_json:
        print_json(_describe(folder, solution, saved))
    else:
        _draw(solution, saved.outputs)
        draw_manifests([one.manifest for one in saved.outputs if one.manifest])


def _describe(folder: Sequence[str], solution: Solution, saved: Saved) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    document = describe(folder, solution)
    for target, one in zip(document["targets"], saved.outputs, strict=True):
        target["output"] = str(one.path)
        if one.shards:
            target["shards"] = [str(path) for path in one.shards]
        if one.manifest is not None:
            target["folder"] = describe_manifest(one.manifest)
        target["bytes"] = one.bytes
        target["seconds"] = one.seconds or 0.0
        target["skipped"] = one.seconds is None
    describe_lora(document, saved.lora)
    from posthoc_cli.synthesis.plan import newest_of

    newest = newest_of([snapshot.step for snapshot in solution.snapshots])
    document["newest"] = solution.snapshots[newest].file
    document["nonfinite"] = [
        {
            "tensor": entry.tensor,
            "nan": entry.nan,
            "infinite": entry.infinite,
            "overflowed": entry.overflowed,
            "largest": entry.largest,
            "files": [solution.snapshots[at].file for at in sorted(entry.snapshots)],
        }
        for entry in saved.nonfinite
    ]
    return document


def _draw(solution: Solution, written: Sequence[Output]) -> None:
    """A line for each output; or two, when the paths are long and the terminal narrow."""
    from rich.text import Text

    console = stdout_console()
    solved = solution.solved
    kind, errors = best_known_error(solution)
    plain = solution.plain
    rivals = [] if plain is None else solution.errors[plain].relative.tolist()
    headings = ["size", "time", "sum of weights", "noise gain", kind]
    headings += [f"{plain}'s"] if plain else []
    files = [
        (in_bytes(one.bytes), "kept" if one.seconds is None else f"{one.seconds:.1f} s")
        for one in written
    ]
    files += [("", "")] * len(solution.groups)
    lines = [
        (
            size,
            seconds,
            f"{solved.sum_of_weights[at]:.6f}",
            f"{solved.noise_gain[at]:.3f}",
            percent(errors[at]),
            *([percent(rivals[at])] if plain else []),
        )
        for at, (size, seconds) in enumerate(files)
    ]
    names = [
        printable(str(one.path)) + (f" ({len(one.shards)} shards)" if one.shards else "")
        for one in written
    ]
    names += [printable(f"  {group_title(group, solution.step)}") for group in solution.groups]
    if max(map(len, names)) + 60 > console.width:
        for name, line in zip(names, lines, strict=True):
            console.print(name, style="bold", soft_wrap=True)
            size, seconds, total, noise, *others = line
            made = f"{size}, {seconds}; " if size else ""
            told = ", ".join(map(" ".join, zip(headings[4:], others, strict=True)))
            console.print(f"  {made}sum {total}, noise gain {noise}, {told}")
        return
    table = plain_table()
    table.add_column("output")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, line in zip(names, lines, strict=True):
        table.add_row(Text(name), *line)
    print_table(console, table)
