"""The demo, in a few steps: that it runs what it shows, and measures what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from posthoc_cli.training.demo import TRUE_PROFILES, distance, sample, score, train


def test_the_demo_runs_its_own_commands_and_comes_near(posthoc_here, tmp_path: Path) -> None:
    run = posthoc_here("demo", "here", "--steps", "320")
    assert run.code == 0, run
    snapshots = sorted(path.name for path in (tmp_path / "here" / "snapshots").iterdir())
    assert len(snapshots) == 32
    typed = re.findall(r"^\$ posthoc (\w+) .*here", run.out, re.MULTILINE)
    assert typed == ["inspect", "solve", "synthesize", "synthesize"]
    number = r" +([\d.]+)"
    rows = re.findall(rf"^{number}{number}%{number}%{number}{number}$", run.out, re.MULTILINE)
    assert [float(row[0]) for row in rows] == list(TRUE_PROFILES)
    assert all(0 < float(error) < 5 for row in rows for error in row[1:3])
    assert all(float(row[3]) == pytest.approx(float(row[4]), rel=5e-3) for row in rows)
    assert len(list((tmp_path / "here" / "synthesized").iterdir())) == 8


def test_a_folder_with_something_in_it_is_left_alone(posthoc, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    posthoc("demo", "mine").failed(2, "mine: exists already; name a new or an empty folder")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_training_learns_and_averages_lag_behind(tmp_path: Path) -> None:
    final, tracked = train(tmp_path, steps=320)
    first, _ = train(tmp_path / "short", steps=16)
    assert score(final) < score(first)
    away = [distance(tracked[sigma_rel], final) for sigma_rel in TRUE_PROFILES]
    assert away == sorted(away)
    assert away[0] > 0
    points = sample(final, 500)
    assert points.shape == (500, 2)
    assert torch.isfinite(points).all()
