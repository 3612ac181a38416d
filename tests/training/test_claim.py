"""One run, one folder: two trackers at once, restarts after kills, and what is set aside."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA, open_snapshots
from posthoc_cli.errors import UsageError
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.storage import locks
from posthoc_cli.storage.header import read_header
from posthoc_cli.training import claim, snapshot_files
from posthoc_cli.training.claim import LOCK, OTHER_RUNS
from tests.training.networks import folder_bytes, small, train

ROOT = Path(__file__).parents[2]

TRAINING = """
import sys, time
import torch
from torch import nn
from posthoc_cli import PostHocEMA

def main(folder, steps, seconds=0.0, **options):
    torch.manual_seed(0)
    ema = PostHocEMA(nn.Linear(3, 5), folder=folder, **{"checkpoint_every": 1, **options})
    sys.stdin.readline()  # so that several begin together
    for step in range(steps):
        ema.update()
        if step == 0:
            print(ema.run, flush=True)
        time.sleep(seconds)

"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_kill = pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed `tmp_path` and has written a snapshot."""
    code = TRAINING + f"main({str(tmp_path)!r}, 1)\nsys.stdin.readline()"
    with start(code) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline()
        yield process
        process.kill()


def tracker(folder: Path, **options: Any) -> PostHocEMA:
    return PostHocEMA(small(), folder=folder, **{"checkpoint_every": 1, **options})


def runs(folder: Path) -> set[str | None]:
    return {read_header(path).metadata.get("run") for path in folder.glob("*.safetensors")}


def steps(folder: Path) -> set[int]:
    return {each.step for each in read_folder(folder).usable()}


# Two at once


PAIRS = """
for number in range(10):
    try:
        main(f"{sys.argv[1]}/{number}", 3, keep=2)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        continue
"""


@pytest.mark.usefixtures("unmeasured")
def test_of_two_processes_that_start_at_once_one_goes_on(tmp_path: Path) -> None:
    """Ten pairs: each tracker is kept to the end, as the one of a long training is."""
    code = TRAINING.replace("    for step in", "    kept.append(ema)\n    for step in") + PAIRS
    code = code.replace("def main", "kept = []\ndef main") + "sys.stdin.readline()\n"
    with start(code, tmp_path) as one, start(code, tmp_path) as other:
        lines: dict[int, list[str]] = {0: [], 1: []}
        for number in range(10):
            for process in (one, other):
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            for index, process in enumerate((one, other)):
                assert process.stdout is not None
                lines[index].append(process.stdout.readline().strip())
            texts = [lines[0][number], lines[1][number]]
            refused = [text for text in texts if text.startswith("UsageError: ")]
            assert len(refused) == 1, texts
            assert "another training" in refused[0]
            assert "choose another folder" in refused[0]
            (run,) = set(texts) - set(refused)
            lines[0][number] = lines[1][number] = run
        for process in (one, other):
            _, err = process.communicate("\n", timeout=60)
            assert process.returncode == 0, err
    for number, run in enumerate(lines[0]):
        assert runs(tmp_path / str(number)) == {run}
        assert steps(tmp_path / str(number)) == {2, 3}
        assert not (tmp_path / str(number) / LOCK).exists()


