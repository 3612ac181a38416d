"""`--raw`, run as a user would: on the files that a LoRA trainer leaves behind."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from posthoc_cli.plotting import density
from posthoc_cli.solver.averages import Decay
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile
from posthoc_cli.storage.header import read_header
from tests.command import Posthoc, on_terminal, visible
from tests.support import read_tensors, write_kohya

STEPS = (150, 300, 450, 600)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """`lora/`: four epochs as kohya's trainers save them, the last without a number."""
    folder = tmp_path / "lora"
    folder.mkdir()
    for epoch, step in enumerate(STEPS, start=1):
        name = "style.safetensors" if step == STEPS[-1] else f"style-{epoch:06d}.safetensors"
        hashes = {"sshs_model_hash": "0a", "sshs_legacy_hash": "b", "modelspec.hash_sha256": "0xc"}
        metadata = {"ss_steps": str(step), "ss_epoch": str(epoch), **hashes}
        write_kohya(folder / name, epoch**0.5, **metadata)
    return folder


def test_without_it_the_user_is_told_of_it(posthoc_here: Posthoc, lora: Path) -> None:
    posthoc_here("solve", "lora", "--sigma-rel", "0.1").failed(
        3,
        r"lora/style-000001\.safetensors: its metadata's ss_steps says 150, but nothing says its "
        r"profile; add --raw if it is a plain checkpoint and no EMA, else .* \(and 3 more .*\)",
    )


def test_inspect(posthoc: Posthoc, posthoc_here: Posthoc, lora: Path, check_json) -> None:
    run = posthoc("inspect", "lora", "--raw")
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert lines[0].split() == ["file", "step", "dtype", "tensors", "parameters", "size", "source"]
    assert re.match(r"style-000001.safetensors +150 +F16 ", lines[1])
    assert lines[-1].startswith("4 raw checkpoints, ")
    assert lines[-1].endswith(": 4 steps, 150 to 600")
    document = posthoc_here("inspect", "lora", "--raw", "--json").json
    check_json("inspect", document)
    assert [each["step"] for each in document["snapshots"]] == list(STEPS)
    for each in document["snapshots"]:
        assert (each["sigma_rel"], each["gamma"], each["source"]) == (0.0, None, "metadata")
    alone = posthoc_here("inspect", "lora/style.safetensors", "--raw", "--json").json
    check_json("inspect", alone)
    assert [each["step"] for each in alone["snapshots"]] == [600]


def test_json_and_csv(posthoc_here: Posthoc, lora: Path, check_json) -> None:
    arguments = ("solve", "lora", "--raw", "--sigma-rel", "0.1,0.2", "--method", "share")
    document = posthoc_here(*arguments, "--json").json
    check_json("solve", document)
    assert (document["method"], document["condition_number"]) == ("share", 1.0)
    targets = [Profile(600, target["gamma"]) for target in document["targets"]]
    solution = solve([Decay(step, 0.0) for step in STEPS], targets, "share")
    for target, weights in zip(document["targets"], solution.weights.tolist(), strict=True):
        assert target["profile_error"] is None
        assert [each["weight"] for each in target["weights"]] == weights
        assert {each["gamma"] for each in target["weights"]} == {None}
    rows = list(csv.DictReader(io.StringIO(posthoc_here(*arguments, "--csv").out)))
    assert {(row["sigma_rel"], row["gamma"]) for row in rows} == {("0.0", "inf")}


def test_tables(posthoc_here: Posthoc, lora: Path) -> None:
    share = ("--method", "share")
    run = posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.2", *share)
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert lines[0].endswith("at step 600, from 4 raw checkpoints (share)")
    assert lines[1].split() == ["step", "weight", "file"]
    assert "sum of weights  1.000000" in run.out
    assert "profile error" not in run.out
    assert "condition" not in run.out
    many = posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.10,0.15,...,0.25", *share)
    assert "largest weight" in many.out.splitlines()[0]
    assert "at step 600, from 4 raw checkpoints (share)\n" in many.out
    blup = posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.2", "-q")
    assert "(blup)" in blup.out.splitlines()[0]
    assert "expected error" in blup.out
    assert "condition number" in blup.out
    told = posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.2", "--diagnose")
    assert re.search(r"^share .*\nblup ", told.out, re.MULTILINE)
    assert "edm2" not in told.out


