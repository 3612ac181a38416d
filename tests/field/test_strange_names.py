"""Names that were read in the wrong way, and copies of what has a number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.command import Posthoc, write_snapshot
from tests.support import read_tensors

END = ".safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def write(run: Path, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        path = run / (name + END)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_snapshot(path, value)


def read(posthoc: Posthoc, *options: str) -> tuple[list[int], list[str]]:
    """The steps of what is used, and the names of what is left out."""
    shown = posthoc("inspect", "run", "--raw", "--json", *options)
    assert shown.code == 0, shown
    return (
        [each["step"] for each in shown.json["snapshots"]],
        [each["file"] for each in shown.json["skipped"]],
    )


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step_1,000", "step_1,500", "step_2,000"], [1000, 1500, 2000]),
        (["net_1,000", "net_2,500", "net_1,000,000"], [1000, 2500, 1_000_000]),
        (["model_1_000", "model_2_500", "model_4_000"], [1000, 2500, 4000]),
        (["step_500", "step_1_000", "step_1_500"], [500, 1000, 1500]),
        (["ckpt_1_300", "ckpt_2_610", "ckpt_3_900"], None),
        (["ep1_it10k", "ep2_it25k", "ep4_it40k"], [10_000, 25_000, 40_000]),
        (["e1_s1000", "e2_s2000", "e4_s3900"], [1000, 2000, 3900]),
        (["clip_10s_300", "clip_20s_600", "clip_15s_900"], [300, 600, 900]),
        (["lora (1)", "lora (2)", "lora (3)"], [1, 2, 3]),
        (["2024-05-01_10-01-11-save-500-1-0", "2024-05-01_10-09-11-save-1000-2-0"], [1, 2]),
        (["2024-05-30", "2024-06-01", "2024-06-03"], None),
        (["2024-05-30_10-00-00", "2024-05-30_11-30-00"], None),
    ],
)
def test_numbers(
    posthoc_here: Posthoc, run: Path, names: list[str], steps: list[int] | None
) -> None:
    write(run, {name: value for value, name in enumerate(names)})
    if steps is None:
        assert posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2").code == 3
    else:
        assert read(posthoc_here) == (steps, [])


def test_epochs_beside_epochs_and_steps(posthoc_here: Posthoc, run: Path) -> None:
    epochs = {f"checkpoint{epoch}": epoch for epoch in (1, 2, 3, 4)}
    write(run, epochs | {"checkpoint_1_400": 10, "checkpoint_1_800": 20, "checkpoint_2_1200": 30})
    made = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    made.failed(3, r"run/checkpoint_1_400.*: its name says 400, but not in epochs, as 4 others .*")
    shown = posthoc_here("inspect", "run", "--raw", "--json")
    assert shown.json["suggestion"] == (
        "posthoc inspect run --exclude 'checkpoint_*_*.safetensors' --raw"
    )
    assert read(posthoc_here, "--exclude", "checkpoint_*_*") == ([1, 2, 3, 4], [])


def test_steps_of_one_and_of_two_numbers(posthoc_here: Posthoc, run: Path) -> None:
    write(run, {"checkpoint_1_400": 1, "checkpoint_1_800": 2, "checkpoint_1600": 3})
    assert read(posthoc_here)[0] == [400, 800, 1600]


@pytest.mark.parametrize(
    "copy", ["lora-300 (1)", "lora-300 - Copy", "Copy of lora-300", "lora-300_bak", "best_epoch_2"]
)
def test_a_copy_of_the_same_values(posthoc_here: Posthoc, run: Path, copy: str) -> None:
    numbered = {"lora-100": 1, "lora-200": 2, "lora-300": 3}
    write(run, numbered | {copy: 3})
    assert read(posthoc_here) == ([100, 200, 300], [copy + END])


def test_a_second_download_of_other_values(posthoc_here: Posthoc, run: Path) -> None:
    write(run, {"lora-100": 1, "lora-200": 2, "lora-200 (1)": 3})
    made = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    made.failed(3, r"run/lora-200\.safetensors: has the step \(200\) of 'lora-200 \(1\).*")


def test_a_copy_of_an_ema(posthoc_here: Posthoc, run: Path, tmp_path: Path) -> None:
    write(run, {"ema_100_6.94": 1, "ema_200_6.94": 2, "backup_200_6.94": 2})
    target = ("--gamma", "6.94", "-o", "out.safetensors")
    made = posthoc_here("synthesize", "run", *target)
    assert made.code == 0
    assert "backup_200_6.94.safetensors: left out: holds the same values as" in made.err
    assert read_tensors(tmp_path / "out.safetensors")["body.weight"][0, 0] == pytest.approx(2)
