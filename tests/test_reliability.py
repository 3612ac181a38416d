"""Kills, broken disks and changing inputs: a little of what `make soak` does at length."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from posthoc_cli.storage import atomic as atomicfile
from posthoc_cli.synthesis import engine as synthesis
from tests.command import ROOT, Posthoc
from tests.soak.calls import ERRORS, SYSCALLS, unhooked
from tests.soak.calls import calls as calls_section
from tests.soak.changing import CHANGES, METHODS, _changed, _reads
from tests.soak.disk import _too_large
from tests.soak.kill import interrupt, kill
from tests.soak.races import _race, replacing
from tests.soak.scenes import make_snapshots, scenes
from tests.soak.special import special
from tests.soak.tally import Tally

SEED = 1

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and files")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

SYNTHESIZE = ("synthesize", "snapshots", "--sigma-rel", "0.07", "-o", "x.safetensors")


# Kills


@posix
@linux
@pytest.mark.parametrize("section", [kill, interrupt])
@pytest.mark.usefixtures("unmeasured")
def test_a_run_that_ends_early_leaves_nothing_half_done(section: Callable[..., None]) -> None:
    tally = Tally("few")
    section(SEED, tally, rounds=3, megabytes=1, most=2)
    assert tally.total == 6
    assert tally.losses == []


@posix
@linux
@pytest.mark.usefixtures("unmeasured")
def test_runs_at_once_and_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    tally, rng = Tally("few"), random.Random(SEED)
    scene = next(scenes(tmp_path, 1, SEED))
    for runners in (2, 3):
        tally.count("races", _race(scene, rng, runners))
    _too_large(scene, 2, rng, tally)
    assert tally.total == 4
    assert tally.losses == []


@linux
@pytest.mark.usefixtures("unmeasured")
def test_every_call_may_be_the_last_or_fail() -> None:
    """Some calls of some commands; the soak takes every one."""
    tally = Tally("few")
    chosen = {"synthesize --force", "shards over shards", "a folder over a folder"}
    calls_section(SEED, tally, most=4, only=chosen)
    if tally.skipped:
        pytest.skip(tally.skipped[0])
    assert tally.losses == []
    assert tally.tried["kills"] == 4 * len(chosen)
    assert tally.tried["failing calls"] > 20


@linux
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_every_system_call_on_an_output_is_one_that_the_soak_lets_fail(tmp_path: Path) -> None:
    scene = next(scenes(tmp_path, 0.1, SEED))
    try:
        assert unhooked(scene) == []
    except subprocess.CalledProcessError:
        pytest.skip("strace may not trace here")
    source = (ROOT / "tests" / "soak" / "failing.c").read_text(encoding="utf-8")
    for kind in {*SYSCALLS.values(), *ERRORS} - {"read", "write"}:
        assert f'"{kind}"' in source, kind
    assert {*SYSCALLS.values()} <= ERRORS.keys()


@posix
def test_two_runs_that_replace_one_output(tmp_path: Path) -> None:
    tally = Tally("few")
    replacing(random.Random(SEED), tally, tmp_path, rounds=2, megabytes=0.2)
    assert tally.total == 2
    assert tally.losses == []


# Disks


def failing(error: int, after: int, call: Callable[..., object]) -> Callable[..., object]:
    """`call`, which gives `error` once it was called `after` times."""
    calls = 0

    def wrapped(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(error, os.strerror(error))
        return call(*arguments, **named)

    return wrapped


@posix
@pytest.mark.parametrize("old", [None, b"an older output"])
@pytest.mark.parametrize(
    ("call", "error", "after", "line"),
    [
        ("preadv", errno.EIO, 0, r".*ema-.*: cannot be read \(.*\); check the disk .*"),
        ("preadv", errno.EIO, 7, r".*ema-.*: cannot be read \(.*\); check the disk .*"),
        ("pwrite", errno.ENOSPC, 0, r"x\.safetensors: cannot be written \(No space .*\); free .*"),
        ("pwrite", errno.ENOSPC, 1, r"x\.safetensors: cannot be written \(No space .*\); free .*"),
        ("pwrite", errno.EIO, 1, r"x\.safetensors: cannot be written \(.*\); check .*"),
        ("posix_fallocate", errno.ENOSPC, 0, r"x\.safetensors: .*\(No space.*\); free .*"),
        ("posix_fallocate", errno.EDQUOT, 0, r"x\.safetensors: .*quota.*; free some space .*"),
        ("posix_fallocate", errno.EFBIG, 0, r"x\.safetensors: .*; raise the file size limit .*"),
        ("fsync", errno.EIO, 0, r"x\.safetensors: cannot be written \(.*\); check .*"),
        ("ftruncate", errno.EROFS, 0, r"x\.safetensors: .*Read-only.*; check the folder .*"),
    ],
)
def test_a_broken_disk_leaves_all_as_it_was(
    call: str,
    error: int,
    after: int,
    line: str,
    old: bytes | None,
    posthoc_here: Posthoc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not hasattr(os, call):
        pytest.skip(f"no os.{call} here")
    make_snapshots(tmp_path / "snapshots", 4, megabytes=0.5)
    if call == "ftruncate":  # it is for disks that can't reserve
        missing = failing(errno.EOPNOTSUPP, 0, os.posix_fallocate)
        monkeypatch.setattr(atomicfile.os, "posix_fallocate", missing)
    if old is not None:
        (tmp_path / "x.safetensors").write_bytes(old)
    monkeypatch.setattr(os, call, failing(error, after, getattr(os, call)))
    run = posthoc_here(*SYNTHESIZE, "-q", *(["--force"] if old is not None else []))
    monkeypatch.undo()
    run.failed(1, line)
    assert {path.name for path in tmp_path.iterdir()} - {"snapshots"} == (
        {"x.safetensors"} if old is not None else set()
    )
    if old is not None:
        assert (tmp_path / "x.safetensors").read_bytes() == old


@posix
def test_short_reads_and_writes_are_gone_on_with(
    posthoc_here: Posthoc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_snapshots(tmp_path / "snapshots", 4, megabytes=0.2)
    assert posthoc_here(*SYNTHESIZE).code == 0
    (tmp_path / "x.safetensors").rename(tmp_path / "whole.safetensors")
    read, write = os.preadv, os.pwrite

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        return read(fd, [buffers[0][: len(buffers[0]) // 2 + 1]], offset)

    def short_write(fd: int, data: memoryview, offset: int) -> int:
        return write(fd, data[: len(data) // 2 + 1], offset)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", short_write)
    assert posthoc_here(*SYNTHESIZE).code == 0
    assert (tmp_path / "x.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()


def test_missing_space_is_told_before_the_work_begins(
    posthoc_here: Posthoc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_snapshots(tmp_path / "snapshots", 2, megabytes=1)
    few = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(atomicfile.shutil, "disk_usage", lambda path: few)
    monkeypatch.setattr(synthesis, "run_workers", lambda *_: pytest.fail("has begun"))
    run = posthoc_here(*SYNTHESIZE, "-q", "--dtype", "float32")
    assert run.code == 1
    assert "are missing on its disk; free some space or choose another disk" in run.err
    assert os.listdir(tmp_path) == ["snapshots"]


# Inputs


@posix
@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_that_changes_is_named(change: str, tmp_path: Path) -> None:
    make_snapshots(tmp_path / "whole", 4, megabytes=0.2)
    rng = random.Random(SEED)
    for method in METHODS:
        calls = _reads(tmp_path, method)
        for _ in range(3):
            assert _changed(tmp_path, CHANGES[change], rng, method, calls) == []


# Outputs


@posix
@pytest.mark.parametrize("shards", [(), ("--max-shard-size", "10kB")])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_no_output_takes_the_place_of_a_snapshot(
    shards: tuple[str, ...], force: tuple[str, ...], posthoc_here: Posthoc, tmp_path: Path
) -> None:
    make_snapshots(tmp_path / "snapshots", 2, megabytes=0.1)
    (tmp_path / "linked").symlink_to("snapshots")
    (tmp_path / "soft.safetensors").symlink_to("snapshots/ema-1000-0.05.safetensors")
    os.link(tmp_path / "snapshots/ema-1000-0.10.safetensors", tmp_path / "hard.safetensors")
    before = {path: path.read_bytes() for path in (tmp_path / "snapshots").iterdir()}
    for place in (
        "snapshots/ema-1000-0.05.safetensors",
        "linked/ema-1000-0.05.safetensors",
        "soft.safetensors",
        "hard.safetensors",
    ):
        run = posthoc_here(*SYNTHESIZE[:-1], place, *shards, *force)
        assert (run.code, run.out) == (2, "")
        assert {path: path.read_bytes() for path in (tmp_path / "snapshots").iterdir()} == before
    assert load_file(tmp_path / "hard.safetensors")


@posix
def test_special_files_do_not_hang_it(
    posthoc_here: Posthoc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_snapshots(tmp_path / "snapshots", 2, megabytes=0.1)
    for name in ("pipe.safetensors", "pipe.safetensors.index.json", "pipe.pt"):
        os.mkfifo(tmp_path / "snapshots" / name)
        run = posthoc_here("inspect", "snapshots")
        assert run.code == (0 if name.endswith(".pt") else 3)
        assert posthoc_here("inspect", f"snapshots/{name}").code in (2, 3)
        assert posthoc_here("convert", "snapshots", "converted").code in (2, 3)
        os.unlink(tmp_path / "snapshots" / name)
    os.mkdir(tmp_path / "snapshots" / "folder.safetensors")
    assert posthoc_here("inspect", "snapshots").code == 0


def test_the_soak_knows_all_sections() -> None:
    from tests.soak.sections import SECTIONS

    assert special in SECTIONS.values()
    text = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    for name in SECTIONS:
        assert f"`{name}`" in text
