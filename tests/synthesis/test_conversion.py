"""What a checkpoint is, what it says of itself, and what becomes of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import posthoc_cli
from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.snapshots.names import compile_pattern
from posthoc_cli.solver.profiles import gamma_to_sigma_rel, sigma_rel_to_gamma
from posthoc_cli.synthesis.conversion import convert
from posthoc_cli.synthesis.conversion import explain as explanations
from posthoc_cli.synthesis.conversion_jobs import Converted, Options, find_jobs
from tests.formats.test_edm2 import Network, half, names, snapshot

__all__ = ["names"]  # a fixture

BOTH = Options(profiles=(0.05, 0.10), update_every=1)


def run(source: Path, folder: Path, options: Options, **more: Any) -> list[Converted]:
    jobs = find_jobs(source, folder, options, **more)
    overwrite = more.get("overwrite", False)
    return [job.done or convert(job, options, overwrite=overwrite) for job in jobs]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and bits."""
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        as_bytes = [one.detach().contiguous().flatten() for one in (found[name], tensor)]
        assert torch.equal(*(one.view(torch.uint8) for one in as_bytes)), name


def network() -> dict[str, torch.Tensor]:
    """Tensors of every kind that a state dict may hold."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = random(30, 50)
    return {
        "weight": weight,
        "tied": weight,
        "parameter": torch.nn.Parameter(random(3, 2)),
        "transposed": weight.t(),
        "part": weight[::3, 1::7],
        "channels_last": random(6, 5, 4, 3).to(memory_format=torch.channels_last),
        "permuted": random(4, 5, 6, 7).permute(2, 0, 3, 1),
        "expanded": random(7, 1).expand(7, 9),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "count": torch.tensor(12),
        "int32": torch.arange(10, dtype=torch.int32).view(2, 5).t(),
        "uint8": torch.arange(12, dtype=torch.uint8).view(3, 4).t(),
        "float64": random(4, 4).double(),
        "half": random(4, 4).half().t(),
        "bfloat16": random(5, 5).bfloat16().t(),
        "e4m3": random(16).to(torch.float8_e4m3fn),
        "e5m2": random(4, 4).to(torch.float8_e5m2).t(),
        "complex": torch.randn(4, 3, dtype=torch.complex64, generator=generator).t(),
        "special": torch.tensor([-0.0, float("nan"), float("inf"), 1e-45]),
    }


# What comes out is what torch loads


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_state_dict_comes_out_as_torch_loads_it(form: str, tmp_path: Path) -> None:
    path = tmp_path / "net_500_6.94.pth"
    tensors = network()
    if form == "legacy":  # which torch itself can't load float8 from
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("e")}
    torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    (one,) = run(tmp_path, tmp_path / "out", Options())
    assert_same(one.job.output, torch.load(path, weights_only=True))
    assert one.job.output == tmp_path / "out" / "net_500_6.94.safetensors"
    assert (one.job.tool, one.job.step, one.tensors) == ("torch", 500, len(tensors))
    assert one.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert one.bytes == one.job.output.stat().st_size
    written = metadata(one.job.output)
    assert written["step"] == "500"
    assert float(written["gamma"]) == 6.94


def test_edm2(tmp_path: Path, names: None) -> None:
    net = half(Network())
    path = snapshot(net, tmp_path / "run-0002147-0.050.pkl")
    (one,) = run(path, tmp_path / "out", Options())
    assert_same(one.job.output, net.state_dict())
    assert one.job.tool == "edm2"
    assert metadata(one.job.output) == metadata(one.job.output) | {
        "step": "2147328",
        "sigma_rel": "0.05",
    }
    path.rename(tmp_path / "other.pkl")
    (one,) = run(tmp_path / "other.pkl", tmp_path / "out", Options())
    assert (one.job.step, one.job.identity) == (None, None)
    assert "nothing says its profile" in one.warnings[0]


def ema_pytorch(folder: Path, index: int, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint as ema-pytorch's PostHocEMA writes it: all in half precision."""
    state = {"initted": torch.tensor(1.0), "step": torch.tensor(float(step))}
    state |= {f"ema_model.{name}": tensor for name, tensor in tensors.items()}
    path = folder / f"{index}.{step}.pt"
    torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    return path


