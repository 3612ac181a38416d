"""`lora="exact"`: outputs held against the average of the full matrices, for all styles of keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import posthoc_cli
from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.lora import pairs
from posthoc_cli.storage.header import read_header
from tests.support import read_tensors, write_tensors

Tensors = dict[str, npt.NDArray]
STEPS = (1, 2, 3, 4)


def factors(step: int, rank: int, out: int, inside: tuple[int, ...]) -> tuple[npt.NDArray, ...]:
    """Factors that drift, as those of a training do: `up` [out, rank], `down` [rank, ...]."""
    first, last = (np.random.default_rng(seed).standard_normal for seed in (step, 99))
    up = last((out, rank)) + 0.3 * first((out, rank))
    down = last((rank, *inside)) + 0.3 * first((rank, *inside))
    return up.astype(np.float32), down.astype(np.float32)


def kohya(step: int, rank: int = 4) -> Tensors:
    up, down = factors(step, rank, 12, (10,))
    conv_up, conv_down = factors(step + 50, rank, 6, (5, 3, 3))
    return {
        "lora_te_q.alpha": np.array(2, np.float32),
        "lora_te_q.lora_up.weight": up,
        "lora_te_q.lora_down.weight": down,
        "lora_unet_conv.alpha": np.array(1, np.float32),
        "lora_unet_conv.lora_up.weight": conv_up.reshape(6, rank, 1, 1),
        "lora_unet_conv.lora_down.weight": conv_down,
        "lora_te_q.dora_scale": np.full((1, 10), step, np.float32),
        "lora_x.hada_w1_a": np.full((3, 2), step, np.float32),
    }


def diffusers(step: int, rank: int = 4) -> Tensors:
    up, down = factors(step, rank, 12, (10,))
    return {
        "unet.mid.attn.to_q.lora_A.weight": down,
        "unet.mid.attn.to_q.lora_B.weight": up,
        "unet.mid.attn.processor.to_k_lora.up.weight": up[:9],
        "unet.mid.attn.processor.to_k_lora.down.weight": down[:, :8],
        "text_encoder.q_proj.lora_linear_layer.up.weight": up[:7],
        "text_encoder.q_proj.lora_linear_layer.down.weight": down,
        "unet.mid.attn.to_v.lora.up.weight": up,
        "unet.mid.attn.to_v.lora.down.weight": down,
    }


def peft(step: int, rank: int = 4) -> Tensors:
    up, down = factors(step, rank, 12, (10,))
    small_up, small_down = factors(step, 2, 11, (10,))
    return {
        "base_model.model.a.q.lora_A.weight": down,
        "base_model.model.a.q.lora_B.weight": up,
        "base_model.model.a.q.lora_B.bias": up[:, 0],
        "base_model.model.b.v.lora_A.default.weight": small_down,
        "base_model.model.b.v.lora_B.default.weight": small_up,
        "base_model.model.e.lora_embedding_A": down,
        "base_model.model.e.lora_embedding_B": up,
        "base_model.model.a.q.lora_magnitude_vector": np.full(12, step, np.float32),
        "base_model.model.head.weight": np.full((3, 2), step, np.float32),
    }


CONFIG = {"r": 4, "lora_alpha": 16, "rank_pattern": {"v": 2}, "alpha_pattern": {"b.v": 3}}


def write(folder: Path, style: Callable[..., Tensors], **more: object) -> Path:
    """Four snapshots of a style, each in a folder of its own with what belongs beside it."""
    config, ranks, dtype = more.get("config"), more.get("ranks", (4,) * 4), more.get("dtype")
    for step, rank in zip(STEPS, ranks, strict=True):  # type: ignore[call-overload]
        inside = folder / f"checkpoint-{step}"
        inside.mkdir(parents=True)
        tensors = style(step, rank)
        if dtype:
            tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        write_tensors(inside / "adapter_model.safetensors", tensors, more.get("metadata"))  # type: ignore[arg-type]
        if config:
            (inside / "adapter_config.json").write_text(json.dumps(config))
    return folder


def save(folder: Path, output: Path, **options: object) -> posthoc_cli.Solution:
    run = posthoc_cli.open_snapshots(folder, raw=True, lora="exact")
    solution = run.solve(gamma=2.0)
    solution.save(output, lora="exact", **options)  # type: ignore[arg-type]
    return solution


Scale = Callable[[str, Mapping[str, npt.NDArray], int], float]


def products(tensors: Mapping[str, npt.NDArray], path: Path, scale: Scale) -> Tensors:
    """What a LoRA does to each layer, as a full matrix, and to its bias."""
    found: Tensors = {}
    for pair in pairs(read_header(path).tensors)[0]:
        up = tensors[pair.up].astype(np.float64)
        rank = up.shape[1]
        down = tensors[pair.down].astype(np.float64).reshape(rank, -1)
        by = scale(pair.module, tensors, rank)
        found[pair.module] = by * up.reshape(len(up), rank) @ down
        if pair.bias:
            found[pair.bias] = by * tensors[pair.bias].astype(np.float64)
    return found


def compared(
    folder: Path, output: Path, weights: npt.NDArray, before: Scale, after: Scale
) -> float:
    """The largest relative distance of a module in `output` from the average of full matrices."""
    wanted: Tensors = {}
    for path, weight in zip(sorted(folder.rglob("*.safetensors")), weights, strict=True):
        for name, product in products(read_tensors(path), path, before).items():
            wanted[name] = wanted.get(name, 0) + weight * product
    made = products(read_tensors(output), output, after)
    assert made.keys() == wanted.keys()
    norm = np.linalg.norm
    return max(float(norm(made[name] - wanted[name]) / norm(wanted[name])) for name in wanted)


def by_tensor(module: str, tensors: Mapping[str, npt.NDArray], rank: int) -> float:
    return float(tensors[f"{module}.alpha"]) / rank


def by_nothing(module: str, tensors: Mapping[str, npt.NDArray], rank: int) -> float:
    return 1.0


def by_config(module: str, tensors: Mapping[str, npt.NDArray], rank: int) -> float:
    return (3 if module.endswith("b.v") else 16) / rank


def by_root(module: str, tensors: Mapping[str, npt.NDArray], rank: int) -> float:
    return by_config(module, tensors, 1) / rank**0.5


@pytest.mark.parametrize(
    ("style", "config", "scale"),
    [
        (kohya, None, by_tensor),
        (diffusers, None, by_nothing),
        (peft, CONFIG, by_config),
        (peft, {**CONFIG, "use_rslora": True}, by_root),
        # Without a configuration alpha is not known; the one of the newest goes on to be right.
        (peft, None, lambda module, tensors, rank: 1.7 / rank),
    ],
    ids=["kohya", "diffusers", "peft", "rslora", "unknown alpha"],
)
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (4, 2, 8, 3)])
def test_products(tmp_path: Path, style, config, scale: Scale, ranks) -> None:
    folder = write(tmp_path / "run", style, config=config, ranks=ranks)
    output = tmp_path / "out.safetensors"
    solution = save(folder, output, lora_tolerance=0.0)
    assert compared(folder, output, solution.weights[0], scale, scale) < 2e-6
    report = posthoc_cli.verify(output, folder, full=True)
    assert report.problems == []
    assert report.compared == report.values == sum(t.size for t in read_tensors(output).values())
    made, newest = read_tensors(output), read_tensors(sorted(folder.rglob("*.safetensors"))[-1])
    assert made.keys() == newest.keys()
    for name in made:  # what is no factor is averaged as ever
        if "lora_up" not in name and "lora_A" not in name and made[name].size in (6, 10):
            assert np.allclose(made[name], solution.weights[0] @ np.array(STEPS), rtol=1e-6), name
        if name.endswith(".alpha"):
            assert made[name].tobytes() == newest[name].tobytes()


def test_one_rank_for_those_that_share_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", peft, config=CONFIG)
    save(folder, tmp_path / "out.safetensors")
    made = read_tensors(tmp_path / "out.safetensors")
    ranks = {tensor.shape[0] for name, tensor in made.items() if "_A" in name}
    assert len(ranks) == 1
    assert min(ranks) > 4


@pytest.mark.parametrize("tolerance", [1e-3, 0.2])
def test_singular_values_are_kept_to_a_tolerance(tmp_path: Path, tolerance: float) -> None:
    folder = write(tmp_path / "run", kohya)
    output = tmp_path / "out.safetensors"
    solution = save(folder, output, lora_tolerance=tolerance)
    total: npt.NDArray = np.zeros((12, 10))
    for path, weight in zip(
        sorted(folder.rglob("*.safetensors")), solution.weights[0], strict=True
    ):
        total += weight * products(read_tensors(path), path, by_tensor)["lora_te_q"]
    values = np.linalg.svd(total, compute_uv=False)
    rank = int((values > tolerance * values[0]).sum())
    made = read_tensors(output)
    assert made["lora_te_q.lora_up.weight"].shape == (12, rank)
    error = products(made, output, by_tensor)["lora_te_q"] - total
    assert np.linalg.norm(error) == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-5)
    assert posthoc_cli.verify(output, folder, full=True).problems == []


def test_at_most_a_rank(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", kohya)
    save(folder, tmp_path / "out.safetensors", lora_rank=3)
    made = read_tensors(tmp_path / "out.safetensors")
    assert made["lora_unet_conv.lora_up.weight"].shape == (6, 3, 1, 1)
    assert made["lora_unet_conv.lora_down.weight"].shape == (3, 5, 3, 3)
    assert posthoc_cli.verify(tmp_path / "out.safetensors", folder).problems == []


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", ["same", "float16", "bfloat16"])
def test_dtypes(tmp_path: Path, stored, dtype: str) -> None:
    folder = write(tmp_path / "run", kohya, dtype=stored)
    output = tmp_path / "out.safetensors"
    solution = save(folder, output, dtype=dtype)
    assert compared(folder, output, solution.weights[0], by_tensor, by_tensor) < 0.01
    wanted = stored if dtype == "same" else {"float16": np.float16}.get(dtype, ml_dtypes.bfloat16)
    assert {tensor.dtype for tensor in read_tensors(output).values()} == {np.dtype(wanted)}
    assert posthoc_cli.verify(output, folder, full=True).problems == []


def test_bytes_are_the_same_again_and_in_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", kohya)
    outputs = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for output in outputs:
        save(folder, output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    save(folder, tmp_path / "c.safetensors", max_shard_size=1500)
    index = tmp_path / "c.safetensors.index.json"
    whole, shards = read_tensors(outputs[0]), {}
    for path in tmp_path.glob("c-*.safetensors"):
        shards |= read_tensors(path)
    assert {name: each.tobytes() for name, each in whole.items()} == {
        name: each.tobytes() for name, each in shards.items()
    }
    assert posthoc_cli.verify(index, folder, full=True).problems == []


def test_metadata_says_the_new_rank(tmp_path: Path) -> None:
    adapter = {"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"x": 2}}
    metadata = {"lora_adapter_metadata": json.dumps(adapter), "ss_network_dim": "4"}

    def unet(step: int, rank: int) -> Tensors:
        return {name: each for name, each in diffusers(step, rank).items() if name[0] == "u"}

    folder = write(tmp_path / "run", unet, metadata=metadata)
    output = tmp_path / "out.safetensors"
    solution = save(folder, output)

    def by_metadata(module: str, tensors: Mapping[str, npt.NDArray], rank: int) -> float:
        return 8 / rank

    assert compared(folder, output, solution.weights[0], by_metadata, by_metadata) < 1e-3
    said = read_header(output).metadata
    rank = read_tensors(output)["unet.mid.attn.to_q.lora_A.weight"].shape[0]
    assert rank > 4
    wanted = {"unet.r": rank, "unet.lora_alpha": 8, "unet.rank_pattern": {}}
    assert json.loads(said["lora_adapter_metadata"]) == wanted
    assert said["ss_network_dim"] == str(rank)
    assert json.loads(said["posthoc"])["lora"] == {"mode": "exact", "tolerance": 1e-3, "rank": None}


def test_a_third_factor_is_averaged_as_it_is(tmp_path: Path) -> None:
    def tucker(step: int, rank: int) -> Tensors:
        mid = np.full((rank, rank, 3, 3), step, np.float32)
        down = np.full((rank, 5, 1, 1), step, np.float32)
        tensors = kohya(step, rank)
        return tensors | {
            "lora_unet_conv.lora_mid.weight": mid,
            "lora_unet_conv.lora_down.weight": down,
        }

    folder = write(tmp_path / "run", tucker)
    solution = save(folder, tmp_path / "out.safetensors")
    made = read_tensors(tmp_path / "out.safetensors")
    assert made["lora_unet_conv.lora_down.weight"].shape == (4, 5, 1, 1)
    mean = solution.weights[0] @ np.array(STEPS)
    assert np.allclose(made["lora_unet_conv.lora_mid.weight"], mean, rtol=1e-6)
    assert made["lora_te_q.lora_up.weight"].shape[1] > 4


def test_what_is_changed_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", kohya)
    output = tmp_path / "out.safetensors"
    save(folder, output)
    header = read_header(output)
    name = "lora_te_q.lora_down.weight"
    at = header.parts[0].data_start + header.tensors[name].start
    data = bytearray(output.read_bytes())
    value = np.frombuffer(data, np.float32, 1, at)[0]
    data[at : at + 4] = np.float32(value * 1.01).tobytes()
    output.write_bytes(data)
    (problem,) = posthoc_cli.verify(output, folder).problems
    assert problem.tensor == "lora_te_q.lora_up.weight"
    assert "product" in problem.problem


def test_products_that_vanish(tmp_path: Path) -> None:
    """A text encoder that isn't trained has zeros for its `up`."""

    def still(step: int, rank: int) -> Tensors:
        tensors = kohya(step, rank)
        return tensors | {"lora_te_q.lora_up.weight": np.zeros((12, rank), np.float32)}

    folder = write(tmp_path / "run", still)
    save(folder, tmp_path / "out.safetensors")
    made = read_tensors(tmp_path / "out.safetensors")
    assert made["lora_te_q.lora_up.weight"].shape == (12, 1)
    assert not (made["lora_te_q.lora_up.weight"] @ made["lora_te_q.lora_down.weight"]).any()
    assert posthoc_cli.verify(tmp_path / "out.safetensors", folder).problems == []


