"""`posthoc convert`, as a user meets it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posthoc_cli.solver.profiles import sigma_rel_to_gamma
from tests.command import COMMAND, ENVIRONMENT, Posthoc, on_terminal, visible
from tests.hostile_pickles import CORPUS, RUNS
from tests.synthesis.test_conversion import ema_pytorch

CheckJson = Callable[[str, Any], None]
ASKED = ("--profiles", "0.05,0.10", "--update-every", "10")
TOLD = r"posthoc: warning: --update-every 10: ema-pytorch didn't average over .*written\n"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """`run/`: checkpoints of ema-pytorch and of torch, and one that is broken."""
    folder = tmp_path / "run"
    folder.mkdir()
    for index in (0, 1):
        for step in (1000, 2000):
            ema_pytorch(folder, index, step, {"w": torch.ones(3, 4), "b": torch.zeros(4)})
    torch.save({"w": torch.ones(5)}, folder / "net_500_6.94.pth")
    (folder / "broken.ckpt").write_bytes((folder / "net_500_6.94.pth").read_bytes()[:300])
    return folder


def test_a_mixed_folder(
    posthoc: Posthoc, posthoc_here: Posthoc, mixed: Path, check_json: CheckJson
) -> None:
    done = posthoc("convert", "run", "out", *ASKED)
    assert done.code == 3
    lines = done.out.splitlines()
    assert lines[0].split() == [
        "file", "from", "step", "sigma_rel", "gamma", "dtype", "tensors", "size", "time",
    ]  # fmt: skip
    assert lines[1].split()[:7] == [
        "0.1000.pt",
        "ema-pytorch",
        "1000",
        "0.2459",
        "0.80",
        "F16",
        "2",
    ]
    assert lines[5].split()[:7] == [
        "net_500_6.94.pth",
        "torch",
        "500",
        "0.1000",
        "6.94",
        "F32",
        "1",
    ]
    assert lines[7].startswith("out: 5 snapshots, ")
    assert lines[8:10] == ["", "Problems"]
    assert lines[10].startswith("  broken.ckpt: not a whole checkpoint (")
    assert "\x1b" not in done.out + done.err
    warning, unused, also, error = done.err.splitlines(keepends=True)
    assert re.fullmatch(TOLD, warning)
    assert unused == (
        "posthoc: warning: --update-every isn't used for 'net_500_6.94.pth', of torch\n"
    )
    assert also == "posthoc: warning: --profiles isn't used for 'net_500_6.94.pth', of torch\n"
    assert error.startswith("posthoc: run: 1 problem found; ")
    assert sorted(os.listdir(mixed.parent / "out")) == [
        "0.1000.safetensors", "0.2000.safetensors", "1.1000.safetensors", "1.2000.safetensors",
        "net_500_6.94.safetensors",
    ]  # fmt: skip

    (mixed / "broken.ckpt").unlink()
    again = posthoc_here("convert", "run", "out", *ASKED, "--json")
    assert again.code == 0
    check_json("convert", again.json)
    assert [one["skipped"] for one in again.json["converted"]] == [True] * 5
    assert again.json["converted"][0]["gamma"] == (1 + sigma_rel_to_gamma(0.05)) / 10 - 1
    table = posthoc_here("convert", "run", "out", *ASKED)
    assert table.out.splitlines()[1].split()[-1] == "done"
    assert table.out.splitlines()[-1] == "out: 5 done already"


def test_json_is_whole_with_problems(
    posthoc_here: Posthoc, mixed: Path, check_json: CheckJson
) -> None:
    done = posthoc_here("convert", "run", "out", *ASKED, "--json", "-q")
    assert done.code == 3
    check_json("convert", done.json)
    assert done.json["source"] == "run"
    assert done.json["folder"] == "out"
    (problem,) = done.json["problems"]
    assert problem["file"] == "broken.ckpt"
    first = done.json["converted"][0]
    assert first["file"] == "0.1000.pt"
    assert first["output"] == os.path.join("out", "0.1000.safetensors")
    assert (first["from"], first["step"], first["skipped"]) == ("ema-pytorch", 1000, False)
    assert first["bytes"] == os.path.getsize(mixed.parent / first["output"])
    assert done.err == (
        "posthoc: run: 1 problem found; the list of problems says what to do about each\n"
    )


def test_what_several_files_have_in_common_is_said_once(posthoc_here: Posthoc, mixed: Path) -> None:
    done = posthoc_here("convert", "run", "out", "--only", "1.*", "--profiles", "0.05", "-q")
    assert done.code == 3
    (line,) = done.out.splitlines()[1:]
    assert line.startswith("  1.1000.pt and 1 more file: its name says index 1, for which ")
    assert not (mixed.parent / "out").exists()


def test_update_every_is_asked_for(posthoc_here: Posthoc, mixed: Path) -> None:
    asked = ("--profiles", "0.05,0.10", "--only", "*.*.pt")
    done = posthoc_here("convert", "run", "out", *asked)
    assert done.code == 0
    (warning,) = done.err.splitlines()
    assert re.fullmatch(
        "posthoc: warning: ema-pytorch averages with another profile than asked for unless "
        "update_every is 1, .* its default is 100: give --update-every as it was in training",
        warning,
    )
    assert posthoc_here("convert", "run", "out", *asked, "--update-every", "1").code == 2
    again = posthoc_here("convert", "run", "out", *asked, "--update-every", "1", "--force")
    assert (again.code, again.err) == (0, "")


def test_a_file_that_can_not_be_used_is_one_line(posthoc_here: Posthoc, mixed: Path) -> None:
    done = posthoc_here("convert", "run/broken.ckpt", "out")
    remedy = "wait until it is written, copy it again, or leave it out"
    done.failed(3, rf"run/broken.ckpt: not a whole checkpoint \(.*\); {remedy}")
    assert not (mixed.parent / "out").exists()


def test_what_is_wrong_with_the_command_line(posthoc_here: Posthoc, mixed: Path) -> None:
    posthoc_here("convert", "run", "out", "--from", "tensorflow").failed(
        2, "--from: 'tensorflow' is not known; choose auto, ema-pytorch, posthoc-ema, edm2 or torch"
    )
    posthoc_here("convert", "run", "out", "--dtype", "int8").failed(2, "--dtype: 'int8' is not .*")
    posthoc_here("convert", "gone", "out").failed(2, "gone: there is no such folder; .*")
    posthoc_here("convert", "run", "run/broken.ckpt").failed(2, ".*: is not a folder; .*")
    posthoc_here("convert", "run", "out", "--profiles", "0.05,x").failed(2, "--profiles: .*")
    posthoc_here("convert", "run", "out", "--pattern", "a").failed(2, "--pattern: neither .*")
    posthoc_here("convert", "run").failed(2, "FOLDER: missing; .*")
    assert not (mixed.parent / "out").exists()


def test_an_output_that_is_there(posthoc_here: Posthoc, mixed: Path) -> None:
    """Nothing is begun when one would have to be replaced."""
    out = mixed.parent / "out"
    out.mkdir()
    (out / "net_500_6.94.safetensors").write_text("mine")
    (mixed / "broken.ckpt").unlink()
    posthoc_here("convert", "run", "out", *ASKED).failed(
        2, ".*net_500_6.94.safetensors: exists already, and .*; use --force to replace it, .*"
    )
    assert os.listdir(out) == ["net_500_6.94.safetensors"]
    assert posthoc_here("convert", "run", "out", *ASKED, "--force", "-q").code == 0
    assert load_file(out / "net_500_6.94.safetensors")["w"].tolist() == [1.0] * 5


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("unmeasured")
def test_an_interrupted_run_goes_on_where_it_was(
    kind: signal.Signals, posthoc: Posthoc, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for step in range(1, 241):
        torch.save({"w": torch.full((50_000,), step / 7)}, tmp_path / "run" / f"a_{step}_6.94.pt")
    words = [COMMAND, "convert", "run", "out"]
    with subprocess.Popen(
        words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not list((tmp_path / "out").glob("*.safetensors")):
            time.sleep(0.002)
        process.send_signal(kind)
        out, _ = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[kind]
    assert out == b""
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert 0 < len(done) < 240
    assert all(name.endswith(".safetensors") for name in done)
    again = posthoc("convert", "run", "out", "--json")
    assert again.code == 0
    assert sum(one["skipped"] for one in again.json["converted"]) == len(done)
    for name, modified in done.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == modified
    for step in (1, 240):
        found = load_file(tmp_path / "out" / f"a_{step}_6.94.safetensors")["w"]
        assert torch.equal(found, torch.full((50_000,), step / 7))


def test_a_folder_that_can_not_be_written(posthoc_here: Posthoc, mixed: Path) -> None:
    (mixed / "broken.ckpt").unlink()
    posthoc_here("convert", "run", "gone/out", *ASKED, "-q").failed(
        1, r".*out: cannot be written \(No such file or directory\); create the folder first"
    )


def after_the_bar(shown: str) -> list[str]:
    """The lines that stay: the bar's own are written over."""
    return [line.rpartition("\r")[2] for line in visible(shown)]


