"""The atomic writer under failure."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from posthoc_cli import atomicfile
from posthoc_cli.atomicfile import AtomicFile
from posthoc_cli.errors import MachineError, UsageError


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

    monkeypatch.setattr(atomicfile, "_reserve", full)
    with (
        pytest.raises(MachineError, match=r"out: cannot be written \(No space left.*free some"),
        AtomicFile(tmp_path / "out", 1),
    ):
        pytest.fail("must not begin")
    assert entries(tmp_path) == []
