"""`posthoc tune`, as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posthoc_cli.storage.locks import take_lock
from tests.command import COMMAND, ENVIRONMENT, Posthoc, on_terminal, visible

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are of a POSIX shell")

WORDS = ("tune", "snapshots", "--range", "0.04:0.2", "--metric")
METRIC = "test -f {file} && echo {sigma_rel} | awk '{print 1 + 100 * ($1 - 0.1) * ($1 - 0.1)}'"
"""The less, the nearer a length is to 0.1."""


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_the_best_is_found_and_written(
    snapshots: Path, posthoc_here: Posthoc, check_json: Callable[[str, Any], None]
) -> None:
    here = snapshots.parent
    run = posthoc_here(*WORDS, METRIC, "--minimize", "-o", "best.safetensors", "--json")
    assert run.code == 0, run
    check_json("tune", run.json)
    best = run.json["best"]
    assert best["sigma_rel"] == pytest.approx(0.1, rel=0.2)
    assert best["interval"][0] < 0.102
    assert best["interval"][1] > 0.098
    assert best["target"]["text"] == f"sigma-rel:{best['sigma_rel']:g}"
    assert len(run.json["evaluations"]) == 14
    assert run.json["evaluations"] == entries(here / "best.tune.jsonl")
    assert run.json["output"] == "best.safetensors"
    assert sorted(path.name for path in here.iterdir()) == [
        "best.safetensors",
        "best.tune.jsonl",
        "snapshots",
    ]
    lines = run.err.splitlines()
    assert lines[0] == "posthoc: searching sigma_rel 0.04 to 0.2"
    assert lines[1].startswith("posthoc: 1/14 sigma_rel 0.04: 1.36 (expected error ")
    assert "; best so far sigma_rel " in lines[14]
    assert posthoc_here("verify", "best.safetensors", "snapshots").code == 0
    again = posthoc_here(*WORDS, METRIC, "--minimize", "-o", "best.safetensors")
    again.failed(2, "best.safetensors: exists already; use --force to .* or --skip-existing .*")
    kept = posthoc_here(*WORDS, METRIC, "--minimize", "-o", "best.safetensors", "--skip-existing")
    assert kept.code == 0
    assert "best.safetensors: " in kept.out
    assert "(kept as it was)" in kept.out
    shown = posthoc_here(*WORDS, METRIC, "--minimize", "-o", "best.safetensors", "--force", "-q")
    assert shown.err == ""
    table = shown.out.splitlines()
    assert table[0].split() == ["sigma_rel", "metric", "expected", "error", "time"]
    assert [float(line.split()[0]) for line in table[1:15]] == sorted(
        each["sigma_rel"] for each in run.json["evaluations"]
    )
    assert table[16].startswith(f"best sigma_rel {best['sigma_rel']:g} (")


def test_a_command_that_fails_and_is_mended(snapshots: Path, posthoc_here: Posthoc) -> None:
    """What was measured is kept, and not measured again."""
    here = snapshots.parent
    metric = "echo {file} {target} >> log; test $(wc -l < log) -ne 4 && wc -l < log"
    words = (*WORDS, metric, "--maximize", "--evaluations", "6", "-o", "x.safetensors")
    problem = r"exit code 1 at sigma_rel 0\.[0-9]+; .* \(3 measured so far, kept in x.tune.jsonl\)"
    run = posthoc_here(*words, "-q")
    run.failed(1, f"--metric: {problem}")
    assert sorted(path.name for path in here.iterdir()) == ["log", "snapshots", "x.tune.jsonl"]
    run = posthoc_here(*words)
    assert run.code == 0, run
    assert run.err.startswith("posthoc: x.tune.jsonl: 3 evaluations from before\n")
    seen = [line.split()[1] for line in (here / "log").read_text().splitlines()]
    assert len(seen) == 7
    assert seen[3] == seen[4]  # only that one twice
    assert len(set(seen)) == 6
    more = posthoc_here(*words[:-1], "y.safetensors", "--journal", "x.tune.jsonl", "-q")
    assert more.code == 0
    assert len((here / "log").read_text().splitlines()) == 7
    other = posthoc_here(*WORDS, "echo {file}; echo 1", "--maximize", "--journal", "x.tune.jsonl")
    other.failed(2, "x.tune.jsonl: a journal of another metric; name another with --journal, .*")


@pytest.mark.parametrize(
    ("metric", "line"),
    [
        ("echo {file} >&2; false", r"--metric: exit code 1 \('.*safetensors'\) at .*"),
        ("cat {file}", "--metric: .*"),
        ("echo {file}; echo nan", "--metric: the metric is NaN at sigma_rel 0.04; .*"),
        (": {file}", "--metric: it printed nothing at sigma_rel .*"),
        ("sleep 60; echo {file} 1", "--metric: it took longer than 0.2 s at .*; raise --timeout"),
    ],
)
def test_commands_that_go_wrong(
    snapshots: Path, posthoc_here: Posthoc, metric: str, line: str
) -> None:
    run = posthoc_here(*WORDS, metric, "--minimize", "--timeout", "0.2", "-q")
    run.failed(1, line)
    assert len(run.err) < 1000
    assert entries(snapshots.parent / "snapshots.tune.jsonl")[-1]["failed"]


def test_a_command_that_removes_the_folder(snapshots: Path, posthoc_here: Posthoc) -> None:
    metric = "rm -r $(dirname {file}); echo 1"
    run = posthoc_here(*WORDS, metric, "--minimize", "--evaluations", "8")
    assert run.code == 0, run
    assert len(entries(snapshots.parent / "snapshots.tune.jsonl")) == 8


def test_what_is_ambiguous_is_told_once(snapshots: Path, posthoc_here: Posthoc) -> None:
    words = (*WORDS, "echo {file} >&2; echo fid 3 of 5", "--minimize", "--evaluations", "3")
    run = posthoc_here(*words)
    assert run.code == 0
    said = "posthoc: --metric: of the 2 numbers in 'fid 3 of 5' the last, 5, is taken; "
    assert run.err.count(said + "--metric-regex takes another") == 1
    run = posthoc_here(*words, "--metric-regex", "fid ([0-9]+)", "--journal", "other.jsonl")
    assert entries(snapshots.parent / "other.jsonl")[0]["metric"] == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--metric", "a {file}"], "--minimize: neither it nor --maximize is given; .*"),
        (["--metric", "a {file}", "--minimize", "--maximize"], "--minimize: doesn't go with .*"),
        (["--minimize"], "--metric: missing; .*"),
        (["--metric", "a", "--minimize"], "--metric: 'a' doesn't say where .*; write {file} .*"),
        (["--metric", "a {file}", "--minimize", "-o", "x.pt"], "-o: 'x.pt' doesn't end in .*"),
        (["--metric", "a {file}", "--minimize", "-o", "x/"], "-o: 'x/' names no single file; .*"),
        (
            ["--metric", "a {file}", "--minimize", "-o", "{step}.safetensors"],
            "-o: '{step}.safetensors' names no single file; .*",
        ),
        (
            ["--metric", "a {folder}", "--minimize"],
            "--metric: {folder} needs an output that is a folder; add --layout folder, .*",
        ),
        (
            ["--metric", "a {file}", "--minimize", "--parallel", "0"],
            "--parallel: 0 doesn't go; give 1 or more",
        ),
        (
            ["--metric", "a {file}", "--minimize", "--gpus", "0,0"],
            "--gpus: '0,0' is no list of devices; write, say, 0,1,2",
        ),
        (
            ["--metric", "a {file}", "--minimize", "--parameter", "gamma"],
            "--parameter: 'gamma' is not known; choose .*",
        ),
        (
            ["--metric", "a {file}", "--minimize", "--range", "1:2"],
            "--range: 1 is out of bounds; give, say, --range 0.02:0.25",
        ),
        (["--metric", "a {file}", "--minimize", "--evaluations", "-1"], "--evaluations: -1 is .*"),
        (
            ["--metric", "a {file}", "--minimize", "--journal", "s3://bucket/x.jsonl"],
            "--journal: 's3://bucket/x.jsonl' is no path of a disk; .*",
        ),
        (["--metric", "a {file} {sigma}", "--minimize"], "--metric: '{sigma}' is no field; .*"),
        (["--metric", "a {file}", "--minimize", "--journal", "-"], "--journal: '-' is no path; .*"),
        (["--metric", "a {file}", "--minimize", "--workdir", ""], "--workdir: '' is no path; .*"),
        (["--metric", "a {file}", "--minimize", "--seed", "-1"], "--seed: -1 is less than 0; .*"),
        (
            ["--metric", "a {file}", "--minimize", "--journal", "/dev/null"],
            "/dev/null: is no file; .*",
        ),
        (
            ["--metric", "a {file}", "--minimize", "--workdir", "s3://bucket/x"],
            "--workdir: 's3://bucket/x' is no path of a disk; .*",
        ),
        (
            ["--metric", "a {file}", "--minimize", "--journal", "snapshots"],
            "snapshots: is no file; .*",
        ),
        (
            [
                *("--metric", "a {file}", "--minimize"),
                *("--journal", "x.safetensors", "-o", "./x.safetensors"),
            ],
            "--journal: 'x.safetensors' is the output; name another file",
        ),
    ],
)
def test_command_lines_that_are_wrong(
    snapshots: Path, posthoc_here: Posthoc, words: list[str], line: str
) -> None:
    posthoc_here("tune", "snapshots", *words).failed(2, line)
    assert [path.name for path in snapshots.parent.iterdir()] == ["snapshots"]


def test_a_journal_that_is_written_is_refused(snapshots: Path, posthoc_here: Posthoc) -> None:
    lock = take_lock(snapshots.parent / ".x.tune.jsonl.lock")
    assert lock is not None
    run = posthoc_here(*WORDS, METRIC, "--minimize", "-o", "x.safetensors")
    run.failed(1, "x.tune.jsonl: another run is writing it; wait until that is done")
    lock.release()


def test_several_at_once_each_with_a_gpu(snapshots: Path, posthoc_here: Posthoc) -> None:
    """Networks are removed when they are measured, and no other command begins after a failure."""
    here = snapshots.parent
    metric = "echo $CUDA_VISIBLE_DEVICES {target} >> log; sleep 0.1; test -f {file} && echo 1"
    words = (*WORDS, metric, "--minimize", "--evaluations", "9", "--gpus", "4,6", "-q")
    run = posthoc_here(*words, "--workdir", "scratch/a b", "--layout", "folder", "-o", "best")
    assert run.code == 0, run
    assert (here / "best" / "posthoc.json").exists()
    log = [line.split() for line in (here / "log").read_text().splitlines()]
    assert len(log) == 9
    assert {gpu for gpu, _ in log} == {"4", "6"}
    assert list((here / "scratch" / "a b").iterdir()) == []
    metric = "echo {target} >> few; mkdir first && exit 9; sleep 0.3"
    metric += "; echo {file}; echo 1"
    run = posthoc_here(*WORDS, metric, "--minimize", "--parallel", "3", "--journal", "f.jsonl")
    assert run.code == 1
    assert len((here / "few").read_text().splitlines()) == 3
    assert [each["metric"] for each in entries(here / "f.jsonl")] == [None, 1, 1]
    assert "exit code 9; waiting for 2 that still run" in run.err
    assert "(2 measured so far, kept in f.jsonl)" in run.err.splitlines()[-1]


def test_networks_are_written_as_the_best_is(snapshots: Path, posthoc_here: Posthoc) -> None:
    """In shards too, all of which go when they are measured."""
    here = snapshots.parent
    metric = "ls $(dirname {file}) | wc -l >> seen; grep -c weight_map {file}"
    words = (*WORDS, metric, "--minimize", "--evaluations", "3", "--max-shard-size", "20")
    run = posthoc_here(*words, "-o", "best.safetensors", "-q")
    assert run.code == 0, run
    assert (here / "best.safetensors.index.json").exists()
    seen = list(map(int, (here / "seen").read_text().split()))
    assert seen[0] == 3 * seen[2] > 3
    assert seen[1] == 2 * seen[2]
    assert posthoc_here("verify", "best.safetensors.index.json", "snapshots").code == 0
    run = posthoc_here(*words, "--lora", "exact", "-q")
    run.failed(2, "--lora exact: .*")


def test_other_parameters_and_the_step(
    snapshots: Path, posthoc_here: Posthoc, check_json: Callable[[str, Any], None]
) -> None:
    words = ("tune", "snapshots", "--metric", "echo {file}; echo {step}", "--maximize", "--json")
    more = ("--parameter", "window", "--range", "20%:80%", "--also", "step", "--evaluations", "8")
    run = posthoc_here(*words, *more)
    assert run.code == 0, run
    check_json("tune", run.json)
    assert run.json["best"]["step"] == 4000
    assert run.json["best"]["sigma_rel"] is None
    assert run.json["best"]["target"]["kind"] == "window"
    assert 20 <= run.json["best"]["interval"][0] <= 80
    run = posthoc_here(*words[:-1], *more, "-q")
    assert " at step 4000: " in run.out


def test_nothing_to_evaluate(
    snapshots: Path, posthoc_here: Posthoc, check_json: Callable[[str, Any], None]
) -> None:
    words = (*WORDS, METRIC, "--minimize", "--evaluations", "0", "-o", "x.safetensors")
    run = posthoc_here(*words)
    assert (run.code, run.out) == (0, "nothing measured; sigma_rel 0.04 to 0.2 would be searched\n")
    run = posthoc_here(*words, "--json")
    check_json("tune", run.json)
    assert run.json["best"] is None
    assert not (snapshots.parent / "x.safetensors").exists()


def start(here: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COMMAND, *words],
        cwd=here,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def wait_for(path: Path, lines: int) -> None:
    for _ in range(6000):
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} doesn't grow")


@pytest.mark.usefixtures("unmeasured")
def test_killed_it_goes_on(snapshots: Path, posthoc_here: Posthoc) -> None:
    here = snapshots.parent
    metric = "echo {target} >> log; sleep 0.05; test -f {file} && wc -l < log"
    words = (*WORDS, metric, "--minimize", "--evaluations", "9", "-o", "x.safetensors")
    with start(here, *words) as process:
        wait_for(here / "log", 4)
        process.kill()
    left = {path.name for path in here.iterdir()}
    assert ".x.tune.jsonl.networks" in left
    assert posthoc_here(*words).code == 0
    assert {path.name for path in here.iterdir()} == {
        "log",
        "snapshots",
        "x.safetensors",
        "x.tune.jsonl",
    }
    told = [each["target"] for each in entries(here / "x.tune.jsonl")]
    log = (here / "log").read_text().split()
    assert len(told) == 9
    assert len(log) <= 10  # only what was running is measured again
    assert set(log) == set(told)


@pytest.mark.usefixtures("unmeasured")
def test_killed_its_command_ends(snapshots: Path) -> None:
    """With what that has started: nobody would hear what they print."""
    here = snapshots.parent
    metric = "sleep 600 & echo $$ >> log; echo {file}; wait"
    with start(here, *WORDS, metric, "--minimize", "-o", "x.safetensors") as process:
        wait_for(here / "log", 1)
        shell = int((here / "log").read_text())
        assert living(shell)
        process.kill()
    gone(shell)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_what_is_known(
    snapshots: Path, number: signal.Signals, code: int
) -> None:
    """And ends the command that runs, with what that has started."""
    here = snapshots.parent
    metric = "echo $$ >> log; test $(wc -l < log) -eq 5 && sleep 60; echo {file}; echo {sigma_rel}"
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(here, *WORDS, metric, "--minimize", "-o", "x.safetensors")
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        wait_for(here / "log", 5)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    known = [line for line in err.splitlines() if "kept in" in line]
    assert known[0].startswith(
        "posthoc: 4 evaluations kept in x.tune.jsonl; the same call goes on there; best so far "
    )
    assert {path.name for path in here.iterdir()} == {"log", "snapshots", "x.tune.jsonl"}
    gone(int((here / "log").read_text().split()[-1]))


def gone(group: int) -> None:
    for _ in range(6000):
        if not living(group):
            return
        time.sleep(0.01)
    raise AssertionError("the command still runs")


def living(group: int) -> bool:
    """Whether a process of the group runs; one that has ended and waits to be asked doesn't."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            states += [state] if int(its_group) == group else []
    return not states or set(states) != {"Z"}


def test_a_table_on_a_terminal(snapshots: Path) -> None:
    words = (*WORDS, f"sleep 0.05; {METRIC}", "--minimize", "--evaluations", "4")
    shown = visible(on_terminal(words, snapshots.parent))
    lines = [part for line in shown for part in line.split("\r")]
    assert any("...  " in line for line in lines)
    assert any(line.startswith("2 of 4, about ") for line in lines)
    assert any(line.startswith("best so far sigma_rel ") for line in lines)
    assert not any(line.startswith("posthoc: 1/4") for line in lines)
    assert max(map(len, lines)) <= 80
    assert lines[-2].startswith("best sigma_rel ")
