"""Writing a run's snapshots, in a thread if asked to, without ending the training when it fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError
from posthoc_cli.storage.stores import is_folder
from posthoc_cli.training.chains import Chain, Earlier, profile_of
from posthoc_cli.training.sharded import Parts
from posthoc_cli.training.snapshot_files import (
    SnapshotToSave,
    metadata_of,
    own_snapshots,
    remove_old_snapshots,
    write_difference,
    write_snapshot,
)


class SnapshotWriter:
    """Writes the snapshots of a run, in a thread if asked to.

    `failures` has a message for everything that went wrong: training must go on. The `claim` on
    the folder is held for as long as something is being written.
    """

    def __init__(self, claim: object, chain: Chain | None = None) -> None:
        self.claim = claim
        self.chain = chain
        self.parts: Parts | None = None
        self.failures: list[str] = []
        self._overflowed: set[str] = set()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.wait()  # a thread can't be copied
        return dict(self.__dict__)

    def wait(self) -> None:
        """Wait until the thread, if there is one, is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def start(self, snapshots: Sequence[SnapshotToSave], keep: int | None) -> None:
        """Begin to `write` in a thread."""

        def write() -> None:
            try:
                self.write(snapshots, keep)
            except Exception as error:  # nobody would see it in a thread, and training goes on
                self.failures.append(f"no snapshots of step {snapshots[0].step}: {error!r}")

        self._thread = threading.Thread(target=write, name="posthoc snapshots")
        self._thread.start()

    def write(self, snapshots: Sequence[SnapshotToSave], keep: int | None) -> list[Path]:
        """Write the snapshots of one step; returns the paths of those that could be written.

        Unless `keep` is None, snapshots of this run older than its newest `keep` steps are removed;
        of chains, those that are older as a whole.
        """
        if self.parts is not None and self.parts.send:
            try:
                written, failures = self.parts.written_by_first(
                    snapshots, lambda whole: self._write_files(whole, keep)
                )
            except Exception as error:  # of any process, in all
                written, failures = [], [f"no snapshots of step {snapshots[0].step}: {error!r}"]
            self.failures += failures
            return written
        if self.parts is not None:
            written, failures, overflowing = self.parts.write(snapshots, keep)
            self.failures += failures
            self._warn_of_infinite(overflowing)
            return written
        written, failures = self._write_files(snapshots, keep)
        self.failures += failures
        return written

    def _write_files(
        self, snapshots: Sequence[SnapshotToSave], keep: int | None
    ) -> tuple[list[Path], list[str]]:
        """Write snapshots in this process alone; returns what could be written, and messages."""
        failures, self.failures = self.failures, []
        written: list[Path] = []
        earlier = self._earlier(snapshots[0])
        for snapshot in snapshots:
            # Of a chain the others are differences to the first, and nothing without it.
            leading = self.chain is not None and snapshot is snapshots[0]
            missing = f"no snapshot{'s' if leading else ''} of step {snapshot.step}"
            try:
                infinite = []
                if self.chain is None:
                    infinite = write_snapshot(snapshot)
                else:
                    which = snapshot.step, profile_of(snapshot.metadata)
                    write_difference(snapshot, self.chain.bases(earlier, *which), self.chain)
                    self.chain.note(earlier, *which, snapshot.path)
            except (MachineError, SnapshotError, UsageError) as error:
                problem = str(error)
                if isinstance(error, UsageError):
                    problem = (
                        f"{snapshot.path}: a file that isn't this run's has its place; move it "
                        "away or choose another folder"
                    )
                self.failures.append(f"{missing}: {problem}")
                if leading:
                    break
                continue
            written.append(snapshot.path)
            self._warn_of_infinite([(name, snapshot.path) for name in infinite])
        if keep is not None and len(written) == len(snapshots):
            first = snapshots[0]
            self.failures += remove_old_snapshots(first.folder, first.run, first.step, keep)
        told, self.failures = self.failures, failures
        return written, told

    def _warn_of_infinite(self, found: Sequence[tuple[str, Path]]) -> None:
        self.failures += [
            f"tensor {name!r} has values that are not finite in float16, first in "
            f"{path.name}; if they are large, give dtype=torch.bfloat16"
            for name, path in found
            if name not in self._overflowed
        ]
        self._overflowed.update(name for name, _ in found)

    def _earlier(self, main: SnapshotToSave) -> Earlier:
        """The chain that the snapshots of a step, `main` and others, go on with."""
        if self.chain is None:
            return []
        own = [each for each in own_snapshots(main.folder, main.run) if not is_folder(each[0])]
        before = [
            (step, profile_of(metadata_of(path)), path) for path, step in own if step < main.step
        ]
        try:
            return self.chain.earlier(before, profile_of(main.metadata), main.kinds)
        except PosthocError as error:
            self.failures.append(f"step {main.step} begins a new chain: {error}")
            return []
