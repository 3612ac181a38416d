"""Hostile files through inspect, solve and synthesize, in this process and at its limits."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors
import typer

from posthoc_cli.cli import main
from posthoc_cli.errors import PosthocError
from posthoc_cli.storage.header import read_header
from tests.command import Run
from tests.fuzzing import Case, make_case
from tests.soak.tally import Tally

FILES = 10_000
MOST_SECONDS = 1.0
MOST_BYTES = 500_000_000
LONGEST_LINE = 2_000
"""Characters of a message: one line that a person can read, whatever a file calls itself."""

_HUNG = 60


def fuzz(seed: int, tally: Tally, files: int = FILES) -> None:
    """`files` hostile files, each with the commands that a user would give it."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    shares = [(seed, range(first, files, workers)) for first in range(workers)]
    slowest, most = 0.0, 0
    # Started afresh: what this process holds shall not count.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for count, runs, losses, seconds, peak in pool.imap_unordered(_share, shares):
            tally.count("hostile files", losses, times=count)
            tally.count("runs", times=runs)
            slowest, most = max(slowest, seconds), max(most, peak)
    if most > MOST_BYTES:
        tally.count("peaks of memory", [f"{most / 1e6:.0f} MB"])
    tally.figures += [f"slowest {slowest:.2f} s", f"at most {most / 1e6:.0f} MB"]


def _share(work: tuple[int, range]) -> tuple[int, int, list[str], float, int]:
    """Some of the cases: how many files and runs, what was lost, most seconds, most bytes."""
    seed, numbers = work
    losses: list[str] = []
    runs, slowest = 0, 0.0
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        for number in numbers:
            case = make_case(seed, number)
            tried = try_case(case, Path(scratch))
            losses += [f"{case}: {loss}" for loss in tried.losses]
            runs += tried.runs
            slowest = max(slowest, tried.slowest)
            if tried.slowest > MOST_SECONDS:
                losses.append(f"{case}: took {tried.slowest:.1f} s")
    return len(numbers), runs, losses, slowest, peak_memory()


