"""Folders of very many snapshots."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import posthoc_cli
from posthoc_cli.cli.solutions import describe, sources
from posthoc_cli.snapshots import sampling
from posthoc_cli.solver import chains, choice
from tests.command import Posthoc, write_snapshot


def fill(folder: Path, steps: int, *sigmas: float) -> None:
    folder.mkdir()
    for step in range(1, steps + 1):
        for sigma in sigmas:
            name = f"ema-{step:04d}-{sigma:.3f}.safetensors"
            value = math.sqrt(step) + sigma
            write_snapshot(folder / name, value, step=str(step), sigma_rel=str(sigma))


@pytest.mark.parametrize("method", ["edm2", "algorithm3", "blup"])
def test_all_of_some_hundreds_are_used(
    method: str, tmp_path: Path, posthoc_here: Posthoc, check_json
) -> None:
    fill(tmp_path / "many", 205, 0.05, 0.1)
    run = posthoc_here(
        *("synthesize", "many", "--sigma-rel", "0.07,0.2", "-o", "out/", "--method", method),
        *("--json", "--dtype", "float64", "-q"),
    )
    assert run.code == 0
    check_json("synthesize", run.json)
    assert (run.json["snapshots_used"], run.json["snapshots_found"]) == (410, 410)
    for target in run.json["targets"]:
        assert len(target["weights"]) == 410
        assert target["profile_error"] < (0.2 if method == "blup" else 0.02)
        parts = [
            each["weight"] * float(np.float32(math.sqrt(each["step"]) + each["sigma_rel"]))
            for each in target["weights"]
        ]
        made = load_file(tmp_path / target["output"])["body.weight"]
        assert made == pytest.approx(math.fsum(parts), rel=1e-9)
        assert posthoc_here("verify", target["output"], "many").code == 0


def test_what_is_thinned_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_json
) -> None:
    """Snapshots that make no chains, and are more than can be solved together."""
    for module in (chains, choice):
        monkeypatch.setattr(module, "MANY", 30)
    monkeypatch.setattr(chains, "WIDEST", 0)
    fill(tmp_path / "many", 40, 0.05, 0.1)
    run = posthoc_cli.open_snapshots(tmp_path / "many")
    solution = run.solve(sigma_rel=0.07, method="blup", step=38)
    assert 20 < len(solution.snapshots) <= 30
    assert sources(solution) == f"{len(solution.snapshots)} of 76 snapshots"
    assert solution.weights.shape == (1, len(solution.snapshots))
    assert {1, 36, 37, 38} <= {snapshot.step for snapshot in solution.snapshots}
    document = describe("many", solution)
    check_json("solve", document)
    assert document["snapshots_used"] == len(solution.snapshots)
    assert document["snapshots_found"] == 76
    (path,) = solution.save(tmp_path / "out.safetensors")
    assert posthoc_cli.verify(path, tmp_path / "many").problems == []


def test_a_sample_is_read_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "many", 205, 0.05, 0.1)
    opened = []

    class Counted(sampling.Reader):
        def __init__(self, index, **how) -> None:  # type: ignore[no-untyped-def]
            opened.append(index.path.name)
            super().__init__(index, **how)

    monkeypatch.setattr(sampling, "Reader", Counted)
    run = posthoc_cli.open_snapshots(tmp_path / "many")
    solution = run.solve(sigma_rel=0.07, method="blup")
    assert 100 < len(set(opened)) < 200
    assert {"ema-0001-0.050.safetensors", "ema-0205-0.100.safetensors"} <= set(opened)
    assert solution.sample is not None
    # The rounding of those between is that of their neighbours.
    noise = solution.sample.trajectory.noise
    assert len(noise) == 410
    assert np.all(noise > 0)
    for at, snapshot in enumerate(run.snapshots):
        ulp = float(np.spacing(np.float32(math.sqrt(snapshot.step) + snapshot.sigma_rel)))
        half = float(np.spacing(np.float16(math.sqrt(snapshot.step) + snapshot.sigma_rel)))
        expected = (12 * ulp**2 + 4 * half**2) / 16 / 12
        assert 0.2 < noise[at] / expected < 5
