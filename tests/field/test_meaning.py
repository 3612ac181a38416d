"""Averages that would mean nothing, runs that are mixed, and differences that don't matter.

Tensors and metadata are named as the tools name them: DeepSpeed, GPTQ, bitsandbytes, ComfyUI,
torchao, sd-scripts, torch.compile, DDP and FSDP.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from tests.command import Posthoc, Run
from tests.snapshots.test_meaning import QUANTIZED
from tests.support import read_tensors, write_layout, write_tensors

F16, F32, F64, FLOAT8 = np.float16, np.float32, np.float64, ml_dtypes.float8_e4m3fn
STEPS = (1000, 2000, 3000, 4000)
AT_LAST = ("--raw", "--sigma-rel", "0.2")
OUT = (*AT_LAST, "-o", "out.safetensors")

Tensors = Mapping[str, npt.NDArray[Any]]


def network(step: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """A little network on its way."""
    rng = np.random.default_rng(seed)
    start, way = rng.normal(size=(2, 8, 16))
    return {"a.weight": (start + way * step / 1000).astype(F32), "a.bias": np.full(8, step, F32)}


def checkpoint(folder: Path, at: int, tensors: Tensors, name: str = "", **said: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / (name or f"checkpoint-{at}.safetensors")
    write_tensors(path, tensors, said or None)
    return path


def refused(run: Run, *words: str, code: int = 3) -> None:
    """One line that has all of `words`, and nothing written."""
    run.failed(code, ".*" + ".*".join(map(re.escape, words)) + ".*")
    assert not Path("out.safetensors").exists()


def expected(folder: Path, posthoc_here: Posthoc, *arguments: str) -> dict[str, float]:
    """The weight of each file, as solve gives it."""
    document = posthoc_here("solve", folder.name, *AT_LAST, *arguments, "--json").json
    return {each["file"]: each["weight"] for each in document["targets"][0]["weights"]}


def assert_sum(run: Run, weights: Mapping[str, float], tensors: Mapping[str, Tensors]) -> Tensors:
    """The output is the sum by `weights` of the `tensors` of each file; returns it."""
    assert run.code == 0, run
    out = read_tensors(Path("out.safetensors"))
    for name, array in out.items():
        wanted = sum(w * tensors[file][name].astype(F64) for file, w in weights.items())
        assert array.astype(F64) == pytest.approx(wanted, rel=2e-3, abs=2e-3)
    return out


# Averages that mean nothing


def test_zero_3_placeholders(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """`save_pretrained` on one rank, without gathering what the others have."""
    for step in STEPS:
        empty = np.zeros(0, F16)
        checkpoint(tmp_path / "run", step, {"q.weight": empty, "o.weight": empty, "ln": empty})
    refused(
        posthoc_here("synthesize", "run", *OUT),
        "run/checkpoint-1000.safetensors: 3 of its 3 tensors, such as 'ln', are without elements",
        "DeepSpeed's ZeRO-3",
        "; consolidate the checkpoint by its zero_to_fp32.py, or save with "
        "stage3_gather_16bit_weights_on_model_save",
    )
    shown = posthoc_here("inspect", "run", "--raw")
    assert shown.code == 3
    assert "zero_to_fp32.py" in shown.out


def quantized(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    folder.mkdir()
    for step in STEPS:
        rng = np.random.default_rng(step)
        sizes = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}
        data = {
            name: rng.integers(0, 64, int(np.prod(shape)) * sizes[dtype], np.uint8).tobytes()
            for name, (dtype, shape) in tensors.items()
        }
        write_layout(folder / f"model-{step}.safetensors", tensors, data)


@pytest.mark.parametrize(
    ("tool", "name", "scale"),
    [
        ("GPTQ", "'q.qweight' (I32)", "'q.g_idx'"),
        ("bitsandbytes nf4", "'q.weight' (U8)", "'q.weight.absmax'"),
        ("bitsandbytes int8", "'q.weight' (I8)", "'q.SCB'"),
        ("ComfyUI scaled fp8", "'q.weight' (F8_E4M3)", "'q.scale_weight'"),
        ("torchao", "'q._weight_qdata' (F8_E4M3)", "'q._weight_scale'"),
    ],
)
def test_quantized(posthoc_here: Posthoc, tmp_path: Path, tool: str, name: str, scale: str) -> None:
    quantized(tmp_path / "run", QUANTIZED[tool])
    for command in ("solve", "synthesize"):
        refused(
            posthoc_here(command, "run", *(OUT if command == "synthesize" else AT_LAST)),
            f"run/model-1000.safetensors: tensor {name} is quantized, with {scale} beside it",
            "dequantize the checkpoints first, or average those that were quantized",
            "--copy",
        )
    run = posthoc_here("synthesize", "run", *OUT, "--copy", "*q*")
    assert run.code == 0, run
    out, newest = (
        read_tensors(tmp_path / file) if "I8" not in str(QUANTIZED[tool]) else {}
        for file in ("out.safetensors", "run/model-4000.safetensors")
    )
    assert all(out[each].tobytes() == newest[each].tobytes() for each in out if "q" in each)


def test_plain_float8_is_averaged(posthoc_here: Posthoc, tmp_path: Path) -> None:
    tensors = {}
    for step in STEPS:
        each = {name: (array / 16).astype(FLOAT8) for name, array in network(step).items()}
        each["norm.scale"] = np.full(4, step / 4000, FLOAT8)
        tensors[checkpoint(tmp_path / "run", step, each).name] = each
    weights = expected(tmp_path / "run", posthoc_here)
    run = posthoc_here("synthesize", "run", *OUT, "--dtype", "float32")
    assert_sum(run, weights, tensors)


def test_tables_of_integers_that_change(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """A codebook's indices, learnt with it."""
    for step in STEPS:
        codes = np.random.default_rng(step).integers(0, 256, 4000).astype(np.int32)
        checkpoint(tmp_path / "run", step, network(step) | {"vq.indices": codes})
    refused(
        posthoc_here("synthesize", "run", *OUT),
        "run/checkpoint-1000.safetensors: tensor 'vq.indices' (I32) is not what it is in the "
        "newest snapshot, 'checkpoint-4000.safetensors'",
        "integers, which have no average",
        "--copy",
        "--drop",
    )
    assert posthoc_here("synthesize", "run", *OUT, "--copy", "vq.*").code == 0
    assert read_tensors(tmp_path / "out.safetensors")["vq.indices"].tobytes() == codes.tobytes()


