"""Temporary files and folders: their names, the locks that say which are written to, their end.

One that is being written is locked; one that isn't has been abandoned.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from posthoc_cli.errors import MachineError
from posthoc_cli.storage.aside import Aside, discard, remove
from posthoc_cli.storage.disk import write_errors
from posthoc_cli.storage.places import Url

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_ENDING = ".posthoc-tmp"
_ASIDE = ".aside"
_UNLOCKED = ".unlocked"

_TEMPORARY = re.compile(
    rf"\.(.*\.)?[0-9a-f]{{12}}(?P<kind>{re.escape(_ASIDE)}|{re.escape(_UNLOCKED)})?"
    + re.escape(_ENDING),
    re.DOTALL,
)

_SEEN_WITHIN = 3.0
"""Seconds within which a new file is seen by other machines that share its folder."""

_ABANDONED_AFTER = 60.0
"""Seconds without a write after which a temporary file counts as abandoned, without locks."""

_UNLOCKED_ABANDONED_AFTER = 3600.0
"""The same for one that could not be locked, where others can be."""

_made: dict[Path, int] = {}
"""The temporary files and locks of this process that may still be there, and their open files."""


def locks_exist() -> bool:
    """Whether the system has locks; a file system may still have none."""
    return fcntl is not None


def make_temporary(path: Path, *, folder: bool = False) -> tuple[int, Path]:
    """Make a file, or a folder, beside `path` under a temporary name, open and locked.

    A folder is open only where folders can be.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    kind = ""
    while True:
        place = temporary_name(path, kind)
        _remember(place)
        made = False
        try:
            if folder:
                os.mkdir(place)
                made = True
                if fcntl is None:
                    return -1, place
            fd = _made[place] = os.open(place, os.O_RDONLY if folder else flags, 0o666)
        except OSError as error:
            if not made:
                raise
            if isinstance(error, FileNotFoundError):
                continue  # another run has taken it for abandoned
            with contextlib.suppress(OSError):
                os.rmdir(place)
            raise
        except BaseException:  # an interrupt may come when it is made, before anyone knows of it
            with contextlib.suppress(OSError):
                remove(place)
            raise
        keep = False
        try:
            if fcntl is None or kind:
                keep = True
            elif _lock(fd, fcntl.LOCK_EX):
                # Another run may have taken it for abandoned before.
                keep = _has_name(fd, place)
            else:  # so that no other run takes it for abandoned
                kind = _UNLOCKED
            if keep:
                return fd, place
        finally:
            if not keep:
                os.close(fd)
                with contextlib.suppress(OSError):
                    remove(place)


def temporary_name(path: Path, kind: str = "") -> Path:
    """A name beside `path` that nothing has; what is left under it, `clean_up` removes."""
    return path.with_name(f".{path.name[:40]}.{os.urandom(6).hex()}{kind}{_ENDING}")


class Probe:
    """An empty file beside `path`, there for a `with` block: do other processes see it?"""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path

    def __enter__(self) -> Probe:
        with write_errors(self._path):
            self._fd, self._place = make_temporary(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._place)

    def __reduce__(self) -> tuple[type[Probe], tuple[Path]]:
        return Probe, (self._place,)

    def is_seen(self) -> bool:
        """Whether it is there, now or soon: a server's clients may not know at once."""
        until = time.monotonic() + _SEEN_WITHIN
        while not os.path.lexists(self._place):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True


def clean_up(folder: Path) -> None:
    """Remove what killed runs have left in `folder`, and finish or undo what they had begun.

    What a run still writes is left alone. A store has no such files.
    """
    if isinstance(folder, Url):
        return
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if found := _TEMPORARY.fullmatch(name):
            with contextlib.suppress(OSError, MachineError):  # then the next run may be able to
                if found["kind"] == _ASIDE:
                    lock = folder / (name.removesuffix(_ASIDE + _ENDING) + _ENDING)
                    with _locked(lock, lock, 0) as locked:
                        recover(folder / name, lock, locked=locked)
                else:
                    _remove_if_abandoned(folder / name, unlocked=bool(found["kind"]))


