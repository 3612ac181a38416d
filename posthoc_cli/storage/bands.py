"""Bytes that are put together from many places, kept until they are read: bands of a content.

Who reads a tensor in order asks for half a megabyte at a time. Where its rows lie far apart in a
file, so little at a time would mean very small reads, or to read the same again and again. So more
of it is put together at once, by all threads that want some of it, and handed out from memory. All
bands of the process together take no more than POOL_BYTES: the more contents are read in turn, the
smaller their bands.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

POOL_BYTES = 80 << 20
BAND_BYTES = 8 << 20
"""The most of all bands, and of one."""

LEAST_BYTES = 1 << 16
"""Shorter reads, as those of samples are, get no band made for them."""

Bytes = npt.NDArray[np.uint8]
Work = Callable[[], None]
Fill = Callable[[int, Bytes], Iterator[Work]]
"""The pieces of work, each for any thread, after which the second argument holds the bytes from
the first on."""


class Bands:
    """What is kept of one content of `size` bytes, which `fill` puts together: whole `unit`s."""

    def __init__(self, size: int, unit: int, fill: Fill) -> None:
        self._size, self._unit, self._fill = size, unit, fill
        self._bands: list[_Band] = []
        self._reads = 0
        self._began = 0

    def read(self, start: int, into: memoryview) -> int:
        """Fill the beginning of `into` from a band; returns how many bytes, 0 where that wouldn't
        pay."""
        with _lock:
            band = self._wanted(start, len(into))
        if band is None:
            return 0
        band.complete()
        first = start - band.start
        count = min(len(into), len(band.data) - first)
        into[:count] = band.data.data[first : first + count]
        with _lock:
            band.left -= count
            if band.left <= 0 and band in self._bands:  # all of it was read
                self._bands.remove(band)
        return count

    def _wanted(self, start: int, count: int) -> _Band | None:
        _pool.reads += 1
        self._reads += 1
        self._began = self._began or _pool.reads
        for band in self._bands:
            if band.start <= start < band.start + len(band.data):
                return band
        if self._reads > 1:  # how many contents are read in turn
            _pool.contents = (_pool.reads - self._began) / (self._reads - 1)
        most = min(BAND_BYTES, int(POOL_BYTES / (1.25 * max(_pool.contents, 1))))
        length = max(most // self._unit, 1) * self._unit
        if count < LEAST_BYTES or count >= min(length, self._size) or length > 2 * BAND_BYTES:
            return None
        first = start // length * length
        data = np.empty(min(length, self._size - first), np.uint8)
        band = _Band(first, data, self._fill(first, data))
        self._bands.append(band)
        _pool.admit(self._bands, band)
        return band


class _Band:
    """Bytes from `start` on; `left` of them were not yet read."""

    def __init__(self, start: int, data: Bytes, work: Iterator[Work]) -> None:
        self.start, self.data, self.left = start, data, len(data)
        self._work = work
        self._busy = 0
        self._over = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def complete(self) -> None:
        """Do what is left to do together with the other threads that call this."""
        while True:
            with self._changed:
                piece = None if self._error or self._over else next(self._work, None)
                if piece is None:
                    self._over = True
                    self._changed.wait_for(lambda: not self._busy)
                    break
                self._busy += 1
            try:
                piece()
            except BaseException as error:
                self._error = error
                raise
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()
        if self._error:
            raise self._error


class _Pool:
    """The bands of all contents, in the order in which they were made."""

    def __init__(self) -> None:
        self.reads = 0
        self.contents = 16.0
        self._made: list[tuple[weakref.ref[_Band], list[_Band]]] = []

    def admit(self, owner: list[_Band], band: _Band) -> None:
        """Drop the oldest bands that there is no room for."""
        living = [(one, owner) for ref, owner in self._made if (one := ref()) and one in owner]
        total = len(band.data) + sum(len(one.data) for one, _ in living)
        while living and total > POOL_BYTES:
            one, its_owner = living.pop(0)
            its_owner.remove(one)
            total -= len(one.data)
        self._made = [(weakref.ref(one), its_owner) for one, its_owner in living]
        self._made.append((weakref.ref(band), owner))


_pool = _Pool()
_lock = threading.Lock()
