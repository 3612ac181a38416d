from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from posthoc_cli.errors import SnapshotError
from posthoc_cli.snapshots import sampling
from posthoc_cli.snapshots.folder import Snapshot, read_folder
from posthoc_cli.snapshots.sampling import sample_moments
from posthoc_cli.storage import Reader
from posthoc_cli.storage.deflated import Deflated
from posthoc_cli.storage.disk import InputFile
from posthoc_cli.storage.header import File, Part
from tests.support import STORED, Tensors, snapshot_of, write_tensors

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


def folder_of(
    folder: Path, contents: Sequence[Tensors], orders: Sequence[Sequence[str] | None] = ()
) -> list[Snapshot]:
    folder.mkdir(exist_ok=True)
    for at, tensors in enumerate(contents):
        order = orders[at] if orders else None
        path = folder / f"x_{1000 * (at + 1)}_6.94.safetensors"
        write_tensors(path, tensors, order=order)
    return read_folder(folder).usable()


def walk(count: int, shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[npt.NDArray]:
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((count, *shape)) * 0.1
    steps[0] *= 10
    return [np.asarray(x, np.float32).astype(STORED[dtype]) for x in np.cumsum(steps, axis=0)]


def exactly(arrays: Sequence[npt.NDArray]) -> npt.NDArray[np.float64]:
    """Mean squared differences, the plain way."""
    wide = np.stack([np.asarray(a, np.float64).ravel() for a in arrays])
    return ((wide[:, None] - wide[None]) ** 2).mean(axis=2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_of_a_small_network_is_measured_exactly(tmp_path: Path, dtype: str) -> None:
    parts = walk(5, (7, 300), dtype), walk(5, (11,), dtype, seed=1)
    snapshots = folder_of(tmp_path, [{"a": a, "b": b} for a, b in zip(*parts, strict=True)])
    found = sample_moments(snapshots)
    whole = [np.concatenate([a.ravel(), b]) for a, b in zip(*parts, strict=True)]
    assert found.differences == pytest.approx(exactly(whole), rel=1e-9, abs=1e-20)
    squares = [np.mean(np.asarray(x, np.float64) ** 2) for x in whole]
    assert found.squares == pytest.approx(squares, rel=1e-12)
    assert (found.values, found.sampled, found.broken) == (2111, 2111, 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_is_that_of_the_distance_to_the_next_value(tmp_path: Path, dtype: str) -> None:
    values = np.concatenate([walk(1, (500,), dtype)[0], np.zeros(3, STORED[dtype])])
    tiny = ml_dtypes.finfo(STORED[dtype]).smallest_subnormal
    values[0] = tiny
    other = values.copy()
    other[1] = 0
    found = sample_moments(folder_of(tmp_path, [{"a": values}, {"a": other}]))
    above = np.abs(np.asarray(values, np.float64))
    if dtype in ("F64", "F32", "F16"):
        gaps = np.spacing(np.abs(values)).astype(np.float64)
    else:  # the next number's bits are the next bits
        bits = np.abs(values).view(f"u{values.itemsize}") + 1
        gaps = np.asarray(bits.view(values.dtype), np.float64) - above
    assert found.rounding[0] == pytest.approx((gaps**2).mean() / 12, rel=1e-12)


def test_differences_of_a_millionth_of_the_values_are_measured(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal(4000) * 1000
    arrays = [base + 1e-6 * k * np.ones(4000) for k in range(3)]
    found = sample_moments(folder_of(tmp_path, [{"a": a} for a in arrays]))
    assert found.differences[0, 1] == pytest.approx(1e-12, rel=1e-6)
    assert found.differences[0, 2] == pytest.approx(4e-12, rel=1e-6)


def test_the_same_elements_whatever_the_layout(tmp_path: Path) -> None:
    names = [f"layer{k}" for k in range(9)]
    sizes = [3, 40_000, 1, 70_000, 513, 255, 90_000, 12, 60_000]
    contents = []
    for at in range(3):
        rng = np.random.default_rng(at)
        contents.append(
            {
                n: rng.standard_normal(s).astype(np.float32)
                for n, s in zip(names, sizes, strict=True)
            }
        )
    plain = sample_moments(folder_of(tmp_path / "plain", contents), blocks=50, block=64)
    orders = [names, names[::-1], [*names[4:], *names[:4]]]
    mixed = sample_moments(folder_of(tmp_path / "mixed", contents, orders), blocks=50, block=64)
    assert plain.sampled == mixed.sampled == 50 * 64
    assert mixed.differences == pytest.approx(plain.differences, rel=1e-12)
    assert mixed.rounding == pytest.approx(plain.rounding, rel=1e-12)
    again = sample_moments(folder_of(tmp_path / "plain", contents), blocks=50, block=64)
    assert np.array_equal(again.differences, plain.differences)


def test_a_sample_tells_what_the_whole_would(tmp_path: Path) -> None:
    """Tensors of different movement count by their size."""
    still = walk(3, (200_000,), "F32")
    moved = [10 * each for each in walk(3, (100_000,), "F32", seed=1)]
    contents = [{"a": a, "b": b} for a, b in zip(still, moved, strict=True)]
    found = sample_moments(folder_of(tmp_path, contents), blocks=256, block=64)
    whole = [np.concatenate([a, b]) for a, b in zip(still, moved, strict=True)]
    assert found.sampled == 256 * 64
    assert found.differences == pytest.approx(exactly(whole), rel=0.05)


@pytest.mark.parametrize("held", [1 << 10, 1 << 14])
def test_what_is_held_at_a_time_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    snapshots = folder_of(tmp_path, [{"a": a} for a in walk(4, (5000,), "F16")])
    once = sample_moments(snapshots, blocks=40, block=16)
    monkeypatch.setattr(sampling, "_HELD_BYTES", held)
    parts = sample_moments(snapshots, blocks=40, block=16)
    assert parts.differences == pytest.approx(once.differences, rel=1e-12)
    assert parts.rounding == pytest.approx(once.rounding, rel=1e-12)
    assert parts.values == once.values


def test_constant_and_whole_number_tensors_do_not_count(tmp_path: Path) -> None:
    moving = walk(3, (1000,), "F16")
    frozen = np.full(5000, 1000, np.float16)
    alone = sample_moments(folder_of(tmp_path / "alone", [{"m": m} for m in moving]))
    extra = [
        {"m": m, "frozen": frozen, "count": np.full(70, at), "mask": np.ones(9, np.bool_)}
        for at, m in enumerate(moving)
    ]
    found = sample_moments(folder_of(tmp_path / "extra", extra))
    assert found.values == alone.values == 1000
    assert found.sampled == 6000
    assert found.differences == pytest.approx(alone.differences)
    assert found.rounding == pytest.approx(alone.rounding)
    assert found.squares == pytest.approx(alone.squares)


def test_elements_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    arrays = walk(3, (1000,), "F32")
    kept = np.ones(1000, bool)
    kept[[5, 77]] = False
    wanted = exactly([a[kept] for a in arrays])
    arrays[1][5], arrays[2][77] = np.nan, np.inf
    found = sample_moments(folder_of(tmp_path, [{"a": a} for a in arrays]))
    assert found.broken == 2
    assert found.values == 998
    assert found.differences == pytest.approx(wanted, rel=1e-9)
    assert np.isfinite(found.rounding).all()


def test_a_network_of_nan_is_an_error(tmp_path: Path) -> None:
    arrays = [np.ones(50, np.float32), np.full(50, np.nan, np.float32)]
    with pytest.raises(SnapshotError, match="every value that was sampled is NaN"):
        sample_moments(folder_of(tmp_path, [{"a": a} for a in arrays]))


def test_snapshots_that_do_not_differ(tmp_path: Path) -> None:
    found = sample_moments(folder_of(tmp_path, [{"a": np.ones(64, np.float32)}] * 3))
    assert not found.differences.any()
    assert found.values == 0


def test_complex_numbers_count_as_two(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [(rng.standard_normal(60) + 1j * rng.standard_normal(60)) for _ in range(2)]
    arrays = [a.astype(np.complex64) for a in arrays]
    found = sample_moments(folder_of(tmp_path, [{"a": a} for a in arrays]))
    assert found.values == 120
    assert found.differences[0, 1] == pytest.approx(np.mean(abs(arrays[0] - arrays[1]) ** 2) / 2)


def test_no_floating_tensor_at_all(tmp_path: Path) -> None:
    found = sample_moments(folder_of(tmp_path, [{"a": np.arange(4)}, {"a": np.arange(4)}]))
    assert (found.values, found.sampled) == (0, 0)
    assert not found.differences.any()


def test_a_file_cut_short_meanwhile_is_named(tmp_path: Path) -> None:
    snapshots = folder_of(tmp_path, [{"a": a} for a in walk(2, (5000,), "F32")])
    path = snapshots[0].index.path
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(SnapshotError, match=r"x_1000_6.94.safetensors: changed while"):
        sample_moments(snapshots)


def test_very_many_snapshots_are_sampled_less(tmp_path: Path) -> None:
    path = tmp_path / "x_1000_6.94.safetensors"
    write_tensors(path, {"a": np.arange(300_000, dtype=np.float32)})
    (snapshot,) = read_folder(tmp_path).usable()
    assert sample_moments([snapshot] * 2).sampled == sampling.BLOCKS * sampling.BLOCK
    assert 10**5 < sample_moments([snapshot] * 129).sampled == sampling.BLOCKS * sampling.BLOCK // 2


def test_a_file_costs_at_most_128_reads_and_nothing_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even of tensors that lie in no order of their names, and when little is held at a time."""
    rng = np.random.default_rng(0)
    tensors = {f"{k % 7}.{k}": rng.standard_normal(40_000) for k in range(40)}
    tensors |= {f"{k % 7}.{k}.bias": rng.standard_normal(300) for k in range(40)}
    contents = [
        {name: (at + 1 + value).astype(np.float16) for name, value in tensors.items()}
        for at in range(3)
    ]
    snapshots = folder_of(tmp_path, contents, [list(tensors)] * 3)
    read: dict[str, list[tuple[int, int]]] = {}
    reads = Reader.read

    def noted(reader: Reader, start: int, into: memoryview) -> None:
        read.setdefault(str(reader._files[0]._path), []).append((start, len(into)))
        reads(reader, start, into)

    monkeypatch.setattr(Reader, "read", noted)
    monkeypatch.setattr(sampling, "_HELD_BYTES", 8 * 3 * 30_000)
    assert sample_moments(snapshots).sampled == 128 * 2048
    assert len(read) == 3
    for ranges in read.values():
        assert len(ranges) <= 128 + 9  # what is held at a time may cut one in two
        twice = sum(max(a + n - b, 0) for (a, n), (b, _) in pairwise(sorted(ranges)))
        assert twice < 0.1 * sum(n for _, n in ranges)  # gaps alone
        assert sum(n for _, n in ranges) < 3 * 2 * 128 * 2048  # small gaps are read along


def test_a_file_that_is_deflated_is_inflated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is held at a time, it is opened once, and goes on where it was."""
    arrays = walk(3, (600_000,), "F16")
    plain = folder_of(tmp_path, [{"a": a} for a in arrays])
    packed = []
    for snapshot, array in zip(plain, arrays, strict=True):
        path = tmp_path / f"{snapshot.step}.packed"
        data = zlib.compress(array.tobytes(), 1, -15)
        path.write_bytes(data)
        part = Part(0, array.nbytes, 0, content=Deflated(0, len(data), array.nbytes))
        files = (File.of(path, path.stat()),)
        packed.append(replace(snapshot, index=replace(snapshot.index, files=files, parts=(part,))))
    inflated = []
    reads = InputFile.read

    def noted(file: InputFile, offset: int, into: memoryview) -> None:
        inflated.append(len(into))
        reads(file, offset, into)

    monkeypatch.setattr(InputFile, "read", noted)
    monkeypatch.setattr(sampling, "_HELD_BYTES", 8 * 3 * 30_000)
    found = sample_moments(packed)
    size = sum(each.index.files[0].size for each in packed)
    assert sum(inflated) < 2 * size
    monkeypatch.undo()
    assert found.differences == pytest.approx(sample_moments(plain).differences, rel=1e-12)


@pytest.mark.usefixtures("unmeasured")
def test_torch_is_not_imported() -> None:
    import subprocess

    code = "import sys, posthoc_cli.snapshots.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensors_that_will_not_be_averaged_do_not_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    snapshots = []
    for step in (1, 2, 3):
        tensors = {
            "w": rng.standard_normal(500).astype(np.float32),
            "running_var": 1e4 * rng.standard_normal(500).astype(np.float32),
        }
        write_tensors(tmp_path / f"{step}.safetensors", tensors)
        snapshots.append(snapshot_of(tmp_path / f"{step}.safetensors", step))
    every, some = sample_moments(snapshots), sample_moments(snapshots, leave_out=["running*"])
    assert every.differences.max() > 1e7
    assert some.differences.max() < 10
    assert (every.sampled, some.sampled) == (1000, 500)
