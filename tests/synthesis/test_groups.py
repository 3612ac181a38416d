"""Tensors of one output with targets of their own: each as if all of it had that target."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import posthoc_cli
from posthoc_cli.errors import UsageError
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.solver.groups import make_groups
from posthoc_cli.storage.header import read_header
from posthoc_cli.storage.metadata import RECIPE
from posthoc_cli.synthesis.outputs import write_outputs
from posthoc_cli.synthesis.plan import make_plan
from posthoc_cli.synthesis.recipe import ingredients
from tests.support import plan_of, read_tensors, snapshot_of, write_kohya, write_tensors

GROUPS = (("*.attn*", "head.?"), ("*.attn_out",))
OF_GROUP = {"a.w": 0, "a.attn": 1, "b.attn_out": 2, "b.z": 0, "head.q": 1}

Tensors = dict[str, npt.NDArray]


def tensors(rng: np.random.Generator, step: int) -> Tensors:
    """Of several dtypes, with neighbours of other groups; some that no sum may touch."""
    return {
        "a.attn": rng.standard_normal((70, 9)).astype(np.float16),
        "a.w": rng.standard_normal(333).astype(np.float16),
        "b.attn_out": rng.standard_normal(200).astype(ml_dtypes.bfloat16),
        "b.z": (rng.standard_normal(65) + 1j * rng.standard_normal(65)).astype(np.complex64),
        "head.q": rng.standard_normal(129).astype(np.float32),
        "c.attn_step": np.array([step]),
        "d.attn_same": np.float32([0.1, np.inf]),
    }


def snapshots(folder: Path, count: int = 20) -> list[Snapshot]:
    rng, made, cache = np.random.default_rng(0), [], {}
    for step in range(1, count + 1):
        path = folder / f"{step:02d}.safetensors"
        write_tensors(path, tensors(rng, step))
        made.append(snapshot_of(path, step, cache))
    return made


def test_each_tensor_is_as_if_all_had_its_weights(tmp_path: Path) -> None:
    made = snapshots(tmp_path)
    weights = np.random.default_rng(1).standard_normal((3, 2, 20))  # [groups, targets, snapshots]
    (tmp_path / "out").mkdir()
    outs = [tmp_path / "out" / f"{t}.safetensors" for t in range(2)]

    def run(plan, weights, **how) -> list[Tensors]:
        write_outputs(plan, weights, outs, [{}] * 2, overwrite=True, **how)
        return [dict(read_tensors(out)) for out in outs]

    plan = plan_of(made, groups=GROUPS)
    assert plan.bytes_to_read == plan_of(made).bytes_to_read
    alone = [run(plan_of(made), each) for each in weights]
    for how in ({}, {"workers": 3, "row_bytes": 512}):
        for target, together in enumerate(run(plan, weights, **how)):
            for name, values in together.items():
                wanted = alone[OF_GROUP.get(name, 0)][target][name]
                assert values.tobytes() == wanted.tobytes(), (name, how)


def test_segments_end_where_the_group_changes_and_copies_have_none(tmp_path: Path) -> None:
    for step in (1, 2):
        zeros = {name: np.zeros(5, np.float32) for name in "abcdef"} | {"n": np.array(step)}
        write_tensors(tmp_path / f"{step}", zeros)
    plan = make_plan(
        [read_header(tmp_path / "1"), read_header(tmp_path / "2")],
        1,
        copy=["e"],
        groups=[["[bcen]"], ["d"]],
    )
    assert {each.names: (each.group, list(each.sources)) for each in plan.segments} == {
        ("n",): (0, [1]),
        ("a",): (0, [0, 1]),
        ("b", "c"): (1, [0, 1]),
        ("d",): (2, [0, 1]),
        ("e",): (0, [1]),
        ("f",): (0, [0, 1]),
    }


def test_what_overflows_by_the_weights_of_its_group_is_counted(tmp_path: Path) -> None:
    for step in (1, 2):
        large = np.full(4, 6e4 / step, np.float16)
        write_tensors(tmp_path / f"{step}", {"a": large, "b": large})
    made = [snapshot_of(tmp_path / f"{step}", step) for step in (1, 2)]
    weights = np.array([[[0.5, 0.5]], [[9.0, -8.0]]])
    out = tmp_path / "out.safetensors"
    written = write_outputs(plan_of(made, groups=[["b"]]), weights, [out], [{}])
    ((name, overflowed, largest),) = (
        (each.tensor, each.overflowed, each.largest) for each in written.nonfinite
    )
    assert (name, overflowed, largest) == ("b", 4, pytest.approx(3e5, rel=1e-3))


# From a folder


def write_run(folder: Path, *, raw: bool) -> None:
    rng = np.random.default_rng(3)
    walk = {name: np.zeros(400) for name in ("a.attn", "a.mlp", "b.attn", "b.mlp")}
    for step in (100, 200, 300, 400, 500):
        walk = {name: value + rng.standard_normal(400) for name, value in walk.items()}
        values = {name: value.astype(np.float32) for name, value in walk.items()}
        for gamma in ("6.94",) if raw else ("6.94", "16.97"):
            metadata = {"step": str(step), **({} if raw else {"gamma": gamma})}
            write_tensors(folder / f"x-{step}-{gamma}.safetensors", values, metadata)


@pytest.mark.parametrize(
    ("raw", "method"), [(False, "edm2"), (False, "blup"), (True, "share"), (True, "blup")]
)
def test_two_syntheses_give_the_tensors_of_one(tmp_path: Path, raw: bool, method: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, raw=raw)
    run = posthoc_cli.open_snapshots(folder, raw=raw)

    def made(name: str, sigma_rel: list[float], **how: object) -> list[Tensors]:
        solution = run.solve(sigma_rel=sigma_rel, method=method, **how)  # type: ignore[arg-type]
        paths = solution.save(tmp_path / f"{name}-{{sigma_rel}}.safetensors", max_shard_size=2000)
        for path in paths:
            assert not posthoc_cli.verify(path, folder, full=True).problems
        outputs = [output.shards for output in paths.outputs]
        return [
            {k: v for shard in each for k, v in read_tensors(shard).items()} for each in outputs
        ]

    rules = [("*", 0.2), ("*.mlp", "sigma-rel:0.13"), ("*.attn", 0.15), ("b.mlp", "gamma:5")]
    both = made("both", [0.1, 0.12], target_for=rules)
    attn, mlp = made("attn", [0.15])[0], made("mlp", [0.13])[0]
    other = run.solve(gamma=5, method=method).state_dict()["b.mlp"].numpy()
    for output in both:
        assert output["a.attn"].tobytes() == attn["a.attn"].tobytes()
        assert output["b.attn"].tobytes() == attn["b.attn"].tobytes()
        assert output["a.mlp"].tobytes() == mlp["a.mlp"].tobytes()
        assert output["b.mlp"].tobytes() == other.tobytes()


def test_a_lora_one_factor_of_another_length(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        name = f"lora-{epoch:06d}.safetensors"
        write_kohya(tmp_path / name, float(epoch), ss_steps=str(100 * epoch))
    run = posthoc_cli.open_snapshots(tmp_path, raw=True)
    solution = run.solve(sigma_rel=0.2, target_for={"*.lora_up.*": 0.1, "lora_te_*": 0.05})
    assert [(group.globs, group.tensors) for group in solution.groups] == [
        (("*.lora_up.*",), 1),
        (("lora_te_*",), 3),
    ]
    both = solution.state_dict()
    for target, name in (
        (0.2, "lora_unet_mid_block_k.lora_down.weight"),
        (0.1, "lora_unet_mid_block_k.lora_up.weight"),
        (0.05, "lora_te_q.lora_up.weight"),
    ):
        assert bool((run.solve(sigma_rel=target).state_dict()[name] == both[name]).all())
    assert float(both["lora_te_q.alpha"]) == 8


def test_products_of_a_lora_by_whole_modules(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        name = f"lora-{epoch:06d}.safetensors"
        write_kohya(tmp_path / name, float(epoch), ss_steps=str(100 * epoch))
    run = posthoc_cli.open_snapshots(tmp_path, raw=True, lora="exact")

    def made(name: str, sigma_rel: float, **how: object) -> Tensors:
        solution = run.solve(sigma_rel=sigma_rel, **how)  # type: ignore[arg-type]
        (path,) = solution.save(tmp_path / "out" / f"{name}.safetensors", lora="exact")
        assert not posthoc_cli.verify(path, tmp_path, full=True).problems
        return dict(read_tensors(path))

    (tmp_path / "out").mkdir()
    both = made("both", 0.2, target_for={"lora_te_*": 0.1})
    wide, narrow = made("wide", 0.2), made("narrow", 0.1)
    for name, values in both.items():
        wanted = narrow if name.startswith("lora_te_") else wide
        assert values.tobytes() == wanted[name].tobytes(), name
    with pytest.raises(UsageError, match="can't have two targets; name whole modules"):
        made("split", 0.2, target_for={"*.lora_up.*": 0.1})


def test_verify_notices_a_changed_byte_in_each_group(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, raw=False)
    solution = posthoc_cli.open_snapshots(folder).solve(
        sigma_rel=0.08, target_for={"*.attn": 0.12, "b.*": 0.06}
    )
    (out,) = solution.save(tmp_path / "out.safetensors")
    original = out.read_bytes()
    header = read_header(out)
    start = len(original) - sum(info.end - info.start for info in header.tensors.values())
    for name, info in header.tensors.items():
        changed = bytearray(original)
        changed[start + info.start + 3] ^= 1
        out.write_bytes(changed)
        (problem,) = posthoc_cli.verify(out, folder).problems
        assert (problem.tensor, problem.element) == (name, (0,))
    recipe = json.loads(header.metadata[RECIPE])
    assert [group["tensors"] for group in recipe["groups"]] == [["*.attn"], ["b.*"]]
    recipe["groups"].reverse()  # of two that fit a tensor, the other then counts
    out.write_bytes(original)
    write_tensors(out, read_tensors(out), {RECIPE: json.dumps(recipe)})
    assert [each.tensor for each in posthoc_cli.verify(out, folder).problems] == ["b.attn"]


# What is given


def test_rules_in_their_order() -> None:
    rules = [("a", 0.1), ("b", "sigma-rel:0.1"), ("c", "gamma:3"), ("d", 0.1), ("a", 0.2)]
    groups = make_groups(rules)
    assert [(group.globs, str(group.target)) for group in groups] == [
        (("b",), "sigma_rel 0.1"),
        (("c",), "gamma 3"),
        (("d",), "sigma_rel 0.1"),
        (("a",), "sigma_rel 0.2"),
    ]
    assert make_groups({"x": groups[1].target})[0].target == groups[1].target
    for wanted in ("0.5", "half", "windo:3", "sigma-rel:", 0.3):
        with pytest.raises(UsageError, match=r"target_for='a\*': .*; "):
            make_groups({"a*": wanted})
    for odd in ("a=0.1", [("a",)], {3: 0.1}, 0.1):
        with pytest.raises(UsageError, match=r"target_for=: has no globs with targets; "):
            make_groups(odd)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "groups",
    [
        7,
        [7],
        [{"tensors": ["a"]}],
        [{"weights": [1.0, 0.0], "tensors": "a"}],
        [{"weights": [1.0], "tensors": ["a"]}],
        [{"weights": [1.0, "1"], "tensors": ["a"]}],
        [{"weights": [1.0, float("nan")], "tensors": ["a"]}],
        [{"weights": [1.0, 0.0], "tensors": ["a"] * 501}] * 2,
    ],
)
def test_groups_of_a_recipe_that_make_no_sense(groups: object) -> None:
    sources = [{"file": file, "step": 1, "weight": 0.5} for file in "ab"]
    with pytest.raises(ValueError, match=r"group|names"):
        ingredients({"sources": sources, "groups": groups})
