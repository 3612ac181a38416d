"""Tensors' names in files that were saved from wrapped networks, and in others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import posthoc_cli
from posthoc_cli.snapshots.folder import read_folder

NAMES = ("block.0.weight", "block.0.bias", "head.weight")


def save(folder: Path, step: int, names: list[str], **more: np.ndarray) -> None:
    tensors = {name: np.full(3, step, np.float32) for name in names} | more
    path = folder / f"s{step}.safetensors"
    save_file(tensors, path, {"step": str(step), "gamma": "6.94"})


def wrapped(prefix: str) -> list[str]:
    return [prefix + name for name in NAMES]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (wrapped("_orig_mod."), "'_orig_mod.'"),
        (wrapped("module."), "'module.'"),
        (wrapped("module.module."), "'module.'"),
        (wrapped("_fsdp_wrapped_module."), "'_fsdp_wrapped_module.'"),
        (wrapped("module._orig_mod."), "'_orig_mod.' and 'module.'"),
        (wrapped("_orig_mod.module."), "'_orig_mod.' and 'module.'"),
        (["block._orig_mod.0.weight", "block._orig_mod.0.bias", NAMES[2]], "'_orig_mod.'"),
        (
            [
                "_fsdp_wrapped_module.block.0._fsdp_wrapped_module._checkpoint_wrapped_module.weight",
                "_fsdp_wrapped_module.block.0._fsdp_wrapped_module._checkpoint_wrapped_module.bias",
                "_fsdp_wrapped_module.head.weight",
            ],
            "'_checkpoint_wrapped_module.' and '_fsdp_wrapped_module.'",
        ),
    ],
)
@pytest.mark.parametrize("newest", [False, True])
def test_some_files_have_them(tmp_path: Path, names: list[str], said: str, newest: bool) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, names if (step > 2) == newest else list(NAMES))
    contents = read_folder(tmp_path)
    found = contents.usable()
    assert all(each.index.tensors.keys() == set(NAMES) for each in found)
    ((file, warning),) = contents.warnings
    first = "s3.safetensors" if newest else "s1.safetensors"
    assert (file, warning) == (
        "",
        f"'{first}' and 1 more: the names of tensors have {said} in them, as those of other files "
        "don't; it is left out",
    )
    solution = posthoc_cli.open_snapshots(tmp_path).solve(gamma=6)
    (path,) = solution.save(tmp_path / "out.safetensors")
    out = load_file(path)
    assert out.keys() == set(NAMES)
    value = float(solution.weights[0] @ [1, 2, 3, 4])
    assert all(np.allclose(tensor, value) for tensor in out.values())
    assert not posthoc_cli.verify(path, full=True).problems


def test_all_files_have_them(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, wrapped("_orig_mod."))
    contents = read_folder(tmp_path)
    assert not contents.warnings
    assert contents.usable()[0].index.tensors.keys() == set(wrapped("_orig_mod."))
    (path,) = posthoc_cli.open_snapshots(tmp_path).solve(gamma=6).save(tmp_path / "o.safetensors")
    assert not posthoc_cli.verify(path, full=True).problems


def test_names_that_would_be_the_same(tmp_path: Path) -> None:
    save(tmp_path, 1, ["_orig_mod.a", "a"])
    save(tmp_path, 2, ["a"])
    contents = read_folder(tmp_path)
    assert not contents.warnings
    assert len(contents.problems) == 1


def test_networks_that_differ_anyway(tmp_path: Path) -> None:
    save(tmp_path, 1, ["module.x", "module.y"])
    save(tmp_path, 2, ["u", "v"])
    assert read_folder(tmp_path).snapshots[0].index.tensors.keys() == {"module.x", "module.y"}


def test_an_output_of_wrapped_snapshots_with_names_of_its_own_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, wrapped("module.") if step < 3 else list(NAMES))
    solution = posthoc_cli.open_snapshots(tmp_path).solve(gamma=6, step=2)
    (path,) = solution.save(tmp_path / "out.safetensors")
    assert load_file(path).keys() == set(NAMES)
    assert not posthoc_cli.verify(path, full=True).problems