def test_ema_pytorch(tmp_path: Path) -> None:
    tensors = {"conv.weight": torch.randn(8, 4, 3, 3), "step": torch.ones(1)}
    for index in (0, 1):
        ema_pytorch(tmp_path, index, 70_000, tensors)
    found = run(tmp_path, tmp_path, BOTH)
    assert [one.job.tool for one in found] == ["ema-pytorch"] * 2
    for one, sigma_rel in zip(found, ("0.05", "0.1"), strict=True):
        assert_same(one.job.output, {name: tensor.half() for name, tensor in tensors.items()})
        written = metadata(one.job.output)
        assert (written["step"], written["sigma_rel"]) == ("70000", sigma_rel)
        assert one.job.asked == one.job.identity
    assert explanations(found, BOTH) == []


def posthoc_ema(path: Path, counter: torch.Tensor, **tensors: torch.Tensor) -> Path:
    """A checkpoint as pytorch-posthoc-ema writes it."""
    torch.save({**tensors, "initted": torch.tensor(True), "step": counter}, path)
    return path


def test_posthoc_ema(tmp_path: Path) -> None:
    """Without a prefix, and with the steps that it has averaged over, by its own counter."""
    tensors = {"weight": torch.randn(8, 4, 3, 3), "num_batches_tracked": torch.tensor(3)}
    path = posthoc_ema(tmp_path / "1.1000.pt", torch.tensor(901), **tensors)
    found = run(path, tmp_path, BOTH)
    assert_same(found[0].job.output, tensors)
    assert (found[0].job.tool, found[0].job.step) == ("posthoc-ema", 901)
    assert metadata(found[0].job.output)["step"] == "901"
    assert metadata(found[0].job.output)["sigma_rel"] == "0.1"
    assert "step 1000 is their step 901" in explanations(found, BOTH)[0]
    inventory = read_folder(tmp_path)
    assert [one.step for one in inventory.snapshots] == [901]
    assert inventory.warnings == []


@pytest.mark.parametrize(
    ("step", "counter", "averaged"),
    [
        (1000, torch.tensor(1000), 1000),
        (1000, torch.tensor(901.0).half(), 901),
        (20_000, torch.tensor(19_901.0).half(), 19_904),
        (60_000, torch.tensor(60_001.0).half(), 60_000),
        (70_000, torch.tensor(70_000.0).half(), 70_000),  # infinite in half precision
        (1000, torch.tensor(901.0).bfloat16(), 900),
        (50_000, torch.tensor(49_901.0).bfloat16(), 50_000),
        (1000, torch.tensor(0), 1000),
        (1000, torch.tensor(2000), 1000),
    ],
)
def test_the_counter_of_posthoc_ema(
    step: int, counter: torch.Tensor, averaged: int, tmp_path: Path
) -> None:
    path = posthoc_ema(tmp_path / f"0.{step}.pt", counter, w=W)
    (one,) = run(path, tmp_path, BOTH)
    assert one.job.step == averaged


@pytest.mark.parametrize("prefix", ["", "ema_model."])
def test_posthoc_ema_that_says_its_width(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}w": torch.ones(3), "initted": torch.tensor(1.0), "step": torch.tensor(1e3)}
    torch.save(state | {"sigma_rel": 0.2}, tmp_path / "1.1000.pt")
    (one,) = run(tmp_path, tmp_path, Options(update_every=1))
    assert one.job.tool == "posthoc-ema"
    assert_same(one.job.output, {"w": torch.ones(3)})
    assert metadata(one.job.output)["sigma_rel"] == "0.2"


def test_a_tool_that_is_said_to_have_written_it(tmp_path: Path) -> None:
    one = converted(tmp_path, "0.1000.pt", {"w": W}, kind="posthoc-ema", profiles=(0.05,))
    assert_same(one.job.output, {"w": W})
    assert (one.job.tool, one.job.step) == ("posthoc-ema", 1000)


