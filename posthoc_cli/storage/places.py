"""Places: paths of the local disk, and URLs that act like paths."""

from __future__ import annotations

import base64
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from posthoc_cli.errors import UsageError, either

SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
"""How the URLs begin that are read: buckets, servers, the Hugging Face hub."""

_ALIKE = {
    **dict.fromkeys(("azure", "abfs", "abfss", "wasb", "wasbs"), "az"),
    "gcs": "gs",
    "s3a": "s3",
    "s3n": "s3",
}
"""What other programs call them."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|\w[\w.-]*)(?::[0-9]{1,5})?"
_HOSTS = {
    "s3": (_NAME, "BUCKET/FOLDER"),
    "gs": (_NAME, "BUCKET/FOLDER"),
    "az": (r"[A-Za-z0-9$][A-Za-z0-9_-]*(?:@[A-Za-z0-9.-]+)?", "CONTAINER/FOLDER"),
    "https": (_HOST, "HOST/FOLDER"),
    "http": (_HOST, "HOST/FOLDER"),
    "hf": (_NAME, "OWNER/REPO/FOLDER"),
}
"""How buckets, hosts and owners are named, at other names obstore may panic; and what follows."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)

_ALMOST = re.compile(rf"({'|'.join([*SCHEMES, *_ALIKE, 'file'])}):(?!//)", re.IGNORECASE)
"""How a text begins that was to be a URL, unless there is such a folder."""

_PAGE = re.compile(r"(?:huggingface\.co|hf\.co)/(.+?)/(?:tree|blob)/([^/]+)(.*)")
"""What a browser shows of a repository."""

_SIGNED = re.compile(r"\?.*\b(?:sig|[a-z-]*signature|[a-z-]*token)=", re.IGNORECASE)

_LOGIN = re.compile(r"(https?)://([^/\s]*)@([^/\s?#@]+)(.*)", re.IGNORECASE | re.DOTALL)

_LOGINS: dict[tuple[str, ...], str] = {}
"""What to send to servers whose URLs were given with a name and a password, by scheme and host."""

if TYPE_CHECKING:
    _Local = Path
else:
    _Local = type(Path())  # before Python 3.12 there is no other way