def test_diagnosis_as_json(posthoc_here: Posthoc, lora: Path, check_json) -> None:
    run = posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.2", "--diagnose", "--json")
    check_json("solve", run.json)
    methods = run.json["diagnosis"]["targets"][0]["methods"]
    assert [each["method"] for each in methods] == ["share", "blup"]
    assert methods[1]["expected_error"] <= methods[0]["expected_error"]


def test_on_a_narrow_terminal(lora: Path, tmp_path: Path) -> None:
    for arguments in (
        ["inspect", "lora", "--raw"],
        ["solve", "lora", "--raw", "--sigma-rel", "0.2", "--diagnose"],
        ["synthesize", "lora", "--raw", "--sigma-rel", "0.2", "-o", "x.safetensors", "-q"],
        ["synthesize", "lora", "--raw", "--gamma", "2", "--method", "blup", "-o", "y/", "-q"],
    ):
        shown = on_terminal(arguments, tmp_path, NO_COLOR="1")
        assert max(map(len, visible(shown))) <= 80
        assert "inf" not in shown
        assert "nan" not in shown
        assert "unknown" not in shown


def test_an_ema_that_is_but_one_checkpoint_is_said_to_be(posthoc_here: Posthoc, lora: Path) -> None:
    run = posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.02,0.2", "--method", "share")
    assert run.err == (
        "posthoc: sigma_rel 0.02: narrower than the checkpoints are apart; up to 100% of it is "
        "'style.safetensors' alone\n"
    )
    assert posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.02", "-q").err == ""


@pytest.mark.parametrize("method", ["share", "blup"])
def test_synthesize_and_its_recipe(
    posthoc_here: Posthoc, lora: Path, check_json, tmp_path: Path, method: str
) -> None:
    run = posthoc_here(
        *("synthesize", "lora", "--raw", "--sigma-rel", "0.2", "--method", method),
        *("--step", "500", "-o", "x.safetensors", "--json", "-q"),
    )
    check_json("synthesize", run.json)
    target = run.json["targets"][0]
    assert [each["step"] for each in target["weights"]] == [150, 300, 450]
    made = read_tensors(tmp_path / "x.safetensors")
    value = sum(w["weight"] * k**0.5 for k, w in enumerate(target["weights"], start=1))
    factor = made["lora_te_q.lora_down.weight"]
    assert factor.dtype == np.float16
    assert (abs(factor.astype(float) / value - 1) < 2**-10).all()
    assert made["lora_te_q.alpha"] == np.float16(8)

    metadata = read_header(tmp_path / "x.safetensors").metadata
    # Provenance stays; hashes of other values than these do not.
    assert (metadata["ss_steps"], metadata["ss_epoch"]) == ("450", "3")
    assert not [key for key in metadata if "hash" in key]
    recipe = json.loads(metadata["posthoc"], parse_constant=lambda name: pytest.fail(name))
    assert {each["gamma"] for each in recipe["sources"]} == {None}
    told = posthoc_here("inspect", "x.safetensors", "--json")
    check_json("inspect", told.json)
    assert told.json["recipe"] == recipe
    plain = posthoc_here("inspect", "x.safetensors")
    assert plain.code == 0
    assert f"{method} (posthoc " in plain.out
    assert re.search(r"^ *450 +\+0\.", plain.out, re.MULTILINE)
    # Beside its sources it is left out.
    (tmp_path / "x.safetensors").rename(lora / "style-000009.safetensors")
    skipped = posthoc_here("inspect", "lora", "--raw", "--json").json["skipped"]
    assert [each["file"] for each in skipped] == ["style-000009.safetensors"]


