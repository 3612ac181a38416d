"""The atomic writer under failure."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from posthoc_cli.errors import MachineError, UsageError
from posthoc_cli.storage import atomic as atomicfile
from posthoc_cli.storage import temporary
from posthoc_cli.storage.aside import Aside, identity_at
from posthoc_cli.storage.atomic import AtomicFile, Group, commit_together
from posthoc_cli.storage.metadata import MANIFEST


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


# Several that land together


def each(files: Sequence[AtomicFile]) -> list[Group]:
    return [Group([file]) for file in files]


def test_together_all_land_or_none(tmp_path: Path) -> None:
    files = [AtomicFile(tmp_path / name, 1) for name in "abc"]
    with commit_together(each(files)):
        for file in files:
            file.write_at(0, b"x")
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert entries(tmp_path) == ["a", "b", "c"]

    files = [AtomicFile(tmp_path / name, 1) for name in "def"]
    with pytest.raises(UsageError, match="e: exists already"), commit_together(each(files)):
        for file in files:
            file.write_at(0, b"x")
        (tmp_path / "e").write_bytes(b"another run was faster")
    assert entries(tmp_path) == ["a", "b", "c", "e"]
    assert (tmp_path / "e").read_bytes() == b"another run was faster"


def test_together_nothing_lands_before_all_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [AtomicFile(tmp_path / name, 1) for name in "abc"]

    def full() -> None:
        raise MachineError("c", "cannot be written", "")

    monkeypatch.setattr(files[2], "finish", full)
    stale = tmp_path / "stale"
    stale.write_bytes(b"old")
    with pytest.raises(MachineError), commit_together([Group(files, lambda: [stale])]):
        pass
    assert entries(tmp_path) == ["stale"]
    with commit_together([Group([AtomicFile(tmp_path / "new", 0)], lambda: [stale])]):
        assert stale.exists()
    assert entries(tmp_path) == ["new"]


@pytest.mark.parametrize("at", range(6))
def test_together_an_interrupt_between_two_landings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Each file is linked to its place, then its temporary name goes: it may come after either."""
    calls = iter(range(100))

    def interrupted(call: Callable[..., None]) -> Callable[..., None]:
        def after(*arguments: object) -> None:
            call(*arguments)
            if next(calls) == at:
                raise KeyboardInterrupt

        return after

    files = [AtomicFile(tmp_path / name, 1) for name in "abc"]
    with pytest.raises(KeyboardInterrupt), commit_together(each(files)):
        monkeypatch.setattr(os, "link", interrupted(os.link))
        monkeypatch.setattr(os, "unlink", interrupted(os.unlink))
    monkeypatch.undo()
    assert entries(tmp_path) == []


def test_missing_space_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    files = [AtomicFile(tmp_path / name, 1_000_000) for name in "ab"]
    message = r"500\.0 kB of the 2\.0 MB to be written are missing on its disk; free some space"
    with pytest.raises(MachineError, match=message), commit_together(each(files)):
        pytest.fail("must not begin")
    assert entries(tmp_path) == []
    with files[0] as file:  # alone it fits
        file.write_at(0, b"x")
    with (
        pytest.raises(MachineError, match=r"7.5 MB of the 9\.0 MB"),
        AtomicFile(tmp_path / "c", 9_000_000),
    ):
        pytest.fail("must not begin")


# What a run that was killed leaves


def abandoned(folder: Path, name: str = "old.safetensors") -> Path:
    path = folder / f".{name}.0123456789ab.posthoc-tmp"
    path.write_bytes(b"half")
    return path


@pytest.mark.parametrize("locks", [True, False])
def test_the_next_run_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if locks and temporary.fcntl is None:
        pytest.skip("no locks here")
    if not locks:
        monkeypatch.setattr(temporary, "fcntl", None)
    left = abandoned(tmp_path)
    others = [tmp_path / ".mine.posthoc-tmp", tmp_path / ".x.0123456789ab.posthoc-tmp.bak"]
    for path in others:
        path.write_bytes(b"not ours")
    (tmp_path / ".d.0123456789ab.posthoc-tmp").mkdir()
    if not locks:  # without them, only its age tells
        with AtomicFile(tmp_path / "first", 0):
            assert left.exists()
        os.utime(left, (0, 0))
    with AtomicFile(tmp_path / "out", 0):
        assert not left.exists()
    assert all(path.exists() for path in others)


