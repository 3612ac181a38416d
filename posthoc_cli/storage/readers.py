"""Reading the tensors' bytes of snapshots, and noticing when their files change meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

from posthoc_cli.errors import SnapshotError
from posthoc_cli.storage.header import Part, ReadAt, TensorIndex, spans
from posthoc_cli.storage.stores import abandon, open_input

T = TypeVar("T")
U = TypeVar("U")

_BLOCKS, _BLOCK = 16, 4096
"""How many blocks of data a fingerprint is made of, and their bytes."""


_AT_ONCE = 32
"""Requests to a store that don't wait for each other."""

_OTHER_FILES = 64
"""Files that a process has open besides those that it counts, at the most."""


def can_open(files: int) -> bool:
    """Whether this process may have so many more files open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return True
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft == resource.RLIM_INFINITY or soft >= files + _OTHER_FILES


class Reader:
    """A snapshot's files open for reading in a `with` block, from several threads at once.

    With `keep_open` false each read opens its file anew: for more snapshots than the system lets a
    process have open files.

    Raises SnapshotError for a file that changed since its header was read, MachineError for one
    that can't be read.
    """

    def __init__(self, index: TensorIndex, *, keep_open: bool = True) -> None:
        self._index = index
        self._parts = index.parts
        self._files = [open_input(file, keep_open=keep_open) for file in index.files]
        self._contents: dict[int, ReadAt] = {}
        self._lock = threading.Lock()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Reader:
        with contextlib.ExitStack() as opened:
            for file in self._files:
                opened.enter_context(file)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the snapshot's data from `start` on."""
        for at, offset, count in spans(self._parts, start, len(into)):
            try:
                self._reads(at)(offset, into[:count])
            except SnapshotError as error:
                if error.subject:
                    raise
                file = self._index.files[self._parts[at].file]
                raise SnapshotError(str(file.path), error.problem, error.remedy) from None
            into = into[count:]

    @property
    def remote(self) -> int:
        """How many of its files lie in a store."""
        return sum(file.remote for file in self._files)

    def places(self, start: int, length: int) -> Iterator[tuple[Any, int, int]]:
        """Where bytes of the data lie in files of a store: the file, the offset, and how many.

        Not of a content, which reads its files as it likes.
        """
        for at, offset, count in spans(self._parts, start, length):
            part = self._parts[at]
            if part.content is None and self._files[part.file].remote:
                yield self._files[part.file], offset, count

    def read_file(self, at: int, into: memoryview) -> None:
        """Fill `into` with the first bytes of file `at` of the index."""
        self._files[at].read(0, into)

    def _reads(self, at: int) -> ReadAt:
        """What reads part `at`; a content is opened once, as it may remember where it is."""
        part = self._parts[at]
        if part.content is None:
            return self._files[part.file].read
        with self._lock:
            if at not in self._contents:
                self._contents[at] = part.content.open([file.read for file in self._files])
            return self._contents[at]

    def check_unchanged(self) -> None:
        """Raise SnapshotError for a file that changed since its header was read."""
        for file in self._files:
            file.check_unchanged()


def check_unchanged(readers: Sequence[Reader]) -> None:
    """Raise SnapshotError for a file that changed since its header was read."""
    local = [reader for reader in readers if not reader.remote]
    for reader in local:
        reader.check_unchanged()
    if len(local) < len(readers):
        _at_once(Reader.check_unchanged, [reader for reader in readers if reader.remote])


@contextlib.contextmanager
def reading_ahead(
    readers: Sequence[Reader], reads: Callable[[], Iterable[tuple[int, Reader, int, int]]]
) -> Iterator[None]:
    """Within the block, have a store's files fetched in the order in which they will be read.

    `reads` gives, with a number that grows by one a step, each reader's position and bytes to come.
    Of local files nothing is fetched, and it isn't called.
    """
    files = sum(reader.remote for reader in readers)
    if not files:
        yield
        return
    from posthoc_cli.storage.remote.fetching import fetching_ahead

    places = (
        (step, *place)
        for step, reader, start, length in reads()
        for place in reader.places(start, length)
    )
    with fetching_ahead(places, files):
        yield


def fingerprints(indexes: Sequence[TensorIndex]) -> list[str]:
    """The fingerprint of each."""
    return of_each(indexes, fingerprint)


def of_each(indexes: Sequence[TensorIndex], ask: Callable[[TensorIndex], T]) -> list[T]:
    """What `ask`, which reads some of its files, gives of each: of a store's of many at once."""
    if any(open_input(file).remote for index in indexes for file in index.files):
        return _at_once(ask, indexes)
    return [ask(index) for index in indexes]


def _at_once(ask: Callable[[U], T], of: Sequence[U]) -> list[T]:
    """What `ask` gives of each, where each is some requests to a store."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="posthoc") as pool:
        try:
            return list(pool.map(ask, of))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            abandon()
            raise


def fingerprint(index: TensorIndex) -> str:
    """What tells a snapshot from others, wherever it lies and whatever it is called.

    32 hex digits of the SHA-256 of its files' headers and of 16 blocks of 4 KiB of its data, spread
    evenly from the first byte to the last. Of a format other than safetensors it is that of its
    structure and of such blocks of its files as they are; of a difference that of its own file,
    which has that of its base. Raises what Reader does.
    """
    import hashlib  # only here: it takes as long to load as all else in this module

    index = index.links[-1].index if index.links else index
    digest = hashlib.sha256(index.structure or b"")
    parts: Sequence[Part] = index.parts
    if index.structure is not None:
        firsts = accumulate((file.size for file in index.files), initial=0)
        sizes = zip(index.files, firsts, strict=False)
        parts = [Part(first, file.size, 0, at) for at, (file, first) in enumerate(sizes)]
    length = sum(part.length for part in parts)
    block = min(_BLOCK, length)
    with Reader(replace(index, parts=tuple(parts))) as reader:
        starts = sorted({(length - block) * at // (_BLOCKS - 1) for at in range(_BLOCKS)})
        with reading_ahead([reader], lambda: ((0, reader, start, block) for start in starts)):
            for part in parts:
                header = bytearray(part.data_start)
                reader.read_file(part.file, memoryview(header))
                digest.update(header)
            data = bytearray(block)
            for start in starts:
                reader.read(start, memoryview(data))
                digest.update(data)
    return digest.hexdigest()[:32]
