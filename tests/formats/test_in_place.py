"""The same network in any form gives the same averages, to the byte."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.command import Posthoc
from tests.formats.test_edm2 import names
from tests.synthesis.test_conversion import network

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


def rezipped(path: Path, method: int = zipfile.ZIP_STORED, order: str | None = None) -> None:
    """An archive again, with its entries deflated, or as a machine of another byte order has it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
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
