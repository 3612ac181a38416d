"""Trainings in processes of their own: at once, killed and resumed, and in ranks.

`python -m tests.training.processes FOLDER WHAT COUNT SEED` prints what was lost, a line each.
They are forked from one that has imported torch but has started no thread of its.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import PosthocError, UsageError
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.storage.header import read_header
from posthoc_cli.training.claim import LOCK, OTHER_RUNS
from tests.training.networks import small, train

ROOT = Path(__file__).parents[2]

STEPS = 12


def lost(what: str, folder: Path, count: int, seed: int = 0) -> list[str]:
    """What was lost in `count` rounds of `what`, in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.training.processes",
            str(folder),
            what,
            str(count),
            str(seed),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=1200,
        check=False,
    )
    if done.returncode:
        return [f"exit code {done.returncode}: {done.stderr}"]
    return done.stdout.splitlines()


def fork(target: Callable[..., None], *arguments: Any) -> Any:
    process = _FORK.Process(target=target, args=arguments)
    process.start()
    return process


# Two at once


def pairs(folder: Path, count: int, seed: int) -> list[str]:
    """Of two that begin at the same moment one goes on, and the other says in one line why not."""
    losses, rng = [], random.Random(f"pairs/{seed}")
    for number in range(count):
        place = folder / str(number)
        start, end, said = _FORK.Barrier(2), _FORK.Event(), _FORK.Queue()
        delay = rng.choice((0.0, 0.0, 0.002, 0.01)) * rng.random()
        both = [fork(_one_of_two, place, start, end, said, late) for late in (0.0, delay)]
        outcomes = [said.get(timeout=60) for _ in both]
        third = _refusal(PostHocEMA(small(), folder=place, overwrite=True)) or ""
        end.set()
        for process in both:
            process.join(60)
        runs = [run for run, _ in outcomes if run]
        refusals = [text for _, text in outcomes if text]
        if len(runs) != 1 or len(refusals) != 1 or "\n" in refusals[0]:
            losses.append(f"pair {number}: {outcomes}")
        if "another training" not in third:
            losses.append(f"pair {number}: a third was told {third!r}")
        found = {read_header(path).metadata["run"] for path in place.glob("*.safetensors")}
        steps = {each.step for each in read_folder(place).usable()}
        if found != set(runs) or steps != {STEPS - 1, STEPS}:
            losses.append(f"pair {number}: {runs} went on, in the folder {found}, {steps}")
        if extra := [name for name in os.listdir(place) if not name.startswith("ema-step")]:
            losses.append(f"pair {number}: left {extra}")
    return losses


def _one_of_two(folder: Path, start: Any, end: Any, said: Any, late: float) -> None:
    ema = PostHocEMA(small(), folder=folder, checkpoint_every=1, keep=2)
    start.wait(60)
    time.sleep(late)
    refusal = _refusal(ema)
    if refusal is None:
        train(ema.model, ema, STEPS - 1)
    said.put((None, refusal) if refusal else (ema.run, None))
    end.wait(60)
    ema.close()


def _refusal(ema: PostHocEMA) -> str | None:
    try:
        ema.update()
    except UsageError as error:
        return str(error)
    return None


# Killed


