"""posthoc_cli.adapters, against the real libraries where they are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from posthoc_cli.errors import UsageError
from posthoc_cli.snapshots.folder import read_folder


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=generator)} for _ in range(32)]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def steps(folder: Path) -> set[int]:
    return {each.step for each in read_folder(folder).usable()}


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_the_documented_imports_work(library: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    assert f"\nfrom posthoc_cli.adapters.{library} import PostHocEMACallback\n" in text
    spec = importlib.util.find_spec(f"posthoc_cli.adapters.{library}")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).parts[-3:] == ("training", "adapters", f"{library}.py")
    pytest.importorskip("lightning.pytorch" if library == "lightning" else library)
    module = importlib.import_module(spec.name)
    assert module.PostHocEMACallback((0.05, 0.10)).ema is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_a_chain_of_differences_is_resumed_to_the_bit(library: str, tmp_path: Path) -> None:
    """In its folder, where what came after the state is set aside, with what it builds on."""
    pytest.importorskip("lightning.pytorch" if library == "lightning" else library)
    adapter = importlib.import_module(f"posthoc_cli.training.adapters.{library}")
    options: dict[str, Any] = {"store": "delta", "keyframe_every": 2, "later": "set aside"}

    def fit(**resumed: Any) -> dict[str, bytes]:
        callback = adapter.PostHocEMACallback(
            (0.05, 0.1), folder=tmp_path / "run", checkpoint_every=4, **options
        )
        if library == "lightning":
            lightning_fit(tmp_path, callback, 12, **resumed)
        else:
            trainer(tmp_path, callback).train(**resumed)
        return folder_bytes(tmp_path / "run")

    whole = fit()
    assert {len(each.chain) for each in read_folder(tmp_path / "run").usable()} == {0, 2, 4}
    if library == "lightning":
        (checkpoint,) = (tmp_path / "checkpoints").glob("*step=6*")
        assert fit(ckpt_path=checkpoint) == whole
    else:
        assert fit(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6")) == whole
    (aside,) = (tmp_path / "run" / "other-runs").iterdir()
    assert folder_bytes(aside) == whole


# Lightning


def lightning_module() -> Any:
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(4, 2)
            self.other = nn.Linear(2, 1)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss: torch.Tensor = self.other(self.net(batch["x"])).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            # Every batch the same: resumed within an epoch, Lightning begins it anew.
            return torch.utils.data.DataLoader(data()[:2] * 16, batch_size=2)

    return Module()


def lightning_fit(root: Path, callback: Any, max_steps: int, **fit: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch")
    trainer = pl.Trainer(
        default_root_dir=root,
        max_steps=max_steps,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            callback,
            pl.callbacks.ModelCheckpoint(
                root / "checkpoints", every_n_train_steps=6, save_top_k=-1
            ),
        ],
    )
    module = lightning_module()
    trainer.fit(module, **fit)
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_optimizer_steps_and_resumes_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from posthoc_cli.training.adapters.lightning import PostHocEMACallback

    options: dict[str, Any] = {"checkpoint_every": 4, "dtype": torch.float32}
    whole = PostHocEMACallback((0.05, 0.1), folder=tmp_path / "whole", **options)
    lightning_fit(tmp_path, whole, 12)
    assert steps(tmp_path / "whole") == {4, 8, 12}
    lightning_module().load_state_dict(
        load_file(tmp_path / "whole" / "ema-step00000012-0.100.safetensors"), strict=True
    )
    (checkpoint,) = (tmp_path / "checkpoints").glob("*step=6*")
    resumed = PostHocEMACallback((0.05, 0.1), folder=tmp_path / "resumed", **options)
    lightning_fit(tmp_path, resumed, 12, ckpt_path=checkpoint)
    expected, found = folder_bytes(tmp_path / "whole"), folder_bytes(tmp_path / "resumed")
    assert found == {name: data for name, data in expected.items() if "step00000004" not in name}


@pytest.mark.filterwarnings("ignore")
def test_lightning_tracks_a_part_of_the_module(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from posthoc_cli.training.adapters.lightning import PostHocEMACallback

    callback = PostHocEMACallback(
        module="net", folder=tmp_path / "part", checkpoint_every=3, background=True
    )
    lightning_fit(tmp_path, callback, 3)
    assert set(read_folder(tmp_path / "part").usable()[0].index.tensors) == {"weight", "bias"}


# Hugging Face transformers


class Scored(nn.Module):
    """What the Trainer wants of a model: a loss in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(x).square().mean()}


def trainer(root: Path, callback: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=root / "out",
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=6,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return transformers.Trainer(Scored(), arguments, train_dataset=data(), callbacks=[callback])


@pytest.mark.filterwarnings("ignore")
def test_transformers_counts_optimizer_steps_and_resumes_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from posthoc_cli.training.adapters.transformers import STATE, PostHocEMACallback

    options: dict[str, Any] = {"checkpoint_every": 4, "dtype": torch.float32}
    whole = PostHocEMACallback((0.05, 0.1), folder=tmp_path / "whole", **options)
    trainer(tmp_path, whole).train()
    assert steps(tmp_path / "whole") == {4, 8, 12}
    Scored().load_state_dict(
        load_file(tmp_path / "whole" / "ema-step00000012-0.100.safetensors"), strict=True
    )
    checkpoint = tmp_path / "out" / "checkpoint-6"
    resumed = PostHocEMACallback((0.05, 0.1), folder=tmp_path / "resumed", **options)
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(checkpoint))
    expected, found = folder_bytes(tmp_path / "whole"), folder_bytes(tmp_path / "resumed")
    assert found == {name: data for name, data in expected.items() if "step00000004" not in name}

    (checkpoint / STATE).unlink()
    late = PostHocEMACallback((0.05, 0.1), folder=tmp_path / "late", **options)
    with pytest.raises(UsageError, match="resumes at step 6"):
        trainer(tmp_path, late).train(resume_from_checkpoint=str(checkpoint))