def test_on_a_terminal(mixed: Path) -> None:
    (mixed / "broken.ckpt").unlink()
    shown = on_terminal(["convert", "run", "out", *ASKED], mixed.parent)
    lines = after_the_bar(shown)
    assert all(len(line.rstrip()) <= 80 for line in lines if not line.startswith("posthoc:"))
    assert any(line.split()[:4] == ["0.1000.pt", "ema-pytorch", "1000", "0.2459"] for line in lines)
    bare = on_terminal(["convert", "run", "out", *ASKED, "-q"], mixed.parent, NO_COLOR="1")
    assert "\x1b[3" not in bare
    assert "out: 5 done already" in bare


def test_long_names_on_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (500, 1000):
        name = f"a-network-with-a-name-that-is-as-long-as-they-often-are_{step}_6.94.pth"
        torch.save({"w": torch.ones(5)}, folder / name)
    lines = after_the_bar(on_terminal(["convert", "run", "out"], tmp_path))
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert any("…" in line and "_1000_6.94.pth" in line for line in lines)
    assert any(line.startswith("each: ") for line in lines)


@pytest.mark.parametrize("case", list(CORPUS)[::12], ids=str)
def test_a_hostile_file_is_one_line(case: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "run-0000001-0.050.pkl").write_bytes(CORPUS[case]())
    done = posthoc_here("convert", "run-0000001-0.050.pkl", "out")
    done.failed(3, "run-0000001-0.050.pkl: .*")
    assert os.listdir(tmp_path) == ["run-0000001-0.050.pkl"]