def test_a_network_beside_an_ordinary_average_of_it_asks_for_the_tool(tmp_path: Path) -> None:
    state = {"online_model.w": torch.ones(1), "ema_model.w": torch.zeros(1)}
    counters = {"initted": torch.tensor(True), "step": torch.tensor(5)}
    torch.save(state | counters, tmp_path / "x.pt")
    with pytest.raises(SnapshotError, match=r"ema-pytorch, but it holds the network too .*tool="):
        run(tmp_path, tmp_path / "a", Options())
    (one,) = run(tmp_path, tmp_path / "a", Options("torch"))
    assert_same(one.job.output, state | counters)
    (one,) = run(tmp_path, tmp_path / "b", Options("ema-pytorch"))
    assert_same(one.job.output, {"w": torch.zeros(1)})
    assert "nothing says its profile" in one.warnings[0]


# Where the step and the profile come from


def converted(tmp_path: Path, name: str, content: Any, **options: Any) -> Converted:
    torch.save(content, tmp_path / name)
    (one,) = run(tmp_path / name, tmp_path / "out", Options(**options))
    return one


W = torch.ones(2)


def test_numbers_in_the_checkpoint_tell(tmp_path: Path) -> None:
    one = converted(tmp_path, "a.pt", {"step": 12000, "sigma_rel": 0.07, "model": {"w": W}})
    assert metadata(one.job.output)["step"] == "12000"
    assert metadata(one.job.output)["sigma_rel"] == "0.07"
    one = converted(tmp_path, "b.pt", {"step": torch.tensor(3.0), "gamma": 2.5, "model": {"w": W}},
                    key="model")  # fmt: skip
    assert metadata(one.job.output)["gamma"] == "2.5"
    assert one.job.step == 3


@pytest.mark.parametrize("content", [
    {"global_step": 500, "model": {"w": W}, "step": True, "gamma": float("nan")},
    {"global_step": 500, "model": {"w": W}, "step": 0, "sigma_rel": None},
    {"global_step": 500.0, "model": {"w": W}, "step": -1},
])  # fmt: skip
def test_a_step_alone_is_kept(content: dict[str, Any], tmp_path: Path) -> None:
    one = converted(tmp_path, "a.pt", content)
    assert (one.job.step, one.job.identity) == (500, None)
    assert metadata(one.job.output)["step"] == "500"
    assert not {"gamma", "sigma_rel"} & metadata(one.job.output).keys()
    assert "only good for raw=True" in one.warnings[0]


def test_nothing_that_tells(tmp_path: Path) -> None:
    one = converted(tmp_path, "last.pt", {"w": W})
    assert (one.job.step, one.job.identity) == (None, None)
    assert metadata(one.job.output).keys() == {"converted"}


def test_an_index_says_nothing_of_what_is_no_average(tmp_path: Path) -> None:
    one = converted(tmp_path, "3.1000.pt", {"w": W})
    assert (one.job.step, one.job.identity) == (1000, None)


def test_the_name_and_the_numbers_disagree(tmp_path: Path) -> None:
    content = {"step": 700, "sigma_rel": 0.07, "model": {"w": W}}
    one = converted(tmp_path, "a_500_6.94.pt", content)
    assert one.job.step == 700
    assert "its name says step 500" in one.warnings[0]


def test_a_pattern_is_for_the_name_of_the_checkpoint(tmp_path: Path) -> None:
    pattern = compile_pattern("run7_{step}_{sigma_rel}.pt")
    one = converted(tmp_path, "run7_500_0.20.pt", {"w": W}, pattern=pattern)
    assert metadata(one.job.output)["step"] == "500"
    assert metadata(one.job.output)["sigma_rel"] == "0.2"
    with pytest.raises(UsageError, match="its ending included"):
        converted(tmp_path, "b.pt", {"w": W}, pattern=pattern)
    with pytest.raises(SnapshotError, match="doesn't fit pattern="):
        run(tmp_path, tmp_path / "other", Options(pattern=pattern))


def test_a_pattern_with_an_index(tmp_path: Path) -> None:
    pattern = compile_pattern("e{index}-{step}.pt")
    one = converted(tmp_path, "e1-500.pt", {"w": W}, pattern=pattern, profiles=(0.1, 0.2))
    assert metadata(one.job.output)["sigma_rel"] == "0.2"
    with pytest.raises(UsageError, match="missing, as pattern= has"):
        find_jobs(tmp_path, tmp_path, Options(pattern=pattern))


