"""A folder by plain HTTP, with ranges and index pages as common web servers have them."""

from __future__ import annotations

from collections.abc import Callable
from email.utils import formatdate
from html import escape
from pathlib import Path
from urllib.parse import quote

from tests.servers.base import Handler, Request, Server


class FileHandler(Handler):
    def answer(self, request: Request) -> None:
        owner = self.server.owner
        assert isinstance(owner, Files)
        self.body()
        path = owner.folder / request.path.lstrip("/")
        if owner.login and self.headers.get("Authorization") != owner.login:
            self.send(401, b"Who are you?", WWW_Authenticate="Basic")
        elif request.method not in ("GET", "HEAD"):
            self.send(405, Allow="GET, HEAD")
        elif path.is_dir():
            self._index(path, request.path)
        elif not path.is_file() or request.path.endswith("/"):
            self.send(403 if owner.hides else 404, b"Not Found")
        else:
            self._file(path)

    def _file(self, path: Path) -> None:
        owner, status = self.server.owner, path.stat()
        assert isinstance(owner, Files)
        headers = {}
        if owner.etags:
            headers["ETag"] = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
            wanted = self.headers.get("If-Match")
            if wanted not in (None, headers["ETag"]):
                self.send(412)
                return
        if owner.times:
            headers["Last_Modified"] = formatdate(status.st_mtime, usegmt=True)
        self.send_range(path.read_bytes(), ranges=owner.ranges, **headers)

    def _index(self, path: Path, where: str) -> None:
        owner = self.server.owner
        assert isinstance(owner, Files)
        if not owner.index:
            self.send(403, b"Forbidden")
            return
        if not where.endswith("/"):
            self.send(301, Location=quote(where) + "/")
            return
        above = quote(where) if owner.absolute else ""
        names = sorted(each.name + "/" * each.is_dir() for each in path.iterdir())
        if owner.page:
            text = owner.page(f"{self.headers['Host']}{quote(where)}", names)
            self.send(200, text.encode(), Content_Type=owner.page_type)
            return
        rows = "".join(
            f'<a href="{above}{quote(name)}">{escape(name)}</a>  27-Nov-2026 12:00  -\n'
            for name in names
        )
        page = (
            f"<html><body><h1>Index of {escape(where)}</h1><pre><a href='../'>../</a>\n{rows}</pre>"
        )
        self.send(200, page.encode(), Content_Type="text/html; charset=utf-8")


class Files(Server):
    """The files below `folder`; without `index` folders can't be listed, with `absolute` links lead
    from the server's root, with `hides` permission is denied for what isn't there, and `login` is
    the header that all has to be asked with. `page` may write the index of a folder, given where it
    is and the names in it."""

    page: Callable[[str, list[str]], str] | None = None
    page_type = "text/html; charset=utf-8"
    handler = FileHandler

    def __init__(
        self,
        folder: Path,
        *,
        ranges: bool = True,
        etags: bool = True,
        times: bool = True,
        index: bool = True,
        absolute: bool = False,
        hides: bool = False,
        login: str | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.ranges, self.etags, self.times, self.index = ranges, etags, times, index
        self.absolute, self.hides, self.login = absolute, hides, login
