"""A metric that is a command of the shell: run, watched and read."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from posthoc_cli.errors import MachineError, UsageError, in_line
from posthoc_cli.tuning.reading import NoMetric, by_key, by_regex, finite, last_number, read_pattern

FIELDS = ("file", "folder", "sigma_rel", "step", "target", "seed")
"""What may stand in braces in a command."""

_FIELD = re.compile(r"(?<!\$)\{(" + "|".join(FIELDS) + r")\}")

_LIKE_ONE = re.compile(r"(?<![$%#@{\\])\{([A-Za-z_][\w-]*)([:!][^{}]*)?\}(?![}<>])")
"""Braces as a field has them; those after `$` are the shell's, `{{` and `%{` other programs'."""

_WATCH = 'read -r _ || { kill -TERM "-$1"; sleep 3; kill -KILL "-$1"; }'
"""Ends a group of processes when its own stdin is closed without a line on it."""

_RANKS = re.compile(
    "((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)

_KEPT = 4 << 20
"""Bytes of what a command prints that are kept: the last ones."""

_GRACE = 3.0
"""Seconds that a command has to end when it is told to, before it is killed."""

_PIPES = 1.0
"""Seconds to wait for the pipes of a command that has ended: what it left behind may hold them."""


@dataclass
class CommandMetric:
    """The metric that `command` prints: by `regex` or the dotted `key` of JSON, or else the last
    number on its last line.

    `{file}`, `{folder}`, `{sigma_rel}`, `{step}` and `{target}` in the command stand for the
    network's, `{seed}` for the next of `seeds`. It is run `repeats` times, each killed after
    `timeout` seconds; with `gpus` it sees but one of them, by the slot it runs in.

    Raises UsageError for a command without the network or with a field that is none, or what
    doesn't fit.
    """

    command: str
    regex: str | None = None
    key: str | None = None
    timeout: float | None = None
    repeats: int = 1
    gpus: Sequence[str] = ()
    seeds: Iterator[int] = field(default_factory=itertools.count)
    notes: list[str] = field(default_factory=list)
    """What is ambiguous about what it printed."""
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def __post_init__(self) -> None:
        if wrong := next(_no_fields(self.command), None):
            known = f"there are {', '.join(map('{{{}}}'.format, FIELDS))}"
            remedy = f"{known}; braces of another program need a space in them, and quotes"
            raise UsageError("metric=", f"'{wrong}' is no field", remedy)
        if not set(_FIELD.findall(self.command)) & {"file", "folder"}:
            raise UsageError(
                "metric=",
                f"'{self.command}' doesn't say where the network goes",
                "write {file} in its place",
            )
        if self.regex is not None and self.key is not None:
            raise UsageError("metric_regex=", "doesn't go with metric_json=", "leave one out")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise UsageError("timeout=", f"{self.timeout:g} is no time", "give seconds, say 3600")
        if self.repeats < 1:
            raise UsageError("repeats=", f"{self.repeats} is too few", "give 1 or more")
        self._pattern = None if self.regex is None else read_pattern(self.regex)

    def check(self, parameter: str, layout: str) -> None:
        """Raise UsageError where a field says nothing of the networks that there will be."""
        fields = set(_FIELD.findall(self.command))
        if "folder" in fields and layout != "folder":
            problem = "{folder} needs an output that is a folder"
            raise UsageError("metric=", problem, "add layout='folder', or write {file}")
        if "sigma_rel" in fields and parameter != "sigma_rel":
            problem = f"{{sigma_rel}} says nothing of a {parameter}"
            raise UsageError("metric=", problem, "write {target} in its place")

    def as_dict(self) -> dict[str, str | None]:
        """What tells it from other metrics, for a journal."""
        return {"command": self.command, "regex": self.regex, "json": self.key}

    def measure(self, values: Mapping[str, str], slot: int = 0) -> list[float]:
        """The metric of a network, as often as it is repeated; `values` are those of FIELDS but
        the seed.

        Raises MachineError when the command fails or prints no finite number.
        """
        return [
            self._measure({**values, "seed": str(seed)}, slot)
            for seed in itertools.islice(self.seeds, self.repeats)
        ]

    def _measure(self, values: Mapping[str, str], slot: int) -> float:
        code, out, err = self._run(fill(self.command, values), slot)
        if code is None:
            raise self._failed(f"it took longer than {self.timeout:g} s", err, "raise timeout=")
        if code != 0:
            how = f"exit code {code}" if code > 0 else _signal(-code)
            raise self._failed(how, err or out, "see what the command says")
        try:
            if self._pattern is not None:
                return finite(by_regex(out, self._pattern))
            if self.key is not None:
                return finite(by_key(out, self.key))
            number, doubt = last_number(out)
            if doubt:
                self.notes.append(f"{doubt}, is taken; metric_regex= takes another")
            return finite(number)
        except NoMetric as error:
            remedy = "print the number on the last line, or use metric_regex= or metric_json="
            if err.strip() and not out.strip():
                remedy = "print the metric on stdout, as stderr isn't read, or add 2>&1"
            raise self._failed(str(error), err, remedy) from None

    def _failed(self, how: str, said: str, remedy: str) -> MachineError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        end = f" ('{in_line(lines[-1][-300:])}')" if lines else ""
        return MachineError("metric=", f"{how}{end}", remedy)

    def _run(self, command: str, slot: int) -> tuple[int | None, str, str]:
        """Exit code, or None after the timeout, and the end of what it printed on both streams."""
        environment = _environment()
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        with self._lock:
            if self._stopped:
                raise self._failed("it was not run", "", "run it again")
            process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=os.name != "nt",  # a group of its own, so that all of it ends
            )
            self._running.add(process)
        tails = [_Tail(pipe) for pipe in (process.stdout, process.stderr) if pipe]
        watcher = None
        try:
            watcher = _watched(process)
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(self.timeout)
            if code is None:
                end([process])
            until = time.monotonic() + _PIPES
            out, err = (tail.text(until) for tail in tails)
            return code, out, err
        except BaseException:
            end([process])
            raise
        finally:
            self._running.discard(process)
            if watcher:
                with contextlib.suppress(OSError):
                    watcher.communicate(b"\n")

    def stop(self) -> None:
        """End all commands that run, with what they have started; no other is begun."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        end(running)


