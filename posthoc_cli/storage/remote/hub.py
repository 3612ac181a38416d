"""Repositories of the Hugging Face hub, at the commit that a revision is when it is first read."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote

from posthoc_cli.errors import MachineError, UsageError
from posthoc_cli.storage.places import File, Url, place
from posthoc_cli.storage.remote.sources import Found, Server, needs

_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}

_LONG_REVISION = re.compile(r"refs/(?:convert|pr)/[^/]+")
"""Those that have slashes of their own."""

_WAITS = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before an answer that may pass is asked for again."""

_LONGEST = 45.0
"""Seconds in which the hub has to answer."""


def repository(url: Url) -> Repository:
    """The repository that a URL is of; raises UsageError for one that is not whole.

    `hf://[datasets/]owner/repo[@revision]/path`, as huggingface_hub has it.
    """
    parts = list(url.parts[1:])
    kind = _KINDS.get(parts[0], "")
    owner = parts[1:] if kind else parts
    if len(owner) < 2:
        remedy = "write hf://OWNER/REPO/FOLDER, or hf://datasets/OWNER/REPO/FOLDER"
        raise UsageError(str(url), "is not a whole URL", remedy)
    name, marked, revision = owner[1].partition("@")
    depth = 3 + bool(kind)
    long = _LONG_REVISION.match("/".join([revision, *owner[2:]])) if marked else None
    if long:
        revision, depth = long[0], depth + 2
    known = kind or "model", f"{owner[0]}/{name}", unquote(revision) or None, depth
    return Repository(url, *known)


class Repository(Server):
    """A repository; its files never change, as they are those of one commit."""

    lists = True

    def __init__(self, url: Url, kind: str, name: str, revision: str | None, depth: int) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise needs(url, "huggingface_hub") from None
        self._hub = huggingface_hub
        self._api = huggingface_hub.HfApi(library_name="posthoc-cli")
        self.root = root = Url(*url.parts[:depth])
        self._depth = depth
        self._repo = {"repo_id": name, "repo_type": kind}
        commit = self._ask(self.root, self._api.repo_info, revision=revision).sha
        self._repo["revision"] = commit or revision or "main"
        prefix = "" if kind == "model" else f"{kind}s/"
        at = quote(self._repo["revision"], safe="")
        token = huggingface_hub.get_token()
        endpoint = cast(Url, place(self._api.endpoint))
        super().__init__(endpoint, {"authorization": f"Bearer {token}"} if token else {})
        self.root, self._files = root, endpoint / f"{prefix}{name}/resolve/{at}"

    def _ask(self, path: Path, what: Callable[..., Any], **asked: Any) -> Any:
        """What the hub answers, within a minute; raises FileNotFoundError, MachineError."""
        outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            for wait in (*_WAITS, None):
                try:
                    found = what(**self._repo, **asked)
                    outcome.put((list(found) if isinstance(found, Iterator) else found, None))
                    return
                except Exception as error:
                    if wait is None or not _may_pass(error):
                        outcome.put((None, error))
                        return
                time.sleep(wait)

        # Its own requests wait without end, and no interrupt ends them.
        threading.Thread(target=ask, name="posthoc-hub", daemon=True).start()
        try:
            found, error = outcome.get(timeout=_LONGEST)
        except queue.Empty:
            problem, remedy = "the hub doesn't answer", "check the network, or HF_ENDPOINT"
            raise MachineError(str(path), problem, remedy) from None
        if error is not None:
            raise self._told(path, error) from error
        return found

    def _told(self, path: Path, error: Exception) -> Exception:
        """The error that one of huggingface_hub's stands for."""
        known, where = self._hub.errors, str(self.root)
        login = "log in with hf auth login, or set HF_TOKEN"
        if isinstance(error, known.EntryNotFoundError):
            return FileNotFoundError()
        if isinstance(error, known.GatedRepoError):
            return MachineError(where, "is gated", f"ask for access on its page, and {login}")
        if isinstance(error, known.RepositoryNotFoundError):
            problem = "there is no such repository, or it is not yours to read"
            return MachineError(where, problem, f"check its name; {login}")
        if isinstance(error, known.RevisionNotFoundError):
            return MachineError(where, "there is no such revision", "check what follows the @")
        if isinstance(error, known.HFValidationError):
            return UsageError(where, "is no name of a repository", "write hf://OWNER/REPO/FOLDER")
        if isinstance(error, known.OfflineModeIsEnabled):
            return MachineError(str(path), "HF_HUB_OFFLINE forbids to ask the hub", "unset it")
        status = _status(error)
        if status in (401, 403):
            return MachineError(str(path), f"permission denied ({status})", login)
        problem = f"the hub answers {status}" if status else "no connection to the hub"
        remedy = "check the network, or HF_ENDPOINT; try again"
        if status == 429:
            remedy = f"try again later; who is known may ask more: {login}"
        elif isinstance(error, UnicodeError):
            problem, remedy = "the token has characters that none has", login
        elif isinstance(error, ValueError):  # it was to be JSON
            problem = "what answers is no hub"
            remedy = "check HF_ENDPOINT, and whether the network asks you to log in"
        return MachineError(str(path), problem, remedy)

    def key(self, path: Path) -> str:
        return "/".join(path.parts[self._depth :])

    def found_at(self, path: Path) -> tuple[Any, str]:
        return super().found_at(self._files / self.key(path))

    def listing(self, key: str) -> tuple[Sequence[Found], bool]:
        tree = self._api.list_repo_tree
        try:
            listed = self._ask(self.root / key, tree, path_in_repo=key or None, recursive=True)
        except FileNotFoundError:
            return [], True
        found: list[Found] = [("", None)]
        for each in listed:
            below = each.path[len(key) :].lstrip("/")
            if isinstance(each, self._hub.RepoFile):
                found.append((below, self._file(self.root / each.path, each)))
            else:
                found.append((f"{below}/", None))
        return found, True

    def head(self, path: Path) -> File:
        key = self.key(path)
        found = self._ask(path, self._api.get_paths_info, paths=[key])
        for each in found:
            if isinstance(each, self._hub.RepoFile):
                return self._file(path, each)
        raise FileNotFoundError

    @staticmethod
    def _file(path: Path, about: Any) -> File:
        return File(path, about.size)

    async def fetch(self, path: Url, start: int, end: int) -> tuple[File, memoryview]:
        # Where it comes from in the end has times and etags of its own.
        found, data = await super().fetch(path, start, end)
        return File(path, found.size), data


def _may_pass(error: Exception) -> bool:
    """Whether the hub may answer otherwise the next time: it is busy, or there was no answer."""
    status = _status(error)
    return status == 429 or status >= 500 or "Connect" in type(error).__name__


def _status(error: Exception) -> int:
    """The status of an answer that is an error; 0 where there was none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
