"""Checkpoints as trainers leave them: beside DeepSpeed's state, cut short, read by themselves."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import posthoc_cli
from tests.command import Posthoc, write_snapshot

STEPS = (10, 20, 30)


def save_deepspeed(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    state = {"module": {"w": torch.full((4,), step / 10).bfloat16()}, "ds_version": "0.14"}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    ranks = {"optimizer_state_dict": {"w": torch.zeros(3)}}
    torch.save(ranks, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("beside", [True, False])
def test_the_state_of_deepspeed_in_a_step_folder(beside: bool, tmp_path: Path) -> None:
    """As Trainer saves it: a copy of the network, of another dtype perhaps."""
    for step in STEPS:
        folder = tmp_path / f"checkpoint-{step}"
        save_deepspeed(folder / f"global_step{step}", step)
        if beside:
            write_snapshot(folder / "model.safetensors", step / 10)
    run = posthoc_cli.open_snapshots(tmp_path, raw=True)
    assert run.problems == []
    assert [each.step for each in run.snapshots] == list(STEPS)
    where = "checkpoint-10" if beside else "checkpoint-10/global_step10"
    assert run.snapshots[0].file == where
    assert len(run.skipped) == (3 if beside else 0)


SAVERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "pickle": lambda state, path: path.write_bytes(pickle.dumps(state)),
}


@pytest.mark.parametrize("form", SAVERS)
def test_what_is_still_being_written_is_incomplete(form: str, tmp_path: Path) -> None:
    state = {"w": torch.ones(40), "b": torch.ones(3)}
    for step in (10, 20):
        SAVERS[form](state, tmp_path / f"model_{step}.pt")
    whole = (tmp_path / "model_20.pt").read_bytes()
    for part in (b"", *(whole[:end] for end in range(20, len(whole), 41)), bytes(len(whole))):
        (tmp_path / "model_30.pt").write_bytes(part)
        run = posthoc_cli.open_snapshots(tmp_path, raw=True, skip_incomplete=True)
        assert run.problems == []
        ((name, reason),) = run.skipped
        assert name == "model_30.pt"
        assert reason.startswith("incomplete: ")


def test_inspect_of_one_checkpoint(posthoc_here: Posthoc, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "model_10.pt")
    done = posthoc_here("inspect", "model_10.pt")
    assert done.code == 3
    assert "nothing says its profile; add --raw if it is a plain checkpoint" in done.out


def test_an_average_in_the_networks_own_dict_is_told(tmp_path: Path) -> None:
    """As latent-diffusion keeps it: one of the two isn't of the profile that is asked for."""
    for step in STEPS:
        network = {f"model.diffusion_model.{at}": torch.rand(3) for at in "ab"}
        ema = {f"model_ema.diffusion_model{at}": torch.rand(3) for at in "ab"}
        state = {"state_dict": network | ema, "global_step": step}
        torch.save(state, tmp_path / f"epoch={step // 10:06}.ckpt")
    ((_, text),) = posthoc_cli.open_snapshots(tmp_path, raw=True).warnings
    assert text.startswith("'model_ema.diffusion_modela' and 1 more: an EMA that training kept")
    assert "drop='model_ema.*'" in text
    assert not posthoc_cli.open_snapshots(tmp_path, raw=True, drop=["model_ema.*"]).warnings


