"""Places: paths of the local disk, and URLs that act like paths."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from posthoc_cli.errors import UsageError, either

SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
"""How the URLs begin that are read: buckets, servers, the Hugging Face hub."""

_ALIKE = {"gcs": "gs", "s3a": "s3", "azure": "az", "abfs": "az", "abfss": "az"}
"""What other programs call them."""

_NO_HOST = re.compile(r"[\s\\<>\"'`^|{}%?#]|^\.+$")
"""What no bucket, host or owner is named like; obstore may panic at it."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)

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
            return f"{parts[0]}//{'/'.join(parts[1:])}"
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

    Raises UsageError for a URL of an unknown kind, or one that is not whole.
    """
    text = os.fspath(given)
    as_it_is = given if isinstance(given, Path) else Path(text)
    match = None if isinstance(given, Url) else _URL.fullmatch(text)
    # A Path has lost a slash; a text with one names a folder.
    if match is None or (len(match[2]) < 2 and isinstance(given, str)):
        return as_it_is
    scheme = _ALIKE.get(match[1].lower(), match[1].lower())
    if scheme not in SCHEMES:
        if len(match[2]) < 2 or os.path.lexists(text):
            return as_it_is
        if scheme == "file":
            raise UsageError(text, "is a URL of the local disk", "give the path instead")
        kinds = either([f"{each}://" for each in SCHEMES])
        raise UsageError(text, f"{match[1]}:// is not known", f"give a path, {kinds}")
    rest = match[3]
    if scheme.startswith("http"):
        if "?" in rest:
            remedy = "give an address that needs none"
            raise UsageError(text, "ends in a query, which is not supported", remedy)
        rest = unquote(rest)
    host, _, key = rest.partition("/")
    key = posixpath.normpath(key.strip("/")) if key else ""
    if _NO_HOST.search(host):
        problem = f"'{host}' can't be the name of a bucket or host"
        raise UsageError(text, problem, f"write {scheme}://{_NEXT[scheme]}")
    if not host or key.startswith(".."):
        raise UsageError(text, "is not a whole URL", f"write {scheme}://{_NEXT[scheme]}")
    return Url(f"{scheme}:", host, key)


_NEXT = {
    "s3": "BUCKET/FOLDER",
    "gs": "BUCKET/FOLDER",
    "az": "CONTAINER/FOLDER",
    "https": "HOST/FOLDER",
    "http": "HOST/FOLDER",
    "hf": "OWNER/REPO/FOLDER",
}


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
