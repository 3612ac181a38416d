"""Ranks: processes, on one machine or several, that share one call.

Rank 0 runs the call and hands out tasks; the others `serve`: they do their part of each task. A
task is a module's generator function, called with the rank's `Part` and what rank 0 gave `share`.
What it yields is sent to all ranks, each of which goes on with the list of what all have yielded;
what it returns is rank 0's answer. Without `join`, a process is rank 0 of one and does all itself:
the code is the same.

The ranks find each other as torch.distributed does, by its environment variables. What is sent is
pickled, as torch.distributed itself does between the ranks of a job.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError
from posthoc_cli.storage import workers
from posthoc_cli.storage.header import TensorIndex
from posthoc_cli.storage.peers import Peers, Stopped
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.signs import ignore
from posthoc_cli.storage.stores import exists

TO_STOP = 10.0
"""Seconds that the others have to stop once a rank was interrupted."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a task a rank does: that of `rank` of `size`.

    `count` is to be told, from any thread, the bytes just read; it stops this rank when another has
    failed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    count: Callable[[int], None] = ignore

    def __str__(self) -> str:
        return f"rank {self.rank} (on {socket.gethostname()})"

    def device(self, name: str) -> str:
        """The device that is meant by `name` on this rank: of several GPUs each has its own."""
        if name != "cuda" or self.size == 1:
            return name
        import torch

        return f"cuda:{self.local_rank % max(torch.cuda.device_count(), 1)}"


def check_there(part: Part, sources: Iterable[TensorIndex]) -> None:
    """Raise UsageError for a snapshot that another rank than the first doesn't see."""
    for path in (file.path for source in sources for file in source.files):
        if part.rank and not isinstance(path, Url) and not exists(path):
            raise UsageError(
                str(path), f"isn't there for {part}", "put the snapshots where all ranks see them"
            )


Running = Generator[Any, list[Any], Any]
"""A task under way."""


_group: _Group | None = None
_parted: list[_Group] = []
"""Groups that are done with: to give one up, gloo waits for its messages, be a rank lost or not."""


def join(
    rank: int,
    size: int,
    local_rank: int,
    address: tuple[str, int],
    arguments: Sequence[str],
    tell: Callable[[PosthocError], object],
) -> None:
    """Meet the other ranks of this call at `address`; they must have the same `arguments`.

    `tell` is called, from another thread, with the trouble of a process that can't end by itself.
    Raises MachineError when the others don't come, UsageError when they came for another call,
    Left when rank 0 has ended.
    """
    global _group
    _group = _Group(rank, size, local_rank, tell)
    _group.connect(*address)
    _group.meet(arguments)


def several() -> bool:
    """Whether this call is shared."""
    return _group is not None


def trouble() -> PosthocError | None:
    """Why this process can't go on, if a rank is lost."""
    return _group.trouble if _group else None


def share(
    task: Callable[..., Running],
    *arguments: Any,
    progress: Callable[[int], None] | None = None,
    together: bool = True,
) -> list[Any]:
    """Have all ranks do their part of a task; returns what each has returned.

    With `together` false rank 0 does it all. `progress` is called, from any thread, with the bytes
    that any rank has just read. Raises what the task does, on whichever rank; MachineError when one
    is lost.
    """
    if _group is None or not together:
        with contextlib.closing(task(Part(count=progress or ignore), *arguments)) as running:
            return [_alone(running)]
    return _group.share(task, arguments, progress or ignore)


def _alone(running: Running) -> Any:
    try:
        value = next(running)
        while True:
            value = running.send([value])
    except StopIteration as done:
        return done.value


def serve() -> NoReturn:
    """On any rank but the first: do tasks until rank 0 ends.

    Raises Left then, with its exit code; MachineError when a rank is lost.
    """
    assert _group is not None
    _group.serve()


def leave(code: int, error: PosthocError | None = None) -> bool:
    """Part from the others, whom rank 0 tells the exit code; returns whether to tell the error."""
    global _group
    if _group is None:
        return True
    _parted.append(_group)
    group, _group, workers.shared_by = _group, None, 1
    return group.leave(code, error)


