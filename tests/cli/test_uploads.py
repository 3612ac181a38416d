"""Outputs in buckets: the same bytes as on a disk, whole or not at all, errors in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc_cli.storage.remote import sources
from tests.command import ENVIRONMENT, Posthoc
from tests.servers import s3
from tests.servers.buckets import Buckets, environment
from tests.servers.faults import Fault, Proxy

pytest.importorskip("obstore")

TARGET = ("--sigma-rel", "0.07")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """`large/` in `tmp_path`: snapshots of several parts, of which a third never varies."""
    (tmp_path / "large").mkdir()
    values = np.random.default_rng(0).standard_normal((3, 1 << 17)).astype(np.float32)
    for step in (1000, 2000):
        for sigma_rel in ("0.05", "0.10"):
            tensors = {"a": values[0] * step, "frozen": values[1], "z": values[2] + step}
            where = tmp_path / "large" / f"ema-{step}-{sigma_rel}.safetensors"
            save_file(tensors, where, {"step": str(step), "sigma_rel": sigma_rel})
    return tmp_path / "large"


def written(server: Buckets, prefix: str = "") -> dict[str, bytes]:
    """The objects below a prefix, by what follows it."""
    objects = server.buckets["bucket"]
    return {key[len(prefix) :]: objects[key].data for key in objects if key.startswith(prefix)}


def on_disk(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_file(
    server: Buckets, proxy: Proxy, large: Path, posthoc_here: Posthoc, scheme: str
) -> None:
    assert posthoc_here("synthesize", "large", *TARGET, "-o", "out.safetensors").code == 0
    out = f"{scheme}://bucket/emas/ema.safetensors"
    done = posthoc_here("synthesize", "large", *TARGET, "-o", out, "--json")
    assert done.code == 0, done.err
    assert done.json["targets"][0]["output"] == out
    assert written(server) == {
        "emas/ema.safetensors": (large.parent / "out.safetensors").read_bytes()
    }
    assert not server.uploads
    assert not server.blocks
    verified = posthoc_here("verify", out, "large", "--full")
    assert verified.code == 0, verified.err
    assert "ema-2000-0.10" in posthoc_here("inspect", out).out


SEVERAL = [
    ("emas/", TARGET, ("--gamma", "9", "-q")),
    ("emas-{target}.safetensors", TARGET, ("--window", "20%", "-q")),
    ("emas.safetensors", TARGET, ("--max-shard-size", "600kB")),
    ("emas/", TARGET, ("--gamma", "9", "--max-shard-size", "600kB")),
    ("emas", TARGET, ("--layout", "folder")),
    ("emas-{target}", TARGET, ("--gamma", "9", "--layout", "folder", "--max-shard-size", "1100kB")),
]


@pytest.mark.parametrize(("out", "target", "more"), SEVERAL, ids=[each[0] for each in SEVERAL])
def test_several_objects(
    server: Buckets,
    proxy: Proxy,
    large: Path,
    posthoc_here: Posthoc,
    out: str,
    target: tuple[str, ...],
    more: tuple[str, ...],
) -> None:
    (large / "config.json").write_text('{"_class_name": "Net"}')
    here, there = large.parent / "here", f"s3://bucket/{out}"
    here.mkdir()
    for where in (f"here/{out}", there):
        done = posthoc_here("synthesize", "large", *target, *more, "-o", where)
        assert done.code == 0, done.err
    assert written(server) == on_disk(here)
    done = posthoc_here("synthesize", "large", *target, *more, "-o", there)
    done.failed(2, r"s3://bucket/.*: exists already; .*")
    before = dict(server.buckets["bucket"])
    done = posthoc_here("synthesize", "large", *target, *more, "-o", there, "--skip-existing")
    assert done.code == 0, done.err
    assert server.buckets["bucket"] == before
    done = posthoc_here("synthesize", "large", *target, *more, "-o", there, "--force")
    assert done.code == 0, done.err
    assert written(server) == on_disk(here)
    assert all(server.buckets["bucket"][key] != before[key] for key in before)


def test_force_removes_what_was_part_of_the_old_output(
    server: Buckets, proxy: Proxy, large: Path, posthoc_here: Posthoc
) -> None:
    def run(*more: str) -> list[str]:
        out = "s3://bucket/ema.safetensors"
        done = posthoc_here("synthesize", "large", *TARGET, "-o", out, "--force", *more)
        assert done.code == 0, done.err
        return server.keys("bucket")

    server.put("bucket", "emax.safetensors", b"another's")
    names = [f"ema-0000{at}-of-00003.safetensors" for at in (1, 2, 3)]
    index = "ema.safetensors.index.json"
    assert run("--max-shard-size", "500kB") == sorted([*names, index, "emax.safetensors"])
    assert run() == ["ema.safetensors", "emax.safetensors"]
    assert len(run("--max-shard-size", "1100kB")) == 4


def test_outputs_among_snapshots(
    server: Buckets, proxy: Proxy, snapshots: Path, posthoc_here: Posthoc
) -> None:
    """From a bucket to itself: the output is known as ours, and a snapshot is never replaced."""
    for name, data in on_disk(snapshots).items():
        server.put("bucket", f"run/{name}", data)
    for where in ("snapshots", "s3://bucket/run"):
        done = posthoc_here("synthesize", where, *TARGET, "-o", f"{where}/x.safetensors")
        assert done.code == 0, done.err
    assert written(server, "run/") == on_disk(snapshots)
    listed = posthoc_here("inspect", "s3://bucket/run", "--json").json
    assert len(listed["snapshots"]) == 8
    assert "x.safetensors" in str(listed)
    assert posthoc_here("verify", "s3://bucket/run/x.safetensors", "s3://bucket/run").code == 0
    for name, what in (("ema-1000-0.05", "one of the snapshots"), ("foreign", "didn't make it")):
        out = f"s3://bucket/run/{name}.safetensors"
        server.put(
            "bucket", "run/foreign.safetensors", on_disk(snapshots)["ema-1000-0.05.safetensors"]
        )
        how = ("--only", "ema-*", "-o", out, "--force")
        done = posthoc_here("synthesize", "s3://bucket/run", *TARGET, *how)
        done.failed(2, rf"{out}: .*{what}; .*")
    del server.buckets["bucket"]["run/foreign.safetensors"]
    local = posthoc_here("synthesize", "s3://bucket/run", *TARGET, "-o", "down.safetensors")
    assert local.code == 0, local.err


def test_products(server: Buckets, proxy: Proxy, tmp_path: Path, posthoc_here: Posthoc) -> None:
    """Factors of a LoRA come last, wherever they lie in the file."""
    rng = np.random.default_rng(0)
    (tmp_path / "loras").mkdir()
    for step in (100, 200, 300):
        tensors = {"alpha": np.array(step, np.float32)}
        for at in range(3):
            tensors[f"m{at}.lora_A.weight"] = rng.standard_normal((4, 32)).astype(np.float32)
            tensors[f"m{at}.lora_B.weight"] = rng.standard_normal((32, 4)).astype(np.float32)
        save_file(tensors, tmp_path / "loras" / f"l-{step}.safetensors", {"step": str(step)})
    for out in ("here.safetensors", "s3://bucket/here.safetensors"):
        how = ("--raw", *TARGET, "--lora", "exact", "-o", out)
        done = posthoc_here("synthesize", "loras", *how)
        assert done.code == 0, done.err
    assert written(server) == {"here.safetensors": (tmp_path / "here.safetensors").read_bytes()}


def test_other_commands(
    server: Buckets, proxy: Proxy, snapshots: Path, posthoc_here: Posthoc
) -> None:
    done = posthoc_here("pack", "snapshots", "s3://bucket/packed")
    done.failed(2, r"s3://bucket/packed: is a URL, .*; pack to a folder, and copy that")
    done = posthoc_here("demo", "s3://bucket/demo")
    done.failed(2, r"s3://bucket/demo: is a URL; name a new folder of this machine")
    done = posthoc_here("plot", "snapshots", *TARGET, "-o", "s3://bucket/figure.svg")
    assert done.code == 0, done.err
    assert b"<svg" in server.get("bucket", "figure.svg")


@pytest.mark.parametrize("url", ["https://host/x.safetensors", "hf://me/net/x.safetensors"])
def test_what_is_only_read(snapshots: Path, posthoc_here: Posthoc, url: str) -> None:
    done = posthoc_here("synthesize", "snapshots", *TARGET, "-o", url)
    line = rf"{url}: \w+:// can be read, but not written; write to .*"
    done.failed(2, line)
    metric = ("--metric", "wc -c < {file}", "--minimize")
    posthoc_here("tune", "snapshots", *metric, "-o", url).failed(2, line)
    figure = url.replace("safetensors", "svg")
    line = line.replace("safetensors", "svg")
    posthoc_here("plot", "snapshots", *TARGET, "-o", figure).failed(2, line)


REFUSALS = {
    (403, "AccessDenied"): "permission denied",
    (400, "ExpiredToken"): "expired",
    (401, "Unauthorized"): "permission denied",
    (403, "QuotaExceeded"): "the store is full",
}


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refusals(
    server: Buckets,
    proxy: Proxy,
    snapshots: Path,
    posthoc_here: Posthoc,
    refusal: tuple[int, str],
) -> None:
    server.deny = lambda request: refusal if request.method == "PUT" else None
    try:
        done = posthoc_here("synthesize", "snapshots", *TARGET, "-o", "s3://bucket/a.safetensors")
    finally:
        server.deny = None
    done.failed(1, rf"s3://bucket/a\.safetensors: .*{REFUSALS[refusal]}.*; .*")
    assert written(server) == {}


ANSWERS = {
    b"<Error><Code>InternalError</Code></Error>": "the server answers InternalError; try again",
    b"<Error><Code>SlowDown</Code></Error>": "the server answers SlowDown; try again",
    b"<html/>": "what answers is no store of objects; check AWS_ENDPOINT_URL, .*",
}


@pytest.mark.parametrize("body", ANSWERS, ids=str)
def test_an_error_that_is_called_a_success(
    server: Buckets,
    proxy: Proxy,
    large: Path,
    posthoc_here: Posthoc,
    monkeypatch: pytest.MonkeyPatch,
    body: bytes,
) -> None:
    """As S3 does at the end of an upload: it has answered 200 before it knows."""
    monkeypatch.setattr(sources, "RETRY", {**sources.RETRY, "max_retries": 1})
    proxy.add(Fault(method="POST", path="uploadId", status=200, body=body, count=-1))
    done = posthoc_here("synthesize", "large", *TARGET, "-o", "s3://bucket/a.safetensors")
    done.failed(1, rf"s3://bucket/a\.safetensors: .*{ANSWERS[body]}")
    assert written(server) == {}
    assert not server.uploads


def test_no_bucket(server: Buckets, proxy: Proxy, snapshots: Path, posthoc_here: Posthoc) -> None:
    done = posthoc_here("synthesize", "snapshots", *TARGET, "-o", "s3://none/a.safetensors")
    done.failed(1, r"s3://none/a\.safetensors: .*no such bucket; .*")


def test_parts_fail(server: Buckets, proxy: Proxy, large: Path, posthoc_here: Posthoc) -> None:
    out = ("-o", "s3://bucket/a.safetensors")
    proxy.add(Fault(method="PUT", status=500, count=3), Fault(method="PUT", upload=1000))
    assert posthoc_here("synthesize", "large", *TARGET, *out).code == 0
    server.buckets["bucket"].clear()
    proxy.add(Fault(method="PUT", status=403, path="partNumber=2", count=-1))
    done = posthoc_here("synthesize", "large", *TARGET, "--gamma", "9", "-o", "s3://bucket/e/")
    done.failed(1, r"s3://bucket/e/.*: .*permission denied.*; .*")
    assert written(server) == {}
    assert not server.uploads
    proxy.add(Fault(method="DELETE", status=403, count=-1))
    done = posthoc_here("synthesize", "large", *TARGET, *out)
    done.failed(1, r"s3://bucket/a.*: .*parts of s3://bucket/a.* may be left; .*")


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT for one process")
def test_interrupted(server: Buckets, proxy: Proxy, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((2, 5 << 20)).astype(np.float32)
    for step in (1000, 2000):
        save_file(
            {"a": values[step // 2000]}, tmp_path / f"s{step}.safetensors", {"step": str(step)}
        )
    proxy.add(Fault(method="PUT", path="partNumber=2", hang=True, count=-1))
    arguments = ("synthesize", ".", "--raw", *TARGET, "-o", "s3://bucket/a.safetensors", "-q")
    command = [sys.executable, "-m", "posthoc_cli", *arguments]
    env = ENVIRONMENT | server.environment(proxy.url)
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        while not server.uploads and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "posthoc: interrupted\n"
    assert process.returncode == 130
    assert not server.uploads
    assert written(server) == {}


def test_moto(tmp_path: Path, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by an S3 that is not our own."""
    (tmp_path / "raw").mkdir()
    values = np.arange(3 << 20, dtype=np.float32)
    for step in (1, 2):
        where = tmp_path / "raw" / f"s{step}.safetensors"
        save_file({"a": values * step}, where, {"step": str(step)})
    with s3.moto("bucket") as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        out = "s3://bucket/a.safetensors"
        words = ("synthesize", "raw", "--raw", "--window", "2", "-o", out)
        for more, code in (("-q", 0), ("-q", 2), ("--force", 0)):
            assert posthoc_here(*words, more).code == code
        assert posthoc_here("verify", out, "raw", "--full").code == 0
