"""Snapshots that differ in what does not matter: in precision, in tensors that are not summed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import posthoc_cli
from posthoc_cli.errors import SnapshotError
from posthoc_cli.storage.dtypes import widest
from tests.support import read_tensors, write_tensors

F16, F32, F64, BF16 = np.float16, np.float32, np.float64, ml_dtypes.bfloat16
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


@pytest.mark.parametrize(
    ("codes", "wide"),
    [
        (["F16"], "F16"),
        (["F16", "F32"], "F32"),
        (["BF16", "F16"], "F32"),
        (["BF16", "F8_E4M3"], "BF16"),
        (["F8_E4M3", "F8_E5M2"], "F16"),
        (["F64", "F8_E4M3", "F16"], "F64"),
        (["I64"], "I64"),
    ],
)
def test_the_widest_holds_all(codes: list[str], wide: str) -> None:
    assert widest(codes) == widest(codes[::-1]) == wide


def folder_of(folder: Path, dtypes: list[type], size: int = 1000, group: int = 1) -> list[dict]:
    """A random walk, each snapshot in its dtype; the tensors as they were before rounding."""
    rng = np.random.default_rng(1)
    walk = np.cumsum(rng.normal(size=(len(dtypes), size)), 0) / 8
    mask = np.where(np.arange(30) % 3, 0.5, -np.inf)
    tensors = []
    for at, dtype in enumerate(dtypes):
        whole = {"b": walk[at, :7], "still": np.full(9, 0.125), "w": walk[at, 7:].reshape(3, -1)}
        stored = {name: array.astype(dtype) for name, array in whole.items()}
        stored |= {"always": walk[at].astype(F32), "mask": mask.astype(dtype)}
        if dtype in (E4M3,):  # which has no infinity
            del stored["mask"]
        metadata = {"step": str((at + 1) * 100), "gamma": "6.94"}
        write_tensors(folder / f"s{at}.safetensors", stored, metadata)
        tensors.append({name: array.astype(F64) for name, array in stored.items()})
    return tensors


@pytest.mark.parametrize(
    "dtypes",
    [
        [F16, F16, F32, F32],
        [F32, F32, F16, F16],
        [BF16, F16, BF16, F16],
        [F64, F32, F16, BF16],
        [F32] * 20 + [F16] * 20,
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_each_is_summed_as_what_it_is(tmp_path: Path, dtypes: list[type], raw: bool) -> None:
    tensors = folder_of(tmp_path, dtypes, size=20_005)
    run = posthoc_cli.open_snapshots(tmp_path, raw=raw)
    assert len(run.warnings) == 1
    solution = run.solve(sigma_rel=0.15, method="blup", sample=True)
    (path,) = solution.save(tmp_path / "out.safetensors")
    out, newest = read_tensors(path), dtypes[-1]
    for name, array in out.items():
        assert array.dtype == (F32 if name == "always" else newest)
        wanted = sum(w * t[name] for w, t in zip(solution.weights[0], tensors, strict=True))
        if name in ("still", "mask"):
            assert array.tobytes() == tensors[-1][name].astype(newest).tobytes()
        else:
            assert array.astype(F64) == pytest.approx(wanted, rel=2.0**-7, abs=2.0**-7)
            rounded = wanted.astype(array.dtype)
            assert np.mean(array == rounded) > 0.999
    report = posthoc_cli.verify(path, full=True)
    assert not report.problems
    assert report.compared == report.values


def test_the_output_may_be_of_any_dtype(tmp_path: Path) -> None:
    folder_of(tmp_path, [F16, F16, BF16])
    solution = posthoc_cli.open_snapshots(tmp_path).solve(sigma_rel=0.15)
    (path,) = solution.save(tmp_path / "out.safetensors", dtype="float32")
    assert {array.dtype for array in read_tensors(path).values()} == {np.dtype(F32)}
    assert not posthoc_cli.verify(path, full=True).problems


def test_the_warning_names_the_few(tmp_path: Path) -> None:
    folder_of(tmp_path, [F32, F16, F32, F32])
    assert posthoc_cli.open_snapshots(tmp_path).warnings == [
        (
            "s1.safetensors",
            "tensor 'b' is F16 here and F32 in the newest snapshot, 's3.safetensors': summed in "
            "the widest; outputs have the newest's, unless dtype= says which",
        )
    ]


def test_float8_beside_others(tmp_path: Path) -> None:
    tensors = folder_of(tmp_path, [E4M3, E4M3, E4M3])
    for at in (3, 4):
        stored = {name: array.astype(BF16) for name, array in tensors[0].items()}
        stored["always"] = tensors[0]["always"].astype(F32)
        metadata = {"step": str((at + 1) * 100), "gamma": "6.94"}
        write_tensors(tmp_path / f"s{at}.safetensors", stored, metadata)
        tensors.append(tensors[0])
    solution = posthoc_cli.open_snapshots(tmp_path).solve(sigma_rel=0.15)
    (path,) = solution.save(tmp_path / "out.safetensors")
    wanted = sum(w * t["w"] for w, t in zip(solution.weights[0], tensors, strict=True))
    assert read_tensors(path)["w"].astype(F64) == pytest.approx(wanted, rel=2.0**-8, abs=1e-3)
    assert not posthoc_cli.verify(path, full=True).problems


def with_buffer(folder: Path, steps: dict[int, tuple[int, ...] | None]) -> None:
    for step, shape in steps.items():
        tensors = {"w": np.full(5, step, F32), "z": np.full(2, step, F32)}
        if shape is not None:
            tensors["m.cache"] = np.full(shape, step, F32)
        metadata = {"step": str(step), "gamma": "6.94"}
        write_tensors(folder / f"s{step}.safetensors", tensors, metadata)


@pytest.mark.parametrize(
    "steps",
    [
        {1: None, 2: (3,), 3: (3,), 4: (3,)},
        {1: (3,), 2: None, 3: (4,), 4: None},
        {1: (3,), 2: (5,), 3: (4,), 4: (2, 2)},
    ],
)
@pytest.mark.parametrize("how", ["copy", "drop"])
def test_a_buffer_that_some_have(tmp_path: Path, steps: dict, how: str) -> None:
    with_buffer(tmp_path, steps)
    assert posthoc_cli.open_snapshots(tmp_path).problems
    run = posthoc_cli.open_snapshots(tmp_path, **{how: ["*.cache"]})
    solution = run.solve(sigma_rel=0.15)
    (path,) = solution.save(tmp_path / "out.safetensors", **{how: ["*.cache"]})
    out = read_tensors(path)
    kept = how == "copy" and steps[4] is not None
    assert out.keys() == {"w", "z"} | ({"m.cache"} if kept else set())
    if kept:
        assert (out["m.cache"] == 4).all()
    assert out["w"] == pytest.approx(solution.weights[0] @ [1, 2, 3, 4])
    assert out["z"][0] == out["w"][0]
    assert not posthoc_cli.verify(path, full=True).problems


def test_saving_without_what_was_settled(tmp_path: Path) -> None:
    with_buffer(tmp_path, {1: None, 2: (3,)})
    solution = posthoc_cli.open_snapshots(tmp_path, drop=["*.cache"]).solve(sigma_rel=0.15)
    with pytest.raises(SnapshotError, match="missing, or of another shape or dtype"):
        solution.save(tmp_path / "out.safetensors")