def is_helper(environment: Mapping[str, str], names: Sequence[str]) -> bool:
    """Whether a program of Python that is a rank itself has started this one, as training scripts
    do: the variables of these `names` are not meant for us then. Known where there is /proc.

    A launcher within a rank, as a torchrun, says something else to what it starts than it was told.
    """
    ours = {name: environment.get(name) for name in names}
    try:
        pid = os.getppid()
        while True:
            said = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            theirs = dict(each.partition("=")[::2] for each in said)
            if ours != {name: theirs.get(name) for name in names}:
                return False
            if "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe")):
                return True
            status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            pid = int(status.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return False


class _Group(Peers):
    """Rank 0, which hands out tasks, or another, which does its part of them."""

    def meet(self, arguments: Sequence[str]) -> None:
        """Check that all ranks were given the same; share the processors of a machine."""
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        mine = list(arguments), os.getcwd(), (socket.gethostname(), cpus)
        theirs = self._exchange(mine)
        for rank, (given, _, _) in enumerate(theirs):
            if self.rank == 0 and given != theirs[0][0]:  # the others hear of it
                problem = f"was given other arguments than rank 0 ({' '.join(given)})"
                remedy = "give all ranks the same: they share one call"
                raise UsageError(f"rank {rank}", problem, remedy)
        with contextlib.suppress(OSError):
            os.chdir(theirs[0][1])  # so that relative paths mean the same
        workers.shared_by = sum(where == mine[2] for _, _, where in theirs)

    # Tasks

    def share(
        self,
        task: Callable[..., Running],
        arguments: Sequence[Any],
        progress: Callable[[int], None],
    ) -> list[Any]:
        message = pickle.dumps((task, arguments))
        self._begin(progress)
        self._broadcast(message, 0)
        part = Part(self.rank, self.size, self._local_rank, self._count)
        done = self._drive(task(part, *arguments))
        for rank, (count, _) in enumerate(done[1:], 1):
            self._catch_up(rank, count)
        return [value for _, value in done]

    def serve(self) -> NoReturn:
        try:
            while True:
                self._begin(ignore)
                message = self._broadcast(b"", 0)
                with contextlib.suppress(Exception):  # rank 0 has it, and tells
                    self._drive(self._start(message))
        except (KeyboardInterrupt, SystemExit) as interrupt:
            # As a rule all are interrupted, and rank 0 is to be the first to end.
            code = 130 if isinstance(interrupt, KeyboardInterrupt) else interrupt.code
            self._send_all("interrupted", code)
            with contextlib.suppress(TimeoutError):
                self._let_pass(lambda: False, TO_STOP)
            raise

    def _start(self, message: bytes) -> Running:
        task, arguments = pickle.loads(message)
        part = Part(self.rank, self.size, self._local_rank, self._count)
        return (yield from task(part, *arguments))

    def _begin(self, progress: Callable[[int], None]) -> None:
        self._check()
        with self._lock:
            self._number += 1
            self._counted, self._told, self._progress = 0, [0] * self.size, progress
            self._stop.clear()
            if self._number in self._failed:
                self._stop.set()

    def _drive(self, running: Running) -> list[Any]:
        """Do this rank's part beside the others; returns what each has counted and returned.

        Raises what was raised on this rank, or on the first that failed.
        """
        values: Any = None
        with contextlib.closing(running):
            while True:
                own: BaseException | None = None
                kind, answer = "yields", None
                try:
                    answer = running.send(values)
                except StopIteration as ended:
                    kind, answer = "returns", (self._counted, ended.value)
                except BaseException as error:
                    own, kind, answer = error, "fails", _portable(error)
                    self._tell_failed()
                if own is not None and not isinstance(own, Exception):  # interrupted
                    self._noticed = True
                    with contextlib.suppress(Stopped):
                        self._exchange((kind, answer), TO_STOP)
                    raise own
                told = self._exchange((kind, answer))
                if own is not None and not isinstance(own, Stopped):
                    raise own
                for rank, (kind, answer) in enumerate(told):
                    if kind == "fails" and answer is not None and rank != self.rank:
                        self._noticed = self._noticed or not isinstance(answer, Exception)
                        raise answer
                assert len({kind for kind, _ in told}) == 1, told
                values = [answer for _, answer in told]
                if kind == "returns":
                    return list(values)

    def _count(self, count: int) -> None:
        with self._lock:
            self._counted += count
        if self.rank == 0:
            self._progress(count)
        if self._stop.is_set():
            raise Stopped


def _portable(error: BaseException) -> BaseException | None:
    """What is sent of an error; None where another rank's is the cause."""
    if isinstance(error, Stopped):
        return None
    if not isinstance(error, Exception):  # an interrupt
        return type(error)(*error.args)
    for kind in (MachineError, UsageError, SnapshotError):
        if isinstance(error, kind):
            return kind(error.subject, error.problem, error.remedy)
    if isinstance(error, MemoryError):
        return MemoryError()
    place = traceback.extract_tb(error.__traceback__)[-1]
    name = os.path.basename(place.filename)
    return RuntimeError(f"{type(error).__name__}: {error} (on another rank, {name}:{place.lineno})")
