"""`run.tune` and `run.tuner`: the search as a Python caller sees it."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import posthoc_cli
from posthoc_cli.api.tuner import Trial, Tuner
from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.solver.profiles import sigma_rel_to_gamma
from posthoc_cli.storage import disk
from posthoc_cli.tuning.axis import length_of


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that walks towards its goal with noise, so that one length is best."""
    folder = tmp_path_factory.mktemp("walk") / "snapshots"
    folder.mkdir()
    rng = np.random.default_rng(0)
    goal = rng.standard_normal(300)
    network = np.zeros(300)
    averages = {0.05: network.copy(), 0.10: network.copy()}
    for step in range(1, 1001):
        network = network + 0.01 * (goal - network) + 0.07 * rng.standard_normal(300)
        for sigma_rel, average in averages.items():
            gamma = float(sigma_rel_to_gamma(sigma_rel))
            average += (1 - (1 - 1 / step) ** (1 + gamma)) * (network - average)
            if step % 125 == 0:
                save_file(
                    {"w": average.astype(np.float32)},
                    folder / f"ema-{step:04d}-{sigma_rel}.safetensors",
                    {"step": str(step), "sigma_rel": str(sigma_rel)},
                )
    save_file({"w": goal}, folder.parent / "goal.safetensors")
    return folder


def log_distance(trial: Trial, best: float = 0.09) -> float:
    return abs(math.log(trial.length / best))


