"""Run folders as training scripts leave them, for `convert`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint

from tests.command import Posthoc
from tests.packing import averages, rebuilt
from tests.packing import write as write_packed


def test_a_loss_beside_the_network_is_no_network(posthoc_here: Posthoc, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for epoch in (1, 2, 3):
        network = {"weight": torch.full((2, 2), float(epoch)), "bias": torch.zeros(2)}
        saved = {"epoch": epoch, "model_state_dict": network, "loss": torch.tensor(0.3)}
        torch.save(saved, run / f"checkpoint_epoch_{epoch}.pth")
    done = posthoc_here("convert", "run", "out")
    assert done.code == 0, done.err
    made = load_file(tmp_path / "out" / "checkpoint_epoch_2.safetensors")
    assert set(made) == {"weight", "bias"}
    assert (made["weight"] == 2).all()


def test_a_state_beside_its_checkpoint(posthoc_here: Posthoc, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for epoch in (1, 2):
        state = run / f"lora-00000{epoch}-state"
        state.mkdir(parents=True)
        network = {"up": torch.full((2, 2), float(epoch))}
        torch.save({"state_dict": network}, run / f"lora-00000{epoch}.ckpt")
        torch.save(network, state / "pytorch_model.bin")
    done = posthoc_here("convert", "run", "out")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lora-000001.safetensors",
        "lora-000002.safetensors",
    ]
    assert "lora-000002-state: the training state beside 'lora-000002.ckpt'" in done.out


def test_states_alone_are_taken(posthoc_here: Posthoc, tmp_path: Path) -> None:
    state = tmp_path / "run" / "lora-000001-state"
    state.mkdir(parents=True)
    torch.save({"up": torch.ones(2)}, state / "pytorch_model.bin")
    assert posthoc_here("convert", "run", "out").code == 0


def test_networks_one_folder_deeper(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in (500, 1000):
        folder = tmp_path / "run" / f"checkpoint-{step}" / "unet"
        folder.mkdir(parents=True)
        torch.save({"up": torch.full((2,), step)}, folder / "diffusion_pytorch_model.bin")
    torch.save({"up": torch.ones(2)}, tmp_path / "run" / "last.pt")
    done = posthoc_here("convert", "run", "out", "--json")
    assert done.code == 0
    names = [f"checkpoint-{step}/unet/diffusion_pytorch_model.bin" for step in (1000, 500)]
    assert [one["file"] for one in done.json["converted"]] == names
    assert [one["file"] for one in done.json["skipped"]] == ["last.pt"]
    made = load_file(tmp_path / "out" / "checkpoint-500.safetensors")
    assert made["up"].tolist() == [500, 500]
    vae = tmp_path / "run" / "checkpoint-500" / "vae" / "diffusion_pytorch_model.bin"
    vae.parent.mkdir()
    torch.save({"up": torch.ones(2)}, vae)
    line = r"run/checkpoint-500: holds 2 networks \('unet', 'vae'\); .*--only '\*/unet' or .*"
    posthoc_here("convert", "run", "out").failed(3, line)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>log in</html>", "an HTML page"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"", "it is empty"),
        (bytes(5000), "it is all zeros"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(
    content: bytes, words: str, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"up": torch.ones(2)}, run / "net_100.pt")
    (run / "net_200.pt").write_bytes(content)
    done = posthoc_here("convert", "run", "out")
    assert done.code == 3
    assert words in done.out + done.err


# What is no checkpoint of torch, but is read by every command


def network(value: float) -> dict[str, torch.Tensor]:
    return {"up": torch.full((3, 2), value), "down": torch.full((2,), -value)}


def distributed(folder: Path, step: int) -> None:
    with pytest.warns(UserWarning, match="no_dist|single process"):
        checkpoint.save({"model": network(step)}, checkpoint_id=folder, no_dist=True)


def shards(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    places = {}
    for number, (name, tensor) in enumerate(network(step).items(), 1):
        places[name] = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensor}, folder / places[name], {"note": "kept"})
    index = {"metadata": {"total_size": 32}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_config(folder: Path, step: int) -> None:
    """As diffusers' EMAModel saves an average: the schedule is in its config.json."""
    folder = folder / "unet_ema"
    folder.mkdir(parents=True)
    torch.save(network(step), folder / "diffusion_pytorch_model.bin")
    config = {"decay": 0.999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    (folder / "config.json").write_text(json.dumps(config | {"optimization_step": step}))


def tensors(path: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("write", [distributed, shards, with_config])
def test_step_folders_of_other_formats(
    write: Callable[[Path, int], None],
    posthoc_here: Posthoc,
    tmp_path: Path,
    check_json: Callable[[str, Any], None],
) -> None:
    for step in (500, 1000):
        write(tmp_path / "run" / f"checkpoint-{step}", step)
    done = posthoc_here("convert", "run", "out", "--json")
    assert done.code == 0, done
    check_json("convert", done.json)
    assert (len(done.json["converted"]), done.json["skipped"]) == (2, [])
    for step in (500, 1000):
        made = tensors(tmp_path / "out" / f"checkpoint-{step}.safetensors")
        assert made == {name: tensor.tolist() for name, tensor in network(step).items()}
    again = posthoc_here("convert", "run", "out", "--json")
    assert [one["skipped"] for one in again.json["converted"]] == [True, True]

    def profiles(folder: str) -> list[Any]:
        run = posthoc_here("inspect", folder, "--raw", "--json")
        assert (run.code, run.json["problems"]) == (0, []), run
        return [(each["step"], each["profile"]) for each in run.json["snapshots"]]

    assert profiles("out") == profiles("run")
    alone = {
        distributed: "run/checkpoint-500",
        shards: "run/checkpoint-500/model.safetensors.index.json",
        with_config: "run/checkpoint-500/unet_ema/diffusion_pytorch_model.bin",
    }
    assert posthoc_here("convert", alone[write], "alone").code == 0
    (one,) = (tmp_path / "alone").iterdir()
    assert tensors(one) == tensors(tmp_path / "out" / "checkpoint-500.safetensors")


def test_a_broken_one_among_other_formats(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in (500, 1000):
        shards(tmp_path / "run" / f"checkpoint-{step}", step)
    distributed(tmp_path / "run" / "checkpoint-1500", 1500)
    (tmp_path / "run" / "checkpoint-500" / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-1500" / ".metadata").write_bytes(b"x" * 99)
    done = posthoc_here("convert", "run", "out", "--json")
    assert done.code == 3
    assert len(done.json["converted"]) == 1
    assert [one["file"] for one in done.json["problems"]] == [
        "checkpoint-1500",
        "checkpoint-500/model.safetensors",
    ]
    assert "its shard 'model-00002-of-00002.safetensors' is missing" in done.out
    skipped = posthoc_here("convert", "run", "out", "--skip-incomplete", "--json")
    assert "checkpoint-500/model.safetensors" in {one["file"] for one in skipped.json["skipped"]}


def test_differences_whose_base_is_gone(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write_packed(tmp_path / "run", averages())
    assert posthoc_here("pack", "run", "packed", "-q").code == 0
    packed = sorted((tmp_path / "packed").iterdir())
    shutil.copytree(tmp_path / "packed", tmp_path / "some")
    whole = packed[0].name
    (tmp_path / "some" / whole).unlink()
    done = posthoc_here("convert", "some", "out", "--json")
    assert done.code == 3
    assert len(done.json["problems"]) + len(done.json["converted"]) == len(packed) - 1
    assert whole in done.json["problems"][0]["message"]
    for one in done.json["converted"]:
        found = load_file(tmp_path / one["output"])
        wanted = rebuilt(tmp_path / "packed" / one["file"])
        assert all(abs(found[name].numpy() - wanted[name]).max() < 1e-3 for name in wanted)


# What is given by itself


def test_a_file_that_is_no_checkpoint(posthoc_here: Posthoc, tmp_path: Path) -> None:
    save_file(network(1), tmp_path / "a_500_6.94.safetensors")
    (tmp_path / "log.txt").write_text("x")
    posthoc_here("convert", "a_500_6.94.safetensors", "out").failed(
        3, "a_500_6.94.safetensors: is a .safetensors file, which can be used as it is; .*"
    )
    posthoc_here("convert", "log.txt", "out").failed(
        3, "log.txt: is not a checkpoint, by its ending; give one that ends in .pt, .*"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_500_6.94.safetensors", "log.txt"]


@pytest.mark.parametrize("words", [(), ("--raw",), ("--ema-decay", "0.99")])
def test_what_is_said_of_all(words: tuple[str, ...], posthoc_here: Posthoc, tmp_path: Path) -> None:
    """As every command takes it: the snapshots say so themselves then."""
    (tmp_path / "run").mkdir()
    for step in (500, 1000):
        saved = {"state_dict": network(step), "global_step": step}
        torch.save(saved, tmp_path / "run" / f"epoch={step // 500}-step={step}.ckpt")
    torch.save(saved, tmp_path / "run" / "last.ckpt")
    done = posthoc_here("convert", "run", "out", *words, "--json")
    assert done.code == 0, done
    assert [one["file"] for one in done.json["skipped"]] == ["last.ckpt"]
    assert ("only good for --raw" in done.err) == (not words)
    run = posthoc_here("inspect", "out", "--json", *(["--raw"] if not words else []))
    assert run.code == 0, run
    betas = {each["profile"].get("beta", 0.0) for each in run.json["snapshots"]}
    assert betas == {0.99 if "--ema-decay" in words else 0.0}
    other = posthoc_here("convert", "run", "out", "--ema-decay", "0.9")
    other.failed(2, ".*exists already, and is not what this makes of .*--force .*")


def test_shards_are_not_replaced_by_their_copy(posthoc_here: Posthoc, tmp_path: Path) -> None:
    shards(tmp_path / "run", 500)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for more in ((), ("--force",)):
        posthoc_here("convert", "run", "run", *more).failed(
            2, "run/model.safetensors.index.json: is one of the checkpoints; .*"
        )
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    shards(tmp_path / "out", 1000)
    posthoc_here("convert", "run", "out").failed(
        2, "out/model.safetensors.index.json: exists already, and is not .*; use --force .*"
    )
    assert posthoc_here("convert", "run", "out", "--force").code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
