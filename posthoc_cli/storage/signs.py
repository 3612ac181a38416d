"""Signs of life: what ranks tell one another beside their work, by their connections to rank 0.

That one ends tells at once that a process has. Twice a second each says how far it is, so that a
machine that hangs is missed; what must reach a rank at work goes here, too.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from posthoc_cli.errors import MachineError, PosthocError
from posthoc_cli.storage.wires import Wire, listen, not_met, rank_of, seconds_since_start

TO_COME = 22.0
"""Seconds without one more rank after which those that haven't come are given up."""

SLOW_START = 4.0
"""Or so many times as long as the slowest of those that have come took: of slow disks."""

BEAT = 0.5
"""Seconds between two signs of life."""

PATIENCE = 30
"""Beats without a sign of life after which a rank counts as lost."""

_GRACE = 12
"""Beats that a rank has to end by itself once another is lost."""


class Left(BaseException):
    """Rank 0 has ended; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def ignore(count: int) -> None:
    pass


_LISTENING, _STRANGER = -1, -2
"""In the place of the rank of a connection: what awaits them, and one that has yet to say."""


class Signs:
    """The other ranks.

    `tell` is called, from another thread, with the trouble of a process that can't end by itself.
    """

    def __init__(
        self, rank: int, size: int, local_rank: int, tell: Callable[[PosthocError], object]
    ) -> None:
        self.rank, self.size, self._local_rank = rank, size, local_rank
        self._tell = tell
        self._number = 0  # of tasks handed out
        self._failed: set[int] = set()  # those that can't be done
        self._counted = 0  # bytes read for the task by this rank
        self._told = [0] * size  # and by each rank, as rank 0 has told it on
        self._progress: Callable[[int], None] = ignore
        self._lock = threading.Lock()
        self._stop, self._over = threading.Event(), threading.Event()
        self._wires: dict[int, Wire] = {}  # of rank 0 to all others, of these to rank 0
        self._silent: dict[int, int] = {}  # beats, of those from which there was one
        self._lost: set[int] = set()
        self._gone: set[int] = set()  # those, and others that have left
        self._ready: set[int] = set()  # those that have torch
        self._patience = TO_COME
        self._slowest, self._last_came = 0.0, time.monotonic()
        self._where = "the ranks"
        self._store_port: int | None = None
        self._interrupt, self._interrupted = 0, 0.0  # of another rank: the code, and since when
        self._ended: int | None = None
        self._noticed = False
        self.trouble: PosthocError | None = None
        self._gloo: Any = None
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()

    def _listen(self, port: int) -> int:
        listener = self._listener = listen(port)
        self._selector.register(listener, selectors.EVENT_READ, _LISTENING)
        self._last_came = time.monotonic()
        self._slowest = seconds_since_start()
        found: int = listener.getsockname()[1]
        return found

    def _begin_watch(self) -> None:
        threading.Thread(target=self._watch, name="posthoc-ranks", daemon=True).start()

    def _welcome(self, wire: Wire, message: list[Any]) -> None:
        """On rank 0: take one in that has come."""
        self._selector.unregister(wire)
        known = rank_of(message)
        if known is None:
            wire.close()
            return
        rank, size, started = known
        if self._ended is not None:
            self._gone.add(rank)
            wire.send("end", self._ended)
            return
        if size != self.size or not 0 < rank < size or rank in self._wires:
            wire.send("refused", f"rank {rank} of {size}", f"of {self.size}")
            return
        self._wires[rank] = wire
        self._selector.register(wire, selectors.EVENT_READ, rank)
        self._last_came, self._slowest = time.monotonic(), max(self._slowest, started)
        wire.send("welcome")

    def _let_pass(self, done: Callable[[], bool], seconds: float = float("inf")) -> None:
        until = time.monotonic() + seconds
        while not done():
            self._check()
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(0.01)

    def leave(self, code: int, error: PosthocError | None = None) -> bool:
        """Part from the others; returns whether this rank is to tell of an `error`."""
        tells = self.tells()
        if self.rank:
            self._send_all("bye", code, list(error.args) if error and not tells else None)
        else:
            self._ended = code
            self._send_all("end", code)
            # What was sent is lost if this process ends before it is read.
            until = time.monotonic() + (2.0 if len(self._wires) < self.size - 1 else 5.0)
            while len(self._gone) < self.size - 1 and time.monotonic() < until:
                time.sleep(0.01)
        self._over.set()
        return tells

    def tells(self) -> bool:
        """Whether this rank is to tell of an error: rank 0, or if that is lost, one a machine."""
        if self.rank and 0 in self._wires and 0 not in self._gone:
            return False
        return self.rank < 2 or self._local_rank == 0

    def _send_all(self, *words: Any) -> None:
        for wire in list(self._wires.values()):
            wire.send(*words)

    def _tell_failed(self) -> None:
        self._send_all("failed", self._number)

    def _check(self) -> None:
        if self.trouble is not None:
            self._noticed = True
            raise self.trouble
        if self._ended is not None:
            self._noticed = True
            raise Left(self._ended)
        if self._is_interrupted():
            self._noticed = True
            raise KeyboardInterrupt if self._interrupt == 130 else SystemExit(self._interrupt)

    def _is_interrupted(self) -> bool:
        """Whether a rank was, and this one alone was not: as a rule all are."""
        return self._interrupt > 0 and time.monotonic() > self._interrupted + 2 * BEAT

    def _watch(self) -> None:
        """Hear what comes, and twice a second tell how far this rank is, until it leaves."""
        beat, overdue = time.monotonic(), 0
        while not self._over.is_set():
            for key, _ in self._selector.select(max(beat - time.monotonic(), 0.0)):
                self._take(key.fileobj, key.data)
            if time.monotonic() < beat:
                continue
            beat = time.monotonic() + BEAT
            self._send_all("beat", self._number, self._counted)
            self._miss()
            over = self._ended is not None and self.rank
            if over or (self._ended is None and (self.trouble or self._is_interrupted())):
                overdue += 1
                self._end_this(overdue)

    def _take(self, wire: Any, rank: int) -> None:
        if rank == _LISTENING:
            with contextlib.suppress(OSError):
                self._selector.register(Wire(wire.accept()[0]), selectors.EVENT_READ, _STRANGER)
            return
        messages = wire.receive()
        if rank == _STRANGER:
            self._welcome(wire, messages[0] if messages else [""])
            if len(self._wires) == self.size - 1 and self._listener is not None:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None
            return
        for message in messages or ():
            self._heard(rank, message)
        if messages is None:
            self._selector.unregister(wire)
            if rank not in self._gone and self._ended is None:
                self._lost.add(rank)
            self._gone.add(rank)

    def _heard(self, rank: int, message: list[Any]) -> None:
        match message:
            case ["beat", int(number), int(counted)]:
                if number:  # before, an import of torch may keep it from all else
                    self._silent[rank] = 0
                if self.rank == 0 and number == self._number:
                    self._catch_up(rank, counted)
            case ["failed", int(number)]:
                self._failed.add(number)
                if number == self._number:
                    self._stop.set()
                if self.rank == 0:
                    self._send_all("failed", number)
            case ["store", int(port)]:
                self._store_port = port
            case ["ready"]:
                self._ready.add(rank)
                if self.rank == 0 and len(self._ready) == self.size:
                    self._send_all("ready")
            case ["end", int(code)]:
                self._ended = code
                self._stop.set()
            case ["refused", str(which), str(wanted)]:
                problem = f"isn't awaited at {self._where}: the ranks there are {wanted}"
                remedy = "give each call a MASTER_PORT of its own"
                self._gone.add(0)
                self.trouble = MachineError(which, problem, remedy)
            case ["interrupted", int(code)] | ["bye", int(code), None] if code > 128:
                self._interrupt, self._interrupted = code, self._interrupted or time.monotonic()
            case ["bye", int(), [str(subject), str(problem), str(remedy)]]:
                self.trouble = self.trouble or MachineError(subject, problem, remedy)
        if message[0] == "bye" and (self._interrupt or self.trouble or self._ended is not None):
            self._gone.add(rank)

    def _miss(self) -> None:
        """Find out who is lost, or doesn't come."""
        for rank in [*self._silent]:
            self._silent[rank] += 1
            if self._silent[rank] >= PATIENCE and rank not in self._gone:
                self._lost.add(rank)
                self._gone.add(rank)
        if self._lost:
            self._lose(sorted(self._lost))
        missing = sorted({*range(1, self.size)} - self._wires.keys())
        patience = max(self._patience, SLOW_START * self._slowest)
        if self.rank == 0 and missing and time.monotonic() > self._last_came + patience:
            which = f"rank {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}"
            why = f"{which} hasn't come for {patience:.0f} s"
            self.trouble = self.trouble or not_met(self._where, self.size, why)

    def _lose(self, ranks: list[int]) -> None:
        more = f", and so {'has' if len(ranks) == 2 else 'have'} {len(ranks) - 1} more"
        self.trouble = self.trouble or MachineError(
            f"rank {ranks[0]}",
            f"has ended, or its machine can't be reached{more if len(ranks) > 1 else ''}",
            "see what ended it, such as too little memory, and run the command again",
        )

    def _catch_up(self, rank: int, counted: int) -> None:
        """Tell the progress that another rank has made."""
        with self._lock:
            more = counted - self._told[rank]
            self._told[rank] = max(counted, self._told[rank])
            progress = self._progress
        if more > 0:
            progress(more)

    def _end_this(self, overdue: int) -> None:
        """End this process, which can't go on: first by itself, then with force."""
        if overdue == 2 and not self._noticed:  # the main thread is at work, or waits
            self._stop.set()
            number = signal.SIGTERM if self._interrupt == 143 else signal.SIGINT
            with contextlib.suppress(AttributeError):  # Windows
                signal.pthread_kill(threading.main_thread().ident or 0, number)
        if overdue > _GRACE:
            code = self._ended
            if code is None:
                code = 1 if self.trouble is not None else self._interrupt
                if self.trouble is not None and not self._noticed and self.tells():
                    self._tell(self.trouble)
                self._send_all("end" if self.rank == 0 else "bye", code, *[None][: self.rank])
            os._exit(code)