def test_what_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"sigma_rel 0\.9, not between"):
        converted(tmp_path, "a.pt", {"step": 5, "sigma_rel": 0.9, "model": {"w": W}})
    with pytest.raises(SnapshotError, match="says index 1, for which profiles= has no"):
        run(ema_pytorch(tmp_path, 1, 100, {"w": W}), tmp_path, Options(update_every=1))
    with pytest.raises(SnapshotError, match="is not a checkpoint of ema-pytorch"):
        converted(tmp_path, "a_500_6.94.pt", {"w": W}, kind="ema-pytorch", update_every=1)
    with pytest.raises(SnapshotError, match="is none that safetensors can have"):
        converted(tmp_path, "a_500_6.94.pt", {"__metadata__": W})
    with pytest.raises(SnapshotError, match="is none that safetensors can have"):
        converted(tmp_path, "a_500_6.94.pt", {"\ud800": W})


# Averages that weren't updated at every step


@pytest.mark.parametrize("kind", ["ema-pytorch", "posthoc-ema"])
def test_without_update_every_the_profile_is_doubted(kind: str, tmp_path: Path) -> None:
    path = ema_pytorch(tmp_path, 0, 1000, {"w": W})
    default = {"ema-pytorch": "100", "posthoc-ema": "10"}[kind]
    options = Options(kind=kind, profiles=(0.05,))
    found = run(path, tmp_path / "out", options)
    assert metadata(found[0].job.output)["sigma_rel"] == "0.05"
    (told,) = explanations(found, options)
    assert told.startswith(f"{kind} averages with another profile than asked for unless")
    assert f"its default is {default}: give update_every=" in told
    assert explanations(found, Options(kind=kind, profiles=(0.05,), update_every=1)) == []


def test_the_exponent_that_it_really_is(tmp_path: Path) -> None:
    for index in (0, 1):
        ema_pytorch(tmp_path, index, 1000, {"w": W})
    options = Options(profiles=(0.05, 0.10), update_every=10)
    found = run(tmp_path, tmp_path, options)
    for one, asked in zip(found, (0.05, 0.10), strict=True):
        gamma = (1 + sigma_rel_to_gamma(asked)) / 10 - 1
        assert float(metadata(one.job.output)["gamma"]) == gamma
        assert "sigma_rel" not in metadata(one.job.output)
        assert metadata(one.job.output)["update_every"] == "10"
        assert one.job.identity is not None
        assert one.job.identity.sigma_rel == gamma_to_sigma_rel(gamma)
        assert one.job.asked is not None
        assert one.job.asked.sigma_rel == asked
    (told,) = explanations(found, options)
    assert "sigma_rel 0.05 is gamma 0.7972 in truth, sigma_rel 0.2459" in told
    assert "sigma_rel 0.1 is gamma -0.2063 in truth, sigma_rel 0.2972" in told
    options = Options(profiles=(0.05, 0.10), update_every=100)
    told, more = explanations(run(tmp_path, tmp_path, options, overwrite=True), options)
    assert "method='blup'" in more


# Which files, and what is there already


def test_which_files(tmp_path: Path) -> None:
    for name in ("a_1_5.pt", "B_1_5.CKPT", "c_1_5.bin", ".d_1_5.pt", "e.txt", "f.safetensors"):
        torch.save({"w": W}, tmp_path / name)
    (tmp_path / "g.pt").mkdir()
    jobs = find_jobs(tmp_path, tmp_path / "out", Options())
    assert [job.source.name for job in jobs] == ["B_1_5.CKPT", "a_1_5.pt", "c_1_5.bin"]
    assert jobs[0].output.name == "B_1_5.safetensors"
    jobs = find_jobs(tmp_path, tmp_path / "out", Options(), only=["a*", "*.bin"])
    assert [job.source.name for job in jobs] == ["a_1_5.pt", "c_1_5.bin"]
    assert all(job.bytes == job.source.stat().st_size for job in jobs)
    with pytest.raises(UsageError, match=r"'\*.pth' fits none of 3 files"):
        find_jobs(tmp_path, tmp_path / "out", Options(), only=["*.pth"])


