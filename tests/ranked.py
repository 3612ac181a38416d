"""Groups of ranks that run commands one after the other: torch is imported once, and forked.

`python -m tests.ranked PLAN` reads what to run from a JSON file: a list of groups, each with its
`size`, the `commands`, the rank that `dies` of SIGKILL in the middle of the last of them (or -1),
and the folder `into` which each rank writes what came of them. `group` makes them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.command import ENVIRONMENT, ROOT, Run

OWN_DISK = 99
"""The number by which each rank has a folder of its own open: /dev/fd/99 is another for each."""


@dataclass(frozen=True)
class RankRun(Run):
    """What a command came to on one rank: the bytes that it read, and the seconds it took."""

    read: int
    seconds: float


def group(
    size: int,
    commands: Sequence[Sequence[str]],
    into: str,
    dies: int = -1,
    after: float | None = None,
    hosted: bool = False,
    pages: bool = False,
    interrupted: bool = False,
    short: int = -1,
    sent: int = signal.SIGKILL,
    early: bool = False,
) -> dict[str, Any]:
    """`dies` as it begins to sum, or `early`, when it has met rank 0 but not yet the others; or
    `after` so many seconds from when all have begun to meet, or with a launcher have met, another
    signal is `sent`, to it or to all. The place where they meet is a launcher's, or `hosted` by
    rank 0. With `pages` a rank writes whole ones, with zeros for what it hasn't written, as clients
    of a server may. In the last command the one that `dies`, or all, are only `interrupted` as they
    begin to sum; rank `short` can't write beyond 100 kB."""
    return {
        "size": size,
        "commands": [*map(list, commands)],
        "into": into,
        "dies": dies,
        "after": after,
        "hosted": hosted,
        "pages": pages,
        "interrupted": interrupted,
        "short": short,
        "sent": int(sent),
        "early": early,
    }


def run_groups(
    folder: Path, *groups: dict[str, Any], env: dict[str, str] | None = None
) -> list[list[list[RankRun]]]:
    """[groups][commands][ranks]: what each came to; a rank that dies has code -9 and no words."""
    (folder / "plan.json").write_text(json.dumps(groups))
    command = [sys.executable, "-m", "tests.ranked", str(folder / "plan.json")]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {})
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    found = []
    for each in groups:
        ranks = [
            (folder / each["into"] / f"{rank}.jsonl").read_text().splitlines()
            for rank in range(each["size"])
        ]
        if each["dies"] >= 0 and len(ranks[each["dies"]]) < len(each["commands"]):
            ranks[each["dies"]].append(json.dumps([-9, "", "", 0, 0.0]))
        runs = [[RankRun(*json.loads(line)) for line in lines] for lines in ranks]
        found.append(list(map(list, zip(*runs, strict=True))))
        assert len(found[-1]) == len(each["commands"]), each
    return found


def main(plan: Path) -> None:
    from torch.distributed import TCPStore

    import posthoc_cli.cli.app
    import posthoc_cli.snapshots.sampling
    import posthoc_cli.synthesis.comparison
    import posthoc_cli.synthesis.outputs  # noqa: F401

    groups, children = json.loads(plan.read_text()), []
    for each, port in zip(groups, free_ports(len(groups)), strict=True):
        Path(each["into"]).mkdir()
        each["port"] = port
        if each is groups[0] and each["size"] == 1:
            _be(0, each)  # here: what it imports and compiles is there for all
            continue
        for rank in range(each["size"]):
            child = os.fork()
            if not child:
                leave, os._exit = os._exit, _leave  # type: ignore[assignment]
                _be(rank, each)
                leave(0)
            children.append(child)
            if each["dies"] in (-1, rank):
                each.setdefault("victims", []).append(child)
    try:
        launchers = [
            TCPStore("127.0.0.1", each["port"], is_master=True, wait_for_workers=False)
            for each in groups
            if not each["hosted"]
        ]
    except RuntimeError:  # at once, and not when the ranks have given it up
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    for each in groups:
        if each["after"] is not None:
            threading.Thread(target=_kill, args=(each,), daemon=True).start()
    for child in children:
        os.waitpid(child, 0)
    del launchers


def free_ports(count: int) -> list[int]:
    """Ports that stay free until they are used: none that the system gives to connections."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in random.sample(range(10_000, 32_000), 1000):
            if len(found) == count:
                break
            free = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                free.bind(("", port))
                found.append(port)
    assert len(found) == count
    return found


def _kill(each: dict[str, Any]) -> None:
    into = Path(each["into"])
    while len(list(into.glob("begun-*"))) < each["size"]:
        time.sleep(0.002)
    time.sleep(each["after"])
    for child in each["victims"]:
        os.kill(child, each["sent"])


def _be(rank: int, each: dict[str, Any]) -> None:
    from posthoc_cli.cli import main as run
    from posthoc_cli.storage.atomic import AtomicFile
    from posthoc_cli.storage.ranks import _Group
    from posthoc_cli.synthesis.engine import Engine

    def connect(group: _Group, *address: Any) -> None:
        begun = Path(each["into"]) / f"begun-{rank}.jsonl"
        if each["hosted"]:
            begun.touch()
        meet(group, *address)
        begun.touch()  # before, a launcher would look after them

    meet, _Group.connect = _Group.connect, connect  # type: ignore[method-assign]
    own = Path(each["into"]) / f"disk{rank}"
    own.mkdir()
    os.dup2(os.open(own, os.O_RDONLY), OWN_DISK)
    if each["size"] > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(each["size"]), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(each["port"])}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(not each["hosted"])
    if each["pages"]:
        AtomicFile._write_some = _write_pages  # type: ignore[method-assign]
    with open(Path(each["into"]) / f"{rank}.jsonl", "w") as told:
        for at, command in enumerate(each["commands"]):
            ends = each["after"] is None and at == len(each["commands"]) - 1
            if ends and each["dies"] in ((-1, rank) if each["interrupted"] else (rank,)):
                end = _interrupt if each["interrupted"] else _die
                if each["early"]:
                    _Group._connect_gloo = end  # type: ignore[method-assign]
                else:
                    Engine.sum = end  # type: ignore[method-assign]
            elif rank == each["short"] and at == len(each["commands"]) - 1:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            sys.argv = ["posthoc", *(word.replace("%rank%", str(rank)) for word in command)]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            out, err = io.StringIO(), io.StringIO()
            begin, before = time.perf_counter(), _read()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code: Any = run()
                except SystemExit as left:
                    code = left.code
            line = code, out.getvalue(), err.getvalue(), _read() - before
            told.write(json.dumps([*line, time.perf_counter() - begin]) + "\n")
            told.flush()


def _write_pages(file: Any, view: memoryview, offset: int) -> int:
    """Write `view` with the rest of its pages, as this rank has written them."""
    cache = file.__dict__.setdefault("cache", bytearray(file.size))
    cache[offset : offset + len(view)] = view
    first, last = offset // 4096 * 4096, -(-(offset + len(view)) // 4096) * 4096
    os.pwrite(file._fd, memoryview(cache)[first:last], first)
    return len(view)


def _read() -> int:
    with contextlib.suppress(OSError):
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    return 0


def _leave(code: int) -> NoReturn:
    raise SystemExit(code)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
