"""One run, one folder: two trackers at once, restarts after kills, and what is set aside."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from posthoc_cli import PostHocEMA, open_snapshots
from posthoc_cli.errors import UsageError
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.storage import locks
from posthoc_cli.storage.header import read_header
from posthoc_cli.training import claim, snapshot_files, writer
from posthoc_cli.training.claim import LOCK, OTHER_RUNS
from tests.training.networks import folder_bytes, small, train
from tests.training.processes import lost

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def tracker(folder: Path, **options: Any) -> PostHocEMA:
    return PostHocEMA(small(), folder=folder, **{"checkpoint_every": 1, **options})


def runs(folder: Path) -> set[str | None]:
    return {read_header(path).metadata.get("run") for path in folder.glob("*.safetensors")}


def steps(folder: Path) -> set[int]:
    return {each.step for each in read_folder(folder).usable()}


# Two at once


@needs_fork
@pytest.mark.usefixtures("unmeasured")
def test_of_two_processes_that_start_at_once_one_goes_on(tmp_path: Path) -> None:
    assert lost("pairs", tmp_path, 10) == []


@needs_fork
@pytest.mark.usefixtures("unmeasured")
def test_killed_and_resumed_it_is_as_if_undisturbed(tmp_path: Path) -> None:
    assert lost("kills", tmp_path, 10) == []


@needs_fork
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.usefixtures("unmeasured")
def test_all_ranks_hear_the_verdict(tmp_path: Path) -> None:
    assert lost("ranks", tmp_path, 1) == []


def test_a_lock_that_a_killed_process_left_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{")
    ema = tracker(tmp_path)
    ema.update()
    ema.close()
    assert not (tmp_path / LOCK).exists()


def test_trackers_of_one_process(tmp_path: Path) -> None:
    one, elsewhere = tracker(tmp_path / "a"), tracker(tmp_path / "b")
    one.update()
    elsewhere.update()
    (tmp_path / "link").symlink_to("a", target_is_directory=True)
    other = tracker(tmp_path / "link", overwrite=True)
    with pytest.raises(UsageError, match=r"another tracker in this process.*close"):
        other.update()
    one.update()
    one.close()
    with pytest.warns(RuntimeWarning, match="another run's"):
        other.update()
    with pytest.raises(UsageError, match="another tracker in this process"):
        one.update()
    del other  # a tracker that is no more holds nothing
    with pytest.raises(UsageError, match="another run's"):
        one.update()


def test_of_two_of_one_run_in_a_process_the_newer_goes_on(tmp_path: Path) -> None:
    old = tracker(tmp_path)
    old.update()
    new = tracker(tmp_path)
    new.load_state_dict(old.state_dict())
    new.update()
    for forbidden in (old.update, old.checkpoint, old.update):
        with pytest.raises(UsageError, match="another tracker in this process"):
            forbidden()
    new.update()
    old.load_state_dict(new.state_dict())
    old.update()
    with pytest.raises(UsageError, match="another tracker in this process"):
        new.update()
    assert steps(tmp_path) == {1, 2, 3, 4}


def test_copies_have_no_claim(tmp_path: Path) -> None:
    ema = tracker(tmp_path, background=True)
    ema.update()
    assert pickle.dumps(ema)
    copied = copy.deepcopy(ema)
    ema.update()
    del copied
    stranger = tracker(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="another tracker"):
        stranger.update()
    ema.update()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_neither_holds_nor_ends_the_claim(tmp_path: Path) -> None:
    ema = tracker(tmp_path)
    ema.update()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # as a worker of a DataLoader, but one that tries everything
        refused = False
        try:
            ema.update()
        except UsageError:
            refused = True
        ema.close()
        del ema
        os.write(writing, b"+" if refused else b"-")
        signal.pause()
    try:
        assert os.read(reading, 1) == b"+"
        stranger = tracker(tmp_path, overwrite=True)
        with pytest.raises(UsageError, match="another tracker"):
            stranger.update()
        ema.update()
        ema.close()
        with pytest.warns(RuntimeWarning, match="another run's"):
            stranger.update()  # though the child lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_the_claim_lasts_until_the_thread_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threading import Event

    going, write = Event(), snapshot_files.write_snapshot

    def slow(snapshot: Any) -> list[str]:
        going.wait()
        return write(snapshot)

    monkeypatch.setattr(writer, "write_snapshot", slow)
    ema = tracker(tmp_path, background=True)
    ema.update()
    thread = ema._writer._thread
    assert thread is not None
    del ema
    stranger = tracker(tmp_path)
    with pytest.raises(UsageError, match="another tracker"):
        stranger.update()
    going.set()
    thread.join()
    with pytest.raises(UsageError, match="another run's"):
        stranger.update()


def test_a_folder_that_is_removed_and_begun_anew_is_the_newer_ones(tmp_path: Path) -> None:
    """As by someone who takes a training for dead that is not."""
    folder = tmp_path / "snapshots"
    old = tracker(folder)
    old.update()
    shutil.rmtree(folder)
    new = tracker(folder)
    new.update()
    locks._HELD.clear()  # as if in another process
    with pytest.raises(UsageError, match="another training"):
        old.update()
    old.close()
    assert (folder / LOCK).exists()
    new.update()
    assert runs(folder) == {new.run}


def no_locks(_: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_first_checkpoint_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_lock", no_locks)
    one, other = (tracker(tmp_path, checkpoint_every=2) for _ in range(2))
    one.update()
    locks._HELD.clear()  # as if in another process
    other.update()
    with pytest.raises(UsageError, match="another training"):
        one.update()
    other.update()
    with pytest.raises(UsageError, match="another training"):
        one.update()
    assert runs(tmp_path) == {other.run}
    other.close()
    late = tracker(tmp_path)
    with pytest.raises(UsageError, match="another run's"):
        late.update()


def test_locks_that_were_missing_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (tracker(tmp_path, checkpoint_every=2) for _ in range(2))
    one.update()
    locks._HELD.clear()
    with monkeypatch.context() as patched:
        patched.setattr(locks, "_lock", no_locks)
        other.update()
    with pytest.raises(UsageError, match="another training"):
        other.update()
    one.update()
    assert runs(tmp_path) == {one.run}


def test_a_folder_without_a_place_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(claim, "take_lock", refused)
    ema = tracker(tmp_path)
    ema.update()
    other = tracker(tmp_path)
    with pytest.raises(UsageError, match="another run's"):
        other.update()
    save_file({"w": torch.ones(2)}, tmp_path / "new.safetensors", {"run": "x", "step": "3"})
    with pytest.raises(UsageError, match=r"'new\.safetensors'"):
        ema.update()


# Whose files they are


def test_overwrite_sets_the_other_runs_snapshots_aside(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    train(first.model, first, 5)
    first.close()
    before = folder_bytes(tmp_path)
    before.pop(LOCK, None)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    out = open_snapshots(tmp_path, only=["ema-*"]).solve(gamma=8).save(tmp_path / "o.safetensors")
    second = tracker(tmp_path, overwrite=True)
    place = tmp_path / OTHER_RUNS / first.run
    with pytest.warns(RuntimeWarning) as caught:
        second.update()
    said = "\n".join(str(each.message) for each in caught)
    assert f"the 10 of run {first.run} are now in {place}" in said
    assert "'model.safetensors'; move them away" in said
    assert {Path(each.filename).name for each in caught} == {"test_claim.py"}
    assert folder_bytes(place) == before
    assert sorted(folder_bytes(tmp_path)) == [
        "ema-step00000001-0.050.safetensors",
        "ema-step00000001-0.100.safetensors",
        "model.safetensors",
        out[0].name,
    ]
    second.close()
    (tmp_path / "model.safetensors").unlink()
    assert {each.metadata["run"] for each in map(read_header, out)} == {first.run}
    assert steps(tmp_path) == {1}
    assert steps(place) == {1, 2, 3, 4, 5}
    # The first run comes back: nothing that was set aside is replaced, and names stay.
    for path in place.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    third = tracker(tmp_path, overwrite=True)
    with pytest.warns(RuntimeWarning, match="another run's"):
        third.update()
    assert folder_bytes(place) == folder_bytes(place.with_name(f"{place.name}.2")) == before


def test_a_runs_name_leads_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "snapshots"
    folder.mkdir(parents=True)
    for number, run in enumerate(("../../x", "a/b", "..", "\x1b[31m", "")):
        path = folder / f"s{number}.safetensors"
        save_file({"w": torch.ones(2)}, path, {"step": "3", "gamma": "5", "run": run})
    with pytest.warns(RuntimeWarning) as caught:
        tracker(folder, overwrite=True).update()
    assert all("\x1b" not in str(each.message) for each in caught)
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"snapshots"}
    assert len(list((folder / OTHER_RUNS).rglob("*.safetensors"))) == 4


def test_keep_removes_no_output_and_no_copy(tmp_path: Path) -> None:
    ema = tracker(tmp_path, keep=3)
    train(ema.model, ema, 3)
    (out,) = open_snapshots(tmp_path).solve(gamma=8).save(tmp_path / "out.safetensors")
    assert read_header(out).metadata["run"] == ema.run
    path = tmp_path / "ema-step00000001-0.050.safetensors"
    (tmp_path / "best.safetensors").write_bytes(path.read_bytes())
    odd = {"run": ema.run, "step": "many"}
    save_file({"w": torch.ones(2)}, tmp_path / "ema-step00000001-0.2.safetensors", odd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ema.model, ema, 3)
    names = {name for name in folder_bytes(tmp_path) if not name.startswith("ema-step0000000")}
    assert names == {"out.safetensors", "best.safetensors"}
    assert {step for _, step in snapshot_files.own_snapshots(tmp_path, ema.run)} == {4, 5, 6}
    assert (tmp_path / "ema-step00000001-0.2.safetensors").exists()


def test_a_file_that_is_not_the_runs_is_not_replaced(tmp_path: Path) -> None:
    ema = tracker(tmp_path)
    ema.update()
    path = tmp_path / "ema-step00000002-0.050.safetensors"
    for metadata in ({"run": "another", "step": "2"}, {}, {"run": ema.run, "posthoc": "{}"}):
        save_file({"w": torch.ones(2)}, path, metadata)
        before = path.read_bytes()
        resumed = copy.deepcopy(ema)
        with pytest.warns(RuntimeWarning, match=r"no snapshot of step 2: .*isn't this run's"):
            assert [each.name for each in _checkpointed(resumed)] == [
                "ema-step00000002-0.100.safetensors"
            ]
        assert path.read_bytes() == before
        path.unlink()
        (tmp_path / "ema-step00000002-0.100.safetensors").unlink()
        ema.load_state_dict(ema.state_dict())
        ema.update(1)
        ema.checkpoint()


def _checkpointed(ema: PostHocEMA) -> list[Path]:
    ema.checkpoint_every = None
    lock = ema._claim
    lock.sure = True
    ema.folder = Path(ema.folder)
    lock.folder = ema.folder
    ema.update()
    return ema.checkpoint()


# Resuming


def states(ema: PostHocEMA, at: int, up_to: int) -> dict[str, Any]:
    train(ema.model, ema, at)
    state = copy.deepcopy(ema.state_dict())
    train(ema.model, ema, up_to - at)
    ema.close()
    return state


def test_later_snapshots_are_refused_or_set_aside(tmp_path: Path) -> None:
    ema = tracker(tmp_path, checkpoint_every=10)
    state = states(ema, 50, 80)
    before = folder_bytes(tmp_path)
    resumed = tracker(tmp_path, checkpoint_every=10)
    resumed.load_state_dict(state)
    message = "this run up to step 80, and it resumes at step 50.*later='set aside'"
    for _ in range(2):
        with pytest.raises(UsageError, match=message):
            resumed.update()
    assert folder_bytes(tmp_path) == before
    place = tmp_path / OTHER_RUNS / ema.run
    for number in range(1, 4):  # and nothing that was set aside is lost
        again = tracker(tmp_path, checkpoint_every=10, later="set aside")
        again.load_state_dict(state)
        later = {
            path.name: each
            for path in tmp_path.glob("*-step000000[678]*")
            if (each := path.read_bytes())
        }
        with pytest.warns(RuntimeWarning) as caught:
            train(again.model, again, 20)
        there = place if number == 1 else place.with_name(f"{place.name}.{number}")
        assert str(caught[0].message).endswith(f"after that are now in {there}")
        assert steps(tmp_path) == {10, 20, 30, 40, 50, 60, 70}
        assert folder_bytes(there) == later
        assert steps(there) == ({60, 70, 80} if number == 1 else {60, 70})
        again.close()
    assert steps(place) == {60, 70, 80}
    with pytest.raises(ValueError, match="later 'ask'"):
        tracker(tmp_path, later="ask")


def test_the_step_of_the_state_itself_is_no_later_one(tmp_path: Path) -> None:
    ema = tracker(tmp_path)
    state = states(ema, 3, 3)
    resumed = tracker(tmp_path)
    resumed.load_state_dict(state)
    resumed.update()
    assert steps(tmp_path) == {1, 2, 3, 4}


def test_a_state_that_is_saved_has_its_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from time import sleep

    write = snapshot_files.write_snapshot

    def slow(snapshot: Any) -> list[str]:
        sleep(0.2)
        return write(snapshot)

    monkeypatch.setattr(writer, "write_snapshot", slow)
    ema = tracker(tmp_path, background=True)
    ema.update()
    ema.state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_synthesize_and_lend_write_nothing(tmp_path: Path) -> None:
    ema = tracker(tmp_path)
    train(ema.model, ema, 4)
    for path in tmp_path.glob("*.safetensors"):
        path.chmod(0o444)
    names, written = set(os.listdir(tmp_path)), tmp_path.stat().st_mtime_ns
    ema.synthesize(0.07)
    with ema.lend(0.07):
        pass
    assert set(os.listdir(tmp_path)) == names
    assert tmp_path.stat().st_mtime_ns == written


def test_the_note_says_who(tmp_path: Path) -> None:
    ema = tracker(tmp_path)
    ema.update()
    note = json.loads((tmp_path / LOCK).read_text())
    assert (note["run"], note["process"]) == (ema.run, os.getpid())
