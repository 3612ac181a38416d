"""Buckets and servers by obstore: how each is reached, listed and read, and its errors in words."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import quote, unquote, urljoin, urlsplit

from posthoc_cli.errors import UsageError
from posthoc_cli.storage.places import File, Url
from posthoc_cli.storage.remote.answers import Refused, check_store, errors, is_page
from posthoc_cli.storage.remote.credentials import aws_options, check_environment

CLIENT = {
    "allow_http": True,  # where the endpoint says so
    "connect_timeout": "5s",
    "read_timeout": "20s",
    "timeout": "30min",  # of a range; what has stopped coming is told by the read's
    "pool_idle_timeout": "30s",
    "user_agent": "posthoc-cli",
}

RETRY = {
    "max_retries": 8,
    "retry_timeout": datetime.timedelta(seconds=25),
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=4),
        "base": 2,
    },
}
"""Where nothing answers, an error comes after 45 seconds at the latest."""

MOST_LISTED = 20
"""Pages of a listing, of a thousand objects each, after which a folder is listed by itself."""

_LONGEST_PAGE = 16 << 20

Found = tuple[str, File | None]
"""A path below a listed folder: a folder's ends in a slash, "" is the folder itself; and what is
known of a file."""


class Source(Protocol):
    """How a bucket, a server or a repository is read. All raise MachineError; `head` and `fetch`
    FileNotFoundError for what isn't there."""

    root: Url
    lists: bool
    """Whether a file is looked for in the listing of its folder, rather than asked for."""

    def key(self, path: Path) -> str:
        """Where in it a URL leads: folders and name, with slashes between."""

    def listing(self, key: str) -> tuple[Sequence[Found], bool]:
        """What is in a folder, nothing where there is none; and whether all below it is told."""

    def head(self, path: Path) -> File: ...

    async def fetch(self, path: Url, start: int, end: int) -> tuple[File, memoryview]:
        """The bytes from `start` to before `end`, fewer at the file's end, and the whole file."""


def needs(url: Url, module: str) -> UsageError:
    """The error for a URL that needs what isn't installed."""
    problem = f"needs {module}, which is not installed"
    return UsageError(str(url), problem, "pip install 'posthoc-cli[remote]'")


def make_store(url: Url, headers: Mapping[str, str] | None = None) -> Any:
    """obstore's store of the bucket of `url`, or of what is at and below it on a server, which is
    sent `headers`; credentials come from the environment, the profiles, or the machine."""
    try:
        from obstore import store
    except ImportError:
        raise needs(url, "obstore") from None
    options: dict[str, Any] = {"client_options": CLIENT, "retry_config": RETRY}
    host = url.parts[1]
    check_environment(url.scheme)
    with errors(url):
        if url.scheme == "s3":
            return store.S3Store(host, **aws_options(url), **options)
        if url.scheme == "gs":
            return store.GCSStore(host, **options)
        if url.scheme == "az":
            container, _, account = host.partition("@")
            if account:
                options["account_name"] = account.split(".")[0]
            return store.AzureStore(container, **options)
        sent = {"authorization": url.login} if url.login else {}
        options["client_options"] = CLIENT | {"default_headers": sent | dict(headers or {})}
        return store.HTTPStore.from_url(f"{url.scheme}://{host}/{quote(url.key)}", **options)


