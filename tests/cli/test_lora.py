"""LoRAs through the command: what `synthesize` tells of them, and `--lora exact`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.command import Posthoc, write_snapshot
from tests.support import read_tensors
from tests.synthesis.test_products import CONFIG, kohya, peft, write

TARGET = ("--raw", "--sigma-rel", "0.2", "-o", "out.safetensors")
FAR = (
    "posthoc: sigma_rel 0.2: an error of up to 31.3% of the distance between EMA and network is to "
    "be expected (see posthoc solve --diagnose)\n"
)


def test_the_default_says_how_far_off_it_is(posthoc_here: Posthoc, tmp_path: Path, check_json):
    write(tmp_path / "run", kohya)
    run = posthoc_here("synthesize", "run", *TARGET, "--json")
    assert run.code == 0
    assert run.err == FAR + (
        "posthoc: the factors of the LoRA are averaged as they are: what they do is 5.24% from the "
        "average of what they did (in 2 modules); --lora exact writes the latter\n"
    )
    check_json("synthesize", run.json)
    (distance,) = (target["lora"]["distance"] for target in run.json["targets"])
    weights = [source["weight"] for source in run.json["targets"][0]["weights"]]
    # The same by the full matrices.
    apart = []
    for module in ("lora_te_q", "lora_unet_conv"):
        ups, downs = [], []
        for path in sorted((tmp_path / "run").rglob("*.safetensors")):
            tensors = read_tensors(path)
            ups.append(tensors[f"{module}.lora_up.weight"].reshape(-1, 4).astype(float))
            downs.append(tensors[f"{module}.lora_down.weight"].reshape(4, -1).astype(float))
        exact = sum(w * up @ down for w, up, down in zip(weights, ups, downs, strict=True))
        up, down = (
            sum(w * each for w, each in zip(weights, all_, strict=True)) for all_ in (ups, downs)
        )
        apart.append(np.linalg.norm(up @ down - exact) / np.linalg.norm(exact))
    assert distance == pytest.approx(np.sqrt(np.mean(np.square(apart))), rel=1e-9)
    assert posthoc_here("synthesize", "run", *TARGET, "--force", "-q").err == ""


def test_exact(posthoc_here: Posthoc, tmp_path: Path, check_json) -> None:
    write(tmp_path / "run", kohya, ranks=(4, 2, 8, 3))
    refused = posthoc_here("synthesize", "run", *TARGET)
    refused.failed(3, r"run/checkpoint-1: tensor .+ averages the products with --lora exact .+")
    run = posthoc_here(
        "synthesize", "run", *TARGET, "--lora", "exact", "--lora-rank", "5", "--json"
    )
    assert run.err == (
        "posthoc: warning: LoRAs of several ranks have no values to compare (tensor "
        "'lora_te_q.lora_up.weight'); the weights are share's\n"
        "posthoc: the products of 2 modules are averaged, and have rank 5\n"
    )
    check_json("synthesize", run.json)
    assert run.json["targets"][0]["lora"] == {
        "distance": None,
        "ranks": [5, 5],
        "adapter_config": None,
    }
    shown = posthoc_here("inspect", "out.safetensors")
    assert "lora     exact: factors of averaged products, of rank 5 at most" in shown.out
    told = posthoc_here("inspect", "out.safetensors", "--json").json
    check_json("inspect", told)
    assert told["recipe"]["lora"] == {"mode": "exact", "tolerance": 0.001, "rank": 5}
    verified = posthoc_here("verify", "out.safetensors", "run", "--full", "--json")
    assert verified.json["ok"]
    assert verified.json["compared"] == verified.json["values"]


def test_of_pefts_configuration_it_says_what_to_change(posthoc_here: Posthoc, tmp_path: Path):
    write(tmp_path / "run", peft, config=CONFIG)
    run = posthoc_here("synthesize", "run", *TARGET, "--lora", "exact", "--json")
    rank = read_tensors(tmp_path / "out.safetensors")["base_model.model.a.q.lora_A.weight"].shape[0]
    assert run.json["targets"][0]["lora"]["adapter_config"] == {"r": rank, "rank_pattern": {}}
    line = f'beside it has to say "r": {rank}, "rank_pattern": {{}}\n'
    assert run.err.endswith(f"posthoc: out.safetensors: the adapter_config.json {line}")


def test_what_is_no_lora(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        write_snapshot(tmp_path / "run" / f"net-{step}.safetensors", step)
    run = posthoc_here("synthesize", "run", *TARGET, "--lora", "exact")
    run.failed(2, "--lora exact: the snapshots hold no pairs of LoRA factors; leave it out: .+")
    assert posthoc_here("synthesize", "run", *TARGET, "--json").json["lora"] is None


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("[]", r"run/checkpoint-\d/adapter_config\.json: is no JSON object; .+"),
        (
            '{"target_parameters": ["x"]}',
            r"run/.+: its target_parameters are of several experts; .+",
        ),
        (
            '{"lora_alpha": null}',
            r"run/.+: tensor '.+' has no alpha in adapter_config\.json .+; .+",
        ),
        ('{"lora_alpha": 0}', r"run/.+: tensor '.+' has the alpha 0; .+"),
        (json.dumps(CONFIG | {"alpha_pattern": {"(": 2}}), r"run/.+: tensor '.+' has no alpha .+"),
    ],
)
def test_configurations_that_make_no_sense(posthoc_here: Posthoc, tmp_path: Path, config, line):
    write(tmp_path / "run", peft)
    for inside in (tmp_path / "run").iterdir():
        (inside / "adapter_config.json").write_text(config)
    posthoc_here("synthesize", "run", *TARGET, "--lora", "exact").failed(3, line)
    assert not (tmp_path / "out.safetensors").exists()
    # Factor by factor nothing of it matters.
    assert posthoc_here("synthesize", "run", *TARGET).code == 0


def test_several_ranks_have_no_values_to_sample(posthoc_here: Posthoc, tmp_path: Path) -> None:
    write(tmp_path / "run", kohya, ranks=(4, 2, 8, 3))
    arguments = ("synthesize", "run", *TARGET, "--lora", "exact")
    for more in (("--method", "blup"), ("--max-error", "0.5")):
        line = r"--method: LoRAs of several ranks have no values to compare \(tensor '.+'\); .+"
        posthoc_here(*arguments, *more).failed(2, line)
    assert posthoc_here(*arguments).code == 0
