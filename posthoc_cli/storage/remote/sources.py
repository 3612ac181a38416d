"""Buckets and servers by obstore: how each is reached, listed and read, and its errors in words."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from posthoc_cli.errors import MachineError, UsageError, printable
from posthoc_cli.storage.places import File, Url

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


def make_store(url: Url, **options: Any) -> Any:
    """obstore's store of the bucket or server of `url`; credentials come from the environment, the
    profiles, or the machine."""
    try:
        from obstore import store
    except ImportError:
        raise needs(url, "obstore") from None
    options = dict[str, Any](client_options=CLIENT, retry_config=RETRY) | options
    host = url.parts[1]
    with errors(url):
        if url.scheme == "s3":
            from posthoc_cli.storage.remote.credentials import aws_options

            return store.S3Store(host, **aws_options(url), **options)
        if url.scheme == "gs":
            return store.GCSStore(host, **options)
        if url.scheme == "az":
            container, _, account = host.partition("@")
            if account:
                options["account_name"] = account.split(".")[0]
            return store.AzureStore(container, **options)
        return store.HTTPStore.from_url(f"{url.scheme}://{host}", **options)


class Bucket:
    """A bucket or container."""

    lists = True

    def __init__(self, url: Url) -> None:
        self.root = Url(*url.parts[:2])
        self.store = make_store(url)

    def key(self, path: Path) -> str:
        return "/".join(path.parts[2:])

    def listing(self, key: str) -> tuple[Sequence[Found], bool]:
        import obstore

        found: list[Found] = []
        prefix = f"{key}/" if key else None
        with errors(self.root / key):
            for pages, page in enumerate(obstore.list(self.store, prefix, chunk_size=1000)):
                if pages == MOST_LISTED:
                    return self._level(key), False
                found += self._found(key, page)
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
        import obstore

        with errors(path):
            return described(path, obstore.head(self.store, self.key(path)))

    async def fetch(self, path: Url, start: int, end: int) -> tuple[File, memoryview]:
        import obstore

        with errors(path):
            options: Any = {"range": (start, end)}
            try:
                result = await obstore.get_async(self.store, self.key(path), options=options)
            except obstore.exceptions.BaseError as error:
                if start or _status(str(error)) != 416:
                    raise
                found = await asyncio.get_running_loop().run_in_executor(None, self.head, path)
                return found, memoryview(b"")  # it is empty
            return described(path, result.meta), memoryview(await result.bytes_async())


class Server(Bucket):
    """A server of files by HTTP, whose folders are listed as its index pages have them."""

    lists = False

    def listing(self, key: str) -> tuple[Sequence[Found], bool]:
        import obstore

        try:
            with errors(self.root / key):
                result = obstore.get(self.store, key)
                if not _is_page(result):
                    return [], False
                page = b""
                for piece in result.stream():
                    page += bytes(piece)
                    if len(page) > _LONGEST_PAGE:
                        return [], False
        except FileNotFoundError:
            return [], False
        except _Refused:  # as a folder; its files may be there
            return [], False
        links = _Links(f"/{key}/" if key else "/")
        links.feed(page.decode("utf-8", "replace"))
        return [("", None), *((name, None) for name in links.names)], False

    def head(self, path: Path) -> File:
        import obstore

        with errors(path):
            result = obstore.get(self.store, self.key(path), options={"head": True})
        if _is_page(result) and path.suffix.lower() not in (".html", ".htm"):
            raise FileNotFoundError
        return described(path, result.meta)


def _is_page(result: Any) -> bool:
    return str(result.attributes.get("Content-Type", "")).startswith("text/html")


class _Links(HTMLParser):
    """The names that an index page links to; those of folders end in a slash."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._above = folder
        self.names: dict[str, None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = dict(attrs).get("href") or ""
        parts = urlsplit(link)
        name = unquote(parts.path).removeprefix(self._above).removeprefix("./")
        plain = not (parts.scheme or parts.netloc or parts.query or parts.fragment)
        if tag == "a" and plain and name and "/" not in name[:-1] and name.strip("./"):
            self.names[name] = None


def described(path: Path, about: Any) -> File:
    """What a store says of an object."""
    modified = int(about["last_modified"].timestamp()) * 10**9
    return File(path, about["size"], modified, None, about["e_tag"] or about["version"])


# Errors


class _Refused(MachineError):
    """The error of a request that the server won't answer."""


class Denied(_Refused):
    """The error of a request without permission."""


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
    """Raise a store's errors as one line each; FileNotFoundError as it is."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise told(path, str(error)) from None
        raise
    except (BaseError, ValueError, NotImplementedError) as error:
        raise told(path, str(error)) from error


def told(path: Path, text: str, doing: str = "read") -> MachineError:
    """The error that a store's own text stands for, met when the object was read or "written"."""
    remedy = "try again" if doing == "written" else "try again, or copy the files to a disk"
    problem = f"cannot be {doing}"
    status = _status(text)
    code = (re.search(r"<Code>(\w+)</Code>", text) or ("", ""))[1]
    kind = (re.search(r"kind: (\w+)", text) or ("", ""))[1]
    where = printable(_host(text) or str(path))
    if code in ("NoSuchBucket", "ContainerNotFound"):
        what = "container" if code == "ContainerNotFound" else "bucket"
        return MachineError(str(path), f"there is no such {what}", "check its name")
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return MachineError(str(path), "no credentials were found", _credentials(path))
    if "Expired" in code or "Expired" in text:
        return MachineError(str(path), f"{problem}: the credentials have expired", "renew them")
    if "Range request not supported" in text or "NotPartial" in text:
        problem = "is on a server that gives no parts of files"
        return MachineError(str(path), problem, "copy the files to a disk")
    if status in (401, 403):
        reason = f" ({code or status})"
        return Denied(str(path), f"{problem}: permission denied{reason}", _credentials(path))
    if status in (301, 302, 307) and "s3" in text.lower():
        return MachineError(str(path), "is in another region", "set AWS_REGION to the bucket's")
    if status is not None:
        return _Refused(
            str(path), f"{problem}: the server answers {status}{code and f' ({code})'}", remedy
        )
    check = "check the network and the address"
    if "dns error" in text or "failed to lookup" in text:
        return MachineError(str(path), f"{problem}: there is no host {where}", check)
    if kind == "Timeout" or "timed out" in text or "TimedOut" in text:
        return MachineError(str(path), f"{problem}: {where} doesn't answer", check)
    if kind == "Connect":
        return MachineError(str(path), f"{problem}: no connection to {where}", check)
    if kind:
        return MachineError(str(path), f"{problem}: the connection to {where} was lost", check)
    line = printable(" ".join(text.split("Debug source:")[0].split()))
    if any(words in text for words in _UNSET):
        remedy = _credentials(path)
    return MachineError(str(path), f"{problem} ({line[:200]})", remedy)


_UNSET = ("Account must be specified", "Invalid Access Key", "One of service account")
"""What obstore says of settings that are missing or make no sense."""


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})|status: (\d{3})", text)
    return int(found[1] or found[2]) if found else None


def _host(text: str) -> str:
    found = re.search(r"https?://([^/\s\"',?]+)", text)
    return found[1] if found else ""


def _credentials(path: Path) -> str:
    scheme = path.parts[0][:-1]
    given = {
        "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or for a public "
        "bucket AWS_SKIP_SIGNATURE=true",
        "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket "
        "GOOGLE_SKIP_SIGNATURE=true",
        "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or for a public "
        "container AZURE_SKIP_SIGNATURE=true",
    }
    return given.get(scheme, "check the address, and whether you may read it")
