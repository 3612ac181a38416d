"""NaN and infinity are counted where they are, and sums that no longer fit are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from posthoc_cli.errors import SnapshotError
from posthoc_cli.synthesis import engine as synthesis
from posthoc_cli.synthesis.nonfinite import NonfiniteTensor, summarize
from posthoc_cli.synthesis.outputs import write_outputs
from posthoc_cli.synthesis.plan import TensorPlan
from tests.command import Posthoc
from tests.support import STORED, plan_of, read_tensors, snapshot_of, write_tensors


def made(folder: Path, contents: list[dict[str, npt.NDArray]], **options: Any) -> TensorPlan:
    folder.mkdir(exist_ok=True)
    for k, tensors in enumerate(contents):
        write_tensors(folder / f"s{k}.safetensors", tensors)
    each = [snapshot_of(folder / f"s{k}.safetensors", k + 1) for k in range(len(contents))]
    return plan_of(each, **options)


def run(
    plan: TensorPlan, folder: Path, weights: Any = None, **options: Any
) -> list[NonfiniteTensor]:
    count = len(plan.sources)
    weights = np.full((1, count), 1 / count) if weights is None else np.atleast_2d(weights)
    outputs = [folder / f"out{t}.safetensors" for t in range(len(weights))]
    recipes = [{"sources": []}] * len(weights)
    options = {"row_bytes": 512, "overwrite": True} | options
    return write_outputs(plan, weights, outputs, recipes, **options).nonfinite


def varied(dtype: str, count: int, elements: int = 3000) -> list[dict[str, npt.NDArray]]:
    rng = np.random.default_rng(0)
    return [
        {name: rng.uniform(0.5, 1, elements).astype(STORED[dtype]) for name in "abc"}
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64", "F8_E5M2"])
@pytest.mark.parametrize("count", [3, 20])  # less and more than are read at a time
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_they_are_counted_by_tensor_and_snapshot(
    tmp_path: Path, dtype: str, count: int, device: str
) -> None:
    contents = varied(dtype, count)
    assert run(made(tmp_path, contents), tmp_path) == []
    contents[1]["b"][[0, 17, 2999]] = np.nan
    contents[2]["b"][[17, 1500]] = np.inf
    contents[0]["c"][1] = -np.inf
    plan = made(tmp_path, contents)
    wanted = [NonfiniteTensor("b", 3, 2, 0, 0.0, {1, 2}), NonfiniteTensor("c", 0, 1, 0, 0.0, {0})]
    if device == "meta":  # the other implementation of the sum, where there is no GPU
        from unittest import mock

        from posthoc_cli.synthesis.accumulators import TorchAccumulator

        def on_cpu(*arguments: Any) -> TorchAccumulator:
            return TorchAccumulator(*arguments[:-1], "cpu")

        with mock.patch.object(synthesis, "TorchAccumulator", on_cpu):
            assert run(plan, tmp_path, device="cuda") == wanted
        return
    for workers in (1, 4):
        assert run(plan, tmp_path, workers=workers) == wanted
    subject, problem = summarize(plan, wanted)
    assert subject == "tensor 'b'"
    assert problem == (
        "3 NaN and 2 infinite values in 's0.safetensors' and 2 more snapshots, "
        "and so in 1 more tensor"
    )


def test_float8_without_infinity(tmp_path: Path) -> None:
    contents = varied("F8_E4M3", 3)
    contents[1]["b"][5] = np.nan
    assert run(made(tmp_path, contents), tmp_path) == [NonfiniteTensor("b", 1, 0, 0, 0.0, {1})]


def test_a_sum_that_the_dtype_does_not_hold_is_told_with_one_that_does(tmp_path: Path) -> None:
    contents = [{"a": np.full(2000, 3, np.float32), "b": np.full(9, k, np.float32)} for k in (1, 2)]
    contents[0]["a"][7] = 60_000.0
    contents[1]["a"][7] = 80_000.0
    weights = [[0.5, 0.5], [0.9, 0.1]]  # 70,000 and 62,000: float16 ends at 65,504
    plan = made(tmp_path, contents, dtype="float16")
    findings = run(plan, tmp_path, weights)
    assert findings == [NonfiniteTensor("a", 0, 0, 1, 70_000.0)]
    assert summarize(plan, findings) == (
        "tensor 'a'",
        "1 values, of up to 7e+04, are too large for float16; dtype=bfloat16 or float32 holds them",
    )
    for dtype in ("bfloat16", "float32", "same"):
        assert run(made(tmp_path, contents, dtype=dtype), tmp_path, weights) == []
    huge = [{"a": np.array([1.0, k * 1e300])} for k in (1, 2)]
    plan = made(tmp_path, huge, dtype="float32")
    assert "dtype=float64 holds them" in summarize(plan, run(plan, tmp_path))[1]
    plan = made(tmp_path, [{"a": np.array([1.0, 1.7e308])} for _ in "ab"] + [{"a": np.ones(2)}])
    findings = run(plan, tmp_path, [[1.0, 1.0, -1.0]])
    assert findings == [NonfiniteTensor("a", 0, 0, 1, np.inf)]
    assert summarize(plan, findings)[1].endswith("too large for float64; no dtype holds them")


def test_constants(tmp_path: Path) -> None:
    """A mask of -inf is meant, but a NaN is one, and an overflow too."""
    mask = np.array([0, -np.inf, -np.inf], np.float32)
    contents = [
        {"mask": mask, "nan": np.array([1, np.nan], np.float32), "w": np.ones(3, np.float32) * k,
         "large": np.full(3, 1e5, np.float32)}
        for k in (1, 2, 3)
    ]  # fmt: skip
    assert run(made(tmp_path, contents), tmp_path) == [
        NonfiniteTensor("nan", 3, 0, 0, 0.0, {0, 1, 2})
    ]
    plan = made(tmp_path, contents, dtype="float16")
    assert [f.tensor for f in run(plan, tmp_path) if f.overflowed] == ["large"]


def test_copied_tensors(tmp_path: Path) -> None:
    contents = [
        {"a": np.array([k, 1e6, 1], np.float32), "b": np.ones(2, np.float32)} for k in (1, 2)
    ]
    contents[0]["a"][2] = np.nan  # of a snapshot that it isn't copied from
    assert run(made(tmp_path, contents, copy=["a"]), tmp_path) == []
    assert run(made(tmp_path, contents, copy=["a"], dtype="float16"), tmp_path) == [
        NonfiniteTensor("a", 0, 0, 1, 1e6)
    ]
    contents[1]["a"][2] = np.nan
    for dtype in ("same", "bfloat16"):
        plan = made(tmp_path, contents, copy=["a"], dtype=dtype)
        assert run(plan, tmp_path) == [NonfiniteTensor("a", 1, 0, 0, 0.0, {1})]


def test_integers_are_never_suspected(tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    contents = [{"i": bits, "w": np.full(3, k, ml_dtypes.bfloat16)} for k in (1, 2)]
    assert run(made(tmp_path, contents), tmp_path) == []


def test_strict_writes_nothing(tmp_path: Path) -> None:
    contents = varied("F16", 2)
    contents[1]["c"][5] = np.nan
    plan = made(tmp_path / "in", contents)
    with pytest.raises(SnapshotError, match=r"'c': 1 NaN values in 's1.safetensors'; nothing is"):
        run(plan, tmp_path, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    contents[1]["c"][5] = 1.0
    assert run(made(tmp_path / "in", contents), tmp_path, strict=True) == []


def test_the_command_warns_or_refuses(
    posthoc: Posthoc, tmp_path: Path, snapshots: Path, check_json: Any
) -> None:
    broken = snapshots / "ema-2000-0.05.safetensors"
    tensors = {
        "body.weight": np.full((3, 4), 2, np.float32),
        "body.bias": np.full(4, 2, np.float16),
        "head.count": np.array(7, np.int64),
    }
    tensors["body.bias"][2] = np.nan
    save_file(tensors, broken, {"step": "2000", "sigma_rel": "0.05"})
    arguments = "synthesize", "snapshots", "--sigma-rel", "0.07", "-o", "out.safetensors"
    posthoc(*arguments, "--strict").failed(
        3,
        r"tensor 'body\.bias': 1 NaN values in 'ema-2000-0\.05\.safetensors'; nothing is written.*",
    )
    assert not (tmp_path / "out.safetensors").exists()
    done = posthoc(*arguments, "--json")
    assert done.code == 0
    assert done.err.count("\n") == 1
    assert "warning: tensor 'body.bias': 1 NaN values in 'ema-2000-0.05.safetensors'" in done.err
    check_json("synthesize", done.json)
    assert done.json["nonfinite"] == [
        {"tensor": "body.bias", "nan": 1, "infinite": 0, "overflowed": 0, "largest": 0.0,
         "files": [broken.name]}
    ]  # fmt: skip
    assert posthoc(*arguments, "--force", "-q").err == ""


# Tensors that are the same in all snapshots


@pytest.mark.parametrize("copy", [[], ["c"]])
def test_sums_that_copies_replace_may_be_too_large(tmp_path: Path, copy: list[str]) -> None:
    """`algorithm3`'s weights sum to more than one, but nobody gets these sums."""
    contents = varied("F16", 3)
    for each in contents:
        each["c"][:] = -65504
    plan = made(tmp_path, contents, copy=copy)
    weights = [[0.4, 0.3, 0.35], [0.1, 0.1, 0.7]]
    assert run(plan, tmp_path, weights, strict=True) == []
    for target in range(2):
        written = read_tensors(tmp_path / f"out{target}.safetensors")
        assert (written["c"] == -65504).all()


