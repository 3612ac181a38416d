"""Run folders of torch as trainers leave them: which checkpoints are converted, and into what."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import json
import pathlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import Posthoc
from tests.formats.test_edm2 import Network, half, names, snapshot

__all__ = ["names"]  # a fixture

State = dict[str, torch.Tensor]


def weights(value: float = 1.0) -> State:
    value = float(value)
    return {"conv.weight": torch.full((2, 3), value), "conv.bias": torch.full((3,), value)}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def made(tmp_path: Path, name: str) -> State:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def skipped(done: Any) -> dict[str, str]:
    return {one["file"]: one["reason"] for one in done.json["skipped"]}


# What is not a checkpoint blocks nothing


@pytest.fixture
def edm2(tmp_path: Path, names: None) -> Path:
    """A folder as EDM2's training loop writes it, from kimg 0 on."""
    folder = tmp_path / "run"
    folder.mkdir()
    for kimg in (0, 2147, 4295):
        for width in ("0.050", "0.100"):
            snapshot(half(Network()), folder / f"network-snapshot-{kimg:07}-{width}.pkl")
        state = {"net": weights(), "optimizer": {"state": {}, "param_groups": []}}
        save(folder / f"training-state-{kimg:07}.pt", {"state": argparse.Namespace(), **state})
    (folder / "log.txt").write_text("x")
    (folder / "stats.jsonl").write_text("{}")
    return folder


def test_a_run_of_edm2(
    edm2: Path, posthoc_here: Posthoc, check_json: Callable[[str, Any], None]
) -> None:
    done = posthoc_here("convert", "run", "out", "--json")
    assert done.code == 0
    check_json("convert", done.json)
    assert [one["step"] for one in done.json["converted"]] == [2147328] * 2 + [4295680] * 2
    reasons = skipped(done)
    assert reasons["network-snapshot-0000000-0.050.pkl"].startswith("of step 0")
    assert reasons["training-state-0002147.pt"] == "a state of training, to go on from"
    assert {"log.txt", "stats.jsonl"} <= reasons.keys()
    (line,) = done.err.splitlines()
    assert line.startswith("posthoc: warning: left out: log.txt, stats.jsonl (")
    assert "training-state-0000000.pt, training-state-0002147.pt and 1 more (" in line
    table = posthoc_here("convert", "run", "out")
    assert table.code == 0
    assert "Left out" in table.out


def test_what_is_named_by_itself_is_an_error(edm2: Path, posthoc_here: Posthoc) -> None:
    torch.save({"state": {}, "param_groups": []}, edm2 / "optimizer.pt")
    line = "holds no dict of tensors; .*"
    posthoc_here("convert", "run/optimizer.pt", "out").failed(3, f"run/optimizer.pt: {line}")
    posthoc_here("convert", "run", "out", "--only", "optimizer.pt").failed(3, f".*: {line}")
    first = "network-snapshot-0000000-0.050.pkl"
    posthoc_here("convert", f"run/{first}", "out").failed(3, ".* says step 0, not one from 1 .*")
    posthoc_here("convert", "run", "out", "--only", "training-state-*").failed(
        3, "run: holds no checkpoint: all 3 files are left out .*"
    )


