"""Disks that are full, slow to say so, read-only or broken."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.command import ENVIRONMENT, Run, start_command
from tests.soak.calls import Log, library, read_log
from tests.soak.fuzz import harm_of
from tests.soak.scenes import Scene, scenes
from tests.soak.tally import Tally

ROUNDS = 5
"""Times that each fault is tried with each command, after another number of calls."""


@dataclass(frozen=True)
class Fault:
    """What the preloaded library does to the calls of one kind on some files.

    `most`: it lets up to so many calls succeed first, but always makes one fail. `codes`: how a
    command may then end; 0: as if nothing was.
    """

    name: str
    call: str
    error: int
    files: str = ""
    most: int = 0
    codes: tuple[int, ...] = (1,)


_OUTPUT = "posthoc-tmp"

FAULTS = (
    Fault("I/O errors on read", "pread", errno.EIO, "000", most=40),
    Fault("I/O errors in headers", "read", errno.EIO, "000", most=8),
    Fault("short reads", "pread", 0, "000", most=10, codes=(0,)),
    Fault("short reads of headers", "read", 0, "000", most=4, codes=(0,)),
    Fault("short writes", "pwrite", 0, _OUTPUT, most=10, codes=(0,)),
    Fault("disks full at once", "fallocate", errno.ENOSPC, _OUTPUT),
    Fault("disks full in the middle", "pwrite", errno.ENOSPC, _OUTPUT, most=20),
    Fault("quotas met at once", "fallocate", errno.EDQUOT, _OUTPUT),
    Fault("quotas met in the middle", "pwrite", errno.EDQUOT, _OUTPUT, most=20),
    Fault("I/O errors on write", "pwrite", errno.EIO, _OUTPUT, most=20),
    Fault("I/O errors on flush", "fsync", errno.EIO, _OUTPUT, most=1, codes=(0, 1)),
    Fault("disks that can't reserve", "fallocate", errno.EOPNOTSUPP, _OUTPUT, codes=(0,)),
    Fault("disks without hard links", "link", errno.EPERM, "written", codes=(0,)),
    Fault("I/O errors on rename", "rename", errno.EIO, "written", codes=(0, 1)),
    Fault("permissions lost", "open", errno.EACCES, _OUTPUT),
    Fault("inputs not to be opened", "open", errno.EACCES, "000", most=4),
)


def disk(seed: int, tally: Tally, rounds: int = ROUNDS, megabytes: float = 16) -> None:
    """Every fault with every command; then what a real disk does, where it can be had."""
    rng = random.Random(f"disk/{seed}")
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        base = Path(scratch)
        failing = library(base)
        fired: Counter[str] = Counter()
        for scene in scenes(base, megabytes, seed):
            if failing is None:
                tally.skip("faults by LD_PRELOAD", "no C compiler, or not Linux")
            else:
                _broken(scene, failing, rounds, rng, tally, fired)
            _too_large(scene, rounds, rng, tally)
            _nowhere_to_write(scene, tally)
            _mounted(scene, rounds, rng, tally)
        _full_stdout(base, tally)
        never = [fault.name for fault in FAULTS if failing and not fired[fault.name]]
        tally.count("faults that never fired", never, times=len(never))
    tally.skip("quotas of a real file system", "a preloaded library gives EDQUOT instead")


def _harm(scene: Scene, run: Run, codes: Sequence[int], *, renaming: bool = False) -> list[str]:
    """One line, the right code; then all is there, or all as before, and nothing is left over.

    Of several outputs those made before may be there. Where not even `renaming` works, shards that
    replace others may lack their index: then there is no output, rather than one of both.
    """
    losses = harm_of(run, codes=codes)
    losses += [f"left {name}" for name in scene.left_behind()]
    found = scene.files()
    if run.code == 0 and found != scene.new:
        losses.append(f"exit code 0, but {sorted(found)}")
    spared = (scene.several or renaming) and not scene.harm()
    if run.code != 0 and found != scene.old and not spared:
        losses.append(f"exit code {run.code}, and {sorted(found)} instead of {sorted(scene.old)}")
    return losses


def _broken(
    scene: Scene, failing: Path, rounds: int, rng: random.Random, tally: Tally, fired: Counter[str]
) -> None:
    """Every fault that the scene has a call for; `fired` counts those that did, by name."""
    log = scene.base / "log"

    def run(fault: Fault, **more: str | int) -> tuple[Run, Log]:
        log.unlink(missing_ok=True)
        scene.reset()
        wanted = {"LOG": log, "CALL": fault.call, "NAME": fault.files, **more}
        environment = {f"FAIL_{name}": str(value) for name, value in wanted.items()}
        done = scene.run(env=ENVIRONMENT | {"LD_PRELOAD": str(failing)} | environment)
        return done, read_log(log)

    calls = run(FAULTS[0], CALL="none", NAME="")[1].calls
    for fault in FAULTS:
        made = sum(kind == fault.call and fault.files in path for kind, path in calls)
        for _ in range(rounds if fault.most else 1) if made else ():
            # How often the background flushes is for the clock to say.
            after = rng.randint(0, min(fault.most, made - 1)) if fault.call != "fsync" else 0
            done, seen = run(fault, AFTER=after, ERRNO=fault.error)
            fired[fault.name] += bool(seen.fired)
            losses = [] if seen.fired else ["it did not fire"]
            losses += _harm(scene, done, fault.codes, renaming=fault.call == "rename")
            tally.count(fault.name, [f"{scene.name}, after {after}: {one}" for one in losses])


def _too_large(scene: Scene, rounds: int, rng: random.Random, tally: Tally) -> None:
    """`ulimit -f`, at a part of what the largest file takes."""
    largest = max(map(len, scene.new.values()))
    for _ in range(rounds):
        scene.reset()
        limit = rng.randrange(largest)
        run = scene.run(
            preexec_fn=lambda limit=limit: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)
            )
        )
        losses = _harm(scene, run, (1,))
        tally.count("file size limits", [f"{scene.name}, {limit:,}: {one}" for one in losses])


def _nowhere_to_write(scene: Scene, tally: Tally) -> None:
    """A folder that is read-only: mounted so, for root, whom permissions don't stop."""
    scene.reset()
    if os.geteuid() != 0:
        scene.work.chmod(0o555)
        losses = _harm(scene, scene.run(), (1,))
        scene.work.chmod(0o755)
    else:
        try:
            _mount(["--bind", str(scene.work)], scene.work)
            _mount(["-o", "remount,ro,bind"], scene.work)
        except subprocess.CalledProcessError:
            tally.skip("read-only folders", "root, and no mounts")
            return
        losses = _harm(scene, scene.run(), (1,))
        subprocess.run(["umount", scene.work], check=True)
    tally.count("read-only folders", [f"{scene.name}: {loss}" for loss in losses])


