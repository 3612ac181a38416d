"""Several processes that train together: what one finds reaches them all.

Where each has the whole network, only the first one writes, and the others hear of its verdict.
Where it is sharded all write, and all call the same functions of `Ranks` in the same order.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError
from posthoc_cli.training.averaging import is_first_process

_PATIENCE = timedelta(seconds=60)
"""For the first process' verdict: a script may give it a tracker of another folder, or none."""

_TO_BE_HEARD = timedelta(seconds=10)
"""How long a refusal waits for the others to have read it: the store may end with this process."""

_KINDS = {kind.__name__: kind for kind in (MachineError, SnapshotError, UsageError)}

_OTHER_KINDS = {kind.__name__: kind for kind in (TypeError, ValueError)}

T = TypeVar("T")

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
            key = _tell(store, subject, _words(error))
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


class Ranks:
    """The processes that train a sharded network, and what they tell one another.

    They do by gloo, in a group of its own: a thread may use it while the network trains. A process
    that ends makes all calls fail in the others, as in any group of torch's.

    Raises UsageError where not all processes have got here within 60 seconds.
    """

    def __init__(self, subject: str) -> None:
        from torch import distributed

        self.size = distributed.get_world_size()
        self.rank = distributed.get_rank()
        self._check_all_here(subject)
        self._group = distributed.new_group(backend="gloo")

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a tracker meets the others anew

    @property
    def first(self) -> bool:
        return self.rank == 0

    def _check_all_here(self, subject: str) -> None:
        store = _store()
        if store is None:
            return
        key = _next_key(f"{subject}/all")
        store.set(f"{key}/{self.rank}", "")
        missing = [rank for rank in range(self.size) if not store.check([f"{key}/{rank}"])]
        try:
            store.wait([f"{key}/{rank}" for rank in missing] or [f"{key}/{self.rank}"], _PATIENCE)
        except RuntimeError:
            missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
            raise UsageError(
                subject,
                f"process {next(iter(missing), '?')} of {self.size} doesn't track the network, "
                "which is sharded",
                "make PostHocEMA, and call update(), in all of them",
            ) from None

    def exchange(self, value: T) -> list[T]:
        """The value of each process, in all."""
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all; or what it raises."""
        from torch import distributed

        said: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                said = [make(), None]
            except Exception as caught:
                error, said = caught, [None, _words(caught)]
        distributed.broadcast_object_list(said, src=0, group=self._group)
        if said[1] is not None:
            raise error or _raised(0, said[1])
        value: T = said[0]
        return value

    def broadcast(self, value: Any) -> Any:
        """The first process' value, in all."""
        from torch import distributed

        said = [value]
        distributed.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def send_to_first(self, tensor: Any, rank: int) -> None:
        """Fill the first process' contiguous tensor with that of process `rank`; all may call."""
        from torch import distributed, uint8

        if rank == 0 or not tensor.numel() or self.rank not in (0, rank):
            return
        data = tensor.view(-1).view(uint8)
        if self.first:
            distributed.recv(data, rank, group=self._group)
        else:
            distributed.send(data, 0, group=self._group)

    @contextlib.contextmanager
    def raised_in_all(self) -> Iterator[None]:
        """What the `with` block raises in one process is raised in all, at its end."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        said = self.exchange(None if error is None else _words(error))
        if error is not None:
            raise error
        for rank, words in enumerate(said):
            if words is not None:
                raise _raised(rank, words)


def _words(error: Exception) -> list[str]:
    if isinstance(error, PosthocError):
        return [type(error).__name__, error.subject, error.problem, error.remedy]
    return [type(error).__name__, str(error)]


def _raised(rank: int, words: list[str]) -> Exception:
    """An error of another process."""
    kind, *said = words
    if len(said) == 3:
        subject, problem, remedy = said
        return _KINDS.get(kind, MachineError)(subject, f"{problem} (process {rank})", remedy)
    return _OTHER_KINDS.get(kind, RuntimeError)(f"{said[0]} (process {rank})")
