"""A tracker's claim on its folder: one run at a time writes there, and no two are mixed."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.errors import UsageError
from posthoc_cli.storage.locks import FileLock, own_lock, read_note, take_lock
from posthoc_cli.storage.metadata import RECIPE, RUN
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.shared import set_aside
from posthoc_cli.training.chains import chains
from posthoc_cli.training.snapshot_files import SnapshotHeader, headers, own_step

LOCK = ".posthoc-tracker.lock"
"""The file in a folder that is locked by the tracker that writes there."""

OTHER_RUNS = "other-runs"
"""The folder, in that of the snapshots, for those set aside: one folder for each run."""

LATER = ("refuse", "set aside")
"""What can be done with a run's snapshots that are later than the state it resumes from."""


class FolderClaim:
    """A tracker's claim, from its first update to its end, or that of its process.

    A copy has none: not a pickled one, and not that of a forked process.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.sure = False
        """Whether the system's locks keep all others away; if not, look again now and then."""
        self._lock: FileLock | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderClaim, ()

    def covers(self, folder: Path) -> bool:
        return self.folder is folder and (self._lock is None or self._lock.held)

    @property
    def lock_file(self) -> Path | None:
        return None if self._lock is None else self._lock.path

    def look_again(self) -> None:
        """Have everything checked anew, unless the lock is sure and where others look for it."""
        if not self.sure or (self._lock is not None and not self._lock.in_place):
            self.folder = None

    def begin_anew(self) -> None:
        """Have everything checked anew, for the run that goes on here from now on."""
        self.folder = None
        if self._lock is not None and not self._lock.held:
            self._lock = None

    def release(self) -> None:
        self.folder = None
        if self._lock is not None and self._lock.held:
            self._lock.release()
        self._lock = None

    def take(self, folder: Path, run: str, step: int, *, overwrite: bool, later: str) -> list[str]:
        """Claim `folder` for `run`, which is at `step`; returns what there is to be warned of.

        Raises UsageError when another tracker has it, or when it holds snapshots that this run's
        must not be mixed with; MachineError when those can't be set aside.
        """
        path = folder / LOCK
        self._lock = self._locked(path, run)
        self.sure = self._lock is not None and self._lock.sure
        try:
            found = headers(folder)
            messages = _check_others(folder, found, run, overwrite)
            messages += _check_later(folder, found, run, step, later)
        except BaseException:
            self.release()  # one that is refused keeps nobody away
            raise
        if self._lock is not None:
            note = {"run": run, "process": os.getpid(), "host": socket.gethostname()}
            self._lock.write_note(json.dumps(note).encode())
        return messages

    def _locked(self, path: Path, run: str) -> FileLock | None:
        """The lock; None where there are none. Raises UsageError when another has it."""
        if isinstance(path, Url):
            return None
        lock = self._lock
        if lock is not None and lock.held:
            if lock.path == path and lock.in_place:
                if not lock.sure and (not lock.retry() or read_note(path) not in (b"", lock.note)):
                    raise _taken(path)
                return lock
            self.release()
        here = _run_here(path)
        if here not in (None, run):
            gc.collect()  # a tracker that nobody has any more may wait for that
            here = _run_here(path)
        # Of two trackers of one run, as where it was resumed, the newer one goes on.
        if here is not None and (here != run or self._lock is not None):
            raise UsageError(
                str(path.parent),
                "another tracker in this process writes its snapshots here",
                "go on with that one, close() it, or choose another folder",
            )
        if (lock := own_lock(path)) is not None:
            return lock.pass_on()
        try:
            taken = take_lock(path)
        except OSError:  # nor can snapshots be written: a checkpoint warns of that
            return None
        if taken is None:
            raise _taken(path)
        return taken


def _run_here(path: Path) -> str | None:
    """The run that has the lock in this process."""
    lock = own_lock(path)
    return None if lock is None else str(_field(lock.note, "run"))


def _taken(path: Path) -> UsageError:
    note = read_note(path)
    process, host = (_field(note, name) for name in ("process", "host"))
    who = f" (process {process} on {host})" if process and host else ""
    return UsageError(
        str(path.parent),
        f"another training{who} writes its snapshots here",
        "end that one, or choose another folder",
    )


def _field(note: bytes, name: str) -> Any:
    try:
        return json.loads(note)[name]
    except (ValueError, KeyError, TypeError):
        return None


def _check_others(
    folder: Path, found: Sequence[SnapshotHeader], run: str, overwrite: bool
) -> list[str]:
    """Set the snapshots of other runs aside, or raise UsageError without `overwrite`.

    Files that don't say their run may be anything: they stay.
    """
    others: dict[str, list[Path]] = {}
    for path, metadata in found:
        if RECIPE not in metadata and metadata.get(RUN) != run:
            others.setdefault(metadata.get(RUN, ""), []).append(path)
    messages = []
    for other, paths in others.items():
        problem = f"holds another run's snapshots, such as '{paths[0].name}'"
        if not overwrite:
            raise UsageError(
                str(folder),
                problem,
                "choose another folder, load_state_dict() that run's state to go on with it, "
                "or give overwrite=True",
            )
        if not other:
            messages.append(f"{folder}: {problem}; move them away before you synthesize")
            continue
        paths = [path for chain in chains(found) for path in chain if path in paths]
        place = set_aside(paths, place_for(folder, other))
        messages.append(f"{folder}: {problem}; the {len(paths)} of run {other} are now in {place}")
    return messages


def _check_later(
    folder: Path, found: Sequence[SnapshotHeader], run: str, step: int, later: str
) -> list[str]:
    """Set this run's snapshots after `step` aside, or raise UsageError, as `later` says."""
    steps = {path: own_step(path, metadata, run) or 0 for path, metadata in found}
    paths = [path for path, its in steps.items() if its > step]
    if not paths:
        return []
    problem = f"holds snapshots of this run up to step {max(steps.values())}"
    if later == "refuse":
        raise UsageError(
            str(folder),
            f"{problem}, and it resumes at step {step}: the two would be mixed",
            "load_state_dict() a state of that step, or give later='set aside'",
        )
    last_first, along = [], []
    for chain in chains(found):
        later_ones = [path for path in chain if path in paths]
        last_first += later_ones  # killed meanwhile, it leaves none without its base
        along += [path for path in chain if path not in paths] if later_ones else []
    place = set_aside(last_first, place_for(folder, run), along)
    return [
        f"{folder}: {problem}, and it resumes at step {step}; the {len(paths)} after that are now "
        f"in {place}"
    ]


def place_for(folder: Path, run: str) -> Path:
    """Where snapshots of `run`, which is what a file says, are set aside."""
    return folder / OTHER_RUNS / (re.sub(r"[^0-9A-Za-z_-]", "_", run)[:64] or "unknown")
