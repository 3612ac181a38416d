"""What a sample of the values tells, and remedies that have to work when they are typed."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posthoc_cli import open_snapshots
from posthoc_cli.solver import sigma_rel_to_gamma
from tests.command import Posthoc
from tests.field.test_meaning import OUT, STEPS, checkpoint, network, refused
from tests.support import Tensors, read_tensors


@pytest.mark.parametrize("raw", [True, False])
def test_two_runs_under_the_same_names(raw: bool, posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Copied into one folder; neither names nor metadata tell, only the values do."""
    for step in STEPS:
        for at, seed in ((step, 0), (step + 500, 1)):
            said = {} if raw else {"step": str(at), "sigma_rel": "0.1"}
            near = {"w": network(0, seed)["a.weight"] + np.float32(at / 1e5)}
            checkpoint(tmp_path / "run", at, near, **said)
    run = posthoc_here("synthesize", "run", *(OUT if raw else OUT[1:]))
    assert run.code == 0
    assert run.err.count("of two runs, or broken? (--only and --exclude choose)") == 1


def test_one_whose_values_never_came(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Its header is whole, and all else is zeros, as of a download into reserved space."""
    for step in STEPS:
        tensors = network(0)
        tensors["a.weight"] += np.float32(step / 1e5)
        if step == 2000:
            tensors = {name: np.zeros_like(array) for name, array in tensors.items()}
        checkpoint(tmp_path / "run", step, tensors)
    run = posthoc_here("synthesize", "run", *OUT)
    assert "checkpoint-2000.safetensors: differs far more from" in run.err
    rest = posthoc_here("synthesize", "run", *OUT, "--force", "--exclude", "*-2000*").err
    assert "differs far more" not in rest
    assert rest.count("\n") == 1
    assert "an error of up to" in rest  # of raw checkpoints so far apart


@pytest.mark.parametrize("kind", ["steady", "noisy", "annealed", "few", "half", "sparse"])
def test_a_healthy_run_has_no_warning(kind: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start, way = rng.normal(size=(2, 16, 16))
    for step in (1, 500, 1000, 1500, 2000, 3000, 3100, 5000):
        if kind == "few" and step > 1000:
            continue
        if kind == "sparse" and step > 1500:
            step *= 60  # saved often at the beginning alone
        gone = {"annealed": 1 - (1 - step / 5000) ** 2}.get(kind, step / 5000)
        weight = start + way * gone + (kind != "steady") * rng.normal(size=(16, 16)) / 50
        dtype = np.float16 if kind == "half" else np.float32
        checkpoint(tmp_path / "run", step, {"w": weight.astype(dtype)})
    run = posthoc_here("synthesize", "run", *OUT)
    assert (run.code, "warning" in run.err) == (0, False)


def test_a_part_of_another_run_is_no_suggestion(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Without the one that overlaps it would look like a run that was resumed, which it isn't."""
    for step, session in ((1000, "1"), (2000, "1"), (4000, "1"), (3500, "2"), (4500, "2")):
        said = {"ss_session_id": session, "ss_training_started_at": f"{session}000.5"}
        checkpoint(tmp_path / "run", step, network(step), ss_steps=str(step), **said)
    document = posthoc_here("inspect", "run", "--raw", "--json").json
    assert document["suggestion"] is None
    message = document["problems"][0]["message"]
    assert "2 sessions are mixed here" in message
    option = re.search(r"choose one with (--run \S+), say", message)
    assert option
    assert posthoc_here("synthesize", "run", *OUT, *shlex.split(option[1])).code == 0


def test_a_run_that_no_shell_could_take_is_not_proposed(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    for step in STEPS:
        run = "it's" if step < 3000 else "日本"
        checkpoint(tmp_path / "run", step, network(step), run=run)
    refused(posthoc_here("synthesize", "run", *OUT), "2 runs are mixed", "--run 日本, say")
    assert posthoc_here("synthesize", "run", *OUT, "--run", "日本").code == 0


def test_a_buffer_that_grows(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """What the message says works: such a tensor can be copied or dropped."""
    for step in STEPS:
        seen = np.ones(step // 1000, np.float32)
        checkpoint(tmp_path / "run", step, {**network(step), "seen": seen})
    refused(posthoc_here("synthesize", "run", *OUT), "'seen' is F32 [1] here", "--drop", "--copy")
    assert posthoc_here("synthesize", "run", *OUT, "--copy", "seen").code == 0
    assert read_tensors(tmp_path / "out.safetensors")["seen"].shape == (4,)
    assert posthoc_here("synthesize", "run", *OUT, "--force", "--drop", "seen").code == 0
    assert "seen" not in read_tensors(tmp_path / "out.safetensors")


def test_a_step_that_is_refused_is_not_missing(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in (*STEPS, 5000, 6000):
        path = checkpoint(tmp_path / "run", step, network(step))
        if step == 2000:
            path.write_bytes(path.read_bytes()[:-9])
    run = posthoc_here("synthesize", "run", *OUT)
    refused(run, "run/checkpoint-2000.safetensors: not a whole safetensors file")
    assert "no snapshot of step" not in run.err


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0:\x80\x01", "an ONNX file"),
        (b"\x1c\x00\x00\x00TFL3\x14\x00 \x00", "a TensorFlow Lite file"),
        (b"\x82\xa4step\xce\x00\x00\x03\xe8\xa6params\x81", "a Flax checkpoint (msgpack)"),
    ],
)
def test_other_formats(start: bytes, what: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in STEPS:
        checkpoint(tmp_path / "run", step, network(step))
    (tmp_path / "run/checkpoint-5000.safetensors").write_bytes(start + bytes(range(256)) * 9)
    refused(posthoc_here("synthesize", "run", *OUT), what, "not a safetensors file; use the")


def test_thousands_of_plain_checkpoints(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """The time grows with their number, not with its square."""
    taken = []
    for count in (500, 2000):
        folder = tmp_path / f"run{count}"
        for at in range(1, count + 1):
            checkpoint(folder, at * 10, {"w": np.full(4, at, np.float32)})
        began = time.process_time()
        assert posthoc_here("inspect", folder.name, "--raw", "--json").code == 0
        taken.append(time.process_time() - began)
    assert taken[1] < 8 * taken[0]


# Averages that are of another kind than is said


def save(folder: Path, name: str, state: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def net(value: int, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": torch.full(shape, 1.0 * value) for name, shape in SHAPES.items()}


SHAPES = {"w": (4, 3), "b": (3,)}
CALLED: dict[str, Callable[[Path, int], None]] = {
    "names": lambda folder, step: save(folder, f"model_ema_{step}.pt", net(step)),
    "a file": lambda folder, step: save(folder, f"checkpoint-{step}/ema_model.bin", net(step)),
    "a folder": lambda folder, step: save(folder, f"{step}/unet_ema/pytorch_model.bin", net(step)),
    "an entry": lambda folder, step: save(folder, f"{step}.pt", {"ema": net(step), "opt": {}}),
    "its kind": lambda folder, step: save(
        folder, f"net_{step}.pt", {"n_averaged": torch.tensor(step), **net(step, "module.")}
    ),
}


@pytest.mark.parametrize("case", CALLED)
def test_an_average_that_is_taken_for_raw_is_doubted(case: str, tmp_path: Path) -> None:
    for step in STEPS:
        CALLED[case](tmp_path, step)
    run = open_snapshots(tmp_path, raw=True)
    ((_, text),) = run.warnings
    assert text.startswith(
        "is called an average, and so are 3 more, and taken for a raw checkpoint"
    )
    assert "ema_decay=" in text
    if case != "its kind":  # which no name tells
        assert open_snapshots(tmp_path, raw=True, ema_decay=0.99).warnings == []
    assert open_snapshots(tmp_path, ema_decay=0.99).warnings == []


def test_what_is_really_raw_is_not(tmp_path: Path) -> None:
    """A tracker's own are called ema-...-raw, and say in their metadata what they are."""
    for step in STEPS:
        checkpoint(tmp_path / "tracked", step, network(step), step=str(step), decay="0.0")
        (tmp_path / f"tracked/checkpoint-{step}.safetensors").rename(
            tmp_path / f"tracked/ema-step{step}-raw.safetensors"
        )
        checkpoint(tmp_path / "schema", step, network(step))
    for folder in ("tracked", "schema"):
        assert open_snapshots(tmp_path / folder, raw=True).warnings == []


def test_a_key_that_is_called_ema_is_that_of_an_average(tmp_path: Path) -> None:
    """With raw= and ema_decay= those are EMAs that are called so, whatever the file is called."""
    for step in STEPS:
        save(tmp_path, f"{step:07}.pt", {"model": net(step), "ema": net(step)})
    run = open_snapshots(tmp_path, raw=True, ema_decay=0.99, key="ema")
    assert [each.profile.raw for each in run.snapshots] == [False] * 4
    run = open_snapshots(tmp_path, raw=True, ema_decay=0.99, key="model")
    assert [each.profile.raw for each in run.snapshots] == [True] * 4


OTHER_UNITS: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "kimg": (
        lambda folder, at: save(folder, f"ema-{10 * at}kimg.pt", net(at)),
        "its name counts thousands of images, and a decay is one a step",
    ),
    "timm's epochs": (
        lambda folder, at: save(folder, f"checkpoint-{at}.pth.tar", {"epoch": at, "ema": net(at)}),
        "its name counts epochs, and a decay is one a step",
    ),
    "epochs from 0, from 1": (
        lambda folder, at: save(folder, f"ema_{at}.pt", {"epoch": at - 1, "net": net(at)}),
        "its name counts epochs, and a decay is one a step",
    ),
}


@pytest.mark.parametrize("case", OTHER_UNITS)
def test_a_decay_a_step_needs_steps(case: str, tmp_path: Path) -> None:
    write, problem = OTHER_UNITS[case]
    for at in range(1, 5):
        write(tmp_path, at)
    found = open_snapshots(tmp_path, ema_decay=0.999).problems
    assert [text.partition(";")[0] for _, text in found] == [problem] * 4
    assert open_snapshots(tmp_path, raw=True).problems == []


def test_an_average_of_hardly_more_than_the_first_network_is_doubted(tmp_path: Path) -> None:
    for at in range(1, 9):
        save(tmp_path, f"ema_{at}.pt", net(at))
    ((file, text),) = open_snapshots(tmp_path, ema_decay=0.999).warnings
    assert file == "ema_8.pt"
    assert text.startswith("at step 8, 99.2% of an EMA of decay 0.999 is to be expected to be the")
    assert open_snapshots(tmp_path, ema_decay=0.5).warnings == []


def test_steps_inside_of_files_that_count_saves(tmp_path: Path) -> None:
    """As the trainers of denoising-diffusion-pytorch save: model-1.pt is of step 1000."""
    for at in range(1, 5):
        ema = {"initted": torch.tensor(True), "step": torch.tensor(1000 * at)}
        ema |= net(at, "online_model.") | net(at, "ema_model.")
        save(tmp_path, f"model-{at}.pt", {"step": 1000 * at, "model": net(at), "ema": ema})
    run = open_snapshots(tmp_path, ema_decay=0.99, key="ema", tool="ema-pytorch")
    assert [each.step for each in run.snapshots] == [1000, 2000, 3000, 4000]
    assert "every 10 steps unless told otherwise" in run.warnings[0][1]


SAID = {
    "args.yaml": "model_ema: true\nmodel_ema_decay: 0.9998\n",
    "hparams.yaml": "lr: 0.1\nema_decay: 0.9998\n",
    "config.json": '{"lr": 1, "ema": {"enabled": true, "decay": 0.9998}, "power": 2.0}',
    "train_config.json": '{\n "ema": {\n  "power": 1,\n  "decay": 0.9998\n }\n}',
    ".hydra/config.yaml": "model:\n  ema:\n    on: true\n    decay: 0.9998\nopt:\n  decay: 0.7\n",
    "config.toml": "[train.ema]\ndecay = 0.9998\n[opt]\ndecay = 0.7\n",
}


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_another_decay_in_the_trainings_configuration(
    name: str, below: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(SAID[name])
    for step in (100_000, 200_000):
        save(tmp_path / below, f"ema_{step}.pt", net(step))
    folder = tmp_path / below
    ((_, text),) = open_snapshots(folder, ema_decay=0.9999).warnings
    assert "says an EMA's decay of 0.9998, and snapshots are taken for EMAs of 0.9999" in text
    assert open_snapshots(folder, ema_decay=0.9998).warnings == []
    (tmp_path / name).write_text("weight_decay: 0.99\nema: false\nopt:\n  schema_decay: 0.8\n")
    assert open_snapshots(folder, ema_decay=0.9999).warnings == []


def test_a_networks_own_decay_and_power_are_no_schedule(tmp_path: Path) -> None:
    for step in STEPS:
        save(tmp_path, f"checkpoint-{step}/pytorch_model.bin", net(step))
        (tmp_path / f"checkpoint-{step}/config.json").write_text('{"decay": 0.9, "power": 2.0}')
    run = open_snapshots(tmp_path, raw=True)
    assert all(each.profile.raw for each in run.snapshots)


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_of_another_run(count: int, posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Copied over the end of a run, they differ from it no faster than training goes elsewhere."""
    rng = np.random.default_rng(0)
    start, way, other = rng.normal(size=(3, 16, 16))
    for at in range(1, 12):
        value = start + way * at / 30 if at <= 11 - count else other + way * at / 30
        checkpoint(tmp_path / "run", 1000 * at**2, {"w": value.astype(np.float32)})
    run = posthoc_here("synthesize", "run", *OUT)
    assert f"checkpoint-{1000 * (12 - count) ** 2}.safetensors: differs far more from" in run.err


def test_a_count_that_begins_anew(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """The names go on, and the steps inside go back: two readings, of which none is chosen."""
    rng = np.random.default_rng(0)
    for step in range(100, 900, 100):
        inside = step if step < 500 else step - 350
        state = {"model": {"w": torch.tensor(rng.normal(size=9))}, "step": inside}
        save(tmp_path / "run", f"model-{step}.pt", state)
    refused(
        posthoc_here("synthesize", "run", *OUT),
        "run/model-500.pt: its metadata's step says step 150, fewer than 'model-400.pt', 400, and "
        "its name says 500, which is more",
        "--pattern",
    )
    run = open_snapshots(tmp_path / "run", raw=True, pattern="model-{step}.pt")
    assert [each.step for each in run.snapshots] == list(range(100, 900, 100))


def walk(steps: int = 1000, size: int = 64) -> Tensors:
    """A random walk, its EMAs of sigma_rel 0.05 and 0.1: [steps + 1, size] each."""
    rng = np.random.default_rng(0)
    values = {"raw": np.cumsum(rng.normal(size=(steps + 1, size)), axis=0)}
    for sigma_rel in (0.05, 0.1):
        gamma = float(sigma_rel_to_gamma(sigma_rel))
        average = values["raw"].copy()
        for step in range(1, steps + 1):
            beta = (1 - 1 / step) ** (gamma + 1)
            average[step] = beta * average[step - 1] + (1 - beta) * average[step]
        values[str(sigma_rel)] = average
    return values


MIXED_UP = {
    "right": ("0.05", "0.1", ""),
    "the widths swapped": ("0.1", "0.05", "are their profiles mixed up?"),
    "the network itself, twice": ("raw", "raw", "holds the same values as 'a-100.safetensors'"),
    "one of them twice": ("0.1", "0.1", "holds the same values as 'a-100.safetensors', and 9 more"),
}


@pytest.mark.parametrize("case", MIXED_UP)
def test_profiles_that_are_mixed_up(case: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    narrow, wide, doubt = MIXED_UP[case]
    values = walk()
    for step in range(100, 1100, 100):
        for name, content, sigma_rel in (("a", narrow, "0.05"), ("b", wide, "0.1")):
            said = {"step": str(step), "sigma_rel": sigma_rel}
            tensors = {"w": values[content][step].astype(np.float32)}
            checkpoint(tmp_path / "run", step, tensors, f"{name}-{step}.safetensors", **said)
    run = posthoc_here("synthesize", "run", "--sigma-rel", "0.07", "-o", "out.safetensors")
    assert run.code == 0
    assert doubt in run.err
    assert ("warning" in run.err) == bool(doubt)


@pytest.mark.parametrize("stale", [[7], [6, 7, 8, 9, 10]])
def test_a_copy_under_another_step(stale: list[int], posthoc_here: Posthoc, tmp_path: Path) -> None:
    values = walk()["raw"]
    for at in range(1, 11):
        step = 100 * (4 if at in stale else at)
        checkpoint(tmp_path / "run", 100 * at, {"w": values[step].astype(np.float32)})
    run = posthoc_here("synthesize", "run", *OUT)
    more = f", and {len(stale) - 1} more such" if len(stale) > 1 else ""
    first = 100 * stale[0]
    said = f"checkpoint-{first}.safetensors: holds the same values as 'checkpoint-400.safetensors'"
    assert said + more + ": a copy" in run.err


def test_an_optimizer_among_the_tensors(tmp_path: Path) -> None:
    for step in STEPS:
        moments = {f"optimizer.exp_avg.{key}": each for key, each in network(step).items()}
        checkpoint(tmp_path / "run", step, {**network(step), **moments})
    ((_, text),) = open_snapshots(tmp_path / "run", raw=True).warnings
    assert text.startswith("'optimizer.exp_avg.")
    assert "an optimizer's state, beside the network itself" in text
    assert open_snapshots(tmp_path / "run", raw=True, drop=["optimizer.*"]).warnings == []


@pytest.mark.parametrize("name", ["consolidated.0{}.pth", "model_world_size_2_rank_{}.pt"])
def test_parts_of_a_network_are_not_to_choose_from(
    name: str, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    for step in STEPS:
        for rank in range(2):
            save(tmp_path / f"run/step_{step}", name.format(rank), net(step))
    refused(
        posthoc_here("synthesize", "run", *OUT), "run/step_1000: is a checkpoint of ", "2 parts"
    )
