"""`posthoc synthesize`, run as a user would."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from posthoc_cli.solver import sigma_rel_to_gamma
from tests.command import COMMAND, ENVIRONMENT, Posthoc, on_terminal, visible, write_snapshot


def test_one_file(
    posthoc: Posthoc, posthoc_here: Posthoc, snapshots: Path, tmp_path: Path, check_json
) -> None:
    arguments = ["synthesize", "snapshots", "--sigma-rel", "0.07", "-o", "x.safetensors"]
    run = posthoc(*arguments, "--json")
    assert (run.code, run.err) == (0, "")
    check_json("synthesize", run.json)
    (target,) = run.json["targets"]
    output = tmp_path / "x.safetensors"
    assert (target["output"], target["bytes"]) == ("x.safetensors", output.stat().st_size)
    assert target["skipped"] is False
    value = sum(entry["weight"] * entry["step"] / 1000 for entry in target["weights"])
    tensors = load_file(output)
    np.testing.assert_allclose(tensors["body.weight"], np.full((3, 4), value), rtol=1e-6)
    assert tensors["body.bias"].dtype == np.float16
    assert tensors["head.count"] == 7
    with safe_open(output, "np") as file:
        assert "step" not in file.metadata()
    before = output.read_bytes()

    posthoc_here(*arguments).failed(2, "x.safetensors: exists already; use --force .*")
    kept = posthoc_here(*arguments, "--skip-existing", "--json")
    assert (kept.code, kept.err) == (0, "posthoc: x.safetensors: exists already; skipped\n")
    check_json("synthesize", kept.json)
    assert kept.json["targets"][0] == target | {"skipped": True, "seconds": 0.0}
    assert posthoc_here(*arguments, "--skip-existing", "-q").err == ""
    assert output.read_bytes() == before

    run = posthoc_here(*arguments, "--force", "--dtype", "float64", "--drop", "head.*")
    assert run.code == 0
    tensors = load_file(output)
    assert sorted(tensors) == ["body.bias", "body.weight"]
    assert tensors["body.bias"].dtype == np.float64
    assert sorted(os.listdir(tmp_path)) == ["snapshots", "x.safetensors"]


def test_a_folder(posthoc_here: Posthoc, snapshots: Path, tmp_path: Path, check_json) -> None:
    arguments = ["synthesize", "snapshots", "--sigma-rel", "0.05,0.07", "--gamma", "3"]
    arguments += ["--step", "3500", "--copy", "*.bias", "-o", f"emas{os.sep}"]
    run = posthoc_here(*arguments)
    assert run.code == 0
    assert re.fullmatch(r"posthoc: .*an error of up to \d+% of the .*\n", run.err)
    names = [
        "snapshots-step3500-sigma0.05.safetensors",
        "snapshots-step3500-sigma0.07.safetensors",
        "snapshots-step3500-gamma3.safetensors",
    ]
    assert sorted(os.listdir(tmp_path / "emas")) == sorted(names)
    lines = run.out.splitlines()
    assert (
        " ".join(lines[0].split())
        == "output size time sum of weights noise gain expected error edm2's"
    )
    for line, name in zip(lines[1:], names, strict=True):
        assert line.split()[0] == os.path.join("emas", name)
        assert line.split()[5] == "1.000000"
        assert line.endswith("%")
    for name in names:
        assert np.all(load_file(tmp_path / "emas" / name)["body.bias"] == 3)

    kept = (tmp_path / "emas" / names[0]).read_bytes()
    (tmp_path / "emas" / names[2]).unlink()
    run = posthoc_here(*arguments, "--skip-existing", "--json")
    check_json("synthesize", run.json)
    assert [target["skipped"] for target in run.json["targets"]] == [True, True, False]
    assert run.json["targets"][0]["bytes"] == len(kept)
    assert (tmp_path / "emas" / names[0]).read_bytes() == kept
    assert (tmp_path / "emas" / names[2]).exists()
    assert run.err.count("skipped") == 2

    (tmp_path / "emas" / names[0]).write_bytes(b"mine")
    (tmp_path / "emas" / names[2]).unlink()
    posthoc_here(*arguments, "--skip-existing", "-q").failed(
        2, f".*{names[0]}: exists already, and .*"
    )
    assert (tmp_path / "emas" / names[0]).read_bytes() == b"mine"
    assert not (tmp_path / "emas" / names[2]).exists()


OTHERS = {
    "a width": (["--sigma-rel", "0.08"], "is sigma-rel:0.07 at step 4000, not sigma-rel:0.08"),
    "a step": (["--step", "3500"], "is sigma-rel:0.07 at step 4000, not .* at step 3500"),
    "a kind": (["--window", "9%"], "is sigma-rel:0.07 at step 4000, not window:9% at step 4000"),
    "a method": (["--method", "edm2"], "was made with --method blup, not 'edm2'"),
    "a dtype": (["--dtype", "bfloat16"], "has 'body.weight' as F32, not BF16"),
    "what is dropped": (["--drop", "head.*"], "was made with another --drop"),
    "what is copied": (["--copy", "*.bias"], "was made with another --copy"),
    "a part": (["--target-for", "*.bias=0.1"], "was made with another --target-for"),
    "fewer": (["--exclude", "*-1000-*"], "was made of 8 snapshots, not 6"),
    "profiles": (["--pattern", "ema-{step}-{decay}.*"], "was made with another step or profile"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_output_is_kept_only_if_it_is_what_is_asked_for(
    posthoc_here: Posthoc, snapshots: Path, tmp_path: Path, case: str
) -> None:
    begin = ["synthesize", "snapshots", "-o", "x.safetensors"]
    assert posthoc_here(*begin, "--sigma-rel", "0.07").code == 0
    before = (tmp_path / "x.safetensors").read_bytes()
    others, why = OTHERS[case]
    if case not in ("a width", "a kind"):
        others = [*others, "--sigma-rel", "0.07"]
    run = posthoc_here(*begin, *others, "--skip-existing", "-q")
    line = f"x.safetensors: exists already, and isn't what is asked for: it {why}.*; use --force .*"
    run.failed(2, line)
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert posthoc_here(*begin, *others, "--force").code == 0
    assert posthoc_here(*begin, *others, "--skip-existing").code == 0


def test_snapshots_of_the_same_names_are_not_the_same(
    posthoc_here: Posthoc, snapshots: Path, tmp_path: Path
) -> None:
    arguments = ["synthesize", "snapshots", "-o", "{sigma_rel}.safetensors"]
    arguments += ["--sigma-rel", "0.06,0.07,0.08,0.09"]
    assert posthoc_here(*arguments).code == 0
    moved = snapshots.rename(tmp_path / "moved")
    arguments[1] = "moved"
    assert posthoc_here(*arguments, "--skip-existing").code == 0
    by_gamma = [*arguments[:-2], "--gamma", f"{sigma_rel_to_gamma(0.07)!r}"]
    by_gamma[3] = "0.07.safetensors"
    assert posthoc_here(*by_gamma, "--skip-existing").code == 0
    write_snapshot(moved / "ema-2000-0.05.safetensors", 2.1, step="2000", sigma_rel="0.05")
    posthoc_here(*arguments, "--skip-existing").failed(
        2,
        r"0\.06\.safetensors: exists already, and .*: it was made of another "
        r"'ema-2000-0\.05\.safetensors', or of other snapshots \(nor are others: "
        r"'0\.07\.safetensors' .*, '0\.08\.safetensors' .*, 1 more\); .*",
    )


def test_a_template(posthoc_here: Posthoc, snapshots: Path, tmp_path: Path) -> None:
    template = "{step:05d}-{sigma_rel}.safetensors"
    run = posthoc_here(
        "synthesize", "snapshots", "--sigma-rel", "0.050,0.070,...,0.110", "-o", template
    )
    assert run.code == 0
    assert sorted(os.listdir(tmp_path)) == [
        *(f"04000-0.0{n}.safetensors" for n in (5, 7, 9)),
        "04000-0.11.safetensors",
        "snapshots",
    ]
    one, other = (load_file(tmp_path / f"04000-0.0{n}.safetensors") for n in (5, 9))
    assert np.allclose(one["body.weight"], 4)  # the last snapshot itself
    assert not np.allclose(other["body.weight"], 4)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["-o", "x"], 2, "-o: 'x' doesn't end in .safetensors; .*"),
        (["-o", "a/x.safetensors"], 2, "-o: there is no folder 'a'; create it first"),
        (["-o", "{x}.safetensors"], 2, r"-o: unknown field \{x\} in .*"),
        (["-o", "x.safetensors", "--gamma", "3"], 2, "-o: one file for 2 targets; .*"),
        (["-o", "x.safetensors", "--dtype", "int8"], 2, "--dtype: 'int8' is not known; .*"),
        (["-o", "x.safetensors", "--copy", "nope"], 2, "--copy nope: matches no tensor; .*"),
        (["-o", "new/", "--drop", "*"], 2, "--drop: leaves no tensor to write; .*"),
        (
            ["-o", "x.safetensors", "--force", "--skip-existing"],
            2,
            "--force: doesn't go with --skip-existing; .*",
        ),
        (
            ["-o", "snapshots/ema-1000-0.05.safetensors", "--force"],
            2,
            r"snapshots.ema-1000-0\.05\.safetensors: is one of the snapshots; .*",
        ),
    ],
)
def test_refuses(
    posthoc_here: Posthoc,
    snapshots: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    line: str,
) -> None:
    posthoc_here("synthesize", "snapshots", "--sigma-rel", "0.07", *arguments).failed(code, line)
    assert os.listdir(tmp_path) == ["snapshots"]
    assert len(os.listdir(snapshots)) == 8


def test_on_a_terminal(snapshots: Path) -> None:
    arguments = ["synthesize", "snapshots", "--sigma-rel", "0.07,0.08", "--force"]
    arguments += ["-o", "a-long-name-{sigma_rel}.safetensors"]
    shown = on_terminal(arguments, snapshots.parent)
    assert "2 files" in shown  # the bar
    assert "/s" in shown
    quiet = on_terminal([*arguments, "-q"], snapshots.parent)
    assert "2 files" not in quiet
    assert max(map(len, visible(quiet))) <= 80
    assert "2 files" not in on_terminal(arguments, snapshots.parent, TERM="dumb")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_more_snapshots_than_files_may_be_open(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for step in range(1, 101):
        write_snapshot(folder / f"s{step}.safetensors", step, step=str(step), gamma="6.94")
    for files, output in ((1024, "many.safetensors"), (40, "few.safetensors")):
        done = subprocess.run(
            [
                *("bash", "-c", f'ulimit -n {files}; exec "$@"', "-"),
                *(COMMAND, "synthesize", "snapshots", "--gamma", "8", "--method", "blup"),
                *("-o", output),
            ],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
    few, many = (load_file(tmp_path / f"{name}.safetensors") for name in ("few", "many"))
    assert all(np.array_equal(few[name], many[name]) for name in many)
