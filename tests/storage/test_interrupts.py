"""An interrupt after any call within the atomic writer: all of an output or none, and no rest."""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import posthoc_cli.storage
from posthoc_cli.storage import temporary
from posthoc_cli.storage.atomic import AtomicFile, commit_together
from posthoc_cli.storage.outputs import Group

WATCHED = (os.path.dirname(posthoc_cli.storage.__file__), contextlib.__file__)


class Interrupt(KeyboardInterrupt):
    pass


@functools.cache
def looked_at(code: CodeType) -> set[int]:
    """The instructions before which Python looks for signals."""
    found, before = set(), ""
    for each in dis.get_instructions(code):
        if before.startswith(("CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")):
            found.add(each.offset)
        before = each.opname
    return found


def interrupted(work: Callable[[], object], after: int) -> bool:
    """Whether `work` was interrupted: it is the time Python looks for signals `after` times."""
    count = 0

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "opcode" and frame.f_lasti in looked_at(frame.f_code):
            count += 1
            if count == after:
                raise Interrupt
        return step

    def begin(frame: FrameType, *_: Any) -> Any:
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        frame.f_trace_opcodes = True
        return step

    tracer = sys.gettrace()
    sys.settrace(begin)
    try:
        work()
    except Interrupt:
        pass
    finally:
        sys.settrace(tracer)
    return count >= after


def alone(folder: Path) -> None:
    with AtomicFile(folder / "a", 3, overwrite=True) as file:
        file.write_at(0, b"new")


def together(folder: Path, *names: str) -> None:
    files = [AtomicFile(folder / name, 3, overwrite=True) for name in names]

    def old() -> list[Path]:
        return [file.path for file in files if file.path.exists()]

    with commit_together([Group(files, old, files[0].path)]):
        for file in files:
            file.write_at(0, b"new")


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("names", [None, ["a"], ["a", "b"]], ids=["alone", "one", "two"])
def test_an_interrupt_after_any_call(
    names: list[str] | None, before: str | None, tmp_path: Path
) -> None:
    seen = set()
    for after in itertools.count(1):
        folder = tmp_path / str(after)
        folder.mkdir()
        for name in names or ["a"] if before else ():
            (folder / name).write_text("old")
        work = (lambda: together(folder, *names)) if names else (lambda: alone(folder))  # noqa: B023
        if not interrupted(work, after):
            break
        temporary.abandon()
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert set(found) <= set(names or ["a"]), after
        assert len({found.get(name) for name in names or ["a"]}) == 1, after
        seen.add(found.get("a"))
    assert after > 150
    assert seen == {before, "new"}
