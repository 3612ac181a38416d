"""The ranks of a call as one of them sees them: messages, and signs of life.

What the tasks exchange goes by gloo. Beside it each rank has a connection to rank 0 (`wires`): its
end tells at once that a process has ended, and twice a second each says there how far it is, so
that a machine that hangs is missed. What must reach a rank at work goes there, too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from posthoc_cli.errors import MachineError, PosthocError
from posthoc_cli.storage.wires import (
    Wire,
    call,
    listen,
    not_met,
    own_address,
    rank_of,
    seconds_since_start,
)

TO_COME = 25.0
"""Seconds without one more rank after which those that haven't come are given up."""

_SLOW_START = 4.0
"""Or so many times as long as the slowest of those that have come took: of slow disks."""

_TO_CONNECT = timedelta(seconds=120)
"""For gloo, and for what a launcher brings."""

BEAT = 0.5
"""Seconds between two signs of life."""

PATIENCE = 30
"""Beats without a sign of life after which a rank counts as lost."""

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


_LISTENING, _STRANGER = -1, -2
"""In the place of the rank of a connection: what awaits them, and one that has yet to say."""

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

    # The meeting

    def connect(self) -> None:
        """Wait for the others; raises MachineError when they don't come."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._where = f"{address}:{port}"
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if launched:  # the port is the launcher's: there it is said where rank 0 is
            address, port = self._in_thread(lambda: self._by_launcher(address, port))
        elif self.rank == 0:
            self._listen(port)
        if self.rank:
            patience = max(TO_COME, _SLOW_START * seconds_since_start())
            self._wires[0], said = call(address, port, self.rank, self.size, patience, self._check)
            self._selector.register(self._wires[0], selectors.EVENT_READ, 0)
            for message in said:
                self._heard(0, message)
        if self.rank or not launched:
            self._begin_watch()
        if self.rank == 0:  # while it imports torch, it may be deaf
            self._let_pass(lambda: len(self._wires) == self.size - 1)
        self._in_thread(lambda: self._connect_gloo(address))

    def _by_launcher(self, address: str, port: int) -> tuple[str, int]:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        key = f"posthoc/{next(_calls)}"
        try:
            store = TCPStore(address, port, is_master=False, timeout=_TO_CONNECT)
            if self.rank == 0:
                place = own_address(address, port), self._listen(0)
                self._begin_watch()
                store.set(key, json.dumps(place))
                return place
            store.wait([key], _TO_CONNECT)
            found, port = json.loads(store.get(key))
        except (RuntimeError, ValueError, OSError) as error:
            raise self._not_met(error) from error
        return str(found), int(port)

    def _connect_gloo(self, address: str) -> None:
        from torch.distributed import (  # type: ignore[attr-defined]
            PrefixStore,
            ProcessGroupGloo,
            TCPStore,
        )

        try:
            if self.rank == 0:
                store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
                self._store_port = store.port
                self._send_all("store", store.port)
                self._heard(0, ["ready"])
            else:
                self._let_pass(lambda: self._store_port is not None)
                store = TCPStore(address, self._store_port or 0, timeout=_TO_CONNECT)
                self._send_all("ready")
            # Not torch's default group, which is the user's own to make.
            prefixed = PrefixStore("posthoc", store)
            self._gloo = ProcessGroupGloo(prefixed, self.rank, self.size, _FOREVER)
        except (RuntimeError, ValueError, OSError) as error:
            raise self._not_met(error) from error

    def _not_met(self, error: Exception) -> MachineError:
        why = str(error).partition("\n")[0].partition(". ")[0]
        return not_met(self._where, self.size, why)

    def _in_thread(self, work: Callable[[], Any]) -> Any:
        """What `work` returns: what waits in torch heeds no signal, nor that a rank is lost."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="posthoc-meeting")
        done: Future[Any] = pool.submit(work)
        pool.shutdown(wait=False)
        until: float | None = None
        while not done.done():
            self._check()
            if len(self._ready) == (1 if self.rank else self.size):
                until = until or time.monotonic() + _TO_CONNECT.total_seconds()
                if time.monotonic() > until:
                    raise not_met(self._where, self.size, "gloo finds no way between them")
            time.sleep(0.01)
        try:
            return done.result()
        except MachineError:  # of a rank that has ended, as the connections may soon tell
            with contextlib.suppress(TimeoutError):
                self._let_pass(lambda: False, 6 * BEAT)
            raise

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
                    raise Stopped
                time.sleep(pause)
                pause = min(1.2 * pause, 0.02)
            work.wait()
        except RuntimeError as error:
            self._tell_failed()
            # Which rank is lost, the connections tell.
            with contextlib.suppress(TimeoutError):
                self._let_pass(lambda: False, PATIENCE * BEAT)
            self.trouble = MachineError(
                f"rank {self.rank}",
                "lost its way to another rank",
                "see whether the network is well, and run the command again",
            )
            raise self.trouble from error

    def _let_pass(self, done: Callable[[], bool], seconds: float = float("inf")) -> None:
        until = time.monotonic() + seconds
        while not done():
            self._check()
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(0.01)

    # The connections

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
        patience = max(TO_COME, _SLOW_START * self._slowest)
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