@pytest.mark.skipif(temporary.fcntl is None, reason="no locks here")
def test_what_is_still_written_is_left_alone(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "one", 3) as one:
        with AtomicFile(tmp_path / "two", 3) as two:
            one.write_at(0, b"one")
            two.write_at(0, b"two")
        with AtomicFile(tmp_path / "three", 0):
            pass
    assert (tmp_path / "one").read_bytes() == b"one"
    assert entries(tmp_path) == ["one", "three", "two"]


@pytest.mark.skipif(temporary.fcntl is None, reason="no locks here")
def test_a_file_that_is_taken_for_abandoned_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, stolen = temporary.fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not stolen:
            stolen.append(next(tmp_path.iterdir()))
            stolen[0].unlink()
        lock(fd, how)

    monkeypatch.setattr(temporary.fcntl, "flock", late)
    with AtomicFile(tmp_path / "out", 1) as file:
        file.write_at(0, b"x")
    assert entries(tmp_path) == ["out"]
    assert len(stolen) == 1


@pytest.mark.skipif(temporary.fcntl is None, reason="no locks here")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(temporary.fcntl, "flock", none)
    left = abandoned(tmp_path)
    with AtomicFile(tmp_path / "out", 1) as file:
        file.write_at(0, b"x")
    assert left.exists()


@pytest.mark.parametrize("name", [".x.0123456789ab.posthoc-tmp", ".0123456789ab.posthoc-tmp"])
def test_all_kinds_of_names_of_temporaries_are_known(tmp_path: Path, name: str) -> None:
    if temporary.fcntl is None:
        pytest.skip("no locks here")
    (tmp_path / name).write_bytes(b"half")
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(UsageError, match="exists already"), AtomicFile(tmp_path / "out", 0):
        pytest.fail("must not begin")
    assert entries(tmp_path) == ["out"]


