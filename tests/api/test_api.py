"""The library: what a Python caller sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import posthoc_cli
from posthoc_cli.api import Progress
from tests.command import Posthoc
from tests.support import read_tensors


def test_a_folder(snapshots: Path) -> None:
    run = posthoc_cli.open_snapshots(snapshots)
    assert run.folder == snapshots
    assert [(each.step, each.sigma_rel) for each in run.snapshots[:2]] == [
        (1000, 0.05),
        (1000, 0.1),
    ]
    assert (run.problems, run.warnings, run.skipped) == ([], [], [])


def test_problems_are_collected_and_solving_raises_the_first(snapshots: Path) -> None:
    (snapshots / "a_500_6.94.safetensors").write_bytes(b"no header")
    (snapshots / "b_600_6.94.safetensors").write_bytes(b"")
    run = posthoc_cli.open_snapshots(snapshots)
    assert [file for file, _ in run.problems] == [
        "a_500_6.94.safetensors",
        "b_600_6.94.safetensors",
    ]
    with pytest.raises(posthoc_cli.SnapshotError, match=r"a_500_6\.94\.safetensors: plain text"):
        run.solve(sigma_rel=0.07)


def test_a_folder_that_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(posthoc_cli.UsageError, match="there is no such folder"):
        posthoc_cli.open_snapshots(tmp_path / "nowhere")


def test_one_target_or_several(snapshots: Path) -> None:
    run = posthoc_cli.open_snapshots(snapshots)
    one = run.solve(sigma_rel=0.07)
    several = run.solve(sigma_rel=[0.05, 0.07], gamma=3)
    assert one.weights.shape == (1, 8)
    assert [str(target) for target in several.targets] == [
        "sigma_rel 0.05",
        "sigma_rel 0.07",
        "gamma 3",
    ]
    np.testing.assert_allclose(several.weights[1], one.weights[0], rtol=1e-12)
    assert one.method == "blup"
    assert one.expected_error is not None
    plain = run.solve(sigma_rel=0.07, method="edm2")
    assert plain.expected_error is None
    assert set(one.errors) == {"blup", "edm2"}
    assert one.errors["blup"].total < one.errors["edm2"].total


def test_save_and_state_dict_give_the_same_numbers(snapshots: Path, tmp_path: Path) -> None:
    solution = posthoc_cli.open_snapshots(snapshots).solve(sigma_rel=[0.05, 0.07])
    for dtype in ("same", "float64", "bfloat16"):
        template = tmp_path / "ema-{sigma_rel}.safetensors"
        paths = solution.save(template, dtype=dtype, force=True)
        assert [path.name for path in paths] == ["ema-0.05.safetensors", "ema-0.07.safetensors"]
        for target, path in enumerate(paths):
            written, held = load_file(path), solution.state_dict(target, dtype=dtype)
            assert written.keys() == held.keys()
            for name, tensor in written.items():
                assert held[name].dtype == tensor.dtype
                assert held[name].shape == tensor.shape
                assert torch.equal(held[name], tensor), name


def test_tensors_in_memory_own_their_memory(snapshots: Path) -> None:
    solution = posthoc_cli.open_snapshots(snapshots).solve(sigma_rel=0.07)
    tensors = solution.state_dict(drop=["head*"])
    assert set(tensors) == {"body.weight", "body.bias"}
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(storages) == len(tensors)
    with pytest.raises(IndexError):
        solution.state_dict(target=1)


def test_a_tensor_that_never_varies_is_itself_in_memory(tmp_path: Path) -> None:
    third = torch.tensor([1 / 3, -0.0, float("inf")], dtype=torch.float64)
    for step in (100, 200, 300):
        tensors = {"same": third, "w": torch.full((5,), step / 7, dtype=torch.float64)}
        save_file(tensors, tmp_path / f"e_{step}_6.94.safetensors")
    solution = posthoc_cli.open_snapshots(tmp_path).solve(gamma=5, method="algorithm3")
    same = solution.state_dict()["same"]
    assert torch.equal(same.view(torch.int64), third.view(torch.int64))


def test_what_save_says_of_each_output(snapshots: Path, tmp_path: Path) -> None:
    solution = posthoc_cli.open_snapshots(snapshots).solve(sigma_rel=0.07)
    read: list[tuple[int, int]] = []
    progress: Progress = lambda count, total: read.append((count, total))  # noqa: E731
    saved = solution.save(tmp_path / "x.safetensors", max_shard_size=50, progress=progress)
    (output,) = saved.outputs
    assert saved == [tmp_path / "x.safetensors.index.json"]
    assert output.shards[0].name == "x-00001-of-00003.safetensors"
    assert output.bytes == sum(path.stat().st_size for path in (output.path, *output.shards))
    assert sum(count for count, _ in read) == read[0][1]
    kept = solution.save(tmp_path / "x.safetensors", skip_existing=True)
    assert kept == saved
    assert kept.outputs[0].seconds is None


def test_errors_name_arguments(snapshots: Path, tmp_path: Path) -> None:
    run = posthoc_cli.open_snapshots(snapshots)
    solution = run.solve(sigma_rel=0.07)
    solution.save(tmp_path / "x.safetensors")
    for error, call in {
        "sigma_rel=: 0.5 is out of bounds": lambda: run.solve(sigma_rel=0.5),
        "sigma_rel=: no target is given": lambda: run.solve(),
        "gamma=: -1 is out of bounds": lambda: run.solve(gamma=-1),
        "method=: 'x' is not known": lambda: run.solve(gamma=3, method="x"),
        "device=: 'x' is not known": lambda: run.solve(gamma=3, device="x"),
        "step=: 9999 is after the last": lambda: run.solve(gamma=3, step=9999),
        "dtype=: 'int8' is not known": lambda: solution.state_dict(dtype="int8"),
        "copy='x': matches no tensor": lambda: solution.state_dict(copy=["x"]),
        "output=: 'y' doesn't end": lambda: solution.save("y"),
        "only=: 'y' fits none": lambda: posthoc_cli.open_snapshots(snapshots, only=["y"]),
        "x.safetensors: exists already; use force=True": lambda: solution.save(
            tmp_path / "x.safetensors"
        ),
        "max_error=: 0 is out of bounds": lambda: solution.save(
            tmp_path / "z.safetensors", max_error=0
        ),
    }.items():
        with pytest.raises(posthoc_cli.UsageError) as caught:
            call()
        assert error in str(caught.value)
        assert "--" not in str(caught.value)


def test_an_expected_error_needs_a_sample(snapshots: Path, tmp_path: Path) -> None:
    run = posthoc_cli.open_snapshots(snapshots)
    with pytest.raises(ValueError, match="sample=True"):
        run.solve(sigma_rel=0.07, method="edm2").estimate_methods()
    solution = run.solve(sigma_rel=0.07, sample=True)
    assert solution.expected_error is not None
    assert {each.method for each in solution.estimate_methods()} == {"edm2", "algorithm3", "blup"}
    with pytest.raises(posthoc_cli.SnapshotError, match=r"more than max_error=1e-07%|more than"):
        run.solve(sigma_rel=0.2, sample=True).save(tmp_path / "x.safetensors", max_error=1e-9)
    assert not (tmp_path / "x.safetensors").exists()


def test_verify(snapshots: Path, tmp_path: Path) -> None:
    (path,) = posthoc_cli.open_snapshots(snapshots).solve(gamma=5).save(tmp_path / "x.safetensors")
    assert posthoc_cli.verify(path, snapshots).problems == []
    tensors = {name: np.array(array) for name, array in read_tensors(path).items()}
    assert tensors
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    assert len(posthoc_cli.verify(str(path), str(snapshots), full=True).problems) == 1


def test_the_command_writes_what_the_library_writes(
    posthoc_here: Posthoc, snapshots: Path, tmp_path: Path
) -> None:
    run = posthoc_here("synthesize", "snapshots", "--sigma-rel", "0.07", "-o", "a.safetensors")
    assert run.code == 0
    solution = posthoc_cli.open_snapshots(snapshots).solve(sigma_rel=0.07)
    (path,) = solution.save(tmp_path / "b.safetensors")
    assert path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_the_public_names() -> None:
    for name in posthoc_cli.__all__:
        assert getattr(posthoc_cli, name).__doc__
    assert dir(posthoc_cli) == posthoc_cli.__all__
    with pytest.raises(AttributeError):
        posthoc_cli.nothing  # noqa: B018