class Url(_Local):
    """A URL that is taken apart and put together as a path is.

    Its first part is the scheme, its second the bucket, host or owner; `str` and `os.fspath` give
    it with both slashes. What is relative to another is written like any path. It says nothing of
    what is there: that is `stores`' business.
    """

    __slots__ = ()

    def __str__(self) -> str:
        parts = self.parts
        if parts and parts[0][:-1] in SCHEMES and parts[0].endswith(":"):
            inside = "/".join(parts[1:])
            if parts[0].startswith("http"):  # what ends a path there is quoted, as it has to be
                inside = re.sub("[%?#]", lambda found: quote(found[0]), inside)
            return f"{parts[0]}//{inside}"
        return "/".join(parts) or "."

    def as_posix(self) -> str:
        return str(self)

    def __fspath__(self) -> str:
        return str(self)

    def __reduce__(self) -> Any:
        return type(self), tuple(self.parts)

    def is_absolute(self) -> bool:
        return bool(self.parts) and self.parts[0][:-1] in SCHEMES

    def absolute(self) -> Url:
        return self

    def resolve(self, strict: bool = False) -> Url:
        return self

    @property
    def scheme(self) -> str:
        return self.parts[0][:-1]

    @property
    def login(self) -> str | None:
        """The value of the header that says who asks, where a URL of this server had a login."""
        return _LOGINS.get(self.parts[:2])

    @property
    def key(self) -> str:
        """What follows the bucket or host."""
        return "/".join(self.parts[2:])


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was found: bytes, time of its last change in nanoseconds, and inode number.

    An object of a store has no number but a `version`, such as its etag: another value is another
    object in its place.
    """

    path: Path
    size: int
    modified: int = 0
    inode: int | None = None
    version: str | None = None

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> File:
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)


def place(given: str | os.PathLike[str]) -> Path:
    """The path or Url that a user's text or path stands for.

    A name and a password before the host are kept for the server alone: nothing shows them.
    Raises UsageError for a URL of an unknown kind, or one that is not whole.
    """
    text = without_login(os.fspath(given))
    as_it_is = given if isinstance(given, Path) else Path(text)
    match = None if isinstance(given, Url) else _URL.fullmatch(text)
    # A Path has lost a slash; a text with one names a folder.
    if match is None or (len(match[2]) < 2 and isinstance(given, str)):
        almost = _ALMOST.match(text) if isinstance(given, str) else None
        if almost and not os.path.lexists(text) and not os.path.lexists(almost[0]):
            raise _not_whole(text, _ALIKE.get(almost[1].lower(), almost[1].lower()))
        return as_it_is
    scheme = _ALIKE.get(match[1].lower(), match[1].lower())
    if scheme not in SCHEMES:
        if len(match[2]) < 2 or os.path.lexists(text):
            return as_it_is
        if scheme == "file":
            raise UsageError(text, "is a URL of the local disk", "give the path instead")
        kinds = either([f"{each}://" for each in SCHEMES])
        raise UsageError(text, f"{match[1]}:// is not known", f"give a path, {kinds}")
    host, _, key = match[3].partition("/")
    if scheme.startswith("http"):
        if "?" in key:
            remedy = "give an address that needs none"
            raise UsageError(text, "ends in a query, which is not supported", remedy)
        page = _PAGE.fullmatch(f"{host}/{key}")
        if page is not None:
            name, revision, below = page.groups()
            raise UsageError(text, "is a page to look at", f"write hf://{name}@{revision}{below}")
        host, key = unquote(host), unquote(key)
    elif _SIGNED.search(key):
        remedy = "set AZURE_STORAGE_SAS_TOKEN" if scheme == "az" else "leave it out"
        raise UsageError(text, "ends in a signature, which is not read from a URL", remedy)
    key = posixpath.normpath(key.strip("/")) if key else ""
    if not host or len(match[2]) > 2 or key == ".." or key.startswith("../"):
        raise _not_whole(text, scheme)
    if not (is_host(host) if _HOSTS[scheme][0] == _HOST else re.fullmatch(_HOSTS[scheme][0], host)):
        problem = f"'{host}' can't be the name of a bucket or host"
        if "@" in host:
            problem = "has a name or a password, which no such URL takes"
        raise UsageError(text, problem, f"write {scheme}://{_HOSTS[scheme][1]}")
    return Url(f"{scheme}:", host, key)


def without_login(text: str) -> str:
    """`text`, or the URL of a server without name and password, which are kept for that server."""
    match = _LOGIN.fullmatch(text)
    if match is None:
        return text
    scheme, login, host, rest = match.groups()
    given = base64.b64encode(unquote(login).encode()).decode()
    _LOGINS[f"{scheme.lower()}:", unquote(host)] = f"Basic {given}"
    return f"{scheme}://{host}{rest}"


def is_host(text: str) -> bool:
    """Whether it is the name or address of a server, maybe with a port."""
    port = text.rpartition(":")[2]
    return bool(re.fullmatch(_HOST, text)) and (not port.isdigit() or int(port) <= 65535)


def _not_whole(text: str, scheme: str) -> UsageError:
    if scheme == "file":
        return UsageError(text, "is a URL of the local disk", "give the path instead")
    return UsageError(text, "is not a whole URL", f"write {scheme}://{_HOSTS[scheme][1]}")


def is_url(given: str | os.PathLike[str]) -> bool:
    """Whether it stands for a URL; raises what `place` does."""
    return isinstance(place(given), Url)


def normal(path: Path) -> Path:
    """The same without `.` and `..`, as the text has them."""
    return path if isinstance(path, Url) else Path(os.path.normpath(path))


def common_folder(paths: Sequence[Path]) -> Path:
    """The lowest folder that all of `paths` lie in or are; raises ValueError where there is none,
    as on several drives or stores."""
    if not any(isinstance(path, Url) for path in paths):
        return Path(os.path.commonpath(paths) or ".")
    first = paths[0]
    for folder in (first, *first.parents):
        if len(folder.parts) > 1 and all(path.is_relative_to(folder) for path in paths):
            return folder
    raise ValueError("several stores")
