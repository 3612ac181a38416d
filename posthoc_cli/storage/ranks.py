"""Ranks: processes, on one machine or several, that share one call.

Rank 0 runs the call and hands out tasks; the others `serve`: they do their part of each task. A
task is a module's generator function, called with the rank's `Part` and what rank 0 gave `share`.
What it yields is sent to all ranks, each of which goes on with the list of what all have yielded;
what it returns is rank 0's answer. Without `join`, a process is rank 0 of one and does all itself:
the code is the same.

The ranks find each other as torch.distributed does, by its environment variables. Messages go by
gloo, which notices at once when a process ends. What must reach a rank at work, or tell that a
machine is lost, goes through the store by which they met: each rank writes there twice a second how
far it is. What is sent is pickled, as torch.distributed itself does between the ranks of a job.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError
from posthoc_cli.storage import workers

MEETING = timedelta(seconds=120)
"""How long the ranks wait for each other when they start."""

BEAT = 0.5
"""Seconds between two signs of life."""

PATIENCE = 36
"""Beats without a sign of life after which a rank counts as lost."""

_GRACE = 16
"""Beats that a rank has to end by itself once another is lost."""

_FOREVER = timedelta(days=30)
_TO_STOP = 10.0
"""Seconds that the others have to stop once a rank was interrupted."""


def _ignore(count: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a task a rank does: that of `rank` of `size`.

    `count` is to be told, from any thread, the bytes just read; it stops this rank when another has
    failed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    count: Callable[[int], None] = _ignore

    def __str__(self) -> str:
        return f"rank {self.rank} (on {socket.gethostname()})"

    def device(self, name: str) -> str:
        """The device that is meant by `name` on this rank: of several GPUs each has its own."""
        if name != "cuda" or self.size == 1:
            return name
        import torch

        return f"cuda:{self.local_rank % max(torch.cuda.device_count(), 1)}"


Running = Generator[Any, list[Any], Any]
"""A task under way."""


class _Stopped(Exception):
    """Another rank has failed."""


class _Left(BaseException):
    """Rank 0 has ended; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


_group: _Group | None = None
_calls = itertools.count()


def join(
    rank: int,
    size: int,
    local_rank: int,
    arguments: Sequence[str],
    tell: Callable[[PosthocError], object],
) -> None:
    """Meet the other ranks of this call, which must have the same `arguments`.

    `tell` is called, from another thread, with the trouble of a process that can't end by itself.
    Raises MachineError when the others don't come, UsageError when they came for another call.
    """
    global _group
    _group = _Group(rank, size, local_rank, tell)
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
        with contextlib.closing(task(Part(count=progress or _ignore), *arguments)) as running:
            return [_alone(running)]
    return _group.share(task, arguments, progress or _ignore)


def _alone(running: Running) -> Any:
    try:
        value = next(running)
        while True:
            value = running.send([value])
    except StopIteration as done:
        return done.value


def serve() -> int:
    """On any rank but the first: do tasks until rank 0 ends; returns its exit code.

    Raises MachineError when a rank is lost.
    """
    assert _group is not None
    return _group.serve()


def end(code: int) -> None:
    """On rank 0: tell the others that the call has ended."""
    if _group is not None:
        _group.end(code)


def leave() -> bool:
    """Part from the others; whether it is for this rank to tell what the trouble is."""
    global _group
    if _group is None:
        return False
    try:
        return _group.leave()
    finally:
        _group = None


