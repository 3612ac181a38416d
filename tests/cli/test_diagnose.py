"""`--method blup`, `--diagnose` and `--max-error`, run as a user would."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posthoc_cli.solver.profiles import decay, sigma_rel_to_gamma
from tests.command import Posthoc, on_terminal, visible

WIDTHS = (0.05, 0.10)
STEPS = 800


@pytest.fixture
def walked(tmp_path: Path) -> tuple[Path, dict[float, np.ndarray], np.ndarray]:
    """`walked/`: float16 snapshots of a random walk; the EMAs that were tracked, and its end."""
    rng = np.random.default_rng(0)
    targets = (0.03, 0.07, 0.20)
    gammas = np.array([sigma_rel_to_gamma(width) for width in (*WIDTHS, *targets)])
    folder = tmp_path / "walked"
    folder.mkdir()
    value = rng.normal(0, 0.1, 5000)
    averages = np.zeros((len(gammas), len(value)))
    for step in range(1, STEPS + 1):
        value = value + rng.normal(0, 0.002, len(value))
        beta = decay(gammas, step)[:, None]
        averages = beta * averages + (1 - beta) * value
        if step % 100 == 0:
            for width, average in zip(WIDTHS, averages, strict=False):
                save_file(
                    {"w": average.astype(np.float16), "frozen": np.ones(9, np.float32)},
                    folder / f"walk-{step}-{width}.safetensors",
                    {"step": str(step), "sigma_rel": str(width)},
                )
    return folder, dict(zip(targets, averages[2:], strict=True)), value


def test_the_diagnosis_comes_true(
    posthoc_here: Posthoc, walked: tuple[Path, dict, np.ndarray], check_json, tmp_path: Path
) -> None:
    _, tracked, end = walked
    wide = ",".join(map(str, tracked))
    run = posthoc_here("solve", "walked", "--sigma-rel", wide, "--diagnose", "--json")
    assert (run.code, run.err) == (0, "")
    check_json("solve", run.json)
    diagnosis = run.json["diagnosis"]
    assert (diagnosis["sampled"], diagnosis["values"], diagnosis["not_finite"]) == (5009, 5000, 0)
    assert [target["sigma_rel"] for target in diagnosis["targets"]] == list(tracked)
    for method in ("edm2", "algorithm3", "blup"):
        out = f"{method}-{{sigma_rel}}.safetensors"
        arguments = ["--method", method, "--dtype", "float64", "--sigma-rel", wide, "-q"]
        done = posthoc_here("synthesize", "walked", *arguments, "-o", out, "--json")
        assert done.code == 0, done.err
        check_json("synthesize", done.json)
        for at, (width, truth) in enumerate(tracked.items()):
            found = load_file(tmp_path / f"{method}-{width}.safetensors")["w"]
            told = next(m for m in diagnosis["targets"][at]["methods"] if m["method"] == method)
            off = np.sqrt(np.mean((found - truth) ** 2))
            assert told["expected_error"] == pytest.approx(off, rel=0.25)
            distance = np.sqrt(np.mean((end - truth) ** 2))
            assert diagnosis["targets"][at]["distance"] == pytest.approx(distance, rel=0.15)
            assert told["expected_error"] == pytest.approx(
                np.hypot(told["approximation_error"], told["rounding_error"])
            )
            if method == "blup":
                target = done.json["targets"][at]
                assert target["expected_error"] == told["expected_error"]
                assert target["relative_error"] == told["relative_error"]
    for target in diagnosis["targets"]:
        errors = {method["method"]: method["expected_error"] for method in target["methods"]}
        assert errors["blup"] <= min(errors.values()) * (1 + 1e-9)


def test_the_table_fits_a_terminal(walked: tuple, tmp_path: Path) -> None:
    shown = on_terminal(["solve", "walked", "--sigma-rel", "0.03,0.20", "--diagnose"], tmp_path)
    lines = visible(shown)
    assert max(map(len, lines)) <= 80
    for method in ("edm2", "algorithm3", "blup"):
        assert sum(line.startswith(method) for line in lines) == 2
    assert any(line.startswith("sigma_rel 0.2 (gamma ") for line in lines)


def test_gamma_below_a_half_has_blup_only(posthoc_here: Posthoc, walked: tuple, check_json) -> None:
    arguments = ["solve", "walked", "--gamma", "-0.7", "--method", "blup", "--diagnose"]
    run = posthoc_here(*arguments, "--json")
    check_json("solve", run.json)
    methods = run.json["diagnosis"]["targets"][0]["methods"]
    assert [("problem" in method) for method in methods] == [True, True, False]
    assert run.json["targets"][0]["profile_error"] is None
    text = posthoc_here(*arguments).out
    assert "edm2: no weights (--method edm2: has no weights for gamma -0.7)" in text


def test_max_error_stops_before_anything_is_written(
    posthoc_here: Posthoc, walked: tuple, tmp_path: Path
) -> None:
    arguments = ["synthesize", "walked", "--sigma-rel", "0.07,0.20", "-o", "out/"]
    refused = posthoc_here(*arguments, "--max-error", "0.01", "--method", "edm2")
    refused.failed(
        3,
        r"sigma_rel 0\.2: its expected error is .*%, more than --max-error 1%; use --method.*",
    )
    assert not (tmp_path / "out").exists()
    assert posthoc_here(*arguments, "--max-error", "0.5", "-q").code == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_max_error_has_bounds(posthoc_here: Posthoc, walked: tuple, value: str) -> None:
    arguments = ["synthesize", "walked", "--gamma", "3", "-o", "x", "--max-error", value]
    posthoc_here(*arguments).failed(2, rf"--max-error: {value} is out of bounds; .*")


def test_blup_says_what_it_expects(posthoc_here: Posthoc, walked: tuple) -> None:
    run = posthoc_here("solve", "walked", "--sigma-rel", "0.07", "--method", "blup")
    assert re.search(r"^expected error +\d\S*% +of how far the EMA is", run.out, re.MULTILINE)


def test_many_targets_get_a_line_each(posthoc_here: Posthoc, walked: tuple, tmp_path: Path) -> None:
    arguments = ["solve", "walked", "--gamma", "-0.9,-0.7,1,9", "--method", "blup", "-q"]
    lines = visible(on_terminal(arguments, tmp_path))
    assert "expected error" in lines[0]
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if "1.000000" in line]) == 4
    single = posthoc_here(*arguments, "--only", "walk-800-0.05*")
    assert single.code == 0
    assert single.out.count("unknown") == 4


def test_a_single_snapshot_is_no_evidence(posthoc_here: Posthoc, walked: tuple, check_json) -> None:
    only = ["--only", "walk-800-0.05*", "--gamma", "3"]
    run = posthoc_here("solve", "walked", *only, "--method", "blup", "--json")
    check_json("solve", run.json)
    assert run.json["targets"][0]["expected_error"] is None
    assert "unknown" in posthoc_here("solve", "walked", *only, "--diagnose").out
    assert "unknown" in posthoc_here("solve", "walked", *only, "--method", "blup").out
    refused = posthoc_here(
        "synthesize", "walked", *only, "-o", "x.safetensors", "--max-error", "0.5"
    )
    refused.failed(3, "gamma 3: its expected error is unknown, .*")


def test_what_is_out_of_reach_is_said_unasked(posthoc_here: Posthoc, walked: tuple) -> None:
    plain = ("--method", "edm2")
    run = posthoc_here("solve", "walked", "--sigma-rel", "0.02,0.07,0.25", *plain)
    lines = run.err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        r"posthoc: sigma_rel 0\.02, 0\.25: out of reach, with a profile error of up to .*%; "
        r"within 5%, these snapshots reach sigma_rel 0\.0\d+ to 0\.\d+",
        lines[0],
    )
    assert re.fullmatch(
        r"posthoc: sigma_rel 0\.02: the rounding of F16 snapshots comes out up to .* as large; .*",
        lines[1],
    )
    assert posthoc_here("solve", "walked", "--sigma-rel", "0.02", "-q", *plain).err == ""
    assert posthoc_here("solve", "walked", "--sigma-rel", "0.07", *plain).err == ""
    assert posthoc_here("solve", "walked", "--sigma-rel", "0.02", "-q").err == ""
    blup = posthoc_here("solve", "walked", "--sigma-rel", "0.01")
    assert re.search(r"sigma_rel 0\.01: an error of up to .* is to be expected", blup.err)


def test_values_that_are_not_finite_are_said(posthoc_here: Posthoc, walked: tuple) -> None:
    path = walked[0] / "walk-400-0.05.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    tensors["w"][:7] = np.nan
    save_file(tensors, path, {"step": "400", "sigma_rel": "0.05"})
    run = posthoc_here("solve", "walked", "--sigma-rel", "0.07", "--method", "blup")
    assert "7 of 5,009 sampled values are NaN or infinite" in run.err


@pytest.mark.usefixtures("unmeasured")
def test_edm2_does_not_load_what_only_blup_needs(posthoc: Posthoc, snapshots: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = 'posthoc solve snapshots --gamma 3 -q --method edm2'.split();"
        "from posthoc_cli.cli import main; main();"
        "print(sorted({'torch', 'scipy', 'matplotlib', 'posthoc_cli.solver.blup',"
        "'posthoc_cli.snapshots.sampling', 'posthoc_cli.solver.reach'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=snapshots.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
