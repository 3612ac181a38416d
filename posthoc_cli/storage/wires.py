"""Connections between rank 0 and each other rank: lines of JSON, and their end tells of a death.

They are made before torch is imported, which may take a minute, so that whoever ends from then on
is missed at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posthoc_cli.errors import MachineError

_MAGIC = "posthoc rank"
ALONE = "run one process alone, by env -u RANK -u SLURM_PROCID -u OMPI_COMM_WORLD_RANK -u PMI_RANK"

_LONGEST = 1 << 20
_TO_SEND = 1.0
"""Seconds."""

_LOST_AFTER = 15
"""Seconds until the system gives up a machine that doesn't answer, where it can be told so."""


class Wire:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._left = b""
        self._sending = threading.Lock()
        connection.settimeout(_TO_SEND)
        for level, name, value in (
            (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
            (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
            (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _LOST_AFTER // 3),
            (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _LOST_AFTER // 3),
            (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
            (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1000 * _LOST_AFTER),
        ):
            with contextlib.suppress(OSError, AttributeError):  # not all systems have all
                connection.setsockopt(level, getattr(socket, name), value)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, *words: Any) -> None:
        """Send a message; that it can't be read any more is found by who reads."""
        with contextlib.suppress(OSError), self._sending:
            self._socket.sendall(json.dumps(words).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """The messages that have come; None once the other end is no more, or talks otherwise."""
        try:
            data = self._socket.recv(1 << 16)
            *lines, self._left = (self._left + data).split(b"\n")
            if not data or len(self._left) > _LONGEST:
                return None
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if all(isinstance(each, list) and each for each in messages) else None


def listen(port: int) -> socket.socket:
    """Await connections at a port, 0 for any; raises MachineError when something else has it."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        if both and error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return socket.create_server(("", port), backlog=1024)
        raise MachineError(
            f"MASTER_PORT {port}",
            f"rank 0 can't await the others there ({error.strerror})",
            f"set it to a free port, the same for all ranks, or {ALONE}",
        ) from error


def rank_of(message: list[Any]) -> tuple[int, int, float] | None:
    """Rank, number of ranks and seconds since its start, of one that comes; None for a stranger."""
    if message[0] == _MAGIC and [type(each) for each in message[1:]] == [int, int, float]:
        _, rank, size, started = message
        return rank, size, started
    return None


def call(
    address: str, port: int, rank: int, size: int, patience: float, check: Callable[[], None]
) -> tuple[Wire, list[list[Any]]]:
    """Connect to rank 0, which may have to start yet; returns what it has said, too.

    Raises MachineError when there is no answer for `patience` seconds. `check` is called between.
    """
    until = time.monotonic() + patience
    while True:
        why = "no answer"
        try:
            wire = Wire(socket.create_connection((address, port), timeout=2.0))
        except OSError as error:  # the name may not be known yet, either
            why = error.strerror or str(error) or why
        else:
            wire.send(_MAGIC, rank, size, seconds_since_start())
            while time.monotonic() < until:
                check()
                if select.select([wire], [], [], 0.1)[0]:
                    if said := wire.receive():
                        return wire, said
                    break
            wire.close()
        check()
        if time.monotonic() > until:
            raise not_met(f"{address}:{port}", size, f"rank 0 isn't there: {why}")
        time.sleep(0.05)


def not_met(where: str, size: int, why: str) -> MachineError:
    remedy = f"start all at once, with an address that each machine reaches, or {ALONE}"
    return MachineError(where, f"the {size} ranks didn't meet there ({why})", remedy)


def own_address(address: str, port: int) -> str:
    """Where those who reach `address` find this machine."""
    with contextlib.suppress(OSError):
        for family, kind, proto, _, place in socket.getaddrinfo(
            address, port, type=socket.SOCK_DGRAM
        ):
            with socket.socket(family, kind, proto) as way:  # nothing is sent
                way.connect(place)
                found = str(way.getsockname()[0])
            return address if found.startswith("127.") or found == "::1" else found
    return address


def seconds_since_start() -> float:
    """How long ago this process was started; 0 where there is no /proc."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        stat = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
        return max(up - int(stat[19]) / os.sysconf("SC_CLK_TCK"), 0.0)
    return 0.0