def abandon() -> None:
    """Remove what this process has made and not removed.

    For the end of an interrupted process: an interrupt may also come while an earlier error is
    cleaned up, and where no handler is in force yet.
    """
    for place, fd in list(_made.items()):
        with contextlib.suppress(OSError):
            if fcntl is not None and _has_name(fd, place):
                fcntl.flock(fd, fcntl.LOCK_UN)
    for folder in {place.parent for place in list(_made)}:
        clean_up(folder)


def _remember(place: Path) -> None:
    for other in list(_made):
        if not os.path.lexists(other):
            _made.pop(other, None)
    _made[place] = -1


def recover(aside: Path, output: Path, *, locked: bool) -> None:
    """Finish or undo what a killed run has left at `aside` of an output, if there is something.

    Raises MachineError when it can't be, or, where there are no locks, when a run may still be at
    it.
    """
    if not os.path.lexists(aside):
        return
    if not locked and _age(aside) < _ABANDONED_AFTER:
        raise busy(output)
    with write_errors(aside):
        found = Aside.load(aside)
        if found is None:
            discard(aside)
        else:
            found.recover()


def busy(output: Path) -> MachineError:
    return MachineError(str(output), "another run is writing it", "wait until that is done")


def aside_name(path: Path) -> Path:
    """Where the old files of the output `path` are set aside: one place for all runs."""
    return path.with_name(_stem(path) + _ASIDE + _ENDING)


def _stem(path: Path) -> str:
    return f".{path.name[:40]}.{hashlib.blake2s(os.fsencode(path.name)).hexdigest()[:12]}"


def locked_output(path: Path, wait: float) -> contextlib.AbstractContextManager[bool]:
    """Hold the lock of the output `path`, for runs that would put their files in its place.

    It gives whether it is held: not where the system has no locks. Raises MachineError when another
    run holds it for longer than `wait` seconds.
    """
    return _locked(path.with_name(_stem(path) + _ENDING), path, wait)


@contextlib.contextmanager
def _locked(lock: Path, output: Path, wait: float) -> Iterator[bool]:
    fd, held, locked = -1, False, None
    until = time.monotonic() + wait
    _remember(lock)
    try:
        while fcntl is not None:
            with write_errors(output):
                fd = _made[lock] = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                locked = _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have removed it before it was locked.
                held = bool(locked) and _has_name(fd, lock)
            if held:
                break
            os.close(fd)
            fd = -1
            if locked is None:  # there are none
                with contextlib.suppress(OSError):
                    os.unlink(lock)
                break
            if not locked:
                if time.monotonic() >= until:
                    raise busy(output)
                time.sleep(0.01)
        yield held
    finally:
        with contextlib.suppress(OSError):
            if held:
                os.unlink(lock)
        with contextlib.suppress(OSError):
            if fd >= 0:
                os.close(fd)
        if not held and fcntl is not None:
            # An interrupt may come when it is made or locked, before anyone knows of it.
            with contextlib.suppress(OSError):
                _remove_if_abandoned(lock, unlocked=False)


def _lock(fd: int, how: int) -> bool | None:
    """Lock an open file; False when another has it, None where there are no locks."""
    for _ in range(5):
        try:
            fcntl.flock(fd, how)
            return True
        except BlockingIOError:
            return False
        except OSError:  # it may be for a moment only, as when a server has too many
            time.sleep(0.01)
    return None


def _has_name(fd: int, path: Path) -> bool:
    """Whether an open file is (still) the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _age(path: Path) -> float:
    return time.time() - os.lstat(path).st_mtime


def _remove_if_abandoned(path: Path, *, unlocked: bool) -> None:
    mode = os.lstat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    if fcntl is None or unlocked:
        inside = [Path(place, name) for place, _, names in os.walk(path) for name in names]
        age = min(map(_age, (path, *inside)))
        if age > (_UNLOCKED_ABANDONED_AFTER if unlocked else _ABANDONED_AFTER):
            remove(path)  # on Windows it fails while it is open
        return
    fd = os.open(path, os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR)
    try:
        if _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) and _has_name(fd, path):
            remove(path)
    finally:
        os.close(fd)
