"""`posthoc solve`, run as a user would."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import pytest

from posthoc_cli.cli.drawing import Bars
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile, sigma_rel_to_gamma
from tests.command import Posthoc, on_terminal, visible, write_snapshot


def test_json_and_csv_say_what_the_library_does(
    posthoc: Posthoc, posthoc_here: Posthoc, snapshots: Path, check_json
) -> None:
    arguments = ["solve", "snapshots", "--sigma-rel", "0.07,0.2", "--gamma", "3", "-q"]
    arguments += ["--method", "edm2"]
    run = posthoc(*arguments, "--json")
    assert (run.code, run.err) == (0, "")
    check_json("solve", run.json)
    document = run.json
    assert (document["folder"], document["method"], document["device"]) == (
        "snapshots",
        "edm2",
        "cpu",
    )
    assert [target["sigma_rel"] for target in document["targets"]][:2] == [0.07, 0.2]
    assert document["targets"][2]["gamma"] == 3.0
    sources = [
        Profile(step, sigma_rel_to_gamma(width))
        for step in (1000, 2000, 3000, 4000)
        for width in (0.05, 0.10)
    ]
    wanted = [Profile(4000, target["gamma"]) for target in document["targets"]]
    solution = solve(sources, wanted)
    assert document["condition_number"] == solution.condition_number
    for at, target in enumerate(document["targets"]):
        weights = [entry["weight"] for entry in target["weights"]]
        assert weights == solution.weights[at].tolist()  # to the last digit
        assert math.fsum(weights) == pytest.approx(target["sum_of_weights"])
        assert target["noise_gain"] == solution.noise_gain[at]
        assert target["profile_error"] == solution.profile_error[at]

    rows = list(csv.DictReader(io.StringIO(posthoc_here(*arguments, "--csv").out)))
    assert ",".join(rows[0]) == (
        "target_sigma_rel,target_gamma,target_step,file,step,sigma_rel,gamma,weight,target"
    )
    assert [
        (row["file"], int(row["step"]), float(row["sigma_rel"]), float(row["weight"]))
        for row in rows
    ] == [
        (entry["file"], entry["step"], entry["sigma_rel"], entry["weight"])
        for target in document["targets"]
        for entry in target["weights"]
    ]
    assert {(row["target_sigma_rel"], row["target_step"]) for row in rows} >= {("0.07", "4000")}


def test_step_and_method(posthoc_here: Posthoc, snapshots: Path, check_json) -> None:
    run = posthoc_here(
        *("solve", "snapshots", "--sigma-rel", "0.07", "--step", "3500"),
        *("--method", "algorithm3", "--json"),
    )
    check_json("solve", run.json)
    (target,) = run.json["targets"]
    assert run.json["method"] == "algorithm3"
    assert target["step"] == 3500
    assert max(entry["step"] for entry in target["weights"]) == 3000
    assert abs(target["sum_of_weights"] - 1) > 1e-6


def test_the_table(posthoc: Posthoc, posthoc_here: Posthoc, snapshots: Path) -> None:
    run = posthoc_here(*("solve", "snapshots", "--sigma-rel", "0.07", "--all", "--method", "edm2"))
    assert run.code == 0
    assert "\x1b" not in run.out
    title, heading, *rows = run.out.splitlines()
    assert title == "sigma_rel 0.07 (gamma 11.24) at step 4000, from 8 snapshots (edm2)"
    assert heading.split() == ["step", "sigma_rel", "gamma", "weight", "file"]
    axis = {row.index("│") for row in rows[:8]}
    assert len(axis) == 1
    for row in rows[:8]:
        weight = float(row.split()[3])
        left, right = row.split("│")
        assert ("█" in left or "▐" in left) <= (weight < 0)
        assert ("█" in right or "▌" in right) <= (weight > 0)
    assert "█" in rows[5].split("│")[0]  # step 3000, sigma_rel 0.10: -0.0439
    assert re.search(r"^sum of weights +1\.000000$", run.out, re.MULTILINE)
    assert re.search(r"^noise gain +0\.7415 ", run.out, re.MULTILINE)
    assert re.search(r"^profile error +3\.61% ", run.out, re.MULTILINE)
    assert re.search(r"^condition number +27\.3$", run.out, re.MULTILINE)
    assert "expected error" not in run.out
    best = posthoc_here("solve", "snapshots", "--sigma-rel", "0.07").out
    assert re.search(r"^expected error +2\.\d\d% +of .*; edm2's: 5\.\d\d%$", best, re.MULTILINE)
    few = posthoc(
        *("solve", "snapshots", "--sigma-rel", "0.07", "--method", "edm2"),
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert "and 2 more below a millionth of the largest, -4" in few.out
    assert few.out.isascii()
    assert "##|" in few.out


def test_many_targets_and_snapshots(posthoc_here: Posthoc, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for step in range(100, 10001, 100):
        for gamma in ("16.97", "6.94"):
            write_snapshot(folder / f"n_{step}_{gamma}.safetensors", 1)
    run = posthoc_here("solve", "many", "--sigma-rel", "0.05,0.06,...,0.10")
    lines = run.out.splitlines()
    assert lines[0].split()[:2] == ["sigma_rel", "gamma"]
    assert [line.split()[0] for line in lines[1:7]] == [f"0.{n:02d}00" for n in range(5, 11)]
    assert "from 200 snapshots (blup)" in run.out
    table = posthoc_here("solve", "many", "--sigma-rel", "0.03").out
    assert "more below a thousandth of the largest" in table
    shown = table.count(".safetensors")
    assert 20 < shown < 150
    assert f"and {200 - shown} more" in table
    everything = posthoc_here("solve", "many", "--sigma-rel", "0.05,0.06,...,0.10", "--all").out
    assert everything.count(".safetensors") == 6 * 200


def test_on_a_terminal(snapshots: Path) -> None:
    arguments = ["solve", "snapshots", "--sigma-rel", "0.07", "--method", "edm2"]
    shown = on_terminal(arguments, snapshots.parent, NO_COLOR="1")
    assert max(map(len, visible(shown))) <= 80
    assert "█" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)  # no colours
    coloured = on_terminal(arguments, snapshots.parent)
    assert "\x1b[36m+0.599" in coloured
    assert "\x1b[31m-0.043" in coloured
    narrow = visible(on_terminal(arguments, snapshots.parent, columns=40))
    assert any("+0.599" in line for line in narrow)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ([], 2, "--sigma-rel: no target is given; .*"),
        (["--sigma-rel", "0.3"], 2, "--sigma-rel: 0.3 is out of bounds; .*0.2887"),
        (["--gamma", "-1"], 2, "--gamma: -1 is out of bounds; .*"),
        (
            ["--gamma", "-0.5", "--method", "edm2"],
            2,
            "--method edm2: has no weights for gamma -0.5; use --method blup",
        ),
        (["--gamma", "3", "--diagnose", "--csv"], 2, "--csv: doesn't go with --diagnose; .*"),
        (["--gamma", "3", "--json", "--csv"], 2, "--csv: doesn't go with --json; .*"),
        (["--gamma", "3", "--method", "x"], 2, "--method: 'x' is not known; choose edm2.*"),
        (["--gamma", "3", "--step", "4001"], 2, "--step: 4001 is after the last .*"),
        (["--gamma", "3", "--step", "0"], 2, "--step: 0 is before the first .*"),
        (["--gamma", "3", "--only", "*.pt"], 2, r"--only: '\*.pt' fits none .*"),
        (["--gamma", "3", "--profiles", "0.05,x"], 2, "--profiles: 'x' in '0.05,x' is not .*"),
    ],
)
def test_refuses(
    posthoc_here: Posthoc, snapshots: Path, arguments: list[str], code: int, line: str
) -> None:
    posthoc_here("solve", "snapshots", *arguments).failed(code, line)


def test_cuda_without_a_gpu(
    posthoc_here: Posthoc, snapshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["solve", "snapshots", "--gamma", "3", "--json", "--device"]
    posthoc_here(*arguments, "cuda").failed(1, "--device cuda: torch finds no CUDA .*")
    assert posthoc_here(*arguments, "auto").json["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    posthoc_here(*arguments, "cuda:2").failed(1, "--device cuda:2: not there: 2 found; .*cuda:1")


def test_profiles_by_index(posthoc_here: Posthoc, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    for index in (0, 1):
        for step in (10, 20):
            write_snapshot(folder / f"{index}.{step}.safetensors", 1)
    run = posthoc_here("solve", "runs", "--sigma-rel", "0.07", "--profiles", "0.10,0.05", "--json")
    weights = run.json["targets"][0]["weights"]
    assert [(entry["file"], entry["sigma_rel"]) for entry in weights][:2] == [
        ("1.10.safetensors", 0.05),
        ("0.10.safetensors", 0.1),
    ]


@pytest.mark.parametrize("values", [[1.0], [-1.0], [1, -1], [1, -0.001], [0.0], [3, -2, 0.5]])
def test_bars_fit(values: list[float]) -> None:
    bars = Bars(values, 20, "utf-8")
    for value in values:
        text = bars.draw(value).plain
        assert len(text) == 20
        left, right = text.split("│")
        assert len(left) == bars.left
        if value < 0:
            assert not right.strip()
        else:
            assert not left.strip()
    longest = max(values, key=abs)
    if longest:
        assert "█" in bars.draw(longest).plain


@pytest.mark.parametrize("values", [[1.7e308], [1.7e308, -1.7e308], [5e-324], [-5e-324, 0.0]])
def test_weights_that_someone_made_up_have_no_bars(values: list[float]) -> None:
    bars = Bars(values, 20, "utf-8")
    assert {bars.draw(value).plain.strip() for value in values} == {"│"}
