"""Every system call on an output, in turn: the process is killed at it, or it fails.

A library that is preloaded does it; each run's log says that it did.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli.storage.atomic import AtomicFile
from tests.command import COMMAND, ENVIRONMENT, Run
from tests.soak.fuzz import harm_of
from tests.soak.scenes import Files, Scene, scenes, scenes_of_several
from tests.soak.server import Server
from tests.soak.tally import Tally

EACH = 6
"""Calls of each kind that are made to fail in each scene; each is the last of a killed process."""

OUTPUT = "written/"
"""What the paths of all outputs have in them, unfinished ones included."""

SYSCALLS = {
    "copy_file_range": "copy",
    "fallocate": "fallocate",
    "fdatasync": "fsync",
    "flock": "flock",
    "fstat": "fstat",
    "fsync": "fsync",
    "ftruncate": "truncate",
    "link": "link",
    "linkat": "link",
    "lstat": "stat",
    "mkdir": "mkdir",
    "newfstatat": "stat",
    "open": "open",
    "openat": "open",
    "pread64": "pread",
    "preadv": "pread",
    "preadv2": "pread",
    "pwrite64": "pwrite",
    "read": "read",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "rmdir": "rmdir",
    "stat": "stat",
    "unlink": "unlink",
    "unlinkat": "unlink",
    "write": "write",
}
"""System calls on files, and what failing.c calls each."""

HARMLESS = {
    "close",
    "fcntl",
    "getdents64",
    "ioctl",
    "lseek",
    "mmap",
    "fadvise64",
    "execve",
    "chdir",
}
"""Those that are not made to fail: they do so on no disk, or only together with another."""

ERRORS = {
    "copy": errno.EIO,
    "fallocate": errno.ENOSPC,
    "flock": errno.ENOLCK,
    "fstat": errno.EIO,
    "fsync": errno.EIO,
    "link": errno.EPERM,
    "list": errno.EACCES,
    "mkdir": errno.ENOSPC,
    "open": errno.EACCES,
    "pread": errno.EIO,
    "pwrite": errno.ENOSPC,
    "read": errno.EIO,
    "rename": errno.EIO,
    "rmdir": errno.EIO,
    "stat": errno.EIO,
    "truncate": errno.ENOSPC,
    "unlink": errno.EIO,
    "write": errno.ENOSPC,
}
"""How each fails."""

LOOKING = {"fstat", "list", "pread", "read", "stat"}
"""Calls that change nothing: a kill at one is a kill at the next that does."""

NOT_CLEANED = {"unlink", "rmdir", "list", "open", "stat", "fstat"}
"""Where these fail, what is unfinished can't be removed, or not be seen: the next run does it."""

NO_UNDOING = {"unlink", "rename", "stat"}
"""Where these go on failing, nothing can be put back: the next run does it."""