def test_batch_normalization(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in STEPS:
        statistics = {
            f"bn{at}.{name}": np.full(8, step, F32)
            for at in (1, 2)
            for name in ("running_mean", "running_var")
        }
        statistics["bn1.num_batches_tracked"] = np.array(step)
        checkpoint(tmp_path / "run", step, network(step) | statistics)
    run = posthoc_here("synthesize", "run", *OUT)
    assert run.code == 0
    assert run.err.count("running statistics of batch normalization") == 1
    assert "'bn1.running_mean' and 3 more" in run.err
    assert "update_bn" in run.err
    assert read_tensors(tmp_path / "out.safetensors")["bn1.num_batches_tracked"] == 4000


# Runs that are mixed


def kohya(session: int, name: str = "style", started: float = 1.7e9, **said: str) -> dict[str, str]:
    found = {"ss_session_id": str(session), "ss_output_name": name}
    return found | {"ss_training_started_at": str(started), **said}


def test_two_trainings_whose_steps_alternate(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Two LoRAs in the one output folder that the trainer's window proposes."""
    tensors = {}
    for step in STEPS:
        for seed, (name, add) in enumerate((("anna", 0), ("bert", 150)), start=1):
            each = network(step + add, seed)
            said = kohya(seed, name, ss_steps=str(step + add))
            file = f"{name}-step{step + add:08d}.safetensors"
            checkpoint(tmp_path / "loras", step, each, file, **said)
            tensors[file] = each
    line = (
        "loras/bert-step00001150.safetensors: not of the same run as the others: 2 output names "
        "are mixed here, and their steps overlap: 'anna' (steps 1000 to 4000: 'anna-step00001000"
    )
    refused(posthoc_here("synthesize", "loras", *OUT), line, "'bert' (steps 1150 to", "--run anna")
    refused(posthoc_here("solve", "loras", *AT_LAST), line)
    shown = posthoc_here("inspect", "loras", "--raw", "--json")
    assert shown.code == 3
    assert len(shown.json["problems"]) == 1
    weights = expected(tmp_path / "loras", posthoc_here, "--run", "bert")
    assert all(file.startswith("bert") for file in weights)
    run = posthoc_here("synthesize", "loras", *OUT, "--run", "bert")
    assert_sum(run, weights, tensors)


@pytest.mark.parametrize("run", ["carl", "", "1"])
def test_a_run_that_is_not_there(posthoc_here: Posthoc, tmp_path: Path, run: str) -> None:
    for step in STEPS:
        for session, name in ((12, "anna"), (13, "bert")):
            file, said = f"{name}-{step + session}.safetensors", kohya(session, name)
            checkpoint(tmp_path / "loras", step, network(step), file, **said)
    refused(
        posthoc_here("synthesize", "loras", *OUT, "--run", run),
        f"--run: '{run}' ",
        "; choose '12', '13'" + (", 'anna', 'bert'" if run != "1" else ""),
        code=2,
    )


def test_two_runs_of_ours(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in STEPS:
        for run, seed in (("4be1f0", 1), ("97c2aa", 2)):
            said = {"run": run, "step": str(step + seed), "sigma_rel": "0.05"}
            file = f"{run}-{step}.safetensors"
            checkpoint(tmp_path / "run", step, network(step, seed), file, **said)
    target = ("--sigma-rel", "0.05")
    for command in (("inspect", "run"), ("solve", "run", *target)):
        run = posthoc_here(*command)
        assert run.code == 3
        assert "2 runs are mixed here" in run.out + run.err
    weights = posthoc_here("solve", "run", *target, "--run", "97", "--json").json["targets"]
    assert {each["file"][:6] for each in weights[0]["weights"]} == {"97c2aa"}


def test_a_run_that_was_resumed(posthoc_here: Posthoc, tmp_path: Path) -> None:
    tensors = {}
    for at, step in enumerate(STEPS):
        said = kohya(100 - at // 2, started=1.7e9 + at // 2 * 5000)
        said["ss_training_finished_at"] = str(1.7e9 + at // 2 * 5000 + 1000)
        tensors[checkpoint(tmp_path / "run", step, network(step), **said).name] = network(step)
    weights = expected(tmp_path / "run", posthoc_here)
    run = posthoc_here("synthesize", "run", *OUT)
    assert_sum(run, weights, tensors)
    assert "warning" not in run.err


def test_a_run_that_was_started_again_from_an_earlier_state(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    """From the state of step 2000, when the first went on to 4000: two branches."""
    for step in STEPS:
        checkpoint(tmp_path / "run", step, network(step), **kohya(1))
    for step in (2500, 3500, 4500):
        checkpoint(tmp_path / "run", step, network(step, 1), **kohya(2, started=1.8e9))
    refused(
        posthoc_here("synthesize", "run", *OUT),
        "2 sessions are mixed here, and their steps overlap: '1' (steps 1000 to 4000: ",
        "'2' (steps 2500 to 4500: ",
    )
    assert posthoc_here("synthesize", "run", *OUT, "--run", "2").code == 0


def test_files_without_a_run_beside_some_that_have_one(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    for step in STEPS:
        said = kohya(7) if step < 4000 else {}
        checkpoint(tmp_path / "run", step, network(step), **said)
    run = posthoc_here("synthesize", "run", *OUT)
    assert run.code == 0
    assert "warning: 1 of 4 snapshots don't say their run, as the others do" in run.err
    document = posthoc_here("inspect", "run", "--raw", "--json").json
    assert [each["file"] for each in document["warnings"]] == [None]


def test_steps_that_go_back_in_time(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for at, step in enumerate((1000, 3000, 2000, 4000)):  # 2000 and 4000 of the night after
        path = checkpoint(tmp_path / "run", step, network(step))
        os.utime(path, (1.7e9 + 36000 * at,) * 2)
    run = posthoc_here("synthesize", "run", *OUT)
    assert run.code == 0
    assert (
        "checkpoint-3000.safetensors: step 3000, but 10 hours older than 'checkpoint-2" in run.err
    )


def test_values_that_jump(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for at in range(8):
        one = {"a.weight": network(1000 + 100 * at, at % 2)["a.weight"]}
        checkpoint(tmp_path / "run", 1000 + 100 * at, one)
    run = posthoc_here("solve", "run", *AT_LAST, "--method", "blup", "--json")
    assert run.code == 0
    assert "differs far more from 'checkpoint-1000.safetensors', its neighbour, than" in run.err
    messages = [each["message"] for each in run.json["warnings"]]
    assert any("of two runs, or broken?" in message for message in messages)


# Differences that don't matter


def wrapped(tensors: Tensors, prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {prefix + name: array for name, array in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module."],
)
@pytest.mark.parametrize("since", [2000, 4000])
def test_wrapped_from_some_step_on(
    posthoc_here: Posthoc, tmp_path: Path, prefix: str, since: int
) -> None:
    """Training was resumed with torch.compile, or on more than one GPU."""
    tensors = {}
    for step in STEPS:
        plain = network(step)
        stored = wrapped(plain, prefix) if step >= since else plain
        tensors[checkpoint(tmp_path / "run", step, stored).name] = plain
    weights = expected(tmp_path / "run", posthoc_here)
    run = posthoc_here("synthesize", "run", *OUT)
    assert assert_sum(run, weights, tensors).keys() == plain.keys()
    assert "the names of tensors have '" in run.err
    assert posthoc_here("verify", "out.safetensors", "run", "--full").code == 0


def test_the_one_that_differs_is_named(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """The newest is of another network: not the others are wrong."""
    for step in STEPS:
        more = {"extra": np.zeros(3, F32)} if step == 4000 else {}
        checkpoint(tmp_path / "run", step, network(step) | more)
    refused(
        posthoc_here("synthesize", "run", *OUT),
        "run/checkpoint-4000.safetensors: tensor 'extra' is F32 [3] here and missing in 3 others, "
        "such as 'checkpoint-3000.safetensors'; ",
    )


@pytest.mark.parametrize("steps", [(1000,), (4000,), (2000, 3000)])
@pytest.mark.parametrize("option", ["--drop", "--copy"])
def test_a_buffer_in_some_only(
    posthoc_here: Posthoc, tmp_path: Path, steps: tuple[int, ...], option: str
) -> None:
    """As of a rotary embedding's cache, which was made persistent at some time."""
    tensors = {}
    for step in STEPS:
        more = {"rope.inv_freq": np.full(4, step, F32)} if step in steps else {}
        path = checkpoint(tmp_path / "run", step, network(step) | more)
        tensors[path.name] = network(step) | {"rope.inv_freq": np.full(4, 4000, F32)}
    refused(posthoc_here("synthesize", "run", *OUT), "'rope.inv_freq' is ", "missing")
    run = posthoc_here("synthesize", "run", *OUT, option, "rope.*", "--json")
    assert run.code == 0, run
    weights = {each["file"]: each["weight"] for each in run.json["targets"][0]["weights"]}
    out = assert_sum(run, weights, tensors)
    assert ("rope.inv_freq" in out) == (option == "--copy" and 4000 in steps)
    assert posthoc_here("verify", "out.safetensors", "run", "--full").code == 0
    assert posthoc_here("inspect", "run", "--raw").code == 3


@pytest.mark.parametrize("newest", [F16, F32])
@pytest.mark.parametrize("method", ["share", "blup"])
def test_precision_that_changes(
    posthoc_here: Posthoc, tmp_path: Path, newest: type, method: str
) -> None:
    """Saved as float32 at first, later as float16; or the other way round."""
    tensors = {}
    for step in STEPS:
        dtype = newest if step > 2000 else {F16: F32, F32: F16}[newest]
        each = {name: array.astype(dtype) for name, array in network(step).items()}
        tensors[checkpoint(tmp_path / "run", step, each).name] = each
    run = posthoc_here("synthesize", "run", *OUT, "--method", method, "--json")
    weights = {each["file"]: each["weight"] for each in run.json["targets"][0]["weights"]}
    out = assert_sum(run, weights, tensors)
    assert {array.dtype for array in out.values()} == {np.dtype(newest)}
    assert "summed in the widest; outputs have the newest's, unless --dtype says which" in run.err
    assert posthoc_here("verify", "out.safetensors", "run", "--full").code == 0
