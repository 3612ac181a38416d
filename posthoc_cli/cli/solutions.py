"""A solution as the commands show it: solved as asked, noted on stderr, described as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posthoc_cli.cli import options
from posthoc_cli.cli.console import by_text, counted, describe_warnings, note, warn, warning_lines
from posthoc_cli.cli.folders import missing, wrapped
from posthoc_cli.cli.lora import lora_lines
from posthoc_cli.cli.spelling import spelled
from posthoc_cli.errors import percent

if TYPE_CHECKING:
    from posthoc_cli.api import Run, Solution
    from posthoc_cli.solver.arrays import FloatArray
    from posthoc_cli.solver.groups import TensorGroup
    from posthoc_cli.synthesis.outputs import Saved

FAR_OFF = 0.05
"""Of a profile error or an expected one: what is beyond it is said without being asked."""

LONE = 0.9
"""The weight of a single raw checkpoint beyond which an EMA is hardly more than that one."""

LOUD = 4
"""The noise gain beyond which snapshots of half precision don't give half precision."""

_NAMED = 5
"""Files of one reason to be left out that are named on stderr; the JSON has all."""

HALF = frozenset({"F16", "BF16"})


def open_and_warn(
    paths: Sequence[str],
    reading: options.Reading,
    quiet: bool,
    writing: options.Writing | None = None,
) -> Run:
    """The snapshots of a folder, for outputs written so; warns of what is odd and names what is
    left out."""
    if writing:
        reading = replace(reading, copy=writing.copy, drop=writing.drop, lora=writing.lora)
    run = options.open_folder(paths, reading)
    for files, reason in _left_out(run.skipped):
        note(f"left out: {reason}", quiet, files)
    warn(warning_lines(run.warnings), quiet)
    return run


