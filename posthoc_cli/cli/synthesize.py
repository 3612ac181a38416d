"""`posthoc synthesize`: write the EMAs that are wanted."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
from posthoc_cli.cli.drawing import percent
from posthoc_cli.cli.outputs import make_folder, output_paths
from posthoc_cli.cli.solve import Solved, note_large_errors, solve_folder
from posthoc_cli.cli.solve import describe as describe_solved
from posthoc_cli.errors import SnapshotError, UsageError, in_bytes, printable

if TYPE_CHECKING:
    from posthoc_cli.synthesis.nonfinite import NonfiniteTensor
    from posthoc_cli.synthesis.plan import Plan

_OUTPUT = "Output"


def _dtypes() -> list[str]:
    from posthoc_cli.storage.dtypes import OUTPUT_DTYPES

    return ["same", *OUTPUT_DTYPES]


@dataclass(frozen=True, slots=True)
class Output:
    """One target's output: a file, or an index and its `shards`; their bytes together.

    `seconds` is None where an output was there and is kept.
    """

    path: Path
    shards: Sequence[Path]
    bytes: int
    seconds: float | None


def synthesize(
    folder: options.FolderArgument,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            rich_help_panel=_OUTPUT,
            show_default=False,
            help="The file to write; with several targets a folder, or a template with "
            "{sigma_rel}, {gamma} or {step}. A path that ends in / is made if need be.",
        ),
    ],
    sigma_rel: options.SigmaRelOption = None,
    gamma: options.GammaOption = None,
    step: options.StepOption = None,
    method: options.MethodOption = None,
    device: options.DeviceOption = "cpu",
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel="Targets",
            show_default=False,
            help="Write nothing when a larger error is to be expected, relative to how far the EMA "
            "is from the network: 0.05 is 5%.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel=_OUTPUT,
            autocompletion=_dtypes,
            help="Of the tensors written: same, float64, float32, float16 or bfloat16.",
        ),
    ] = "same",
    copy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            rich_help_panel=_OUTPUT,
            help="Tensors to take from the newest snapshot instead of averaging; may be repeated.",
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", rich_help_panel=_OUTPUT, help="Tensors to leave out; may be repeated."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", rich_help_panel=_OUTPUT, help="Replace outputs that exist.")
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            rich_help_panel=_OUTPUT,
            help="Keep outputs that exist, and write the others.",
        ),
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=_OUTPUT,
            show_default=False,
            help="Write outputs larger than this, such as 5GB, as shards with an index, as Hugging "
            "Face's libraries load them.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            rich_help_panel=_OUTPUT,
            help="Write nothing when there is NaN or infinity in the snapshots, or would be in an "
            "output; without it, that is a warning.",
        ),
    ] = False,
    pattern: options.PatternOption = None,
    profiles: options.ProfilesOption = None,
    only: options.OnlyOption = None,
    raw: options.RawOption = False,
    skip_incomplete: options.SkipIncompleteOption = False,
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
      posthoc synthesize snapshots --gamma 5 --dtype float32 -o ema.safetensors
      posthoc synthesize checkpoints --raw --sigma-rel 0.15 -o lora.safetensors
    """
    if force and skip_existing:
        raise UsageError("--force", "doesn't go with --skip-existing", "leave out one of the two")
    options.check_choice("--dtype", dtype, _dtypes())
    if max_error is not None and not 0 < max_error < float("inf"):
        raise UsageError("--max-error", f"{max_error:g} is out of bounds", "give, say, 0.05 for 5%")
    shard_bytes = (
        None if max_shard_size is None else options.read_size("--max-shard-size", max_shard_size)
    )
    solved = solve_folder(
        folder,
        options.read_targets(sigma_rel, gamma),
        step=step,
        method=method,
        device=device,
        reading=options.Reading(pattern, profiles, only, raw, skip_incomplete),
        quiet=quiet,
        sample=max_error is not None,
        leave_out=(*(copy or ()), *(drop or ())),
    )
    if max_error is not None:
        _check_error(solved, max_error)
    paths = output_paths(output, folder, solved.targets, solved.step)

    from posthoc_cli.storage.shards import existing_output
    from posthoc_cli.synthesis.plan import make_plan

    kept = {path for path in paths if skip_existing and existing_output(path)}
    for path in paths:
        if path in kept:
            note(f"{path}: exists already; skipped", quiet)

    plan = make_plan(solved.snapshots, dtype=dtype, copy=copy or (), drop=drop or ())
    note_large_errors(solved, quiet)
    make_folder(output)
    written, findings = _write(
        plan,
        solved,
        paths,
        kept,
        {"copied": copy or (), "dropped": drop or ()},
        {"overwrite": force, "shard_bytes": shard_bytes, "strict": strict},
        progress=not quiet,
    )
    if findings:
        from posthoc_cli.synthesis.nonfinite import complaint

        subject, problem = complaint(plan, findings)
        note(f"warning: {subject}: {problem} (--strict makes this an error)", quiet)
    if as_json:
        print_json(_describe(solved, written, findings))
    else:
        _draw(solved, written)


def _check_error(solved: Solved, most: float) -> None:
    """Raise SnapshotError for the first target that is to be expected further off than `most`."""
    assert solved.expected is not None
    for target, error in zip(solved.targets, solved.expected.relative.tolist(), strict=True):
        if not error <= most:
            known = f"{percent(error)}, more than" if error == error else "unknown, so not within"
            better = "" if solved.solution.method == "blup" else "use --method blup, or "
            raise SnapshotError(
                str(target),
                f"its expected error is {known} --max-error {percent(most)}",
                f"{better}see solve --diagnose for what these snapshots can give",
            )