def _environment() -> dict[str, str]:
    """This process's, without what torchrun says to its ranks: a command is a program of its own,
    and would wait for ranks that never come."""
    environment = dict(os.environ)
    if environment.get("WORLD_SIZE", "1") != "1":
        for name in [name for name in environment if _RANKS.fullmatch(name)]:
            del environment[name]
    return environment


def _watched(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes] | None:
    """A shell that ends `process`, with all it has started, when this process is killed."""
    if os.name == "nt":
        return None
    return subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "sh", str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class _Tail:
    """Reads a pipe to its end, and keeps the last bytes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._data = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._pipe:
            while block := os.read(self._pipe.fileno(), 1 << 16):
                self._data += block
                if len(self._data) > 2 * _KEPT:
                    del self._data[:-_KEPT]

    def text(self, until: float) -> str:
        """What came, once the pipe is closed or it is `until`."""
        self._thread.join(max(until - time.monotonic(), 0.0))
        return bytes(self._data[-_KEPT:]).decode(errors="replace")


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and what they have started: asked first, then killed."""
    try:
        for process in processes:
            _send(process, "SIGTERM")
        until = time.monotonic() + _GRACE
        while any(map(_alive, processes)) and time.monotonic() < until:
            time.sleep(0.01)
    finally:  # also when a second interrupt comes
        for process in filter(_alive, processes):
            _send(process, "SIGKILL")
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)


def _send(process: subprocess.Popen[bytes], number: str) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, number))
        elif number == "SIGTERM":  # Windows knows no groups: its own tool ends the whole tree
            subprocess.run(
                ["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False
            )
        else:
            process.kill()


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether it, or anything in its group, still runs."""
    ended = process.poll() is not None
    if not hasattr(os, "killpg"):
        return not ended
    try:
        os.killpg(process.pid, 0)
    except OSError:
        return not ended
    return True


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"it was ended by {signal.Signals(number).name}"
    return f"it was ended by signal {number}"


def fill(command: str, values: Mapping[str, str]) -> str:
    """`command` with the fields in it replaced, each quoted for the shell as its place needs.

    Other braces stay, as awk and Python need them.
    """
    filled, quotes = "", _quotes(command)
    at = 0
    for match in _FIELD.finditer(command):
        filled += command[at : match.start()]
        filled += _quoted(values[match[1]], quotes[match.start()])
        at = match.end()
    return filled + command[at:]


def _no_fields(command: str) -> Iterator[str]:
    """What looks like a field of the command, and is none.

    Outside of quotes that is any word in braces, as the shell has no use for it. In quotes it may
    be another program's: there it is one that comes near a field.
    """
    quotes = _quotes(command)
    theirs = re.findall(r"-I *(\{[\w-]+\})", command)  # of xargs
    for match in _LIKE_ONE.finditer(command):
        name, before = match[1].lower().replace("-", "_"), command[: match.start()]
        near = difflib.get_close_matches(name, FIELDS, 1, 0.8)
        near += [each for each in FIELDS if len(name) > 2 and each.startswith(name)]
        quoted = quotes[match.start()] or "<<" in before
        if _FIELD.fullmatch(match[0]) is None and match[0] not in theirs and (near or not quoted):
            yield match[0]


def _quotes(command: str) -> list[str]:
    """For each character the quote that is open there: one of `'` and `"`, or none."""
    found, quote, escaped = [], "", False
    for char in command:
        found.append(quote)
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif char == quote:
            quote = ""
        elif char in "'\"" and not quote:
            quote = char
    return found


def _quoted(text: str, quote: str) -> str:
    if os.name == "nt":
        return text if quote == '"' else subprocess.list2cmdline([text])
    if quote == "'":
        return text.replace("'", "'\\''")
    if quote == '"':
        return re.sub(r'([\\"$`])', r"\\\1", text)
    return shlex.quote(text)


def read_gpus(text: str) -> list[str]:
    """`0,1,2`: a list of devices. Raises UsageError."""
    devices = [each.strip() for each in text.split(",")]
    if not all(devices) or len(set(devices)) < len(devices):
        raise UsageError("gpus=", f"'{text}' is no list of devices", "write, say, 0,1,2")
    return devices