def peak_memory() -> int:
    """The most bytes that this process ever held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Tried:
    """What came of one case: the runs, the slowest of them in processor seconds, the losses."""

    def __init__(self) -> None:
        self.runs = 0
        self.slowest = 0.0
        self.losses: list[str] = []

    def run(self, arguments: Sequence[str]) -> Run:
        begin = time.process_time()
        run = run_here(arguments)
        self.slowest = max(self.slowest, time.process_time() - begin)
        self.runs += 1
        harm = harm_of(run, quiet="-q" in arguments)
        self.losses += [f"{arguments!r}: {loss}" for loss in harm]
        return run


def try_case(case: Case, scratch: Path) -> Tried:
    """Write the case below `scratch`, run the commands on it, and remove it."""
    tried = Tried()
    base = scratch / f"case-{case.number}"
    folder = base / os.fsdecode(case.folder)
    folder.mkdir(parents=True)
    try:
        for name, content in case.files.items():
            (folder / os.fsdecode(name)).write_bytes(content)
        _commands(case, tried, folder, base)
        held = {os.fsencode(path.name): path.read_bytes() for path in folder.iterdir()}
        if held != case.files:
            tried.losses.append("the folder of snapshots is no longer what it was")
    except OSError as error:  # file systems that have no such names
        if sys.platform == "linux":
            raise
        tried.losses += [] if error.errno else [str(error)]
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return tried


def _commands(case: Case, tried: Tried, folder: Path, base: Path) -> None:
    rng = random.Random(f"commands/{case.seed}/{case.number}")
    hostile = folder / os.fsdecode(case.name)

    def some(*choices: Sequence[str]) -> list[str]:
        return list(rng.choice(choices))

    def never_two(run: Run, what: str) -> Run:
        if run.code not in (0, 3):
            tried.losses.append(f"{what} ended in {run.code}: {run.err[:300]!r}")
        return run

    reading = some((), (), ("-q",))
    never_two(tried.run(["inspect", str(folder), *some((), ("--json",)), *reading]), "inspect")
    alone = tried.run(["inspect", str(hostile), *some((), ("--json",), ("--all",)), *reading])
    tried.losses += _against_the_library(hostile, never_two(alone, "inspect FILE"))
    target = some(("--sigma-rel", "0.07"), ("--gamma", "3"), ("--sigma-rel", "0.05,0.06,0.1,0.2"))
    shown = some((), ("--json",), ("--csv",), ("--diagnose",), ("--diagnose", "--json"))
    method = some((), (), ("--method", "blup"), ("--method", "algorithm3"))
    never_two(tried.run(["solve", str(folder), *target, *shown, *method, *reading]), "solve")
    output = base / "out"
    output.mkdir()
    place = some((f"{output}{os.sep}",), (f"{output}/x-{{sigma_rel}}.safetensors",))[0]
    how = some((), (), ("--dtype", "float16"), ("--dtype", "float64"), ("--copy", "*"))
    run = tried.run(
        ["synthesize", str(folder), *target, "-o", place, *how, *method, *some((), ("--json",))]
    )
    never_two(run, "synthesize")
    tried.losses += _outputs_are_whole(output, run, len(target[1].split(",")))
    verifying = ["verify", str(hostile), str(folder), *some((), ("--full",), ("--json",))]
    never_two(tried.run([*verifying, *reading]), "verify")
    if run.code == 0:
        made = str(sorted(output.iterdir())[0])
        good = tried.run(["verify", made, str(folder), "--full"])
        if good.code != 0:
            tried.losses.append(f"verify says of what was just made: {good}")


def _outputs_are_whole(output: Path, run: Run, targets: int) -> list[str]:
    found = sorted(output.iterdir())
    if len(found) != (targets if run.code == 0 else 0):
        return [f"after exit code {run.code} the outputs are {[path.name for path in found]}"]
    return [loss for path in found for loss in refusals(path)]


def refusals(path: Path) -> list[str]:
    """What the library itself says against a file that was written."""
    try:
        with safetensors.safe_open(path, framework="np"):
            return []
    except safetensors.SafetensorError as error:
        return [f"wrote a file that safetensors refuses: {error}"]


def _against_the_library(path: Path, run: Run) -> list[str]:
    """What safetensors itself says of the file: we read what it reads, and nothing else."""
    if path.name.endswith(".json"):
        return []
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        copy.write(path.read_bytes())
        copy.flush()
        try:
            with safetensors.safe_open(copy.name, framework="np") as file:
                metadata = file.metadata() or {}
                own = {}
                for name in file.keys():  # noqa: SIM118
                    view = file.get_slice(name)
                    own[name] = (view.get_dtype(), tuple(view.get_shape()))
                values = {name: _bytes_of(file, name) for name in own}
        except (safetensors.SafetensorError, UnicodeError) as error:
            return [f"read, but safetensors says: {error}"] if run.code == 0 else []
    try:
        layout = read_header(path)
    except PosthocError as error:
        return [f"safetensors reads it, but: {str(error)[:300]}"]
    losses = []
    if {name: (info.dtype, info.shape) for name, info in layout.tensors.items()} != own:
        losses.append(f"safetensors finds {own}, and not {dict(layout.tensors)}"[:500])
    if dict(layout.metadata) != metadata:
        losses.append(f"safetensors finds the metadata {metadata}, and not {layout.metadata}"[:500])
    (part,) = layout.parts
    data = path.read_bytes()[part.data_start :]
    for name, value in values.items():
        info = layout.tensors.get(name)
        if value is not None and info is not None and data[info.start : info.end] != value:
            losses.append(f"tensor {name!r} lies somewhere else")
    if own and is_stated(metadata) and run.code != 0:
        losses.append(f"says step and profile, but: {run.err[:300]!r} {run.out[-300:]!r}")
    return losses


def _bytes_of(file: Any, name: str) -> bytes | None:
    """A tensor as the library loads it; None for those that NumPy has no dtype for."""
    try:
        array: np.ndarray[Any, Any] = file.get_tensor(name)
    except Exception:  # it has no one error for this
        return None
    return array.tobytes()


def is_stated(metadata: dict[str, str]) -> bool:
    """Whether this metadata says a step and a profile, in the plainest words that do."""
    given = [key for key in ("gamma", "sigma_rel") if key in metadata]
    if len(given) != 1 or "posthoc" in metadata:
        return False
    step, number = metadata.get("step", ""), metadata[given[0]]
    if not re.fullmatch("[0-9]{1,100}", step) or not 1 <= int(step) <= 2**53:
        return False
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number) or len(number) > 100:
        return False
    value = float(number)
    return -1 < value <= 1e12 if given[0] == "gamma" else 1e-12 <= value < 12**-0.5


# A command in this process


def harm_of(run: Run, *, quiet: bool = False, codes: Sequence[int] = (0, 2, 3)) -> list[str]:
    """What is wrong with how a command ended, whatever it was given; `quiet`: with -q."""
    losses = []
    if run.code not in codes:
        losses.append(f"exit code {run.code}: {run.err[-500:]!r}")
    lines = run.err.split("\n")
    if lines.pop() != "" or not all(line.startswith("posthoc: ") for line in lines):
        losses.append(f"on stderr: {run.err[-500:]!r}")
    # Notes may come before; the error is the last line.
    if run.code != 0 and not (lines and re.fullmatch(r"posthoc: .+: .+; .+", lines[-1])):
        losses.append(f"no line of what, why and what to do: {run.err[-500:]!r}")
    if run.code != 0 and quiet and len(lines) != 1:
        losses.append(f"quiet, but: {run.err[-500:]!r}")
    if max(map(len, lines), default=0) > LONGEST_LINE:
        losses.append(f"a line of {max(map(len, lines))} characters: {run.err[:100]!r}")
    for stream, text in (("stdout", run.out), ("stderr", run.err)):
        odd = {char for char in text if char != "\n" and not char.isprintable()}
        if odd:
            losses.append(f"{stream} has {odd!r}")
    return losses


_COMMAND = functools.cache(typer.main.get_command)
"""Four fifths of a small run is making the command line from its description: once is enough."""


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def run_here(arguments: Sequence[str]) -> Run:
    """Run `posthoc` in this process; what Python warns of counts as said by it."""
    # CSV keeps names as they are, but on a terminal.
    kind = _Terminal if "--csv" in arguments else io.TextIOWrapper
    streams = [
        kind(io.BytesIO(), encoding="utf-8", errors=errors, newline="")
        for errors in ("strict", "backslashreplace")
    ]
    with (
        mock.patch.object(sys, "argv", ["posthoc", *arguments]),
        mock.patch.object(typer.main, "get_command", _COMMAND),
        mock.patch.object(sys, "stdout", streams[0]),
        mock.patch.object(sys, "stderr", streams[1]),
        warnings.catch_warnings(),
        _hanging_ends(),
    ):
        warnings.simplefilter("always")
        code = main()
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return Run(code, *texts)


@contextlib.contextmanager
def _hanging_ends() -> Iterator[None]:
    """Show where a command hangs, and end the process."""
    faulthandler.dump_traceback_later(_HUNG, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
