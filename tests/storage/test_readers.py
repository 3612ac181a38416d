"""Reading by range, over several files, and noticing that one of them changes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from posthoc_cli.errors import MachineError, SnapshotError
from posthoc_cli.storage.header import File, Part, ReadAt, TensorIndex, read_header
from posthoc_cli.storage.readers import Reader, fingerprint
from posthoc_cli.storage.shards import open_tensors
from tests.storage.test_shards import GROUPS, some_tensors
from tests.support import write_shards, write_tensors


def sharded(folder: Path) -> tuple[TensorIndex, bytes]:
    """A layout of three files, and their data sections end to end."""
    layout = open_tensors(write_shards(folder, some_tensors(1), GROUPS))
    data = b"".join(
        layout.files[part.file].path.read_bytes()[part.data_start :] for part in layout.parts
    )
    return layout, data


@pytest.mark.parametrize("keep_open", [True, False])
@pytest.mark.parametrize("missing", [None, "preadv"])
def test_any_range_over_any_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_open: bool, missing: str | None
) -> None:
    if missing:
        monkeypatch.delattr(os, missing, raising=False)
    layout, data = sharded(tmp_path)
    bounds = [0, *(part.first for part in layout.parts), len(data)]
    places = sorted({max(0, min(bound + off, len(data))) for bound in bounds for off in (-3, 0, 3)})
    with Reader(layout, keep_open=keep_open) as reader:
        for start in places:
            for stop in places:
                if start <= stop:
                    into = bytearray(stop - start)
                    reader.read(start, memoryview(into))
                    assert into == data[start:stop]
        reader.check_unchanged()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    times = path.stat().st_mtime_ns
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(times, times))  # the same bytes at the same time, but another file
    other.replace(path)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [cut, grow, replace, rewrite, Path.unlink])
@pytest.mark.parametrize("keep_open", [True, False])
def test_a_file_that_changes_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], keep_open: bool
) -> None:
    layout, data = sharded(tmp_path)
    path = layout.files[1].path
    with Reader(layout, keep_open=keep_open) as reader:
        change(path)
        with pytest.raises(SnapshotError, match=f"{path.name}: changed while it was read; wait"):
            reader.check_unchanged()
        if change is cut or not keep_open:
            with pytest.raises(SnapshotError, match="changed while it was read"):
                reader.read(0, memoryview(bytearray(len(data))))
    with pytest.raises(SnapshotError, match="changed while it was read"), Reader(layout):
        pytest.fail("must not begin")


def test_short_reads_go_on_and_errors_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, data = sharded(tmp_path)
    whole = os.preadv
    with Reader(layout) as reader:
        monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole(fd, [into[0][:7]], at))
        into = bytearray(len(data))
        reader.read(0, memoryview(into))
        assert into == data

        def broken(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(MachineError, match=r"cannot be read \(Input/output error\); check the"):
            reader.read(0, memoryview(into))


def test_a_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    tensors = {"w": np.arange(200_000, dtype=np.float32), "b": np.zeros(3, np.float16)}

    def made(name: str) -> str:
        write_tensors(tmp_path / name, tensors, {"step": "5"})
        return fingerprint(read_header(tmp_path / name))

    first = made("a")
    assert len(first) == 32
    assert made("b") == first
    (tmp_path / "a").rename(tmp_path / "c")
    assert fingerprint(read_header(tmp_path / "c")) == first
    for at in (0, -1):
        tensors["w"][at] += 1
        assert made(f"d{at}") != first
        tensors["w"][at] -= 1


@pytest.mark.parametrize("length", [0, 1, 4096, 5000])
def test_a_fingerprint_of_little_data(tmp_path: Path, length: int) -> None:
    seen = set()
    for at in (None, 0, length // 2, length - 1) if length else (None,):
        data = np.arange(length, dtype=np.uint8)
        if at is not None:
            data[at] ^= 1
        write_tensors(tmp_path / "a", {"w": data})
        seen.add(fingerprint(read_header(tmp_path / "a")))
    assert len(seen) == min(length, 3) + 1


def test_a_fingerprint_of_several_files(tmp_path: Path) -> None:
    index = write_shards(tmp_path, some_tensors(1), GROUPS)
    first = fingerprint(open_tensors(index))
    write_shards(tmp_path, some_tensors(2), GROUPS)
    assert fingerprint(open_tensors(index)) != first
    write_shards(tmp_path, some_tensors(1), GROUPS)
    assert fingerprint(open_tensors(index)) == first


class Reversed:
    """Content that remembers how often it was opened: the bytes of a file, last first."""

    def __init__(self, size: int) -> None:
        self.size, self.opened = size, 0

    def open(self, files: Sequence[ReadAt]) -> ReadAt:
        self.opened += 1

        def read(start: int, into: memoryview) -> None:
            there = bytearray(len(into))
            files[0](self.size - start - len(into), memoryview(there))
            into[:] = bytes(reversed(there))

        return read


def test_content_that_lies_in_no_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(20)))
    content = Reversed(20)
    parts = (Part(0, 5, 10), Part(5, 20, 0, content=content), Part(25, 3, 2))
    file = File.of(path, path.stat())
    index = TensorIndex(path, {}, {}, (file,), parts, structure=b"reversed")
    expected = bytes(range(10, 15)) + bytes(reversed(range(20))) + bytes(range(2, 5))
    with Reader(index) as reader:
        for start in range(28):
            for stop in range(start, 29):
                into = bytearray(stop - start)
                reader.read(start, memoryview(into))
                assert into == expected[start:stop]
    assert content.opened == 1
    named = fingerprint(index)
    assert named != fingerprint(dataclasses.replace(index, structure=b"another"))
    path.write_bytes(bytes(range(1, 21)))
    changed = dataclasses.replace(index, files=(File.of(path, path.stat()),))
    assert named != fingerprint(changed)
