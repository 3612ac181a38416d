"""What reading from the Hugging Face hub needs: info, tree, paths and files, by revision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from tests.servers.base import Handler, Request, Server

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(Handler):
    def answer(self, request: Request) -> None:
        owner = self.server.owner
        assert isinstance(owner, Hub)
        body = self.body()
        if owner.token is not None:
            given = request.headers.get("authorization")
            if given != f"Bearer {owner.token}" and not request.path.startswith("/cdn/"):
                self._missing(401, "GatedRepo" if owner.gated else "RepoNotFound")
                return
        # Not yet unquoted: a revision or a folder may hold a quoted slash.
        parts = [unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
        if parts[0] == "cdn":
            self.send_range(owner.by_digest[parts[1]].read_bytes(), ETag=f'"{parts[1]}"')
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], request, body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._missing(404, "RepoNotFound")

    def _folder(self, repo: str, revision: str) -> Path | None:
        """The repository's files; None where that is answered by what is missing."""
        owner = self.server.owner
        assert isinstance(owner, Hub)
        if repo not in owner.repos:
            self._missing(401, "RepoNotFound")  # as the hub does for who is not logged in
        elif revision not in owner.revisions:
            self._missing(404, "RevisionNotFound")
        else:
            return owner.repos[repo]
        return None

    def _api(self, repo: str, rest: list[str], request: Request, body: bytes) -> None:
        what = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        folder = self._folder(repo, revision)
        if folder is None:
            return
        if what == "revision":
            siblings = [{"rfilename": _name(path, folder)} for path in _files(folder)]
            about = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False}
            self._json(about | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings})
        elif what == "tree":
            below = folder / "/".join(rest[2:])
            if not below.is_dir():
                self._missing(404, "EntryNotFound")
                return
            recursive = request.query.get("recursive", "").lower() == "true"
            found = sorted(below.rglob("*") if recursive else below.iterdir())
            self._json([self._entry(path, folder) for path in found])
        elif what == "paths-info":
            asked = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
            paths = [folder / name for name in asked["paths"]]
            self._json([self._entry(path, folder) for path in paths if path.exists()])
        else:
            self._missing(404, "EntryNotFound")

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        name = _name(path, folder)
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": _digest(name.encode()), "size": 0}
        digest, size = self._known(path), path.stat().st_size
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": digest[:40], "size": size}
        if _is_large(path):
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
        return entry

    def _known(self, path: Path) -> str:
        owner = self.server.owner
        assert isinstance(owner, Hub)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        owner.by_digest[digest] = path
        return digest

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        folder = self._folder(repo, revision)
        if folder is None:
            return
        path = folder / name
        if not path.is_file():
            self._missing(404, "EntryNotFound")
            return
        digest = self._known(path)
        commit = {"X_Repo_Commit": COMMIT}
        if _is_large(path):  # which the hub keeps elsewhere
            linked = {"X_Linked_ETag": f'"{digest}"', "X_Linked_Size": str(path.stat().st_size)}
            self.send(302, Location=f"/cdn/{quote(digest)}", **commit, **linked)
        else:
            self.send_range(path.read_bytes(), ETag=f'"{digest[:40]}"', **commit)

    def _json(self, document: Any) -> None:
        self.send(200, json.dumps(document).encode(), Content_Type="application/json")

    def _missing(self, status: int, code: str) -> None:
        self.send(status, b'{"error":"not found"}', X_Error_Code=code, X_Error_Message=code)


def _is_large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".pt", ".bin")


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


class Hub(Server):
    """Repositories by name, each a folder; with `token`, only for who gives it."""

    handler = HubHandler

    def __init__(
        self,
        repos: Mapping[str, Path],
        *,
        revisions: tuple[str, ...] = ("main", COMMIT),
        token: str | None = None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.repos = dict(repos)
        self.revisions = revisions
        self.token = token
        self.gated = gated
        self.by_digest: dict[str, Path] = {}

    def environment(self, url: str | None = None) -> dict[str, str]:
        return {"HF_ENDPOINT": url or self.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
