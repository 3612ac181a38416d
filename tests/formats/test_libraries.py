"""Files that the libraries themselves wrote, read where they lie.

The tensors are the networks' own to the bit. The libraries take long to import: each is imported by
one test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import posthoc_cli
from posthoc_cli.storage import Reader

State = dict[str, torch.Tensor]
STEPS = (2, 4)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 5)
        self.outer = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False), torch.nn.BatchNorm1d(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.outer(self.inner(x))
        return found


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()


def kept(model: torch.nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


def assert_read(tmp_path: Path, folder: str, wanted: dict[int, State], **how: Any) -> None:
    """That a folder's snapshots are `wanted`, by step, to the bit, and can be averaged."""
    run = posthoc_cli.open_snapshots(tmp_path / folder, raw=True, **how)
    assert [each.step for each in run.snapshots] == list(wanted), (run.problems, run.skipped)
    for each in run.snapshots:
        state = wanted[each.step]
        assert each.index.tensors.keys() == state.keys()
        with Reader(each.index) as reader:
            for name, info in each.index.tensors.items():
                data = bytearray(info.end - info.start)
                reader.read(info.start, memoryview(data))
                assert data == state[name].detach().contiguous().numpy().tobytes(), name
    (path,) = run.solve(sigma_rel=0.2).save(tmp_path / "out.safetensors", force=True)
    assert posthoc_cli.verify(path, tmp_path / folder, full=True).problems == []


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore")
def test_lightning_and_its_averages(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = Small()

        def training_step(self, batch: Any, at: int) -> torch.Tensor:
            return self.network(batch).square().sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            EMAWeightAveraging(decay=0.5),
            ModelCheckpoint(tmp_path / "run", every_n_train_steps=2, save_top_k=-1, save_last=True),
        ],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8))
    averages, networks = {}, {}
    for step in STEPS:
        path = next((tmp_path / "run").glob(f"*step={step}.ckpt"))
        saved = torch.load(path, weights_only=True)
        averages[step], networks[step] = saved["state_dict"], saved["current_model_state"]
    run = posthoc_cli.open_snapshots(tmp_path / "run", raw=True)
    ((_, problem),) = run.problems
    assert "as 2 more do; choose one with key='state_dict' (the average: 8 tensors" in problem
    assert_read(tmp_path, "run", averages, key="state_dict")
    assert_read(tmp_path, "run", networks, key="current_model_state")


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_and_the_ema_of_diffusers(safe: bool, tmp_path: Path) -> None:
    """The list of averages without names is told by the network's file beside it."""
    accelerate = pytest.importorskip("accelerate")
    training = pytest.importorskip("diffusers.training_utils")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    average = training.EMAModel(model.parameters(), decay=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(average)
    networks, averages = {}, {}
    names = [name for name, _ in model.named_parameters()]
    for step in range(1, 5):
        train(model, optimizer)
        average.step(model.parameters())
        if step in STEPS:
            accelerator.save_state(tmp_path / "run" / f"checkpoint-{step}", safe_serialization=safe)
            networks[step] = kept(model)
            shadow = [each.clone() for each in average.shadow_params]
            averages[step] = dict(zip(names, shadow, strict=True))
    assert_read(tmp_path, "run", networks)
    assert_read(tmp_path, "run", averages, only=["*/custom_checkpoint_0.pkl"])


def test_the_average_of_torch_itself(tmp_path: Path) -> None:
    """AveragedModel's state dict, saved beside the network's as scripts do."""
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    wanted = {}
    for step in range(1, 5):
        train(model, optimizer)
        average.update_parameters(model)
        if step in STEPS:
            state = {"model": model.state_dict(), "ema": average.state_dict(), "step": step}
            (tmp_path / "run").mkdir(exist_ok=True)
            torch.save(
                {**state, "optimizer": optimizer.state_dict()}, tmp_path / "run" / f"{step}.pt"
            )
            wanted[step] = kept(average)
    assert_read(tmp_path, "run", wanted, key="ema")


SAVERS: dict[str, Callable[[State, Path], None]] = {
    "torch": lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
    "diffusers": lambda state, folder: torch.save(state, folder / "diffusion_pytorch_model.bin"),
    "peft": lambda state, folder: torch.save(state, folder / "adapter_model.bin"),
}


@pytest.mark.parametrize("library", SAVERS)
def test_step_folders_as_trainers_leave_them(library: str, tmp_path: Path) -> None:
    wanted = {}
    model = Small()
    optimizer = torch.optim.Adam(model.parameters())
    for step in STEPS:
        train(model, optimizer)
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        SAVERS[library](model.state_dict(), folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        torch.save({"python": (3, (1, 2)), "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
        torch.save({"last_epoch": 1}, folder / "scheduler.pt")
        (folder / "config.json").write_text("{}")
        wanted[step] = kept(model)
    assert_read(tmp_path, "run", wanted)
