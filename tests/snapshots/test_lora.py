"""LoRA alphas: which they are, that a difference in them is told, and that they stay exact."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.snapshots.lora import alphas, different_alphas
from posthoc_cli.storage.header import TensorInfo
from posthoc_cli.synthesis.outputs import write_outputs
from tests.support import plan_of, read_tensors, snapshot_of, write_kohya, write_tensors


def infos(*names: str, elements: int = 1) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", (elements,), 0, 4 * elements) for name in names}


@pytest.mark.parametrize(
    "factor",
    [
        *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.default.weight"),
        *("lora.up.weight", "hada_w1_a", "lokr_w2", "oft_blocks", "boft_blocks", "dora_scale"),
    ],
)
def test_an_alpha_stands_beside_a_loras_factors(factor: str) -> None:
    assert alphas(infos("te.q.alpha", f"te.q.{factor}")) == ["te.q.alpha"]


@pytest.mark.parametrize(
    "names",
    [
        ("mixer.alpha", "mixer.weight"),  # a network's own parameter
        ("alpha", "lora_up.weight"),
        ("a.alpha", "b.lora_up.weight"),
        ("a.alpha.weight", "a.lora_up.weight"),
        ("a.alphas", "a.lora_up.weight"),
        ("explora.alpha", "explora.weight"),
    ],
)
def test_what_only_is_called_alpha_is_none(names: tuple[str, ...]) -> None:
    assert alphas(infos(*names)) == []


def test_an_alpha_is_one_number() -> None:
    assert alphas(infos("a.alpha", elements=2) | infos("a.lora_up.weight")) == []


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, np.int64])
def test_a_difference_is_a_problem_that_names_both(tmp_path: Path, dtype, raw: bool) -> None:
    for step in (1, 2, 3):
        own = {} if raw else {"gamma": "6.94"}
        write_kohya(
            tmp_path / f"x-{step:06d}.safetensors",
            step,
            alpha=np.array(8 if step != 2 else 4, dtype),
            step=str(step),
            **own,
        )
    inventory = read_folder(tmp_path, raw=raw)
    assert inventory.problems == [
        (
            "x-000002.safetensors",
            "tensor 'lora_te_q.alpha' is 4 here and 8 in the newest snapshot, "
            "'x-000003.safetensors'; leave out with only= what isn't of the same network",
        )
    ]
    assert read_folder(tmp_path, raw=raw, only=["*1.*", "*3.*"]).usable()


def test_other_differences_are_told_once(tmp_path: Path) -> None:
    write_kohya(tmp_path / "a-000001.safetensors", 1, alpha=np.array(4, np.float16))
    write_kohya(tmp_path / "a-000002.safetensors", 2, alpha=np.array([8], np.float16))
    write_kohya(tmp_path / "a-000003.safetensors", 3, alpha=np.array(8, np.float32))
    problems = sorted(read_folder(tmp_path, raw=True).problems)
    assert [file for file, _ in problems] == ["a-000001.safetensors", "a-000002.safetensors"]
    assert "is 4 here and 8 in the newest" in problems[0][1]
    assert "is F16 [1] here and F32 [] in the newest" in problems[1][1]


def test_where_many_agree_the_few_are_named(tmp_path: Path) -> None:
    for step in range(1, 6):
        name = f"a-{step:06d}.safetensors"
        write_kohya(tmp_path / name, step, alpha=np.array(4 if step < 5 else 8, np.float16))
    ((file, message),) = read_folder(tmp_path, raw=True).problems
    assert file == "a-000005.safetensors"
    assert "is 8 here and 4 in 4 others, such as 'a-000004.safetensors'; " in message
    assert not read_folder(tmp_path, raw=True, copy=["*.alpha"]).problems


def test_alphas_of_networks_that_are_none_may_differ(tmp_path: Path) -> None:
    for step in (1, 2):
        tensors = {"mixer.alpha": np.array(step, np.float32), "mixer.weight": np.zeros(3)}
        write_tensors(tmp_path / f"{step}.safetensors", tensors, {"step": str(step), "gamma": "5"})
    assert not read_folder(tmp_path).problems
    assert list(different_alphas([])) == []


def test_alphas_stay_bit_for_bit(tmp_path: Path) -> None:
    alpha = np.array(0.1, np.float16)
    for step in (1, 2, 3):
        write_kohya(tmp_path / f"x-{step:06d}.safetensors", step, alpha=alpha)
    snapshots = [snapshot_of(path, at) for at, path in enumerate(sorted(tmp_path.iterdir()), 1)]
    output = tmp_path / "out.safetensors"
    write_outputs(plan_of(snapshots), np.array([[0.3, 0.4, 0.3]]), [output], [{"sources": []}])
    made = read_tensors(output)
    assert made["lora_te_q.alpha"].tobytes() == alpha.tobytes()
    assert made["lora_te_q.lora_up.weight"][0, 0] == np.float16(2)