def test_the_first_seven_are_even_and_written_in_one_pass(
    walk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    save = posthoc_cli.Solution.save

    def counted(self: posthoc_cli.Solution, *given: Any, **more: Any) -> Any:
        passes.append(len(self.targets))
        return save(self, *given, **more)

    monkeypatch.setattr(posthoc_cli.Solution, "save", counted)
    run = posthoc_cli.open_snapshots(walk)

    def metric(path: Path) -> float:
        assert path.is_file()
        return abs(math.log(float(path.name[5:].split("-")[0]) / 0.09))

    tuned = run.tune(metric, minimize=True, given="path", range=(0.02, 0.25), evaluations=9)
    assert passes == [7, 1, 1]
    lengths = [each.length for each in tuned.evaluations]
    wanted = [float(f"{each:.4g}") for each in np.geomspace(0.02, 0.25, 7)]
    assert lengths[:7] == wanted
    assert tuned.best is not None
    assert tuned.best.sigma_rel == pytest.approx(0.09, rel=0.1)
    assert tuned.best.interval[0].value < 0.09 < tuned.best.interval[1].value
    assert [each.metric for each in tuned.evaluations] == [
        abs(math.log(each / 0.09)) for each in lengths
    ]


def test_the_length_of_a_network_that_was_trained(walk: Path, tmp_path: Path) -> None:
    """The best of a real curve is that of a sweep, and is saved with its recipe."""
    goal = load_file(walk.parent / "goal.safetensors")["w"]
    run = posthoc_cli.open_snapshots(walk)

    def metric(tensors: Any) -> float:
        return float(np.square(tensors["w"].numpy() - goal).mean())

    output = tmp_path / "best.safetensors"
    tuned = run.tune(metric, minimize=True, range="0.02:0.28", output=output)
    sweep = np.geomspace(0.02, 0.28, 50)
    solution = run.solve(sigma_rel=sweep.tolist())
    curve = [metric(solution.state_dict(at)) for at in range(50)]
    assert tuned.best is not None
    assert tuned.best.sigma_rel == pytest.approx(sweep[int(np.argmin(curve))], rel=0.15)
    assert metric(run.solve(sigma_rel=tuned.best.sigma_rel).state_dict()) < 1.02 * min(curve)
    assert posthoc_cli.verify(output, walk).problems == []
    assert tuned.output == [output]
    assert len(tuned.evaluations) == 14
    assert all(each.expected_error is not None for each in tuned.evaluations)


@pytest.mark.parametrize("minimize", [True, False])
def test_ask_and_tell(walk: Path, minimize: bool) -> None:
    run = posthoc_cli.open_snapshots(walk)
    sign = 1 if minimize else -1
    with run.tuner(minimize=minimize, range="0.02:0.25", evaluations=10) as tuner:
        assert tuner.result().best is None
        kinds = itertools.cycle([list, tuple, np.array, torch.tensor])
        asked = 0
        while trials := tuner.ask(3):
            assert len(trials) <= 3
            assert len({trial.target for trial in trials}) == len(trials)
            asked += len(trials)
            for trial in trials:
                value = 3 + sign * log_distance(trial)
                tuner.tell(trial, next(kinds)([value] * 2), seconds=1.5)
        assert asked == 10
        tuned = tuner.result()
    assert tuned.best is not None
    assert tuned.best.metric == pytest.approx(3, abs=0.1)
    assert tuned.best.metric_interval[0] <= tuned.best.metric <= tuned.best.metric_interval[1]
    assert tuned.evaluations[0].values == (3 + sign * log_distance(trial_of(0.02)),) * 2
    assert tuned.evaluations[3].values == pytest.approx([tuned.evaluations[3].metric] * 2)
    assert tuned.evaluations[0].seconds == 1.5


def trial_of(length: float) -> Any:
    return type("Trial", (), {"length": length})


def test_what_waits_is_not_asked_for_again(walk: Path) -> None:
    with posthoc_cli.open_snapshots(walk).tuner(
        minimize=True, range="0.02:0.25", evaluations=12
    ) as tuner:
        first = tuner.ask(99)
        assert len(first) == 7
        assert tuner.ask() == []  # nothing is known yet
        for trial in first[:5]:
            tuner.tell(trial, log_distance(trial))
        more = tuner.ask(99)
        assert len(more) == 5
        assert not {trial.target for trial in more} & {trial.target for trial in first[5:]}
        assert tuner.ask() == []
        tuner.fail(more[0], "lost")
        assert tuner.left == 1
        assert [trial.target for trial in tuner.ask(9)] != []


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_evaluations(walk: Path, tmp_path: Path, count: int) -> None:
    run = posthoc_cli.open_snapshots(walk)
    output = tmp_path / "best.safetensors"
    seen: list[float] = []

    def metric(tensors: Any) -> float:
        seen.append(float(tensors["w"].std()))
        return seen[-1]

    options: dict[str, Any] = {"minimize": False, "range": "0.02:0.25", "output": output}
    tuned = run.tune(metric, evaluations=count, **options)
    assert len(seen) == len(tuned.evaluations) == count
    assert output.exists() == (count > 0)
    assert (tuned.best is None) == (count == 0)
    if 0 < count < 3:  # before there is a curve it is one of those measured
        assert tuned.best is not None
        assert tuned.best.metric == max(seen)
        assert tuned.best.target.named in {each.target for each in tuned.evaluations}
        assert tuned.notes == []


def test_a_tolerance_stops_early(walk: Path) -> None:
    run = posthoc_cli.open_snapshots(walk)
    options: dict[str, Any] = {"minimize": True, "range": "0.02:0.25", "evaluations": 30}
    with run.tuner(tolerance=0.5, **options) as tuner:
        while trials := tuner.ask():
            tuner.tell(trials[0], log_distance(trials[0]) ** 2)
        assert 7 <= len(tuner.measured) < 15
        assert tuner.posterior is not None
        assert tuner.posterior.width <= 0.5


def test_the_same_call_goes_on(walk: Path, tmp_path: Path) -> None:
    run = posthoc_cli.open_snapshots(walk)
    journal = tmp_path / "x.jsonl"
    options: dict[str, Any] = {"minimize": True, "range": "0.02:0.25", "journal": journal}
    seen: list[str] = []

    def search(count: int) -> None:
        with run.tuner(evaluations=9, **options) as tuner:
            for _ in range(count):
                for trial in tuner.ask():
                    seen.append(trial.target.named)
                    tuner.tell(trial, log_distance(trial))

    for count in (2, 1, 5, 99):
        search(count)
    assert len(seen) == 9
    whole: list[str] = []
    with run.tuner(evaluations=9, **{**options, "journal": None}) as tuner:
        while trials := tuner.ask():
            whole += [trial.target.named for trial in trials]
            tuner.tell(trials[0], log_distance(trials[0]))
    assert seen == whole  # as if it had never been interrupted
    with run.tuner(evaluations=9, **{**options, "range": None}) as tuner:
        assert tuner.axis.low.text == "0.02"  # the journal's
    with pytest.raises(UsageError, match="a journal of another goal"):
        run.tuner(**{**options, "minimize": False})
    other = posthoc_cli.open_snapshots(walk, exclude=["*-0.05.*"])
    with pytest.raises(UsageError, match=r"a journal of other snapshots, .*; name another"):
        other.tuner(**options)
    with pytest.raises(UsageError, match=r"other snapshots, .*; give step=1000, or name another"):
        run.tuner(step=900, **options)


@pytest.mark.parametrize("parameter", ["window", "half_life", "decay"])
def test_other_parameters(walk: Path, parameter: str) -> None:
    """By default within what the snapshots give."""
    run = posthoc_cli.open_snapshots(walk)
    with run.tuner(minimize=True, parameter=parameter, max_error=0.3, evaluations=8) as tuner:
        while trials := tuner.ask(7):
            for trial in trials:
                assert trial.sigma_rel is None
                assert trial.expected_error is not None
                assert trial.expected_error < 0.31
                tuner.tell(trial, trial.length)
        best = tuner.result().best
    assert best is not None
    assert best.target.argument == parameter
    assert length_of(best.target) < 1.3 * tuner.axis.bounds[0]


def test_the_step_as_well(walk: Path) -> None:
    run = posthoc_cli.open_snapshots(walk)
    with run.tuner(minimize=True, also="step", range="0.05:0.2", evaluations=9) as tuner:
        assert tuner.steps == (500, 625, 750, 875, 1000)
        while trials := tuner.ask():
            for trial in trials:
                tuner.tell(trial, log_distance(trial) + abs(trial.step - 750) / 250)
        best = tuner.result().best
    assert len({each.step for each in tuner.measured}) > 2
    assert best is not None
    assert best.step in (625, 750, 875)


def test_doubts_are_told(walk: Path) -> None:
    run = posthoc_cli.open_snapshots(walk)

    def notes(
        metric: Callable[[Trial, int], float], low: float = 0.05, high: float = 0.2, **options: Any
    ) -> str:
        with run.tuner(minimize=True, range=(low, high), **options) as tuner:
            while trials := tuner.ask():
                tuner.tell(trials[0], metric(trials[0], len(tuner.measured)))
            return "\n".join(tuner.result().notes)

    assert notes(lambda trial, _: log_distance(trial) ** 2) == ""
    edge = notes(lambda trial, _: trial.length, evaluations=7)
    assert "sigma_rel 0.05, lies at the edge of the range" in edge
    noise = np.random.default_rng(0).standard_normal(14)
    assert "flat within its noise" in notes(lambda _, count: noise[count])
    half_life = {"parameter": "half_life", "low": 100, "high": 200}
    assert "no half-life is better" in notes(lambda _, count: noise[count], **half_life)
    # Between the first snapshots all are far off.
    far = notes(lambda trial, _: log_distance(trial) ** 2, step=190)
    assert "so that the error may have done it" in far


def test_a_function_that_fails(walk: Path, tmp_path: Path) -> None:
    run = posthoc_cli.open_snapshots(walk)
    journal = tmp_path / "x.jsonl"
    options: dict[str, Any] = {"minimize": True, "range": "0.02:0.25", "journal": journal}
    values = iter([1.0, 2.0, math.nan])
    with pytest.raises(MachineError, match=r"is NaN at sigma_rel .* \(2 measured so far, kept"):
        run.tune(lambda tensors: next(values), **options, name="x")
    with pytest.raises(ZeroDivisionError):
        run.tune(lambda tensors: 1 / 0, **options, name="x")
    with run.tuner(**options, name="x") as tuner:
        failed = [bool(each.failed) for each in tuner.journal.evaluations]
        assert failed == [False, False, True, True]
        assert len(tuner.measured) == 2
        with pytest.raises(UsageError, match="no finite number"):
            tuner.tell(tuner.ask()[0], math.inf)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        ("3.2", "'3.2'"),
        (True, "True"),
        (np.bool_(True), "True"),
        (1j, "1j"),
        (np.complex128(1), "(1+0j)"),
        ([], "[]"),
        ({"fid": 3.2}, "{'fid': 3.2}"),
        (torch.zeros(2, 3), "a Tensor of shape (2, 3)"),
        (np.zeros((2, 3)), "a ndarray of shape (2, 3)"),
    ],
)
def test_a_metric_that_is_no_number(walk: Path, value: Any, shown: str) -> None:
    run = posthoc_cli.open_snapshots(walk)
    with pytest.raises(UsageError) as caught:
        run.tune(lambda state: value, minimize=True, range="0.02:0.25")
    assert shown in caught.value.problem
    assert caught.value.problem.endswith(" is no number")
    with run.tuner(minimize=True, range="0.02:0.25") as tuner:
        with pytest.raises(UsageError, match="is no number; give a number, or a list"):
            tuner.tell(tuner.ask()[0], value)
        assert tuner.journal.evaluations == []


