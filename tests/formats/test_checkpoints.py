"""Where tensors lie in torch's files, against what torch saved."""

from __future__ import annotations

import collections
import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from posthoc_cli.errors import MachineError, SnapshotError
from posthoc_cli.formats import StoredTensor, read_checkpoint, state_dict
from posthoc_cli.formats.pickles import Call, Span
from posthoc_cli.storage import File
from posthoc_cli.storage.dtypes import DTYPES
from tests.hostile_pickles import CORPUS, end_field, one_tensor, zipped

TORCH = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
CONTAINERS = ["zip", "legacy", "pickle"]


def save(value: Any, path: Path, container: str, protocol: int = 2) -> Path:
    if container == "pickle":
        path.write_bytes(pickle.dumps(value, max(protocol, 3)))
    else:
        torch.save(
            value,
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=container == "zip",
        )
    return path


def content(path: Path, tensor: StoredTensor) -> bytes:
    """The elements of a stored tensor in their order, gathered without torch."""
    if not tensor.elements:
        return b""
    size = DTYPES[tensor.dtype].bits // 8
    raw = np.fromfile(path, np.uint8)
    view = np.lib.stride_tricks.as_strided(
        raw[tensor.offset :], (*tensor.shape, size), (*(s * size for s in tensor.strides), 1)
    )
    return view.tobytes()


