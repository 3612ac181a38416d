"""Files that are costly to read, each in a process of its own, with its time and memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.command import COMMAND, ENVIRONMENT, Run
from tests.soak.fuzz import MOST_BYTES, MOST_SECONDS, harm_of
from tests.soak.tally import Tally

_STATED = b'"__metadata__":{"step":"1000","sigma_rel":"0.05"'
_ATTEMPTS = 3
"""The best counts: on a shared machine any one may wait for others."""


@dataclass(frozen=True)
class Measured:
    """A finished process: its end, its seconds by the clock and of processors, the most bytes it
    held."""

    run: Run
    seconds: float
    processor: float
    bytes: int


def measured(arguments: list[str], cwd: Path) -> Measured:
    """Run `posthoc` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, COMMAND, *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        check=True,
    )
    out, err, figures = (text.decode("utf-8", "backslashreplace") for text in _three(done))
    code, seconds, processor, peak = json.loads(figures)
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(Run(code, out, err), seconds, processor, peak * unit)


_LAUNCHER = """
import json, os, subprocess, sys, time
begin = time.monotonic()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
seconds = [time.monotonic() - begin, usage.ru_utime + usage.ru_stime]
figures = [os.waitstatus_to_exitcode(status), *seconds, usage.ru_maxrss]
sys.stdout.write("\\0" + json.dumps(figures))
"""
"""A process counts as its own what the one that started it held: so a small one starts it."""


def _three(done: subprocess.CompletedProcess[bytes]) -> tuple[bytes, bytes, bytes]:
    out, _, figures = done.stdout.rpartition(b"\0")
    return out, done.stderr, figures


def _file(path: Path, header: bytes, data: int) -> None:
    """A file of this header and `data` bytes, none of which take room on the disk."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data)


def _tensors(count: int, name: bytes = b"%d", key: bytes = b"data_offsets") -> bytes:
    entries = b",".join(
        b'"%s":{"dtype":"U8","shape":[],"%s":[%d,%d]}' % (name % at, key, at, at + 1)
        for at in range(count)
    )
    return b"{" + _STATED + b"}," + entries + b"}"


def _one(inside: bytes, tensor: bytes = b"") -> bytes:
    """The header of one small tensor, with more in its metadata, or in the entry."""
    entry = tensor or b'"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    return b"{" + _STATED + inside + b"}," + entry + b"}"


_LARGE = 99_000_000
_EMOJI = "\U0001f4a9".encode()


def _entry(shape: bytes, end: int, dtype: bytes = b"U8") -> bytes:
    """The header of one tensor of this shape, `end` bytes long."""
    return _one(b"", b'"w":{"dtype":"%s","shape":[%s],"data_offsets":[0,%d]}' % (dtype, shape, end))


CASES: tuple[tuple[str, Callable[[], bytes], int, tuple[int, ...]], ...] = (
    (
        "100,000 tensors with long names",
        lambda: _tensors(100_000, b"model.blocks.%%d.%s" % (b"x" * 40)),
        100_000,
        (0,),
    ),
    ("a million tensors", lambda: _tensors(1_000_000), 1_000_000, (3,)),
    (
        "a million tensors, their keys escaped",
        lambda: _tensors(900_000, key=rb"data\u005foffsets"),
        900_000,
        (3,),
    ),
    ("a million times one tensor", lambda: _tensors(1_000_000, b"w%.0d"), 1_000_000, (3,)),
    ("a name of 1 MB", lambda: _tensors(1, b"%d" + b"x" * 1_000_000), 1, (0,)),
    ("99 names of 1 MB", lambda: _tensors(99, b"%d" + b"x" * 1_000_000), 99, (3,)),
    ("99 MB of metadata", lambda: _one(b',"note":"' + b"x" * _LARGE + b'"'), 4, (3,)),
    ("99 MB of emoji", lambda: _one(b',"note":"' + _EMOJI * (_LARGE // 4) + b'"'), 4, (3,)),
    ("20 MB of emoji", lambda: _one(b',"note":"' + _EMOJI * 5_000_000 + b'"'), 4, (0, 3)),
    ("99 MB of escapes", lambda: _one(b',"e":"' + rb"\u001b" * (_LARGE // 6) + b'"'), 4, (3,)),
    (
        "a million keys in the metadata",
        lambda: _one(b"".join(b',"%d":""' % at for at in range(1_000_000))),
        4,
        (0, 3),
    ),
    ("99 MB of spaces", lambda: _one(b"") + b" " * _LARGE, 4, (3,)),
    ("99 MB of brackets", lambda: b"[" * _LARGE, 0, (3,)),
    ("99 MB of objects", lambda: b'{"a":' * (_LARGE // 5), 0, (3,)),
    ("20 MB of braces", lambda: b"{" * 20_000_000, 0, (3,)),
    ("ten million dimensions", lambda: _entry(b"1," * 10**7 + b"1", 1), 1, (0, 3)),
    ("a length of ten million digits", lambda: _entry(b"1" + b"0" * 10**7, 1), 1, (3,)),
    ("a step of ten million digits", lambda: _one(b',"step":"' + b"9" * 10**7 + b'"'), 4, (3,)),
    ("a recipe of brackets", lambda: _one(b',"posthoc":"' + b"[" * 10**7 + b'"'), 4, (0,)),
    ("a terabyte that isn't there", lambda: _entry(b"%d" % 2**39, 2**40, b"F16"), 4, (3,)),
    ("a terabyte of zeros", lambda: _entry(b"%d" % 2**39, 2**40, b"F16"), 2**40, (0,)),
)
"""Each case: what it is, its header, bytes of data, and the exit codes it may end in."""


def heavy(seed: int, tally: Tally) -> None:
    """Every case through `inspect FOLDER` and `inspect FILE`, within a second and 500 MB."""
    slowest, most = 0.0, 0
    for name, header, data, codes in CASES:
        with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
            base = Path(scratch)
            folder = base / "snapshots"
            folder.mkdir()
            try:
                _file(folder / "x.safetensors", header(), data)
            except OSError as error:
                tally.skip(name, error.strerror or "no room")
                continue
            for place in ("snapshots", "snapshots/x.safetensors"):
                best = min(
                    (measured(["inspect", place], base) for _ in range(_ATTEMPTS)),
                    key=lambda one: one.seconds,
                )
                losses = harm_of(best.run)
                if best.run.code not in codes:
                    losses.append(f"exit code {best.run.code}, not {codes}: {best.run.err[:300]!r}")
                allowed = MOST_SECONDS * (1 if best.run.code else 2)  # what is read may be large
                if best.seconds > allowed or best.bytes > MOST_BYTES:
                    losses.append(f"took {best.seconds:.2f} s and {best.bytes / 1e6:.0f} MB")
                tally.count("heavy files", [f"{name}, {place}: {loss}" for loss in losses])
                slowest, most = max(slowest, best.seconds), max(most, best.bytes)
    tally.figures += [f"slowest {slowest:.2f} s", f"at most {most / 1e6:.0f} MB"]