@pytest.mark.parametrize("value", [3, np.float32(3), np.array(3.0), torch.tensor([3.0]), [3, 3.0]])
def test_a_metric_that_is_a_number_of_any_kind(walk: Path, value: Any) -> None:
    run = posthoc_cli.open_snapshots(walk)
    tuned = run.tune(lambda state: value, minimize=True, range="0.02:0.25", evaluations=1)
    assert [each.metric for each in tuned.evaluations] == [3]


def test_told_once_of_what_was_asked_for(walk: Path, tmp_path: Path) -> None:
    run = posthoc_cli.open_snapshots(walk)
    options: dict[str, Any] = {"minimize": True, "range": "0.02:0.25"}
    with run.tuner(**options, journal=tmp_path / "x.jsonl") as tuner, run.tuner(**options) as other:
        first, second, third = tuner.ask(3)
        tuner.tell(first, 1.0)
        tuner.fail(second, "lost")
        for trial in (first, second, other.ask()[0]):
            with pytest.raises(UsageError, match=r"sigma_rel .* isn't waited for; tell once of"):
                tuner.tell(trial, 1.0)
        with pytest.raises(UsageError, match=r"0\.07 is no trial; tell"):
            tuner.tell(0.07, 1.0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is closed"):
        tuner.tell(third, 1.0)
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 3


def test_a_state_dict_is_as_the_output_will_be(walk: Path) -> None:
    run = posthoc_cli.open_snapshots(walk)
    kinds: list[Any] = []

    def metric(state: Any) -> float:
        kinds.append({name: tensor.dtype for name, tensor in state.items()})
        return 1.0

    options: dict[str, Any] = {"minimize": True, "range": "0.02:0.25", "evaluations": 1}
    run.tune(metric, dtype="float16", **options)
    assert kinds == [{"w": torch.float16}]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"metric": 5}, "metric=: 5 is neither a command nor a function"),
        ({"metric": "a {file} {sigma}"}, "metric=: '{sigma}' is no field"),
        ({"minimize": "yes"}, "minimize=: 'yes' is no answer; give True or False"),
        ({"parallel": "2"}, "parallel=: '2' is no whole number"),
        ({"journal": "-"}, "journal=: '-' is no path"),
        ({"lora": "exact"}, "lora='exact': goes with commands, or given='path'"),
    ],
)
def test_calls_that_make_no_sense(walk: Path, options: dict, problem: str) -> None:
    given = {"metric": float, "minimize": True, "range": "0.02:0.25"} | options
    with pytest.raises(UsageError) as caught:
        posthoc_cli.open_snapshots(walk).tune(**given)
    assert str(caught.value).startswith(problem)


