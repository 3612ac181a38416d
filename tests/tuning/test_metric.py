"""Metrics that are commands of the shell."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from posthoc_cli.errors import MachineError, UsageError
from posthoc_cli.tuning.metric import CommandMetric, fill, read_gpus

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are of a POSIX shell")

HERE = {"file": "x.safetensors", "sigma_rel": "0.07", "step": "9", "target": "sigma-rel:0.07"}


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'a"b', "$HOME", "`id`", "a\\b", "a\nb", "*", "é", "-n", "#", "!x;&|"]
)
def test_a_path_is_one_word_whatever_quotes_it_stands_in(name: str) -> None:
    command = "printf '%s|' {file} '<{file}>' \"<{file}>\" x{file}"
    filled = fill(command, {"file": name})
    out = subprocess.run(["sh", "-c", filled], capture_output=True, text=True, check=True).stdout
    assert out == f"{name}|<{name}>|<{name}>|x{name}|"


def test_other_braces_stay() -> None:
    command = "python m.py {file} | awk '{print $1}' {x} {{step}}"
    assert fill(command, HERE) == "python m.py x.safetensors | awk '{print $1}' {x} {9}"


@pytest.mark.parametrize(
    "rest",
    [
        "| awk '{print $1}'",
        "| awk '{print}'",
        "${HOME} ${file} {} {1..3} {a,b}",
        "{{x}} '{ sigma }' \\{x\\}",
        "-d '{\"step\": 1}'",
        "; python -c 'print(f\"{loss:.3f} {loss}\")'",
        "; curl -w %{http_code} HEAD@{u}",
        "| xargs -I{x} echo {x}",
        "; exec {fd}>log; f() { echo; }",
        "<<END\nprint(f'{loss}')\nEND",
    ],
)
def test_braces_of_other_programs_are_no_fields(rest: str) -> None:
    command = f"a {{file}} {rest}"
    CommandMetric(command)
    assert fill(command, HERE) == f"a x.safetensors {rest}"


@pytest.mark.parametrize("wrong", ["{sigma}", "{File}", "{sigma-rel}", "{steps}", "{step:.3f}"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_fields_that_are_none_are_told(wrong: str, quote: str) -> None:
    with pytest.raises(UsageError) as caught:
        CommandMetric(f"a {{file}} {quote}x {wrong}{quote}")
    known = "there are {file}, {folder}, {sigma_rel}, {step}, {target}, {seed}; "
    assert str(caught.value).startswith(f"metric=: '{wrong}' is no field; {known}")
    for other in ("{gamma}", "{path}"):  # in quotes another program's
        with pytest.raises(UsageError, match="is no field"):
            CommandMetric(f"a {{file}} {other}")
        CommandMetric(f"a {{file}} '{other}'")


def test_the_metric_of_each_repeat(tmp_path: Path) -> None:
    log = tmp_path / "log"
    metric = CommandMetric(f"echo {{file}} >> {log}; wc -l < {log}", repeats=3)
    assert metric.measure(HERE) == [1, 2, 3]
    assert CommandMetric("echo {file}; echo '{\"a\": 2}'", key="a").measure(HERE) == [2]
    assert CommandMetric("echo x=5 y=7 {file}", regex=r"x=(\d)").measure(HERE) == [5]


def test_each_measurement_has_a_seed_of_its_own() -> None:
    metric = CommandMetric("echo {file}; echo {seed}", repeats=2, seeds=itertools.count(7))
    assert [metric.measure(HERE), metric.measure(HERE)] == [[7, 8], [9, 10]]


def test_gpus_go_by_the_slot() -> None:
    metric = CommandMetric("echo {file}; echo $CUDA_VISIBLE_DEVICES", gpus=read_gpus("3, 5"))
    assert [metric.measure(HERE, slot)[0] for slot in range(3)] == [3, 5, 3]
    for bad in ("", "0,,1", "0,0"):
        with pytest.raises(UsageError, match="gpus="):
            read_gpus(bad)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("echo a >&2; echo 'the end' >&2; exit 3", r"exit code 3 \('the end'\)"),
        ("echo out; exit 3", r"exit code 3 \('out'\)"),
        ("no-such-command-here 1", "exit code 127 .*not found.*"),
        ("kill -9 $$", "it was ended by SIGKILL"),
        ("echo 3.2 >&2", r"it printed nothing \('3\.2'\)"),
        ("echo nan", "the metric is NaN"),
        ("echo ok; echo odd >&2", r"no number stands .*, 'ok' \('odd'\)"),
        ("printf '\\033[31mred\\n' >&2; exit 1", r"exit code 1 \('\\x1b\[31mred'\)"),
        ("head -c 100000 /dev/urandom; exit 1", "exit code 1.*"),
    ],
)
def test_a_command_that_fails_is_one_line(command: str, problem: str) -> None:
    with pytest.raises(MachineError) as caught:
        CommandMetric(f": {{file}}; {command}").measure(HERE)
    assert caught.match(f"^metric=: {problem}; ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_what_only_stderr_has_is_told() -> None:
    with pytest.raises(MachineError, match="print the metric on stdout, as stderr isn't read, or"):
        CommandMetric(": {file}; echo FID 3.2 >&2").measure(HERE)


def test_after_the_timeout_all_of_it_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what it has started; and what heeds no SIGTERM."""
    monkeypatch.setattr("posthoc_cli.tuning.metric._GRACE", 0.3)
    pids = tmp_path / "pids"
    started = f"sleep 60 & echo $! > {pids}; trap '' TERM; echo 5; sleep 60; sleep 60"
    begin = time.monotonic()
    with pytest.raises(MachineError, match=r"took longer than 0\.3 s"):
        CommandMetric(f": {{file}}; {started}", timeout=0.3).measure(HERE)
    assert time.monotonic() - begin < 30
    assert ended(int(pids.read_text()))


