"""The same network in any form gives the same averages, to the byte."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import posthoc_cli
from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats import How, open_network
from posthoc_cli.storage import Reader, TensorIndex, deflated, fingerprint
from posthoc_cli.storage.deflated import Deflated
from tests.command import Posthoc
from tests.formats.test_edm2 import Network, half, names, snapshot
from tests.synthesis.test_conversion import ema_pytorch, network, posthoc_ema

__all__ = ["names"]  # a fixture

State = dict[str, torch.Tensor]
STEPS = (500, 1000, 1500, 2000)


def weights(step: int) -> State:
    """A network of every kind of tensor; what is averaged differs from step to step."""
    scale = 1 + step / 1000
    return {
        name: tensor * scale if tensor.dtype in (torch.float32, torch.float16) else tensor
        for name, tensor in network().items()
        if name not in ("special", "tied")
    } | {"view": network()["weight"].mul(scale)[5:9, 3:].t()}


def contiguous(state: State) -> State:
    return {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}


def rezipped(
    path: Path, method: int = zipfile.ZIP_STORED, order: str | None = None, level: int = 6
) -> None:
    """An archive again, with its entries deflated, or as a machine of another byte order has it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", method, compresslevel=level) as archive:
        for name, data in entries.items():
            archive.writestr(name, order if order and name.endswith("byteorder") else data)


def as_zip(state: State, path: Path) -> None:
    torch.save({"state_dict": state, "epoch": 3}, path)