def test_a_disk_without_room_for_seven(walk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are written in as many passes as it takes."""
    place: list[Path] = []
    most = 0

    def metric(path: Path) -> float:
        nonlocal most
        place[:] = [path.parent]
        most = max(most, len(os.listdir(path.parent)))
        return 1.0

    monkeypatch.setattr("posthoc_cli.api.tune.free_bytes", lambda folder: 3.5 * (1 << 20))
    run = posthoc_cli.open_snapshots(walk)
    tuned = run.tune(metric, minimize=True, given="path", range="0.02:0.25", evaluations=7)
    assert len(tuned.evaluations) == 7
    assert most == 3
    assert not place[0].exists()
    assert disk.free_bytes(walk) > 0


def test_a_quota_that_nobody_told_of(walk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where seven can't be written fewer are."""
    passes: list[int] = []
    save = posthoc_cli.Solution.save

    def limited(self: posthoc_cli.Solution, *given: Any, **more: Any) -> Any:
        passes.append(len(self.targets))
        if passes[-1] > 2:
            no_room = OSError(errno.ENOSPC, "No space left on device")
            raise MachineError("x", "cannot be written", "free some") from no_room
        return save(self, *given, **more)

    monkeypatch.setattr(posthoc_cli.Solution, "save", limited)
    run = posthoc_cli.open_snapshots(walk)
    options: dict[str, Any] = {"minimize": True, "range": "0.02:0.25", "evaluations": 7}
    assert len(run.tune(lambda path: 1.0, given="path", **options).evaluations) == 7
    assert passes == [7, 3, 1, 6, 3, 1, 5, 2, 3, 1, 2]


def test_a_full_disk_loses_no_evaluation(
    walk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network that was measured makes room for its line of the journal."""
    from posthoc_cli.storage.lines import LineFile

    append, most = LineFile.append, [3]

    def full(self: LineFile, line: str) -> None:
        if len(list(tmp_path.rglob("*.safetensors"))) > most[0]:
            raise MachineError("x", "cannot be written (No space left on device)", "free some")
        append(self, line)

    monkeypatch.setattr(LineFile, "append", full)
    run = posthoc_cli.open_snapshots(walk)
    options: dict[str, Any] = {"minimize": True, "range": "0.02:0.25", "evaluations": 4}
    options |= {"given": "path", "journal": tmp_path / "x.jsonl", "name": "x"}
    assert len(run.tune(lambda path: 1.0, **options).evaluations) == 4
    most[0] = -1
    with pytest.raises(MachineError, match="No space left"):
        run.tune(lambda path: 1.0, **options | {"evaluations": 5})
    assert len(run.tune(lambda path: 1.0, **options).evaluations) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"evaluations": -1}, "evaluations=: -1 is less than none"),
        ({"evaluations": "3"}, "evaluations=: '3' is no whole number; give, say, 14"),
        ({"evaluations": 3.5}, "evaluations=: 3.5 is no whole number"),
        ({"seed": -1}, "seed=: -1 is less than 0"),
        ({"step": "900"}, "step=: '900' is no whole number"),
        ({"range": 5}, "range=: 5 is no range"),
        ({"range": (0.1, 0.2, 0.3)}, "range=: (0.1, 0.2, 0.3) is no range"),
        ({"range": (None, 0.2)}, "range=: None is no number"),
        ({"tolerance": "x"}, "tolerance=: 'x' is no number"),
        ({"max_error": "5%"}, "max_error=: '5%' is no number"),
        ({"tolerance": 0}, "tolerance=: 0 is out of bounds"),
        ({"parameter": "gamma"}, "parameter=: 'gamma' can't be searched"),
        ({"also": "dtype"}, "also=: 'dtype' can't be searched"),
        ({"also": "step", "step": 130}, "also=: no two snapshots are of different steps"),
        ({"parameter": "window", "range": "10:2000"}, "window=: 2000 is longer than the 1000"),
        ({"range": "0.1"}, "range=: '0.1' is no range"),
        ({"dtype": "int3"}, "dtype="),
        ({"copy": ["x*"]}, "copy="),
        ({"max_error": -1}, "max_error="),
    ],
)
def test_arguments_that_make_no_sense(walk: Path, options: dict, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        Tuner(posthoc_cli.open_snapshots(walk), minimize=True, **options)
    assert str(caught.value).startswith(problem)


def test_nothing_within_reach(walk: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no range of lengths .* \(the least is .* at sigma_"):
        posthoc_cli.open_snapshots(walk).tuner(minimize=True, max_error=1e-7)
