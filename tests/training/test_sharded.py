"""Sharded networks: each process writes its part of the snapshots, which are those of one process
that trained the same; and whatever goes wrong in one of them, all are told."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats import open_network
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.storage import read_header
from posthoc_cli.training.claim import LOCK
from posthoc_cli.training.sharded import Piece, share_out
from tests.command import ENVIRONMENT, ROOT, Posthoc
from tests.packing import rebuilt
from tests.servers.buckets import Buckets
from tests.support import contents
from tests.training.networks import folder_bytes
from tests.training.write_sharded import EVERY, LAST, REFUSED, STEPS, network, tracker, walk

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
]

SHARDED = ("fsdp", "both", "hybrid", "tensor")


@pytest.fixture(scope="module")
def server() -> Iterator[Buckets]:
    with Buckets("bucket") as server:
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, server: Buckets) -> Path:
    """What four processes, and then two, have written."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "tests.training.write_sharded", str(folder)]
    bucket = server.environment() if importlib.util.find_spec("obstore") else {}
    environment = ENVIRONMENT | bucket
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("said-*"))) == 5, done.stderr  # one is killed, as it should be
    return folder


def said(folder: Path, size: int) -> list[dict[str, Any]]:
    """What each of so many processes was told; one that was killed says nothing."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"said-{size}-*.json"))]
    assert not [each["failed"] for each in found if "failed" in each]
    return found


def names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != LOCK)


@pytest.mark.parametrize("way", [*SHARDED, "replicated", "resumed", "whole"])
def test_snapshots_are_those_of_one_process_bit_for_bit(trained: Path, way: str) -> None:
    first = STEPS + EVERY if way in ("resumed", "whole") else EVERY
    ending = ".safetensors" if way == "replicated" else ""
    assert names(trained / way) == [
        f"ema-step{step:08d}-{profile}{ending}"
        for step in range(first, LAST + 1, EVERY)
        for profile in ("0.050", "0.100", "raw")
    ]
    for name in names(trained / way):
        index = open_network(trained / way / name)
        plain = read_header(trained / "plain" / f"{name.removesuffix(ending)}.safetensors")
        assert contents(index) == contents(plain)
        assert {**index.metadata, "run": ""} == {**plain.metadata, "run": ""}


def test_each_process_writes_a_part_and_copies_are_written_once(trained: Path) -> None:
    for way in SHARDED:
        folder = trained / way / "ema-step00000002-0.050"
        assert names(folder) == [
            f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2, 3, 4)
        ]
        sizes = [read_header(folder / name).parts[0].length for name in names(folder)]
        whole = read_header(trained / "plain" / "ema-step00000002-0.050.safetensors")
        assert sum(sizes) == whole.parts[0].length
        assert max(sizes) < 0.45 * sum(sizes), way


def test_torch_reads_them_too(trained: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    name = "ema-step00000006-0.100"
    whole = load_file(trained / "plain" / f"{name}.safetensors")
    state = {key: torch.zeros_like(value) for key, value in whole.items() if value.numel()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(trained / "both" / name)))
    assert all(torch.equal(state[key], whole[key]) for key in state)


@pytest.mark.parametrize("way", ["fsdp", "both"])
def test_commands_read_them_as_they_lie(
    trained: Path, tmp_path: Path, posthoc_here: Posthoc, way: str
) -> None:
    found = posthoc_here("inspect", trained / way, "--json").json
    assert [(each["file"], each["step"], each["source"]) for each in found["snapshots"]][-1] == (
        "ema-step00000010-0.100", 10, "metadata"
    )  # fmt: skip
    for number, folder in enumerate((trained / way, trained / "plain")):
        done = posthoc_here(
            "synthesize", folder, "--sigma-rel", "0.07", "-o", f"{number}.safetensors"
        )
        assert done.code == 0, done
    one, other = (read_header(tmp_path / f"{number}.safetensors") for number in (0, 1))
    assert contents(one) == contents(other)
    assert one.metadata.keys() == other.metadata.keys()
    assert posthoc_here("verify", "0.safetensors", trained / way, "--full").code == 0


def test_a_part_that_is_missing_is_told(
    trained: Path, tmp_path: Path, posthoc_here: Posthoc
) -> None:
    run = Path(shutil.copytree(trained / "fsdp", tmp_path / "run"))
    (run / "ema-step00000004-0.050" / "shard-00004-model-00001-of-00001.safetensors").unlink()
    options = ("run", "--sigma-rel", "0.07")
    message = r".*ema-step00000004-0.050: is not whole: 3 of its 4 files are there; wait until.*"
    posthoc_here("solve", *options).failed(3, message)
    assert posthoc_here("solve", *options, "--skip-incomplete").code == 0


def test_keep_removes_whole_folders(trained: Path) -> None:
    assert {each.step for each in read_folder(trained / "kept").usable()} == {4, 6}
    assert len(names(trained / "kept")) == 6


@pytest.mark.parametrize("way", ["fsdp", "replicated"])
def test_differences_of_several_processes(trained: Path, way: str) -> None:
    folder = trained / f"{way} delta"
    assert len(names(folder)) == 9
    for name in names(folder):
        whole = load_file(trained / "plain" / name)
        for tensor, value in rebuilt(folder / name).items():
            np.testing.assert_allclose(value, whole[tensor], rtol=0, atol=2e-3)
    if way == "fsdp":  # whose state any process may save
        runs = {process["run of fsdp delta"] for process in said(trained, 4)}
        assert runs == {read_header(folder / name).metadata["run"] for name in names(folder)}


def test_parts_in_a_bucket(
    trained: Path, server: Buckets, monkeypatch: pytest.MonkeyPatch, posthoc_here: Posthoc
) -> None:
    pytest.importorskip("obstore")
    problem = "no snapshot of step 2: s3://bucket/run/ema-step00000002-0.100: cannot be written "
    for process in said(trained, 4):
        assert process["bucket"] == [f"{problem}(process 1); try again"]
    assert sorted(server.buckets["bucket"]) == [
        f"run/ema-step0000000{step}-{profile}/shard-0000{n}-model-00001-of-00001.safetensors"
        for step in (4, 6)
        for profile in ("0.050", "0.100", "raw")
        for n in (1, 2, 3, 4)
    ]
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    for snapshot in read_folder("s3://bucket/run").usable():
        plain = trained / "plain" / f"{snapshot.file}.safetensors"
        assert contents(snapshot.index) == contents(read_header(plain))
    ema = tracker(network(), "s3://bucket/run")
    assert ema.load_snapshots() == STEPS
    found = posthoc_here("inspect", "s3://bucket/run", "--json").json["snapshots"]
    assert [each["step"] for each in found] == [4, 4, 4, 6, 6, 6]


def test_a_full_disk_of_one_is_told_to_all_and_leaves_nothing(trained: Path) -> None:
    for process in said(trained, 4):
        for full in (0, 2):
            (told,) = process["full disk"][f"full-{full}"]
            assert told == (
                f"no snapshot of step 2: {trained}/full-{full}/ema-step00000002-0.100: cannot be "
                f"written (No space left on device) (process {full}); free some space or choose "
                "another disk"
            )
    for full in (0, 2):
        assert names(trained / f"full-{full}") == [
            f"ema-step0000000{step}-{profile}"
            for step, profiles in ((2, ("0.050", "raw")), (4, ("0.050", "0.100", "raw")))
            for profile in profiles
        ]


def test_differences_that_one_process_cannot_give_or_write(trained: Path) -> None:
    why = {2: "no room (process 2)", 0: "(No space left on device)"}
    for process in said(trained, 4):
        for broken, problem in why.items():
            (told,) = process["no part"][f"part-{broken}"]
            assert told.startswith("no snapshots of step 4: ")
            assert problem in told
    for broken in (0, 2):
        found = read_folder(trained / f"part-{broken}")
        assert not found.problems
        assert {each.step for each in found.usable()} == {2, 6}


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        ("another run", "UsageError: .*: holds another run's snapshots"),
        ("not shared", "MachineError: .*: is another folder than the first process'"),
        ("one without", "UsageError: .*: process 3 of 4 doesn't track the network"),
        ("other steps", "ValueError: the processes are at different steps: 1 and 2"),
        ("another network", r"ValueError: tensor 'scale' is \[3\] in the model"),
    ],
)  # fmt: skip
def test_what_one_finds_is_raised_in_all(trained: Path, scene: str, expected: str) -> None:
    import re

    told = [process["refused"][scene] for process in said(trained, 4)]
    assert len(told) == 4
    for text, seconds in told[: 3 if scene == "one without" else 4]:
        assert re.match(expected, text), text
        assert "\n" not in text
        assert seconds < 30
    assert REFUSED.keys() >= {scene}


def test_a_process_that_is_killed_ends_the_others(trained: Path) -> None:
    (first,) = said(trained, 2)  # the second one is no more
    assert first["lost"] == ["RuntimeError"]
    assert names(trained / "lost") == []


def test_a_state_of_another_process_is_refused(trained: Path) -> None:
    first, second = (json.loads((trained / f"so far-{rank}.json").read_text()) for rank in (0, 1))
    assert first == ""
    assert second.startswith(
        "the state has process 0's part of the averages, and this is process 1;"
    )


def test_averages_are_read_from_snapshots_of_another_sharding(trained: Path) -> None:
    (first,) = said(trained, 2)
    assert first["read step"] == STEPS
    for width, read in zip(("0.050", "0.100"), first["read"], strict=True):
        whole = load_file(trained / "plain" / f"ema-step00000006-{width}.safetensors")
        assert read.keys() == whole.keys() - {"head.weight", "count"}  # one is tied, one no average
        for name, values in read.items():
            assert torch.equal(torch.tensor(values).view_as(whole[name]), whole[name]), name


def test_one_process_goes_on_from_what_four_have_written(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained / "hybrid", tmp_path / "run"))
    ema = tracker(network(), folder, later="set aside", keep=3)
    assert ema.load_snapshots(STEPS) == STEPS
    state = load_file(trained / "plain" / "ema-step00000006-raw.safetensors")
    ema.model.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="up to step 10, and it resumes at step 6; the 6 after"):
        walk(ema, LAST)
    assert names(folder) == [
        *(f"ema-step00000006-{profile}" for profile in ("0.050", "0.100", "raw")),
        *(name for name in names(trained / "plain") if "08-" in name or "10-" in name),
        "other-runs",
    ]
    assert len(names(folder / "other-runs" / ema.run)) == 6
    plain = folder_bytes(trained / "plain")
    for name, data in folder_bytes(folder).items():
        index, other = read_header(folder / name), read_header(trained / "plain" / name)
        assert contents(index) == contents(other), name
        assert len(data) == len(plain[name])
    assert ema.synthesize(sigma_rel=0.07)["up.weight"].shape == (10, 7)


def test_a_snapshot_is_a_file_or_a_folder_and_never_both(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained / "fsdp", tmp_path / "run"))
    ema = tracker(network(), folder)
    ema.load_snapshots()
    ema.checkpoint()
    assert [name for name in names(folder) if "10-" in name] == [
        f"ema-step00000010-{profile}.safetensors" for profile in ("0.050", "0.100", "raw")
    ]


def test_snapshots_that_do_not_fit_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no snapshots of step 7 of gammas"):
        tracker(network(), trained / "fsdp").load_snapshots(7)
    with pytest.raises(SnapshotError, match=r"no snapshots of gammas 3.0, 8.0"):
        PostHocEMA(network(), gammas=(3, 8), folder=trained / "fsdp").load_snapshots()
    other = torch.nn.Linear(7, 10)
    with pytest.raises(SnapshotError, match=r"0.050: has no tensor 'weight' of \[10, 7\]"):
        PostHocEMA(other, folder=trained / "fsdp").load_snapshots()
    shutil.copytree(trained / "fsdp", tmp_path / "run")
    shutil.copytree(trained / "kept", tmp_path / "run", dirs_exist_ok=True)
    with pytest.raises(SnapshotError, match="several runs' snapshots"):
        tracker(network(), tmp_path / "run").load_snapshots()


def piece(first: int, size: int, shape: int = 8, sharded: bool = True) -> Piece:
    return Piece("F32", (shape,), (first,), (size,), sharded)


def test_parts_are_shared_out_evenly_and_must_be_whole() -> None:
    halves = [{"a": piece(0, 4), "b": piece(0, 4)}, {"a": piece(4, 4), "b": piece(4, 4)}]
    assert share_out(halves) == [["a", "b"], ["a", "b"]]
    copies = share_out([*halves, *halves])
    assert sorted(map(len, copies)) == [1, 1, 1, 1]
    assert share_out([{"a": piece(0, 8, sharded=False)}] * 2) == [["a"], []]
    with pytest.raises(ValueError, match=r"'a' of .8. is not whole"):
        share_out(halves[:1])
    with pytest.raises(ValueError, match=r"'a' is .* in one process, .* in 1"):
        share_out([{"a": piece(0, 4)}, {"a": piece(4, 5, 9)}])


@pytest.mark.parametrize("way", ["fsdp", "both"])
def test_a_sharded_network_is_lent_its_part(trained: Path, way: str) -> None:
    assert [each[f"lent to {way}"] for each in said(trained, 4)] == 4 * [
        {"lent": True, "back": True}
    ]
