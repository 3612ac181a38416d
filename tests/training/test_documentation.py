"""docs/tracking.md does what it says, and the imports it shows work."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posthoc_cli import PostHocEMA
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile, sigma_rel_to_gamma
from tests.training.networks import small


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, posthoc_cli; assert 'torch' not in sys.modules; "
        "from posthoc_cli import KarrasEMA, PostHocEMA; assert 'torch' in sys.modules; "
        "print(KarrasEMA.__name__, PostHocEMA.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "KarrasEMA PostHocEMA\n"
    import posthoc_cli

    with pytest.raises(AttributeError, match="nothing"):
        posthoc_cli.nothing  # noqa: B018


def test_the_documented_loops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    model = small()
    averaged: list[dict[str, torch.Tensor]] = []
    names = {
        "model": model,
        "batches": range(3000),
        "train_on": lambda _: None,
        "evaluate": lambda lent: averaged.append(lent.state_dict()),
        "averaged_weights": model.state_dict(),
    }
    for block in blocks:
        exec(compile(block, "docs/tracking.md", "exec"), names)
    assert {each.step for each in read_folder(tmp_path / "snapshots").usable()} == {
        1000,
        2000,
        3000,
    }
    assert len(averaged) == 1
    assert read_folder(tmp_path).usable()[0].step == 50000
    for option in inspect.signature(PostHocEMA).parameters:
        assert option == "model" or f"`{option}`" in text


def test_the_documented_errors_are_those_of_the_solve() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    header, *rows = re.findall(r"^\| +(checkpoints|\d+) \|(.*)\|$", text, re.MULTILINE)
    widths = [float(cell) for cell in header[1].split("|")]
    assert len(rows) == 5
    for count, cells in rows:
        every = 1_000_000 / int(count)
        snapshots = [
            Profile(every * (k + 1), float(sigma_rel_to_gamma(width)))
            for k in range(int(count))
            for width in (0.05, 0.10)
        ]
        targets = [Profile(1_000_000, float(sigma_rel_to_gamma(width))) for width in widths]
        errors = solve(snapshots, targets).profile_error
        for cell, error in zip(cells.split("|"), errors, strict=True):
            written = cell.strip().removesuffix(" %")
            half_a_digit = 0.5 * 10.0 ** -len(written.partition(".")[2])
            assert abs(float(written) - 100 * error) <= 1.01 * half_a_digit, (count, cell, error)
