"""The layout reader against the safetensors library, and the writer under failure."""

from __future__ import annotations

import json
import os
import stat
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posthoc_cli import tensorfile
from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.tensorfile import AtomicFile, lay_out, read_layout

TENSORS = {
    "b": np.arange(6, dtype=np.float16).reshape(2, 3),
    "a": np.arange(3, dtype=np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(3, np.int64),
}


def write_raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_layout_says_where_the_library_finds_each_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"step": "3", "é\n": "ü"})
    layout = read_layout(path)
    assert layout.metadata == {"step": "3", "é\n": "ü"}
    assert layout.size == path.stat().st_size
    raw = path.read_bytes()
    for name, tensor in TENSORS.items():
        info = layout.tensors[name]
        assert info.shape == tensor.shape
        assert info.elements == tensor.size
        assert (
            raw[layout.data_start + info.start : layout.data_start + info.end] == tensor.tobytes()
        )


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"k":"v"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"__metadata__": {"k": "v"}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
        b'{ "__metadata__" :{"k":"v"}\n\t, "a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}  ',
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"__metadata__":{"k":"v"}}',
    ],
)
def test_metadata_may_stand_anywhere_in_any_spacing(tmp_path: Path, header: bytes) -> None:
    layout = read_layout(write_raw(tmp_path / "x", header, b"ab"))
    assert layout.metadata == {"k": "v"}
    assert layout.tensors["a"] == tensorfile.TensorInfo("U8", (2,), 0, 2)


def test_a_file_of_metadata_only_and_one_without_any(tmp_path: Path) -> None:
    only = read_layout(write_raw(tmp_path / "x", b'{"__metadata__":{"k":"v"}}'))
    assert (only.metadata, dict(only.tensors)) == ({"k": "v"}, {})
    assert read_layout(write_raw(tmp_path / "y", b"{}")).metadata == {}


def test_files_with_the_same_tensors_share_their_layout(tmp_path: Path) -> None:
    cache: dict[bytes, object] = {}
    layouts = []
    for step in ("1", "2000"):
        save_file(TENSORS, tmp_path / step, metadata={"step": step})
        layouts.append(read_layout(tmp_path / step, cache))  # type: ignore[arg-type]
    assert layouts[0].tensors is layouts[1].tensors
    assert layouts[0].metadata != layouts[1].metadata


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 0),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 54) + b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}} ' + b"x",
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"broken\.safetensors: not a whole safetensors") as e:
        read_layout(path)
    assert "\n" not in str(e.value)


def test_a_missing_file_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file"):
        read_layout(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="not a regular file"):
        read_layout(tmp_path / "pipe")


def test_a_laid_out_file_is_what_the_library_would_write(tmp_path: Path) -> None:
    stored = {"F16": np.float16, "F32": np.float32, "I64": np.int64}
    names = {np.dtype(dtype): name for name, dtype in stored.items()}
    wanted = {name: (names[t.dtype], t.shape) for name, t in TENSORS.items()}
    header, infos = lay_out(wanted, {"k": "v"})
    data = bytearray(max(info.end for info in infos.values()))
    for name, info in infos.items():
        data[info.start : info.end] = TENSORS[name].tobytes()
    path = tmp_path / "ours"
    with AtomicFile(path, len(header) + len(data)) as file:
        file.write_at(0, header)
        file.write_at(len(header), data)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert np.array_equal(loaded[name], tensor)
    save_file(TENSORS, tmp_path / "theirs", metadata={"k": "v"})
    theirs, ours = read_layout(tmp_path / "theirs"), read_layout(path)
    assert ours.tensors == theirs.tensors
    assert ours.data_start % 8 == 0


def test_every_dtype_of_the_library_has_its_place_in_the_order() -> None:
    header, infos = lay_out({dtype: (dtype, (8,)) for dtype in tensorfile.DTYPE_BITS}, {})
    assert list(infos) == list(tensorfile.DTYPE_BITS)
    assert list(json.loads(header[8:])) == list(tensorfile.DTYPE_BITS)
    sizes = [info.end - info.start for info in infos.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_the_longest_name_a_folder_takes(tmp_path: Path) -> None:
    for name in ("x" * 255, "\N{GRINNING FACE}" * 63):  # bytes are what is limited
        with AtomicFile(tmp_path / name, 1) as file:
            file.write_at(0, b"x")
        assert (tmp_path / name).read_bytes() == b"x"


class Trouble(Exception):
    pass


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_appears_when_the_work_fails(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(Trouble), AtomicFile(path, 10) as file:
        file.write_at(0, b"half")
        raise Trouble
    assert entries(tmp_path) == []


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(Trouble), AtomicFile(path, 3, overwrite=True) as file:
        file.write_at(0, b"new")
        raise Trouble
    assert path.read_bytes() == b"old"
    with AtomicFile(path, 3, overwrite=True) as file:
        file.write_at(0, b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert entries(tmp_path) == ["out"]


def test_an_existing_file_is_refused_before_and_after_the_work(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(UsageError, match="exists already"), AtomicFile(path, 1) as file:
        file.write_at(0, b"x")
        path.write_bytes(b"another run was faster")
    assert path.read_bytes() == b"another run was faster"
    with pytest.raises(UsageError, match="exists already"), AtomicFile(path, 1):
        pytest.fail("must not begin")
    assert entries(tmp_path) == ["out"]


def test_landing_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with AtomicFile(tmp_path / "out", 1) as file:
        file.write_at(0, b"x")
    assert (tmp_path / "out").read_bytes() == b"x"
    with pytest.raises(UsageError), AtomicFile(tmp_path / "new", 1) as file:
        (tmp_path / "new").write_bytes(b"faster")
    assert (tmp_path / "new").read_bytes() == b"faster"


@pytest.mark.parametrize("missing", ["posix_fallocate", "pwrite", "O_DIRECTORY"])
def test_calls_that_only_some_systems_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delattr(os, missing, raising=False)
    with AtomicFile(tmp_path / "out", 8) as file:
        file.write_at(4, b"efgh")
        file.write_at(0, b"abcd")
    assert (tmp_path / "out").read_bytes() == b"abcdefgh"


@pytest.mark.skipif(sys.platform == "win32", reason="modes are a POSIX matter")
def test_the_mode_is_what_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with AtomicFile(tmp_path / "out", 0):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_full_disk_and_a_missing_folder_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(MachineError, match=r"No such file or directory.*create the folder"),
        AtomicFile(tmp_path / "no" / "out", 1),
    ):
        pytest.fail("must not begin")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile, "_reserve", full)
    with (
        pytest.raises(MachineError, match=r"out: cannot be written \(No space left.*free some"),
        AtomicFile(tmp_path / "out", 1),
    ):
        pytest.fail("must not begin")
    assert entries(tmp_path) == []
