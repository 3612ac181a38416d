"""What lies beside a network: what goes into a folder with its average, and what doesn't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats.companions import Companions, companions, in_shards


def write(folder: Path, *names: str, **contents: object) -> None:
    for name in (*names, *contents):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(contents[name]) if name in contents else name
        path.write_text(content, encoding="utf-8")


def beside(run: Path, *networks: str) -> Companions:
    """What lies beside the last of the networks."""
    paths = [[run / name] for name in networks]
    return companions(paths[-1], run, paths[:-1])


def of(found: Companions) -> tuple[str, list[str]]:
    return found.weights, sorted(found.copied)


STATE = (
    *("optimizer.pt", "optimizer.bin", "optimizer_1.bin", "scheduler.pt", "scheduler.bin"),
    *("rng_state.pth", "rng_state_3.pth", "random_states_0.pkl", "scaler.pt", "sampler.bin"),
    *("trainer_state.json", "training_args.bin", "training_state.json", "latest", "train.log"),
    *("zero_to_fp32.py", "train_results.json", "events.out.tfevents.1.host", "log_history.json"),
    *("custom_checkpoint_0.pkl", "dataloader_state.json", "latest_checkpointed_iteration.txt"),
    *("global_step100/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/__0_0.distcp"),
    *("wandb/config.yaml", "logs/log.txt", "samples/0.txt", "optimizer_0/.metadata"),
)
NEEDED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "tokenizer.model.v3"),
    *("source.spm", "qwen.tiktoken", "chat_template.jinja", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "modeling_mine.py", "README.md"),
    *("additional_chat_templates/tool_use.jinja", "LICENSE", "tokenizer.bin"),
)


def test_what_a_trainer_leaves_in_a_step_folder(tmp_path: Path) -> None:
    other = ("pytorch_model.bin", "model.fp16.safetensors", "model.onnx", "tf_model.h5")
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        write(folder, "model.safetensors", ".gitattributes", *STATE, *NEEDED, *other)
    found = beside(tmp_path, "checkpoint-1/model.safetensors", "checkpoint-2/model.safetensors")
    assert of(found) == ("model.safetensors", sorted(NEEDED))
    assert found.source == tmp_path / "checkpoint-2"
    assert found.missing == []
    firsts = {name.split("/")[0] for name in (*STATE, *other)}
    assert {name.rstrip("/") for name, _ in found.left_out} == firsts
    assert dict(found.left_out)["pytorch_model.bin"] == "other weights"


PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "safety_checker": [None, None],
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "requires_safety_checker": False,
}


@pytest.mark.parametrize("averaged", ["unet", "unet_ema"])
def test_a_pipeline(tmp_path: Path, averaged: str) -> None:
    parts = ["scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/odd.dat"]
    parts += ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    parts += ["text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors"]
    parts += ["text_encoder/model-00002-of-00002.safetensors"]
    parts += ["text_encoder/model.safetensors.index.json"]
    copies = ["vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"]
    copies += ["text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack"]
    copies += ["text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/optimizer.pt"]
    copies += ["text_encoder/model.safetensors.index.fp16.json"]
    network = f"{averaged}/diffusion_pytorch_model.safetensors"
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        write(folder, "optimizer.bin", "whole.safetensors", f"{averaged}/config.json", network)
        write(folder, *parts, *copies, **{"model_index.json": PIPELINE})
        write(folder, "unet/diffusion_pytorch_model.safetensors", "unet/config.json")
    found = beside(tmp_path, f"checkpoint-1/{network}", f"checkpoint-2/{network}")
    assert found.weights == "unet/diffusion_pytorch_model.safetensors"
    assert sorted(found.copied) == sorted([*parts, "unet/config.json", "model_index.json"])
    assert (
        found.copied["unet/config.json"].path == tmp_path / f"checkpoint-2/{averaged}/config.json"
    )
    assert found.missing == ["image_encoder/"]
    left_out = {name for name, _ in found.left_out}
    assert left_out - {"unet/"} == {*copies, "optimizer.bin", "whole.safetensors"}
    assert ("unet/" in left_out) == (averaged == "unet_ema")


def test_parts_of_sentence_transformers(tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    there = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    for step in (1, 2):
        folder = tmp_path / f"step{step}"
        write(folder, "model.safetensors", "config.json", *there, **{"modules.json": modules})
    found = beside(tmp_path, "step1/model.safetensors", "step2/model.safetensors")
    assert of(found) == ("model.safetensors", sorted([*there, "config.json", "modules.json"]))


def test_a_pipeline_keeps_the_only_form_of_a_part(tmp_path: Path) -> None:
    parts = ["vae/diffusion_pytorch_model.fp16.safetensors", "vae/config.json"]
    parts += ["text_encoder/pytorch_model.bin", "text_encoder/pytorch_model.bin.index.json"]
    folder = tmp_path / "checkpoint-1"
    write(folder, "unet/model.safetensors", "unet/config.json", *parts)
    write(folder, **{"model_index.json": PIPELINE})
    write(tmp_path, "checkpoint-2/unet/model.safetensors")
    found = beside(
        tmp_path, "checkpoint-2/unet/model.safetensors", "checkpoint-1/unet/model.safetensors"
    )
    assert set(parts) <= found.copied.keys()


@pytest.mark.parametrize(
    ("name", "config", "weights"),
    [
        ("model.safetensors", {"model_type": "bert"}, "model.safetensors"),
        ("pytorch_model.bin", {"model_type": "bert"}, "model.safetensors"),
        ("pytorch_model.bin", {}, "model.safetensors"),
        ("pytorch_model-00001-of-00002.bin", {}, "model.safetensors"),
        ("diffusion_pytorch_model.bin", {}, "diffusion_pytorch_model.safetensors"),
        ("adapter_model.bin", {}, "adapter_model.safetensors"),
        ("pytorch_lora_weights.bin", {}, "pytorch_lora_weights.safetensors"),
        ("ema.safetensors", {"model_type": "bert"}, "model.safetensors"),
        ("ema.safetensors", {"mine": 1}, "ema.safetensors"),
        ("ema.pt", {"_class_name": "UNet2DModel"}, "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", {"_class_name": "x"},
         "diffusion_pytorch_model.safetensors"),
        ("state.ckpt", {"mine": 1}, "model.safetensors"),
        ("__0_0.distcp", {}, "model.safetensors"),
    ],
)  # fmt: skip
def test_what_the_weights_are_called(
    tmp_path: Path, name: str, config: dict[str, object], weights: str
) -> None:
    for step in (1, 2):
        write(tmp_path / f"step{step}", name, **{"config.json": config})
    assert beside(tmp_path, f"step1/{name}", f"step2/{name}").weights == weights


def test_names_with_steps_are_not_kept(tmp_path: Path) -> None:
    networks = ["step1/ema_1.safetensors", "step2/ema_2.safetensors"]
    write(tmp_path, *networks)
    found = beside(tmp_path, *networks)
    assert (found.weights, found.missing) == ("model.safetensors", ["config.json"])


def test_files_in_one_folder(tmp_path: Path) -> None:
    """Only what is known by its name is taken from there."""
    write(tmp_path, "ema_1.safetensors", "ema_2.safetensors", "notes.txt", "train.py", "log.json")
    write(tmp_path, "training_args.json", "trainer_state.json", "README.md", "data/train.json")
    networks = ("ema_1.safetensors", "ema_2.safetensors")
    assert of(beside(tmp_path, *networks)) == ("model.safetensors", [])
    assert beside(tmp_path, *networks).missing == ["config.json"]
    write(tmp_path, "tokenizer.json", "modeling_mine.py", **{"config.json": {"_class_name": "x"}})
    assert of(beside(tmp_path, *networks)) == (
        "diffusion_pytorch_model.safetensors",
        ["config.json", "modeling_mine.py", "tokenizer.json"],
    )
    write(tmp_path, "adapter_config.json")
    assert beside(tmp_path, *networks).weights == "adapter_model.safetensors"


def test_a_config_that_lies_above(tmp_path: Path) -> None:
    write(tmp_path, "run/config.json", "run/tokenizer.json", "run/notes.md", "config.json")
    networks = ("step1/weights.pt", "step2/weights.pt")
    write(tmp_path / "run", *networks)
    found = beside(tmp_path / "run", *networks)
    assert of(found) == ("model.safetensors", ["config.json", "tokenizer.json"])


def test_a_distributed_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    """Its tokenizer lies in the step folder, its config where the final model was saved."""
    inside = [f"checkpoint-{step}/pytorch_model_fsdp_0/__0_0.distcp" for step in (1, 2)]
    write(tmp_path, *inside, "checkpoint-2/tokenizer.json", "checkpoint-2/trainer_state.json")
    write(tmp_path, "config.json", "training_args.bin", "model.safetensors", "vocab.txt")
    found = beside(tmp_path, *inside)
    assert of(found) == ("model.safetensors", ["config.json", "tokenizer.json", "vocab.txt"])
    assert found.origin() == "checkpoint-2/pytorch_model_fsdp_0"
    assert found.origin("tokenizer.json") == "checkpoint-2"
    assert found.origin("config.json") == tmp_path.name


def test_links_are_copied_as_what_they_lead_to(tmp_path: Path) -> None:
    write(tmp_path, "blobs/a", "run/step1/model.safetensors", "run/step2/model.safetensors")
    (tmp_path / "run/step2/config.json").symlink_to(tmp_path / "blobs/a")
    networks = ("step1/model.safetensors", "step2/model.safetensors")
    found = beside(tmp_path / "run", *networks)
    assert found.copied["config.json"].size == len("blobs/a")
    (tmp_path / "blobs/a").unlink()
    with pytest.raises(SnapshotError, match="a link that leads nowhere; restore the file"):
        beside(tmp_path / "run", *networks)


def test_shards() -> None:
    shards = [Path(f"model-0000{at}-of-00002.safetensors") for at in (1, 2)]
    assert in_shards(shards)
    assert not in_shards(shards[:1])
    assert not in_shards([Path("__0_0.distcp"), Path("__1_0.distcp")])
