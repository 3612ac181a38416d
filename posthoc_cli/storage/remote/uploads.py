"""An object of a bucket that appears whole or not at all.

It is sent in parts, in order, several at a time, and is there once its upload is completed. That is
done when all parts have arrived; what is not completed is aborted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any, BinaryIO

from posthoc_cli.errors import MachineError, PosthocError
from posthoc_cli.storage.disk import already_exists, write_errors
from posthoc_cli.storage.places import Url
from posthoc_cli.storage.remote.answers import told
from posthoc_cli.storage.remote.fetching import begin
from posthoc_cli.storage.remote.sources import look_at, make_store

PART = 8 << 20
"""Bytes of a part. Stores want at least 5 MiB."""

MOST_PARTS = 9_000
"""Of an upload: stores allow 10,000. Parts of larger objects are larger."""

AT_ONCE = 8
"""Parts that are sent together, of all outputs of a call."""

AHEAD = 1
"""Blocks of so many parts that are filled while one is sent: chunks come nearly in order."""

HELD = 8 << 20
"""Bytes of an object that is sent by one request, which can be made to fail where there is one
already; AT_ONCE times as many of all outputs of a call."""

LONGEST_LEAD = 1.0
"""Seconds that a write waits for those before it, and then takes more memory: the thread that had
to write them may have failed."""

SLOW, FAST = 8.0, 2.0
"""Seconds for the parts sent together above which the next ones are fewer, below which more: a
request that takes too long fails."""

LONGEST_ABORT = 20.0
"""Seconds to wait for a store to take back an upload."""

LONGEST_RETURN = 2.0
"""Seconds to wait for the client to let go what it has sent."""


async def _nothing() -> None: ...


def _wait(work: concurrent.futures.Future[Any]) -> None:
    """Wait for the end of `work`, a little at a time: an interrupt that comes right before a wait,
    or to another thread, doesn't end it."""
    while not work.done():
        concurrent.futures.wait([work], 0.2)


class Block(bytearray):
    """Bytes that are gathered, and then lent to the store's client until they have arrived."""


