"""Messages that send a user the right way, and file systems that can do less than others."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import shlex
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from posthoc_cli.storage import shards
from tests.command import COMMAND, ENVIRONMENT, Posthoc, write_snapshot
from tests.support import write_shards, write_tensors

TARGET = ("--sigma-rel", "0.08")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def fill(folder: Path, *steps: int, name: str = "ema-{}.safetensors") -> None:
    """Snapshots of both widths at each step, as their metadata says; all values are the step's."""
    folder.mkdir(exist_ok=True)
    for step in steps or (1000, 2000, 3000):
        for width in ("0.05", "0.10"):
            path = folder / name.format(f"{step}-{width}")
            write_snapshot(path, step / 1000, step=str(step), sigma_rel=width)


# What a file really is

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
ZIP = b"PK\x03\x04" + bytes(22) + b"\x10\x00\x00\x00archive/data.pkl"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, r"a Git LFS pointer, .+;.+ git lfs pull"),
        (b"<!doctype html><html>Sign in</html>", r"an HTML page, .+; the download failed.+"),
        (b'{"error":"Invalid credentials"}', r".*Invalid credentials.*; the download failed.+"),
        (ZIP, r"a torch checkpoint.+rename it to \.pt: .+"),
        (b"GGUF" + bytes(60), r"a GGUF file, not a safetensors file; .+"),
        (b"", r"not a whole safetensors file.+it is empty; wait for it.+"),
        (bytes(4096), r"zeros in place of a header.+a download that never came; .+"),
    ],
    ids=["lfs", "html", "json", "torch", "gguf", "empty", "zeros"],
)
def test_one_that_is_none_among_snapshots(
    content: bytes, words: str, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    fill(tmp_path / "run")
    (tmp_path / "run" / "ema-4000-0.05.safetensors").write_bytes(content)
    run = posthoc_here("synthesize", "run", *TARGET, "-o", "out.safetensors")
    run.failed(3, rf".*ema-4000-0\.05\.safetensors: {words}")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_not_written_yet_can_be_left_out(posthoc_here: Posthoc, tmp_path: Path) -> None:
    fill(tmp_path / "run")
    (tmp_path / "run" / "ema-4000-0.05.safetensors").write_bytes(bytes(4096))
    (tmp_path / "run" / "ema-4000-0.10.safetensors").touch()
    run = posthoc_here("solve", "run", *TARGET, "--skip-incomplete", "--json")
    assert run.code == 0
    assert run.json["targets"][0]["step"] == 3000
    assert run.err.count("left out: incomplete") == 2


@posix
def test_an_annexed_file_that_is_not_here(posthoc_here: Posthoc, tmp_path: Path) -> None:
    fill(tmp_path / "run")
    link = tmp_path / "run" / "ema-4000-0.05.safetensors"
    link.symlink_to(".git/annex/objects/1a/2b/SHA256E-s1--0a/SHA256E-s1--0a")
    run = posthoc_here("solve", "run", *TARGET)
    run.failed(3, r".*ema-4000-0\.05\.safetensors: a git-annex link.+; run git annex get")


# Steps


@pytest.mark.parametrize("text", ["1200.0", "1200.", "1.2e3", "12E2", "1200.000"])
def test_a_whole_step_written_as_a_float(text: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    write_snapshot(tmp_path / "a.safetensors", 1.0, step=text, sigma_rel="0.1")
    write_snapshot(tmp_path / "b.safetensors", 3.0, step="1300", sigma_rel="0.1")
    run = posthoc_here("inspect", ".", "--json")
    assert run.code == 0
    assert [one["step"] for one in run.json["snapshots"]] == [1200, 1300]


@pytest.mark.parametrize("text", ["1200.5", "1,200", " 1200", "1e-3", "1_200", "0x10"])
def test_what_is_no_step_says_so(text: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    write_snapshot(tmp_path / "a.safetensors", 1.0, step=text, sigma_rel="0.1")
    run = posthoc_here("solve", ".", *TARGET)
    run.failed(3, r"a\.safetensors: its metadata's step is '.+', not a whole number; .+")


def images(folder: Path) -> None:
    folder.mkdir()
    for kimg in (2048, 4096, 8192):
        write_snapshot(folder / f"net-{kimg:07d}-0.100.safetensors", float(kimg))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("8192", r"is before the first snapshot's; .+ images here: 8192 kimg are --step \d+"),
        ("9000", r"is before .+: give one from \d+ to \d+, which are 2048 and 8192 kimg"),
        ("99999999", r"is after .+, which are 2048 and 8192 kimg"),
    ],
)
def test_steps_in_images(step: str, words: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    images(tmp_path / "edm2")
    posthoc_here("solve", "edm2", *TARGET, "--step", step).failed(2, rf"--step: {step} {words}")


def test_steps_in_images_as_it_says(posthoc_here: Posthoc, tmp_path: Path) -> None:
    images(tmp_path / "edm2")
    said = posthoc_here("solve", "edm2", *TARGET, "--step", "4096").err
    step = said.split()[-1]
    run = posthoc_here("solve", "edm2", *TARGET, "--step", step, "--json")
    assert run.code == 0
    assert run.json["targets"][0]["weights"][-1]["file"] == "net-0004096-0.100.safetensors"


def test_the_newest_of_two_is_named(posthoc_here: Posthoc, tmp_path: Path, check_json: Any) -> None:
    for width, count in (("0.05", 5), ("0.10", 10)):
        tensors = {"w": np.ones(4, np.float32), "count": np.array(count)}
        metadata = {"step": "1000", "sigma_rel": width}
        write_tensors(tmp_path / f"ema-{width}.safetensors", tensors, metadata)
    run = posthoc_here("synthesize", ".", *TARGET, "-o", "out/x.safetensors", "--json", "-q")
    if run.code:  # the folder isn't there
        (tmp_path / "out").mkdir()
        run = posthoc_here("synthesize", ".", *TARGET, "-o", "out/x.safetensors", "--json", "-q")
    check_json("synthesize", run.json)
    assert run.json["newest"] == "ema-0.05.safetensors"
    assert load_file(tmp_path / "out" / "x.safetensors")["count"] == 5


# Whose fault it is


def test_gamma_of_a_snapshot_without_a_norm(posthoc_here: Posthoc, tmp_path: Path) -> None:
    fill(tmp_path / "run")
    write_snapshot(tmp_path / "run" / "odd.safetensors", 1.0, step="1500", gamma="-0.5")
    run = posthoc_here("solve", "run", *TARGET, "--method", "edm2")
    run.failed(
        3, r".*odd\.safetensors: 'edm2' has no weights for its gamma, -0\.5; .*--method blup.+"
    )
    assert posthoc_here("solve", "run", *TARGET, "--method", "blup").code == 0
    (tmp_path / "run" / "odd.safetensors").unlink()
    run = posthoc_here("solve", "run", "--gamma", "-0.5", "--method", "edm2")
    run.failed(2, r"--method edm2: has no weights for gamma -0\.5; .+")


def sharded(folder: Path) -> Path:
    """A network in two shards, of step 1000; the second shard's path."""
    tensors = {f"w{at}": np.ones(4, np.float32) for at in (1, 2)}
    write_shards(folder, tensors, metadata={"step": "1000", "sigma_rel": "0.1"})
    return folder / "model-00002-of-00002.safetensors"


@posix
@pytest.mark.parametrize("kind", ["dangling", "circular", "fifo", "folder", "missing", "lfs"])
def test_a_shard_that_is_none_is_blamed(kind: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    shard = sharded(tmp_path / "run")
    shard.unlink()
    words = {
        "dangling": "a link that leads nowhere",
        "circular": "a link that leads nowhere",
        "fifo": "not a regular file",
        "folder": "not a regular file",
        "missing": "missing",
        "lfs": "a Git LFS pointer",
    }
    if kind == "dangling":
        shard.symlink_to("gone")
    elif kind == "circular":
        shard.symlink_to(shard.name)
    elif kind == "fifo":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    elif kind == "lfs":
        shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    run = posthoc_here("solve", "run", *TARGET)
    assert run.code == 3
    assert re.fullmatch(
        r"posthoc: .*model\.safetensors\.index\.json: "
        rf"its shard 'model-00002-of-00002\.safetensors' is (no shard: )?{words[kind]}.*",
        run.err.splitlines()[-1],
    )


@pytest.fixture
def vanishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose file of step 1000 goes after the folder is listed, as `keep=` removes it."""
    fill(tmp_path / "run")
    gone = tmp_path / "run" / "ema-1000-0.05.safetensors"
    real = shards.read_header

    def read(path: Path, *arguments: Any) -> Any:
        gone.unlink(missing_ok=True)
        return real(path, *arguments)

    monkeypatch.setattr(shards, "read_header", read)
    return tmp_path / "run"


def test_a_snapshot_that_vanishes_is_named(vanishing: Path, posthoc_here: Posthoc) -> None:
    run = posthoc_here("solve", vanishing, *TARGET)
    run.failed(3, r".*ema-1000-0\.05\.safetensors: vanished while .+; .+--skip-incomplete")


def test_a_snapshot_that_vanishes_can_be_left_out(vanishing: Path, posthoc_here: Posthoc) -> None:
    run = posthoc_here("solve", vanishing, *TARGET, "--skip-incomplete", "--json")
    assert run.code == 0
    assert "ema-1000-0.05.safetensors: left out: incomplete: vanished" in run.err
    assert len(run.json["targets"][0]["weights"]) == 5


# Machines


def test_no_mmap(posthoc_here: Posthoc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    fill(tmp_path / "run")
    run = posthoc_here("synthesize", "run", "--sigma-rel", "0.05", "-o", "out.safetensors", "-q")
    assert run.code == 0
    assert posthoc_here("verify", "out.safetensors", "run", "--full").code == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_mmap_of_inputs_by_the_system_calls(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", "trace=mmap", COMMAND, "inspect", "run"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("strace may not trace here")
    assert ".safetensors" not in done.stderr


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush(
    number: int, posthoc_here: Posthoc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    fill(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", refuse)
    if hasattr(os, "fdatasync"):
        monkeypatch.setattr(os, "fdatasync", refuse)
    run = posthoc_here("synthesize", "run", "--sigma-rel", "0.05", "-o", "out.safetensors", "-q")
    assert run.code == 0
    assert load_file(tmp_path / "out.safetensors")["body.weight"].shape == (3, 4)


@pytest.mark.parametrize(
    "error",
    [
        OSError("Could not find/load shared object file 'libllvmlite.so'"),
        RuntimeError("can't start new thread"),
        ImportError("libgfortran.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=["llvm", "thread", "import", "enomem", "memory"],
)
def test_too_little_memory_is_named(
    error: Exception, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fill(tmp_path / "run")

    def fail(*_: object, **__: object) -> None:
        if "llvmlite" in str(error):  # as it says it: of one that the system has not mapped
            raise error from OSError("x.so: failed to map segment from shared object")
        raise error

    monkeypatch.setattr("posthoc_cli.api.run.read_folder", fail)
    posthoc_here("inspect", "run").failed(1, r"memory: not enough of it; .*ulimit -v.*")


def test_a_name_of_millions_of_characters(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Cut before it is made fit for a terminal, which took 14 s for 30 MB."""
    for step, end in ((1000, "a"), (2000, "b")):
        name = "only=[\x1b[2J" * 400_000 + end
        header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
        content = struct.pack("<Q", len(header)) + header.encode() + b"x"
        (tmp_path / f"lora-{step}.safetensors").write_bytes(content)
    run = posthoc_here("inspect", ".", "--raw")
    assert run.code == 3
    assert len(run.out) < 5_000
    assert "\x1b" not in run.out
    run = posthoc_here("solve", ".", "--raw", *TARGET)
    run.failed(3, r".*lora-1000\.safetensors: tensor .+")
    assert len(run.err) < 3_000


# The command that would work


def suggestion(posthoc_here: Posthoc, *arguments: str) -> str | None:
    """What inspect suggests; it is run, and has to work."""
    run = posthoc_here("inspect", *arguments, "--json")
    assert run.code == 3
    found = run.json["suggestion"]
    shown = posthoc_here("inspect", *arguments).out
    assert (found is None) == ("This would work" not in shown)
    if found is None:
        return None
    assert found in shown
    words = shlex.split(found)
    assert words[:2] == ["posthoc", "inspect"]
    assert posthoc_here(*words[1:]).code == 0
    return str(found)


def test_suggests_raw(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    for step in (100, 200, 300):
        write_snapshot(tmp_path / "loras" / f"lora-step{step}.safetensors", step)
    assert suggestion(posthoc_here, "loras") == "posthoc inspect loras --raw"


def test_suggests_a_pattern(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    for step in (100, 200, 300):
        write_snapshot(tmp_path / "my run" / f"net7@{step}~s0.05.safetensors", step)
    assert suggestion(posthoc_here, "my run") == (
        "posthoc inspect 'my run' --pattern 'net7@{step}~s{sigma_rel}.safetensors'"
    )


def test_suggests_to_leave_out_what_is_another_network(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    fill(tmp_path / "run")
    for step in (1500, 2500):
        tensors = {"other": np.ones(3, np.float32)}
        metadata = {"step": str(step), "sigma_rel": "0.05"}
        write_tensors(tmp_path / "run" / f"text[{step}].safetensors", tensors, metadata)
    found = suggestion(posthoc_here, "run")
    assert found is not None
    assert "--exclude 'text" in found


def test_suggests_to_skip_what_is_incomplete(posthoc_here: Posthoc, tmp_path: Path) -> None:
    fill(tmp_path / "run")
    path = tmp_path / "run" / "ema-3000-0.05.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert suggestion(posthoc_here, "run") == "posthoc inspect run --skip-incomplete"


def test_suggests_nothing_where_nothing_works(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("final", "best"):
        write_snapshot(tmp_path / "run" / f"{name}.safetensors", 1.0)
    assert suggestion(posthoc_here, "run") is None


def test_warnings_in_every_json(posthoc_here: Posthoc, tmp_path: Path, check_json: Any) -> None:
    fill(tmp_path / "run")
    plan = posthoc_here("plan", "--steps", "1001", "--every", "100", "--json")
    check_json("plan", plan.json)
    assert "1 steps before the end" in plan.json["warnings"][0]["message"]
    assert posthoc_here("synthesize", "run", *TARGET, "-o", "out.safetensors", "-q").code == 0
    for arguments in (["inspect", "run"], ["verify", "out.safetensors", "run"]):
        run = posthoc_here(*arguments, "--json")
        check_json(arguments[0], run.json)
        assert run.json["warnings"] == []
