"""Ranges that are fetched ahead of who reads: in their order, each once, in bounded memory."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from posthoc_cli.errors import SnapshotError
from posthoc_cli.storage.places import File
from posthoc_cli.storage.remote import fetching
from posthoc_cli.storage.remote.fetching import Read, RemoteFile, Stream, fetching_ahead

SIZE = 3 << 20


class Server:
    """Files of random bytes, of which ranges are asked for."""

    def __init__(self, files: int, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.data = [draw.randbytes(SIZE) for _ in range(files)]
        self.asked: list[tuple[int, int, int]] = []
        self.files = [self._file(at) for at in range(files)]

    def _file(self, at: int) -> RemoteFile:
        async def fetch(start: int, end: int) -> memoryview:
            self.asked.append((at, start, end))
            await asyncio.sleep(0.001)
            return memoryview(self.data[at])[start:end]

        return RemoteFile(File(Path(f"file-{at}"), SIZE), fetch, lambda: None)

    def read(self, at: int, offset: int, count: int) -> None:
        into = bytearray(count)
        self.files[at].read(offset, memoryview(into))
        assert into == self.data[at][offset : offset + count]

    @property
    def fetched(self) -> int:
        return sum(end - start for _, start, end in self.asked)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets in which a megabyte is much."""
    monkeypatch.setattr(fetching, "SMALLEST", 1 << 12)
    monkeypatch.setattr(fetching, "BUDGET", 1 << 20)
    monkeypatch.setattr(fetching, "GAP", 1 << 10)
    monkeypatch.setattr(fetching, "BLOCK", 1 << 14)


def in_order(server: Server, piece: int) -> Iterator[Read]:
    for step, offset in enumerate(range(0, SIZE, piece)):
        for file in server.files:
            yield step, file, offset, min(piece, SIZE - offset)


@pytest.mark.parametrize("files", [1, 3, 12])
def test_each_byte_once_in_large_ranges(files: int) -> None:
    server = Server(files)
    reads = list(in_order(server, 5_000))
    with fetching_ahead(reads, files):
        for _, file, offset, count in reads:
            server.read(server.files.index(file), offset, count)
    assert server.fetched == files * SIZE
    largest = (1 << 20) // (4 * files)
    assert len(server.asked) <= files * (SIZE // (largest - 5_000) + 1)
    first = [each for each in server.asked if each[0] == 0]
    assert first == sorted(first)


def test_memory_is_bounded() -> None:
    """What is begun and not yet read stays within the budget and a range for who waits."""
    server = Server(4)
    reads = list(in_order(server, 10_000))
    with fetching_ahead(reads, 4):
        for _, file, offset, count in reads:
            server.read(server.files.index(file), offset, count)
            begun = [each for f in server.files for each in f.ranges if each.future is not None]
            assert sum(each.end - each.start for each in begun) <= (1 << 20) + (1 << 17)
    assert all(not file.ranges for file in server.files)


def test_threads_read_what_they_would_alone() -> None:
    server = Server(5)
    reads = list(in_order(server, 7_000))
    with fetching_ahead(reads, 5), ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda read: server.read(server.files.index(read[1]), *read[2:]), reads))
    assert server.fetched == 5 * SIZE


def test_what_comes_otherwise_than_announced_is_read_all_the_same() -> None:
    """Reads that are never made, made twice, or made in another order and of other pieces."""
    server = Server(6, seed=1)
    draw = random.Random(2)
    reads = list(in_order(server, 9_000))
    with fetching_ahead(reads, 6):
        for _, file, offset, count in draw.sample(reads, len(reads) // 2):
            server.read(server.files.index(file), offset, count)
        for _ in range(300):
            offset = draw.randrange(SIZE)
            server.read(draw.randrange(6), offset, draw.randrange(min(30_000, SIZE - offset)))
        for _, file, offset, count in reads:
            server.read(server.files.index(file), offset, count)


def test_who_reads_on_finds_the_next_blocks() -> None:
    server = Server(1)
    with server.files[0]:
        for offset in range(0, SIZE, 5_000):
            server.read(0, offset, min(5_000, SIZE - offset))
    assert server.fetched == SIZE
    with pytest.raises(SnapshotError, match="changed"):
        server.read(0, SIZE - 5, 6)


def test_an_interrupt_ends_all_waiting() -> None:
    async def never(start: int, end: int) -> memoryview:
        await asyncio.sleep(100)
        return memoryview(b"")

    file = RemoteFile(File(Path("far"), SIZE), never, lambda: None)
    threading.Timer(0.1, fetching.abandon).start()
    with fetching_ahead([(0, file, 0, 1000)], 1), pytest.raises(CancelledError):
        file.read(0, memoryview(bytearray(1000)))
    threading.Timer(0.1, fetching.abandon).start()
    with pytest.raises(CancelledError):
        file.read(5000, memoryview(bytearray(1000)))


def test_a_stream_knows_its_head() -> None:
    server = Server(1, seed=3)
    data = server.data[0]
    with Stream(server.files[0], memoryview(data)[:1000]) as stream:
        assert stream.read(10) == data[:10]
        assert not server.asked
        assert (stream.seek(990), stream.read(100)) == (990, data[990:1090])
        assert (stream.seek(-7, 2), stream.read()) == (SIZE - 7, data[-7:])
        assert stream.read(1) == b""
        pieces = [(offset, 30) for offset in range(2_000, SIZE, 50_000)]
        server.asked.clear()
        stream.will_read(pieces)
        for offset, length in pieces:
            stream.seek(offset)
            assert stream.read(length) == data[offset : offset + length]
        assert len(server.asked) == len(pieces)
