"""The layout reader against the safetensors library."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posthoc_cli.errors import IncompleteError, MachineError, SnapshotError
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.dtypes import DTYPES
from posthoc_cli.storage.header import TensorInfo, make_header, read_header

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
    layout = read_header(path)
    assert layout.metadata == {"step": "3", "é\n": "ü"}
    assert layout.size == path.stat().st_size
    raw = path.read_bytes()
    for name, tensor in TENSORS.items():
        info = layout.tensors[name]
        assert info.shape == tensor.shape
        assert info.elements == tensor.size
        assert (
            raw[layout.parts[0].data_start + info.start : layout.parts[0].data_start + info.end]
            == tensor.tobytes()
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
    layout = read_header(write_raw(tmp_path / "x", header, b"ab"))
    assert layout.metadata == {"k": "v"}
    assert layout.tensors["a"] == TensorInfo("U8", (2,), 0, 2)


def test_a_file_of_metadata_only_and_one_without_any(tmp_path: Path) -> None:
    only = read_header(write_raw(tmp_path / "x", b'{"__metadata__":{"k":"v"}}'))
    assert (only.metadata, dict(only.tensors)) == ({"k": "v"}, {})
    assert read_header(write_raw(tmp_path / "y", b"{}")).metadata == {}


def test_files_with_the_same_tensors_share_their_layout(tmp_path: Path) -> None:
    cache: dict[bytes, object] = {}
    layouts = []
    for step in ("1", "2000"):
        save_file(TENSORS, tmp_path / step, metadata={"step": step})
        layouts.append(read_header(tmp_path / step, cache))  # type: ignore[arg-type]
    assert layouts[0].tensors is layouts[1].tensors
    assert layouts[0].metadata != layouts[1].metadata


def test_every_beginning_of_a_file_is_incomplete(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole", metadata={"step": "3"})
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(IncompleteError, match=r"cut\.safetensors: .* \(its end is missing\)"):
            read_header(path)


def test_a_missing_file_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file"):
        read_header(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="not a regular file"):
        read_header(tmp_path / "pipe")


def test_a_laid_out_file_is_what_the_library_would_write(tmp_path: Path) -> None:
    stored = {"F16": np.float16, "F32": np.float32, "I64": np.int64}
    names = {np.dtype(dtype): name for name, dtype in stored.items()}
    wanted = {name: (names[t.dtype], t.shape) for name, t in TENSORS.items()}
    header, infos = make_header(wanted, {"k": "v"})
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
    theirs, ours = read_header(tmp_path / "theirs"), read_header(path)
    assert ours.tensors == theirs.tensors
    assert ours.parts[0].data_start % 8 == 0


def test_every_dtype_of_the_library_has_its_place_in_the_order() -> None:
    header, infos = make_header({dtype: (dtype, (8,)) for dtype in DTYPES}, {})
    assert list(infos) == list(DTYPES)
    assert list(json.loads(header[8:])) == list(DTYPES)
    sizes = [info.end - info.start for info in infos.values()]
    assert sizes == sorted(sizes, reverse=True)