def saved_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(path: Path, found: dict[str, StoredTensor], saved: dict[str, Any]) -> None:
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        stored = found[name]
        assert stored.dtype == TORCH[tensor.dtype], name
        assert stored.shape == tuple(tensor.shape), name
        assert stored.elements == tensor.numel(), name
        assert stored.bytes == tensor.numel() * tensor.element_size(), name
        assert stored.contiguous == tensor.is_contiguous(), name
        assert content(path, stored) == saved_bytes(tensor), name


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits that the dtype has."""
    generator = torch.Generator().manual_seed(len(shape))
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(high, (math.prod(shape) * size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_every_dtype_is_found_bit_for_bit(
    dtype: torch.dtype, container: str, tmp_path: Path
) -> None:
    saved = {"a": random(dtype, 3, 5), "b": random(dtype, 7), "none": random(dtype, 0, 3)}
    saved["scalar"] = random(dtype, 1).reshape(())
    path = save(saved, tmp_path / "x.pt", container)
    assert_same(path, state_dict(read_checkpoint(path)), saved)


def views() -> dict[str, torch.Tensor]:
    base = random(torch.float32, 4, 6, 5, 3)
    return {
        "base": base,
        "tied": base,
        "channels_last": random(torch.float16, 2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 2),
        "offset": base[2, 1:4],
        "strided": base[::2, :, 1::3],
        "expanded": base[:1].expand(3, 6, 5, 3),
        "column": base[:, 0, 0, 0],
        "one": base[3, 5, 4, 2],
        "empty at the end": base[4:],
        "one of a dimension": base[:, :1],
        "parameter": torch.nn.Parameter(random(torch.float32, 3)),
        "buffer": torch.nn.Buffer(random(torch.float32, 3)),
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_are_found_in_their_storages(container: str, protocol: int, tmp_path: Path) -> None:
    saved = views()
    path = save(saved, tmp_path / "x.pt", container, protocol)
    found = state_dict(read_checkpoint(path))
    assert_same(path, found, saved)
    assert found["tied"] == found["base"]
    assert found["offset"].offset > found["base"].offset


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_networks_state_dict(container: str, tmp_path: Path) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(4, 5)
    )
    path = save(network.state_dict(), tmp_path / "x.pt", container)
    found = state_dict(read_checkpoint(path))
    assert_same(path, found, network.state_dict())
    assert "1.num_batches_tracked" in found


@pytest.mark.parametrize("container", CONTAINERS)
def test_everything_else_is_plain_data(container: str, tmp_path: Path) -> None:
    counter = collections.Counter("aab")
    value = {
        "step": 3, "lr": 1e-3, "name": "ü", "none": None, "on": True, "list": [1, (2, 3)],
        "ordered": collections.OrderedDict(a=1), "counter": counter, "size": torch.Size([2, 3]),
        "default": collections.defaultdict(int, {"k": 4}), "set": {5},
    }  # fmt: skip
    root = read_checkpoint(save(value, tmp_path / "x.pt", container)).root
    assert root == {**value, "set": [5], "ordered": {"a": 1}, "default": {"k": 4}}


def test_what_has_no_plain_form_is_kept_unread(tmp_path: Path) -> None:
    value = {
        "device": torch.device("cuda", 0), "dtype": torch.float16, "bytes": b"abc",
        "array": np.arange(3), "number": np.float32(2), "data": bytearray(b"xy"), "z": 1 + 2j,
        "w": torch.zeros(2),
    }  # fmt: skip
    for protocol in (2, 3, 4, 5):
        path = save(value, tmp_path / "x.pt", "zip", protocol)
        root = read_checkpoint(path).root
        assert str(root["device"].function) == "torch.device"
        assert root["device"].args[0] == "cuda"
        assert str(root["dtype"]) == "torch.float16"
        assert isinstance(root["array"], Call)
        assert isinstance(root["number"], Call)
        assert isinstance(root["z"], Call)
        if protocol > 2:
            span = root["bytes"]
            assert isinstance(span, Span)
            assert path.read_bytes()[span.offset :][: span.length] == b"abc"


def test_an_optimizer_and_its_network(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2).state_dict()
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]}
    value = {"model": network, "optimizer": optimizer, "epoch": 3}
    path = save(value, tmp_path / "x.pt", "zip")
    checkpoint = read_checkpoint(path)
    assert_same(path, state_dict(checkpoint), network)
    assert_same(path, state_dict(checkpoint, "optimizer.state.0"), moments)


def test_a_file_says_when_it_was_changed(tmp_path: Path) -> None:
    path = save({"w": torch.zeros(3)}, tmp_path / "x.pt", "zip")
    checkpoint = read_checkpoint(path)
    status = path.stat()
    assert checkpoint.file == File(path, status.st_size, status.st_mtime_ns, status.st_ino)


def test_many_storages_and_a_wide_directory(tmp_path: Path) -> None:
    saved = {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(500)}
    path = save(saved, tmp_path / "x.pt", "zip")
    assert_same(path, state_dict(read_checkpoint(path)), saved)


def test_places_and_lengths_of_64_bits(tmp_path: Path) -> None:
    """As an archive above 4 GB has them, in a small one."""
    path = tmp_path / "x.pt"
    good = zipped(one_tensor(), {"0": b"0123456789abcdef"})
    end = good.rindex(b"PK\x05\x06")
    count, _, start = struct.unpack_from("<H2L", good, end + 10)
    entry = good.rindex(b"PK\x01\x02", 0, end)
    packed, length = struct.unpack_from("<2L", good, entry + 20)
    (place,) = struct.unpack_from("<L", good, entry + 42)
    wide = bytearray(good[entry:end])
    struct.pack_into("<2L", wide, 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<L", wide, 42, 2**32 - 1)
    other = struct.pack("<2H4s", 0x5455, 4, b"time")
    extra = other + struct.pack("<2H3Q", 1, 24, length, packed, place)
    struct.pack_into("<H", wide, 30, len(extra))
    directory = good[start:entry] + bytes(wide) + extra
    at = start + len(directory)
    last = struct.pack(
        "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), start
    )
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    nothing = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
    path.write_bytes(good[:start] + directory + last + locator + nothing)
    tensor = state_dict(read_checkpoint(path))["w"]
    assert content(path, tensor) == b"0123456789abcdef"


def test_entries_are_counted_where_they_are(tmp_path: Path) -> None:
    """What the archive says of their number is of no use: it may be cut to 16 bits."""
    path = tmp_path / "x.pt"
    path.write_bytes(end_field(10, "<H", 65535))
    assert state_dict(read_checkpoint(path))["w"].shape == (4,)


def test_attributes_of_parameters_are_left_out(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    tensor = torch.ones(3)
    tensor.note = "x"  # type: ignore[attr-defined]
    saved = {"p": parameter, "t": tensor}
    path = save(saved, tmp_path / "x.pt", "zip")
    assert_same(path, state_dict(read_checkpoint(path)), saved)


# Which dict.


def checkpoint_of(value: Any, tmp_path: Path) -> Any:
    return read_checkpoint(save(value, tmp_path / "x.pt", "zip"))


def test_the_only_dict_of_tensors_is_found(tmp_path: Path) -> None:
    one, two = torch.zeros(1), torch.ones(2)
    for value in (
        {"w": two, "step": 3, "_metadata": None, "initted": True},
        {"ema": {"w": two}, "step": 3, "lists": [one], "deep": {"er": {"w": one}}},
    ):
        found = state_dict(checkpoint_of(value, tmp_path))
        assert {name: tensor.shape for name, tensor in found.items()} == {"w": (2,)}


def test_several_dicts_ask_for_a_key(tmp_path: Path) -> None:
    one, two = torch.zeros(1), torch.ones(2)
    checkpoint = checkpoint_of({"model": {"w": one}, "ema": {"w": two}, "step": 1}, tmp_path)
    with pytest.raises(SnapshotError, match=r"several dicts of tensors \(model, ema\); .*key="):
        state_dict(checkpoint)
    assert state_dict(checkpoint, "ema")["w"].shape == (2,)


def test_a_tensor_beside_the_weights_does_not_hide_them(tmp_path: Path) -> None:
    ema = {"w": torch.ones(2)}
    checkpoint = checkpoint_of({"step": torch.tensor(3), "ema": ema}, tmp_path)
    assert list(state_dict(checkpoint)) == ["w"]  # a counter is no network
    checkpoint = checkpoint_of({"mean": torch.ones(3), "ema": ema}, tmp_path)
    with pytest.raises(SnapshotError, match=r"several dicts of tensors \(\., ema\)"):
        state_dict(checkpoint)
    assert list(state_dict(checkpoint, ".")) == ["mean"]
    assert list(state_dict(checkpoint, "ema")) == ["w"]


def test_keys_reach_through_dicts_and_lists(tmp_path: Path) -> None:
    value = {
        "ema": {"emas": [{"w": torch.zeros(1)}, {"w": torch.zeros(2)}], "stds": [0.05, 0.1]},
        "a.b": {"c": {"w": torch.zeros(3)}},
        "a": {"b": {"c": {"w": torch.zeros(4)}}},
        7: {"w": torch.zeros(5)},
    }
    checkpoint = checkpoint_of(value, tmp_path)
    shapes = {"ema.emas.0": 1, "ema.emas.1": 2, "a.b.c": 3, "7": 5}
    for key, length in shapes.items():
        assert state_dict(checkpoint, key)["w"].shape == (length,)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("emma", "has nothing at key='emma'; there is model, ema"),
        ("ema.x", "has nothing at key='ema.x'; there is nothing to choose from"),
        ("ema.w.x", "has nothing at key='ema.w.x'; there is nothing to choose from"),
        ("step", "no dict of tensors at key='step'; there is model, ema"),
        ("", "has nothing at key=''; there is model, ema"),
    ],
)
def test_a_wrong_key_says_what_there_is(key: str, line: str, tmp_path: Path) -> None:
    value = {"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}, "step": 1}
    with pytest.raises(SnapshotError) as caught:
        state_dict(checkpoint_of(value, tmp_path), key)
    assert str(caught.value).endswith(line)


@pytest.mark.parametrize("value", [{}, [], None, 3, {"a": {"b": {"w": torch.ones(1)}}}])
def test_no_dict_of_tensors_at_all(value: Any, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="holds no dict of tensors"):
        state_dict(checkpoint_of(value, tmp_path))


def test_names_are_left_as_they_are(tmp_path: Path) -> None:
    names = ["module.w", "_orig_mod.w", "a b", "", "x\n\x1b[2J"]
    value = {name: torch.ones(1) for name in names} | {3: torch.ones(1)}
    assert list(state_dict(checkpoint_of(value, tmp_path))) == names


# What is refused.


def other_tensors() -> dict[str, tuple[torch.Tensor, str]]:
    dense = torch.eye(3)
    quantized = torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)

    return {
        "sparse": (dense.to_sparse(), "holds a sparse tensor"),
        "csr": (dense.to_sparse_csr(), "holds a sparse tensor"),
        "quantized": (quantized, "holds a quantized tensor"),
        "meta": (torch.empty(2, device="meta"), "holds a tensor on the meta device"),
        "complex128": (dense.to(torch.complex128), "holds a tensor of dtype complex128"),
        "conjugate": (dense.to(torch.complex64).conj(), "conjugate or negative view"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "csr", "quantized", "meta", "complex128", "conjugate"])
def test_tensors_with_no_place_in_safetensors_are_named(kind: str, tmp_path: Path) -> None:
    tensor, line = other_tensors()[kind]
    path = save({"w": tensor}, tmp_path / "x.pt", "zip")
    with pytest.raises(SnapshotError, match=line):
        read_checkpoint(path)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_whole_module_is_named(container: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save(torch.nn.Linear(2, 2), path, container)
    checkpoint = read_checkpoint(path)  # its parts are data, but no state dict
    with pytest.raises(SnapshotError, match=r"needs 'torch\.nn\.modules\.linear\.Linear'"):
        state_dict(checkpoint)


@pytest.mark.filterwarnings("ignore")
def test_other_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(SnapshotError, match=r"TorchScript .*torch\.jit\.load"):
        read_checkpoint(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(SnapshotError, match=r"\.npz archive of numpy"):
        read_checkpoint(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(SnapshotError, match="is a safetensors file already"):
        read_checkpoint(path)


def test_a_pickle_of_protocol_2_cannot_be_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"w": torch.ones(2)}, 2))
    with pytest.raises(SnapshotError, match="pickle protocol 3 or newer"):
        read_checkpoint(path)


def test_files_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(SnapshotError, match="not a regular file"):
        read_checkpoint(tmp_path)
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt", "zip")
    os.symlink(path, tmp_path / "link")
    assert state_dict(read_checkpoint(tmp_path / "link"))["w"].shape == (2,)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="not a regular file"):
        read_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("a shape beyond", "a tensor reaches beyond its storage"),
        ("strides that leave", "a tensor reaches beyond its storage"),
        ("negative strides", "a tensor's shape or strides are impossible"),
        ("a shape that repeats", "repeats a few values many times over"),
        ("a storage of 10 GB", "storage 0 is shorter than its pickle says"),
        ("a storage of two types", "storage 0 is described in two ways"),
        ("storages that overlap", "its storages overlap"),
        ("entries of one name", "two entries are named archive/data/0"),
        ("an entry that is encrypted", "storage 0 is compressed or encrypted"),
        ("an entry of 4 GB", "storage 0 ends outside of it"),
        ("an entry that is shorter", "storage 0 is shorter than its pickle says"),
        ("a directory of 10 GB", "its directory is broken"),
        ("a legacy storage of another length", "storage 0 has not the length its pickle says"),
        ("a legacy storage without keys", "a storage is missing"),
        ("a tar archive", "a tar archive"),
    ],
)
def test_a_lie_is_found_where_it_is(case: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(CORPUS[case]())
    with pytest.raises(SnapshotError, match=line):
        read_checkpoint(path)
