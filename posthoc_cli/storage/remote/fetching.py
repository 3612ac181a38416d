"""Reading objects of a store by ranges: many in flight, ahead of who reads, in bounded memory.

The engine reads half a megabyte of each snapshot at a time, for which a store is too far away. Who
knows what it will read says so by `reading_ahead`; from that larger ranges are made, and fetched in
the order in which they are needed first. Other reads go by blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from posthoc_cli.storage.disk import changed
from posthoc_cli.storage.places import File

BUDGET = 256 << 20
"""Bytes of ranges that are held or on their way, for all files together."""

BLOCKS_BUDGET = 64 << 20
"""Bytes of blocks that are kept, for reads that nobody has announced."""

GENERATIONS = 4
"""Ranges of each file that the budget is for: while one is used, the next ones come."""

SMALLEST, LARGEST = 1 << 18, 16 << 20
"""Bytes of a range. So many are in flight that larger ones would only cost memory."""

GAP = 1 << 17
"""Bytes between two reads that are fetched with them rather than by another request."""

MOST_IN_FLIGHT = 192

BLOCK = 1 << 18
FEW_AHEAD, MANY_AHEAD = 8, 64
"""Blocks that are fetched for who reads on from one block to the next, at first and later."""

_SLACK = 64
"""Steps after which a range that wasn't read is taken for one that won't be."""

Fetch = Callable[[int, int], "Coroutine[Any, Any, Any]"]
"""Fetches the bytes from the first to before the second, as a buffer."""

Read = tuple[int, "RemoteFile", int, int]
"""A read to come: the number of its step, the file, where, and how many bytes."""

T = TypeVar("T")

_UNDER_WAY: set[Future[Any]] = set()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """A thread's loop that waits for all requests."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="posthoc-store", daemon=True).start()
    return loop


