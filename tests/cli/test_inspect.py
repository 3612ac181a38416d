"""`posthoc inspect`, run as a user would."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.command import Posthoc, on_terminal, visible, write_snapshot


def test_a_folder(posthoc: Posthoc, posthoc_here: Posthoc, snapshots: Path, check_json) -> None:
    write_snapshot(snapshots / "made.safetensors", 1, posthoc='{"sources": []}')
    run = posthoc("inspect", "snapshots", "--json")
    assert (run.code, run.err) == (0, "")
    check_json("inspect", run.json)
    assert run.json["folder"] == "snapshots"
    assert [entry["file"] for entry in run.json["skipped"]] == ["made.safetensors"]
    assert [entry["step"] for entry in run.json["snapshots"]] == [
        step for step in (1000, 2000, 3000, 4000) for _ in range(2)
    ]
    path = snapshots / "ema-1000-0.05.safetensors"
    assert run.json["snapshots"][0] == {
        "file": path.name,
        "step": 1000,
        "sigma_rel": 0.05,
        "gamma": (gamma := pytest.approx(16.97219860230345, rel=1e-12)),
        "profile": {"kind": "power", "step": 1000, "gamma": gamma},
        "dtypes": {"F16": 1, "F32": 1, "I64": 1},
        "tensors": 3,
        "parameters": 17,
        "bytes": path.stat().st_size,
        "source": "metadata",
        "encoding": None,
        "chain": [],
    }

    plain = posthoc("inspect", "snapshots")
    lines = plain.out.splitlines()
    assert (
        " ".join(lines[0].split())
        == "file step sigma_rel gamma dtype tensors parameters size source"
    )
    assert lines[1].split()[:5] == [path.name, "1000", "0.0500", "16.97", "F16+F32+I64"]
    assert len({len(line) for line in lines[1:9]}) == 1
    assert "8 snapshots" in plain.out
    assert "4 steps, 1000 to 4000; sigma_rel 0.0500, 0.1000" in plain.out
    assert "made.safetensors: made by posthoc" in plain.out
    assert "\x1b" not in plain.out
    assert posthoc_here("inspect", snapshots, "--only", "*0.05*").out.count("ema-") == 4


def test_problems_are_told_and_the_json_is_whole(
    posthoc_here: Posthoc, snapshots: Path, check_json
) -> None:
    (snapshots / "broken.safetensors").write_bytes(b"\xff" * 64)
    hostile = "[red]\x1b[2J\x1b]0;x\x07.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, snapshots / hostile)
    run = posthoc_here("inspect", "snapshots", "--json")
    assert run.code == 3
    assert run.err == (
        "posthoc: snapshots: 2 problems found; the list of problems says what to do about each\n"
    )
    check_json("inspect", run.json)
    assert {entry["file"] for entry in run.json["problems"]} == {"broken.safetensors", hostile}
    assert len(run.json["snapshots"]) == 8
    for plain in (
        posthoc_here("inspect", "snapshots"),
        posthoc_here("inspect", "snapshots", "--only", "[[]red*"),
    ):
        assert plain.code == 3
        assert "[red]\\x1b[2J\\x1b]0;x\\x07.safetensors: neither its name" in plain.out
        assert "\x1b" not in plain.out + plain.err
    posthoc_here("solve", "snapshots", "--sigma-rel", "0.07").failed(
        3, r"snapshots.\[red\]\\x1b.*: neither .*; .* \(and 1 more problem: .*\)"
    )


def test_warnings(posthoc_here: Posthoc, snapshots: Path) -> None:
    for step in range(10, 17):
        write_snapshot(snapshots / f"n_{step}_3.safetensors", 1, step=str(step), gamma="4")
    run = posthoc_here("inspect", "snapshots")
    lines = run.err.splitlines()
    assert run.code == 0
    assert len(lines) == 6
    assert all(line.startswith("posthoc: warning: n_1") for line in lines[:5])
    assert lines[5] == "posthoc: warning: 2 more warnings such as these"
    assert posthoc_here("inspect", "snapshots", "-q").err == ""


def test_a_file_of_posthoc(posthoc_here: Posthoc, snapshots: Path, check_json) -> None:
    made = posthoc_here(
        "synthesize", "snapshots", "--sigma-rel", "0.07", "-o", "x.safetensors", "--json"
    )
    target = made.json["targets"][0]
    run = posthoc_here("inspect", "x.safetensors", "--json")
    assert (run.code, run.err) == (0, "")
    check_json("inspect", run.json)
    recipe = run.json["recipe"]
    sizes = {path.name: path.stat().st_size for path in snapshots.iterdir()}
    for source, weight in zip(recipe["sources"], target["weights"], strict=True):
        assert {**source, "bytes": 0, "fingerprint": ""} == {
            **weight,
            "bytes": 0,
            "fingerprint": "",
        }
        assert source["bytes"] == sizes[source["file"]]
    assert len({source["fingerprint"] for source in recipe["sources"]}) == len(sizes)
    known = {key: target[key] for key in ("step", "sigma_rel", "gamma")}
    assert recipe["target"] == {**known, "kind": "power", "text": "sigma-rel:0.07"}
    assert [entry["file"] for entry in run.json["skipped"]] == ["x.safetensors"]

    plain = posthoc_here("inspect", "x.safetensors")
    assert "sigma_rel 0.07 (gamma 11.24) at step 4000" in plain.out
    assert "blup (posthoc " in plain.out
    assert re.search(r"^expected error +2\.\d\d% of .*; edm2's: 5\.\d\d%$", plain.out, re.MULTILINE)
    for source in recipe["sources"]:
        shown = abs(source["weight"]) > 1e-6
        assert (f"  {source['file']}" in plain.out) == shown
        if shown:
            assert f"{source['weight']:+.6f}" in plain.out
    assert plain.out.endswith("sum of weights  1.000000\n")
    everything = posthoc_here("inspect", "x.safetensors", "--all").out
    assert everything.count("ema-") == 8


def test_a_snapshot_file(posthoc_here: Posthoc, snapshots: Path, check_json) -> None:
    path = snapshots / "ema-[1]-1000.safetensors"
    (snapshots / "ema-1000-0.05.safetensors").rename(path)
    run = posthoc_here("inspect", path, "--json")
    check_json("inspect", run.json)
    assert run.json["recipe"] is None
    assert [entry["file"] for entry in run.json["snapshots"]] == [path.name]
    assert "1 snapshot," in posthoc_here("inspect", path).out


@pytest.mark.parametrize(
    "recipe",
    ['{"sources": 3}', '{"sources": [], "target": {}}', '{"sources": [{"file": "x"}]}', "[1]"],
)
def test_a_file_with_a_broken_recipe(posthoc_here: Posthoc, tmp_path: Path, recipe: str) -> None:
    write_snapshot(tmp_path / "x.safetensors", 1, posthoc=recipe)
    run = posthoc_here("inspect", "x.safetensors")
    assert run.code == 3
    assert run.err.count("\n") == 1


def test_a_recipe_with_what_is_no_number(posthoc_here: Posthoc, tmp_path: Path) -> None:
    recipe = (
        '{"version": "1", "method": "\\u001b[31m", "target": {"step": 1, "sigma_rel": NaN, '
        '"gamma": 1}, "sources": [{"file": "a", "step": 1, "sigma_rel": 1, "gamma": 1, '
        '"weight": NaN}, {"file": "b", "step": 1, "sigma_rel": 1, "gamma": 1, "weight": 1e999}]}'
    )
    write_snapshot(tmp_path / "x.safetensors", 1, posthoc=recipe)
    run = posthoc_here("inspect", "x.safetensors", "--json")
    assert run.code == 0
    assert run.json["recipe"]["target"]["sigma_rel"] is None
    plain = posthoc_here("inspect", "x.safetensors")
    assert (plain.code, plain.err) == (0, "")
    assert "\x1b" not in plain.out


def test_what_is_not_there(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    posthoc_here("inspect", "nowhere").failed(2, "nowhere: there is no such folder; .*")
    posthoc_here("inspect", "empty").failed(3, r"empty: holds no \.safetensors files, nor .*")


def test_on_a_narrow_terminal(snapshots: Path) -> None:
    shown = on_terminal(["inspect", "snapshots"], snapshots.parent, columns=80, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)  # no colours
    lines = visible(shown)
    assert max(map(len, lines)) <= 80
    assert any("ema-1000-0.05.safetensors" in line and "16.97" in line for line in lines)
    assert any(line.startswith("each: 3 tensors") for line in lines)
    long = "a-long-name-of-a-long-run-of-last-night-with-a-large-network"
    for number, path in enumerate(sorted(snapshots.iterdir())):
        path.rename(snapshots / f"{long}-{number:05d}-{path.name}")
    lines = visible(on_terminal(["inspect", "snapshots"], snapshots.parent, columns=60))
    assert max(len(line) for line in lines if "…" in line) <= 60
    assert sum("…" in line and ".safetensors" in line for line in lines) == 8
