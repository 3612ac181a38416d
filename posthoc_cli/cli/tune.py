"""`posthoc tune`: the average that a metric of one's own likes best."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import options
from posthoc_cli.cli.console import (
    describe_warnings,
    note,
    plain_table,
    print_json,
    print_table,
    stdout_console,
)
from posthoc_cli.cli.lora import load_numpy
from posthoc_cli.cli.solutions import open_and_warn, tell_of_outputs, warn_of_sample
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.errors import UsageError, in_bytes, percent, printable

if TYPE_CHECKING:
    from posthoc_cli.api.tuner import Tuned, Tuner


def _parameters() -> list[str]:
    return ["sigma-rel", "window", "half-life", "decay"]


@options.with_options
def tune(
    reading: options.Reading,
    folder: options.FolderArgument,
    writing: options.Writing,
    metric: Annotated[
        str,
        options.in_panel(
            options.METRIC,
            "COMMAND",
            "A command of the shell that measures a network, {file} in it; also {sigma_rel}, "
            "{target}, {step}, {seed}, and {folder} with --layout folder. The metric is the last "
            "number on the last line that it prints.",
            show_default=False,
        ),
    ],
    minimize: Annotated[
        bool, options.flag("--minimize", "Less of the metric is better.", options.METRIC)
    ] = False,
    maximize: Annotated[
        bool, options.flag("--maximize", "More of the metric is better.", options.METRIC)
    ] = False,
    metric_regex: Annotated[
        str | None,
        options.in_panel(
            options.METRIC,
            "REGEX",
            "The metric is the group, in the last place that fits: 'FID: ([0-9.]+)'.",
        ),
    ] = None,
    metric_json: Annotated[
        str | None,
        options.in_panel(
            options.METRIC, "KEY", "The metric is at this key of the last JSON: metrics.fid."
        ),
    ] = None,
    repeats: Annotated[
        int, options.in_panel(options.METRIC, "N", "Measure each network so often.")
    ] = 1,
    timeout: Annotated[
        float | None,
        options.in_panel(options.METRIC, "SECONDS", "End a command that takes longer."),
    ] = None,
    parallel: Annotated[
        int | None,
        options.in_panel(
            options.METRIC,
            "K",
            "Run so many commands at once; by default one, or one on each of --gpus.",
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        options.in_panel(
            options.METRIC, "LIST", "The GPUs to run them on, as CUDA_VISIBLE_DEVICES: 0,1,2."
        ),
    ] = None,
    parameter: Annotated[
        str,
        options.in_panel(
            options.SEARCH,
            "PARAMETER",
            "What to search: sigma-rel, window, half-life or decay.",
            autocompletion=_parameters,
        ),
    ] = "sigma-rel",
    range: Annotated[
        str | None,
        options.in_panel(
            options.SEARCH,
            "LOW:HIGH",
            "From where to where, such as 0.02:0.25; of a window or half-life 100:2000 steps, or "
            "1%:50% of the target step. By default as far as --max-error allows.",
        ),
    ] = None,
    max_error: Annotated[
        float,
        options.in_panel(
            options.SEARCH, "X", "Without --range, search where no larger error is to be expected."
        ),
    ] = 0.05,
    also: Annotated[
        str | None, options.in_panel(options.SEARCH, "step", "Search for the best step as well.")
    ] = None,
    evaluations: Annotated[
        int, options.in_panel(options.SEARCH, "N", "How many networks to measure.")
    ] = 14,
    tolerance: Annotated[
        float | None,
        options.in_panel(
            options.SEARCH,
            "X",
            "Stop earlier, when the best length is known so well: 0.1 is to about 10%.",
        ),
    ] = None,
    seed: Annotated[
        int, options.in_panel(options.METRIC, "N", "What {seed} in the command counts up from.")
    ] = 0,
    journal: Annotated[
        str | None,
        options.in_panel(
            options.SEARCH,
            "FILE",
            "Where each evaluation is kept; the same call again goes on there. By default beside "
            "the output: best.tune.jsonl.",
        ),
    ] = None,
    workdir: Annotated[
        str | None,
        options.in_panel(
            options.SEARCH,
            "FOLDER",
            "Where the networks lie while they are measured; by default beside the journal.",
        ),
    ] = None,
    step: options.StepOption = None,
    method: options.MethodOption = None,
    device: options.DeviceOption = "cpu",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            rich_help_panel=options.OUTPUT,
            help="Write the best one there; without it, nothing but the journal is kept.",
        ),
    ] = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Find the EMA length that a metric of your own likes best, and write that EMA.

    Seven lengths are written in one pass and measured; then one at a time, where most is to be
    learned about the best. Noise is reckoned with: the best is the minimum of a curve through all
    that was measured, not the luckiest of it. Each evaluation is kept in a journal, and the same
    call again goes on where it was, after a failure, Ctrl-C or a kill.

    \b
    Examples:
      posthoc tune snapshots --metric 'python fid.py {file}' --minimize
      posthoc tune snapshots --metric 'wc -c <{file}' --maximize -o b.safetensors
    """
    if minimize == maximize:
        problem = "doesn't go with --maximize" if minimize else "neither it nor --maximize is given"
        raise UsageError("--minimize", problem, "say whether less of the metric is better, or more")
    how = writing.read()
    options.check_choice("--parameter", parameter.replace("_", "-"), _parameters())
    load_numpy()
    from posthoc_cli.api.tune import tune as search
    from posthoc_cli.cli.watching import watching
    from posthoc_cli.storage.stores import own_name
    from posthoc_cli.tuning.metric import CommandMetric, read_gpus

    devices = read_gpus(gpus) if gpus is not None else []
    command = CommandMetric(metric, metric_regex, metric_json, timeout, repeats, devices)
    run = open_and_warn(folder, reading, quiet, writing)
    name = re.sub(r"[^\w.-]", "-", own_name(run.folder))  # a host's has a colon
    place = journal or f"{_stem(output) if output else name}.tune.jsonl"
    parallel = (len(devices) or 1) if parallel is None else parallel
    with watching(command, parallel, quiet) as watch:
        tuned = search(
            run,
            command,
            minimize=minimize,
            output=output,
            workdir=workdir,
            parallel=parallel,
            report=watch.report,
            progress=watch.progress,
            started=watch.begin,
            parameter=parameter.replace("-", "_"),
            range=range,
            also=also,
            step=step,
            evaluations=evaluations,
            tolerance=tolerance,
            max_error=max_error,
            method=method,
            device=device,
            seed=seed,
            journal=place,
            **how,
        )
    assert watch.tuner is not None
    if tuned.best is not None:
        warn_of_sample(tuned.best.solution, quiet)
        if tuned.output is not None:
            tell_of_outputs(tuned.best.solution, tuned.output, quiet)
    for text in tuned.notes:
        note(text, quiet)
    if as_json:
        print_json(_describe(folder, watch.tuner, tuned))
    else:
        _draw(watch.tuner, tuned)


