"""Run folders as training scripts leave them, for `convert`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import Posthoc


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
    assert "lora-000002-state: a state of training, to go on from" in done.out.replace("\n", " ")


def test_states_alone_are_taken(posthoc_here: Posthoc, tmp_path: Path) -> None:
    state = tmp_path / "run" / "lora-000001-state"
    state.mkdir(parents=True)
    torch.save({"up": torch.ones(2)}, state / "pytorch_model.bin")
    assert posthoc_here("convert", "run", "out").code == 0


def test_networks_one_folder_deeper_are_named(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step in (500, 1000):
        folder = tmp_path / "run" / f"checkpoint-{step}" / "unet"
        folder.mkdir(parents=True)
        torch.save({"up": torch.ones(2)}, folder / "diffusion_pytorch_model.bin")
    torch.save({"up": torch.ones(2)}, tmp_path / "run" / "last.pt")
    done = posthoc_here("convert", "run", "out")
    assert done.code == 0
    assert "a folder with checkpoints in 'unet'" in done.out + done.err


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