def test_a_folder_of_trainer(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """transformers' Trainer: a folder a step, and the last network once more above them."""
    run = tmp_path / "run"
    for step in (500, 1000):
        folder = run / f"checkpoint-{step}"
        save(folder / "pytorch_model.bin", weights(step))
        save(
            folder / "optimizer.pt", {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
        )
        save(folder / "scheduler.pt", {"last_epoch": 3})
        save(folder / "rng_state.pth", {"cpu": torch.get_rng_state()})
        save(folder / "training_args.bin", argparse.Namespace(output=pathlib.PurePosixPath("x")))
        (folder / "trainer_state.json").write_text("{}")
    save(run / "pytorch_model.bin", weights(7))
    save(run / "training_args.bin", argparse.Namespace())
    (run / "runs").mkdir()
    done = posthoc_here("convert", "run", "out", "--json")
    assert done.code == 0
    for step in (500, 1000):
        assert_same(made(tmp_path, f"checkpoint-{step}"), weights(step))
    assert len(done.json["converted"]) == 2
    assert "beside the folders of steps" in skipped(done)["pytorch_model.bin"]
    assert posthoc_here("convert", "run", "out").code == 0  # all done already
    raw = posthoc_here("synthesize", "out", "--raw", "--sigma-rel", "0.2", "-o", "ema.safetensors")
    assert raw.code == 0, raw.err


def test_logs_and_random_states_among_checkpoints(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "run" / "net_500_6.94.pt", weights())
    save(tmp_path / "run" / "rngs_500.pt", {"cuda": torch.get_rng_state()})
    save(tmp_path / "run" / "opt500.pt", torch.optim.Adam([torch.ones(2)]).state_dict())
    (tmp_path / "run" / "losses.pkl").write_bytes(pickle.dumps([1.0, 2.0], 4))
    done = posthoc_here("convert", "run", "out", "--json")
    assert done.code == 0
    assert skipped(done) == {
        "losses.pkl": "holds no tensors",
        "opt500.pt": "an optimizer's state",
        "rngs_500.pt": "random states",
    }


def test_other_files_of_such_endings(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "run" / "net_500_6.94.pt", weights())
    (tmp_path / "run" / "vocab.bin").write_bytes(b"hello world" * 99)
    with tarfile.open(tmp_path / "run" / "images.tar", "w") as archive:
        archive.add(tmp_path / "run" / "vocab.bin", "a")
    done = posthoc_here("convert", "run", "out", "--json")
    assert done.code == 0
    assert skipped(done).keys() == {"vocab.bin", "images.tar"}
    (tmp_path / "run" / "pytorch_model.bin").write_bytes(bytes(999))  # a broken network is another
    assert posthoc_here("convert", "run", "out").code == 3


# Objects beside the weights


class Sampler(enum.Enum):
    EULER = 1


@dataclasses.dataclass
class Config:
    path: pathlib.PurePath
    inner: Any = None


class Holder(dict):  # type: ignore[type-arg]
    pass


OBJECTS: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=1e-3, out=pathlib.Path("a")),
    "paths": [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("C:/a")],
    "dataclass": Config(pathlib.PurePosixPath("a"), Config(pathlib.PurePosixPath("b"))),
    "enum": {Sampler.EULER: [Sampler.EULER]},
    "datetime": [datetime.datetime.now(), datetime.timedelta(1), datetime.timezone.utc],
    "numpy": [np.float64(2), np.arange(3), np.dtype("f4"), np.random.RandomState(0)],
    "random states": [np.random.default_rng(0), np.random.get_state()],
    "partial": functools.partial(print, 1),
    "functions": [print, torch.nn.functional.silu, np.mean],
    "torch": [torch.device("cuda", 1), torch.float16, torch.Size([1]), torch.strided],
    "deque": collections.deque([1, 2], maxlen=3),
    "a dict of a class": Holder(a=1),
    "a module": torch.nn.Linear(2, 2),
    "numbers": [1j, range(3), slice(1, 2), b"x", bytearray(b"y"), frozenset({1})],
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", OBJECTS)
def test_objects_beside_the_weights_do_not_matter(
    case: str, protocol: int, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    content = {"args": OBJECTS[case], "model": weights(), "epoch": 3}
    torch.save(content, tmp_path / "a_500_6.94.pt", pickle_protocol=protocol)
    done = posthoc_here("convert", "a_500_6.94.pt", "out")
    assert done.code == 0, done.err
    assert_same(made(tmp_path, "a_500_6.94"), weights())


def test_random_states_and_a_module_beside_the_weights(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    content = {"model": weights(), "rng": torch.get_rng_state(), "net": torch.nn.Linear(2, 2)}
    save(tmp_path / "a_500_6.94.pt", content)
    assert posthoc_here("convert", "a_500_6.94.pt", "out").code == 0
    save(tmp_path / "b_500_6.94.pt", {"model": torch.nn.Linear(2, 2), "ema": None})
    posthoc_here("convert", "b_500_6.94.pt", "out").failed(
        3, ".*needs 'torch.nn.modules.linear.Linear', which isn't data; .*"
    )


def test_a_state_dict_of_a_class_of_its_own(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "a_500_6.94.pt", Holder(weights()))
    assert posthoc_here("convert", "a_500_6.94.pt", "out").code == 0
    assert_same(made(tmp_path, "a_500_6.94"), weights())


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('ran', 'w')",)


def test_what_would_run_something_is_refused(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "run" / "a_500_6.94.pt", {"args": Runs(), "model": weights()})
    posthoc_here("convert", "run", "out").failed(3, ".*needs 'builtins.eval', which isn't data; .*")
    assert not (tmp_path / "ran").exists()


# Shards


def shards(folder: Path, value: float, *, index: bool = True) -> None:
    places = {}
    for number, (name, tensor) in enumerate(weights(value).items(), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        save(folder / file, {name: tensor})
        places[name] = file
    if index:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "pytorch_model.bin.index.json").write_text(text)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_network(index: bool, posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in (500, 1000):
        shards(tmp_path / "run" / f"checkpoint-{step}", step, index=index)
    done = posthoc_here("convert", "run", "out", "--json")
    assert (done.code, len(done.json["converted"]), skipped(done)) == (0, 2, {})
    assert done.json["converted"][0]["file"] == "checkpoint-1000/pytorch_model.bin"
    assert_same(made(tmp_path, "checkpoint-500"), weights(500))
    again = posthoc_here("convert", "run", "out", "--json")
    assert [one["skipped"] for one in again.json["converted"]] == [True, True]
    assert posthoc_here("convert", "run/checkpoint-500", "flat").code == 0
    assert_same(load_file(tmp_path / "flat" / "pytorch_model.safetensors"), weights(500))


def test_a_shard_that_is_missing(posthoc_here: Posthoc, tmp_path: Path) -> None:
    shards(tmp_path / "run" / "checkpoint-500", 1.0)
    (tmp_path / "run" / "checkpoint-500" / "pytorch_model-00002-of-00002.bin").unlink()
    posthoc_here("convert", "run", "out").failed(
        3, ".*pytorch_model-00002-of-00002.bin: missing: 1 of 2 shards are there; .*"
    )


# Several networks in a file, or in a folder


def test_timm_asks_which_of_its_two(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for epoch in (1, 2):
        content = {
            "epoch": epoch, "arch": "vit", "state_dict": weights(1), "version": 2,
            "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]},
            "args": argparse.Namespace(model="vit"), "state_dict_ema": weights(epoch + 1),
            "amp_scaler": {"scale": 1.0}, "metric": 1.0,
        }  # fmt: skip
        save(tmp_path / "run" / f"checkpoint-{epoch}.pth.tar", content)
    done = posthoc_here("convert", "run", "out")
    assert done.code == 3
    assert "--key state_dict (2 tensors, 36 B) or --key state_dict_ema (2 tensors, " in done.out
    assert posthoc_here("convert", "run", "out", "--key", "state_dict_ema").code == 0
    assert_same(made(tmp_path, "checkpoint-2"), weights(3))


def test_lightning_with_an_average(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Its WeightAveraging has the average in `state_dict`; other callbacks keep their own."""
    plain = {"state_dict": weights(), "global_step": 500, "callbacks": {}, "optimizer_states": []}
    averaging = {"current_model_state": weights(2), "averaging_state": {"n": torch.tensor(3)}}
    save(tmp_path / "plain.ckpt", plain)
    save(tmp_path / "averaging.ckpt", plain | averaging)
    save(tmp_path / "callback.ckpt", plain | {"callbacks": {"EMA": {"weights": weights(3)}}})
    assert posthoc_here("convert", "plain.ckpt", "out").code == 0
    posthoc_here("convert", "averaging.ckpt", "out").failed(
        3, r".*several dicts of tensors \(state_dict, current_model_state\); .*--key state_dict .*"
    )
    key = "callbacks.EMA.weights"
    posthoc_here("convert", "callback.ckpt", "out").failed(3, f".*--key {key} .*")
    assert posthoc_here("convert", "callback.ckpt", "out", "--key", key).code == 0
    assert_same(made(tmp_path, "callback"), weights(3))


@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_state_dict"])
def test_a_network_and_its_ema(name: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "a_500_6.94.pt", {"model": weights(), name: weights(2), "rng": torch.ones(9)})
    posthoc_here("convert", "a_500_6.94.pt", "out").failed(3, f".*--key {name} .*")
    assert posthoc_here("convert", "a_500_6.94.pt", "out", "--key", name).code == 0
    assert_same(made(tmp_path, "a_500_6.94"), weights(2))


def test_several_checkpoints_in_a_folder_of_a_step(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in (1, 2):
        for at, name in enumerate(("ema.pt", "net.pt")):
            save(tmp_path / "run" / f"step-{step}" / name, weights(10 * at + step))
    posthoc_here("convert", "run", "out").failed(
        3, r"run/step-1: holds 2 networks \('ema.pt', 'net.pt'\), .*--only '?\*/ema.pt.*"
    )
    assert posthoc_here("convert", "run", "out", "--only", "*/ema.pt").code == 0
    assert_same(made(tmp_path, "step-2"), weights(2))


@pytest.mark.parametrize("step", [True, False])
def test_the_last_one_once_more(step: bool, posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Lightning's last.ckpt, timm's model_best.pth.tar: of a step that has its own file."""
    for at, name in ((4, "epoch=0-step=4.ckpt"), (8, "epoch=0-step=8.ckpt"), (8, "last.ckpt")):
        said = {"global_step": at} if step else {}
        save(tmp_path / "run" / name, {"state_dict": weights(at), **said})
    done = posthoc_here("convert", "run", "out", "--json")
    assert (done.code, len(done.json["converted"])) == (0, 2)
    reason = "of step 8, as 'epoch=0-step=8.ckpt' is" if step else "nothing says its step, beside"
    assert skipped(done)["last.ckpt"].startswith(reason)
    assert "'epoch=0-step=4.ckpt' and 1 more file: nothing says its profile" in done.err
    assert posthoc_here("convert", "run/last.ckpt", "last").code == 0


# Lists without names


def shadow(value: float) -> dict[str, Any]:
    params = list(weights(value).values())
    return {"decay": 0.9999, "optimization_step": 500, "shadow_params": params}


@pytest.mark.parametrize("beside", ["model.safetensors", "pytorch_model.bin"])
def test_shadow_params_are_named_by_the_network_beside(
    beside: str, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoint-500"
    save(folder / "custom_checkpoint_0.pkl", shadow(3))
    if beside.endswith(".bin"):
        save(folder / beside, weights(2))
    else:
        save_file(weights(2), folder / beside)
    only = ("--only", "*/custom_checkpoint_0.pkl")
    done = posthoc_here("convert", "run", "out", *only, "--json")
    assert (done.code, done.json["converted"][0]["step"]) == (0, 500), done.err
    assert_same(made(tmp_path, "checkpoint-500"), weights(3))


def test_shadow_params_of_one_shape_are_told_by_their_values(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    """A safetensors file is sorted by name: its order isn't the network's."""
    torch.manual_seed(0)
    network = {name: torch.randn(4, 4) for name in ("blocks.9.w", "blocks.10.w", "blocks.2.w")}
    (tmp_path / "run").mkdir()
    save_file(network, tmp_path / "run" / "model.safetensors")
    near = [tensor + 0.01 for tensor in network.values()]
    save(tmp_path / "run" / "ema.pt", {"shadow_params": near})
    assert posthoc_here("convert", "run", "out").code == 0
    assert_same(made(tmp_path, "ema"), dict(zip(network, near, strict=True)))
    save(tmp_path / "run" / "ema.pt", {"shadow_params": [torch.zeros(4, 4)] * 3})
    line = ".*without names, and no file beside it .*"
    posthoc_here("convert", "run/ema.pt", "other").failed(3, line)


def test_shadow_params_in_the_file_of_the_network(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "a_500_6.94.pth", {"model": weights(), "ema": shadow(2), "step": 500})
    posthoc_here("convert", "a_500_6.94.pth", "out").failed(3, ".*--key model or --key ema")
    assert posthoc_here("convert", "a_500_6.94.pth", "out", "--key", "ema").code == 0
    assert_same(made(tmp_path, "a_500_6.94"), weights(2))


# Files that are no network, or not all of one


def test_zero_3_keeps_no_values(posthoc_here: Posthoc, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "global_step500"
    module = {"conv.weight": torch.zeros(0), "norm.weight": torch.ones(3), "b": torch.zeros(0)}
    for rank in (0, 1):
        save(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", {
            "module": module, "ds_version": "0.15", "param_shapes": [{"b": torch.Size([3])}],
        })  # fmt: skip
        save(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"x": torch.ones(2)})
    line = ".*2 of its 3 tensors hold no values, as DeepSpeed's ZeRO-3 .*zero_to_fp32.py.*"
    parts = ".*a checkpoint of DeepSpeed's ZeRO-3, in 2 parts.*zero_to_fp32.py.*"
    posthoc_here("convert", "run", "out", "-q").failed(3, parts)
    file = "run/global_step500/zero_pp_rank_1_mp_rank_00_model_states.pt"
    posthoc_here("convert", file, "out").failed(3, line)
    assert not (tmp_path / "out").exists()


def test_zero_2_is_read(posthoc_here: Posthoc, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "global_step500"
    save(folder / "mp_rank_00_model_states.pt", {"module": weights(), "ds_version": "0.15"})
    save(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"x": torch.ones(2)})
    assert posthoc_here("convert", "run", "out").code == 0
    assert_same(made(tmp_path, "global_step500"), weights())


@pytest.mark.parametrize("layout", ["nitrous-ema", "ema-pytorch", "a trainer's"])
def test_what_looks_like_a_librarys_asks_for_it(
    layout: str, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    state: dict[str, Any] = {f"ema_model.{name}": tensor for name, tensor in weights(2).items()}
    if layout == "nitrous-ema":
        state["_extra_state"] = {"initted": True, "step": 1000}
    else:
        state |= {f"online_model.{name}": tensor for name, tensor in weights().items()}
        state |= {"initted": torch.tensor(True), "step": torch.tensor(1000)}
    key = () if layout != "a trainer's" else ("--key", "ema")
    content = state if not key else {"ema": state, "model": weights(), "step": 1000}
    save(tmp_path / "run" / "0.1000.pt", content)
    words = ("convert", "run", "out", "--profiles", "0.05,0.10", *key)
    posthoc_here(*words).failed(3, ".*looks like a checkpoint of ema-pytorch, but .*--from .*")
    assert posthoc_here(*words, "--from", "ema-pytorch").code == 0
    assert_same(made(tmp_path, "0.1000"), weights(2))


# What is done, and options that are not used


def test_other_options_are_not_done_already(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "run" / "0.1000.pt", weights())
    assert posthoc_here("convert", "run", "out").code == 0
    line = r".*exists already, .*\(it was made {}\); use --force .*"
    posthoc_here("convert", "run", "out", "--profiles", "0.05").failed(
        2, line.format("without --profiles")
    )
    posthoc_here("convert", "run", "out", "--key", ".").failed(2, line.format("without --key"))
    assert posthoc_here("convert", "run", "out", "--profiles", "0.05", "--force").code == 0
    posthoc_here("convert", "run", "out", "--profiles", "0.1").failed(
        2, line.format("with --profiles 0.05")
    )


def test_options_that_are_not_used_are_said(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "a_500_6.94.pt", weights())
    done = posthoc_here(
        "convert", "a_500_6.94.pt", "out", "--profiles", "0.05", "--update-every", "10"
    )
    assert done.code == 0
    assert [line.split(": ")[2] for line in done.err.splitlines()] == [
        "--update-every isn't used", "--profiles isn't used",
    ]  # fmt: skip


def test_exclude(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save(tmp_path / "run" / "a_500_6.94.pt", weights())
    save(tmp_path / "run" / "broken_500_6.94.pt", {"a": 1})
    assert posthoc_here("convert", "run", "out", "--exclude", "broken*").code == 0
    posthoc_here("convert", "run", "out", "--exclude", "c*").failed(2, "--exclude: 'c.*' fits .*")