class Bucket:
    """A bucket or container."""

    lists = True

    def __init__(self, url: Url) -> None:
        self.root = Url(*url.parts[:2])
        self.store = make_store(url)

    def key(self, path: Path) -> str:
        return "/".join(path.parts[2:])

    def found_at(self, path: Path) -> tuple[Any, str]:
        """The store that has an object, and its key there."""
        return self.store, self.key(path)

    def listing(self, key: str) -> tuple[Sequence[Found], bool]:
        import obstore

        found: list[Found] = []
        prefix = f"{key}/" if key else None
        with errors(self.root / key):
            try:
                for pages, page in enumerate(obstore.list(self.store, prefix, chunk_size=1000)):
                    if pages == MOST_LISTED:
                        return self._level(key), False
                    found += self._found(key, page)
            except obstore.exceptions.BaseError as error:
                if "invalid path" not in str(error):
                    raise
                return self._level(key), False  # it may be deeper that a name has an empty part
        return found or ([("", None)] if not key else []), True

    def _level(self, key: str) -> Sequence[Found]:
        import obstore

        level = obstore.list_with_delimiter(self.store, f"{key}/" if key else None)
        folders = [
            f"{name.rstrip('/')[len(key) :].lstrip('/')}/" for name in level["common_prefixes"]
        ]
        return [*((name, None) for name in folders), *self._found(key, level["objects"])]

    def _found(self, key: str, listed: Any) -> Iterator[Found]:
        for about in listed:
            below = about["path"][len(key) :].lstrip("/")
            # What programs put there to show a folder has its name, and no bytes.
            if below:
                yield below, described(self.root / about["path"], about)
            else:
                yield "", None

    def head(self, path: Path) -> File:
        with errors(path):
            return described(path, look_at(path, self.store, self.key(path)))

    async def fetch(self, path: Url, start: int, end: int) -> tuple[File, memoryview]:
        import obstore

        with errors(path):
            options: Any = {"range": (start, end)}
            try:
                result = await obstore.get_async(*self.found_at(path), options=options)
            except obstore.exceptions.BaseError as error:
                if start or "status code: 416" not in str(error):
                    raise
                found = await asyncio.get_running_loop().run_in_executor(None, self.head, path)
                return found, memoryview(b"")  # it is empty
            return described(path, result.meta), memoryview(await result.bytes_async())


class Server(Bucket):
    """A server of files by HTTP, whose folders are listed as its index pages have them."""

    lists = False

    def __init__(self, url: Url, headers: Mapping[str, str] | None = None) -> None:
        self.root = Url(*url.parts[:2])
        self._headers = headers
        self.store = make_store(self.root, headers)
        self._odd: dict[Path, Any] = {}

    def found_at(self, path: Path) -> tuple[Any, str]:
        key = "/".join(path.parts[2:])
        if key.isprintable() and not set("[]|^") & set(key):
            return self.store, key
        # obstore doesn't quote these, and then follows no redirect: the URL of a store it takes.
        if path not in self._odd:
            self._odd[path] = make_store(cast(Url, path), self._headers)
        return self._odd[path], ""

    def listing(self, key: str) -> tuple[Sequence[Found], bool]:
        import obstore

        try:
            with errors(self.root / key):
                result = obstore.get(*self.found_at(self.root / key))
                if not is_page(result):
                    return [], False
                page = b""
                for piece in result.stream():
                    page += bytes(piece)
                    if len(page) > _LONGEST_PAGE:
                        return [], False
        except FileNotFoundError:
            return [], False
        except Refused:  # as a folder; its files may be there
            return [], False
        host = self.root.parts[1]
        links = _Links(f"http://{host}/{quote(key)}/" if key else f"http://{host}/")
        links.feed(page.decode("utf-8", "replace"))
        return [("", None), *((name, None) for name in links.names)], False

    def head(self, path: Path) -> File:
        import obstore

        try:
            with errors(path):
                result = obstore.get(*self.found_at(path), options={"head": True})
        except Refused:  # as some servers do with HEAD
            with errors(path):
                result = obstore.get(*self.found_at(path), options={"range": (0, 1)})
        if is_page(result) and path.suffix.lower() not in (".html", ".htm"):
            raise FileNotFoundError
        return described(path, result.meta)


class _Links(HTMLParser):
    """The names below a folder that its index page links to; those of folders end in a slash."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = self._base = folder
        self.names: dict[str, None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = (dict(attrs).get("href") or "").strip()
        with contextlib.suppress(ValueError):  # what is no URL links to nothing
            parts, folder = urlsplit(urljoin(self._base, link)), urlsplit(self._folder)
            if tag == "base":
                self._base = parts.geturl()
            name = unquote(parts.path).removeprefix(unquote(folder.path))
            inside = parts.netloc == folder.netloc and name != unquote(parts.path)
            if tag == "a" and inside and name and "/" not in name[:-1] and name.strip("./"):
                self.names[name] = None


def look_at(path: Path, bucket: Any, key: str) -> Any:
    """What a bucket says of an object; raises obstore's errors, and MachineError where it is no
    store that answers."""
    import obstore

    found = obstore.get(bucket, key, options={"head": True})
    check_store(path, found)
    return found.meta


def described(path: Path, about: Any) -> File:
    """What a store says of an object."""
    modified = int(about["last_modified"].timestamp()) * 10**9
    return File(path, about["size"], modified, None, about["e_tag"] or about["version"])
