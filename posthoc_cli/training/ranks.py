"""Several processes that train together: the first one's verdict reaches them all."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError
from posthoc_cli.training.averaging import is_first_process

_PATIENCE = timedelta(seconds=60)
"""For the first process' verdict: a script may give it a tracker of another folder, or none."""

_TO_BE_HEARD = timedelta(seconds=10)
"""How long a refusal waits for the others to have read it: the store may end with this process."""

_KINDS = {kind.__name__: kind for kind in (MachineError, SnapshotError, UsageError)}

_asked: Counter[str] = Counter()


def agree(subject: str, check: Callable[[], bool]) -> bool:
    """What `check` returns in the first process; what it raises there is raised in all.

    The verdict goes through the store by which the processes have met. Unlike a broadcast, that
    works with any backend, and lets the first process go on where it alone has a tracker.
    """
    store = _store()
    if store is None or is_first_process():
        with heard_by_all(subject):
            verdict = check()
        if store is not None:
            _tell(store, subject, verdict)
        return verdict
    key = _next_key(subject)
    try:
        store.wait([key], _PATIENCE)
        verdict = json.loads(store.get(key))
        if isinstance(verdict, list) and store.add(f"{key}/heard", 1) == others():
            store.set(f"{key}/heard by all", "")
    except RuntimeError:  # no verdict in time, or no first process any more
        return True
    if isinstance(verdict, list):
        kind, *words = verdict
        raise _KINDS.get(kind, UsageError)(*words)
    return bool(verdict)


@contextlib.contextmanager
def heard_by_all(subject: str) -> Iterator[None]:
    """An error of the `with` block, in the first process, is what `agree` raises in the others."""
    try:
        yield
    except PosthocError as error:
        store = _store()
        if store is not None:
            words = [type(error).__name__, error.subject, error.problem, error.remedy]
            key = _tell(store, subject, words)
            with contextlib.suppress(RuntimeError):  # not all of them listen
                store.wait([f"{key}/heard by all"], _TO_BE_HEARD)
        raise


def _tell(store: Any, subject: str, verdict: bool | list[str]) -> str:
    key = _next_key(subject)
    store.set(key, json.dumps(verdict))
    return key


def _next_key(subject: str) -> str:
    _asked[subject] += 1
    return f"posthoc/{subject}/{_asked[subject]}"


def others() -> int:
    """How many processes train together with this one."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    return distributed.get_world_size() - 1


def _store() -> Any:
    """The store of the processes that train together; None where there is but one, or no store."""
    if not others():
        return None
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store()
    except (ImportError, RuntimeError, ValueError):  # as with MPI
        return None
