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

    (tmp_path / "emas" / names[0]).write_bytes(b"mine")
    (tmp_path / "emas" / names[2]).unlink()
    run = posthoc_here(*arguments, "--skip-existing", "--json")
    check_json("synthesize", run.json)
    assert [target["skipped"] for target in run.json["targets"]] == [True, True, False]
    assert run.json["targets"][0]["bytes"] == 4
    assert (tmp_path / "emas" / names[0]).read_bytes() == b"mine"
    assert (tmp_path / "emas" / names[2]).exists()
    assert run.err.count("skipped") == 2


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
