"""A file that grows by lines."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from posthoc_cli.errors import MachineError
from posthoc_cli.storage import lines
from posthoc_cli.storage.lines import LineFile, read_lines


def test_a_disk_that_fills_up_within_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written of it is gone, and the next one comes in its place."""
    path = tmp_path / "x.jsonl"
    file = LineFile(path)
    file.append('{"a": 1}')
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(lines.os, "write", full)
        with pytest.raises(MachineError, match="No space left on device"):
            file.append('{"b": 2}')
    assert path.read_bytes() == b'{"a": 1}\n'
    file.append('{"c": 3}')
    assert file.lines == ['{"a": 1}', '{"c": 3}']
    file.close()
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_a_whole_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for text, kept in (('{"a": 1}', ['{"a": 1}']), ('{"a": 1', []), ("", []), ("\0\0\0", [])):
        path.write_text(text)
        assert read_lines(path)[0] == kept
        file = LineFile(path)
        file.append("{}")
        file.close()
        assert path.read_text().splitlines() == [*kept, "{}"]
    assert read_lines(tmp_path / "nothing") == ([], 0)


@pytest.mark.skipif(os.name == "nt", reason="no links without permission")
def test_a_link_to_it_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "y.jsonl").symlink_to(tmp_path / "x.jsonl")
    file = LineFile(tmp_path / "x.jsonl")
    with pytest.raises(MachineError, match="another run is writing it"):
        LineFile(tmp_path / "other" / "y.jsonl")
    file.close()