@pytest.mark.parametrize("copy", [[], ["c"]])
def test_copies_that_are_too_large_count(tmp_path: Path, copy: list[str]) -> None:
    contents = varied("F32", 3)
    for each in contents:
        each["c"][:] = 7
        each["c"][[5, 2900]] = [65519, -1e6]
    plan = made(tmp_path, contents, dtype="float16", copy=copy)
    weights = [[0.4, 0.3, 0.35], [0.1, 0.1, 0.7]]
    assert run(plan, tmp_path, weights) == [NonfiniteTensor("c", overflowed=2, largest=1e6)]
    with pytest.raises(SnapshotError, match="1e\\+06, are too large for float16"):
        run(plan, tmp_path, weights, strict=True)


@pytest.mark.parametrize("copy", [[], ["c"]])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_negative_zeros_of_copies_stay_negative(
    tmp_path: Path, copy: list[str], dtype: str
) -> None:
    contents = varied("F32", 20)
    for each in contents:
        each["c"][:] = -0.0
        each["c"][1::2] = 0.0
    plan = made(tmp_path, contents, dtype=dtype, copy=copy)
    run(plan, tmp_path)
    signs = np.signbit(read_tensors(tmp_path / "out0.safetensors")["c"])
    assert signs[::2].all()
    assert not signs[1::2].any()