def as_legacy(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def as_deflated(state: State, path: Path) -> None:
    as_zip(state, path)
    rezipped(path, zipfile.ZIP_DEFLATED)


def as_pickle(state: State, path: Path) -> None:
    path.write_bytes(pickle.dumps(state, 4))


def as_big_endian(state: State, path: Path) -> None:
    """Each element's bytes the other way round, as torch writes them on such a machine."""

    def swapped(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.element_size() // (2 if tensor.is_complex() else 1)
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
        data = np.ascontiguousarray(data.reshape(-1, size)[:, ::-1]).reshape(-1)
        return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)

    torch.save({name: swapped(tensor) for name, tensor in state.items()}, path)
    rezipped(path, order="big")


def as_shards(state: State, path: Path) -> None:
    folder = path.with_suffix("")
    folder.mkdir()
    places = {}
    for at, name in enumerate(state):
        places[name] = f"pytorch_model-{at % 2 + 1:05}-of-00002.bin"
    for shard in set(places.values()):
        mine = {name: tensor for name, tensor in state.items() if places[name] == shard}
        torch.save(mine, folder / shard)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMS: dict[str, Callable[[State, Path], None]] = {
    "zip": as_zip,
    "legacy": as_legacy,
    "deflated": as_deflated,
    "pickle": as_pickle,
    "big-endian": as_big_endian,
    "shards": as_shards,
}
UNKNOWN_TO = {"legacy": ("e4m3", "e5m2"), "pickle": ("e4m3", "e5m2")}


def data_of(path: Path) -> bytes:
    """A safetensors file's bytes after its header."""
    content = path.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_bytes(form: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    """All of a folder in this form, half of it, and none."""
    for folder in ("none", "half", "all"):
        (tmp_path / folder).mkdir()
        for at, step in enumerate(STEPS):
            state = weights(step)
            for name in UNKNOWN_TO.get(form, ()):
                del state[name]
            place = tmp_path / folder / f"net_{step}_6.94.safetensors"
            if folder == "all" or (folder == "half" and at % 2):
                FORMS[form](state, place.with_suffix(".pt"))
            else:
                save_file(contiguous(state), place)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    made = []
    for folder in ("none", "half", "all"):
        words = (
            "synthesize",
            folder,
            "--sigma-rel",
            "0.1,0.2",
            "-o",
            f"{folder}-{{sigma_rel}}.safetensors",
        )
        done = posthoc_here(*words, "-q")
        assert (done.code, done.err) == (0, "")
        outputs = [tmp_path / f"{folder}-{width}.safetensors" for width in ("0.1", "0.2")]
        made.append([data_of(path) for path in outputs])
        done = posthoc_here("verify", outputs[0], folder, "--full", "--json")
        assert (done.code, done.json["problems"], done.json["fingerprints"]) == (0, [], 4)
    assert made[0] == made[1] == made[2]
    assert {path: path.stat().st_mtime_ns for path in before} == before


# What a folder's files say


def listed(run: Any) -> list[tuple[str, int, float]]:
    return [(each.file, each.step, round(each.sigma_rel, 4)) for each in run.snapshots]


def test_files_of_an_ema_library_beside_safetensors(tmp_path: Path) -> None:
    """Indexes count profiles, and averages that weren't updated at every step have others."""
    state = {"w": torch.ones(3, 4)}
    for step in (1000, 2000):
        ema_pytorch(tmp_path, 0, step, state)
        save_file({"w": torch.ones(3, 4).half()}, tmp_path / f"1.{step}.safetensors")
    run = posthoc_cli.open_snapshots(tmp_path, profiles=[0.05, 0.1], update_every=1)
    assert (run.problems, run.warnings) == ([], [])
    assert listed(run)[:2] == [("0.1000.pt", 1000, 0.05), ("1.1000.safetensors", 1000, 0.1)]
    run = posthoc_cli.open_snapshots(tmp_path, profiles=[0.05, 0.1], update_every=10)
    assert listed(run)[1] == ("0.1000.pt", 1000, 0.2459)
    assert "didn't average over the lengths asked for" in run.warnings[0][1]
    run = posthoc_cli.open_snapshots(tmp_path, profiles=[0.05, 0.1])
    assert "its default is 100: give update_every=" in run.warnings[0][1]


def test_a_counter_that_started_late(tmp_path: Path) -> None:
    for step in (1000, 2000):
        posthoc_ema(tmp_path / f"0.{step}.pt", torch.tensor(step - 99), w=torch.ones(3))
    run = posthoc_cli.open_snapshots(tmp_path, profiles=[0.05], update_every=1)
    assert listed(run) == [("0.1000.pt", 901, 0.05), ("0.2000.pt", 1901, 0.05)]


def test_pickles_of_edm2(tmp_path: Path, names: None, posthoc_here: Posthoc) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "same").mkdir()
    for kimg in (0, 2147, 4295):
        for width in ("0.050", "0.100"):
            net = half(Network())
            snapshot(net, tmp_path / "run" / f"network-snapshot-{kimg:07}-{width}.pkl")
            if kimg:
                name = f"network-snapshot-{kimg:07}-{width}.safetensors"
                save_file(contiguous(net.state_dict()), tmp_path / "same" / name)
    (tmp_path / "run" / "training-state-0002147.pt").write_bytes(b"")
    run = posthoc_cli.open_snapshots(tmp_path / "run")
    assert [each.step for each in run.snapshots] == [2147328] * 2 + [4295680] * 2
    assert {file for file, _ in run.skipped} == {
        "network-snapshot-0000000-0.050.pkl",
        "network-snapshot-0000000-0.100.pkl",
        "training-state-0002147.pt",
    }
    made = []
    for folder in ("run", "same"):
        done = posthoc_here(
            "synthesize", folder, "--sigma-rel", "0.07", "-o", "out.safetensors", "--force"
        )
        assert done.code == 0, done.err
        made.append(data_of(tmp_path / "out.safetensors"))
    assert made[0] == made[1]


def test_a_choice_of_several_files_is_told_once(posthoc_here: Posthoc, tmp_path: Path) -> None:
    """The recipe says how its sources were read: verify needs no option."""
    for step in STEPS:
        both = {
            "model": {"w": torch.full((9,), step / 7)},
            "ema": {"w": torch.full((9,), 1.0 * step)},
        }
        torch.save(both, tmp_path / f"net_{step}_6.94.pt")
    save_file({"w": torch.full((9,), 2500.0)}, tmp_path / "net_2500_6.94.safetensors")
    done = posthoc_here("inspect", ".", "--json")
    (problem,) = done.json["problems"]
    assert problem["message"].endswith(
        "(model, ema), as 3 more do; choose one with --key model (1 tensor, 36 B) or --key ema "
        "(1 tensor, 36 B)"
    )
    words = ("synthesize", ".", "--sigma-rel", "0.1", "--key", "ema", "-o", "../out.safetensors")
    assert posthoc_here(*words).code == 0
    done = posthoc_here("verify", "../out.safetensors", ".", "--full", "--json")
    assert (done.code, done.json["sources"], done.json["fingerprints"]) == (0, 5, 5)
    torch.save({"ema": {"w": torch.ones(9)}}, tmp_path / "net_500_6.94.pt")
    assert posthoc_here("verify", "../out.safetensors", ".").code == 3
    (tmp_path.parent / "out.safetensors").unlink()


def test_what_is_no_network_is_left_out(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save({"w": torch.ones(3) * step}, tmp_path / f"net_{step}.pt")
    torch.save(torch.optim.Adam([torch.ones(2)]).state_dict(), tmp_path / "opt200.pt")
    torch.save([1.0, 2.0], tmp_path / "losses.pt")
    (tmp_path / "vocab.bin").write_bytes(b"hello world")
    run = posthoc_cli.open_snapshots(tmp_path, raw=True)
    assert (len(run.snapshots), run.problems) == (2, [])
    assert dict(run.skipped) == {
        "losses.pt": "holds no tensors",
        "opt200.pt": "an optimizer's state",
        "vocab.bin": "neither a checkpoint of torch nor a pickle, but plain text ('hello world')",
    }


# Deflated entries


def inflated(data: bytes) -> tuple[Deflated, bytes]:
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(data) + packer.flush()
    return Deflated(5, len(packed), len(data)), b"12345" + packed


def test_deflated_bytes_from_anywhere_and_several_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deflated, "SPACING", 1 << 12)
    monkeypatch.setattr(deflated, "MOST_STATES", 20)
    data = np.random.default_rng(0).integers(0, 9, 300_000, np.uint8).tobytes()
    content, file = inflated(data)
    asked = []

    def read(offset: int, into: memoryview) -> None:
        asked.append(len(into))
        into[:] = file[offset : offset + len(into)]

    opened = content.open([read])
    wrong = []

    def work(seed: int) -> None:
        chance = np.random.default_rng(seed)
        for _ in range(30):
            start = int(chance.integers(0, len(data)))
            into = bytearray(int(chance.integers(0, min(20_000, len(data) - start))))
            opened(start, memoryview(into))
            wrong.extend([start] if into != data[start : start + len(into)] else [])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert wrong == []
    assert len(deflated._states) <= 20
    at_first = sum(asked)
    opened(290_000, memoryview(bytearray(10_000)))
    asked.clear()
    opened(290_000, memoryview(bytearray(10_000)))
    assert sum(asked) < at_first / 100  # from a state nearby, not from the beginning


@pytest.mark.parametrize("cut", [100, 5000])
def test_deflated_bytes_that_are_broken(cut: int) -> None:
    content, file = inflated(bytes(range(256)) * 100)
    short = Deflated(5, content.packed - min(cut, content.packed - 1), content.length)

    def read(offset: int, into: memoryview) -> None:
        into[:] = file[offset : offset + len(into)]

    with pytest.raises(SnapshotError, match="can't be inflated"):
        short.open([read])(0, memoryview(bytearray(content.length)))


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_deflated_checkpoint_that_is_damaged_is_never_another(tmp_path: Path, level: int) -> None:
    """Most damage can be inflated, to other values: the archive's checksums tell."""
    for step in (10, 20):
        path = tmp_path / f"model_{step}.pt"
        torch.save({"w": torch.arange(4096.0) * step, "b": torch.rand(9)}, path)
        rezipped(path, zipfile.ZIP_DEFLATED, level=level)
    whole = path.read_bytes()

    def average() -> dict[str, torch.Tensor]:
        run = posthoc_cli.open_snapshots(tmp_path, raw=True)
        return run.solve(window=15, method="share").state_dict()

    right, refused = average(), []
    for at in range(97, len(whole), len(whole) // 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = average()
        except SnapshotError as error:
            refused.append(str(error))
        else:
            assert all(torch.equal(found[name], each) for name, each in right.items())
    assert len(refused) > 20
    assert [each for each in refused if "model_20.pt" not in each] == []


# Many alike


def test_files_that_lie_alike_share_one_table(tmp_path: Path) -> None:
    """Whether their pickles are the same, or count the steps."""
    for step in STEPS:
        state = {f"layer.{at}": torch.full((3, 2), float(step)) for at in range(20)}
        state["tied"] = state["layer.0"]
        torch.save(state, tmp_path / f"same_{step}_6.94.pt")
        torch.save({"step": step, "model": state}, tmp_path / f"step_{step}_6.94.pt")
        content = contiguous(state)
        save_file(content, tmp_path / f"file_{step}_6.94.safetensors")
    for kind in ("same", "step"):
        run = posthoc_cli.open_snapshots(tmp_path, only=[f"{kind}_*"])
        assert len({id(each.index.tensors) for each in run.snapshots}) == 1
        for each in run.snapshots:
            twin = open_network(tmp_path / f"file_{each.step}_6.94.safetensors")
            for name in each.index.tensors:
                assert read(each.index, name) == read(twin, name), (kind, name)
        assert len({fingerprint(each.index) for each in run.snapshots}) == len(STEPS)


def read(index: TensorIndex, name: str) -> bytes:
    info = index.tensors[name]
    data = bytearray(info.end - info.start)
    with Reader(index) as reader:
        reader.read(info.start, memoryview(data))
    return bytes(data)


def test_the_same_bytes_that_refer_to_something_else(tmp_path: Path) -> None:
    """A pickle's tensor is not that of the file before where its types are others."""
    found = {}
    for dtype in (torch.float32, torch.int32):
        torch.save({f"w{at}": torch.ones(4, dtype=dtype) for at in range(3)}, tmp_path / "x.pt")
        found[dtype] = (tmp_path / "x.pt").read_bytes()
    for at, content in enumerate(found.values()):
        (tmp_path / f"{at}_{at + 1}_6.94.pt").write_bytes(content)
    cache: dict[Any, Any] = {}
    dtypes = [
        {info.dtype for info in open_network(tmp_path / name, cache=cache).tensors.values()}
        for name in ("0_1_6.94.pt", "1_2_6.94.pt", "0_1_6.94.pt")
    ]
    assert dtypes == [{"F32"}, {"I32"}, {"F32"}]


def test_nothing_is_given_where_there_is_no_such_key(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(SnapshotError, match="has nothing at key='ema'; there is model"):
        open_network(tmp_path / "a.pt", How(key="ema"))