def _write(
    plan: Plan,
    solved: Solved,
    paths: Sequence[Path],
    kept: set[Path],
    globs: dict[str, Sequence[str]],
    how: dict[str, Any],
    *,
    progress: bool,
) -> tuple[list[Output], list[NonfiniteTensor]]:
    """Write those of `paths`, one for each target, that are not `kept`, in one pass.

    `globs` of tensors go into the recipes; `how` are further options of execute.
    """
    findings: list[NonfiniteTensor] = []
    wanted = [at for at, path in enumerate(paths) if path not in kept]
    written = {at: Output(*_standing(path), None) for at, path in enumerate(paths) if path in kept}
    if wanted:
        from posthoc_cli.synthesis.engine import execute

        with progress_bar(counted(len(wanted), "file"), plan.bytes_to_read, progress) as advance:
            begin = time.perf_counter()
            done = execute(
                plan,
                solved.solution.weights[wanted],
                [paths[at] for at in wanted],
                _recipes(solved, wanted, globs),
                device=solved.device,
                progress=advance,
                **how,
            )
            seconds = time.perf_counter() - begin
        findings = done.findings
        for at, files, size in zip(wanted, done.files, done.sizes, strict=True):
            written[at] = Output(files[-1], files[:-1], size, seconds)
    return [written[at] for at in range(len(paths))], findings


def _standing(path: Path) -> tuple[Path, Sequence[Path], int]:
    """An output that is there already: its file or index, its shards, their bytes."""
    from posthoc_cli.storage.shards import existing_output, shard_names

    main = existing_output(path)[0]
    shards = [] if main == path else [path.with_name(name) for name in sorted(shard_names(main))]
    return main, shards, sum(os.path.getsize(each) for each in (main, *shards))


def _recipes(
    solved: Solved, wanted: Sequence[int], globs: dict[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """The recipes of the targets `wanted`; `globs` are those of the tensors copied and dropped."""
    from posthoc_cli.storage.readers import fingerprint
    from posthoc_cli.synthesis.recipe import make_recipe

    marks = [(each.bytes, fingerprint(each.index)) for each in solved.snapshots]
    recipes = []
    for at in wanted:
        recipe = make_recipe(
            solved.solution.method,
            solved.solution.targets[at],
            [snapshot.file for snapshot in solved.snapshots],
            solved.solution.snapshots,
            solved.solution.weights[at].tolist(),
            marks=marks,
            **globs,
        )
        # A profile holds gamma only: what was said as 0.05 shall not come out as
        # 0.04999999999999999.
        recipe["target"]["sigma_rel"] = solved.targets[at].sigma_rel
        for source, snapshot in zip(recipe["sources"], solved.snapshots, strict=True):
            source["sigma_rel"] = snapshot.sigma_rel
        recipes.append(recipe)
    return recipes


def _describe(
    solved: Solved, written: Sequence[Output], findings: Sequence[NonfiniteTensor]
) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    document = describe_solved(solved)
    for target, one in zip(document["targets"], written, strict=True):
        target["output"] = str(one.path)
        if one.shards:
            target["shards"] = [str(path) for path in one.shards]
        target["bytes"] = one.bytes
        target["seconds"] = one.seconds or 0.0
        target["skipped"] = one.seconds is None
    document["nonfinite"] = [
        {
            "tensor": finding.tensor,
            "nan": finding.nan,
            "infinite": finding.infinite,
            "overflowed": finding.overflowed,
            "largest": finding.largest,
            "files": [solved.snapshots[at].file for at in sorted(finding.snapshots)],
        }
        for finding in findings
    ]
    return document


def _draw(solved: Solved, written: Sequence[Output]) -> None:
    """A line for each output; or two, when the paths are long and the terminal narrow."""
    from rich.text import Text

    console = stdout_console()
    solution = solved.solution
    kind, errors = "profile error", solution.profile_error.tolist()
    if solved.snapshots[0].profile.raw:  # which have no profile to be off by
        kind, errors = "largest weight", solution.weights.max(axis=1).tolist()
        if solved.expected is not None:
            kind, errors = "expected error", solved.expected.relative.tolist()
    headings = ("size", "time", "sum of weights", "noise gain", kind)
    lines = [
        (
            in_bytes(one.bytes),
            "kept" if one.seconds is None else f"{one.seconds:.1f} s",
            f"{solution.sum_of_weights[at]:.6f}",
            f"{solution.noise_gain[at]:.3f}",
            percent(errors[at]),
        )
        for at, one in enumerate(written)
    ]
    names = [
        printable(str(one.path)) + (f" ({len(one.shards)} shards)" if one.shards else "")
        for one in written
    ]
    if max(map(len, names)) + 60 > console.width:
        for name, line in zip(names, lines, strict=True):
            console.print(name, style="bold", soft_wrap=True)
            size, seconds, total, noise, error = line
            console.print(f"  {size}, {seconds}; sum {total}, noise gain {noise}, {kind} {error}")
        return
    table = plain_table()
    table.add_column("output")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, line in zip(names, lines, strict=True):
        table.add_row(Text(name), *line)
    print_table(console, table)