@pytest.mark.skipif(temporary.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("call", ["fstat", "stat"])
def test_no_temporary_is_left_when_it_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def broken(what: object, *arguments: object, **named: object) -> object:
        if call == "fstat" or str(what).endswith(".posthoc-tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return real(what, *arguments, **named)

    monkeypatch.setattr(os, call, broken)
    with (
        pytest.raises(MachineError, match="out: cannot be written"),
        AtomicFile(tmp_path / "out", 1),
    ):
        pytest.fail("must not begin")
    monkeypatch.undo()
    assert entries(tmp_path) == []


@pytest.mark.skipif(temporary.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("times", [1, 5])
def test_a_lock_that_cannot_be_had_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """A run never takes its own files for abandoned, nor those of another that has no lock."""
    lock, calls = temporary.fcntl.flock, iter(range(100))

    def busy(fd: int, how: int) -> None:
        if next(calls) < times:
            raise OSError(errno.ENOLCK, "No locks available")
        lock(fd, how)

    monkeypatch.setattr(temporary.fcntl, "flock", busy)
    files = [AtomicFile(tmp_path / name, 1) for name in "abcd"]
    with commit_together(each(files)):
        for file in files:
            file.write_at(0, b"x")
        temporary.clean_up(tmp_path)
    assert entries(tmp_path) == ["a", "b", "c", "d"]
    left = tmp_path / ".x.0123456789ab.unlocked.posthoc-tmp"
    left.write_bytes(b"half")
    temporary.clean_up(tmp_path)
    assert left.exists()
    os.utime(left, (0, 0))
    temporary.clean_up(tmp_path)
    assert not left.exists()


# Old files, set aside


def group(folder: Path, new: str, old: str) -> Group:
    """An output in parts: a letter each, the last of which is the index."""
    files = [AtomicFile(folder / name, 4, overwrite=True) for name in new]
    return Group(files, lambda: [folder / name for name in old if (folder / name).exists()])


def contents(folder: Path) -> dict[str, bytes]:
    """The files, but for unfinished ones."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")
    }


NEW_AND_OLD = [
    ("abi", "iab"),
    ("abi", "iabc"),
    ("abi", "icd"),
    ("abi", "f"),
    ("f", "iab"),
    ("f", "f"),
]


def attempt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, new: str, old: str, how: str, call: str, at: int
) -> tuple[int, bool]:
    """Replace `old` by `new` while a call fails; how many there were, and whether it failed."""
    real, calls = getattr(os, call), 0

    def broken(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= at or (calls > at + 1 and how != "errors"):
            return real(*arguments, **named)
        if how == "interrupt":
            real(*arguments, **named)
            raise KeyboardInterrupt
        raise OSError(errno.EIO, "Input/output error")

    groups = [group(folder, new, old), group(folder, "y", ""), group(folder, "z", "z")]
    try:
        with commit_together(groups):
            for file in (file for group in groups for file in group.files):
                file.write_at(0, b"new ")
            monkeypatch.setattr(os, call, broken)
    except (MachineError, KeyboardInterrupt):
        return calls, True
    finally:
        monkeypatch.undo()
    return calls, False


@pytest.mark.parametrize(("new", "old"), NEW_AND_OLD)
@pytest.mark.parametrize("how", ["error", "errors", "interrupt"])
@pytest.mark.parametrize("call", ["rename", "replace", "link", "unlink", "mkdir", "fsync", "open"])
def test_all_is_as_before_after_an_error_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: str, old: str, how: str, call: str
) -> None:
    before = dict.fromkeys((*old, "z"), b"old ")
    after = dict.fromkeys((*new, "y", "z"), b"new ")
    for at in range(100):
        folder = tmp_path / str(at)
        folder.mkdir()
        for name, content in before.items():
            (folder / name).write_bytes(content)
        calls, failed = attempt(folder, monkeypatch, new, old, how, call, at)
        wanted = [before, after] if how == "interrupt" else [before if failed else after]
        if how != "errors" and call != "unlink":  # else the rest is for the next run
            assert contents(folder) in wanted, at
        temporary.clean_up(folder)
        assert contents(folder) in (wanted if call != "unlink" else [before, after]), at
        assert entries(folder) == sorted(contents(folder)), at
        if calls <= at:
            break
    assert contents(folder) == after
    assert at < 99


@pytest.mark.parametrize("place", ["a", "b", "i"])
def test_a_folder_in_the_place_of_a_part(tmp_path: Path, place: str) -> None:
    (tmp_path / "i").write_bytes(b"old ") if place != "i" else None
    (tmp_path / place).mkdir()
    before = entries(tmp_path)
    with (
        pytest.raises(UsageError, match=f"{place}: is a folder; move it"),
        commit_together([group(tmp_path, "abi", "i")]),
    ):
        pytest.fail("must not begin")
    assert entries(tmp_path) == before


@pytest.mark.skipif(temporary.fcntl is None, reason="no locks here")
def test_one_run_at_a_time_puts_its_files_in_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomicfile, "LONGEST_WAIT", 0.05)
    with temporary.locked_output(tmp_path / "i", 0) as locked:
        assert locked
        with (
            pytest.raises(MachineError, match="i: another run is writing it; wait"),
            commit_together([group(tmp_path, "abi", "")]),
        ):
            pass
    assert entries(tmp_path) == []
    with commit_together([group(tmp_path, "abi", "")]):
        pass
    assert entries(tmp_path) == ["a", "b", "i"]


@pytest.mark.parametrize(("folder", "call"), [(False, "open"), (True, "open"), (True, "mkdir")])
def test_an_interrupt_right_after_a_temporary_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, call: str
) -> None:
    """Python tells of a signal once the system's call has returned, and before its result is."""
    real = getattr(os, call)

    def interrupted(*args: Any) -> None:
        monkeypatch.undo()
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        temporary.make_temporary(tmp_path / "out", folder=folder)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_that_does_not_answer_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    """What was set aside stays known until it is put back."""
    old = tmp_path / "old"
    if folder:
        old.mkdir()
        (old / MANIFEST).write_text("old")
    else:
        old.write_text("old")
    aside = Aside(tmp_path / ".aside", {"new": (0, 0, 0)}, {"old": identity_at(old)})
    aside.make()
    aside.write_journal()
    aside.set_aside("old")

    def silent(path: Path, **_: object) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    for call in ("stat", "lstat"):
        monkeypatch.setattr(os, call, silent)
    for end in (aside.undo, aside.finish, aside.recover):
        with pytest.raises(OSError, match=r"Input/output"):
            end()
    monkeypatch.undo()
    known = Aside.load(aside.path)
    assert known is not None
    known.recover()
    assert entries(tmp_path) == ["old"]
    assert (old / MANIFEST if folder else old).read_text() == "old"
