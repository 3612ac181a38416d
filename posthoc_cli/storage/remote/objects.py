"""What lies in buckets, on servers and on the Hugging Face hub, read as files and folders are.

A folder is listed with all that is below it, by few requests; what that says of its files holds
until `forget`. Of a file that is opened its beginning is fetched, mostly all of its header.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, cast

from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.storage.disk import changed, unreadable
from posthoc_cli.storage.places import File, Url
from posthoc_cli.storage.remote.answers import Denied
from posthoc_cli.storage.remote.fetching import RemoteFile, Stream, begin
from posthoc_cli.storage.remote.sources import Bucket, Server, Source

HEAD = 512 << 10
"""Bytes of a file that are fetched when it is opened: the headers of most are shorter."""

HEADS = 64
"""Files whose beginnings are fetched before they are opened, and kept."""

FEW = 4
"""Files of a folder that are asked for by themselves; for more the folder is listed."""

_STORES: dict[tuple[Url, str | None], RemoteStore] = {}
"""By where they begin, and who asks."""

_LOCK = threading.Lock()


def remote_store(path: Path) -> RemoteStore:
    """The store of a URL; raises UsageError where what it needs isn't installed."""
    assert isinstance(path, Url)
    if len(path.parts) < 2:
        raise UsageError(str(path), "is not a whole URL", "name a bucket or host too")
    with _LOCK:
        for (root, login), known in _STORES.items():
            if path.is_relative_to(root) and login == path.login:
                return known
        source = _source_of(path)
        return _STORES.setdefault((source.root, path.login), RemoteStore(source))


def _source_of(url: Url) -> Source:
    if url.scheme == "hf":
        from posthoc_cli.storage.remote.hub import repository

        return repository(url)
    return Server(url) if url.scheme.startswith("http") else Bucket(url)


def forget() -> None:
    """Forget what was listed."""
    with _LOCK:
        _STORES.clear()