def begin(request: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin a request, whose result is waited for elsewhere."""
    begun = asyncio.run_coroutine_threadsafe(request, _loop())
    _UNDER_WAY.add(begun)
    begun.add_done_callback(_UNDER_WAY.discard)
    return begun


def abandon() -> None:
    """Cancel all requests, as after an interrupt: who waits for one gets a CancelledError."""
    for request in tuple(_UNDER_WAY):
        request.cancel()


class Range:
    """A piece of a file that is fetched at once: `left` bytes of it are still to be read, in the
    steps from `first` to `last`."""

    __slots__ = ("ahead", "end", "file", "first", "future", "last", "left", "start")

    def __init__(self, ahead: Ahead, file: RemoteFile, start: int, end: int, step: int) -> None:
        self.ahead, self.file, self.start, self.end = ahead, file, start, end
        self.left = end - start
        self.first = self.last = step
        self.future: Future[Any] | None = None


class RemoteFile:
    """An object of a store, which all reads find as it was listed; see `stores.Input`.

    Raises SnapshotError when another has taken its place, MachineError when it can't be read.
    """

    remote = True

    def __init__(self, file: File, fetch: Fetch, check: Callable[[], None]) -> None:
        self.file = file
        self.fetch = fetch
        self.check_unchanged = check
        self.ranges: list[Range] = []

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        _BLOCKS.forget(self)

    def fileno(self) -> int:
        return -1

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on."""
        if offset + len(into) > self.file.size:
            raise changed(self.file.path)
        while into:
            count = self._read_range(offset, into) or self._read_block(offset, into)
            into, offset = into[count:], offset + count

    def _read_range(self, offset: int, into: memoryview) -> int:
        for found in tuple(self.ranges):
            if found.start <= offset < found.end:
                data = found.ahead.wait(found)
                if data is None:
                    return 0
                count = min(found.end - offset, len(into))
                begin_at = offset - found.start
                into[:count] = data[begin_at : begin_at + count]
                found.ahead.used(found, count)
                return count
        return 0

    def _read_block(self, offset: int, into: memoryview) -> int:
        at, inside = divmod(offset, BLOCK)
        data = _BLOCKS.get(self, at)
        count = min(len(data) - inside, len(into))
        if count <= 0:
            raise changed(self.file.path)
        into[:count] = data[inside : inside + count]
        return count

    def begin_block(self, at: int) -> Future[Any]:
        return begin(self.fetch(at * BLOCK, min((at + 1) * BLOCK, self.file.size)))


class _Blocks:
    """Blocks of files that were read last; who reads on finds the next ones on their way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()

    def get(self, file: RemoteFile, at: int) -> memoryview:
        with self._lock:
            last = at
            if (id(file), at - 1) in self._known:  # it is read on from there
                many = (id(file), at - FEW_AHEAD) in self._known
                files = len({each for each, _ in self._known})
                share = BLOCKS_BUDGET // (2 * BLOCK * files)
                last += min(MANY_AHEAD if many else FEW_AHEAD, max(share, 1))
                last = min(last, (file.file.size - 1) // BLOCK)
            for each in range(at, last + 1):
                if (id(file), each) not in self._known:
                    self._known[id(file), each] = file.begin_block(each)
            self._known.move_to_end((id(file), at))
            future = self._known[id(file), at]
            while len(self._known) > BLOCKS_BUDGET // BLOCK:
                self._known.popitem(last=False)
        try:
            return memoryview(future.result())
        except BaseException:
            with self._lock:
                self._known.pop((id(file), at), None)
            raise

    def forget(self, file: RemoteFile) -> None:
        with self._lock:
            for key in [key for key in self._known if key[0] == id(file)]:
                self._known.pop(key).cancel()


_BLOCKS = _Blocks()


class Ahead:
    """Fetches what `reads` say in their order, of `files` files, until it is closed."""

    def __init__(self, reads: Iterator[Read], files: int) -> None:
        self._reads = reads
        self._largest = max(min(BUDGET // (GENERATIONS * max(files, 1)), LARGEST), SMALLEST)
        self._waiting: deque[Range] = deque()  # not begun, in the order of their first steps
        self._growing: dict[RemoteFile, Range] = {}
        self._begun: dict[Range, None] = {}
        self._held = self._in_flight = self._step = 0
        self._closed = False
        self._lock = threading.RLock()

    def pump(self) -> None:
        """Begin as many ranges as may be."""
        with self._lock:
            while not self._closed and self._in_flight < MOST_IN_FLIGHT:
                if self._held >= BUDGET and not self._drop_passed():
                    return
                found = self._next()
                if found is None:
                    return
                self._begin(found)

    def wait(self, found: Range) -> memoryview | None:
        """The bytes of a range; None if it was dropped."""
        with self._lock:
            self._step = max(self._step, found.first)
            if found.future is None:
                if self._closed or found.left <= 0:
                    return None
                if self._growing.get(found.file) is found:
                    del self._growing[found.file]
                self._begin(found)  # whatever is held: someone waits for it
            future = found.future
        assert future is not None
        return memoryview(future.result())

    def used(self, found: Range, count: int) -> None:
        with self._lock:
            found.left -= count
            if found.left <= 0:
                self._drop(found)
        self.pump()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for found in [*self._begun, *self._waiting]:
                if found.future is not None:
                    found.future.cancel()
                self._drop(found)
            self._waiting.clear()
            self._growing.clear()

    def _next(self) -> Range | None:
        """The range that is needed next; it is complete when its file's next has begun."""
        while True:
            while self._waiting:
                first = self._waiting[0]
                if self._growing.get(first.file) is first:
                    break
                self._waiting.popleft()
                if first.future is None and first.left > 0:  # nobody had to begin it before
                    return first
            read = next(self._reads, None)
            if read is not None:
                self._add(*read)
            elif self._waiting:
                self._growing.clear()
            else:
                return None

    def _add(self, step: int, file: RemoteFile, offset: int, count: int) -> None:
        if not count:
            return
        end = offset + count
        found = self._growing.get(file)
        if (
            found is not None
            and found.start <= offset <= found.end + GAP
            and end - found.start <= self._largest
        ):
            found.left += count
            found.end, found.last = max(found.end, end), step
            return
        found = Range(self, file, offset, end, step)
        self._growing[file] = found
        self._waiting.append(found)
        file.ranges.append(found)

    def _begin(self, found: Range) -> None:
        self._held += found.end - found.start
        self._in_flight += 1
        self._begun[found] = None
        found.future = begin(found.file.fetch(found.start, found.end))
        found.future.add_done_callback(self._landed)

    def _landed(self, _: object) -> None:
        with self._lock:
            self._in_flight -= 1
        self.pump()

    def _drop(self, found: Range) -> None:
        if found in self._begun:
            del self._begun[found]
            self._held -= found.end - found.start
        found.left, found.future = 0, None
        with contextlib.suppress(ValueError):
            found.file.ranges.remove(found)

    def _drop_passed(self) -> bool:
        """Drop ranges that weren't read when it was their turn; whether there were any."""
        passed = [each for each in self._begun if each.last < self._step - _SLACK]
        for each in passed:
            self._drop(each)
        return bool(passed)


@contextlib.contextmanager
def fetching_ahead(reads: Iterable[Read], files: int) -> Iterator[None]:
    """Within the block, have what `reads` say fetched before it is read."""
    ahead = Ahead(iter(reads), files)
    ahead.pump()
    try:
        yield
    finally:
        ahead.close()


class Stream(io.RawIOBase):
    """A remote file for reading on from a position, of which the `head` is known already."""

    def __init__(self, file: RemoteFile, head: memoryview) -> None:
        self._file, self._head, self._at = file, head, 0
        self._ahead: list[Ahead] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.file.size}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        into = into[: max(self._file.file.size - self._at, 0)]
        known = self._head[self._at : self._at + len(into)]
        into[: len(known)] = known
        if len(known) < len(into):
            start = self._at + len(known)
            self.will_read([(start, len(into) - len(known))])
            self._file.read(start, into[len(known) :])
        self._at += len(into)
        return len(into)

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._file.file.size - self._at, 0)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(data)
        return bytes(data)

    def will_read(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Have pieces, each an offset and a length, fetched together, but for what is known."""
        size, known = self._file.file.size, len(self._head)
        reads = [
            (0, self._file, offset, min(length, size - offset))
            for offset, length in sorted(pieces)
            if known < offset + length and 0 <= offset < size
        ]
        if len(reads) > 1 or any(length > BLOCK for _, _, _, length in reads):
            self._ahead.append(Ahead(iter(reads), 1))
            self._ahead[-1].pump()

    def close(self) -> None:
        for ahead in self._ahead:
            ahead.close()
        super().close()
