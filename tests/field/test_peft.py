"""A LoRA that peft saved, averaged by its products, loaded and applied by peft again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import posthoc_cli


def test_peft_applies_the_average_of_the_products(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))

    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["0", "2"], rank_pattern={"2": 3}, alpha_pattern={"0": 5}
    )
    deltas: dict[str, torch.Tensor] = {}
    for step in (1, 2, 3):
        model = peft.get_peft_model(network(), config)
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.data = torch.randn(factor.shape)
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        deltas[f"checkpoint-{step}"] = {
            name: module.get_delta_weight("default")
            for name, module in model.base_model.model.named_modules()
            if isinstance(module, peft.tuners.lora.Linear)
        }
    solution = posthoc_cli.open_snapshots(tmp_path / "run", raw=True).solve(sigma_rel=0.2)
    out = tmp_path / "out"
    out.mkdir()
    saved = solution.save(out / "adapter_model.safetensors", lora="exact", lora_tolerance=0.0)

    from posthoc_cli.snapshots.lora_scale import changes

    said = json.loads((tmp_path / "run/checkpoint-3/adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(RuntimeError, match="size mismatch"):  # never in silence
        peft.PeftModel.from_pretrained(network(), out)
    assert saved.lora is not None
    (out / "adapter_config.json").write_text(json.dumps(said | changes(saved.lora.shared[0])))
    loaded = peft.PeftModel.from_pretrained(network(), out).base_model.model
    inputs, plain = torch.randn(5, 6), network()
    for name, weight in plain.named_parameters():
        if name.endswith("weight"):
            each = zip(solution.snapshots, solution.weights[0].tolist(), strict=True)
            weight.data += sum(w * deltas[one.file][name[:1]] for one, w in each)
    assert torch.allclose(loaded(inputs), plain(inputs), atol=1e-4)
