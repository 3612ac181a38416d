"""EDM2's pickles, from stand-ins under its classes' names, against torch's own state dict."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats import edm2, read_checkpoint
from posthoc_cli.formats.edm2 import is_edm2, network_state
from tests.formats.test_checkpoints import assert_same
from tests.hostile_pickles import CORPUS, SENTINEL, SOURCE


class EasyDict(dict[str, Any]):
    """A dict of its own kind, as EDM2 saves its snapshots."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("nothing in a file is run")


class Persistent:
    """What is saved as its source code and its attributes."""

    module_src = SOURCE

    def __reduce__(self) -> tuple[Any, ...]:
        state = getattr(self, "__getstate__", lambda: self.__dict__)()
        meta = {
            "type": "class", "version": 6, "module_src": self.module_src,
            "class_name": type(self).__name__, "state": state,
        }  # fmt: skip
        return _reconstruct_persistent_obj, (meta,), None


class Gain(Persistent, torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size, 3, 1, 1))
        self.bias = torch.nn.Parameter(torch.randn([]))
        self.register_parameter("none", None)
        self.register_buffer("freqs", torch.randn(size))
        self.register_buffer("cache", torch.randn(size), persistent=False)
        self.register_buffer("nothing", None)
        self.skip: torch.nn.Module | None = None
        self.arguments = (size, {"kernel": [3, 3]})


class Network(Persistent, torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Gain(2)
        self.enc = torch.nn.ModuleDict({"8x8_conv": Gain(3), "8x8_block0": Gain(400)})
        self.out_gain = torch.nn.Parameter(torch.zeros([]))
        self.list = torch.nn.ModuleList([Gain(1), torch.nn.Sequential(Gain(2))])
        self.tied = self.enc["8x8_conv"]
        self.absent = None
        self.register_buffer("phases", torch.randn(4))


class Loss(Persistent):
    def __init__(self) -> None:
        self.sigma_data = 0.5


class Encoder(Persistent):
    def __init__(self) -> None:
        self.scale = np.float32([1, 2]) / np.float32(3)
        self.final = np.float32(0.5)
        self.kind = np.dtype("float16")

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _vae=None)


def name_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the stand-ins under the names that EDM2's own have."""
    places = {"dnnlib.util": EasyDict, "torch_utils.persistence": _reconstruct_persistent_obj}
    for place, stand_in in places.items():
        module = types.ModuleType(place)
        setattr(module, stand_in.__name__, stand_in)
        monkeypatch.setattr(stand_in, "__module__", place)
        monkeypatch.setitem(sys.modules, place.partition(".")[0], types.ModuleType("package"))
        monkeypatch.setitem(sys.modules, place, module)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    name_stand_ins(monkeypatch)


def snapshot(network: Any, path: Path, protocol: int = 4) -> Path:
    data = EasyDict(encoder=Encoder(), dataset_kwargs=EasyDict(path="x"), loss_fn=Loss())
    data["ema"] = network
    path.write_bytes(pickle.dumps(data, protocol))
    return path


def half(network: torch.nn.Module) -> torch.nn.Module:
    return network.eval().requires_grad_(False).to(torch.float16)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_networks_tensors_are_those_of_its_state_dict(protocol: int, tmp_path: Path) -> None:
    network = half(Network())
    path = snapshot(network, tmp_path / "x.pkl", protocol)
    assert b"torch_utils.persistence" in path.read_bytes()
    checkpoint = read_checkpoint(path)
    assert is_edm2(checkpoint)
    found = network_state(checkpoint)
    assert_same(path, found, network.state_dict())
    assert "first.cache" not in found
    assert found["tied.weight"] == found["enc.8x8_conv.weight"]
    assert list(found)[:2] == ["out_gain", "phases"]


def test_float32_and_the_other_entries(tmp_path: Path) -> None:
    network = Network()
    path = snapshot(network, tmp_path / "x.pkl")
    checkpoint = read_checkpoint(path)
    assert_same(path, network_state(checkpoint), network.state_dict())
    assert checkpoint.root["dataset_kwargs"] == {"path": "x"}


def test_source_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = snapshot(Network(), Path("x.pkl"))
    assert SENTINEL in path.read_text("latin1")
    assert network_state(read_checkpoint(path))
    assert os.listdir() == ["x.pkl"]


def test_other_checkpoints_are_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for value in ({"ema": {"w": torch.ones(2)}}, {"w": torch.ones(2)}, [1], {"ema": None}):
        torch.save(value, path)
        checkpoint = read_checkpoint(path)
        assert not is_edm2(checkpoint)
        with pytest.raises(SnapshotError, match="is not an EDM2 pickle"):
            network_state(checkpoint)


class Wrong(Persistent):
    """A network with attributes that none has."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update({"_parameters": {}, "_buffers": {}, "_modules": {}} | attributes)


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (Wrong(), "has no tensors"),
        (Wrong(_parameters=None), "has no _parameters"),
        (Wrong(_parameters={"w": 3}), "w isn't a tensor"),
        (Wrong(_buffers={3: torch.ones(1)}), "has no _buffers"),
        (Wrong(_buffers=[torch.ones(1)]), "has no _buffers"),
        (Wrong(_modules={"a": 3}), "a module of its network isn't one"),
        (Wrong(_modules={"a": torch.ones(3)}), "a module of its network isn't one"),
        (Wrong(_modules={"a": Wrong(_modules=())}), "has no _modules"),
        (Wrong(_non_persistent_buffers_set=3), "is broken"),
    ],
)
def test_a_broken_network_is_refused(network: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=line):
        network_state(read_checkpoint(snapshot(network, tmp_path / "x.pkl")))


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("a module within itself", "too many modules"),
        ("doubled modules", "too many modules"),
        ("module_src of another version", "modules of another version than 6"),
        ("module_src only", "has no tensors"),
    ],
)
def test_a_hostile_network_is_refused(case: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(CORPUS[case]())
    with pytest.raises(SnapshotError, match=line):
        network_state(read_checkpoint(path))


def test_a_deep_network_is_not_too_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = Wrong(_parameters={"w": torch.ones(1)})
    for _ in range(100):
        network = Wrong(_modules={"m": network})
    path = snapshot(network, tmp_path / "x.pkl")
    assert list(network_state(read_checkpoint(path))) == ["m." * 100 + "w"]
    monkeypatch.setattr(edm2, "_MAX_WORK", 5000)
    with pytest.raises(SnapshotError, match="too many modules"):
        network_state(read_checkpoint(path))
