"""Threads that share the work on a file, and one that flushes it to disk behind them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from posthoc_cli.storage.outputs import Output
from posthoc_cli.storage.stores import abandon

FLUSH_EVERY = 0.1
"""Seconds between flushes of what was written meanwhile."""

MAX_WORKERS = 8
"""Each worker has buffers of its own, up to 40 MB of them."""

Piece = TypeVar("Piece")
Scratch = TypeVar("Scratch")


shared_by = 1
"""How many ranks of one call share this process's processors."""


def default_workers() -> int:
    """One for each processor that is this process's part, up to MAX_WORKERS."""
    have = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        have = len(os.sched_getaffinity(0))
    return min(max(have // shared_by, 1), MAX_WORKERS)


def run_workers(
    pieces: Iterator[Piece],
    work: Callable[[Piece, Scratch], None],
    make_scratch: Callable[[], Scratch],
    workers: int,
) -> None:
    """Call `work(piece, scratch)` for each of `pieces` in `workers` threads.

    Each thread makes a scratch of its own, such as buffers, by `make_scratch`. The first exception
    stops all of them and is raised, an interrupt included.
    """
    lock, stop = threading.Lock(), threading.Event()

    def take() -> Piece | None:
        with lock:
            return None if stop.is_set() else next(pieces, None)

    def worker() -> None:
        piece = take()
        scratch = make_scratch() if piece is not None else None
        while piece is not None and scratch is not None:
            work(piece, scratch)
            piece = take()

    with ThreadPoolExecutor(workers, thread_name_prefix="posthoc") as pool:
        try:
            tasks = [pool.submit(worker) for _ in range(workers)]
            wait(tasks, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            abandon()
            raise
        finally:
            stop.set()
    for task in tasks:
        task.result()


@contextlib.contextmanager
def background_flush(files: Sequence[Output]) -> Iterator[None]:
    """Flush what is written to disk while the work goes on.

    Left to itself the system gathers gigabytes, and the flush at the end waits for all of them
    while the processors have nothing to do.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(FLUSH_EVERY):
            for file in files:
                if not done.is_set():
                    file.flush()

    with ThreadPoolExecutor(1, thread_name_prefix="posthoc-flush") as pool:
        task = pool.submit(flush)
        try:
            yield
        finally:
            done.set()
    task.result()