def test_who_has_the_folder_is_said_and_its_end_frees_it(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    ema = tracker(tmp_path, overwrite=True)
    before = folder_bytes(tmp_path)
    with pytest.raises(UsageError, match=rf"another training \(process {holder.pid} on "):
        ema.update()
    assert folder_bytes(tmp_path) == before
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()  # nobody has it any more
    with pytest.warns(RuntimeWarning, match="another run's"):
        ema.update()
    assert runs(tmp_path) == {ema.run}
    ema.close()
    assert not (tmp_path / LOCK).exists()


def test_trackers_of_one_process(tmp_path: Path) -> None:
    one, elsewhere = tracker(tmp_path / "a"), tracker(tmp_path / "b")
    one.update()
    elsewhere.update()
    (tmp_path / "link").symlink_to("a", target_is_directory=True)
    other = tracker(tmp_path / "link", overwrite=True)
    with pytest.raises(UsageError, match="another tracker in this process.*close"):
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
    for _ in range(2):
        with pytest.raises(UsageError, match="another tracker in this process"):
            old.update()
    new.update()
    old.load_state_dict(new.state_dict())
    old.update()
    with pytest.raises(UsageError, match="another tracker in this process"):
        new.update()
    assert steps(tmp_path) == {1, 2, 3, 4}


def test_copies_have_no_claim(tmp_path: Path) -> None:
    ema = tracker(tmp_path, background=True)
    ema.update()
    pickled = pickle.dumps(ema)
    copied = copy.deepcopy(ema)
    ema.update()
    del copied
    again = pickle.loads(pickled)
    del again
    stranger = tracker(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="another tracker"):
        stranger.update()
    ema.update()
    code = TRAINING + "import pickle\npickle.load(open(sys.argv[1], 'rb')).update()"
    (tmp_path / "ema.pkl").write_bytes(pickled)
    with start(code, tmp_path / "ema.pkl") as process:
        _, err = process.communicate(timeout=60)
    assert f"UsageError: {tmp_path}: another training (process {os.getpid()}" in err


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

    monkeypatch.setattr(snapshot_files, "write_snapshot", slow)
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
    with pytest.raises(UsageError, match="'new.safetensors'"):
        ema.update()


# Several ranks


RANKS = """
import sys, time
import torch
import torch.distributed as dist
from torch import nn
from posthoc_cli import PostHocEMA

folder, meet, rank, scene = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Linear(3, 5))
dist.barrier()
begin = time.monotonic()
if scene == "first alone":
    if rank == 0:
        ema = PostHocEMA(model, folder=folder, checkpoint_every=1, overwrite=True)
        ema.update()
    dist.barrier()
    print(f"{time.monotonic() - begin:.3f} done")
    sys.exit()
if rank == 1:
    time.sleep(0.3)  # the first must not be gone before it has been heard
ema = PostHocEMA(model, folder=folder, checkpoint_every=1)
try:
    ema.update()
except Exception as error:
    print(f"{time.monotonic() - begin:.3f} {type(error).__name__}: {error}", flush=True)
    import os; os._exit(0)
dist.barrier()
print(f"{time.monotonic() - begin:.3f} done")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(sys.platform == "win32", reason="file:// rendezvous")
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("scene", ["another run", "claimed", "nothing", "first alone"])
def test_all_ranks_hear_the_verdict(scene: str, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    ema = tracker(folder)
    if scene != "nothing":
        ema.update()
    if scene != "claimed":
        ema.close()
    meet = f"file://{tmp_path}/meet"
    processes = [start(RANKS, folder, meet, rank, scene) for rank in range(2)]
    lines = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        lines.append(out.split(" ", 1))
    assert lines[0][1] == lines[1][1]
    expected = {"another run": "holds another run's", "claimed": "another training (process"}
    assert expected.get(scene, "done") in lines[0][1]
    assert max(float(seconds) for seconds, _ in lines) < 5


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
    # The first run goes on elsewhere and comes back: nothing that was set aside is replaced.
    for path in place.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    third = tracker(tmp_path, overwrite=True)
    with pytest.warns(RuntimeWarning, match="another run's"):
        third.update()
    assert len(folder_bytes(place)) == 20 - len(folder_bytes(tmp_path)) + 3


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
    for _ in range(3):  # and nothing grows
        again = tracker(tmp_path, checkpoint_every=10, later="set aside")
        again.load_state_dict(state)
        place = tmp_path / OTHER_RUNS / ema.run
        with pytest.warns(RuntimeWarning) as caught:
            train(again.model, again, 20)
        assert "after that are now in " + str(place) in str(caught[0].message)
        assert steps(tmp_path) == {10, 20, 30, 40, 50, 60, 70}
        assert steps(place) == {60, 70, 80}
        again.close()
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

    monkeypatch.setattr(snapshot_files, "write_snapshot", slow)
    ema = tracker(tmp_path, background=True)
    ema.update()
    ema.state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from posthoc_cli import PostHocEMA
from posthoc_cli.storage.atomic import AtomicFile
from tests.training.networks import small, train

folder, at = Path(sys.argv[1]), int(sys.argv[2])
background = sys.argv[3] == "True"
ema = PostHocEMA(small(), folder=folder / "snapshots", checkpoint_every=2, later="set aside",
                 background=background, keep=3)
if (folder / "state.pt").exists():
    state = torch.load(folder / "state.pt", weights_only=True)
    ema.model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
writes = 0
write_at = AtomicFile.write_at

def counted(self, offset, data):
    global writes
    writes += 1
    if writes == at:
        os.kill(os.getpid(), signal.SIGKILL)
    write_at(self, offset, data)

AtomicFile.write_at = counted
while ema.step < 12:
    train(ema.model, ema, 1)
    if ema.step % 3 == 0:
        torch.save({"model": ema.model.state_dict(), "ema": ema.state_dict()}, folder / "new.pt")
        os.replace(folder / "new.pt", folder / "state.pt")
"""


@needs_kill
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("background", [False, True])
def test_killed_and_resumed_it_is_as_if_undisturbed(background: bool, tmp_path: Path) -> None:
    """Killed in the middle of a snapshot, again and again: the same files, and nothing beside."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + KILLED
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    with start(code, tmp_path / "undisturbed", 0, background) as process:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    for at in (8, 13, 17, 0):
        with start(code, tmp_path / "killed", at, background) as process:
            _, err = process.communicate(timeout=60)
            assert process.returncode == (-signal.SIGKILL if at else 0), err
        left = [each for each in os.listdir(tmp_path / "killed" / "snapshots") if "tmp" in each]
        assert len(left) == (1 if at else 0)
    one, other = (tmp_path / name / "snapshots" for name in ("undisturbed", "killed"))
    assert steps(one) == {8, 10, 12}
    assert sorted(folder_bytes(one)) == sorted(folder_bytes(other))
    for path in one.glob("*.safetensors"):
        state = load_file(other / path.name)
        assert all(torch.equal(state[name], value) for name, value in load_file(path).items())
    assert {each for each in os.listdir(other) if each.startswith(".")} <= {LOCK}
    for place in (other / OTHER_RUNS).glob("*"):
        assert len(list(place.iterdir())) <= 12


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