def test_two_that_would_become_one(tmp_path: Path) -> None:
    for name in ("a.pt", "a.pkl"):
        torch.save({"w": W}, tmp_path / name)
    with pytest.raises(UsageError, match=r"would become 'a.safetensors', as 'a.pkl' would"):
        find_jobs(tmp_path, tmp_path / "out", Options())


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        find_jobs(tmp_path / "x", tmp_path, Options())
    with pytest.raises(SnapshotError, match=r"holds no .pt, .pth, .pkl, .ckpt or .bin files"):
        find_jobs(tmp_path, tmp_path, Options())
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(SnapshotError, match=r"its 1 .safetensors files can be used"):
        find_jobs(tmp_path, tmp_path, Options())


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path = ema_pytorch(tmp_path, 1, 1000, {"w": W, "count": torch.tensor(3)})
    options = Options(profiles=(0.05, 0.10), update_every=10)
    (first,) = run(tmp_path, tmp_path, options)
    before = first.job.output.stat()
    for same in (options, Options("ema-pytorch", "same", 10, (0.05, 0.10))):
        (again,) = run(tmp_path, tmp_path, same)
        assert again.seconds is None
        assert first.job.identity is not None
        assert again.job.identity is not None
        assert (again.job.identity.gamma, again.job.step, again.dtypes) == (
            first.job.identity.gamma,
            1000,
            first.dtypes,
        )
        assert (again.parameters, again.bytes) == (first.parameters, first.bytes)
    assert first.job.output.stat().st_mtime_ns == before.st_mtime_ns
    for other in (
        Options(profiles=(0.05, 0.10), update_every=1),
        Options(profiles=(0.05, 0.20), update_every=10),
        Options("torch"),
        Options("auto", "float32", 10, (0.05, 0.10)),
    ):
        with pytest.raises(UsageError, match="exists already, and is not what this makes"):
            find_jobs(tmp_path, tmp_path, other)
    (forced,) = run(tmp_path, tmp_path, Options("torch"), overwrite=True)
    assert "ema_model.w" in load_file(forced.job.output)
    with pytest.raises(UsageError, match="exists already"):
        find_jobs(tmp_path, tmp_path, options)
    run(tmp_path, tmp_path, options, overwrite=True)
    os.utime(path, ns=(0, time.time_ns() + 10**9))  # written again since
    with pytest.raises(UsageError, match="exists already"):
        find_jobs(tmp_path, tmp_path, options)


def test_an_option_that_makes_no_difference_to_a_file(tmp_path: Path) -> None:
    torch.save({"w": W}, tmp_path / "a_500_6.94.pt")
    run(tmp_path, tmp_path, Options())
    (again,) = run(tmp_path, tmp_path, BOTH)
    assert again.seconds is None


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, json.dumps({"converted": 3}).encode(), b"\x02\0\0\0\0\0\0\0{}"]
)
def test_another_file_at_its_place(content: bytes, tmp_path: Path) -> None:
    torch.save({"w": W}, tmp_path / "a_500_6.94.pt")
    place = tmp_path / "a_500_6.94.safetensors"
    place.write_bytes(content)
    with pytest.raises(UsageError, match="exists already"):
        find_jobs(tmp_path, tmp_path, Options())
    run(tmp_path, tmp_path, Options(), overwrite=True)
    assert_same(place, {"w": W})


@pytest.mark.parametrize(
    "changes",
    [{"step": "x"}, {"step": "9" * 5000}, {"converted": "[]"}, {"converted": "[" * 100_000}]
    + [{"from": kind} for kind in ("\x1b[2J", [], None)]
    + [{"options": value} for value in ({}, [], 3, None, "from")],
    ids=str,
)
def test_an_output_that_was_meddled_with(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"w": W, "step": 5}, tmp_path / "a.pt")
    (one,) = run(tmp_path, tmp_path, Options())
    written = metadata(one.job.output)
    entry = json.loads(written["converted"])
    for key, value in changes.items():
        if key in entry:
            entry[key] = value
    written["converted"] = json.dumps(entry)
    written |= {key: value for key, value in changes.items() if key in written}
    save_file({"w": W}, one.job.output, written)
    with pytest.raises(UsageError, match="exists already"):
        find_jobs(tmp_path, tmp_path, Options())