class ObjectFile:
    """An object of `size` bytes that appears at `path`, a Url, whole, or not at all.

    It does what `atomic.AtomicFile` does, in the same order. Each byte has to be written once, and
    nearly in order, from any threads; without `in_order` in any order and as often as one likes,
    for which it lies on the local disk until it is finished. `outputs` are those among which
    memory and line are shared.
    """

    at_once = True
    by_ranks = False

    def __init__(
        self, path: Path, size: int, *, overwrite: bool = False, in_order: bool = True
    ) -> None:
        self.path = path
        self.size = size
        self.overwrite = overwrite
        self.outputs = 1
        self.left = False
        """Whether parts of it may be left in the store, where nothing shows them."""
        self.remains = False
        """Whether it couldn't be removed again."""
        self.replaced = False
        """Whether it took the place of another object."""
        self._any_order = not in_order
        self._spool: BinaryIO | None = None
        self._state = threading.Condition()
        self._opened = self._placed = self._began = False
        self._etag: str | None = None
        self._completing: threading.Event | None = None

    @property
    def in_order(self) -> bool:
        return not self._held and self._spool is None

    def __enter__(self) -> ObjectFile:
        self.check_absent()
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
                self.commit()
        except BaseException:
            self.rollback()
            raise
        finally:
            self.discard()

    def joined(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def check_absent(self) -> None:
        """Raise UsageError when there is something that must not be replaced."""
        if not self.overwrite and self.taken():
            raise already_exists(self.path)

    def taken(self) -> bool:
        """Whether there is something in its place."""
        return self._found() is not None

    def open(self) -> None:
        """Begin; nothing is sent yet."""
        self._cut()
        self._blocks: dict[int, Block] = {}
        self._missing: dict[int, int] = {}
        self._ready = self._sent = self._written = 0
        self._error: Exception | None = None
        self._writer: Any = None
        self._task: concurrent.futures.Future[None] | None = None
        self._queue: asyncio.Queue[Block] = asyncio.Queue()
        self._lent: list[weakref.ref[Block]] = []
        if self._any_order:
            with write_errors(Path(tempfile.gettempdir())):
                self._spool = tempfile.TemporaryFile()  # noqa: SIM115
        self._opened = True

    def _cut(self) -> None:
        """Decide how large its parts are, and what is gathered before it is sent."""
        parts = max(1, self.size // max(PART, -(-self.size // MOST_PARTS)))
        self._part = max(self.size // parts, 1)  # so the last, shorter one has few bytes
        self._held = self.size <= min(HELD, AT_ONCE * HELD // self.outputs)
        self._block = self.size if self._held else self._part * max(1, AT_ONCE // self.outputs)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `offset` of the object."""
        if self._spool is None:
            self._take(offset, data)
            return
        with self._state, write_errors(Path(tempfile.gettempdir())):
            self._spool.seek(offset)
            self._spool.write(data)

    def _take(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            at, inside = divmod(offset, self._block)
            with self._state:
                self._state.wait_for(functools.partial(self._may_fill, at), LONGEST_LEAD)
                self._raise_error()
                if at not in self._blocks:
                    length = min(self._block, self.size - at * self._block)
                    self._blocks[at], self._missing[at] = Block(length), length
                block = self._blocks[at]
            count = min(len(view), len(block) - inside)
            memoryview(block)[inside : inside + count] = view[:count]
            del block  # or the traceback of an error keeps it
            with self._state:
                self._missing[at] -= count
                self._written += count
                if not self._held:
                    self._hand_over()
            view, offset = view[count:], offset + count

    def copy_from(self, fd: int, offset: int, start: int, count: int) -> int:
        """The system can't copy to a store."""
        return 0

    def flush(self) -> None:
        """It is sent as it comes."""

    def finish(self) -> None:
        """Wait until all of it has arrived, but for the few bytes that go with the completion."""
        if self._spool is not None:
            for offset in range(0, self.size, PART):
                self._spool.seek(offset)
                self._take(offset, self._spool.read(min(PART, self.size - offset)))
        assert self._held or self._written == self.size, f"{self.path} is not whole"
        if self._task is not None:
            begin(self._queue.put(Block()))
            _wait(self._task)
            assert not self._task.cancelled()
        self._raise_error()

    def commit(self) -> None:
        self.place(overwrite=self.overwrite)

    def place(self, *, overwrite: bool) -> None:
        """Let the finished object appear.

        Raises UsageError if there is one and `overwrite` is false.
        """
        before = self._found()
        if before is not None and not overwrite:
            raise already_exists(self.path)
        self._completing = threading.Event()
        try:
            completing = begin(self._complete(overwrite, new=before is None))
            _wait(completing)
            completing.result()
        except Exception as error:
            now = self._found(quiet=True)
            if now is None or now["size"] != self.size or now == before:
                raise self._failed(error) from error
            self.left = False  # only the answer was lost
            self._placed, self.replaced = before is None, before is not None
        found = self._found(quiet=True)
        self._etag = found and found["e_tag"]
        if found is not None and found["size"] != self.size:
            self._placed = False  # it is not ours to remove
            problem = f"has {found['size']:,} bytes, and {self.size:,} were sent"
            raise MachineError(str(self.path), problem, "see who else writes there; try again")

    def identity(self) -> tuple[int, int, int]:
        raise NotImplementedError  # it is for what is set aside

    def discard(self) -> None:
        """Abort the upload, unless it was completed."""
        if not self._opened:
            return
        self._opened = False
        try:
            if self._task is not None and not self._task.done():
                self._task.cancel()
            if self._writer is not None:
                aborting = begin(self._abort())
                concurrent.futures.wait([aborting], LONGEST_ABORT)
                self.left |= not aborting.done() or aborting.exception() is not None
        finally:
            self._blocks.clear()
            if self._spool is not None:
                self._spool.close()
            until = time.monotonic() + LONGEST_RETURN
            while any(block() is not None for block in self._lent) and time.monotonic() < until:
                time.sleep(0.001)  # its threads mustn't give them back when Python has ended

    def rollback(self) -> None:
        """Undo `place`, where there was no other object before, nor is now."""
        if self._completing is not None:  # what was interrupted may be completed all the same
            begin(_nothing()).result()  # by then that has begun, or never will
            self.left |= self._began and not self._completing.wait(LONGEST_ABORT)
        if self._placed:
            self._placed = False
            found = self._found(quiet=True)
            if found is not None and self._etag not in (None, found["e_tag"]):
                return  # someone else's has taken its place
            try:
                self.remove()
            except MachineError:
                self.remains = True

    def remove(self) -> None:
        """Remove what is in its place."""
        import obstore

        for again in (True, False):
            try:
                obstore.delete(self.bucket, self._key)
                return
            except FileNotFoundError:
                return
            except obstore.exceptions.BaseError as error:
                if not again:
                    raise self._failed(error) from error

    def _may_fill(self, at: int) -> bool:
        return self._error is not None or at <= self._sent + AHEAD

    def _hand_over(self) -> None:
        """Have the blocks sent that are whole, as far as all before them are."""
        while self._missing.get(self._ready) == 0:
            del self._missing[self._ready]
            self._lent.append(weakref.ref(self._blocks[self._ready]))
            begin(self._queue.put(self._blocks.pop(self._ready)))
            self._ready += 1
            if self._task is None:
                self._task = begin(self._send())

    async def _send(self) -> None:
        """Send the blocks that come, up to an empty one; then wait until all have arrived."""
        together = 1
        try:
            while block := await self._queue.get():
                view = memoryview(block)
                while view:
                    since = time.monotonic()
                    if self._writer is None:
                        await self._begin(view[: self._part])
                    else:
                        await self._writer.write(view[: together * self._part])
                    await self._writer.write(b"")
                    seconds, view = time.monotonic() - since, view[together * self._part :]
                    if seconds < FAST:
                        together = min(2 * together, AT_ONCE)
                    elif seconds > SLOW:
                        together = max(together // 2, 1)
                block, view = Block(), memoryview(b"")
                with self._state:
                    self._sent += 1
                    self._state.notify_all()
        except Exception as error:
            with self._state:
                self._error = self._failed(error)
                self._state.notify_all()
        finally:
            block, view = Block(), memoryview(b"")  # or a traceback would keep them

    async def _begin(self, part: memoryview) -> None:
        """Begin the upload with its first part; again, where only the end of the answer was lost,
        which the client doesn't do. The other upload has no parts then, and nobody knows it."""
        import obstore

        for pause in (0.2, 1.0, 0.0):
            # It waits until no part is on its way, and sends all parts that it is given.
            self._writer = obstore.open_writer_async(
                self.bucket, self._key, buffer_size=self._part, max_concurrency=0
            )
            try:  # without the answer it can't be aborted
                await asyncio.shield(self._writer.write(part))
                return
            except obstore.exceptions.BaseError as error:
                if not pause or "response body" not in str(error):
                    raise
                await asyncio.sleep(pause)

    async def _complete(self, overwrite: bool, *, new: bool) -> None:
        self._began = True
        try:
            await self._put(overwrite)
            self._placed, self.replaced = new, not new
        finally:
            assert self._completing is not None
            self._completing.set()

    async def _put(self, overwrite: bool) -> None:
        if self._held:
            await self._put_at_once(self._blocks[0] if self.size else b"", overwrite)
        else:
            writer, self._writer = self._writer, None
            try:
                await writer.close()
            except Exception as error:
                self.left = "performing DELETE" in str(error)  # it was to be aborted
                raise

    async def _put_at_once(self, data: bytes | Block, overwrite: bool) -> None:
        """Send it by one request, which fails where there is one already: not all stores see to
        that, or know how to."""
        import obstore

        mode: Any = "overwrite" if overwrite else "create"
        for pause in (0.1, 0.5, 2.0):
            try:
                await obstore.put_async(
                    self.bucket, self._key, data, mode=mode, use_multipart=False
                )
                return
            except obstore.exceptions.AlreadyExistsError:
                with contextlib.suppress(FileNotFoundError):
                    # A first try may have come through, and its answer was lost.
                    found = await obstore.get_async(self.bucket, self._key)
                    if found.meta["size"] != self.size or await found.bytes_async() != data:
                        raise already_exists(self.path) from None
                    return
            except obstore.exceptions.BaseError as error:
                if mode == "overwrite" or "status code: 501" not in str(error):
                    raise
                mode = "overwrite"
            await asyncio.sleep(pause)
        problem = "is being written by someone else in the same moment"
        raise MachineError(str(self.path), problem, "try again")

    async def _abort(self) -> None:
        writer, self._writer = self._writer, None
        await writer.__aexit__(InterruptedError, None, None)

    @functools.cached_property
    def bucket(self) -> Any:
        """obstore's store of it, which others of a call may share."""
        assert isinstance(self.path, Url)
        return make_store(self.path)

    @property
    def _key(self) -> str:
        return "/".join(self.path.parts[2:])

    def _found(self, *, quiet: bool = False) -> Any:
        """What is in its place; None where nothing is."""
        import obstore

        try:
            return look_at(self.path, self.bucket, self._key)
        except FileNotFoundError:
            return None
        except obstore.exceptions.BaseError as error:
            if quiet:
                return None
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> PosthocError:
        if isinstance(error, PosthocError):
            return error
        return told(self.path, str(error), "written")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def remove_object(path: Path) -> None:
    """Remove what is there."""
    ObjectFile(path, 0).remove()


def copy_object(source: Path, target: Path) -> None:
    """Have the store copy an object to another place in its bucket."""
    import obstore

    file = ObjectFile(target, 0)
    try:
        obstore.copy(file.bucket, "/".join(source.parts[2:]), "/".join(target.parts[2:]))
    except obstore.exceptions.BaseError as error:
        raise told(target, str(error), "written") from error
