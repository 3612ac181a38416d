"""`posthoc plan` and `posthoc plot`, run as a user would."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_cli.cli.options import read_size
from posthoc_cli.cli.scale import read_bandwidth, read_time
from posthoc_cli.errors import UsageError
from posthoc_cli.plotting import density
from posthoc_cli.solver.profiles import Profile
from posthoc_cli.storage.remote.fetching import BUDGET, GENERATIONS, LARGEST
from posthoc_cli.synthesis.cost import cost, request_size
from tests.command import Posthoc, on_terminal, visible

PLAN = ["plan", "--steps", "10000", "--every", "500"]


def test_json(posthoc_here: Posthoc, check_json) -> None:
    run = posthoc_here(*PLAN, "--bytes-per-snapshot", "1.5 GB", "--json")
    assert (run.code, run.err) == (0, "")
    check_json("plan", run.json)
    end = run.json["run"][-1]
    assert (end["step"], end["snapshots"], end["profiles"]) == (10000, 40, [0.05, 0.1])
    assert end["bytes"] == 40 * 1_500_000_000
    assert [one["step"] for one in run.json["run"]] == [2500, 5000, 10000]
    (tight,), (loose,) = (one["sigma_rel"] for one in end["reachable"])
    assert loose["from"] < tight["from"] < 0.05 < 0.1 < tight["to"] < loose["to"]
    denser, more, both = run.json["alternatives"]
    assert (denser["every"], denser["snapshots"]) == (250, 80)
    assert (more["every"], more["snapshots"], len(more["profiles"])) == (500, 60, 3)
    assert (both["every"], both["snapshots"]) == (250, 120)
    for one in run.json["alternatives"]:
        wider = one["reachable"][0]["sigma_rel"]
        assert wider[0]["from"] <= tight["from"]
        assert wider[-1]["to"] >= tight["to"]


def test_table(tmp_path: Path, posthoc_here: Posthoc) -> None:
    arguments = [*PLAN, "--bytes-per-snapshot", "1.2GB", "--profiles", "0.05,0.10,0.25"]
    lines = visible(on_terminal(arguments, tmp_path))
    assert max(map(len, lines)) <= 80
    plain = posthoc_here(*arguments).out
    assert re.search(r"^end +10000 +60 +72.0 GB +0\.0\d+-0\.2\d+ +0\.0\d+-0\.2\d+$", plain, re.M)
    assert re.search(r"^every 250 steps +10000 +120 +144.0 GB ", plain, re.M)
    assert "\x1b" not in plain


def test_which_snapshots_a_target_needs(posthoc_here: Posthoc, check_json) -> None:
    small = ["plan", "--steps", "2400", "--every", "100"]
    asked = [*small, "--window", "20%", "--lr-decay", "cosine:20%"]
    run = posthoc_here(*asked, "--json")
    check_json("plan", run.json)
    quarter, _, end = run.json["run"]
    assert quarter["targets"] == []
    texts = ["window:20%", "lr-decay:cosine:20%"]
    assert [one["target"]["text"] for one in end["targets"]] == texts
    window, cosine = end["targets"]
    assert window["target"]["length"] == 480
    # About what such snapshots gave of networks that were trained, and tracked the window itself.
    assert 0.002 < window["relative_error"] < 0.014
    assert cosine["relative_error"] < window["relative_error"]
    assert 1500 <= window["keep_from"] <= 2000  # not long before the window begins
    for one in run.json["alternatives"]:
        assert [each["keep_from"] for each in one["targets"]] == [None] * 2
        assert one["targets"][0]["relative_error"] < window["relative_error"]
    few = ["plan", "--steps", "400", "--every", "100", "--window", "20%"]
    lines = visible(posthoc_here(*few).out)
    at = lines.index("at step 400, if the network moves evenly")
    assert re.search(r"^window 20% +\d+\.?\d*%.* from \d+ on$", lines[at + 2])
    posthoc_here(*small, "--window", "2401").failed(2, "--window: 2401 is longer than the 2400 .*")


def test_run_that_ends_between_snapshots(posthoc_here: Posthoc) -> None:
    run = posthoc_here("plan", "--steps", "1000", "--every", "300")
    assert run.err.startswith("posthoc: --every 300: the last snapshot is 100 steps before the end")
    assert re.search(r"^end +900 +6 ", run.out, re.M)
    assert posthoc_here("plan", "--steps", "1000", "--every", "300", "-q").err == ""


def test_plans_that_have_all_there_is(posthoc_here: Posthoc, check_json) -> None:
    every = ["plan", "--steps", "50", "--profiles", "0.01,0.02,0.03,0.15,0.20,0.25", "--json"]
    run = posthoc_here(*every, "--every", "1")
    check_json("plan", run.json)
    assert run.json["alternatives"] == []
    assert len(posthoc_here(*every, "--every", "2").json["alternatives"]) == 1
    assert posthoc_here(*every[:-1], "--every", "1").code == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "10", "--every", "11"], "--every: 11 is not from 1 to 10; .*"),
        (["--steps", "10", "--every", "0"], "--every: 0 is not from 1 to 10; .*"),
        (["--steps", "-5", "--every", "1"], "--every: 1 is not from 1 to -5; .*"),
        (["--steps", "9", "--every", "1", "--profiles", "0.3"], "--profiles: 0.3 is out of .*"),
        (
            ["--steps", "9", "--every", "1", "--bytes-per-snapshot", "big"],
            "--bytes-per-snapshot: 'big' is no size; .*",
        ),
    ],
)
def test_plan_refuses(posthoc_here: Posthoc, arguments: list[str], line: str) -> None:
    posthoc_here("plan", *arguments).failed(2, line)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12", 12),
        ("1.2GB", 1_200_000_000),
        ("3 mb", 3_000_000),
        ("1GiB", 2**30),
        ("0.5k", 500),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert read_size("--bytes-per-snapshot", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "0", "1XB", "1 2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        read_size("--bytes-per-snapshot", text)


def test_densities_are_densities() -> None:
    at = (np.arange(200_000) + 0.5) / 200
    for gamma in (-0.4, 0.0, 6.94, 40.0):
        total = density(Profile(800, gamma), at).sum() / 200
        assert total == pytest.approx(1, abs=0.01)
    assert density(Profile(800, 3.0), np.array([800.0, 800.1])).tolist() == [4 / 800, 0.0]


SIGNS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize("kind", SIGNS)
def test_figures(posthoc_here: Posthoc, snapshots: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["plot", "snapshots", "--sigma-rel", "0.07", "--gamma", "3", "-o", f"x.{kind}"]
    run = posthoc_here(*arguments, "-q")
    assert (run.code, run.out, run.err) == (0, "", "")
    first = (tmp_path / f"x.{kind}").read_bytes()
    assert first.startswith(SIGNS[kind])
    posthoc_here(*arguments, "-q").failed(2, rf"x\.{kind}: exists already; .*")
    assert posthoc_here(*arguments, "--force", "-q").code == 0
    assert (tmp_path / f"x.{kind}").read_bytes() == first
    if kind == "svg":
        text = first.decode()
        for word in ("wanted", "algorithm3", "edm2", "blup", "training step", "0.05"):
            assert f">{word}<" in text


HEADER = {
    "posthoc_tune": 1,
    "goal": "maximize",
    "parameter": "window",
    "range": ["1%", "50%"],
    "steps": [600, 800],
    "seed": 0,
}


def write_journal(path: Path, header: dict[str, Any], count: int) -> None:
    """Of a metric whose most is 7 at windows of 7 %, at the later step."""
    lines = [header]
    for at in range(count):
        length, step = 50 ** (at / max(count - 1, 1)), 800 - 200 * (at % 2)
        metric = 7 - math.log(length / 7) ** 2 - (step == 600)
        lines.append({"target": "w", "length": length, "step": step, "metric": metric})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("kind", SIGNS)
def test_a_search_is_drawn(posthoc_here: Posthoc, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    write_journal(tmp_path / "best.tune.jsonl", HEADER, 9)
    arguments = ["plot", "best.tune.jsonl", "-o", f"x.{kind}"]
    run = posthoc_here(*arguments)
    assert (run.code, run.err) == (0, f"posthoc: x.{kind}: 9 evaluations drawn\n")
    first = (tmp_path / f"x.{kind}").read_bytes()
    assert first.startswith(SIGNS[kind])
    assert posthoc_here(*arguments, "--force").code == 0
    assert (tmp_path / f"x.{kind}").read_bytes() == first
    if kind == "svg":
        text = first.decode()
        for word in ("curve, 90%", "best, 90%", "measured", "at other steps", "metric"):
            assert f">{word}<" in text
        assert ">window (% of the target step)<" in text
        best = re.search(r">best (.*)% \((.*)% to (.*)%\) at step 800<", text)
        assert best is not None
        at, low, high = map(float, best.groups())
        assert low < at < high
        assert at == pytest.approx(7, rel=0.05)
        value = re.search(r">metric (.*) \((.*) to (.*)\)<", text)
        assert value is not None
        at, low, high = map(float, value.groups())
        assert low < at < high
        assert at == pytest.approx(7, rel=0.05)


def test_a_search_that_cannot_be_drawn(posthoc_here: Posthoc, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    journal = tmp_path / "j.tune.jsonl"
    arguments = ["plot", "j.tune.jsonl", "-o", "x.svg"]
    posthoc_here(*arguments).failed(2, r"j\.tune\.jsonl: there is no such journal; .*")
    posthoc_here("plot", "a.jsonl", "-o", "x.svg").failed(2, r"a\.jsonl: .* no such journal; .*")
    journal.touch()
    posthoc_here(*arguments).failed(2, r"j\.tune\.jsonl: is an empty journal; .*")
    journal.write_text("hello\n")
    posthoc_here(*arguments).failed(2, r"j\.tune\.jsonl: is no journal of posthoc tune .*")
    write_journal(journal, HEADER, 0)
    posthoc_here(*arguments).failed(2, r"j\.tune\.jsonl: nothing was measured yet; .*")
    write_journal(journal, HEADER, 1)
    posthoc_here(*arguments, "--step", "9").failed(2, r".*: is a journal, .*; give only -o")
    posthoc_here(*arguments, "--gamma", "9").failed(2, r".*: is a journal, .*; give only -o")
    assert posthoc_here(*arguments).code == 0
    for key, value in {"range": 3, "goal": "x", "steps": [None], "parameter": "gamma"}.items():
        write_journal(journal, HEADER | {key: value}, 3)
        posthoc_here(*arguments, "--force").failed(2, r".*: its first line doesn't say what .*")
    journal.write_text('{"posthoc_tune": 2}\n')
    posthoc_here(*arguments, "--force").failed(2, r".*: is a journal of another version .*")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gamma", "3", "-o", "x.jpg"], r"-o: 'x\.jpg' doesn't end in .*"),
        (["-o", "x.png"], "--sigma-rel: no target is given; .*"),
        (["--gamma", "1,2,...,9", "-o", "x.png"], "--sigma-rel: 9 targets; give up to 6 .*"),
    ],
)
def test_plot_refuses(
    posthoc_here: Posthoc, snapshots: Path, arguments: list[str], line: str
) -> None:
    pytest.importorskip("matplotlib")
    posthoc_here("plot", "snapshots", *arguments).failed(2, line)


def test_a_picture_appears_whole_and_in_no_other_files_place(
    posthoc_here: Posthoc, snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["plot", "snapshots", "--gamma", "3", "-o", "x.png"]
    snapshot = sorted(snapshots.iterdir())[0]
    before = snapshot.read_bytes()
    (tmp_path / "x.png").symlink_to(snapshot)
    posthoc_here(*arguments).failed(2, "x.png: exists already; use --force to replace it")
    assert posthoc_here(*arguments, "--force").code == 0
    assert snapshot.read_bytes() == before
    assert not (tmp_path / "x.png").is_symlink()
    (tmp_path / "x.png").unlink()
    (tmp_path / "x.png").symlink_to("nowhere")
    posthoc_here(*arguments).failed(2, "x.png: exists already; use --force to replace it")
    (tmp_path / "x.png").unlink()
    (tmp_path / "x.png").write_bytes(b"an older picture")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("posthoc_cli.storage.atomic._reserve", full)
    posthoc_here(*arguments, "--force").failed(
        1, r"x\.png: cannot be written \(No space.*; free .*"
    )
    monkeypatch.undo()
    assert (tmp_path / "x.png").read_bytes() == b"an older picture"
    (tmp_path / "folder.png").mkdir()
    posthoc_here(*arguments[:-1], "folder.png", "--force").failed(2, "folder.png: is a folder; .*")
    assert {path.name for path in tmp_path.iterdir()} == {"snapshots", "x.png", "folder.png"}


def test_without_matplotlib(
    posthoc_here: Posthoc, snapshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    posthoc_here("plot", "snapshots", "--gamma", "3", "-o", "x.png").failed(
        2, r"posthoc plot: matplotlib is not installed; pip install 'posthoc-cli\[plot\]'"
    )


# Other machines


LARGE = ["plan", "--steps", "100", "--every", "10", "--bytes-per-snapshot", "3TB"]


def test_what_a_synthesis_takes_on_other_machines(posthoc_here: Posthoc, check_json) -> None:
    asked = [*LARGE, "--bandwidth", "24Gb/s", "--nodes", "8"]
    run = posthoc_here(*asked, "--latency", "0", "--json")
    assert run.code == 0
    check_json("plan", run.json)
    one, eight = run.json["synthesis"]
    assert (one["nodes"], one["bytes_read"], one["bytes_written"]) == (1, 6 * 10**13, 3 * 10**12)
    assert one["seconds"] == one["transfer_seconds"] == 6e13 / 3e9
    assert (eight["nodes"], eight["bytes_read"], eight["seconds"]) == (8, 75 * 10**11, 2500.0)
    (only,) = posthoc_here(*LARGE, "--bandwidth", "3GB/s", "--in-flight", "48", "--json").json[
        "synthesis"
    ]
    assert only["waiting_seconds"] == pytest.approx(only["requests"] * 0.05 / 48)
    assert only["seconds"] == only["transfer_seconds"] + only["waiting_seconds"]
    assert only["requests"] * only["request_bytes"] == pytest.approx(6e13, rel=1e-3)
    assert posthoc_here(*LARGE, "--json").json["synthesis"] == []
    lines = visible(posthoc_here(*asked, "--gamma", "3,5").out)
    at = lines.index("to synthesize 2 targets, by a model")
    assert re.fullmatch(
        r" +1 +60\.0 TB +6\.0 TB +[\d,]+ +5\.56 h +[\d.]+ h +[\d.]+ h", lines[at + 2]
    )
    assert re.fullmatch(
        r" +8 +7\.5 TB +750\.0 GB +[\d,]+ +41\.7 min .* min +\S+ (min|h)", lines[at + 3]
    )
    assert max(map(len, lines[at:])) <= 80


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("3GB/s", 3e9),
        ("25Gb/s", 3.125e9),
        ("800 MB/s", 8e8),
        ("1.5GiB/s", 1.5 * 2**30),
        ("10 Gbit/s", 1.25e9),
        ("64kB/s", 64e3),
        ("100B/s", 100),
    ],
)
def test_bandwidths(text: str, rate: float) -> None:
    assert read_bandwidth("--bandwidth", text) == pytest.approx(rate)


@pytest.mark.parametrize(
    "text",
    ["", "3", "3GB", "3 gb/s", "GB/s", "-3GB/s", "0GB/s", "1e9B/s", "nan", "3GBps", "3 GB/s x"],
)
def test_what_is_no_bandwidth(text: str, posthoc_here: Posthoc) -> None:
    posthoc_here(*LARGE, "--bandwidth", text).failed(
        2, rf"--bandwidth: '{re.escape(text)}' is no bandwidth; give, say, 3GB/s, or 25Gb/s in bits"
    )


def test_what_can_not_be_planned_of_other_machines(posthoc_here: Posthoc) -> None:
    given = [*LARGE, "--bandwidth", "3GB/s"]
    for text in ("", "50", "50 m", "-1s", "1e3s", "nan"):
        posthoc_here(*given, "--latency", text).failed(
            2, r"--latency: .* is no time; give, say, .*"
        )
    assert read_time("--latency", "0.2s") == read_time("--latency", "200 ms") == 0.2
    for option in ("--nodes", "--in-flight"):
        posthoc_here(*given, option, "0").failed(2, rf"{option}: 0 is not from 1 to 1,000,000; .*")
        posthoc_here(*given, option, "1.5").failed(2, rf"{option}: not a whole number; .*")
        posthoc_here(*LARGE, option, "4").failed(2, rf"{option}: says nothing alone; give --band.*")
    posthoc_here(*LARGE, "--latency", "1ms").failed(2, "--latency: says nothing alone; .*")
    posthoc_here(*LARGE[:-2], "--bandwidth", "3GB/s").failed(
        2, "--bandwidth: needs a size; give --bytes-per-snapshot too"
    )


def test_requests_of_the_model_are_those_of_the_reader() -> None:
    """Whole rows of the engine, as many as the reader puts in a range of its budget."""
    assert request_size(600, 1) == 1 << 20
    assert request_size(16, 1) == (BUDGET // (GENERATIONS * 16) >> 20) << 20
    assert request_size(2, 1) == LARGEST
    small = cost(4, 1000, 2, 3, 1e9, 0.1)
    assert (small.bytes_read, small.bytes_written) == (1334, 667)
    assert (small.requests, small.request_bytes) == (4, 334)
    assert small.waiting == pytest.approx(0.1)  # all at once