def test_never_over_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a_500_6.94.pt"
    torch.save({"w": W}, path)
    for link in (os.symlink, os.link):
        place = tmp_path / "a_500_6.94.safetensors"
        link(path, place)
        with pytest.raises(UsageError, match="is one of the checkpoints"):
            find_jobs(tmp_path, tmp_path, Options(), overwrite=True)
        place.unlink()


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"w": W}, tmp_path / "a.pt")
    for options, line in (
        (Options(profiles=(0.3,)), "profiles=: 0.3 is not between"),
        (Options(update_every=0), "update_every=: 0 is out of bounds"),
        (Options("torch", update_every=2), "update_every=: doesn't go with tool='torch'"),
        (Options("edm2", key="x"), "key=: doesn't go with tool='edm2'"),
    ):
        with pytest.raises(UsageError, match=line):
            find_jobs(tmp_path, tmp_path, options)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        find_jobs(tmp_path, tmp_path / "file", Options())


# Rounding


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    """Real floating-point tensors are rounded, from the exact values; all others stay."""
    tensors = network()
    torch.save(tensors, tmp_path / "a_500_6.94.pt")
    (one,) = run(tmp_path, tmp_path, Options(dtype=dtype))
    kind = getattr(torch, dtype)
    expected = {
        name: tensor.detach().to(kind) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    if dtype == "float16":  # by way of float32 a double would be rounded twice
        expected["float64"] = torch.from_numpy(tensors["float64"].numpy().astype(np.float16))
    found = load_file(one.job.output)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(torch.nan_to_num(found[name]), torch.nan_to_num(tensor)), name
    assert torch.signbit(found["special"]).tolist()[0]
    assert one.warnings == ()


def test_values_that_are_too_large_are_told(tmp_path: Path) -> None:
    tensors = {"b": torch.full((3, 4), 1e6).t(), "a": torch.tensor(7e4), "c": torch.tensor(1.0)}
    torch.save(tensors, tmp_path / "a_500_6.94.pt")
    (one,) = run(tmp_path, tmp_path, Options(dtype="float16"))
    assert one.warnings == ("values of 'a' and 1 more are too large for float16: infinite now",)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a_500_6.94.pt"
    torch.save({"w": torch.ones(1000)}, path)
    (job,) = find_jobs(path, tmp_path / "out", Options())

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(job, Options(), progress=interrupt)
    assert os.listdir(tmp_path / "out") == []


def test_converted_averages_stay_the_staircases_they_are(tmp_path: Path) -> None:
    for index in (0, 1):
        ema_pytorch(tmp_path, index, 1000, {"w": W})
    found = run(tmp_path, tmp_path / "out", Options(profiles=(0.05, 0.10), update_every=10))
    read = posthoc_cli.open_snapshots(tmp_path / "out").snapshots
    there = posthoc_cli.open_snapshots(tmp_path, profiles=[0.05, 0.1], update_every=10)
    assert {each.profile for each in read} == {each.profile for each in there.snapshots}
    assert {one.job.identity.profile.stairs for one in found if one.job.identity} == {(1, 10)}
    for index, text in enumerate(("0", "2.5", "often")):
        told = {"step": "10", "gamma": "5", "update_every": text}
        save_file({"w": W}, tmp_path / f"{index}.safetensors", told)
        (problem,) = posthoc_cli.open_snapshots([tmp_path / f"{index}.safetensors"]).problems
        assert f"its metadata's update_every is '{text}', not a whole number above 0" in problem[1]
    save_file(
        {"w": W}, tmp_path / "5.safetensors", {"step": "10", "gamma": "5", "update_every": "4"}
    )
    (one,) = posthoc_cli.open_snapshots([tmp_path / "5.safetensors"]).snapshots
    assert one.profile.as_dict() == {
        "kind": "power",
        "step": 10,
        "gamma": 5.0,
        "update_every": 4,
        "one_step": False,
    }
