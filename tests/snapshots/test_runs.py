"""Which run a snapshot is of: by metadata, by time, by values."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc_cli.errors import UsageError
from posthoc_cli.snapshots.folder import FolderContents, read_folder
from posthoc_cli.snapshots.runs import jumps

HOUR = 3600


def save(
    folder: Path, name: str, step: int, *, gamma: float = 6.94, at: float = 0, **said: str
) -> None:
    path = folder / f"{name}.safetensors"
    tensors = {"w": np.full(3, step, np.float32)}
    save_file(tensors, path, {"step": str(step), "gamma": str(gamma), **said})
    if at:
        os.utime(path, (at, at))


def kohya(folder: Path, name: str, step: int, session: int, started: float, saved: float) -> None:
    """As sd-scripts says it."""
    said = {"ss_session_id": str(session), "ss_training_started_at": str(started)}
    said |= {"ss_training_finished_at": str(saved), "ss_output_name": name}
    save(folder, f"{name}-{step:08d}", step, **said)


def files(contents: FolderContents) -> list[str]:
    return [each.file.removesuffix(".safetensors") for each in contents.snapshots]


def problem(contents: FolderContents) -> str:
    ((_, message),) = contents.problems
    return message


# Told by metadata


@pytest.mark.parametrize("second", [150, 1000])
def test_two_runs_of_ours(tmp_path: Path, second: int) -> None:
    """They keep their id when they are resumed: also one after the other they are two."""
    for at in range(3):
        save(tmp_path, f"a{at}", 100 + 100 * at, run="1a2b3c")
        save(tmp_path, f"b{at}", second + 100 * at, run="1a9999")
    message = problem(read_folder(tmp_path))
    assert "2 runs are mixed here" in message
    assert "'1a2b3c' (steps 100 to 300: 'a0.safetensors', 'a1.safetensors', 'a2.saf" in message
    assert f"'1a9999' (steps {second} to {second + 200}: 'b0" in message
    assert message.endswith("; choose one with run='1a2b3c', say")
    for run in ("1a9999", "1a9"):
        chosen = read_folder(tmp_path, run=run)
        assert files(chosen) == ["b0", "b1", "b2"]
        assert (chosen.problems, chosen.warnings) == ([], [])
        assert {reason for _, reason in chosen.skipped} == {"of another run"}


def test_names_of_runs_that_do_not_choose(tmp_path: Path) -> None:
    save(tmp_path, "a", 100, run="1a2b3c")
    save(tmp_path, "b", 200, run="1a9999")
    for run in ("1a", "", "b"):
        with pytest.raises(UsageError) as caught:
            read_folder(tmp_path, run=run)
        assert caught.value.subject == "run="
        assert caught.value.remedy == "choose '1a2b3c', '1a9999'"


def test_a_run_where_no_file_says_one(tmp_path: Path) -> None:
    save(tmp_path, "a", 100)
    with pytest.raises(UsageError, match="no file says its run"):
        read_folder(tmp_path, run="x")


def test_what_is_wrong_with_files_of_other_runs_does_not_matter(tmp_path: Path) -> None:
    save(tmp_path, "a", 100, run="a")
    save(tmp_path, "b", 200, run="b")
    save_file({"w": np.zeros(3)}, tmp_path / "final.safetensors", {"run": "b"})
    assert files(read_folder(tmp_path, run="a")) == ["a"]
    assert not read_folder(tmp_path, run="a").problems


def test_one_session_after_the_other_is_one_run(tmp_path: Path) -> None:
    for at in range(3):
        kohya(tmp_path, "style", 100 + 100 * at, 77, 1000, 1100 + at)
        kohya(tmp_path, "style", 400 + 100 * at, 12, 2000, 2100 + at)
    contents = read_folder(tmp_path)
    assert (len(contents.usable()), contents.warnings) == (6, [])
    assert len(read_folder(tmp_path, run="77").usable()) == 3
    assert len(read_folder(tmp_path, run="style").usable()) == 6


def test_sessions_that_overlap(tmp_path: Path) -> None:
    for at in range(3):
        kohya(tmp_path, "style", 100 + 100 * at, 77, 1000, 1100)
        kohya(tmp_path, "style", 150 + 100 * at, 12, 2000, 2100)
    message = problem(read_folder(tmp_path))
    assert "2 sessions are mixed here, and their steps overlap: '77' (steps 100 to 300" in message
    assert len(read_folder(tmp_path, run="12").usable()) == 3


def test_a_session_that_began_before_the_steps_it_would_go_on_from(tmp_path: Path) -> None:
    for at in range(3):
        kohya(tmp_path, "style", 100 + 100 * at, 77, 1000, 1500)
        kohya(tmp_path, "style", 400 + 100 * at, 12, 1200, 1700)
    assert "began before the earlier steps' ended" in problem(read_folder(tmp_path))


def test_names_of_two_trainings_that_alternate(tmp_path: Path) -> None:
    for at in range(3):
        save(tmp_path, f"a{at}", 100 + 100 * at, ss_output_name="anna")
        save(tmp_path, f"b{at}", 150 + 100 * at, ss_output_name="bert")
    message = problem(read_folder(tmp_path))
    assert "2 output names are mixed here, and their steps overlap: 'anna' (" in message
    assert files(read_folder(tmp_path, run="bert")) == ["b0", "b1", "b2"]


def test_another_name_from_some_step_on_is_a_warning(tmp_path: Path) -> None:
    save(tmp_path, "a", 100, ss_output_name="anna")
    save(tmp_path, "b", 200, ss_output_name="anna-resumed")
    contents = read_folder(tmp_path)
    assert len(contents.usable()) == 2
    ((file, warning),) = contents.warnings
    assert file == ""
    assert warning.startswith("the output's name changes, and is taken for one run's")


def test_what_kohya_does_not_know_is_no_name(tmp_path: Path) -> None:
    save(tmp_path, "a", 100, ss_output_name="None", ss_session_id="")
    save(tmp_path, "b", 200)
    contents = read_folder(tmp_path)
    assert (len(contents.usable()), contents.warnings) == (2, [])


def test_files_that_do_not_say_their_run(tmp_path: Path) -> None:
    save(tmp_path, "a", 100, run="x")
    save(tmp_path, "b", 200)
    contents = read_folder(tmp_path)
    assert len(contents.usable()) == 2
    ((_, warning),) = contents.warnings
    assert warning.startswith("1 of 2 snapshots don't say their run, as the others do: 'b.saf")
    chosen = read_folder(tmp_path, run="x")
    assert files(chosen) == ["a"]
    assert chosen.skipped == [("b.safetensors", "its metadata doesn't say its run")]


def test_many_runs_are_said_in_short(tmp_path: Path) -> None:
    for at in range(40):
        save(tmp_path, f"s{at}", 100 + at, run=f"{at:040d}x")
    message = problem(read_folder(tmp_path))
    assert len(message) < 900
    assert "40 runs are mixed here" in message
    with pytest.raises(UsageError, match="or 28 more"):
        read_folder(tmp_path, run="y")


# Told by nothing but names or times


def test_names_of_two_kinds(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, f"anna-{step}", step)
        save(tmp_path, f"bert-{step + 50}", step + 50)
    ((file, warning),) = read_folder(tmp_path).warnings
    assert file == ""
    assert warning.startswith("steps of files that are named in two ways overlap: 'anna-100.saf")
    assert "and 'bert-150.safetensors', 'bert-250" in warning
    assert not read_folder(tmp_path, only=["anna*"]).warnings


@pytest.mark.parametrize("other", [(350, 6.94), (150, 16.97)])
def test_names_of_two_kinds_that_may_be(tmp_path: Path, other: tuple[int, float]) -> None:
    """Called otherwise from some step on, or of another width."""
    step, gamma = other
    for at in (0, 100, 200):
        save(tmp_path, f"anna-{100 + at}", 100 + at)
        save(tmp_path, f"bert-{step + at}", step + at, gamma=gamma)
    save(tmp_path, "best-120", 120)
    assert not read_folder(tmp_path).warnings


def test_steps_that_go_back_in_time(tmp_path: Path) -> None:
    for at in range(3):
        save(tmp_path, f"1-{at}", 100 + 100 * at, at=(20 + at) * HOUR)
        save(tmp_path, f"2-{at}", 150 + 100 * at, at=(10 + at) * HOUR)
    ((file, warning),) = read_folder(tmp_path).warnings
    assert file == "2-0.safetensors"
    assert warning.startswith("step 150, but 10 hours older than '1-0.safetensors' of step 100: ")


def test_times_that_say_nothing(tmp_path: Path) -> None:
    """Copied in the order of the names, and within a minute."""
    names = [f"s{step}" for step in (900, 1000, 1100)]
    for name, at in zip(sorted(names), (1, 2, 3), strict=True):
        save(tmp_path, name, int(name[1:]), at=at * HOUR)
    assert not read_folder(tmp_path).warnings
    for name, at in zip(names, (50, 30, 10), strict=True):
        save(tmp_path, name, int(name[1:]), at=HOUR + at)
    assert not read_folder(tmp_path).warnings


def test_times_do_not_matter_where_metadata_says_the_run(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, f"s{step}", step, at=(10 - step / 100) * HOUR, run="x")
    assert not read_folder(tmp_path).warnings


# Told by values


def differences(values: list[float]) -> np.ndarray:
    return (np.array(values)[:, None] - np.array(values)) ** 2


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        ([0, 1, 2, 3, 4, 5], None),
        ([0, 10, 15, 17, 18, 18.5], None),
        ([0, 50, 1, 51, 2, 52], 1),
        ([0, 1, 2, 50, 51, 52], 3),
        ([0, 1, 2, 10, 11, 12], None),
        ([0, 50, 51, 52, 53], None),  # training begins fast
        ([0, 0, 0, 50, 50, 50], None),
        ([0, 1, 2, 90, 3, 4], 3),
        ([0, 0, 0, 0], None),
        ([0, 1], None),
    ],
)
def test_neighbours_that_are_far_apart(tmp_path: Path, values: list[float], odd: int) -> None:
    for at in range(len(values)):
        save(tmp_path, f"s{at}", at + 1)
    found = jumps(read_folder(tmp_path).usable(), differences(values))
    assert [file for file, _ in found] == ([] if odd is None else [f"s{odd}.safetensors"])


def test_averages_of_other_widths_are_no_neighbours(tmp_path: Path) -> None:
    for at in range(4):
        save(tmp_path, f"a{at}", at + 1)
        save(tmp_path, f"b{at}", at + 1, gamma=16.97)
    found = read_folder(tmp_path).usable()
    values = [float(each.step + (100 if each.gamma > 10 else 0)) for each in found]
    assert jumps(found, differences(values)) == []