def test_where_there_are_no_groups_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "killpg")
    monkeypatch.setattr("posthoc_cli.tuning.metric._GRACE", 0.2)
    with pytest.raises(MachineError, match=r"took longer than 0\.2 s"):
        CommandMetric(": {file}; exec sleep 60", timeout=0.2).measure(HERE)


def test_what_a_command_leaves_behind_is_not_waited_for() -> None:
    begin = time.monotonic()
    assert CommandMetric("sleep 30 & echo {file}; echo 4").measure(HERE) == [4]
    assert time.monotonic() - begin < 20


def test_a_stop_ends_what_runs_and_lets_nothing_begin(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    metric = CommandMetric(f": {{file}}; echo $$ > {pids}; sleep 60")
    failed: list[str] = []

    def measure() -> None:
        try:
            metric.measure(HERE)
        except MachineError as error:
            failed.append(error.problem)

    thread = threading.Thread(target=measure)
    thread.start()
    while not (pids.exists() and pids.read_text()):
        time.sleep(0.01)
    metric.stop()
    thread.join(20)
    assert failed == ["it was ended by SIGTERM"]
    assert ended(int(pids.read_text()))
    with pytest.raises(MachineError, match="not run"):
        metric.measure(HERE)


def ended(pid: int) -> bool:
    """Whether a process is gone, or will be once its parent looks."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_command_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MINE": "5"}.items():
        monkeypatch.setenv(name, value)
    metric = CommandMetric("echo {file}; echo 1$RANK$WORLD_SIZE$LOCAL_RANK$MINE")
    assert metric.measure(HERE) == [15]


def test_it_doesnt_read_the_terminal() -> None:
    assert CommandMetric("cat; echo {file}; echo 1").measure(HERE) == [1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"command": "echo 1"}, "doesn't say where the network goes; write {file}"),
        ({"command": "{file}", "timeout": 0.0}, "timeout=: 0 is no time"),
        ({"command": "{file}", "repeats": 0}, "repeats=: 0 is too few"),
        ({"command": "{file}", "regex": "a", "key": "b"}, "doesn't go with metric_json="),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        CommandMetric(**arguments)
    assert problem in str(caught.value)


def test_fields_that_say_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="needs an output that is a folder"):
        CommandMetric("ls {folder}").check("sigma_rel", "file")
    with pytest.raises(UsageError, match="says nothing of a window"):
        CommandMetric("ls {file} {sigma_rel}").check("window", "file")
    CommandMetric("ls {folder} {file} {target}").check("window", "folder")
