"""Runs the command again and again, each time in a fork of one process that has imported it all.

Starting Python takes ten times as long as a small run. A line of JSON on stdin says the folder, the
arguments and what to add to the environment; one on stdout says what came of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.command import ENVIRONMENT, Run


class Server:
    """The process, with `library` preloaded, if there is one; warmed up by some runs."""

    def __init__(self, library: Path | None, *warm: tuple[Path, Sequence[str]]) -> None:
        preload = {"LD_PRELOAD": str(library)} if library else {}
        path = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT | preload | {"PYTHONPATH": path},
            encoding="utf-8",
        )
        for cwd, arguments in warm:
            assert (
                self._ask({"cwd": str(cwd), "arguments": [*arguments], "here": True})["code"] == 0
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, cwd: Path, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
        asked = {"cwd": str(cwd), "arguments": [*arguments], "env": dict(env or {})}
        return Run(**self._ask(asked))

    def _ask(self, request: Mapping[str, object]) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict = json.loads(self._process.stdout.readline())
        return answer


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            if request.get("here"):
                os.dup2(out.fileno(), 1)
                code = _command(request)
            else:
                pid = os.fork()
                if pid == 0:
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    os._exit(_command(request))
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        print(
            json.dumps({"code": code, "out": texts[0], "err": texts[1]}), file=answers, flush=True
        )


def _command(request: dict) -> int:
    from posthoc_cli.cli import main

    os.chdir(request["cwd"])
    os.environ.update(request.get("env", {}))
    sys.argv = ["posthoc", *request["arguments"]]
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
