"""The command line: reads options, calls the library, draws what it answers.

`main` is the console entry. Whatever happens, it ends in an exit code and at most one line on
stderr: 0 done, 1 the machine failed, 2 the command line is wrong, 3 the snapshots are wrong,
130 interrupted.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import gc
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from posthoc_cli.cli.ranks import find_place, run_as, trouble
from posthoc_cli.errors import LEFT_BEHIND, MachineError, PosthocError, printable, without_secrets

_MOST_FILES = 1 << 16


def main() -> int:
    """Run the command in `sys.argv`; returns the exit code."""
    LEFT_BEHIND.clear()
    program = sys._getframe(1).f_globals.get("__name__") == "__main__"
    try:
        code = _main()
    except SystemExit as left:
        if not isinstance(left.code, int):
            raise
        code = left.code
        _abandon()
        for text in LEFT_BEHIND:
            _say(f"posthoc: {text}")
    if program and "obstore" in sys.modules:
        # Its threads may still hold what Python takes away at its end, and would crash.
        _finish_stdout()
        os._exit(code)
    return code


def _main() -> int:
    _open_what_is_closed()
    with contextlib.suppress(AttributeError):  # a stream that a caller has put in its place
        # A name that the terminal's encoding lacks is escaped, and stops nothing.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if any("://" in each for each in sys.argv[1:]):
        from posthoc_cli.storage.places import without_login  # only here: it takes NumPy

        sys.argv[1:] = map(without_login, sys.argv[1:])  # nothing that shows them shows a password
    place = None
    try:
        _clean_up_when_terminated()
        _allow_many_files()
        _collect_seldom()
        place = find_place()
        code = _run() if place is None else run_as(place, _run, _fail)
    except KeyboardInterrupt:
        code = _interrupted()
    except Exception as error:
        code = _fail(error)
    if place is not None:  # gloo's threads may still wait for a rank that is lost
        _finish_stdout()
        os._exit(code)
    return code


def _run() -> int:
    try:
        # Imported here so that even Ctrl-C during the imports comes to the handler below.
        from posthoc_cli.cli.app import run

        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        _finish_stdout()
        return 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return _fail(error)


def _interrupted() -> int:
    _finish_stdout()
    _abandon()
    if lost := trouble():
        return _fail(lost)
    _say("; ".join(["posthoc: interrupted", *LEFT_BEHIND]))
    return 130


def _abandon() -> None:
    """Remove the temporary files that an interrupt has kept from being removed."""
    if temporary := sys.modules.get("posthoc_cli.storage.temporary"):
        temporary.abandon()


def _fail(error: Exception) -> int:
    """Report `error` in one line; returns its exit code."""
    if os.environ.get("POSTHOC_DEBUG") == "1":
        import traceback

        sys.stderr.write(without_secrets(traceback.format_exc()))
    if not isinstance(error, PosthocError):
        error = _unexpected(error)
    _finish_stdout()
    from posthoc_cli.cli.spelling import spelled_error

    _say(f"posthoc: {spelled_error(error)}")
    return error.exit_code


def _unexpected(error: Exception) -> MachineError:
    kind = type(error).__name__
    if _short_of_memory(error):
        return MachineError(
            "memory",
            "not enough of it",
            "free some, raise its limit (ulimit -v), or give fewer targets at a time",
        )
    if isinstance(error, OSError) and error.errno is not None:
        subject = "stdout" if error.filename is None else str(error.filename)
        remedy = "check the disk and the permissions"
        if error.errno == errno.ENAMETOOLONG:
            remedy = "choose a shorter name"
        elif error.filename is None and error.errno == errno.ENOENT:
            subject, remedy = "working folder", "change to one that exists"
        return MachineError(subject, error.strerror or kind, remedy)
    return MachineError(
        "unexpected error",
        f"{kind}: {error}" if str(error) else kind,
        "please report it, with what POSTHOC_DEBUG=1 prints",
    )


def _short_of_memory(error: BaseException) -> bool:
    """Whether `error`, or one that it came of, is how a library says that memory ran out.

    Among them are an OSError that says nothing at all, when code can't be placed in memory, and
    libraries and threads that can't be loaded and started.
    """
    kind, text = type(error).__name__, str(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and (error.errno == errno.ENOMEM or not error.args):
        return True
    said = ("cannot allocate memory", "failed to map segment", "can't start new thread")
    if isinstance(error, (ImportError, OSError, RuntimeError)) and any(
        words in text.lower() for words in said
    ):
        return True
    came_of = error.__cause__ or error.__context__
    return came_of is not None and _short_of_memory(came_of)


def _say(line: str) -> None:
    """Print on stderr, if anyone is there to read it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(printable(line), file=sys.stderr, flush=True)


def _finish_stdout() -> None:
    """Write what is left in the buffer; drop it if that fails, or it would fail again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def _open_what_is_closed() -> None:
    """Give what the caller has closed, as with `>&-`, somewhere to go.

    Else the first files to be opened get the numbers 0 to 2, and what some library then has to say
    on stderr ends in the middle of an output.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _clean_up_when_terminated() -> None:
    """Let a batch system's SIGTERM and a lost terminal unwind the stack, as Ctrl-C does.

    By default they end the process on the spot, and half an output would stay behind.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)
    sys.unraisablehook = _interrupt_again


def _collect_seldom() -> None:
    """Collect garbage seldom: among the tensors of a large header it takes as long as all else."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def _allow_many_files() -> None:
    """Let this process open as many files as the system allows: 600 snapshots are as many files.

    Where it allows too few, each read opens its file anew.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Repeat an interrupt that came where Python lets no exception out, as while it imports."""
    error, number = unraisable.exc_value, None
    if isinstance(error, KeyboardInterrupt):
        number = int(signal.SIGINT)
    elif isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        number = error.code - 128
    if number is None:
        sys.__unraisablehook__(unraisable)
    else:
        threading.Timer(0.01, _thread.interrupt_main, (number,)).start()
