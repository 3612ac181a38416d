"""What a sample of the values tells, and remedies that have to work when they are typed."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest

from tests.command import Posthoc
from tests.field.test_meaning import OUT, STEPS, checkpoint, network, refused
from tests.support import read_tensors


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