class RemoteStore:
    """A bucket, server or repository, as a store (see `stores`)."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.RLock()
        self._files: dict[str, File | None] = {}
        self._folders: dict[str, set[str]] = {}
        self._whole: set[str] = set()  # folders of which all that is below is known
        self._none: dict[str, Denied | None] = {}  # what is no folder, or can't be listed
        self._single: dict[str, File | None] = {}  # what was asked for by itself
        self._heads: OrderedDict[str, Future[tuple[File, memoryview]]] = OrderedDict()
        self._to_come: list[Url] = []
        self._early: set[str] = set()  # of the heads, those that nobody has asked for yet

    # What is there

    def list(self, folder: Path) -> list[str]:
        key = self._source.key(folder)
        names = self._names(key)
        if names is not None:
            return list(names)
        # A server that lists nothing: what the user has named is there.
        beside = f"{key}/" if key else ""
        known = {
            each[len(beside) :].split("/")[0]
            for each, file in self._single.items()
            if file and each.startswith(beside)
        }
        if not known:
            raise NotADirectoryError if self.is_file(folder) else FileNotFoundError
        return list(known)

    def is_folder(self, path: Path) -> bool:
        key = self._source.key(path)
        with self._lock:
            if key not in self._folders and (key in self._files or self._single.get(key)):
                return False
        return self._names(key) is not None

    def is_file(self, path: Path) -> bool:
        return self._file(path) is not None

    def exists(self, path: Path) -> bool:
        return self.is_file(path) or self.is_folder(path)

    def status(self, path: Path) -> File | None:
        return self._file(path) or (File(path, 0) if self.is_folder(path) else None)

    def identity(self, path: Path) -> Hashable | None:
        return str(path) if self.exists(path) else None

    def _file(self, path: Path) -> File | None:
        """The file at `path`: asked for by itself, unless its folder is listed."""
        key = self._source.key(path)
        if not key:
            return None
        with self._lock:
            beside = key.rpartition("/")[0]
            asked = {
                each: file
                for each, file in self._single.items()
                if each.rpartition("/")[0] == beside
            }
            if self._source.lists:
                if self._names(key) is not None:
                    return None
                if len(asked) >= FEW:
                    with contextlib.suppress(MachineError):
                        self._names(beside)
            if beside in self._folders:
                if key not in self._files:
                    return None
            elif key in asked or self._is_below_whole(beside) or self._single.get(beside):
                return asked.get(key)
            if (known := self._files.get(key)) is not None:
                return known
        begun = self._heads.get(key)
        try:
            found = begun.result()[0] if begun else self._source.head(path)
        except Denied as error:
            # Who may not list a public bucket isn't told either what is missing in it.
            if any(asked.values()):
                return None
            raise self._none.get(key) or error from None
        except FileNotFoundError:
            if (denied := self._none.get(key)) is not None:
                raise denied from None
            found = None
        with self._lock:
            if key in self._files:
                self._files[key] = found
            else:
                self._single[key] = found
        return found

    def _is_below_whole(self, key: str) -> bool:
        parts = key.split("/")
        return any("/".join(parts[:count]) in self._whole for count in range(len(parts) + 1))

    def _names(self, key: str) -> set[str] | None:
        """The names in a folder; None where there is none."""
        with self._lock:
            if key in self._folders or key in self._none or self._is_below_whole(key):
                return self._folders.get(key)
            try:
                found, whole = self._source.listing(key)
            except Denied as error:
                above, _, name = key.rpartition("/")
                if name in self._folders.get(above, ()):
                    raise
                self._none[key] = error  # its files may be there
                return None
            if whole:
                self._whole.add(key)
            for below, file in found:
                self._note(key, below, file)
            if key not in self._folders:
                self._none[key] = None
            return self._folders.get(key)

    def _note(self, key: str, below: str, file: File | None) -> None:
        """Note what lies below folder `key`; a folder ends in a slash, or is "" for itself."""
        at = key
        self._folders.setdefault(at, set())
        names = [name for name in below.split("/") if name]
        for name in names[:-1]:
            self._folders[at].add(name)
            at = f"{at}/{name}" if at else name
            self._folders.setdefault(at, set())
        if names:
            self._folders[at].add(names[-1])
            if not below.endswith("/"):
                self._files[f"{at}/{names[-1]}" if at else names[-1]] = file

    # Reading

    @contextlib.contextmanager
    def open(self, path: Path, remedy: str) -> Iterator[tuple[BinaryIO, File]]:
        key = self._source.key(path)
        if self.is_folder(path):
            raise SnapshotError(str(path), "not a regular file", remedy)
        with self._lock:
            future = self._head_of(cast(Url, path))
            self._early.discard(key)
            self._fetch_heads()
        try:
            file, head = future.result()
        except FileNotFoundError:
            error = FileNotFoundError(errno.ENOENT, "No such file or directory")
            raise unreadable(path, error, "check the path") from error
        with RemoteFile(file, self._fetch(file), lambda: None) as data, Stream(data, head) as read:
            yield cast(BinaryIO, read), file

    def input(self, file: File, keep_open: bool) -> RemoteFile:
        return RemoteFile(file, self._fetch(file), functools.partial(self._check, file))

    def will_open(self, paths: Sequence[Path]) -> None:
        """Fetch the beginnings of these files, or of the files in these folders, ahead."""
        with self._lock:
            self._to_come = list(self._to_open(paths))[::-1]
            self._fetch_heads()

    def _to_open(self, paths: Sequence[Path]) -> Iterator[Url]:
        for path in paths:
            key = self._source.key(path)
            if key in self._files:
                yield cast(Url, path)
            for name in sorted(self._folders.get(key, ())):
                if self._source.key(path / name) in self._files:
                    yield cast(Url, path / name)

    def _fetch_heads(self) -> None:
        while self._to_come and len(self._early) < HEADS // 2:
            path = self._to_come.pop()
            self._early.add(self._source.key(path))
            self._head_of(path)

    def _head_of(self, path: Url) -> Future[tuple[File, memoryview]]:
        """The file at `path` and its beginning."""
        key = self._source.key(path)
        if key not in self._heads:
            self._heads[key] = begin(self._beginning(path, self._files.get(key)))
        self._heads.move_to_end(key)
        while len(self._heads) > HEADS:
            self._heads.popitem(last=False)
        return self._heads[key]

    async def _beginning(self, path: Url, known: File | None) -> tuple[File, memoryview]:
        if known is not None and not known.size:
            return known, memoryview(b"")
        end = HEAD if known is None else min(HEAD, known.size)
        return await self._source.fetch(path, 0, end)

    def _fetch(self, file: File) -> Any:
        async def fetch(start: int, end: int) -> memoryview:
            try:
                found, data = await self._source.fetch(cast(Url, file.path), start, end)
            except FileNotFoundError:
                raise changed(file.path) from None
            if _differs(found, file) or len(data) != end - start:
                raise changed(file.path)
            return data

        return fetch

    def _check(self, file: File) -> None:
        """Raise SnapshotError if another object is in the file's place."""
        try:
            found = self._source.head(file.path)
        except FileNotFoundError:
            raise changed(file.path) from None
        if _differs(found, file):
            raise changed(file.path)


def _differs(one: File, other: File) -> bool:
    if one.version is not None and other.version is not None:
        return (one.size, one.version) != (other.size, other.version)
    return (one.size, one.modified // 10**9) != (other.size, other.modified // 10**9)
