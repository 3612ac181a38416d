"""Pipes, devices and folders that go by the name of a snapshot; outputs that are inputs."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.command import Run, run_command
from tests.soak.fuzz import harm_of
from tests.soak.scenes import make_snapshots
from tests.soak.tally import Tally

HUNG = 30
"""Seconds."""


def _socket(path: Path) -> None:
    # The path of a socket may be 100 bytes long: it is made by a short one.
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _folder_with_a_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "model.safetensors")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a socket": _socket,
    "an empty folder": Path.mkdir,
    "a folder with a pipe": _folder_with_a_pipe,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to its folder": lambda path: path.symlink_to("."),
}
"""How to make each."""

NAMES = ("x.safetensors", "x.safetensors.index.json", "model-00001-of-00002.safetensors", "x.pt")


def special(seed: int, tally: Tally) -> None:
    """Each special file under each name that a snapshot or a checkpoint may have."""
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        base = Path(scratch)
        make_snapshots(base / "whole", count=2, megabytes=0.1, seed=seed)
        for kind, make in SPECIAL.items():
            for name in NAMES:
                losses = _among_snapshots(base, make, name)
                if losses is None:
                    tally.skip(f"{kind} as {name}", "can't be made here")
                else:
                    tally.count("special files", [f"{kind} as {name}: {one}" for one in losses])
        for place, arguments in _outputs_that_are_inputs(base):
            losses = _refused(base, [*arguments, "-o", place])
            losses += _refused(base, [*arguments, "-o", place, "--force"])
            tally.count("outputs that are inputs", [f"{place}: {one}" for one in losses], times=2)
        for kind, make in SPECIAL.items():
            for force in (False, True):
                losses = _in_the_way(base, make, force)
                if losses is not None:
                    tally.count("special outputs", [f"{kind}: {one}" for one in losses])


def _posthoc(base: Path, *arguments: str) -> Run:
    try:
        return run_command(base, *arguments, stdin=subprocess.DEVNULL, timeout=HUNG)
    except subprocess.TimeoutExpired:
        return Run(-1, "", f"{arguments} hung")


def _among_snapshots(base: Path, make: Callable[[Path], None], name: str) -> list[str] | None:
    """The losses; None where it can't be made."""
    folder = _fresh(base)
    try:
        make(folder / name)
    except OSError:
        return None
    path = f"snapshots/{name}"
    solve = ("--gamma", "3")
    runs = [
        _posthoc(base, "inspect", "snapshots"),
        _posthoc(base, "inspect", path),
        _posthoc(base, "solve", "snapshots", *solve),
        _posthoc(base, "synthesize", "snapshots", *solve, "-o", "out/x.safetensors"),
        _posthoc(base, "convert", "snapshots", "converted"),
        _posthoc(base, "convert", path, "converted"),
    ]
    # A link that leads nowhere, named on the command line, is for the system to refuse.
    codes = (0, 1, 2, 3) if not os.path.exists(folder / name) else (0, 2, 3)
    losses = [f"{run}: {loss}" for run in runs for loss in harm_of(run, codes=codes)]
    written = os.listdir(base / "out")
    if len(written) != (1 if runs[3].code == 0 else 0):
        losses.append(f"exit code {runs[3].code}, and {written}")
    return losses


def _fresh(base: Path) -> Path:
    for name in ("snapshots", "out", "converted", "linked"):
        with contextlib.suppress(OSError):
            os.unlink(base / name)
        shutil.rmtree(base / name, ignore_errors=True)
    shutil.copytree(base / "whole", base / "snapshots")
    (base / "out").mkdir()
    return base / "snapshots"


def _outputs_that_are_inputs(base: Path) -> Iterator[tuple[str, list[str]]]:
    """Paths that lead to one of the snapshots, and the command that gets them as its output."""
    arguments = ["synthesize", "snapshots", "--gamma", "3"]
    name = sorted(os.listdir(base / "whole"))[0]
    folder = _fresh(base)
    yield f"snapshots/{name}", arguments
    yield f"./snapshots/../snapshots/{name}", arguments
    yield str(folder / name), arguments
    (base / "linked").symlink_to("snapshots")
    yield f"linked/{name}", arguments
    (base / "out" / "soft.safetensors").symlink_to(folder / name)
    yield "out/soft.safetensors", arguments
    os.link(folder / name, base / "out" / "hard.safetensors")
    yield "out/hard.safetensors", arguments
    yield f"snapshots/{name}", [*arguments, "--max-shard-size", "10kB"]
    yield "out/hard.safetensors", [*arguments, "--max-shard-size", "10kB"]


def _refused(base: Path, arguments: list[str]) -> list[str]:
    run = _posthoc(base, *arguments)
    losses = harm_of(run, codes=(2,))
    found, whole = (
        {path.name: path.read_bytes() for path in (base / name).iterdir()}
        for name in ("snapshots", "whole")
    )
    return losses if found == whole else [*losses, f"the snapshots are now {sorted(found)}"]


def _in_the_way(base: Path, make: Callable[[Path], None], force: bool) -> list[str] | None:
    """A special file in the place of an output: kept, or replaced by --force; never written to."""
    _fresh(base)
    output = base / "out" / "x.safetensors"
    try:
        make(output)
    except OSError:
        return None
    if output.is_dir():
        return None  # then the output goes into it
    before = os.lstat(output)
    arguments = ["synthesize", "snapshots", "--gamma", "3", "-o", "out/x.safetensors"]
    run = _posthoc(base, *arguments, *(["--force"] if force else []))
    losses = harm_of(run, codes=(0, 2) if force else (2,))
    after = os.lstat(output)
    if run.code == 0 and not stat.S_ISREG(after.st_mode):
        losses.append("exit code 0, but there is no file")
    if run.code != 0 and (after.st_ino, after.st_mode) != (before.st_ino, before.st_mode):
        losses.append(f"exit code {run.code}, but it is another file")
    found = os.listdir(base / "out")
    return losses + ([f"then there is {found}"] if len(found) > 1 else [])
