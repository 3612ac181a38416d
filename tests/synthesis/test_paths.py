"""Where outputs go: files, folders and templates."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from posthoc_cli.errors import UsageError
from posthoc_cli.solver.targets import make_targets
from posthoc_cli.synthesis.paths import make_folder, output_paths


def paths(output: str, *sigma_rels: float, gamma: float | None = None) -> list[str]:
    targets = make_targets(sigma_rels, gamma)
    return [path.as_posix() for path in output_paths(output, "cats", targets, 4000)]


def test_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths("ema.safetensors", 0.07) == ["ema.safetensors"]
    assert paths("s{sigma_rel}.safetensors", 0.05, 0.1) == [
        "s0.05.safetensors",
        "s0.1.safetensors",
    ]
    assert paths("{step:07d}-{sigma_rel:.3f}.safetensors", 0.05, gamma=3) == [
        "0004000-0.050.safetensors",
        "0004000-0.163.safetensors",
    ]
    assert paths("{gamma}.safetensors", 0.05, gamma=3) == ["16.9722.safetensors", "3.safetensors"]
    assert paths("a{{b}}.SafeTensors", 0.05) == ["a{b}.SafeTensors"]


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        "cats-step4000-sigma0.05.safetensors",
        "cats-step4000-sigma0.1.safetensors",
        "cats-step4000-gamma3.safetensors",
    ]
    assert paths("new/", 0.05, 0.1, gamma=3) == [f"new/{name}" for name in names]
    assert not Path("new").exists()  # only made once there is something to write
    make_folder("new/")
    assert Path("new").is_dir()
    make_folder("new/")
    make_folder("file.safetensors")
    assert os.listdir() == ["new"]
    Path("{odd}").mkdir()
    assert paths("{odd}", 0.05, 0.1, gamma=3) == [f"{{odd}}/{name}" for name in names]


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("ema.safetensors", "one file for 2 targets; give a folder, or a template"),
        ("ema-{step}.safetensors", "sigma_rel 0.05 and sigma_rel 0.051 would both become"),
        ("ema-{sigma_rel:.2f}.safetensors", "would both become 'ema-0.05.safetensors'"),
        ("{sigma}.safetensors", "unknown field {sigma}"),
        ("{sigma_rel.real}.safetensors", "unknown field {sigma_rel.real}"),
        ("{}.safetensors", "unknown field {}"),
        ("{step!r}.safetensors", "unknown field {step}"),
        ("{step.safetensors", "a brace in"),
        ("{step:99999999}.safetensors", "'99999999' is no format"),
        ("{sigma_rel:d}.safetensors", "'d' is no format"),
        ("ema-{sigma_rel}.pt", "doesn't end in .safetensors"),
        ("ema-{sigma_rel}", "doesn't end in .safetensors"),
        ("there/ema-{sigma_rel}.safetensors", "there is no folder 'there'; create it first"),
        ("there/new/", "there is no folder 'there'; create it first"),
    ],
)
def test_output_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(problem)) as caught:
        paths(output, 0.05, 0.051)
    assert caught.value.subject == "output="


def test_output_may_not_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("0.05.safetensors").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        paths("{sigma_rel}.safetensors", 0.05)
