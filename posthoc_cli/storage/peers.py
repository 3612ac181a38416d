"""The ranks of a call as one of them sees them: messages, and signs of life.

Messages go by gloo, which notices at once when a process ends. What must reach a rank at work, or
tell that a machine is lost, goes through the store by which they met: each rank writes there twice
a second how far it is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from posthoc_cli.errors import MachineError, PosthocError

MEETING = timedelta(seconds=120)
"""How long the ranks wait for each other when they start."""

BEAT = 0.5
"""Seconds between two signs of life."""

PATIENCE = 30
"""Beats without a sign of life after which a rank counts as lost."""

_IN_DOUBT = 6
"""Beats to wait for one of a rank that may have ended, and may only be busy."""

_GRACE = 12
"""Beats that a rank has to end by itself once another is lost."""

_FOREVER = timedelta(days=30)
TO_STOP = 10.0
"""Seconds that the others have to stop once a rank was interrupted."""


class Stopped(Exception):
    """Another rank has failed."""


class Left(BaseException):
    """Rank 0 has ended; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def ignore(count: int) -> None:
    pass


_calls = itertools.count()


class Peers:
    """The other ranks.

    `tell` is called, from another thread, with the trouble of a process that can't end by itself.
    """

    def __init__(
        self, rank: int, size: int, local_rank: int, tell: Callable[[PosthocError], object]
    ) -> None:
        self.rank, self.size, self._local_rank = rank, size, local_rank
        self._tell = tell
        self._number = 0  # of tasks handed out
        self._counted = 0  # bytes read for the task by this rank
        self._told = [0] * size  # and by each rank, as rank 0 has told it on
        self._progress: Callable[[int], None] = ignore
        self._lock = threading.Lock()
        self._stop, self._over = threading.Event(), threading.Event()
        self._beats = [0] * size
        self._silent = [0] * size
        self._turns = self._rounds = 0  # of `_beat`; in the latter the store has answered
        self._ended: int | None = None
        self._noticed = self._broken = self._alone = False
        self.trouble: PosthocError | None = None
        self._store: Any = None
        self._gloo: Any = None
        self._threads = [
            threading.Thread(target=run, name="posthoc-ranks", daemon=True)
            for run in (self._beat, self._watch)
        ]

    def connect(self) -> None:
        """Wait for the others; raises MachineError when they don't come."""
        # In a thread: what waits in torch heeds no signal.
        pool = ThreadPoolExecutor(1, thread_name_prefix="posthoc-meeting")
        meeting = pool.submit(self._connect)
        pool.shutdown(wait=False)
        until = time.monotonic() + MEETING.total_seconds()
        while not meeting.done():
            self._check()
            if time.monotonic() > until:  # torch may take several times as long
                raise self._not_met("no answer")
            time.sleep(0.01)
        meeting.result()

    def _connect(self) -> None:
        from torch.distributed import ProcessGroupGloo
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:
            store, *_ = next(rendezvous("env://", self.rank, self.size, timeout=MEETING))
            self._store = PrefixStore(f"posthoc/{next(_calls)}", store)
            self._store.set(f"beat/{self.rank}", "0 0 0")
            self._store.set(f"here/{self.rank}", "")
            self._store.wait([f"here/{each}" for each in range(self.size)], MEETING)
            for thread in self._threads:
                thread.start()
            # Not torch's default group, which is the user's own to make.
            self._gloo = ProcessGroupGloo(self._store, self.rank, self.size, _FOREVER)
        except (RuntimeError, ValueError, OSError) as error:
            why = str(error).partition("\n")[0].partition(". ")[0]
            raise self._not_met(why) from error

    def _not_met(self, why: str) -> MachineError:
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        remedy = "start all of them, with an address that each machine reaches"
        return MachineError(where, f"the {self.size} ranks didn't meet there ({why})", remedy)

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
                    raise Stopped
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

    def leave(self, *, failed: bool) -> bool:
        """End the signs of life; returns whether this rank is to tell why all have `failed`."""
        first = self.rank == 1 or self._local_rank == 0
        with contextlib.suppress(RuntimeError):
            if self._store is not None and not self._alone:
                if failed:
                    first = self._store.add("told", 1) == 1
                self._store.add("left", 1)
                # The store may end with rank 0: the others go first, unless they are lost.
                until = time.monotonic() + (2.0 if failed else 5.0)
                while self.rank == 0 and self._store.add("left", 0) < self.size:
                    if time.monotonic() > until:
                        break
                    time.sleep(0.01)
        self._over.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(BEAT)
        return first

    def _tell_failed(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"failed/{self._number}", "")

    def _check(self) -> None:
        if self.trouble is not None:
            self._noticed = True
            raise self.trouble
        if self._ended is not None:
            self._noticed = True
            raise Left(self._ended)

    def _find_lost(self) -> None:
        """Raise what tells which rank is lost, once a message couldn't be sent."""
        self._tell_failed()
        if self.rank:  # rank 0 tells, as soon as it notices, unless it is the one
            beat = -1
            while beat != self._beats[0]:
                beat = self._beats[0]
                self._let_pass(2 * _IN_DOUBT)
            self._lose([0])
        else:
            self._let_pass(2)  # what it may have written last is read by then
            before, silent = list(self._beats), list(range(1, self.size))
            for _ in range(4):
                self._let_pass(_IN_DOUBT)
                silent = [rank for rank in silent if self._beats[rank] == before[rank]]
                if len(silent) == 1:
                    break
            self._lose(silent)
        self._check()

    def _let_pass(self, beats: int) -> None:
        turns = self._turns + beats
        while self._turns < turns:
            self._check()
            time.sleep(0.01)

    def _lose(self, ranks: Sequence[int]) -> None:
        which = f"rank {ranks[0]}" if ranks else "a rank"
        more = f", and so {'has' if len(ranks) == 2 else 'have'} {len(ranks) - 1} more"
        self.trouble = self.trouble or MachineError(
            which,
            f"has ended, or its machine can't be reached{more if len(ranks) > 1 else ''}",
            "see what ended it, such as too little memory, and run the command again",
        )

    def _catch_up(self, counts: Sequence[int]) -> None:
        """Tell the progress that the other ranks have made."""
        with self._lock:
            told = list(map(max, counts, self._told))
            more = sum(told[1:]) - sum(self._told[1:])
            self._told, progress = told, self._progress
        if more:
            progress(more)

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
                if self.rank and self._store.check(["end"]):
                    self._ended = int(self._store.get("end"))
                self._rounds += 1
            self._turns += 1

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
