"""Folders in folders: snapshots that lie further below than those that are read."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.command import Posthoc, write_snapshot

END = ".safetensors"
SOLVE = ("solve", "run", "--raw", "--sigma-rel", "0.2")


def write(tmp_path: Path, *names: str) -> None:
    for value, name in enumerate(names):
        path = tmp_path / "run" / (name + END)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_snapshot(path, value)


@pytest.mark.parametrize(
    ("place", "inner"),
    [
        ("checkpoints", "checkpoints/step_{}/model"),
        ("exp b/checkpoints", "exp b/checkpoints/step_{}/model"),
        ("exp/checkpoints", "exp/checkpoints/step_{}"),
        ("seed7", "seed7/checkpoint-{}/unet/diffusion_pytorch_model"),
    ],
)
def test_the_folder_that_holds_them_is_named(
    posthoc_here: Posthoc, tmp_path: Path, place: str, inner: str
) -> None:
    write(tmp_path, *(inner.format(step) for step in (100, 200, 300)))
    posthoc_here(*SOLVE).failed(
        3, rf"run: holds no \.safetensors files itself; give the one below it .*: 'run/{place}'"
    )
    shown = posthoc_here("inspect", f"run/{place}", "--raw", "--json")
    assert [each["step"] for each in shown.json["snapshots"]] == [100, 200, 300]


def test_of_several_all_are_named(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write(tmp_path, *(f"{run}/checkpoint-{step}/model" for run in "abcde" for step in (1, 2)))
    posthoc_here(*SOLVE).failed(
        3, r"run: holds .*; give one of the folders .*: 'run/a', 'run/b', 'run/c' and 2 more"
    )


def test_one_folder_of_files_is_refused_and_suggested(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    write(tmp_path, *(f"[a] checkpoints/step_{step}" for step in (100, 200, 300)))
    posthoc_here(*SOLVE).failed(
        3, r"run/\[a\] checkpoints: a folder with 3 \.safetensors files, and the one above .*"
    )
    shown = posthoc_here("inspect", "run", "--raw", "--json")
    assert shown.code == 3
    again = posthoc_here(*shlex.split(shown.json["suggestion"])[1:], "--json")
    assert [each["step"] for each in again.json["snapshots"]] == [100, 200, 300]


def test_two_folders_of_files_are_a_choice(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write(tmp_path, *(f"{run}/step_{step}" for run in ("runA", "runB") for step in (100, 200)))
    assert posthoc_here("inspect", "run", "--raw").code == 3
    made = posthoc_here(*SOLVE)
    assert made.code == 3
    assert "or choose its files with --only 'runA/*'" in made.err
    assert posthoc_here(*SOLVE, "--only", "runA/*").code == 0


def test_older_runs_beside_the_steps_are_named(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write(tmp_path, *(f"checkpoint-{step}/model" for step in (100, 200, 300)))
    write(tmp_path, "old/checkpoint-50/model", "wandb/files")
    (tmp_path / "run" / "logs" / "events").mkdir(parents=True)
    shown = posthoc_here("inspect", "run", "--raw", "--json")
    assert shown.code == 0
    left_out = {each["file"]: each["reason"] for each in shown.json["skipped"]}
    assert left_out["old"] == "a folder with snapshots of its own"
    assert "logs" not in left_out
    assert "old: left out" in posthoc_here(*SOLVE).err


def test_raw_for_what_are_emas(posthoc_here: Posthoc, tmp_path: Path) -> None:
    names = [f"ema_{step}_{gamma}" for step in (100, 200) for gamma in ("6.94", "16.97")]
    write(tmp_path, *names)
    shown = posthoc_here("inspect", "run", "--raw", "--json")
    assert shown.code == 0
    assert [each["gamma"] for each in shown.json["snapshots"]] == [16.97, 6.94] * 2


def test_a_run_in_a_folder_with_a_number(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write(tmp_path, *(f"exp_1/checkpoints/step_{step}/model" for step in (100, 200, 300)))
    shown = posthoc_here("inspect", "run", "--raw", "--json")
    assert shown.code == 0
    assert [each["step"] for each in shown.json["snapshots"]] == [100, 200, 300]


def test_two_runs_in_folders_with_numbers(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write(
        tmp_path, *(f"exp_{run}/step_{100 * run + step}/model" for run in (1, 2) for step in (1, 2))
    )
    posthoc_here(*SOLVE).failed(
        3, r"run/exp_1/step_101: step folders lie in 2 folders \('exp_1', 'exp_2'\), .*"
    )
    shown = posthoc_here("inspect", "run", "--raw", "--json", "--only", "exp_1/*")
    assert [each["step"] for each in shown.json["snapshots"]] == [101, 102]


def test_files_in_a_folder_with_a_number(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write(tmp_path, *(f"version_0/checkpoints/epoch={at}-step={at}00" for at in (1, 2, 3)))
    posthoc_here(*SOLVE).failed(
        3, r"run/version_0: holds several files in 'checkpoints'; choose with --only 'version_0/\*'"
    )
    assert posthoc_here(*SOLVE, "--only", "version_0/*").code == 0
