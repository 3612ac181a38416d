"""Both ways of summing, side by side: compiled loops on the CPU, tensors on a torch device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from posthoc_cli.storage.dtypes import DTYPES
from posthoc_cli.synthesis.accumulators import (
    Accumulator,
    CpuAccumulator,
    TorchAccumulator,
)
from posthoc_cli.synthesis.outputs import write_outputs
from tests.support import STORED, plan_of, read_tensors, snapshot_of, write_tensors

ROW, CAPACITY, TARGETS, BATCH = 1024, 256, 3, 4

MAKERS = [
    pytest.param(lambda: CpuAccumulator(ROW, CAPACITY, TARGETS, BATCH), id="cpu"),
    pytest.param(lambda: TorchAccumulator(ROW, CAPACITY, TARGETS, BATCH, "cpu"), id="torch-cpu"),
    pytest.param(
        lambda: TorchAccumulator(ROW, CAPACITY, TARGETS, BATCH, "cuda"),
        id="torch-cuda",
        marks=pytest.mark.gpu,
    ),
]


def sums_of(
    summing: Accumulator, rows: np.ndarray, weights: np.ndarray, dtype: str, out_dtype: str
) -> list[np.ndarray]:
    """Go through `rows` [snapshots, elements] by groups, as the workers do."""
    elements = rows.shape[1]
    summing.begin(dtype, out_dtype, elements)
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        for staged, row in zip(summing.staging(), part, strict=False):
            staged[: row.nbytes] = row.tobytes()
        last = first + BATCH >= len(rows)
        summing.add(np.ascontiguousarray(weights[first : first + BATCH]), last=last)
    return [
        np.frombuffer(bytes(summing.result(t)), STORED[out_dtype]) for t in range(weights.shape[1])
    ]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_sums_over_groups_of_snapshots(make: Callable[[], Accumulator], dtype: str) -> None:
    rng = np.random.default_rng(0)
    summing = make()
    weights = rng.standard_normal((10, TARGETS))
    for elements in (ROW * 8 // DTYPES[dtype].bits // 8, 1, 65):  # the buffers are used again
        rows = rng.standard_normal((10, elements)).astype(STORED[dtype])
        expected = weights.T @ rows.astype(np.float64)
        for result, exact in zip(
            sums_of(summing, rows, weights, dtype, "F64"), expected, strict=True
        ):
            assert np.allclose(result, exact, rtol=0, atol=1e-13)
        for result, exact in zip(
            sums_of(summing, rows, weights, dtype, "F32"), expected, strict=True
        ):
            assert np.array_equal(result, exact.astype(np.float32)) or np.allclose(
                result, exact, rtol=2**-24, atol=1e-12
            )


@pytest.mark.parametrize("make", MAKERS)
def test_rows_of_several_dtypes(make: Callable[[], Accumulator]) -> None:
    """Of a chunk that fits in a row in float16 there are half as many rows in float32."""
    rng = np.random.default_rng(0)
    summing, elements = make(), ROW // 4
    weights, expected = rng.standard_normal((7, TARGETS)), np.zeros((TARGETS, elements))
    summing.begin("F64", "F64", elements)
    done = 0
    for dtype, count in (("F16", BATCH), ("F64", BATCH // 2), ("F8_E4M3", 1)):
        rows = summing.staging(dtype)
        assert len(rows) == (BATCH // 2 if dtype == "F64" else BATCH)
        own = np.ascontiguousarray(weights[done : done + count])
        values = rng.standard_normal((count, elements)).astype(STORED[dtype])
        for staged, row in zip(rows, values, strict=False):
            staged[: row.nbytes] = row.tobytes()
        done += count
        summing.add(own, last=done == 7)
        expected += own.T @ values.astype(np.float64)
    for target, exact in enumerate(expected):
        found = np.frombuffer(bytes(summing.result(target)), np.float64)
        assert np.allclose(found, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_results_are_within_one_unit_in_the_last_place(
    make: Callable[[], Accumulator], dtype: str
) -> None:
    import ml_dtypes

    rng = np.random.default_rng(1)
    rows = rng.standard_normal((1, 128)) * 10.0 ** rng.uniform(-3, 2, 128)
    results = sums_of(make(), rows, np.ones((1, TARGETS)), "F64", dtype)
    for result in results:
        info = ml_dtypes.finfo(STORED[dtype])
        exponent = np.frexp(np.abs(rows[0]))[1]
        unit = np.maximum(np.ldexp(1.0, exponent - 1 - info.nmant), float(info.smallest_subnormal))
        assert np.all(np.abs(result.astype(np.float64) - rows[0]) <= unit)


@pytest.mark.gpu
def test_a_synthesis_on_the_gpu_is_that_of_the_cpu_to_one_unit(tmp_path) -> None:
    rng = np.random.default_rng(2)
    snapshots = []
    for step in range(1, 41):
        tensors = {
            "w": rng.standard_normal((700, 999)).astype(np.float16),
            "v": rng.standard_normal(5).astype(np.float16),
            "same": np.arange(9, dtype=np.float16),
            "n": np.array([step]),
        }
        write_tensors(tmp_path / f"{step}.safetensors", tensors)
        snapshots.append(snapshot_of(tmp_path / f"{step}.safetensors", step))
    weights = rng.standard_normal((3, 40))
    results = {}
    for device in ("cpu", "cuda"):
        outputs = [tmp_path / f"{device}{t}" for t in range(3)]
        plan = plan_of(snapshots)
        write_outputs(plan, weights, outputs, [{}] * 3, device=device, row_bytes=1 << 14)
        results[device] = [read_tensors(path) for path in outputs]
    for cpu, gpu in zip(results["cpu"], results["cuda"], strict=True):
        for name in ("same", "n"):
            assert cpu[name].tobytes() == gpu[name].tobytes()
        for name in ("w", "v"):
            unit = np.spacing(np.abs(cpu[name]))
            assert np.all(np.abs(cpu[name].astype(float) - gpu[name].astype(float)) <= unit)