class _Group:
    """The ranks, as one of them sees them."""

    def __init__(
        self, rank: int, size: int, local_rank: int, tell: Callable[[PosthocError], object]
    ) -> None:
        from torch.distributed import ProcessGroupGloo
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.size, self._local_rank = rank, size, local_rank
        self._tell = tell
        self._number = 0  # of tasks handed out
        self._counted = 0  # bytes read for the task by this rank
        self._told = [0] * size  # and by each rank, as rank 0 has told it on
        self._progress: Callable[[int], None] = _ignore
        self._lock = threading.Lock()
        self._stop, self._over = threading.Event(), threading.Event()
        self._beats = [0] * size
        self._silent = [0] * size
        self._rounds = 0
        self._ended: int | None = None
        self._noticed = self._broken = self._alone = False
        self.trouble: PosthocError | None = None
        try:
            store, *_ = next(rendezvous("env://", rank, size, timeout=MEETING))
            self._store = PrefixStore(f"posthoc/{next(_calls)}", store)
            self._store.set(f"beat/{rank}", "0 0 0")
            self._store.set(f"here/{rank}", "")
            self._store.wait([f"here/{each}" for each in range(size)], MEETING)
            # Not torch's default group, which is the user's own to make.
            self._gloo: Any = ProcessGroupGloo(self._store, rank, size, _FOREVER)
        except (RuntimeError, ValueError, OSError) as error:
            where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            why = str(error).partition("\n")[0].partition(". ")[0]
            raise MachineError(
                where,
                f"the {size} ranks didn't meet there ({why})",
                "start all of them, with an address that each machine reaches",
            ) from error
        self._threads = [
            threading.Thread(target=run, name="posthoc-ranks", daemon=True)
            for run in (self._beat, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def meet(self, arguments: Sequence[str]) -> None:
        """Check that all ranks were given the same; share the processors of a machine."""
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        mine = list(arguments), os.getcwd(), (socket.gethostname(), cpus)
        theirs = self._exchange(mine)
        for rank, (given, _, _) in enumerate(theirs):
            if given != theirs[0][0]:
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
        self._catch_up([count for count, _ in done])
        return [value for _, value in done]

    def serve(self) -> int:
        try:
            while True:
                self._begin(_ignore)
                message = self._broadcast(b"", 0)
                if message.startswith(b"end"):
                    return int(message[3:])
                with contextlib.suppress(Exception):  # rank 0 has it, and tells
                    self._drive(self._start(message))
        except _Left as left:
            return left.code
        except (KeyboardInterrupt, SystemExit):
            # As a rule all are interrupted, and rank 0 is to be the first to end.
            until = time.monotonic() + _TO_STOP
            while self._ended is None and self.trouble is None and time.monotonic() < until:
                time.sleep(0.01)
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
                    with contextlib.suppress(_Stopped):
                        self._exchange((kind, answer), _TO_STOP)
                    raise own
                told = self._exchange((kind, answer))
                if own is not None and not isinstance(own, _Stopped):
                    raise own
                for rank, (kind, answer) in enumerate(told):
                    if kind == "fails" and answer is not None and rank != self.rank:
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
            raise _Stopped

    def _catch_up(self, counts: Sequence[int]) -> None:
        """Tell the progress that the other ranks have made."""
        with self._lock:
            told = list(map(max, counts, self._told))
            more = sum(told[1:]) - sum(self._told[1:])
            self._told, progress = told, self._progress
        if more:
            progress(more)

    def _tell_failed(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"failed/{self._number}", "")

    def end(self, code: int) -> None:
        if self._broken or self.trouble is not None or code > 128:  # the others may be, too
            with contextlib.suppress(RuntimeError):
                self._store.set("end", str(code))
            return
        self._begin(_ignore)
        self._broadcast(b"end%d" % code, 0)

    def leave(self) -> bool:
        first = self.rank == 1 or self._local_rank == 0
        with contextlib.suppress(RuntimeError):
            if self._alone:
                raise RuntimeError
            if self.trouble is not None:
                first = self._store.add("told", 1) == 1
            self._store.add("left", 1)
            # The store may end with rank 0: the others are to be gone, unless they are lost.
            until = time.monotonic() + (2.0 if self.trouble else 5.0)
            while self.rank == 0 and self._store.add("left", 0) < self.size:
                if time.monotonic() > until:
                    break
                time.sleep(0.01)
        self._over.set()
        for thread in self._threads:
            thread.join(BEAT)
        return first

    # Messages

    def _exchange(self, value: Any, seconds: float | None = None) -> list[Any]:
        """The values of all ranks, in their order."""
        import torch

        data = pickle.dumps(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        size = torch.tensor([len(data)], dtype=torch.int64)
        self._wait(lambda: self._gloo.allgather([sizes], [size]), seconds)
        return [
            pickle.loads(self._send(data if at == self.rank else b"", at, int(size)))
            for at, size in enumerate(sizes)
        ]

    def _broadcast(self, data: bytes, source: int) -> bytes:
        import torch

        size = torch.tensor([len(data)], dtype=torch.int64)
        self._wait(lambda: self._gloo.broadcast(size, source))
        return self._send(data, source, int(size))

    def _send(self, data: bytes, source: int, size: int) -> bytes:
        import torch

        content = bytearray(data) or bytearray(size)
        tensor = torch.frombuffer(content, dtype=torch.uint8)
        self._wait(lambda: self._gloo.broadcast(tensor, source))
        return bytes(content)

    def _wait(self, begin: Callable[[], Any], seconds: float | None = None) -> None:
        """Have a message sent or received, in the open for signals and for the loss of a rank."""
        pause, until = 0.0005, time.monotonic() + (seconds or float("inf"))
        try:
            work = begin()
            while not work.is_completed():
                self._check()
                if time.monotonic() > until:
                    self._broken = True
                    raise _Stopped
                time.sleep(pause)
                pause = min(1.2 * pause, 0.02)
            work.wait()
        except RuntimeError:
            self._broken = True
            self._find_lost()
        except BaseException:
            self._broken = True
            raise

    # Signs of life

    def _check(self) -> None:
        if self.trouble is not None:
            self._noticed = True
            raise self.trouble
        if self._ended is not None:
            self._noticed = True
            raise _Left(self._ended)

    def _find_lost(self) -> None:
        """Raise what tells which rank is lost, once a message couldn't be sent."""
        self._tell_failed()
        before = list(self._beats)
        for _ in range(6):
            time.sleep(BEAT)
            self._check()
        while self.rank and self._beats[0] != before[0]:  # rank 0 tells, as soon as it notices
            before = list(self._beats)
            for _ in range(6):
                time.sleep(BEAT)
                self._check()
        watched = range(1, self.size) if self.rank == 0 else [0]
        self._lose([rank for rank in watched if self._beats[rank] == before[rank]])
        self._check()

    def _lose(self, ranks: Sequence[int]) -> None:
        which = f"rank {ranks[0]}" if ranks else "a rank"
        more = f", and so {'has' if len(ranks) == 2 else 'have'} {len(ranks) - 1} more"
        self.trouble = self.trouble or MachineError(
            which,
            f"has ended, or its machine can't be reached{more if len(ranks) > 1 else ''}",
            "see what ended it, such as too little memory, and run the command again",
        )

    def _beat(self) -> None:
        """Twice a second: write how far this rank is, and read how far the others are."""
        watched = range(1, self.size) if self.rank == 0 else [0]
        while not self._over.wait(BEAT):
            with contextlib.suppress(RuntimeError):  # then the round doesn't count
                self._beats[self.rank] += 1
                own = self._beats[self.rank], self._number, self._counted
                self._store.set(f"beat/{self.rank}", " ".join(map(str, own)))
                counts = [0] * self.size
                keys = [f"beat/{rank}" for rank in watched]
                for rank, said in zip(watched, self._store.multi_get(keys), strict=True):
                    beat, number, count = map(int, said.split())
                    self._silent[rank] = 0 if beat != self._beats[rank] else self._silent[rank] + 1
                    self._beats[rank] = beat
                    counts[rank] = count if number == self._number else 0
                if self.rank == 0:
                    self._catch_up(counts)
                if self._store.check([f"failed/{self._number}"]):
                    self._stop.set()
                if self._store.check(["end"]):
                    self._ended = int(self._store.get("end"))
                self._rounds += 1

    def _watch(self) -> None:
        """End what can't go on: a rank is lost, or the store that all go by."""
        rounds = still = overdue = 0
        while not self._over.wait(BEAT):
            still = still + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            lost = [rank for rank, silent in enumerate(self._silent) if silent >= PATIENCE]
            if lost or still >= PATIENCE:
                self._alone = self._alone or not lost
                self._lose(lost or [0])
            if self.trouble is None and self._ended is None:
                continue
            overdue += 1
            if overdue == 2 and not self._noticed:  # the main thread is at work, or waits
                self._stop.set()
                with contextlib.suppress(AttributeError):  # Windows
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if overdue > _GRACE:
                if self.trouble is not None and not self._noticed:
                    self._tell(self.trouble)
                os._exit(1 if self._ended is None else self._ended)


def _portable(error: BaseException) -> BaseException | None:
    """What is sent of an error; None where another rank's is the cause."""
    if isinstance(error, _Stopped):
        return None
    if not isinstance(error, Exception):  # an interrupt
        return type(error)(*error.args)
    for kind in (MachineError, UsageError, SnapshotError):
        if isinstance(error, kind):
            return kind(error.subject, error.problem, error.remedy)
    if isinstance(error, MemoryError):
        return MemoryError()
    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.__cause__ = RuntimeError("".join(traceback.format_exception(error)))
    return told
