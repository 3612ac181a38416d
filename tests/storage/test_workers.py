"""Threads that share the work, and what becomes of their errors."""

from __future__ import annotations

import threading
from itertools import count
from pathlib import Path

import pytest

from posthoc_cli.errors import MachineError
from posthoc_cli.storage import workers
from posthoc_cli.storage.atomic import AtomicFile
from posthoc_cli.storage.workers import background_flush, run_workers


class Trouble(Exception):
    pass


def test_each_piece_is_done_once_by_one_of_the_workers() -> None:
    done: list[tuple[int, int]] = []
    together = threading.Barrier(3)

    def own() -> list[int]:
        together.wait()  # all three are at work
        return []

    def work(piece: int, mine: list[int]) -> None:
        mine.append(piece)
        done.append((piece, id(mine)))

    run_workers(iter(range(100)), work, own, 3)
    assert sorted(piece for piece, _ in done) == list(range(100))
    assert len({mine for _, mine in done}) <= 3


def test_no_pieces_need_nothing_of_their_own() -> None:
    run_workers(iter(()), lambda piece, mine: None, lambda: pytest.fail("not needed"), 2)


def test_the_first_error_stops_all() -> None:
    begun: list[int] = []

    def work(piece: int, mine: object) -> None:
        begun.append(piece)
        if piece == 20:
            raise Trouble

    with pytest.raises(Trouble):
        run_workers(count(), work, object, 4)
    assert begun[-1] < 1_000_000


def test_an_error_before_the_first_piece_is_raised_too() -> None:
    def own() -> object:
        raise Trouble

    with pytest.raises(Trouble):
        run_workers(iter(range(3)), lambda piece, mine: None, own, 2)


def test_files_are_flushed_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FLUSH_EVERY", 0.001)
    flushed = threading.Event()
    with AtomicFile(tmp_path / "out", 1) as file:
        flush = file.flush
        monkeypatch.setattr(file, "flush", lambda: (flush(), flushed.set()))
        with background_flush([file]):
            file.write_at(0, b"x")
            flushed.wait()
        flushed.clear()
        assert not flushed.wait(0.05)


def test_an_error_of_the_flush_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FLUSH_EVERY", 0.001)
    failed = threading.Event()

    def broken() -> None:
        failed.set()
        raise MachineError("out", "cannot be written (Input/output error)", "check the disk")

    with (
        pytest.raises(MachineError, match="Input/output"),
        AtomicFile(tmp_path / "out", 1) as file,
    ):
        monkeypatch.setattr(file, "flush", broken)
        with background_flush([file]):
            failed.wait()
    assert list(tmp_path.iterdir()) == []
