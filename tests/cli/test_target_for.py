"""`--target-for`: one output whose tensors have targets of their own, asked for as a user would."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import Posthoc

RULES = ("--sigma-rel-for", "body.*=0.06", "--target-for", "*.bias=gamma:6.94")


def test_from_solve_to_verify(
    posthoc_here: Posthoc, snapshots: Path, tmp_path: Path, check_json
) -> None:
    solving = ["solve", "snapshots", "--sigma-rel", "0.07", *RULES]
    solved = posthoc_here(*solving, "--diagnose", "--json").json
    check_json("solve", solved)
    first, second = solved["groups"]
    assert [(each["tensors"], each["count"]) for each in (first, second)] == [
        (["body.*"], 1),
        (["*.bias"], 1),
    ]
    assert second["gamma"] == 6.94
    assert first["relative_error"] >= 0
    diagnosed = solved["diagnosis"]["groups"]
    assert [each["tensors"] for each in diagnosed] == [["body.*"], ["*.bias"]]
    assert diagnosed[1]["methods"][0]["sum_of_weights"] == pytest.approx(1)

    for output in ("one.safetensors", "emas/"):
        targets = ["--sigma-rel", "0.07"] if output == "one.safetensors" else ["--gamma", "5,9"]
        written = posthoc_here("synthesize", "snapshots", *targets, *RULES, "-o", output, "--json")
        check_json("synthesize", written.json)
        assert written.json["groups"][1]["weights"] == second["weights"]
        for target in written.json["targets"]:
            made = load_file(tmp_path / target["output"])
            for name, of in (("body.weight", first), ("body.bias", second)):
                value = sum(each["weight"] * each["step"] / 1000 for each in of["weights"])
                np.testing.assert_allclose(made[name], np.full_like(made[name], value), rtol=1e-3)
            run = posthoc_here("verify", target["output"], "snapshots", "--full")
            assert (run.code, run.err) == (0, "")

    document = posthoc_here("inspect", "one.safetensors", "--json").json
    check_json("inspect", document)
    recipe = document["recipe"]
    assert [each["tensors"] for each in recipe["groups"]] == [["body.*"], ["*.bias"]]
    assert recipe["groups"][1]["weights"] == [each["weight"] for each in second["weights"]]
    assert recipe["groups"][1]["relative_error"] == pytest.approx(
        second["relative_error"], rel=1e-3
    )
    shown = posthoc_here("inspect", "one.safetensors").out
    assert shown.count("of how far the EMA is from the network; edm2's: ") == 3
    assert "\n*.bias (1 tensor): gamma 6.94 (sigma_rel 0.09997) at step 4000\n" in shown
    assert shown.count("sum of weights  1.000000") == 3


def test_tables_and_csv(posthoc_here: Posthoc, snapshots: Path) -> None:
    solving = ["solve", "snapshots", "--sigma-rel", "0.07"]
    plain = posthoc_here(*solving, "--csv").out.splitlines()
    rows = list(csv.DictReader(io.StringIO(posthoc_here(*solving, *RULES, "--csv").out)))
    assert [line + "," for line in plain[1:]] == [
        ",".join(row.values()) for row in rows if not row["tensors"]
    ]
    assert [row["tensors"] for row in rows[8:]] == ["body.*"] * 8 + ["*.bias"] * 8
    shown = posthoc_here(*solving, *RULES).out
    assert "\n*.bias (1 tensor): gamma 6.94 (sigma_rel 0.09997) at step 4000, from 8" in shown
    lines = posthoc_here(*solving, "--gamma", "5,9", *RULES).out.splitlines()
    assert [line.rpartition("  ")[2] for line in lines[4:6]] == ["body.*", "*.bias"]
    shown = posthoc_here("synthesize", *solving[1:], *RULES, "-o", "x.safetensors").out
    assert "  *.bias (1 tensor): gamma 6.94 (sigma_rel 0.09997)" in shown


@pytest.mark.parametrize(
    ("rule", "more", "line"),
    [
        ("nope*=0.1", (), r"--target-for 'nope\*': matches no tensor; .*'head.count'"),
        ("bias=0.1", (), r"--target-for bias: matches no tensor; write '\*bias\*': .*"),
        ("*.bias=window:9999", (), r"--target-for '\*.bias': 9999 is longer than the 4000 .*"),
        ("head.*=0.1", (), r"--target-for 'head.\*': fits only .* such as 'head.count', I64; .*"),
        ("body.*=0.5", (), r"--target-for 'body.\*': 0.5 is out of bounds; .*"),
        ("body.*=wide", (), r"--target-for 'body.\*': 'wide' is no number; .*"),
        ("body.*=windo:5", (), r"--target-for 'body.\*': 'windo' is no kind of target; .*"),
        ("body.*", (), r"--target-for: 'body.\*' has no target; .*"),
        ("body.*=", (), r"--target-for: 'body.\*=' has no target; .*"),
        ("=0.1", (), "--target-for: '=0.1' has no glob; .*"),
        ("*.bias=0.1", ("--copy", "body.*"), r"--target-for '\*.bias': --copy or --drop has .*"),
        ("*.bias=0.1", ("--drop", "*.bias"), r"--target-for '\*.bias': --copy or --drop has .*"),
    ],
)
def test_what_is_wrong_is_one_line(
    rule: str, more: tuple[str, ...], line: str, posthoc_here: Posthoc, snapshots: Path
) -> None:
    arguments = ["--sigma-rel", "0.07", "--target-for", rule, *more, "-o", "x.safetensors"]
    posthoc_here("synthesize", "snapshots", *arguments).failed(2, line)
    assert not (snapshots.parent / "x.safetensors").exists()


def test_copied_tensors_are_no_part_of_a_group(posthoc_here: Posthoc, snapshots: Path) -> None:
    arguments = ["--sigma-rel", "0.07", "--target-for", "*=0.1", "--copy", "*.bias"]
    run = posthoc_here("synthesize", "snapshots", *arguments, "-o", "x.safetensors", "--json")
    assert [group["count"] for group in run.json["groups"]] == [1]
    assert load_file(snapshots.parent / "x.safetensors")["body.bias"][0] == 4
    assert posthoc_here("verify", "x.safetensors", "snapshots").code == 0


def test_an_error_that_a_group_alone_has_is_told(posthoc_here: Posthoc, snapshots: Path) -> None:
    arguments = ["--sigma-rel", "0.07", "--target-for", "*.bias=0.01", "-o", "x.safetensors"]
    run = posthoc_here("synthesize", "snapshots", *arguments)
    assert run.err.startswith("posthoc: sigma_rel 0.01: an error of up to 1")
    run = posthoc_here("synthesize", "snapshots", *arguments, "--force", "--max-error", "0.05")
    assert (run.code, run.out) == (3, "")
    assert "sigma_rel 0.01: its expected error is" in run.err


def test_a_rule_that_later_ones_leave_nothing_is_gone(
    posthoc_here: Posthoc, snapshots: Path
) -> None:
    rules = [f"--target-for={rule}" for rule in ("*.bias=0.01", "*.weight=0.08", "body.b*=0.08")]
    run = posthoc_here("synthesize", "snapshots", "--gamma", "9", *rules, "-o", "x.safetensors")
    assert (run.code, run.err) == (0, "")
    recipe = posthoc_here("inspect", "x.safetensors", "--json").json["recipe"]
    assert [group["tensors"] for group in recipe["groups"]] == [["*.weight", "body.b*"]]
