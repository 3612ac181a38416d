"""Tensors of any strides come out in order, whatever the sizes of tiles and pieces."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from posthoc_cli.errors import MachineError, SnapshotError
from posthoc_cli.formats import Checkpoint, Storage, StoredTensor
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.header import make_header, read_header
from posthoc_cli.synthesis import gathering
from posthoc_cli.synthesis.gathering import write_tensors
from tests.support import NAMES, read_tensors

rng = np.random.default_rng(0)
STORE = rng.integers(0, 256, 400_000, dtype=np.uint8)
"""The bytes of the file that all tensors here lie in."""


def stored(array: npt.NDArray) -> StoredTensor:
    """The tensor that `array`, a view of STORE, shows."""
    itemsize = array.dtype.itemsize
    offset = array.__array_interface__["data"][0] - STORE.ctypes.data
    strides = tuple(stride // itemsize for stride in array.strides)
    storage = Storage("uint8", STORE.size)
    return StoredTensor(NAMES[array.dtype], array.shape, strides, storage, offset)


def words(count: int, kind: type = np.int32, start: int = 64) -> npt.NDArray:
    size = np.dtype(kind).itemsize
    return STORE[start : start + count * size].view(kind)


def views() -> Iterator[tuple[str, npt.NDArray]]:
    base = words(60_000)
    yield "contiguous", base[:5000].reshape(50, 100)
    yield "no dimensions", base[7:8].reshape(())
    yield "empty", base[:0].reshape(0, 3)
    yield "transposed", base[:50_000].reshape(200, 250).T
    yield "transposed, tall", base[:50_000].reshape(10_000, 5).T
    yield "transposed, wide", base[:50_000].reshape(5, 10_000).T
    yield "channels last", base[:48_000].reshape(10, 20, 30, 8).transpose(0, 3, 1, 2)
    yield "permuted", base[:48_000].reshape(10, 20, 30, 8).transpose(2, 0, 3, 1)
    yield "reversed axes", base[:48_000].reshape(10, 20, 30, 8).T
    yield "expanded", np.broadcast_to(base[:300].reshape(300, 1), (300, 70))
    yield "expanded in front", np.broadcast_to(base[:300], (70, 300))
    yield "one element, expanded", np.broadcast_to(base[5:6], (3, 500))
    yield "every third", base[: 3 * 9000 : 3]
    yield "a column", base.reshape(60, 1000)[:, 17]
    yield "columns", base.reshape(60, 1000)[:, 900:910]
    yield "columns far apart", base.reshape(6, 10_000)[:, ::4999].T
    yield "overlapping", np.lib.stride_tricks.as_strided(base, (900, 50), (8, 4))
    yield "half", words(50_000, np.float16).reshape(100, 500).T
    yield "bytes", words(50_000, np.uint8).reshape(100, 500).T
    yield "bytes, unaligned", words(50_000, np.uint8, 33).reshape(100, 500)
    yield "complex", words(20_000, np.complex64).reshape(100, 200).T
    yield "ones between", base[:6000].reshape(60, 1, 100).transpose(2, 1, 0)


VIEWS = dict(views())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    path = tmp_path / "source.pt"
    path.write_bytes(STORE.tobytes())
    status = path.stat()
    return Checkpoint(path, None, status.st_size, status.st_mtime_ns)


def write(
    checkpoint: Checkpoint, arrays: dict[str, npt.NDArray], output: Path, **dtypes: str
) -> tuple[dict[str, npt.NDArray], list[str], int]:
    tensors = {name: stored(array) for name, array in arrays.items()}
    header, infos = make_header(
        {name: (dtypes.get(name, one.dtype), one.shape) for name, one in tensors.items()}, {}
    )
    size = len(header) + max(info.end for info in infos.values())
    taken: list[int] = []
    with AtomicFile(output, size) as file:
        file.write_at(0, header)
        overflowed = write_tensors(checkpoint, tensors, infos, file, len(header), taken.append)
    read_header(output)
    return read_tensors(output), overflowed, sum(taken)


SIZES = {"tiny": (512, 100, 0), "small": (4096, 5000, 64), "as they are": (None, None, None)}


@pytest.mark.parametrize("size", SIZES)
def test_all_views_come_out_in_order(
    size: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("TILE_BYTES", "COPY_BYTES", "GAP_BYTES"), SIZES[size], strict=True):
        if value is not None:
            monkeypatch.setattr(gathering, name, value)
    found, overflowed, taken = write(checkpoint, VIEWS, tmp_path / "out.safetensors")
    assert not overflowed
    assert found.keys() == VIEWS.keys()
    for name, array in VIEWS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
    assert taken == sum(array.nbytes for array in VIEWS.values())


@pytest.mark.parametrize("missing", ["copy_file_range", "preadv", "pwrite"])
def test_systems_that_lack_a_call(
    missing: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.delattr(os, missing, raising=False)
    monkeypatch.setattr(gathering, "COPY_BYTES", 10_000)
    monkeypatch.setattr(gathering, "TILE_BYTES", 4096)
    found, _, _ = write(checkpoint, VIEWS, tmp_path / "out.safetensors")
    assert all(found[name].tobytes() == array.tobytes() for name, array in VIEWS.items())


def test_a_system_that_cannot_copy_between_these_files(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    found, _, _ = write(checkpoint, VIEWS, tmp_path / "out.safetensors")
    assert all(found[name].tobytes() == array.tobytes() for name, array in VIEWS.items())


def test_a_full_disk_is_told(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    with pytest.raises(MachineError, match="No space left"):
        write(checkpoint, VIEWS, tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["source.pt"]


def test_rounding_on_the_way(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "TILE_BYTES", 4096)
    values = words(20_000, np.float32)
    saved = values.copy()
    values[:] = rng.standard_normal(20_000)
    try:
        checkpoint.path.write_bytes(STORE.tobytes())
        status = checkpoint.path.stat()
        checkpoint = Checkpoint(checkpoint.path, None, status.st_size, status.st_mtime_ns)
        arrays = {"a": values.reshape(100, 200), "b": values.reshape(100, 200).T}
        arrays["large"] = arrays["a"][:1]
        found, overflowed, _ = write(
            checkpoint, arrays, tmp_path / "out.safetensors", a="F16", b="F16", large="BF16"
        )
        for name in ("a", "b"):
            assert found[name].tobytes() == arrays[name].astype(np.float16).tobytes()
        assert not overflowed
    finally:
        values[:] = saved


@pytest.mark.parametrize("change", ["shorter", "longer", "touched", "gone"])
def test_a_source_that_is_not_what_it_was(
    change: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = checkpoint.path
    if change == "shorter":
        os.truncate(path, 1000)
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "touched":
        os.utime(path, ns=(0, checkpoint.modified + 1))
    else:
        path.unlink()
    with pytest.raises(SnapshotError, match="changed while it was read"):
        write(checkpoint, VIEWS, tmp_path / "out.safetensors")
    assert "out.safetensors" not in os.listdir(tmp_path)


@pytest.mark.parametrize("call", ["copy_file_range", "preadv"])
def test_a_source_that_changes_meanwhile(
    call: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, call):
        pytest.skip(f"no {call} here")
    original = getattr(os, call)
    if call == "preadv":
        monkeypatch.delattr(os, "copy_file_range", raising=False)

    def meddle(*args: object) -> object:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(checkpoint.path, 60_000)
        return original(*args)

    monkeypatch.setattr(os, call, meddle)
    with pytest.raises(SnapshotError, match="changed while it was read"):
        write(checkpoint, VIEWS, tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["source.pt"]


def test_tiles_are_bounded_and_their_runs_long() -> None:
    """Whatever the strides, a tile fits, and both files see few runs."""
    most = gathering.TILE_BYTES
    for dims in (
        ((22_000, 1), (22_000, 22_000)),
        ((5, 1), (10**9, 5)),
        ((10**9, 1), (5, 10**9)),
        ((500, 9 * 512), (512, 1), (9, 512)),
        ((10**6, 2),),
        ((10**6, 5000),),
        ((1000, 0), (1000, 1)),
        ((64, 1), (64, 64 * 64 * 64), (64, 64), (64, 64 * 64)),
    ):
        block = gathering._block(dims, 4, 4)
        volume = int(np.prod(block))
        assert 4 * volume <= 4 * most
        whole = int(np.prod([size for size, _ in dims]))
        written = np.prod(block[-1:])
        assert volume == whole or written * 4 >= 1000 or block[-1] == dims[-1][0]
