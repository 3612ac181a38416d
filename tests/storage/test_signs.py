"""Where ranks meet: who comes, who doesn't, and who has no business there."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from posthoc_cli.errors import MachineError
from posthoc_cli.storage.signs import Signs
from posthoc_cli.storage.wires import call, listen, own_address, seconds_since_start
from tests.ranked import free_ports

SOON = 60.0


@pytest.fixture
def first() -> Iterator[tuple[Signs, int]]:
    """Rank 0 of 3, and the port where it awaits the others."""
    peer = Signs(0, 3, 0, lambda error: None)
    peer._end_this = lambda overdue: None  # type: ignore[method-assign]
    port = peer._listen(0)
    peer._begin_watch()
    yield peer, port
    peer._over.set()


def come(port: int, rank: int, size: int = 3) -> list[object]:
    """What rank 0 says to one that comes."""
    wire, (said, *_) = call("127.0.0.1", port, rank, size, SOON, lambda: None)
    connections.append(wire)
    return said


connections: list[object] = []


def wait(done: object) -> None:
    until = time.monotonic() + SOON
    while not done():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.005)


def test_all_come_and_strangers_do_too(first: tuple[Signs, int]) -> None:
    peer, port = first
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'["posthoc rank", "1", 3, 0.5]\n'):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b""
    assert come(port, 1) == ["welcome"]
    assert come(port, 1) == ["refused", "rank 1 of 3", "of 3"]  # of another call
    assert come(port, 2, 4) == ["refused", "rank 2 of 4", "of 3"]
    assert come(port, 2) == ["welcome"]
    wait(lambda: peer._listener is None)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))
    assert peer.trouble is None


def test_one_that_has_come_and_ends(first: tuple[Signs, int]) -> None:
    peer, port = first
    come(port, 1)
    connections.pop().close()  # type: ignore[attr-defined]
    wait(lambda: peer.trouble)
    assert str(peer.trouble).startswith("rank 1: has ended, or its machine can't be reached; ")


def test_one_that_does_not_come(first: tuple[Signs, int]) -> None:
    peer, port = first
    come(port, 2)
    peer._slowest = 0.0
    peer._patience = 0.0
    wait(lambda: peer.trouble)
    assert "the 3 ranks didn't meet there (rank 1 hasn't come for 0 s)" in str(peer.trouble)


def test_one_that_comes_when_all_is_over(first: tuple[Signs, int]) -> None:
    peer, port = first
    peer._ended = 130
    assert come(port, 1) == ["end", 130]


def test_rank_0_is_not_there() -> None:
    (port,) = free_ports(1)
    with pytest.raises(MachineError, match="rank 0 isn't there: Connection refused"):
        call("127.0.0.1", port, 1, 2, 0.0, lambda: None)


def test_a_port_that_is_taken() -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"MASTER_PORT {port}: rank 0 can't await"):
            listen(port)


def test_this_process() -> None:
    assert seconds_since_start() >= 0.0
    assert own_address("127.0.0.1", 80) == "127.0.0.1"
