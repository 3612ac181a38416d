"""Folders as the libraries themselves save them: averaged here, loaded by them from what came out.

The one module that imports them, with networks as small as their configs allow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posthoc_cli import open_snapshots, verify

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
torch: Any = None
diffusers: Any = None
transformers: Any = None
peft: Any = None


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    """They take seconds to import: only by the process that runs these tests. Nothing is asked of
    the hub, which other tests of that process may do."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in LIBRARIES:
            globals()[name] = pytest.importorskip(name)
        yield


STATE = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt")


@pytest.fixture(autouse=True)
def _one_draw() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def checkpoints(
    run: Path, network: Any, save: Callable[[Path], Any], *, read: str | None = None
) -> Path:
    """Step folders as a trainer leaves them, averaged: the folder that came out.

    `network` is given the average of the states that it was saved in; `read` is a pattern.
    """
    states = []
    trained = [name for name, each in network.named_parameters() if each.requires_grad]
    for step in (100, 200, 300):
        with torch.no_grad():
            for name in trained:
                parameter = network.get_parameter(name)
                parameter.add_(0.1 * torch.randn_like(parameter))
        states.append({name: network.get_parameter(name).detach().double() for name in trained})
        folder = run / f"checkpoint-{step}"
        save(folder)
        for name in STATE:
            torch.save({"step": step}, folder / name)
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    solution = open_snapshots(run, raw=True, pattern=read).solve(sigma_rel=0.2)
    [path] = solution.save(run.with_name("ema"), layout="folder")
    assert verify(path, run, full=True).problems == []
    assert not {each.name for each in path.rglob("*")} & {*STATE, "trainer_state.json"}
    with torch.no_grad():
        for name in trained:
            terms = zip(solution.weights[0].tolist(), states, strict=True)
            network.get_parameter(name).copy_(sum(weight * state[name] for weight, state in terms))
    network.eval()
    return path


def names(path: Path) -> list[str]:
    """The files of a folder that came out, but for what says so."""
    found = [each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()]
    return sorted(set(found) - {"posthoc.json"})


def the_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def test_transformers_in_shards(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template="{{ messages }}"
    )
    network = llama(tie_word_embeddings=True)

    def save(folder: Path) -> None:
        network.save_pretrained(folder, max_shard_size="8kB")
        tokenizer.save_pretrained(folder)

    path = checkpoints(tmp_path / "run", network, save)
    shards = [name for name in names(path) if name.startswith("model-0000")]
    assert len(shards) > 1
    copied = set(names(path)) - {*shards, "model.safetensors.index.json"}
    there = set(os.listdir(tmp_path / "run" / "checkpoint-300"))
    assert copied <= there
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= copied
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        the_same(loaded(tokens).logits, network(tokens).logits)
    again = transformers.AutoTokenizer.from_pretrained(path)
    assert again.chat_template == "{{ messages }}"
    assert again("b a")["input_ids"] == [1, 0]


def test_a_torch_checkpoint_of_transformers(tmp_path: Path) -> None:
    network = llama(tie_word_embeddings=True)

    def save(folder: Path) -> None:
        network.config.save_pretrained(folder)
        torch.save(network.state_dict(), folder / "pytorch_model.bin")

    path = checkpoints(tmp_path / "run", network, save)
    assert names(path) == ["config.json", "model.safetensors"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        the_same(loaded(tokens).logits, network(tokens).logits)


def unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        **more,
    )


def run_unet(network: Any) -> Any:
    sample = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
    with torch.no_grad():
        return network(sample, 3, torch.linspace(0, 1, 24).reshape(1, 3, 8)).sample


def test_the_ema_of_diffusers_training_scripts(tmp_path: Path) -> None:
    """`unet_ema` beside `unet` and accelerate's states: the one that is asked for is averaged."""
    network, other = unet(), unet()

    def save(folder: Path) -> None:
        other.save_pretrained(folder / "unet")
        network.save_pretrained(folder / "unet_ema")

    pattern = "checkpoint-{step}/unet_ema/*.safetensors"
    path = checkpoints(tmp_path / "run", network, save, read=pattern)
    assert names(path) == ["config.json", "diffusion_pytorch_model.safetensors"]
    the_same(run_unet(diffusers.UNet2DConditionModel.from_pretrained(path)), run_unet(network))


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    network = unet()
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=77, clip_sample=False, steps_offset=1)
    whole = diffusers.StableDiffusionPipeline(
        unet=network,
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                vocab_size=5,
            )
        ),
        tokenizer=clip_tokenizer(tmp_path),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def save(folder: Path) -> None:
        whole.save_pretrained(folder)
        whole.vae.save_pretrained(folder / "vae", variant="fp16")
        whole.text_encoder.save_pretrained(folder / "text_encoder")
        torch.save({}, folder / "text_encoder" / "pytorch_model.bin")

    pattern = "checkpoint-{step}/unet/*.safetensors"
    path = checkpoints(tmp_path / "run", network, save, read=pattern)
    manifest = json.loads((path / "posthoc.json").read_text(encoding="utf-8"))
    assert manifest["weights"] == "unet/diffusion_pytorch_model.safetensors"
    assert manifest["missing"] == []
    left_out = {each["file"] for each in manifest["left_out"]}
    assert {
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
    } <= left_out
    assert not left_out & set(names(path))
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(path)
    the_same(run_unet(loaded.unet), run_unet(network))
    assert loaded.scheduler.config.num_train_timesteps == 77
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(loaded, part).state_dict(), getattr(whole, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def clip_tokenizer(folder: Path) -> Any:
    words = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    network = peft.get_peft_model(base, config)
    path = checkpoints(tmp_path / "run", network, network.save_pretrained)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names(path))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, path)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        the_same(loaded(tokens).logits, network(tokens).logits)


def test_the_products_of_an_adapter_of_peft(tmp_path: Path) -> None:
    """Their factors have another rank, and the configuration beside them says so."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    network = peft.get_peft_model(base, config)
    checkpoints(tmp_path / "run", network, network.save_pretrained)
    solution = open_snapshots(tmp_path / "run", raw=True).solve(sigma_rel=0.2)
    [path] = solution.save(tmp_path / "exact", layout="folder", lora="exact")
    assert verify(path, tmp_path / "run", full=True).problems == []
    written = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["r"] > 2

    def product(folder: Path) -> Any:
        fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        merged = peft.PeftModel.from_pretrained(fresh, folder).merge_and_unload()
        return merged.get_parameter("model.layers.0.self_attn.q_proj.weight").double()

    steps = [product(tmp_path / "run" / f"checkpoint-{step}") for step in (100, 200, 300)]
    weights = solution.weights[0].tolist()
    the_same(product(path), sum(w * each for w, each in zip(weights, steps, strict=True)))