def test_a_folder_of_hostile_files(
    posthoc_here: Posthoc, tmp_path: Path, check_json: CheckJson
) -> None:
    """None is converted, none runs, and each is told; a good one among them is converted."""
    folder = tmp_path / "run"
    folder.mkdir()
    contents = {case: make() for case, make in CORPUS.items()}
    # The large ones take long to be refused, and in no other way than alone.
    small = [case for case, content in contents.items() if len(content) < 100_000]
    assert len(small) > 250
    for number, case in enumerate(small):
        suffix = "pkl" if number % 2 else "pt"
        (folder / f"{number}-0000001-0.050.{suffix}").write_bytes(contents[case])
    torch.save({"w": torch.ones(5)}, folder / "net_500_6.94.pth")
    done = posthoc_here("convert", "run", "out", "--json", "-q")
    assert done.code == 3
    assert len(done.err.splitlines()) == 1
    check_json("convert", done.json)
    assert [one["file"] for one in done.json["converted"]] == ["net_500_6.94.pth"]
    skipped = done.json["skipped"]  # harmless ones without tensors, as a log is
    assert {one["reason"] for one in skipped} == {"holds no tensors"}
    assert len(done.json["problems"]) + len(skipped) == len(small)
    hostile = [number for number, case in enumerate(small) if case in RUNS]
    assert not {one["file"].split("-")[0] for one in skipped} & set(map(str, hostile))
    assert os.listdir(tmp_path / "out") == ["net_500_6.94.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


# End to end


def tool_average(last: int, gamma: float, walk: np.ndarray, every: int) -> torch.Tensor:
    """The average of `walk` [steps, values] after `last` calls, as ema-pytorch has it: at every
    so many calls an update, each with the decay of one step."""
    average = walk[0].copy()
    for call in range(0, last, every):
        decay = (1 - 1 / (call + 2)) ** (1 + gamma)
        average = decay * average + (1 - decay) * walk[call]
    return torch.from_numpy(average)


def test_from_training_to_the_length_that_was_asked_for(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    """What a run with update_every 10 leaves gives the EMA that its user wanted."""
    rng = np.random.default_rng(0)
    steps, size, wanted = 4000, 800, 0.07
    goal, place = 3 * rng.standard_normal(size), rng.standard_normal(size)
    walk = np.empty((steps, size))
    for step in range(steps):
        place = place + 0.002 * (goal - place) + 0.05 * rng.standard_normal(size)
        walk[step] = place
    exact, gamma = walk[0].copy(), float(sigma_rel_to_gamma(wanted))
    for step in range(1, steps + 1):
        decay = (1 - 1 / step) ** (1 + gamma)
        exact = decay * exact + (1 - decay) * walk[step - 1]

    (tmp_path / "run").mkdir()
    for index, sigma_rel in enumerate((0.05, 0.10)):
        for last in range(250, steps + 1, 250):
            average = tool_average(last, float(sigma_rel_to_gamma(sigma_rel)), walk, 10)
            ema_pytorch(tmp_path / "run", index, last, {"w": average})

    def error(update_every: int) -> float:
        """How far the result is off, relative to how far the EMA is from the network."""
        folder, output = f"out{update_every}", f"ema{update_every}.safetensors"
        options = ("--profiles", "0.05,0.10", "--update-every", str(update_every), "-q")
        assert posthoc_here("convert", "run", folder, *options).code == 0
        target = ("--sigma-rel", str(wanted), "--method", "blup", "--dtype", "float64", "-q")
        assert posthoc_here("synthesize", folder, *target, "-o", output).code == 0
        made = load_file(tmp_path / output)["w"].numpy()
        return float(np.linalg.norm(made - exact) / np.linalg.norm(exact - walk[-1]))

    assert error(10) < 0.08
    assert error(1) > 0.8
