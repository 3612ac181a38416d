"""The journal of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posthoc_cli.errors import MachineError, UsageError
from posthoc_cli.tuning.journal import KEYS, Evaluation, Journal, read_journal

HEADER: dict[str, Any] = {key: f"the {key}" for key in KEYS} | {"steps": [], "count": 3}
ONE = Evaluation("sigma-rel:0.05", 0.05, 0.05, 900, 3.5, (3.0, 4.0), 1.5, 0.01)
FAILED = Evaluation("sigma-rel:0.1", 0.1, 0.1, 900, None, failed="exit code 1")


def filled(path: Path) -> bytes:
    journal = Journal(path)
    journal.begin(HEADER)
    journal.add(ONE)
    journal.add(FAILED)
    journal.close()
    return path.read_bytes()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tune.jsonl"
    filled(path)
    header, evaluations = read_journal(path)
    assert HEADER.items() <= header.items()
    assert evaluations == [ONE, FAILED]
    journal = Journal(path)
    journal.begin(HEADER | {"count": 4})  # which says nothing of what it is of
    journal.close()
    assert journal.evaluations == [ONE, FAILED]
    assert [path.name for path in tmp_path.iterdir()] == ["x.tune.jsonl"]


def test_a_cut_anywhere_costs_the_last_line_at_most(tmp_path: Path) -> None:
    path = tmp_path / "x.tune.jsonl"
    data = filled(path)
    ends = [at for at, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        whole = sum(end <= length for end in ends)
        if whole > 0:
            assert len(read_journal(path)[1]) == whole - 1
        if length % 37 and length not in ends:
            continue
        journal = Journal(path)
        journal.begin(HEADER)
        for each in [ONE, FAILED][len(journal.evaluations) :]:
            journal.add(each)
        journal.close()
        assert path.read_bytes().rstrip() == data.rstrip()


@pytest.mark.parametrize("key", KEYS)
def test_a_journal_of_another_search_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.tune.jsonl"
    data = filled(path)
    journal = Journal(path)
    with pytest.raises(UsageError, match=f"x.tune.jsonl: a journal of {KEYS[key]}.*; name another"):
        journal.begin(HEADER | {key: "else"})
    journal.close()
    assert path.read_bytes() == data


def test_one_in_which_nothing_was_measured_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.tune.jsonl"
    for metric in ("pyhton fid.py {file}", "python fid.py {file}"):
        journal = Journal(path)
        journal.begin(HEADER | {"metric": metric})
        journal.add(FAILED)
        journal.close()
    header, evaluations = read_journal(path)
    assert header["metric"] == "python fid.py {file}"
    assert evaluations == [FAILED]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.tune.jsonl"
    journal = Journal(path)
    with pytest.raises(MachineError, match="another run is writing it; wait"):
        Journal(path)
    journal.close()
    Journal(path).close()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hello\n", r"is no journal of posthoc tune \(line 1"),
        ('{"a": 1}\n', "is no journal of posthoc tune"),
        ("[" * 100_000 + "\n", "is no journal"),
        ('{"posthoc_tune": 2}\n', "of another version"),
        ('{"posthoc_tune": 1}\nx\n{"a": 1}\n', "line 2"),
        ('{"posthoc_tune": 1}\n{"target": "a", "length": 1, "step": 3}\n', "no metric"),
        ('{"posthoc_tune": 1}\n{"target": "a", "length": "1", "step": 3}\n', "length is no number"),
        (
            '{"posthoc_tune": 1}\n{"target": "a", "length": 1, "step": 3, "metric": 1e999}\n',
            "metric is no number",
        ),
    ],
)
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "x.tune.jsonl"
    path.write_text(text)
    for read in (Journal, read_journal):
        with pytest.raises(UsageError, match=problem):
            read(path)
    assert path.read_text() == text


def test_folders_and_what_isnt_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        Journal(tmp_path)
    with pytest.raises(UsageError, match="no such journal"):
        read_journal(tmp_path / "x")
    with pytest.raises(MachineError, match="create the folder first"):
        Journal(tmp_path / "nowhere" / "x.tune.jsonl")


def test_lines_are_json(tmp_path: Path) -> None:
    lines = filled(tmp_path / "x.tune.jsonl").decode().splitlines()
    assert [json.loads(line).get("metric") for line in lines] == ["the metric", 3.5, None]