def library(folder: Path) -> Path | None:
    """failing.c, compiled; None where that can't be."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.uname().sysname != "Linux":
        return None
    made = folder / "failing.so"
    source = Path(__file__).with_name("failing.c")
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", made, source, "-ldl"]
    return made if subprocess.run(words, check=False).returncode == 0 else None


@dataclass(frozen=True)
class Log:
    """The calls on an output: kind and path of each, and how many of them were made to fail."""

    calls: list[tuple[str, str]]
    fired: int


def read_log(path: Path) -> Log:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    calls = [(kind, rest.lstrip("!")) for kind, _, rest in (line.partition(" ") for line in lines)]
    return Log(calls, sum(" !" in line for line in lines))


@dataclass(frozen=True)
class Stage:
    """Where scenes are played: a server with the library, and a place for its logs."""

    server: Server
    log: Path

    def play(self, scene: Scene, **fail: str | int) -> tuple[Run, Log]:
        self.log.unlink(missing_ok=True)
        wanted = {f"FAIL_{name}": str(value) for name, value in fail.items()}
        names = {"FAIL_LOG": str(self.log), "FAIL_NAME": OUTPUT}
        run = self.server.run(scene.base, scene.arguments, names | wanted)
        return run, read_log(self.log)

    def again(self, scene: Scene) -> list[str]:
        """What is wrong when the command is run once more, undisturbed and with --force."""
        force = [] if "--force" in scene.arguments else ["--force"]
        run = self.server.run(scene.base, [*scene.arguments, *force])
        losses = [f"the next run ended in {run.code}: {run.err!r}"] if run.code != 0 else []
        if scene.files() != scene.new:
            losses.append(f"the next run gave {sorted(scene.files())}")
        return losses + [f"the next run left {name}" for name in scene.left_behind()]


def calls(
    seed: int,
    tally: Tally,
    most: int | None = None,
    megabytes: float = 0.05,
    only: Collection[str] = (),
) -> None:
    """Kill at every call of every scene, or of those named `only`, or at `most` of each."""
    rng = random.Random(f"calls/{seed}")
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        base = Path(scratch)
        made = library(base)
        if made is None:
            tally.skip("calls", "no C compiler, or not Linux")
            return
        played = 0
        for scene in all_scenes(base, megabytes, seed):
            if only and scene.name not in only:
                continue
            played += 1
            scene.reset()
            with Server(made, (scene.base, scene.arguments)) as server:
                stage = Stage(server, base / "log")
                for losses, kind in play_all(stage, scene, rng, most):
                    tally.count(kind, [f"{scene.name}, {loss}" for loss in losses])
            if played == len(only):
                break


def all_scenes(base: Path, megabytes: float, seed: int) -> Iterator[Scene]:
    yield from scenes(base, megabytes, seed)
    yield from scenes_of_several(base, seed)


def play_all(
    stage: Stage, scene: Scene, rng: random.Random, most: int | None
) -> Iterator[tuple[list[str], str]]:
    """Kill at each call, then let each fail, once and for good: what was lost each time."""
    scene.reset()
    run, log = stage.play(scene)
    losses = [f"undisturbed: {run}"] if run.code or scene.files() != scene.new else []
    yield losses + [f"no error for {kind}" for kind, _ in log.calls if kind not in ERRORS], "scenes"
    changing = [at for at, (kind, _) in enumerate(log.calls) if kind not in LOOKING]
    for at in _some(changing, rng, most):
        where = f"killed at {at} ({' '.join(log.calls[at])})"
        yield [f"{where}: {loss}" for loss in kill_at(stage, scene, at)], "kills"
    for kind, count in sorted(Counter(kind for kind, _ in log.calls).items()):
        for after in _some(range(count), rng, max(most // 10, 1) if most else EACH):
            for times in (1, 10**6) if not most or most > 9 else (rng.choice((1, 10**6)),):
                where = f"{kind} failed after {after}, {'once' if times == 1 else 'for good'}"
                found = fail_at(stage, scene, kind, after, times)
                yield [f"{where}: {loss}" for loss in found], "failing calls"


def _some(places: Sequence[int], rng: random.Random, most: int | None) -> Sequence[int]:
    return places if not most else sorted(rng.sample(places, min(most, len(places))))


def kill_at(stage: Stage, scene: Scene, at: int) -> list[str]:
    scene.reset()
    run, log = stage.play(scene, CALL="any", ERRNO=-1, AFTER=at, TIMES=1)
    if run.code != -9 or log.fired != 1:
        return [f"exit code {run.code}, fired {log.fired} times"]
    losses = torn(scene, scene.files())
    return losses + _cleaned(scene) + stage.again(scene)


def fail_at(stage: Stage, scene: Scene, kind: str, after: int, times: int) -> list[str]:
    scene.reset()
    run, log = stage.play(scene, CALL=kind, ERRNO=ERRORS[kind], AFTER=after, TIMES=times)
    losses = [] if log.fired else ["it did not fire"]
    losses += harm_of(run, codes=(0, 1, 2, 3) if kind in ("stat", "read", "list") else (0, 1))
    found = scene.files()
    lasting = times > 1
    if run.code == 0 and found != scene.new and kind not in NOT_CLEANED:
        losses.append(f"exit code 0, but {sorted(found)}")
    one_by_one = scene.arguments[0] in ("convert", "pack")
    undone = not one_by_one and not (lasting and kind in NO_UNDOING)
    if run.code != 0 and found != scene.old and undone:
        losses.append(f"exit code {run.code}, and {sorted(found)}: {run.err!r}")
    losses += torn(scene, found)
    stuck = lasting and kind == "rename" and "/" in (scene.index or "")  # it has no other way back
    if kind not in NOT_CLEANED and not stuck:
        losses += [f"left {name}" for name in scene.left_behind()]
    return losses + _cleaned(scene) + stage.again(scene)


def _cleaned(scene: Scene) -> list[str]:
    """Anyone writes to the folder: then each output is the old one or the new one, or none is."""
    with AtomicFile(scene.work / "other", 0):
        pass
    (scene.work / "other").unlink()
    found = scene.files()
    losses = [f"then left {name}" for name in scene.left_behind()]
    if scene.several:
        return losses + torn(scene, found)
    return losses if found in (scene.old, scene.new) else [*losses, f"then {sorted(found)}"]


def torn(scene: Scene, found: Files) -> list[str]:
    """What a reader would get that is neither the old output nor the new one."""
    losses = [
        f"{name} is torn ({len(content):,} bytes)"
        for name, content in found.items()
        if content not in (scene.old.get(name), scene.new.get(name))
    ]
    if scene.index is None:
        return losses + [f"no {name}" for name in scene.old if name not in found]
    if scene.index in found:
        of = scene.old if found[scene.index] == scene.old.get(scene.index) else scene.new
        both = [of] if scene.old.get(scene.index) != scene.new.get(scene.index) else [of, scene.new]
        if not any(files.items() <= found.items() for files in both):
            losses.append(f"an index, but {sorted(found)}")
    elif "/" in scene.index and found:
        losses.append(f"a part of a folder: {sorted(found)}")
    return losses


def unhooked(scene: Scene) -> list[str]:
    """The system calls on an output, by strace, that failing.c knows nothing of."""
    trace = scene.base / "trace"
    words = ["strace", "-f", "-y", "-o", trace, COMMAND, *scene.arguments]
    scene.reset()
    subprocess.run(words, cwd=scene.base, env=ENVIRONMENT, check=True, capture_output=True)
    seen = re.findall(
        rf"^[0-9]+ +([a-z0-9_]+)\(.*{OUTPUT}", trace.read_text(errors="replace"), re.MULTILINE
    )
    trace.unlink()
    return sorted(set(seen) - set(SYSCALLS) - HARMLESS)
