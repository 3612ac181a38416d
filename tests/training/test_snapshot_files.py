"""The snapshots of PostHocEMA: what is in them, whose they are, and what fails."""

from __future__ import annotations

import copy
import errno
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from posthoc_cli import KarrasEMA, PostHocEMA
from posthoc_cli.errors import MachineError, UsageError
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.solver.profiles import sigma_rel_to_gamma
from posthoc_cli.storage import atomic as atomicfile
from posthoc_cli.storage import header as tensorfile
from posthoc_cli.storage.header import read_header
from posthoc_cli.training import writer
from tests.training.networks import Tied, folder_bytes, small, train


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


def test_include_takes_a_part_of_the_network(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, include=("1.*",))
    ema.update()
    assert set(read_folder(tmp_path).usable()[0].index.tensors) == {"1.weight", "1.bias"}


def test_keep_removes_only_this_runs_oldest(tmp_path: Path) -> None:
    other = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, prefix="other")
    other.update()
    other.close()
    (tmp_path / "notes.txt").write_text("mine")
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=2, keep=2, overwrite=True)
    with pytest.warns(RuntimeWarning, match="another run's"):
        train(ema.model, ema, 9)
    assert sorted(folder_bytes(tmp_path)) == [
        *(
            f"ema-step0000000{step}-{width}.safetensors"
            for step in (6, 8)
            for width in ("0.050", "0.100")
        ),
        "notes.txt",
    ]
    assert sorted(folder_bytes(tmp_path / "other-runs" / other.run)) == [
        "other-step00000001-0.050.safetensors",
        "other-step00000001-0.100.safetensors",
    ]


def test_keep_spares_what_an_abandoned_future_left(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=4, keep=1)
    train(ema.model, ema, 2)
    state = copy.deepcopy(ema.state_dict())
    train(ema.model, ema, 6)
    resumed = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, keep=1, later="set aside")
    resumed.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="up to step 8, and it resumes at step 2"):
        train(resumed.model, resumed, 2)
    assert {each.step for each in read_folder(tmp_path).usable()} == {4}
    assert {each.step for each in read_folder(tmp_path / "other-runs" / ema.run).usable()} == {8}


def test_a_resumed_run_goes_on_in_its_folder_and_another_is_refused(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1)
    ema.update()
    ema.close()
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
    assert folder_bytes(tmp_path) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ema.model, ema, 2)
        ema.wait()
    assert [each.step for each in read_folder(tmp_path).usable()] == [4, 4]


def test_errors_in_the_thread_come_with_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned = threading.Event()

    def broken(*_: object) -> list[str]:
        returned.wait()
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(writer, "write_snapshot", broken)
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=1, background=True)
    ema.update()
    returned.set()
    ema._writer.wait()
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


def test_a_folder_that_cannot_be_made_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="choose another path"):
        PostHocEMA(small(), folder=tmp_path / "file" / "folder")
