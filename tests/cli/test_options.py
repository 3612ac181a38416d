"""LIST, targets, templates, and what the program as a whole does: help, errors, exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from posthoc_cli import __version__
from posthoc_cli.api import run as api_run
from posthoc_cli.cli.lists import MAX_VALUES, read_list, shortest
from posthoc_cli.errors import UsageError
from tests.command import COMMAND, ENVIRONMENT, Posthoc, Run


def numbers(*texts: str) -> list[float]:
    return [float(value) for value in read_list("--sigma-rel", texts)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.05", [0.05]),
        ("0.05,0.10", [0.05, 0.10]),
        (" .05 , 1e-1 ", [0.05, 0.1]),
        ("0.010,0.015,...,0.030", [0.01, 0.015, 0.02, 0.025, 0.03]),
        ("0.3,0.2,...,0", [0.3, 0.2, 0.1, 0.0]),
        ("1,2,…,4", [1, 2, 3, 4]),
        ("0.01,0.02,...,0.04,0.1,...,0.22", [0.01, 0.02, 0.03, 0.04, 0.1, 0.16, 0.22]),
        ("-0.1,0,...,0.2", [-0.1, 0, 0.1, 0.2]),
    ],
)
def test_list(text: str, values: list[float]) -> None:
    assert numbers(text) == values  # exactly: 0.015, not 0.015000000000000001


def test_list_option_repeats() -> None:
    assert numbers("0.2,0.1", "0.2") == [0.2, 0.1, 0.2]
    assert numbers() == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a number is missing"),
        ("0.1,", "a number is missing"),
        ("0.1,x", "'x' in '0.1,x' is not a number"),
        ("nan", "'nan' is not a number"),
        ("inf", "'inf' is not a number"),
        ("1e999999999999", "is not a number"),
        ("0.1,...,0.3", "the dots need"),
        ("...,0.3", "the dots need"),
        ("0.1,0.2,...", "the dots need"),
        ("0.1,0.2,...,...,0.5", "the dots need"),
        ("1,2,...,4,...,8", "the dots need"),
        ("0.1,0.1,...,0.5", "don't lead to 0.5"),
        ("0.1,0.2,...,0.05", "don't lead to 0.05"),
        ("0.1,0.2,...,0.2", "don't lead to 0.2"),
        ("0.01,0.015,...,0.022", "miss 0.022; end the list at 0.02 or 0.025"),
        ("0,1e-5,...,1", f"more than {MAX_VALUES} values"),
        ("0,1e-28,...,1e28", f"more than {MAX_VALUES} values"),
        (",".join(["1"] * (MAX_VALUES + 1)), f"more than {MAX_VALUES} values"),
    ],
)
def test_list_refuses(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)) as caught:
        numbers(text)
    assert caught.value.subject == "--sigma-rel"
    assert len(str(caught.value)) < 300


@given(st.integers(-500, 500), st.integers(1, 99), st.integers(2, 50), st.integers(0, 4))
def test_dots_are_what_a_person_would_type(
    first: int, spacing: int, count: int, places: int
) -> None:
    def typed(k: int) -> str:
        return f"{(first + k * spacing) / 10**places:.{places}f}"

    for sign in (1, -1):
        texts = [typed(sign * k) for k in range(count + 1)]
        dotted = f"{texts[0]},{texts[1]},...,{texts[-1]}"
        assert numbers(dotted) == [float(text) for text in texts]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=5, min_value=-99, max_value=99))
def test_shortest_keeps_the_value(number: object) -> None:
    text = shortest(number)
    assert float(text) == float(number)
    assert "e" not in text.lower()
    assert not re.search(r"\.\d*0$|\.$|^-0$", text)


# The program


def test_help_fits_80_columns(posthoc: Posthoc, posthoc_here: Posthoc) -> None:
    plain = posthoc()
    assert plain.code == 0
    assert plain == posthoc_here("--help")
    assert posthoc_here("--version").out == f"posthoc {__version__}\n"
    for command in ("inspect", "solve", "synthesize"):
        assert f"\n  {command} " in plain.out
        page = posthoc_here(command, "-h")
        assert page.code == 0
        assert page.out.startswith(f"Usage: posthoc {command} FOLDER [OPTIONS]\n")
        for heading in ("Arguments:", "Reading the folder:", "Other options:", "Examples:"):
            assert heading in page.out
        for option in ("--pattern", "--profiles", "--only", "--json", "-q, --quiet"):
            assert option in page.out
        assert max(map(len, page.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bogus"], "bogus: no such command; see posthoc --help"),
        (["synthesise"], r"synthesise: no such command; did you mean synthesize\? see .*"),
        (["--bogus"], "--bogus: no such option; see posthoc --help"),
        (["solve"], "FOLDER: missing; see posthoc solve --help"),
        (["solve", "x", "--sigma", "1"], "--sigma: no such option; did you mean --sigma-rel.*"),
        (["solve", "x", "--gamma"], "--gamma: needs a value after it; .*"),
        (["solve", "x", "--json=1"], "--json: takes no value; .*"),
        (["solve", "x", "y", "z"], "x: there is no such file or folder; check the path"),
        (["verify", "x", "y", "z"], "z: one argument too many; see posthoc verify --help"),
        (["solve", "x", "--step", "1.5"], "--step: not a whole number; see posthoc solve --help"),
        (["synthesize", "x"], "-o: missing; see posthoc synthesize --help"),
    ],
)
def test_the_parser_complains_in_one_line(
    posthoc_here: Posthoc, arguments: list[str], line: str
) -> None:
    posthoc_here(*arguments).failed(2, line)


def test_control_characters_of_the_command_line_are_escaped(posthoc_here: Posthoc) -> None:
    posthoc_here("inspect", "no\x1b[31m\nwhere").failed(
        2, r"no\\x1b\[31m\\nwhere: there is no such folder; .*"
    )


def test_an_unexpected_error_is_one_line(
    posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(error: BaseException) -> Run:
        monkeypatch.setattr(api_run, "read_folder", mock.Mock(side_effect=error))
        return posthoc_here("inspect", ".")

    assert run(ValueError("two\nlines")) == Run(
        1,
        "",
        "posthoc: unexpected error: ValueError: two\\nlines; "
        "please report it, with what POSTHOC_DEBUG=1 prints\n",
    )
    assert run(KeyboardInterrupt()) == Run(130, "", "posthoc: interrupted\n")
    assert run(MemoryError()).err.startswith("posthoc: memory: not enough of it; ")
    missing = run(OSError(5, "Input/output error", "disk"))
    assert missing.code == 1
    assert missing.err.startswith("posthoc: disk: Input/output error; ")
    monkeypatch.setenv("POSTHOC_DEBUG", "1")
    debug = run(ValueError("two"))
    assert debug.code == 1
    assert debug.err.startswith("Traceback (most recent call last)")
    assert debug.err.endswith("POSTHOC_DEBUG=1 prints\n")


def test_a_name_too_long_and_a_working_folder_that_is_gone(
    posthoc_here: Posthoc, snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "synthesize", "snapshots", "--sigma-rel", "0.07", "-o"
    posthoc_here(*arguments, "x" * 300 + ".safetensors").failed(
        1, r"x+\.safetensors: cannot be written \(File name too long\); choose a shorter name"
    )

    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    posthoc_here(*arguments, "x.safetensors", "-q").failed(
        1, "working folder: No such file or directory; change to one that exists"
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a shell of POSIX")
@pytest.mark.usefixtures("unmeasured")
def test_streams_that_the_caller_has_closed(snapshots: Path, tmp_path: Path) -> None:
    """Nothing that is opened then takes their numbers: an output least of all."""
    command = f"'{COMMAND}' synthesize snapshots --sigma-rel 0.02 -o"
    for at, closed in enumerate(("<&-", ">&-", "2>&-", "<&- >&- 2>&-", "<&- 2>&-")):
        refused = ("x.bin", "x.safetensors")[at % 2]  # a suffix that isn't known; one that is there
        for output, code in (("x.safetensors", 0), (refused, 2)):
            done = subprocess.run(
                ["sh", "-c", f"{command} {output} {closed}"],
                cwd=tmp_path,
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == code, done
            assert (done.stderr == "") == ("2>" in closed), done
            assert "posthoc: " not in done.stdout
        assert len(load_file(tmp_path / "x.safetensors")) == 3
        os.unlink(tmp_path / "x.safetensors")


def test_stdout_that_fails(posthoc: Posthoc, snapshots: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as broken:
        done = subprocess.run(
            [COMMAND, "solve", "snapshots", "--sigma-rel", "0.07", "--json"],
            cwd=snapshots.parent,
            env=ENVIRONMENT,
            stdout=broken,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    if not os.path.exists("/dev/full"):
        return

    def inspect(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        with open("/dev/full", "wb") as full:
            return subprocess.run(
                [COMMAND, "inspect", "snapshots", *arguments],
                cwd=snapshots.parent,
                env=ENVIRONMENT,
                stdout=full,
                stderr=subprocess.PIPE,
                check=False,
            )

    done = inspect()
    assert done.returncode == 1
    assert re.fullmatch(rb"posthoc: stdout: No space left on device; .*\n", done.stderr)
    (snapshots / "broken.safetensors").write_bytes(b"")
    done = inspect("--json")  # buffered: its own reason to fail comes first
    assert done.returncode == 3
    assert re.fullmatch(rb"posthoc: snapshots: 1 problem found; .*\n", done.stderr)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.usefixtures("unmeasured")
def test_signals_unwind(tmp_path: Path, number: str) -> None:
    code = (
        "import sys, time, posthoc_cli.api.run as s; from posthoc_cli.cli import main\n"
        "def read_folder(*a, **k):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        # A signal that comes right before a sleep is told after it.
        "        for _ in range(600): time.sleep(0.1)\n"
        "    finally: print('unwound', flush=True)\n"
        "s.read_folder = read_folder; sys.argv = ['posthoc', 'inspect', '.']; sys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, number))
        out, err = process.communicate(timeout=60)
    assert out == "unwound\n"
    assert "Traceback" not in err
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[number]


@pytest.mark.usefixtures("unmeasured")
def test_the_cpu_needs_no_torch(snapshots: Path) -> None:
    code = (
        "import sys; from posthoc_cli.cli import main\n"
        "sys.argv[1:] = {}; code = main()\n"
        "print([m for m in {} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    for arguments, heavy in (
        (["--help"], ["torch", "numpy"]),
        (["inspect", "snapshots", "--json"], ["torch", "rich"]),
        (["solve", "snapshots", "--sigma-rel", "0.07"], ["torch"]),
        (
            ["synthesize", "snapshots", "--gamma", "3", "-q", "-o", "x.safetensors", "--json"],
            ["torch"],
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments, heavy)],
            cwd=snapshots.parent,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "[]\n"), arguments


def test_completion(posthoc: Posthoc) -> None:
    run = posthoc(
        env={"_POSTHOC_COMPLETE": "complete_bash", "COMP_WORDS": "posthoc sy", "COMP_CWORD": "1"}
    )
    assert run.out.split() == ["synthesize"]


@pytest.mark.parametrize("command", ["inspect", "solve", "synthesize", "plot"])
def test_a_snapshot_that_is_still_being_written(
    posthoc_here: Posthoc, tmp_path: Path, snapshots: Path, command: str
) -> None:
    newest = snapshots / "ema-5000-0.05.safetensors"
    whole = (snapshots / "ema-4000-0.05.safetensors").read_bytes()
    newest.write_bytes(whole[:-7])
    target = [] if command == "inspect" else ["--sigma-rel", "0.07"]
    output = {"synthesize": ["-o", "out.safetensors"], "plot": ["-o", "out.png"]}.get(command, [])
    stopped = posthoc_here(command, "snapshots", *target, *output)
    assert stopped.code == 3
    assert "ema-5000-0.05.safetensors" in stopped.out + stopped.err
    assert not list(tmp_path.glob("out.*"))
    done = posthoc_here(command, "snapshots", *target, *output, "--skip-incomplete")
    assert done.code == 0, done
    left_out = "ema-5000-0.05.safetensors: left out: incomplete: not a whole safetensors file"
    if command == "inspect":
        assert "ema-5000-0.05.safetensors: incomplete: not a whole" in done.out
    else:
        assert left_out in done.err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.usefixtures("unmeasured")
def test_a_signal_that_comes_where_no_exception_gets_out(name: str, code: int) -> None:
    """As in a callback while Python imports, or in an object's __del__."""
    script = f"""
import os, signal, sys, time
import posthoc_cli.cli as cli, posthoc_cli.cli.app as app

class Unlucky:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.001)

def run():
    Unlucky()
    for _ in range(1000):
        time.sleep(0.01)

app.run = run
sys.exit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = "posthoc: interrupted\n" if name == "SIGINT" else ""
    assert (done.returncode, done.stderr) == (code, said)
