"""Run folders as training scripts leave them, for `convert`."""

from __future__ import annotations

from pathlib import Path

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
    assert done.code == 0, done.stderr
    made = load_file(tmp_path / "out" / "checkpoint_epoch_2.safetensors")
    assert set(made) == {"weight", "bias"}
    assert (made["weight"] == 2).all()
