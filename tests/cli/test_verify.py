"""`posthoc verify`, run as a user would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.command import Posthoc, on_terminal, visible, write_snapshot

OUT = "x.safetensors"


def change(path: Path, name: str) -> None:
    """Change one value of a tensor, and nothing else."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name].flat[1] = 77
    save_file(tensors, path, metadata)


@pytest.fixture
def made(posthoc_here: Posthoc, snapshots: Path) -> Path:
    run = posthoc_here("synthesize", "snapshots", "--sigma-rel", "0.07", "-o", OUT)
    assert run.code == 0
    return snapshots.parent / OUT


def test_all_is_well(posthoc: Posthoc, posthoc_here: Posthoc, made: Path, check_json) -> None:
    run = posthoc("verify", OUT, "snapshots")
    assert (run.code, run.err) == (0, "")
    assert run.out == (
        f"{OUT}: 17 of 17 values are as the recipe says\nall 8 sources are unchanged\n"
    )
    assert posthoc_here("verify", OUT, "snapshots", "--full", "-q").out == run.out
    run = posthoc_here("verify", OUT, "snapshots", "--json")
    assert (run.code, run.err) == (0, "")
    check_json("verify", run.json)
    assert run.json == {
        "output": OUT,
        "folder": "snapshots",
        "full": False,
        "ok": True,
        "sources": 8,
        "fingerprints": 8,
        "tensors": 3,
        "values": 17,
        "compared": 17,
        "rounded": 0,
        "warnings": [],
        "problems": [],
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "algorithm3"],
        ["--method", "blup"],
        ["--gamma", "3", "--step", "3500"],
        ["--dtype", "float64", "--copy", "*.bias", "--copy", "head*"],
        ["--dtype", "bfloat16", "--drop", "*.bias"],
        ["--drop", "head.*", "--copy", "*"],
        ["--max-shard-size", "50B"],
    ],
    ids=" ".join,
)
def test_whatever_synthesize_writes(
    posthoc_here: Posthoc, snapshots: Path, options: list[str]
) -> None:
    width = [] if "--gamma" in options else ["--sigma-rel", "0.06"]
    many = ["synthesize", "snapshots", *width, "--gamma", "5", "-q", *options]
    assert posthoc_here(*many, "-o", "x-{gamma:.2f}.safetensors").code == 0
    outputs = [path.name for path in snapshots.parent.glob("x-*") if "-of-" not in path.name]
    assert len(outputs) == 2
    for output in outputs:
        for full in ([], ["--full"]):
            run = posthoc_here("verify", output, "snapshots", *full)
            assert (run.code, run.err) == (0, ""), run
            assert f"{output}: " in run.out