def test_plot(posthoc_here: Posthoc, lora: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("plot", "lora", "--raw", "--sigma-rel", "0.1,0.2", "-o", "x.svg")
    run = posthoc_here(*arguments, "-q")
    assert (run.code, run.err) == (0, "")
    text = (tmp_path / "x.svg").read_text()
    for word in ("share of the EMA before t", "wanted", "share", "blup", "weights (blup)"):
        assert word in text
    assert "edm2" not in text
    posthoc_here(*arguments, "--force", "--method", "edm2").failed(
        2, "--method edm2: raw checkpoints have no profile; use share or blup"
    )


@pytest.mark.parametrize("target", [Profile(100, 6.94), Profile(100, -0.5), Profile(60, 2.0)])
def test_the_share_before_is_the_density_summed_up(target: Profile) -> None:
    at = np.array([10.0, 50.0, 80.0, 100.0])
    u = (np.arange(1_000_000) + 0.5) / 10_000
    summed = np.cumsum(density(target, u)) / 10_000
    found = target.share(at)
    assert found == pytest.approx(np.interp(at, u, summed), abs=2e-3)
    assert Decay(80, 0.0).share(at).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (
            ["--raw", "--method", "algorithm3"],
            2,
            "--method algorithm3: raw checkpoints have no profile; use share or blup",
        ),
        (["--method", "share"], 2, "--method share: is for raw checkpoints only; add --raw .*"),
        (["--raw", "--profiles", "0.05"], 2, "--profiles: not used, as --raw .*; leave it out"),
        (
            ["--raw", "--pattern", "style-{step}-{sigma_rel}*"],
            2,
            r"--pattern: a field for a profile, {sigma_rel}, in .*; with --raw the only field .*",
        ),
        (["--raw", "--step", "900"], 2, "--step: 900 is after the last snapshot's; .* 150 to 600"),
    ],
)
def test_what_doesnt_go_together(
    posthoc_here: Posthoc, lora: Path, arguments: list[str], code: int, line: str
) -> None:
    posthoc_here("solve", "lora", "--sigma-rel", "0.1", *arguments).failed(code, line)


def test_two_of_one_step_are_a_problem(posthoc_here: Posthoc, lora: Path) -> None:
    write_kohya(lora / "style-step00000600.safetensors", 3, ss_steps="600", ss_epoch="4")
    posthoc_here("solve", "lora", "--raw", "--sigma-rel", "0.1").failed(
        3,
        r"lora/style\.safetensors: has the step \(600\) of 'style-step00000600\.safetensors'; "
        r"leave out one of the two, as with --exclude style\.safetensors, or .*",
    )
    run = posthoc_here(
        "solve", "lora", "--raw", "--sigma-rel", "0.2", "--only", "style-*", "--json"
    )
    assert len(run.json["targets"][0]["weights"]) == 4


def test_folders_and_patterns(posthoc_here: Posthoc, lora: Path, tmp_path: Path) -> None:
    for step in (500, 1000):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        write_kohya(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors", step)
    document = posthoc_here("inspect", "run", "--raw", "--json").json
    assert [(each["step"], each["source"]) for each in document["snapshots"]] == [
        (500, "name"),
        (1000, "name"),
    ]
    run = posthoc_here(
        *("inspect", "lora", "--raw", "--pattern", "style-{step}.safetensors", "--json"),
        *("--only", "style-*"),
    )
    found = [(each["step"], each["source"]) for each in run.json["snapshots"]]
    assert found == [(1, "pattern"), (2, "pattern"), (3, "pattern")]


def test_emas_that_say_so_stay_emas(posthoc_here: Posthoc, snapshots: Path) -> None:
    run = posthoc_here("inspect", "snapshots", "--raw", "--json")
    assert run.code == 0
    assert {each["sigma_rel"] for each in run.json["snapshots"]} == {0.05, 0.1}
    assert run.json == posthoc_here("inspect", "snapshots", "--json").json