def _mounted(scene: Scene, rounds: int, rng: random.Random, tally: Tally) -> None:
    """A small disk of its own: too small by a little, by much, and just large enough."""
    page = os.sysconf("SC_PAGE_SIZE")
    needed = sum(-(-len(content) // page) * page for content in scene.new.values())
    old = sum(-(-len(content) // page) * page for content in scene.old.values())
    for size in [*(rng.randrange(page, needed) for _ in range(rounds)), 2 * needed + 64 * page]:
        size = old + size // page * page
        try:
            with _small_disk(scene, size):
                run = scene.run()
                enough = size > old + needed
                losses = _harm(scene, run, (0,) if enough else (1,))
                if not enough and "missing on its disk" not in run.err and not scene.several:
                    losses.append(f"doesn't say how much is missing: {run.err!r}")
        except subprocess.CalledProcessError:
            tally.skip("full disks", "a tmpfs can't be mounted: needs root")
            return
        tally.count("full disks", [f"{scene.name}, {size:,}: {loss}" for loss in losses])


@contextmanager
def _small_disk(scene: Scene, size: int) -> Iterator[None]:
    """A file system of `size` bytes in the place of the scene's folder."""
    scene.reset({})
    _mount(["-t", "tmpfs", "-o", f"size={size}", "none"], scene.work)
    try:
        for name, content in scene.old.items():
            (scene.work / name).write_bytes(content)
        yield
    finally:
        subprocess.run(["umount", scene.work], check=True)


def _mount(words: Sequence[str], place: Path) -> None:
    subprocess.run(["mount", *words, place], check=True, stderr=subprocess.DEVNULL)


def _full_stdout(base: Path, tally: Tally) -> None:
    """`> /dev/full`: results that can't be written are an error too."""
    if not os.path.exists("/dev/full"):
        tally.skip("full stdouts", "no /dev/full")
        return
    inspect, solve = ["inspect", "snapshots"], ["solve", "snapshots", "--gamma", "3"]
    for words in (inspect, [*inspect, "--json"], solve, [*solve, "--csv"]):
        with (
            open("/dev/full", "w", encoding="utf-8") as full,
            start_command(base, *words, stdout=full) as process,
        ):
            _, err = process.communicate()
        losses = harm_of(Run(process.returncode, "", err), codes=(1,))
        tally.count("full stdouts", losses)
