"""Networks in several files: read like those in one, and written so that others can load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from posthoc_cli.errors import IncompleteError, SnapshotError, UsageError
from posthoc_cli.snapshots.folder import Snapshot, read_folder
from posthoc_cli.solver.profiles import Profile
from posthoc_cli.storage.header import TensorInfo
from posthoc_cli.storage.shards import made_by_posthoc, open_tensors, shard_paths, split
from posthoc_cli.synthesis import engine as synthesis
from posthoc_cli.synthesis.outputs import write_outputs
from tests.command import Posthoc
from tests.support import plan_of, write_shards

RECIPE = {"sources": []}


def some_tensors(seed: int) -> dict[str, npt.NDArray]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((40, 5)).astype(np.float32),
        "b": rng.standard_normal(301).astype(np.float16),
        "c.bias": rng.standard_normal(7).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "steps": np.array(seed, np.int64),
    }


GROUPS = (["b", "empty"], ["a"], ["steps", "c.bias"])


def snapshot_at(path: Path, step: int) -> Snapshot:
    return Snapshot(open_tensors(path), Profile(step, 6.94), "metadata")


def test_shards_and_folders_sum_to_the_bytes_of_single_files(tmp_path: Path) -> None:
    singles, others = [], []
    for step in (1, 2, 3):
        tensors = some_tensors(step)
        save_file(tensors, tmp_path / f"{step}.safetensors")
        singles.append(snapshot_at(tmp_path / f"{step}.safetensors", step))
        place = tmp_path / f"run-{step}"
        if step == 1:
            others.append(snapshot_at(write_shards(place, tensors, GROUPS), step))
        elif step == 2:  # a folder of shards
            write_shards(place, tensors, GROUPS[::-1])
            others.append(snapshot_at(place, step))
        else:  # a folder with one file
            place.mkdir()
            save_file(tensors, place / "diffusion_pytorch_model.safetensors")
            others.append(snapshot_at(place, step))
    weights = np.array([[0.25, -0.5, 1.25]])
    outputs = tmp_path / "single.safetensors", tmp_path / "sharded.safetensors"
    for snapshots, output in zip((singles, others), outputs, strict=True):
        write_outputs(plan_of(snapshots), weights, [output], [RECIPE], row_bytes=512)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert load_file(outputs[0])["steps"] == 3


def test_a_folder_of_all_kinds_of_snapshots(tmp_path: Path) -> None:
    save_file(some_tensors(1), tmp_path / "run_100_6.94.safetensors")
    write_shards(tmp_path / "run_200_6.94", some_tensors(2), GROUPS)
    (tmp_path / "checkpoint-3").mkdir()
    save_file(
        some_tensors(3), tmp_path / "checkpoint-3" / "x.safetensors", {"step": "300", "gamma": "7"}
    )
    write_shards(tmp_path, some_tensors(4), GROUPS, {"step": "400"}, stem="run_400_6.94")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events.txt").write_text("")
    inventory = read_folder(tmp_path)
    assert not inventory.problems
    assert not inventory.skipped
    found = [(each.file, each.step, each.source) for each in inventory.usable()]
    assert found == [
        ("run_100_6.94.safetensors", 100, "name"),
        ("run_200_6.94", 200, "name"),
        ("checkpoint-3", 300, "metadata"),
        ("run_400_6.94.safetensors.index.json", 400, "name"),
    ]
    assert {each.tensors for each in inventory.snapshots} == {5}
    sizes = [each.bytes for each in inventory.snapshots]
    assert sizes[1] == sum(p.stat().st_size for p in (tmp_path / "run_200_6.94").glob("*.safet*s"))


def test_a_pattern_fits_the_names_of_folders(tmp_path: Path) -> None:
    for step in (10, 20):
        write_shards(tmp_path / f"checkpoint-{step}-ema-0.05", some_tensors(step), GROUPS)
    inventory = read_folder(tmp_path, pattern="checkpoint-{step}-ema-{sigma_rel}")
    assert [(each.step, each.sigma_rel) for each in inventory.usable()] == [(10, 0.05), (20, 0.05)]


def test_folders_that_are_no_snapshots_are_said_to_be_left_out(tmp_path: Path) -> None:
    save_file(some_tensors(1), tmp_path / "run_100_6.94.safetensors")
    for name in ("old/a_1_6.94", "old/b_2_6.94", "backup/whatever"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(some_tensors(1), tmp_path / f"{name}.safetensors")
    inventory = read_folder(tmp_path)
    assert len(inventory.usable()) == 1
    assert dict(inventory.skipped) == {
        "backup": "a folder, and neither its name nor its metadata says its step and profile",
        "old": "a folder with 2 .safetensors files and not one index",
    }


def test_shards_of_one_network_share_their_tensors_with_the_next(tmp_path: Path) -> None:
    cache: dict = {}
    layouts = [
        open_tensors(write_shards(tmp_path / str(step), some_tensors(step), GROUPS), cache)
        for step in (1, 2)
    ]
    assert layouts[0].tensors is layouts[1].tensors
    assert len(layouts[0].parts) == 3


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": {"a": "../model-00002-of-00003.safetensors"}}',
        b'{"weight_map": {"a": "C:\\\\x.safetensors"}}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": "index.json"}}',
        b'{"weight_map": ' + b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_an_index_that_makes_no_sense(tmp_path: Path, index: bytes) -> None:
    path = write_shards(tmp_path, some_tensors(1), GROUPS)
    path.write_bytes(index)
    with pytest.raises(SnapshotError, match=r"not an index of shards \(.*\); copy it again") as e:
        open_tensors(path)
    assert "\n" not in str(e.value)


def test_a_missing_shard_may_still_be_being_written(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "run_5_6.94", some_tensors(1), GROUPS)
    save_file(some_tensors(1), tmp_path / "run_4_6.94.safetensors")
    index.with_name("model-00002-of-00003.safetensors").unlink()
    with pytest.raises(IncompleteError, match=r"its shard 'model-00002-of-00003.safet.*' is miss"):
        open_tensors(index)
    assert [file for file, _ in read_folder(tmp_path).problems] == ["run_5_6.94"]
    inventory = read_folder(tmp_path, skip_incomplete=True)
    assert [each.step for each in inventory.usable()] == [4]
    assert inventory.skipped[0][1].startswith("incomplete: its shard")


def test_an_index_and_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    index = write_shards(tmp_path, some_tensors(1), GROUPS)
    document = json.loads(index.read_text())
    for change, message in (
        ({"b": "model-00002-of-00003.safetensors"}, "tensor 'b' is in 'model-00001.*by the index"),
        ({"new": "model-00001-of-00003.safetensors"}, "tensor 'new' is in none, but by the index"),
    ):
        index.write_text(json.dumps({"weight_map": document["weight_map"] | change}))
        with pytest.raises(SnapshotError, match=message):
            open_tensors(index)
    save_file({"a": some_tensors(1)["a"]}, tmp_path / "model-00001-of-00003.safetensors")
    index.write_text(json.dumps(document))
    with pytest.raises(SnapshotError, match="tensor 'a' is in two shards"):
        open_tensors(index)


# Outputs


def test_split_goes_by_size_and_keeps_the_order() -> None:
    sizes = {"a": 5, "b": 5, "c": 11, "d": 0, "e": 4, "f": 6}
    infos, at = {}, 0
    for name, size in sizes.items():
        infos[name] = TensorInfo("U8", (size,), at, at + size)
        at += size
    assert split(infos, 10) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert split(infos, 100) == [list(sizes)]
    assert split(infos, 1) == [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]


def three_snapshots(folder: Path) -> list[Snapshot]:
    folder.mkdir()
    for step in (1, 2, 3):
        save_file(some_tensors(step), folder / f"{step}.safetensors", {"about": "a run"})
    return [snapshot_at(folder / f"{step}.safetensors", step) for step in (1, 2, 3)]


def write(snapshots: Sequence[Snapshot], output: Path, **options: object) -> synthesis.Written:
    weights = np.array([[0.25, -0.5, 1.25]])
    return write_outputs(
        plan_of(snapshots),
        weights,
        [output],
        [RECIPE],
        row_bytes=512,
        **options,  # type: ignore[arg-type]
    )


def test_shards_hold_what_a_single_file_would(tmp_path: Path) -> None:
    snapshots = three_snapshots(tmp_path / "in")
    write(snapshots, tmp_path / "whole.safetensors", shard_bytes=10**6)
    out = tmp_path / "out.safetensors"
    written = write(snapshots, out, shard_bytes=900)
    paths = [*shard_paths(out, 2), tmp_path / "out.safetensors.index.json"]
    assert [(*out.shards, out.path) for out in written.outputs] == [tuple(paths)]
    assert written.outputs[0].bytes == sum(path.stat().st_size for path in paths)
    index = json.loads(paths[-1].read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in some_tensors(1).values())}
    loaded = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    whole = load_file(tmp_path / "whole.safetensors")
    assert loaded.keys() == whole.keys()
    for name, tensor in whole.items():
        assert loaded[name].tobytes() == tensor.tobytes()
        assert loaded[name].shape == tensor.shape
    layout = open_tensors(paths[-1])
    assert layout.metadata["about"] == "a run"
    assert layout.metadata["format"] == "pt"
    assert made_by_posthoc(paths[-1])
    assert not out.exists()


def test_an_output_in_shards_is_replaced_only_by_force_and_then_wholly(tmp_path: Path) -> None:
    snapshots = three_snapshots(tmp_path / "in")
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "ema.safetensors"
    write(snapshots, out, shard_bytes=200)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for shard_bytes in (None, 200, 900):
        with pytest.raises(UsageError, match=r"index\.json: exists already; use force=True"):
            write(snapshots, out, shard_bytes=shard_bytes)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    write(snapshots, out, shard_bytes=900, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema-00001-of-00002.safetensors",
        "ema-00002-of-00002.safetensors",
        "ema.safetensors.index.json",
    ]
    write(snapshots, out, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["ema.safetensors"]
    write(snapshots, out, shard_bytes=900, overwrite=True)
    assert "ema.safetensors" not in {path.name for path in folder.iterdir()}


def test_shards_without_an_index_go_only_by_force_and_only_ours(tmp_path: Path) -> None:
    snapshots = three_snapshots(tmp_path / "in")
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "ema.safetensors"
    write(snapshots, out, shard_bytes=200)
    (folder / "ema.safetensors.index.json").unlink()
    (folder / "ema-00003-of-00004.safetensors").unlink()
    foreign = folder / "ema-00001-of-00009.safetensors"
    shutil.copy(tmp_path / "in" / "1.safetensors", foreign)
    of_another = folder / "ema-00002-of-00009.safetensors"
    shutil.copy(folder / "ema-00001-of-00004.safetensors", of_another)
    other = folder / "other.safetensors.index.json"
    other.write_text(json.dumps({"weight_map": {"a": of_another.name}}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"ema-00001-of-00004\.safetensors: exists already"):
        write(snapshots, out, shard_bytes=200)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write(snapshots, out)
    out.unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write(snapshots, out, shard_bytes=900, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema-00001-of-00002.safetensors",
        foreign.name,
        "ema-00002-of-00002.safetensors",
        of_another.name,
        "ema.safetensors.index.json",
        other.name,
    ]
    assert open_tensors(folder / "ema.safetensors.index.json").tensors.keys() == {*some_tensors(1)}


def test_a_shard_takes_no_other_files_place_even_by_force(tmp_path: Path) -> None:
    snapshots = three_snapshots(tmp_path / "in")
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "ema.safetensors"
    write(snapshots, out)
    shutil.copy(tmp_path / "in" / "1.safetensors", folder / "ema-00002-of-00002.safetensors")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"00002\.safetensors: exists already, and is no shard"):
        write(snapshots, out, shard_bytes=900, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_was_faster_keeps_its_shards(tmp_path: Path) -> None:
    snapshots = three_snapshots(tmp_path / "in")
    folder = tmp_path / "out"
    folder.mkdir()
    write(snapshots, folder / "ema.safetensors", shard_bytes=900)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.rename(tmp_path / "faster")
    folder.mkdir()

    def the_other_is_done(_: object) -> None:
        shutil.copytree(tmp_path / "faster", folder, dirs_exist_ok=True)

    snapshots[0], snapshots[2] = snapshots[2], snapshots[0]  # other sums
    with pytest.raises(UsageError, match=r"index\.json: exists already"):
        write(snapshots, folder / "ema.safetensors", shard_bytes=900, progress=the_other_is_done)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_writes_shards(
    posthoc: Posthoc, tmp_path: Path, snapshots: Path, check_json: object
) -> None:
    arguments = "synthesize", "snapshots", "--sigma-rel", "0.07", "--max-shard-size", "60B"
    run = posthoc(*arguments, "-o", "ema.safetensors", "--json")
    assert run.code == 0, run
    check_json("synthesize", run.json)  # type: ignore[operator]
    target = run.json["targets"][0]
    assert target["output"] == "ema.safetensors.index.json"
    assert len(target["shards"]) == 2
    assert "made of" not in run.err
    again = posthoc(*arguments, "-o", "ema.safetensors", "--skip-existing", "--json")
    assert again.json["targets"][0] == target | {"skipped": True, "seconds": 0}
    shown = posthoc("inspect", "ema.safetensors.index.json")
    assert shown.code == 0
    assert "sigma_rel 0.07" in shown.out
    assert posthoc("inspect", target["shards"][1]) == shown
    posthoc(*arguments, "-o", "ema.safetensors").failed(2, "ema.*index.json: exists already; .*")
    posthoc(*arguments[:-1], "5X", "-o", "x.safetensors").failed(
        2, "--max-shard-size: '5X' is no size; give, say, 1.2GB"
    )


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    states = []
    for step in (1, 2):
        torch.manual_seed(step)
        model = transformers.BertModel(config)
        model.save_pretrained(tmp_path / f"ema-{step}", max_shard_size="8KB")
        states.append(model.state_dict())
    snapshots = [snapshot_at(tmp_path / f"ema-{step}", step) for step in (1, 2)]
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(tmp_path / "ema-1" / "config.json", folder)
    write_outputs(
        plan_of(snapshots),
        np.array([[0.25, 0.75]]),
        [folder / "model.safetensors"],
        [RECIPE],
        shard_bytes=8000,
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = transformers.BertModel.from_pretrained(folder).state_dict()
    for name, value in loaded.items():
        wanted = 0.25 * states[0][name].double() + 0.75 * states[1][name].double()
        assert torch.equal(value, wanted.to(value.dtype)), name
