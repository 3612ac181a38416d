"""Outputs that are folders, by the command: `--layout folder`, then inspect and verify."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from posthoc_cli import open_snapshots
from tests.command import Posthoc, write_snapshot

FOLDER = ("--layout", "folder")
SYNTHESIZE = ("synthesize", "run", "-q", "--raw", "--sigma-rel", "0.2", *FOLDER, "-o")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """`run/checkpoint-1` to 3, as a trainer saves them."""
    for step in (1, 2, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        write_snapshot(folder / "model.safetensors", step)
        (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
        (folder / "vocab.txt").write_text(f"of step {step}", encoding="utf-8")
        (folder / "optimizer.pt").touch()
    return tmp_path / "run"


def test_a_folder(posthoc_here: Posthoc, run: Path, check_json) -> None:
    done = posthoc_here(*SYNTHESIZE, "out", "--json")
    assert (done.code, done.err) == (0, "")
    check_json("synthesize", done.json)
    [target] = done.json["targets"]
    out = run.with_name("out")
    assert sorted(os.listdir(out)) == [
        "config.json",
        "model.safetensors",
        "posthoc.json",
        "vocab.txt",
    ]
    assert (out / "vocab.txt").read_text(encoding="utf-8") == "of step 3"
    assert target["output"] == "out"
    assert target["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    contents = {
        "weights": "model.safetensors",
        "from": "checkpoint-3",
        "copied": [
            {"file": "config.json", "bytes": 22, "from": "checkpoint-3"},
            {"file": "vocab.txt", "bytes": 9, "from": "checkpoint-3"},
        ],
        "left_out": [{"file": "optimizer.pt", "reason": "training state"}],
        "missing": [],
    }
    assert target["folder"] == contents
    with safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"  # transformers loads nothing without

    plain = posthoc_here(*SYNTHESIZE[:-3], "-o", "plain.safetensors")
    assert plain.code == 0
    ours, theirs = (
        load_file(out / "model.safetensors"),
        load_file(run.with_name("plain.safetensors")),
    )
    assert {name: each.tobytes() for name, each in ours.items()} == {
        name: each.tobytes() for name, each in theirs.items()
    }

    shown = posthoc_here("inspect", "out")
    assert shown.code == 0
    assert "checkpoint-3" in shown.out
    assert "copied    config.json, vocab.txt: 31 B from checkpoint-3" in shown.out
    assert "left out  optimizer.pt: training state" in shown.out
    shown = posthoc_here("inspect", "out", "--json")
    check_json("inspect", shown.json)
    assert shown.json["contents"] == contents
    assert len(shown.json["recipe"]["sources"]) == 3


def test_verify(posthoc_here: Posthoc, run: Path) -> None:
    assert posthoc_here(*SYNTHESIZE, "out").code == 0
    out = run.with_name("out")
    done = posthoc_here("verify", "out", "run")
    assert (done.code, done.err) == (0, "")
    assert "all 3 sources are unchanged" in done.out
    (out / "vocab.txt").write_text("changed", encoding="utf-8")
    posthoc_here("verify", "out", "run").failed(
        3, r"out/vocab.txt: has 7 bytes, not the 9 that were copied; .*"
    )
    (out / "vocab.txt").unlink()
    posthoc_here("verify", "out", "run").failed(3, r"out/vocab.txt: is not there; .*")
    (out / "posthoc.json").unlink()  # then it is a folder with a network, and its recipe
    assert posthoc_here("verify", "out", "run").code == 0
    out.rename(run / "out")
    assert posthoc_here("verify", "run/out").code == 0


def test_what_is_there(posthoc_here: Posthoc, run: Path) -> None:
    out = run.with_name("out")
    assert posthoc_here(*SYNTHESIZE, "out").code == 0
    before = (out / "model.safetensors").stat().st_ino
    posthoc_here(*SYNTHESIZE, "out").failed(2, r"out: exists already; use --force .*")
    kept = posthoc_here(*SYNTHESIZE, "out", "--skip-existing", "--json")
    assert (kept.code, kept.json["targets"][0]["skipped"]) == (0, True)
    assert (out / "model.safetensors").stat().st_ino == before
    (out / "notes").touch()
    posthoc_here(*SYNTHESIZE, "out", "--force").failed(
        2, r"out: 'notes', which .* would be lost .*"
    )
    (out / "notes").unlink()
    assert posthoc_here(*SYNTHESIZE, "out", "--force", "--max-shard-size", "50B").code == 0
    assert (out / "model.safetensors.index.json").exists()
    assert not (out / "model.safetensors").exists()
    for option in ("--force", "--skip-existing"):
        posthoc_here(*SYNTHESIZE, "run", option).failed(
            2, "run: a folder that posthoc didn't make .*"
        )
    posthoc_here(*SYNTHESIZE, "x.safetensors").failed(
        2, "-o: 'x.safetensors' ends as a file does, and --layout folder writes a folder; .*"
    )
    for name in (".", "..", "", "/"):
        posthoc_here(*SYNTHESIZE, name, "--force").failed(
            2, "-o: '.*' is no name for a folder to be made; give one, such as '.*ema'"
        )
    run.with_name("link").symlink_to("out")
    posthoc_here(*SYNTHESIZE, "link", "--force").failed(
        2, "link: a link that posthoc didn't make .*"
    )
    assert posthoc_here(*SYNTHESIZE, "link", "--skip-existing").code == 0
    run.with_name("link").unlink()
    posthoc_here(*SYNTHESIZE, "none/out").failed(
        2, "-o: there is no folder 'none'; create it first"
    )
    posthoc_here(*SYNTHESIZE, "x", "--layout", "tar").failed(
        2, "--layout: 'tar' is not known; choose file or folder"
    )
    assert sorted(os.listdir(run.parent)) == ["out", "run"]


def test_several_targets_in_the_folder_of_the_run(posthoc_here: Posthoc, run: Path) -> None:
    """They are outputs, however deep they lie, and no snapshots."""
    words = [*SYNTHESIZE, "run/emas", "--sigma-rel", "0.15"]
    assert posthoc_here(*words).code == 0
    names = ["run-step3-sigma0.15", "run-step3-sigma0.2"]
    assert sorted(os.listdir(run / "emas")) == names
    assert posthoc_here(*SYNTHESIZE, "run/ema-{sigma_rel}").code == 0
    assert posthoc_here(*SYNTHESIZE, "run/checkpoint-3/ema").code == 0
    document = posthoc_here("inspect", "run", "--raw", "--json").json
    assert [each["file"] for each in document["snapshots"]] == [
        f"checkpoint-{step}" for step in (1, 2, 3)
    ]
    assert [each["file"] for each in document["skipped"]] == [
        "checkpoint-3/ema",
        "ema-0.2",
        *(f"emas/{name}" for name in names),
    ]
    assert all("made by posthoc" in each["reason"] for each in document["skipped"])
    assert posthoc_here(*SYNTHESIZE, "again").code == 0
    assert not (run.with_name("again") / "ema").exists()
    words[-3] = "run/emas/run-step3-sigma0.2"
    posthoc_here(*words).failed(2, "-o: '.*' is an output itself; give another folder")


def test_bare_files_have_no_config(posthoc_here: Posthoc, snapshots: Path) -> None:
    words = ("synthesize", "snapshots", "--sigma-rel", "0.07", *FOLDER, "-o")
    done = posthoc_here(*words, "out")
    assert done.code == 0
    warning = (
        "posthoc: warning: out: no config.json lay beside the snapshots; "
        "add it, or load the weights alone\n"
    )
    assert warning in done.err
    assert "copied    nothing" in done.out
    assert sorted(os.listdir(snapshots.with_name("out"))) == ["model.safetensors", "posthoc.json"]
    config = {"_class_name": "UNet2DModel"}
    (snapshots / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = posthoc_here(*words, "out", "--force")
    assert done.code == 0
    assert warning not in done.err
    assert "diffusion_pytorch_model.safetensors" in os.listdir(snapshots.with_name("out"))


def test_the_library(run: Path) -> None:
    counts: list[tuple[int, int]] = []
    solution = open_snapshots(run, raw=True).solve(sigma_rel=[0.15, 0.2])
    saved = solution.save(
        run.with_name("{sigma_rel}"), layout="folder", progress=lambda *each: counts.append(each)
    )
    assert saved == [run.with_name("0.15"), run.with_name("0.2")]
    manifest = saved.outputs[0].manifest
    assert manifest is not None
    assert manifest["weights"] == "model.safetensors"
    assert sum(count for count, _ in counts) == counts[0][1]