def test_raw_checkpoints(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for step in range(100, 900, 100):
        write_snapshot(tmp_path / "raw" / f"net-{step}.safetensors", step / 100)
    arguments = ["synthesize", "raw", "--raw", "--sigma-rel", "0.15", "-q", "-o", OUT]
    assert posthoc_here(*arguments).code == 0
    assert posthoc_here("verify", OUT, "raw").code == 0
    assert posthoc_here("verify", OUT, "raw", "--full").code == 0


def test_shards_by_the_name_they_were_made_under(posthoc_here: Posthoc, snapshots: Path) -> None:
    arguments = ["synthesize", "snapshots", "--sigma-rel", "0.07", "-o", OUT]
    assert posthoc_here(*arguments, "--max-shard-size", "50B").code == 0
    run = posthoc_here("verify", OUT, "snapshots")
    assert run.out.startswith(f"{OUT}.index.json: 17 of 17 values are")


def test_a_value_that_is_wrong(posthoc_here: Posthoc, made: Path, check_json) -> None:
    change(made, "body.weight")
    line = rf"{OUT}: tensor 'body\.weight' \[0, 1\] is 77 and should be [\d.]+; synthesize it anew"
    posthoc_here("verify", OUT, "snapshots").failed(3, line)
    posthoc_here("verify", OUT, "snapshots", "--full", "-q").failed(3, line)
    change(made, "body.bias")
    posthoc_here("verify", OUT, "snapshots").failed(
        3, rf"{line} \(1 more problem: --json lists them\)"
    )
    run = posthoc_here("verify", OUT, "snapshots", "--json")
    assert run.code == 3
    assert run.err.count("\n") == 1
    check_json("verify", run.json)
    assert run.json["ok"] is False
    assert [(each["file"], each["tensor"], each["element"]) for each in run.json["problems"]] == [
        (OUT, "body.weight", [0, 1]),
        (OUT, "body.bias", [1]),
    ]


def test_sources(posthoc_here: Posthoc, made: Path, snapshots: Path, check_json) -> None:
    shutil.copytree(snapshots, snapshots.parent / "copy")
    assert posthoc_here("verify", OUT, "copy").code == 0
    name = "ema-2000-0.10.safetensors"
    write_snapshot(snapshots / name, 9, step="2000", sigma_rel="0.10")
    posthoc_here("verify", OUT, "snapshots").failed(
        3, rf"snapshots.{name}: is not the file that the output was made of; put that one .*"
    )
    (snapshots / name).unlink()
    posthoc_here("verify", OUT, "snapshots").failed(3, rf"snapshots.{name}: is not there; .*")
    run = posthoc_here("verify", OUT, "snapshots", "--json")
    check_json("verify", run.json)
    assert run.json["problems"][0]["file"] == name
    assert run.json["problems"][0]["tensor"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ([OUT], 2, "FOLDER: no snapshot of x.safetensors lies beside it; give .*"),
        ([OUT, "nowhere"], 2, "nowhere: there is no such folder; .*"),
        ([OUT, OUT], 2, "x.safetensors: is not a folder; .*"),
        (["y.safetensors"], 2, "y.safetensors: there is no such file; .*"),
        ([], 2, "OUT: missing; .*"),
        (["snapshots/ema-1000-0.05.safetensors"], 3, ".*: posthoc didn't make it: .*"),
        (["model.pt"], 3, "model.pt: a torch checkpoint .*; give a file .* that synthesize wrote"),
        (["x.gguf"], 3, "x.gguf: a GGUF file.*; give a file .* that synthesize wrote"),
    ],
)
@pytest.mark.usefixtures("made")
def test_refuses(posthoc_here: Posthoc, arguments: list[str], code: int, line: str) -> None:
    torch.save({"w": torch.rand(3)}, "model.pt")
    Path("x.gguf").write_bytes(b"GGUF" + bytes(99))
    posthoc_here("verify", *arguments).failed(code, line)


def test_beside_its_snapshots(posthoc_here: Posthoc, made: Path, snapshots: Path) -> None:
    shutil.move(made, snapshots)
    assert posthoc_here("verify", snapshots / OUT).code == 0


def test_a_recipe_that_leads_elsewhere(posthoc_here: Posthoc, tmp_path: Path) -> None:
    source = {"file": "../\x1b[2J/passwd", "step": 1, "weight": 1}
    save_file({"w": np.ones(3)}, tmp_path / OUT, {"posthoc": json.dumps({"sources": [source]})})
    run = posthoc_here("verify", OUT)
    run.failed(
        3,
        rf"{OUT}: its recipe doesn't make sense \(.* is a path that leads out of the folder\); .*",
    )
    assert "\x1b" not in run.err


def test_on_a_terminal(made: Path) -> None:
    shown = on_terminal(["verify", OUT, "snapshots", "--full"], made.parent)
    assert "17 of 17 values are as the recipe says" in shown
    assert "/s" in shown  # the bar
    quiet = on_terminal(["verify", OUT, "snapshots", "--full", "-q"], made.parent)
    assert max(map(len, visible(quiet))) <= 80
    assert "\x1b" not in quiet