def test_folders_that_libraries_would_not_load_right(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Names of a wrapped network, of which from_pretrained makes a new one; a LoRA in shards."""
    for step in STEPS:
        for run, file, name in (
            ("ddp", "pytorch_model.bin", "module.w"),
            ("lora", "adapter_model.bin", "base_model.model.q.lora_A.weight"),
        ):
            folder = tmp_path / run / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            torch.save({name: torch.rand(4, 9), f"{name}2": torch.rand(4, 9)}, folder / file)
    how = ("--raw", "--sigma-rel", "0.2", "--layout", "folder", "-o")
    done = posthoc_here("synthesize", "ddp", *how, "out")
    assert done.code == 0
    assert "named as they were wrapped in training ('module.')" in done.err
    done = posthoc_here("synthesize", "lora", *how, "lora-out", "--max-shard-size", "200B")
    assert done.code == 2
    assert "--max-shard-size: 'adapter_model.safetensors' would be in shards" in done.err
    assert not (tmp_path / "lora-out").exists()


def test_a_part_of_a_network_is_not_taken_for_all_of_it(tmp_path: Path) -> None:
    for step in (10, 20):
        network = {"w": torch.rand(3), "sub": {"b": torch.rand(5)}, "optimizer": {}}
        torch.save({"model": network, "step": step}, tmp_path / f"model_{step}.pt")
    run = posthoc_cli.open_snapshots(tmp_path, raw=True)
    assert "has tensors at 'model', and more below it ('sub'), as no" in run.problems[0][1]
    run = posthoc_cli.open_snapshots(tmp_path, raw=True, key="model")
    assert not run.problems
    assert [list(each.index.tensors) for each in run.snapshots] == [["w"], ["w"]]


def net(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}w": torch.full((4, 3), value), f"{prefix}b": torch.full((3,), value)}


def adam() -> dict[str, Any]:
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.rand(4, 3), "exp_avg_sq": torch.ones(3)}
    return {"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}


OTHER = {"k": torch.rand(5, 2), "v": torch.rand(7)}
SEVERAL: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a decoder one deeper": (
        {"encoder": net(1), "decoder": {"sub": OTHER}},
        ("encoder", "decoder.sub"),
    ),
    "a part of a model": ({"model": net(1), "vae": {"decoder": OTHER}}, ("model", "vae.decoder")),
    "two of a GAN": ({"generator": net(1), "discriminator": OTHER}, ("generator", "discriminator")),
    "a GAN's EMA": ({"g": net(1), "g_ema": net(2), "g_optim": adam()}, ("g", "g_ema")),
    "two EMAs": (
        {"model": net(1), "ema": {"0.999": net(2), "0.9999": net(3)}},
        ("model", "ema.0.999", "ema.0.9999"),
    ),
    "a copy": ({"state_dict": net(1), "ema": {"module": net(2)}}, ("state_dict", "ema.module")),
    "of a callback": (
        {"state_dict": net(1), "callbacks": {"EMA": {"ema_weights": net(2)}}},
        ("state_dict", "callbacks.EMA.ema_weights"),
    ),
    "an AveragedModel": (
        {"model": net(1), "swa": {"n_averaged": torch.tensor(3), **net(2, "module.")}},
        ("model", "swa"),
    ),
    "a teacher": ({"student": net(1), "teacher": net(2)}, ("student", "teacher")),
}
"""What a checkpoint holds, and the keys that there are to choose from."""

LISTS: dict[str, dict[str, Any]] = {
    "ema": {"model": net(1), "ema": list(net(2).values())},
    "ema.ema_params": {"model": net(1), "ema": {"ema_params": list(net(2).values())}},
    "callbacks.E.weights": {"model": net(1), "callbacks": {"E": {"weights": [*net(2).values()]}}},
}
ONE: dict[str, dict[str, Any]] = {
    "an optimizer by any name": {"net": net(1), "adam": adam(), "d_optim": adam()},
    "epochs": {"epoch": 3, "loss": torch.tensor(0.5), "model_state_dict": net(1)},
    "scores": {"state_dict": net(1), "callbacks": {"best": {"x.ckpt": torch.tensor(0.3)}}},
    "random states": {"model": net(1), "rng": {"cuda": [torch.get_rng_state()]}},
    "statistics": {"model": {"w": torch.rand(40, 40)}, "data": {"of": {"mean": torch.rand(3)}}},
    "other lists": {"model": net(1), "history": [torch.rand(2), torch.rand(2)]},
}


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_networks_none_is_chosen(case: str, tmp_path: Path) -> None:
    state, keys = SEVERAL[case]
    for step in STEPS:
        torch.save(state, tmp_path / f"model_{step}.pt")
    run = posthoc_cli.open_snapshots(tmp_path, raw=True)
    assert [name for name, _ in run.problems] == ["model_10.pt"]
    for key in keys:
        assert f"key='{key}'" in run.problems[0][1]
        chosen = posthoc_cli.open_snapshots(tmp_path, raw=True, key=key)
        assert chosen.problems == []
        assert len(chosen.snapshots) == len(STEPS)


@pytest.mark.parametrize("place", LISTS)
def test_an_average_without_names_is_told(place: str, tmp_path: Path) -> None:
    for step in STEPS:
        torch.save(LISTS[place], tmp_path / f"model_{step}.pt")
    for how in ({"raw": True}, {"ema_decay": 0.5}):
        ((_, problem),) = posthoc_cli.open_snapshots(tmp_path, **how).problems
        assert f"a list of tensors without names ({place})" in problem
        assert posthoc_cli.open_snapshots(tmp_path, **how, key="model").problems == []


@pytest.mark.parametrize("case", ONE)
def test_what_is_no_network_leaves_no_choice(case: str, tmp_path: Path) -> None:
    for step in STEPS:
        torch.save(ONE[case], tmp_path / f"model_{step}.pt")
    run = posthoc_cli.open_snapshots(tmp_path, raw=True)
    assert run.problems == []
    assert "w" in run.snapshots[0].index.tensors


def test_convert_of_what_is_no_checkpoint_of_torch_distributed(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    (tmp_path / "run" / "step-10").mkdir(parents=True)
    (tmp_path / "run" / "step-10" / ".metadata").write_bytes(b"")
    posthoc_here("convert", "run", "out").failed(
        3, r"run/step-10/.metadata: not a whole checkpoint \(it ends too early\); .*"
    )
