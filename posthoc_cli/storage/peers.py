"""The ranks of a call as one of them sees them: how they meet, and the messages of their tasks.

These go by gloo, a part of torch. What else they tell one another is in `signs`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from posthoc_cli.errors import MachineError
from posthoc_cli.storage.signs import BEAT, PATIENCE, SLOW_START, Signs
from posthoc_cli.storage.wires import call, not_met, own_address, seconds_since_start

_TO_CONNECT = timedelta(seconds=120)
"""For gloo, and for what a launcher brings."""

_TO_COME_LAUNCHED = 60.0
"""Instead of TO_COME: they come with torch imported, and a launcher looks after them."""

_FOREVER = timedelta(days=30)


class Stopped(Exception):
    """Another rank has failed."""


_calls = itertools.count()


class Peers(Signs):
    """The other ranks: how they meet, and what they exchange."""

    # The meeting

    def connect(self, address: str, port: int) -> None:
        """Wait for the others; raises MachineError when they don't come."""
        self._where = f"{address}:{port}"
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if launched:  # the port is the launcher's: there it is said where rank 0 is
            self._patience = _TO_COME_LAUNCHED
            address, port = self._in_thread(lambda: self._by_launcher(address, port))
        elif self.rank == 0:
            self._listen(port)
        if self.rank:
            patience = max(self._patience, SLOW_START * seconds_since_start())
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
                # Not "localhost": what is its name the other way round may take seconds to find.
                store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
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
