"""The installed command, run as a user would: in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
COMMAND = shutil.which("posthoc", path=sysconfig.get_path("scripts")) or "posthoc"
_UNSET = (
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
    "LINES",
    "POSTHOC_DEBUG",
    "PYTHONIOENCODING",
    "PYTHONUNBUFFERED",
)
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in _UNSET},
    "TERM": "xterm",
    "PYTHONUTF8": "1",
}


@dataclass(frozen=True)
class Run:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))

    def failed(self, code: int, line: str) -> None:
        """Assert that it failed with `code`, and one line on stderr that `line` (a regex) fits."""
        assert self.code == code, self
        assert self.out == ""
        assert re.fullmatch(f"posthoc: {line}\n", self.err), self.err
        assert re.fullmatch(r"posthoc: .+?: .+; .+\n", self.err), self.err


Posthoc = Callable[..., Run]


def run_command(cwd: Path, *arguments: str | Path, **options: Any) -> Run:
    """Run `posthoc` in `cwd`; `options` are those of subprocess.run."""
    options = {"cwd": cwd, "env": ENVIRONMENT, "capture_output": True, **options}
    words = [COMMAND, *map(str, arguments)]
    done = subprocess.run(words, encoding="utf-8", check=False, **options)
    return Run(done.returncode, done.stdout, done.stderr)


def start_command(cwd: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start `posthoc` in `cwd`, with pipes from its stdout and stderr."""
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([COMMAND, *arguments], cwd=cwd, encoding="utf-8", **options)


def write_snapshot(path: Path, value: float, **metadata: str) -> None:
    """A snapshot whose floating-point tensors are all `value`."""
    tensors = {
        "body.weight": np.full((3, 4), value, np.float32),
        "body.bias": np.full(4, value, np.float16),
        "head.count": np.array(7, np.int64),
    }
    save_file(tensors, path, metadata or None)


def on_terminal(arguments: Sequence[str], cwd: Path, *, columns: int = 80, **env: str) -> str:
    """What the command writes to a terminal that is `columns` wide."""
    if os.name == "nt":
        pytest.skip("no pseudo-terminals here")
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        [COMMAND, *arguments],
        cwd=cwd,
        env=ENVIRONMENT | env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not block:
                break
            output += block
    os.close(ours)
    assert process.returncode == 0, output
    return output.decode().replace("\r\n", "\n")


def visible(shown: str) -> list[str]:
    """The lines of `shown` without what only steers the terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).split("\n")