def _left_out(skipped: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The files, in words, and the reason that keeps them out; our own outputs are but counted."""
    lines = []
    for reason, names in by_text(skipped).items():
        shown, more = ", ".join(names[:_NAMED]), len(names) - _NAMED
        if more > 0:
            shown += f" and {more} more (posthoc inspect names them)"
        if reason.startswith("made by posthoc") and len(names) > 1:
            shown = f"{len(names)} files"
        lines.append((shown, reason))
    return lines


def warn_of_sample(solution: Solution, quiet: bool, *, broken: bool = True) -> None:
    """Warn of what a sample of the values tells; `broken`: also of those that are not finite."""
    warn(warning_lines(_of_sample(solution, broken)), quiet)


def _of_sample(solution: Solution, broken: bool = True) -> list[tuple[str, str]]:
    from posthoc_cli.snapshots.doubts import doubts_of_values
    from posthoc_cli.snapshots.runs import jumps
    from posthoc_cli.solver import DEFAULT

    found = []
    if solution.doubt:
        instead = "" if solution.method == DEFAULT else f"; the weights are {solution.method}'s"
        found.append(("", f"{solution.doubt}{instead}"))
    if solution.sample is None:
        return found
    moments = solution.sample.moments
    if moments.broken and broken:
        share = f"{moments.broken:,} of {moments.sampled:,} sampled values"
        found.append(("", f"{share} are NaN or infinite in some snapshot, and left out"))
    found += jumps(solution.sample.snapshots, moments.differences, moments.squares)
    return [*found, *doubts_of_values(solution.sample.snapshots, moments.differences)]


def tell_of_outputs(solution: Solution, saved: Saved, quiet: bool) -> None:
    """What is to be known of outputs before they are loaded: a line on stderr each."""
    tensors = solution.snapshots[-1].index.tensors
    for text in (*missing(saved.outputs), *wrapped(saved.outputs, tensors)):
        note(f"warning: {text}", quiet)
    if saved.nonfinite:
        note(f"warning: {saved.summary} (--strict makes this an error)", quiet)
    for text in lora_lines(saved):
        note(text, quiet)


def note_large_errors(solution: Solution, quiet: bool) -> None:
    """One line on stderr for targets out of reach, and one for rounding that is blown up."""
    if quiet:
        return
    targets = range(len(solution.wanted))
    lone = _note_lone_checkpoints(solution) if solution.run.raw else []
    if solution.expected is not None:
        off = solution.expected.relative
        if far := [at for at in targets if off[at] > FAR_OFF and at not in lone]:
            note(
                f"{_listed(solution, far)}: an error of up to {percent(off[far].max())} of the "
                "distance between EMA and network is to be expected (see posthoc solve --diagnose)",
                quiet,
            )
        errors = solution.solved.profile_error
        unknown = [at for at in targets if off[at] != off[at] and not errors[at] <= FAR_OFF]
        if unknown:
            note(
                f"{_listed(solution, unknown)}: how far off is unknown, as a single snapshot "
                "doesn't tell how the network moved; what comes out is that snapshot",
                quiet,
            )
    if solution.expected is not None or solution.run.raw:
        return
    errors, gains = solution.solved.profile_error, solution.solved.noise_gain
    if far := [at for at in targets if errors[at] > FAR_OFF]:
        _note_far(solution, [at for at in far if solution.wanted[at].gamma is not None], errors)
        _note_far(solution, [at for at in far if solution.wanted[at].gamma is None], errors)
    half = sorted(HALF & {dtype for snapshot in solution.snapshots for dtype in snapshot.dtypes})
    if half and (loud := [at for at in targets if gains[at] > LOUD]):
        note(
            f"{_listed(solution, loud)}: the rounding of {' and '.join(half)} snapshots comes out "
            f"up to {gains[loud].max():.3g} times as large; --method blup weighs that",
            quiet,
        )


def _note_far(solution: Solution, far: Sequence[int], errors: FloatArray) -> None:
    """A line on stderr for targets that are all power functions, or none of them is."""
    if not far:
        return
    worst = percent(errors[far].max())
    if solution.wanted[far[0]].gamma is None:  # an edge costs much of it, and little otherwise
        said = f"a profile error of up to {worst}; --diagnose tells what comes of it"
    else:
        said = f"out of reach, with a profile error of up to {worst}; {_reach(solution)}"
    note(f"{_listed(solution, far)}: {said}", quiet=False)


def _note_lone_checkpoints(solution: Solution) -> list[int]:
    """A line on stderr for EMAs narrower than raw checkpoints are apart; returns which."""
    weights = solution.solved.weights
    largest = weights.max(axis=1)
    lone = [at for at in range(len(solution.wanted)) if largest[at] > LONE]
    if len(solution.snapshots) < 2:
        return []
    if lone:
        worst = max(lone, key=lambda at: float(largest[at]))
        one = solution.snapshots[int(weights[worst].argmax())]
        note(
            f"{_listed(solution, lone)}: narrower than the checkpoints are apart; up to "
            f"{percent(largest[worst])} of it is '{one.file}' alone",
            quiet=False,
        )
    return lone


def _listed(solution: Solution, which: Sequence[int]) -> str:
    """The targets `which`, in short: `sigma_rel 0.2, 0.25 and 3 more`."""
    first, *others = (solution.wanted[at] for at in which)
    alike = [target.text for target in others if target.argument == first.argument]
    shown = [str(first), *alike[:2]]
    more = len(which) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _reach(solution: Solution) -> str:
    from posthoc_cli.solver.methods import powers
    from posthoc_cli.solver.reach import reachable

    profiles = powers([snapshot.profile for snapshot in solution.snapshots])
    ranges = reachable(profiles or [], solution.step, FAR_OFF)
    if not ranges:
        return f"nothing is within {FAR_OFF:.0%} at step {solution.step}"
    spans = " and ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges)
    return f"within {FAR_OFF:.0%}, these snapshots reach sigma_rel {spans}"


def sources(solution: Solution) -> str:
    """Such as `16 snapshots`, or `400 of 5,000 snapshots`."""
    used = f"{len(solution.snapshots):,} of " if len(solution.snapshots) < solution.found else ""
    return used + counted(solution.found, "raw checkpoint" if solution.run.raw else "snapshot")


def group_title(group: TensorGroup, step: int) -> str:
    """Such as `*.attn.* (12 tensors): sigma_rel 0.15 (gamma 4.107)`."""
    tensors = f"{' '.join(group.globs)} ({counted(group.tensors, 'tensor')})"
    return f"{tensors}: {group.target.title(step)}"


def titles(solution: Solution) -> list[str]:
    """One for each target, and one for each group."""
    own = [target.title(solution.step) for target in solution.targets]
    return [*own, *(group_title(group, solution.step) for group in solution.groups)]


def best_known_error(solution: Solution) -> tuple[str, list[float]]:
    """What tells best how near each target comes, under its heading."""
    if solution.expected is not None:  # then it is known what comes of the profile error
        return "expected error", solution.expected.relative.tolist()
    if solution.run.raw:  # which have no profile to be off by
        return "largest weight", solution.solved.weights.max(axis=1).tolist()
    return "profile error", solution.solved.profile_error.tolist()


def describe(paths: Sequence[str], solution: Solution) -> dict[str, Any]:
    """What --json prints; docs/json.md has its schema."""
    solved = solution.solved
    return {
        "folder": paths[0] if len(paths) == 1 else str(solution.run.folder),
        "method": solved.method,
        "device": solution.device,
        "condition_number": solved.condition_number,
        "snapshots_used": len(solution.snapshots),
        "snapshots_found": solution.found,
        "skipped": [
            {"file": file, "reason": spelled(reason)} for file, reason in solution.run.skipped
        ],
        "warnings": describe_warnings([*solution.run.warnings, *_of_sample(solution)]),
        "targets": [_describe_target(solution, at) for at, _ in enumerate(solution.targets)],
        "groups": [
            {"tensors": list(group.globs), "count": group.tensors, **_describe_target(solution, at)}
            for at, group in enumerate(solution.groups, len(solution.targets))
        ],
    }


def _describe_target(solution: Solution, at: int) -> dict[str, Any]:
    target, solved = solution.wanted[at], solution.solved
    return {
        "target": target.as_dict(solution.step),
        "sigma_rel": target.sigma_rel,
        "gamma": target.gamma,
        "step": solution.step,
        "sum_of_weights": float(solved.sum_of_weights[at]),
        "noise_gain": float(solved.noise_gain[at]),
        "profile_error": float(solved.profile_error[at]),
        **solution.errors_of(at),
        "weights": [
            {
                "file": snapshot.file,
                "step": snapshot.step,
                "sigma_rel": snapshot.sigma_rel,
                "gamma": snapshot.gamma,
                "profile": snapshot.profile.as_dict(),
                "weight": float(weight),
            }
            for snapshot, weight in zip(solution.snapshots, solved.weights[at], strict=True)
        ],
    }
