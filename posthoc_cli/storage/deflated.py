"""Bytes that lie deflated in a file, read from anywhere in flat memory.

Inflating only goes forward. States to go on from are kept, some 50 kB each, where a read ended and
on the way; a read starts at the nearest one before it. All files share `MOST_STATES` of them.
States have the checksum of what comes before; a read that ends at the end checks it.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posthoc_cli.errors import SnapshotError
from posthoc_cli.storage.header import ReadAt

SPACING = 4 << 20
"""Bytes from one state to the next, on the way to what is read."""

MOST_STATES = 512

_INPUT, _OUTPUT = 1 << 14, 1 << 18

State = tuple[int, Any, int]
"""The place in the file from which on `decompressobj` takes bytes, that object, and the CRC-32 of
what it has given."""

_states: OrderedDict[tuple[int, int], State] = OrderedDict()
"""By the number of what is open, and the place in its bytes; the one used last comes last."""
_lock = threading.Lock()
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class Deflated:
    """Content of a part: `length` bytes, which lie as `packed` bytes from `offset` in a file.

    `crc` is the CRC-32 of the content, where it is known.
    """

    offset: int
    packed: int
    length: int
    file: int = 0
    crc: int | None = None

    def open(self, files: Sequence[ReadAt]) -> ReadAt:
        return _Opened(self, files[self.file]).read


class _Opened:
    """No state is ever changed: threads go on with copies, and need not wait for each other."""

    def __init__(self, content: Deflated, read: ReadAt) -> None:
        self._content, self._read = content, read
        self._number = next(_numbers)
        self._places: list[int] = []

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the inflated bytes from `start` on; raises SnapshotError if broken."""
        at, (place, inflating, crc) = self._nearest(start)
        end = self._content.offset + self._content.packed
        kept, rest = at, b""
        while into:
            if not rest:
                if place >= end:
                    raise broken()
                buffer = bytearray(min(_INPUT, end - place))
                self._read(place, memoryview(buffer))
                rest, place = bytes(buffer), place + len(buffer)
            most = start - at if at < start else len(into)
            try:
                data = inflating.decompress(rest, min(most, _OUTPUT))
            except zlib.error:
                raise broken() from None
            rest = inflating.unconsumed_tail
            if not data and inflating.eof:
                raise broken()
            if at >= start:
                into[: len(data)] = data
                into = into[len(data) :]
            at, crc = at + len(data), zlib.crc32(data, crc)
            if at - kept >= SPACING and into:
                self._keep(at, (place - len(rest), inflating, crc))
                kept = at
        if at < self._content.length:
            self._keep(at, (place - len(rest), inflating, crc))
        elif self._content.crc not in (None, crc):
            raise broken("its checksum (CRC-32) is wrong")

    def _nearest(self, start: int) -> tuple[int, State]:
        with _lock:
            for number in range(bisect.bisect_right(self._places, start) - 1, -1, -1):
                key = self._number, self._places[number]
                if key in _states:
                    _states.move_to_end(key)
                    place, inflating, crc = _states[key]
                    return key[1], (place, inflating.copy(), crc)
                del self._places[number]
        return 0, (self._content.offset, zlib.decompressobj(-zlib.MAX_WBITS), 0)

    def _keep(self, at: int, state: State) -> None:
        place, inflating, crc = state
        state = place, inflating.copy(), crc
        with _lock:
            if (self._number, at) not in _states:
                bisect.insort(self._places, at)
            _states[self._number, at] = state
            while len(_states) > MOST_STATES:
                _states.popitem(last=False)


def broken(problem: str = "it can't be inflated") -> SnapshotError:
    """The error for an entry; who knows the file adds its name."""
    return SnapshotError(
        "", f"a deflated entry of it is broken: {problem}", "copy it again, or leave it out"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Within:
    """Content of a part: `content` whose file is not one of the index, but other content."""

    content: Any
    outer: Any

    def open(self, files: Sequence[ReadAt]) -> ReadAt:
        opened: ReadAt = self.content.open([self.outer.open(files)])
        return opened