def kills(folder: Path, count: int, seed: int) -> list[str]:
    """Killed at `count` moments, each time resumed: the files of one that was never disturbed."""
    losses, rng = [], random.Random(f"kills/{seed}")
    for background, store in ((False, "whole"), (True, "whole"), (True, "delta")):
        whole, killed = (folder / f"{name}-{background}-{store}" for name in ("whole", "killed"))
        total = _FORK.Value("q", 0)
        for place in (whole, killed):
            place.mkdir(parents=True)
        fork(_training, whole, 0, background, store, total).join()
        calls, ended = total.value, 0
        for number in range(count):
            at = rng.randrange(1, calls) if number % 2 else rng.randrange(1, calls // 3)
            process = fork(_training, killed, at, background, store, total)
            process.join(60)
            ended += process.exitcode == -signal.SIGKILL
            where = f"killed at call {at}, background={background}, store={store}"
            losses += _harm(killed / "snapshots", where)
            if process.exitcode not in (0, -signal.SIGKILL):
                losses.append(f"resumed after kills, it ended in {process.exitcode}")
            if process.exitcode == 0:  # begin anew
                (killed / "state.pt").unlink()
                for path in (killed / "snapshots").glob("*.safetensors"):
                    path.unlink()
        if ended < count / 2:
            losses.append(f"only {ended} of {count} were killed")
        fork(_training, killed, 0, background, store, total).join()
        losses += _differences(whole / "snapshots", killed / "snapshots")
    return losses


def _training(folder: Path, at: int, background: bool, store: str, total: Any) -> None:
    """Train to the end, with a state every third step; killed at call `at`, if not 0."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

    warnings.simplefilter("ignore", RuntimeWarning)
    ema = PostHocEMA(
        small(),
        folder=folder / "snapshots",
        checkpoint_every=2,
        keep=4,
        later="set aside",
        background=background,
        store=store,
        keyframe_every=2,
    )
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", weights_only=True)
        ema.model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    else:
        _save(ema, folder)
    threading.setprofile(count)
    sys.setprofile(count)
    while ema.step < STEPS:
        train(ema.model, ema, 1)
        if ema.step % 3 == 0:
            _save(ema, folder)
    ema.close()
    sys.setprofile(None)
    total.value = calls


def _save(ema: PostHocEMA, folder: Path) -> None:
    torch.save({"model": ema.model.state_dict(), "ema": ema.state_dict()}, folder / "new.pt")
    os.replace(folder / "new.pt", folder / "state.pt")


def _harm(folder: Path, where: str) -> list[str]:
    """What is torn or grows, in a folder whose training was killed."""
    names = os.listdir(folder)
    losses = []
    hidden = [name for name in names if name.startswith(".") and name != LOCK]
    if len(hidden) > 2:
        losses.append(f"{where}: left {hidden}")
    for path in folder.rglob("*.safetensors"):
        try:
            load_file(path)
        except Exception as error:
            losses.append(f"{where}: {path.name} is torn: {error}")
    for place in (folder / OTHER_RUNS).glob("*"):
        if len(aside := os.listdir(place)) > STEPS:
            losses.append(f"{where}: set aside {aside}")
    try:
        if any(name.startswith("ema") for name in names):
            read_folder(folder).usable()
    except PosthocError as error:
        losses.append(f"{where}: {error}")
    return losses


def _differences(whole: Path, killed: Path) -> list[str]:
    names = sorted(name for name in os.listdir(whole) if name != OTHER_RUNS)
    found = sorted(name for name in os.listdir(killed) if name != OTHER_RUNS)
    if names != found:
        return [f"{found} instead of {names}"]
    losses = []
    for name in names:
        one, other = load_file(whole / name), load_file(killed / name)
        if not all(torch.equal(one[key], other[key]) for key in one):
            losses.append(f"{name} has other values")
    return losses


# Ranks


def ranks(folder: Path, count: int, seed: int) -> list[str]:
    """What the first of two ranks finds, both are told within seconds."""
    losses = []
    for number in range(count):
        place = folder / f"ranks-{seed}-{number}"
        claimed = PostHocEMA(small(), folder=place / "claimed", checkpoint_every=1)
        claimed.update()
        other = PostHocEMA(small(), folder=place / "another run", checkpoint_every=1)
        other.update()
        other.close()
        (place / "file").write_text("")
        said = _FORK.Queue()
        processes = [fork(_rank, place, rank, said) for rank in range(2)]
        told: dict[str, list[tuple[str, float]]] = {}
        for _ in range(2 * len(EXPECTED)):
            scene, text, seconds = said.get(timeout=120)
            told.setdefault(scene, []).append((text, seconds))
        for process in processes:
            process.join(60)
        for scene, expected in EXPECTED.items():
            texts = {text for text, _ in told[scene]}
            if len(texts) != 1 or expected not in next(iter(texts)):
                losses.append(f"{scene}: {told[scene]}")
            if max(seconds for _, seconds in told[scene]) > 8:
                losses.append(f"{scene}: slow: {told[scene]}")
    return losses


EXPECTED = {
    "first alone": "goes on",
    "nothing": "goes on",
    "claimed": "UsageError: another training (process",
    "another run": "UsageError: holds another run's",
}


def _rank(folder: Path, rank: int, said: Any) -> None:
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(small())
    for scene in EXPECTED:
        dist.barrier()
        begin, outcome = time.monotonic(), "goes on"
        try:
            if rank == 0 or scene != "first alone":
                ema = PostHocEMA(model, folder=folder / scene, checkpoint_every=1)
                time.sleep(0.5 * rank)  # the first must not be gone before it has been heard
                ema.update()
                ema.update()
        except UsageError as error:
            outcome = f"UsageError: {error.problem}"
        said.put((scene, outcome, time.monotonic() - begin))
    said.close()
    said.join_thread()
    os._exit(0)


# Sharded, and one of them killed


def sharded(folder: Path, count: int, seed: int) -> list[str]:
    """One of three ranks is killed at `count` moments: the others end by themselves, and nothing
    that looks whole is not; the next training goes on in the same folder."""
    import torch.distributed.checkpoint.planner_helpers  # once, before it is forked
    import torch.distributed.fsdp  # noqa: F401

    losses, rng = [], random.Random(f"sharded/{seed}")
    total = _FORK.Value("q", 0)
    place = folder / "measured"
    place.mkdir(parents=True)
    for process in [fork(_sharded_rank, place, rank, 3, 0, False, total) for rank in range(3)]:
        process.join(120)
    calls, killed = total.value, 0
    for number in range(count):
        victim, background = rng.randrange(3), bool(number % 2)
        at = rng.randrange(1, calls)
        place = folder / str(number)
        place.mkdir()
        where = f"round {number}, rank {victim} killed at call {at}, background={background}"
        begin = time.monotonic()
        processes = [
            fork(_sharded_rank, place, rank, 3, at if rank == victim else 0, background, total)
            for rank in range(3)
        ]
        for process in processes:
            process.join(60)
            if process.exitcode is None:
                losses.append(f"{where}: a rank hangs")
                process.kill()
        killed += processes[victim].exitcode == -signal.SIGKILL
        if time.monotonic() - begin > 45:
            losses.append(f"{where}: {time.monotonic() - begin:.0f} s until all had ended")
        run = place / "snapshots"
        names = [name for name in os.listdir(run) if not name.startswith(".")]
        try:
            for snapshot in read_folder(run).usable() if names else ():
                if len(snapshot.index.files) != 3:
                    losses.append(f"{where}: {snapshot.file} has {len(snapshot.index.files)} files")
        except PosthocError as error:
            losses.append(f"{where}: {error}")
        again = PostHocEMA(small(), folder=run, checkpoint_every=1, overwrite=True)
        warnings.simplefilter("ignore", RuntimeWarning)
        train(again.model, again, 1)
        again.close()
        if hidden := [name for name in os.listdir(run) if name.startswith(".")]:
            losses.append(f"{where}: left {hidden}")
    if killed < count / 2:
        losses.append(f"only {killed} of {count} were killed")
    return losses


def _sharded_rank(
    folder: Path, rank: int, size: int, at: int, background: bool, total: Any
) -> None:
    """Train a sharded network; killed at call `at`, if not 0."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    model = fully_shard(small(), mesh=init_device_mesh("cpu", (size,)))
    ema = PostHocEMA(
        model, folder=folder / "snapshots", checkpoint_every=1, background=background, keep=2
    )
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        for _ in range(4):
            ema.update()
        ema.close()
    except RuntimeError:  # of a peer that is no more
        os._exit(3)
    sys.setprofile(None)
    threading.setprofile(None)
    if rank == 0 and not at:
        total.value = calls
    os._exit(0)


if __name__ == "__main__":
    _FORK: Any = multiprocessing.get_context("fork")
    function = {"pairs": pairs, "kills": kills, "ranks": ranks, "sharded": sharded}[sys.argv[2]]
    for line in function(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])):
        print(line)