def test_what_has_no_factors_is_refused(tmp_path: Path) -> None:
    def broken(step: int, rank: int) -> Tensors:
        tensors = kohya(step, rank)
        tensors["lora_te_q.lora_up.weight"][0, 0] = np.nan if step == 3 else 0
        return tensors

    folder = write(tmp_path / "run", broken)
    with pytest.raises(SnapshotError, match="holds NaN or infinity: its product has no factors"):
        save(folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_factor_that_is_copied_keeps_its_rank(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", kohya)
    save(folder, tmp_path / "out.safetensors", copy=["lora_te_q.*"])
    made, newest = (
        read_tensors(path)
        for path in (tmp_path / "out.safetensors", sorted(folder.rglob("*.safetensors"))[-1])
    )
    name = "lora_te_q.lora_up.weight"
    assert made[name].tobytes() == newest[name].tobytes()
    assert made["lora_unet_conv.lora_up.weight"].shape[1] > 4
    other = write(tmp_path / "peft", peft, config=CONFIG)
    with pytest.raises(SnapshotError, match="its factors keep their rank"):
        save(other, tmp_path / "peft.safetensors", copy=["*.a.q.*"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": "all"}, "lora=: 'all' is not known"),
        ({"lora_rank": 3}, "lora_rank=: is for lora='exact' alone"),
        ({"lora": "exact", "lora_rank": 0}, "lora_rank=: 0 is out of bounds"),
        ({"lora": "exact", "lora_tolerance": 1.0}, "lora_tolerance=: 1 is out of bounds"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options, message: str) -> None:
    folder = write(tmp_path / "run", kohya)
    solution = posthoc_cli.open_snapshots(folder, raw=True).solve(gamma=2.0)
    with pytest.raises(UsageError, match=message):
        solution.save(tmp_path / "out.safetensors", **options)


def test_a_part_of_large_products_tells_how_far_apart_they_are(tmp_path: Path) -> None:
    def large(step: int, rank: int) -> Tensors:
        up, down = factors(step, rank, 700, (900,))
        return {"x.lora_up.weight": up, "x.lora_down.weight": down}

    folder = write(tmp_path / "run", large)
    solution = posthoc_cli.open_snapshots(folder, raw=True).solve(gamma=2.0)
    told = [solution.save(tmp_path / "a.safetensors").lora]
    told.append(solution.save(tmp_path / "b.safetensors", lora="exact").lora)
    ups, downs = zip(*(factors(step, 4, 700, (900,)) for step in STEPS), strict=True)
    each = list(zip(solution.weights[0], ups, downs, strict=True))
    exact = sum(weight * up @ down for weight, up, down in each)
    by_factors = sum(w * up for w, up, _ in each) @ sum(w * down for w, _, down in each)
    apart = np.linalg.norm(by_factors - exact) / np.linalg.norm(exact)
    for one in told:
        assert one is not None
        assert one.distances[0] == pytest.approx(apart, rel=0.1)
    assert told[0].distances == told[1].distances


def test_alphas_and_biases_may_be_dropped(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", kohya)
    output = tmp_path / "out.safetensors"
    solution = save(folder, output, drop=["*.alpha"], lora_tolerance=0.0)
    assert "lora_te_q.alpha" not in read_tensors(output)
    # What loads it takes the rank for the alpha then.
    assert compared(folder, output, solution.weights[0], by_tensor, by_nothing) < 2e-6
    assert posthoc_cli.verify(output, folder, full=True).problems == []
    other = write(tmp_path / "peft", peft, config=CONFIG)
    output = tmp_path / "peft.safetensors"
    save(other, output, drop=["*.bias"])
    made = read_tensors(output)
    assert "base_model.model.a.q.lora_B.bias" not in made
    assert len({tensor.shape[0] for name, tensor in made.items() if "_A" in name}) == 1