def _stem(output: str) -> str:
    """The output without its ending, to name the journal beside it: here, where that is a URL."""
    from posthoc_cli.storage.places import is_url

    path = Path(output)
    path = path.with_suffix("") if path.suffix == ".safetensors" else path
    return path.name if is_url(output) else str(path)


def _describe(folder: list[str], tuner: Tuner, tuned: Tuned) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    best, belief = tuned.best, tuned.posterior
    header = tuner.journal.header
    return {
        "folder": folder[0] if len(folder) == 1 else str(tuner.run.folder),
        "journal": str(tuner.journal.path),
        "goal": header["goal"],
        "parameter": header["parameter"],
        "range": header["range"],
        "best": best
        and {
            "target": best.target.as_dict(best.step),
            "sigma_rel": best.sigma_rel,
            "step": best.step,
            "metric": best.metric,
            "interval": [each.value for each in best.interval],
            "metric_interval": list(best.metric_interval),
            "expected_error": best.expected_error,
        },
        "noise": belief and belief.noise,
        "flat": belief and belief.flat,
        "at_edge": belief and belief.at_edge,
        "evaluations": [each.as_dict() for each in tuned.evaluations],
        "output": tuned.output and str(tuned.output[0]),
        "skipped": bool(tuned.output and tuned.output.outputs[0].seconds is None),
        "notes": [spelled(text) for text in tuned.notes],
        "warnings": describe_warnings(tuner.run.warnings),
    }


def _draw(tuner: Tuner, tuned: Tuned) -> None:
    """A line for each length that was measured, by length; then the best."""
    console = stdout_console()
    parameter = (
        tuner.axis.parameter.replace("_", "-") if tuner.axis.parameter != "sigma_rel" else ""
    )
    steps = ["step"] if tuner.steps else []
    table = plain_table(
        right=[parameter or "sigma_rel", *steps, "metric", "expected error", "time"]
    )
    for one in sorted(tuned.evaluations, key=lambda each: (each.length, each.step)):
        if one.metric is not None:
            error = "" if one.expected_error is None else percent(one.expected_error)
            at = [str(one.step)] if tuner.steps else []
            length = one.target.partition(":")[2]
            table.add_row(length, *at, f"{one.metric:.6g}", error, f"{one.seconds:.1f} s")
    if table.rows:
        print_table(console, table)
        console.print()
    best = tuned.best
    if best is None:
        ends = tuner.axis
        console.print(f"nothing measured; {ends.low} to {ends.high.text} would be searched")
        return
    low, high = (each.text for each in best.interval)
    less, more = best.metric_interval
    when = f" at step {best.step}" if tuner.steps else ""
    told = f"best {best.target} ({low} to {high}){when}: {best.metric:.6g}"
    console.print(f"{told} ({less:.6g} to {more:.6g})", style="bold", soft_wrap=True)
    if tuned.output:
        (made,) = tuned.output.outputs
        kept = " (kept as it was)" if made.seconds is None else ""
        console.print(f"{printable(str(made.path))}: {in_bytes(made.bytes)}{kept}", soft_wrap=True)
