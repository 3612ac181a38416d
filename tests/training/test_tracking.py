"""PostHocEMA and KarrasEMA: averages that have the profile asked for, and snapshots that load."""

from __future__ import annotations

import copy
import errno
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from posthoc_cli import KarrasEMA, PostHocEMA
from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.snapshots.sampling import fit_snapshots
from posthoc_cli.solver.blup import expected_error
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile, sigma_rel_to_gamma
from posthoc_cli.storage import atomic as atomicfile
from posthoc_cli.storage import header as tensorfile
from posthoc_cli.storage.header import read_header
from posthoc_cli.training import averaging
from posthoc_cli.training.averaging import EmaUpdate, LiveTensors

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Counter(nn.Module):
    """A network whose one weight is what it is set to."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)


class Tied(nn.Module):
    """Shared, transposed and channels-last tensors, whole numbers, and a transient buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.randn(3), persistent=False)


def train(model: nn.Module, ema: PostHocEMA, steps: int) -> None:
    """A random walk, the same whenever it goes on from the same step; written out at the end."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(ema.step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
        ema.update()
    ema.wait()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The profile is the one asked for


@pytest.mark.parametrize("update_every", [1, 10, 100])
def test_mean_age_is_the_profiles(update_every: int, tmp_path: Path) -> None:
    steps, model = 100_000, Counter()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, update_every=update_every)
    karras = KarrasEMA(model, sigma_rel=0.2, update_every=update_every)
    for step in range(1, steps + 1):
        if step % update_every == 0:  # the other calls must not look at the network
            model.set(step)
        ema.update()
        karras.update()
    means = [averages["weight"].item() for averages in ema.state_dict()["averages"]]
    means.append(karras.ema_model.weight.item())
    for gamma, mean in zip((*ema.gammas, karras.gamma), means, strict=True):
        assert mean / steps == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert karras.beta == (1 - update_every / steps) ** (1 + karras.gamma)


def test_uneven_skipped_and_changed_intervals_keep_the_profile(tmp_path: Path) -> None:
    model, generator = Counter(), np.random.default_rng(0)
    ema = PostHocEMA(
        model, gammas=(3.0, 8.0), folder=tmp_path, checkpoint_every=None, dtype=torch.float32
    )
    step = 0
    while step < 1_000_000:
        step += int(generator.integers(1, 500))
        if step > 300_000:
            ema.update_every = 2000
        model.set(step)
        ema.update(step)
    ema.checkpoint()  # up to the present step, whatever update_every left behind
    for gamma, averages in zip((3.0, 8.0), ema.state_dict()["averages"], strict=True):
        assert averages["weight"].item() / step == pytest.approx(
            (gamma + 1) / (gamma + 2), abs=2e-3
        )


def test_an_update_weighs_what_the_paper_says(tmp_path: Path) -> None:
    model = Counter()
    ema = PostHocEMA(model, gammas=(2.0, 5.0), folder=tmp_path, checkpoint_every=None)
    model.set(1.0)
    ema.update(100)
    model.set(0.0)
    ema.update(130)
    for gamma, averages in zip((2.0, 5.0), ema.state_dict()["averages"], strict=True):
        assert averages["weight"].item() == pytest.approx((1 - 30 / 130) ** (1 + gamma), rel=1e-12)


def test_the_step_can_not_go_back_and_repeating_it_does_nothing(tmp_path: Path) -> None:
    model = Counter()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=5)
    model.set(1)
    ema.update(5)
    model.set(100)
    ema.update(5)
    assert ema.state_dict()["averages"][0]["weight"].item() == 1
    with pytest.raises(ValueError, match="can't go back"):
        ema.update(4)


def test_bfloat16_network_is_averaged_in_float32(tmp_path: Path) -> None:
    """In bfloat16 a weight of 1e-4 is lost: the average would stay where it began."""
    model = Counter(torch.bfloat16)
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, dtype=torch.float32)
    karras = KarrasEMA(model, sigma_rel=0.1)
    model.set(1.0)
    for each in (ema, karras):
        each.update(1_000_000)
    model.set(2.0)
    naive = torch.ones((), dtype=torch.bfloat16)
    for step in range(1_000_000, 1_100_000, 100):
        ema.update(step + 100)
        karras.update(step + 100)
        naive.lerp_(model.weight.detach(), 1e-4 * (1 + ema.gammas[1]))
    expected = 2 - (1_000_000 / 1_100_000) ** (1 + ema.gammas[1])
    assert naive.item() == 1.0
    assert ema.state_dict()["averages"][1]["weight"].item() == pytest.approx(expected, abs=1e-4)
    assert karras.ema_model.weight.dtype == torch.bfloat16
    assert karras.ema_model.weight.item() == pytest.approx(expected, abs=2**-8)


def test_synthesis_agrees_with_an_ema_tracked_at_the_target(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Linear(40, 50).double()
    walk = KarrasEMA(model, sigma_rel=0.07)
    ema = PostHocEMA(
        model, folder=tmp_path, checkpoint_every=100, dtype=None, average_dtype=torch.float64
    )
    values = []
    for _ in range(2000):
        with torch.no_grad():
            model.weight += 0.01 * torch.randn_like(model.weight)
        values.append(model.weight.detach().clone())
        ema.update()
        walk.update()
    target = Profile(2000, float(sigma_rel_to_gamma(0.07)))
    snapshots = read_folder(tmp_path).usable()
    error = solve([each.profile for each in snapshots], [target]).profile_error[0]
    made = ema.synthesize(sigma_rel=0.07)["weight"]
    # The error of the profile is relative to its L2 norm, over time; Cauchy and Schwarz bound by
    # it what a weight can be off: sqrt(sum of squared deviations) * error * norm.
    norm = (target.gamma + 1) / np.sqrt((2 * target.gamma + 1) * target.step)
    deviations = torch.stack(values) - walk.ema_model.weight
    bound = (deviations**2).sum(0).sqrt() * error * norm
    assert torch.all((made - walk.ema_model.weight).abs() <= bound)
    assert (made - model.weight).abs().mean() > 10 * (made - walk.ema_model.weight).abs().mean()

    # And blup is off by as much as it expects to be.
    by_blup = ema.synthesize(sigma_rel=0.07, method="blup")["weight"]
    profiles = [each.profile for each in snapshots]
    _, trajectory = fit_snapshots(snapshots)
    weights = solve(profiles, [target], "blup", trajectory=trajectory).weights
    expected = expected_error(trajectory, profiles, [target], weights).total[0]
    off = (by_blup - walk.ema_model.weight).square().mean().sqrt()
    assert expected / 2 < off < 2 * expected


# The arithmetic


@pytest.mark.parametrize("serial", [1 << 15, 200, 0], ids=["threads", "both", "one"])
def test_mover_is_the_plain_formula_for_every_layout(
    serial: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "_SERIAL", serial)
    monkeypatch.setattr(averaging, "_CACHE_BLOCK", 100)
    torch.manual_seed(0)
    sources = [
        torch.randn(7, 90),
        torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last),
        torch.randn(20, 30).t(),
        torch.randn(40, 40)[::2, ::2],
        torch.randn(1).expand(300),
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(250).bfloat16(),
        torch.randn(250).half().view(10, 25).t(),
        torch.randn(130, dtype=torch.float64),
        torch.randn(260, dtype=torch.complex64),
    ]
    wide = [averaging.wide(each.dtype, torch.float32) for each in sources]
    averages = [
        [
            torch.empty_like(s, dtype=d).copy_(torch.randn(s.shape))
            for s, d in zip(sources, wide, strict=True)
        ]
        for _ in range(3)
    ]
    before = [[each.clone() for each in column] for column in averages]
    weights = (0.25, 1e-3, 1.0)
    EmaUpdate(sources, averages)(weights)
    for weight, old, new in zip(weights, before, averages, strict=True):
        for source, was, now in zip(sources, old, new, strict=True):
            torch.testing.assert_close(now, was + weight * (source.to(now.dtype) - was))


def move_once(averages: list[list[torch.Tensor]]) -> None:
    EmaUpdate([torch.ones(10) for _ in averages[0]], averages)([0.5])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "_CACHE_BLOCK", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    averages = [[torch.zeros(10).share_memory_() for _ in range(8)]]
    move_once(averages)
    child = multiprocessing.get_context("fork").Process(target=move_once, args=(averages,))
    child.start()
    child.join(30)
    child.kill()
    assert all(torch.equal(average, torch.full((10,), 0.75)) for average in averages[0])


def test_a_first_update_does_not_read_the_averages() -> None:
    averages = [[torch.full((3,), float("nan"))]]
    EmaUpdate([torch.ones(3)], averages)([1.0])
    assert torch.equal(averages[0][0], torch.ones(3))


@pytest.mark.parametrize("how", ["data", "parameter", "layer"])
def test_replaced_parameters_are_followed(how: str, tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None)
    ema.update()
    before = [{k: v.clone() for k, v in each.items()} for each in ema.state_dict()["averages"]]
    if how == "data":  # as module.to() does
        model[0].bias.data = torch.full((5,), 7.0)
    elif how == "parameter":
        model[0].bias = nn.Parameter(torch.full((5,), 7.0))
    else:
        model[0] = nn.Linear(3, 5)
        nn.init.constant_(model[0].bias, 7.0)
    ema.update()
    for gamma, old, new in zip(ema.gammas, before, ema.state_dict()["averages"], strict=True):
        weight = 1 - 0.5 ** (1 + gamma)
        expected = old["0.bias"] + weight * (7.0 - old["0.bias"])
        torch.testing.assert_close(new["0.bias"], expected)


def test_a_checkpoint_catches_up_with_the_step(tmp_path: Path) -> None:
    model = Counter()
    ema = PostHocEMA(
        model, gammas=(2.0, 5.0), folder=tmp_path, checkpoint_every=None, update_every=10
    )
    for step in range(1, 16):
        model.set(step)
        ema.update()
    ema.checkpoint()
    for gamma, averages in zip((2.0, 5.0), ema.state_dict()["averages"], strict=True):
        beta = (1 - 5 / 15) ** (1 + gamma)
        assert averages["weight"].item() == pytest.approx(10 * beta + 15 * (1 - beta))


def test_live_tensors_hold_each_tied_tensor_once() -> None:
    live = LiveTensors(Tied(), lambda name: True)
    assert live.refresh()
    assert not live.refresh()
    assert live.alias["head.weight"] == "embedding.weight"
    assert "head.weight" not in live.names
    assert not {"mask", "table", "norm.num_batches_tracked"} & set(live.names)


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=needs_gpu), pytest.param("cpu", marks=needs_gpu)]
)
def test_gpu_network_with_averages_on_either_device(device: str, tmp_path: Path) -> None:
    model = small().cuda()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=4, device=device, background=True)
    host_model = small()
    host = PostHocEMA(host_model, folder=tmp_path / "host", checkpoint_every=None)
    train(model, ema, 8)
    train(host_model, host, 8)
    ema.wait()
    for one, other in zip(ema.state_dict()["averages"], host.state_dict()["averages"], strict=True):
        for name in one:
            assert one[name].device.type == device
            torch.testing.assert_close(one[name].cpu(), other[name])
    assert len(read_folder(tmp_path).usable()) == 4


# Snapshots


def test_snapshots_load_strictly_whatever_the_network(tmp_path: Path) -> None:
    model = Tied()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, dtype=None)
    model.norm.num_batches_tracked += 3
    ema.update()
    for path in ema.checkpoint():
        state = load_file(path)
        fresh = Tied()
        fresh.load_state_dict(state, strict=True)
        for name, value in model.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], value), name
            assert state[name].dtype == value.dtype


def test_metadata_and_names_say_step_and_profile(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), sigma_rels=(0.1, 0.0512), folder=tmp_path, checkpoint_every=7)
    train(ema.model, ema, 15)
    inventory = read_folder(tmp_path)
    assert not inventory.warnings
    assert [(each.file, each.step, each.source) for each in inventory.usable()] == [
        (f"ema-step000000{step:02d}-{width}.safetensors", step, "metadata")
        for step in (7, 14)
        for width in ("0.0512", "0.100")
    ]
    assert read_header(tmp_path / "ema-step00000007-0.100.safetensors").metadata == {
        "format": "pt",
        "step": "7",
        "gamma": repr(float(sigma_rel_to_gamma(0.1))),
        "sigma_rel": "0.1",
        "run": ema.run,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_snapshots_are_the_averages_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, dtype=dtype)
    train(model, ema, 5)
    for path, averages in zip(ema.checkpoint(), ema.state_dict()["averages"], strict=True):
        state = load_file(path)
        for name, average in averages.items():
            assert state[name].dtype == dtype
            assert torch.equal(state[name], average.to(dtype))


@pytest.mark.parametrize("wrap", ["compiled", "compiled inside", "parallel", "both"])
def test_wrapped_networks_give_the_bare_names(wrap: str, tmp_path: Path) -> None:
    bare = small()
    model: nn.Module = bare
    if wrap == "compiled inside":
        model = nn.Sequential(torch.compile(bare[0], backend="eager"), bare[1])
    if wrap in ("parallel", "both"):
        model = nn.DataParallel(model)
    if wrap in ("compiled", "both"):
        model = torch.compile(model, backend="eager")
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=1)
    ema.update()
    for snapshot in read_folder(tmp_path).usable():
        small().load_state_dict(load_file(tmp_path / snapshot.file), strict=True)
    ema_model = KarrasEMA(model, sigma_rel=0.1)
    ema_model.update()
    assert torch.equal(ema_model(torch.ones(3)), bare(torch.ones(3)))


DISTRIBUTED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch import nn
from posthoc_cli import PostHocEMA

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
ema = {}
plain, sharded = (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)) for _ in range(2))
sharded.load_state_dict(plain.state_dict())
ddp = nn.parallel.DistributedDataParallel(plain)
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
for name, model in (("ddp", ddp), ("fsdp", sharded)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = PostHocEMA(model, folder=folder / name, checkpoint_every=3, dtype=torch.float32,
                     background=name == "fsdp")
    for step in range(6):
        torch.manual_seed(100 * step + rank)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    ema.wait()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(sys.platform == "win32", reason="file:// rendezvous")
def test_ddp_and_sharded_networks_give_whole_snapshots(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    snapshots = {name: read_folder(tmp_path / name).usable() for name in ("ddp", "fsdp")}
    assert [len(each) for each in snapshots.values()] == [4, 4]
    for one, other in zip(*snapshots.values(), strict=True):
        whole, gathered = load_file(one.index.path), load_file(other.index.path)
        small().load_state_dict(gathered, strict=True)
        for name in whole:
            torch.testing.assert_close(whole[name], gathered[name])


def test_include_takes_a_part_of_the_network(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, include=("1.*",))
    ema.update()
    assert set(read_folder(tmp_path).usable()[0].index.tensors) == {"1.weight", "1.bias"}


def test_what_is_copied_and_what_is_ignored(tmp_path: Path) -> None:
    model = small()
    options = {
        "param_or_buffer_names_no_ema": {"0.bias"},
        "ignore_names": {"0.weight"},
        "ignore_startswith_names": {"1.w"},
    }
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, **options)
    karras = KarrasEMA(model, gamma=ema.gammas[0], **options)
    first: dict[str, torch.Tensor] = {}
    for step in range(3):
        train(model, ema, 1)
        karras.update()
        first = first or {name: value.clone() for name, value in model.state_dict().items()}
        assert ema.step == karras.step == step + 1
    ema.checkpoint()
    for state in (ema.state_dict()["averages"][0], karras.ema_model.state_dict()):
        assert torch.equal(state["0.bias"], model[0].bias)
        assert torch.equal(state["0.weight"], first["0.weight"])
        assert torch.equal(state["1.weight"], first["1.weight"])
        assert not torch.equal(state["1.bias"], first["1.bias"])
        assert not torch.equal(state["1.bias"], model[1].bias)
    train(model, ema, 3)
    ema.checkpoint()
    made = ema.synthesize(0.08)
    assert torch.equal(made["0.bias"], model[0].bias.half().float())
    assert torch.equal(made["0.weight"], first["0.weight"].half().float())
    assert not torch.equal(made["1.bias"], model[1].bias.half().float())


def test_keep_removes_only_this_runs_oldest(tmp_path: Path) -> None:
    other = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, prefix="other")
    other.update()
    (tmp_path / "notes.txt").write_text("mine")
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=2, keep=2, overwrite=True)
    with pytest.warns(RuntimeWarning, match="another run's"):
        train(ema.model, ema, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(
            f"ema-step0000000{step}-{width}.safetensors"
            for step in (6, 8)
            for width in ("0.050", "0.100")
        ),
        "notes.txt",
        "other-step00000001-0.050.safetensors",
        "other-step00000001-0.100.safetensors",
    ]


def test_keep_spares_what_an_abandoned_future_left(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=4, keep=1)
    train(ema.model, ema, 2)
    state = copy.deepcopy(ema.state_dict())
    train(ema.model, ema, 6)
    resumed = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, keep=1)
    resumed.load_state_dict(state)
    train(resumed.model, resumed, 2)
    assert {each.step for each in read_folder(tmp_path).usable()} == {4, 8}


# Stopping, resuming, failing


def test_a_loaded_state_is_a_copy_and_its_folder_is_looked_at_anew(tmp_path: Path) -> None:
    one = PostHocEMA(small(), folder=tmp_path / "a", checkpoint_every=1)
    train(one.model, one, 2)
    other = PostHocEMA(small(), folder=tmp_path / "b", checkpoint_every=1)
    train(other.model, other, 1)
    before = copy.deepcopy(one.state_dict()["averages"])
    other.load_state_dict(one.state_dict())
    with pytest.raises(UsageError, match="another run's"):
        other.update()
    other.folder = tmp_path / "c"
    other.folder.mkdir()
    train(other.model, other, 2)
    for was, now in zip(before, one.state_dict()["averages"], strict=True):
        assert all(torch.equal(was[name], now[name]) for name in was)


@pytest.mark.parametrize("background", [False, True])
def test_a_resumed_run_writes_the_same_bytes(background: bool, tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(
        model, folder=tmp_path / "a", checkpoint_every=4, update_every=3, background=background
    )
    train(model, ema, 10)
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "state.pt")
    train(model, ema, 10)
    ema.wait()

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = small()
    again.load_state_dict(state["model"])
    resumed = PostHocEMA(again, folder=tmp_path / "b", checkpoint_every=4, update_every=3)
    resumed.load_state_dict(state["ema"])
    train(again, resumed, 10)
    never_stopped, resumed_bytes = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert sorted(resumed_bytes) == sorted(never_stopped)[4:]
    assert len(resumed_bytes) == 6
    for name, data in resumed_bytes.items():
        assert data == never_stopped[name], name


def test_a_resumed_run_goes_on_in_its_folder_and_another_is_refused(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1)
    ema.update()
    before = folder_bytes(tmp_path)
    stranger = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1)
    with pytest.raises(UsageError, match=r"another run's snapshots.*overwrite=True"):
        stranger.update()
    assert folder_bytes(tmp_path) == before
    stranger.load_state_dict(ema.state_dict())
    stranger.update()
    assert {each.step for each in read_folder(tmp_path).usable()} == {1, 2}


def test_outputs_of_posthoc_in_the_folder_are_nobodys_snapshots(tmp_path: Path) -> None:
    header, _ = tensorfile.make_header({}, {"posthoc": '{"sources": []}'})
    (tmp_path / "out.safetensors").write_bytes(header)
    PostHocEMA(small(), folder=tmp_path).update()


def test_background_writes_what_was_true_at_the_time(tmp_path: Path) -> None:
    ema = PostHocEMA(
        small(), folder=tmp_path, checkpoint_every=None, background=True, dtype=torch.float32
    )
    train(ema.model, ema, 3)
    expected = [
        {name: value.clone() for name, value in each.items()}
        for each in ema.state_dict()["averages"]
    ]
    paths = ema.checkpoint()
    train(ema.model, ema, 3)
    ema.wait()
    for path, averages in zip(paths, expected, strict=True):
        state = load_file(path)
        assert all(torch.equal(state[name], value) for name, value in averages.items())


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_a_warning_and_leaves_nothing(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=2, background=background)
    train(ema.model, ema, 1)
    written = atomicfile.AtomicFile.write_at

    def full(self: atomicfile.AtomicFile, offset: int, data: memoryview) -> None:
        if offset:
            with atomicfile.write_errors(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        written(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(atomicfile.AtomicFile, "write_at", full)
        with pytest.warns(RuntimeWarning, match="no snapshot of step 2.*No space left"):
            train(ema.model, ema, 1)
    assert list(tmp_path.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ema.model, ema, 2)
        ema.wait()
    assert [each.step for each in read_folder(tmp_path).usable()] == [4, 4]


def test_errors_in_the_thread_come_with_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import posthoc_cli.training.tracking as tracking

    returned = threading.Event()

    def broken(*_: object) -> list[str]:
        returned.wait()
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(tracking, "write", broken)
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, background=True)
    ema.update()
    returned.set()
    assert ema._writer is not None
    ema._writer.join()
    ema.checkpoint_every = None
    with pytest.warns(RuntimeWarning, match="what nobody thought of"):
        ema.update()


def test_values_that_float16_cannot_hold_are_named_once(tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=1)
    model[0].bias.data.fill_(1e5)
    with pytest.warns(RuntimeWarning, match=r"'0.bias'.*bfloat16") as caught:
        ema.update()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update()


def test_a_changed_network_is_refused_by_name(tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None)
    karras = KarrasEMA(model, sigma_rel=0.1)
    ema.update()
    karras.update()
    model[1] = nn.Linear(5, 3)
    for each in (ema, karras):
        with pytest.raises(ValueError, match=r"'1.bias' is \[3\] in the model and \[2\]"):
            each.update()
    resumed = PostHocEMA(nn.Linear(2, 2), folder=tmp_path, checkpoint_every=None)
    resumed.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="missing in the model"):
        resumed.update()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_rels": (0.1,)}, "two or more"),
        ({"sigma_rels": ()}, "two or more"),
        ({"sigma_rels": (0.1, 0.1)}, "same profile"),
        ({"gammas": (6.94, 6.9401)}, "same profile"),
        ({"sigma_rels": (0.1, 0.3)}, "between 0 and"),
        ({"gammas": (-0.5, 3)}, "not above 0"),
        ({"sigma_rels": (0.05, 0.1), "gammas": (5, 10)}, "not both"),
        ({"checkpoint_every": 0}, "checkpoint_every 0"),
        ({"update_every": 1.5}, "update_every 1.5"),
        ({"keep": 0}, "keep 0"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"average_dtype": torch.bfloat16}, "decay near one is lost"),
        ({"prefix": "../x"}, "without a folder"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        PostHocEMA(small(), folder=tmp_path, **arguments)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="choose another path"):
        PostHocEMA(small(), folder=tmp_path / "file" / "folder")


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_cannot_be_tracked_is_refused_before_training(tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Linear):
        """Looks like the one of torch.distributed."""

    sharded = nn.Sequential(FullyShardedDataParallel(2, 2))
    for make in (PostHocEMA, KarrasEMA):
        with pytest.raises(TypeError, match="fully_shard"):
            make(sharded, (0.1, 0.2) if make is PostHocEMA else 0.1)
    model = small()
    model.register_buffer("small", torch.zeros(2, dtype=torch.float32).to(torch.complex32))
    with pytest.raises(ValueError, match=r"'small' is torch.complex32.*include="):
        PostHocEMA(model, folder=tmp_path).update()
    PostHocEMA(model, folder=tmp_path, include=("0.*",)).update()
    with pytest.raises(ValueError, match="nothing to average with a name"):
        PostHocEMA(model, folder=tmp_path, include=("2.*",)).update()


def test_a_state_of_other_profiles_is_refused(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path)
    with pytest.raises(ValueError, match="profiles that the run began with"):
        PostHocEMA(small(), (0.1, 0.2), folder=tmp_path).load_state_dict(ema.state_dict())


# Synthesis from within


def test_synthesize_gives_the_networks_dtypes_and_only_this_run(tmp_path: Path) -> None:
    other = PostHocEMA(nn.Linear(2, 2), folder=tmp_path, checkpoint_every=1, prefix="other")
    other.update()
    model = Tied().bfloat16()
    ema = PostHocEMA(
        model, folder=tmp_path, checkpoint_every=5, dtype=torch.float32, overwrite=True
    )
    with pytest.warns(RuntimeWarning, match="another run's"):
        train(model, ema, 15)
    files = set(tmp_path.iterdir())
    state = ema.synthesize(sigma_rel=0.1, step=10)
    snapshot = load_file(tmp_path / "ema-step00000010-0.100.safetensors")
    assert set(tmp_path.iterdir()) == files
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], snapshot[name].to(value.dtype)), name
    with pytest.raises(UsageError, match="after the last"):
        ema.synthesize(sigma_rel=0.1, step=99)
    with pytest.raises(ValueError, match="one of the two"):
        ema.synthesize()


def test_synthesize_before_the_first_update_uses_the_whole_folder(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=5)
    with pytest.raises(SnapshotError, match=r"holds no \.safetensors files"):
        ema.synthesize(0.07)
    train(ema.model, ema, 15)
    late = PostHocEMA(small(), folder=tmp_path)
    for name, value in ema.synthesize(0.07).items():
        assert torch.equal(late.synthesize(0.07)[name], value)


def test_lend_gives_the_weights_back_to_the_bit(tmp_path: Path) -> None:
    model = Tied()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=5)
    train(model, ema, 15)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    state = ema.synthesize(sigma_rel=0.07)

    def borrow() -> None:
        with ema.lend(sigma_rel=0.07) as borrower:
            assert borrower is model
            assert model.head.weight is model.embedding.weight
            for name, value in model.state_dict().items():
                assert torch.equal(value, state[name]), name
            with pytest.raises(RuntimeError, match="on loan"):
                ema.update()
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        borrow()
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name]), name
    ema.update()
    with pytest.raises(ValueError, match="in the model"), ema.lend(0.07, model=nn.Linear(1, 1)):
        pass


# KarrasEMA


def test_karras_copies_calls_and_evaluates() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    ema = KarrasEMA(model, gamma=3.0)
    assert ema.sigma_rel == pytest.approx((4 / 150) ** 0.5)
    assert ema.beta == 0
    assert ema.eval() is ema.ema_model
    assert not ema.ema_model.training
    model[0].weight.data.fill_(2.0)
    ema.copy_params_from_model_to_ema()
    model.eval()
    x = torch.randn(4, 3)
    assert torch.equal(ema(x), model(x))
    model[0].weight.data.fill_(5.0)
    ema.copy_params_from_ema_to_model()
    assert torch.all(model[0].weight == 2.0)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert model[0].weight.requires_grad
    assert len(list(ema.iter_all_ema_params_and_buffers())) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_karras_state_dict_round_trip(dtype: torch.dtype) -> None:
    def run(ema: KarrasEMA, start: int) -> None:
        for step in range(start, start + 20):
            torch.manual_seed(step)
            for parameter in ema.model.parameters():
                parameter.data.normal_()
            ema.update()

    one = KarrasEMA(small().to(dtype), sigma_rel=0.1, update_every=3)
    run(one, 0)
    other = KarrasEMA(small().to(dtype), sigma_rel=0.1, update_every=3)
    other.load_state_dict({k: v.clone() for k, v in one.state_dict().items()}, strict=True)
    for ema in (one, other):
        run(ema, 20)
    state, again = one.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert other.step == 40
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if k != "step"})


def test_karras_frozen_counts_but_stays_and_thaws() -> None:
    model = Counter()
    ema = KarrasEMA(model, gamma=2.0, frozen=True)
    for step in (1, 2, 3):
        model.set(step)
        ema.update()
    assert (ema.step, ema.ema_model.weight.item()) == (3, 1.0)
    ema.frozen = False
    model.set(4)
    ema.update()
    assert ema.beta == (1 - 3 / 4) ** 3  # all that it missed counts as the present weights
    assert ema.ema_model.weight.item() == pytest.approx(ema.beta + 4 * (1 - ema.beta))


class Uncopyable(Counter):
    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("no copies of me")


def test_karras_with_a_network_of_the_users() -> None:
    with pytest.raises(TypeError, match=r"no copies of me.*ema_model="):
        KarrasEMA(Uncopyable(), sigma_rel=0.1)
    model = Uncopyable()
    model.set(3.0)
    ema = KarrasEMA(model, sigma_rel=0.1, ema_model=Counter)
    ema.update()
    assert ema.ema_model.weight.item() == 3.0


def test_karras_devices() -> None:
    model = small()
    elsewhere = small().to("meta")
    with pytest.raises(ValueError, match="allow_different_devices=True"):
        KarrasEMA(model, sigma_rel=0.1, ema_model=elsewhere).update()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_karras_moves_to_the_network_or_stays() -> None:
    model = small().cuda()
    stays = KarrasEMA(model, sigma_rel=0.1, ema_model=small(), allow_different_devices=True)
    moves = KarrasEMA(model, sigma_rel=0.1, ema_model=small(), move_ema_to_online_device=True)
    for ema, device in ((stays, "cpu"), (moves, "cuda")):
        ema.update()
        assert {each.device.type for each in ema.ema_model.parameters()} == {device}
        assert torch.equal(ema.ema_model[0].weight.cpu(), model[0].weight.cpu())


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, posthoc_cli; assert 'torch' not in sys.modules; "
        "from posthoc_cli import KarrasEMA, PostHocEMA; assert 'torch' in sys.modules; "
        "print(KarrasEMA.__name__, PostHocEMA.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "KarrasEMA PostHocEMA\n"
    import posthoc_cli

    with pytest.raises(AttributeError, match="nothing"):
        posthoc_cli.nothing  # noqa: B018


def test_the_documented_loops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    model = small()
    averaged: list[dict[str, torch.Tensor]] = []
    names = {
        "model": model,
        "batches": range(3000),
        "train_on": lambda _: None,
        "evaluate": lambda lent: averaged.append(lent.state_dict()),
        "averaged_weights": model.state_dict(),
    }
    for block in blocks:
        exec(compile(block, "docs/tracking.md", "exec"), names)
    assert {each.step for each in read_folder(tmp_path / "snapshots").usable()} == {
        1000,
        2000,
        3000,
    }
    assert len(averaged) == 1
    assert read_folder(tmp_path).usable()[0].step == 50000
    for option in inspect.signature(PostHocEMA).parameters:
        assert option == "model" or f"`{option}`" in text


def test_the_documented_errors_are_those_of_the_solve() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    header, *rows = re.findall(r"^\| +(checkpoints|\d+) \|(.*)\|$", text, re.MULTILINE)
    widths = [float(cell) for cell in header[1].split("|")]
    assert len(rows) == 5
    for count, cells in rows:
        every = 1_000_000 / int(count)
        snapshots = [
            Profile(every * (k + 1), float(sigma_rel_to_gamma(width)))
            for k in range(int(count))
            for width in (0.05, 0.10)
        ]
        targets = [Profile(1_000_000, float(sigma_rel_to_gamma(width))) for width in widths]
        errors = solve(snapshots, targets).profile_error
        for cell, error in zip(cells.split("|"), errors, strict=True):
            written = cell.strip().removesuffix(" %")
            half_a_digit = 0.5 * 10.0 ** -len(written.partition(".")[2])
            assert abs(float(written) - 100 * error) <= 1.01 * half_a_digit, (count, cell, error)
