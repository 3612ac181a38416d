"""PostHocEMA(store="delta"): chains that are as packed ones, and that nothing forks or breaks."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from posthoc_cli import PostHocEMA, open_snapshots
from posthoc_cli.errors import MachineError
from posthoc_cli.storage import open_tensors, shared
from posthoc_cli.synthesis.pack import pack, plan_pack
from posthoc_cli.training import snapshot_files, writer
from tests.packing import bases_in, rebuilt, stored
from tests.training.networks import Tied, folder_bytes, small, train

DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def tracked(
    folder: Path, steps: int, make: Callable[[], nn.Module] = small, **options: Any
) -> PostHocEMA:
    options = {"store": "delta", "keyframe_every": 3, "checkpoint_every": 2} | options
    torch.manual_seed(1)
    ema = PostHocEMA(make(), folder=folder, **options)
    train(ema.model, ema, steps)
    ema.close()
    return ema


def resume(folder: Path, state: dict[str, Any], model: nn.Module, **options: Any) -> PostHocEMA:
    options = {"store": "delta", "keyframe_every": 3, "checkpoint_every": 2} | options
    ema = PostHocEMA(model, folder=folder, later="set aside", **options)
    ema.load_state_dict(state)
    return ema


def links(folder: Path) -> dict[int, int]:
    """How many links each step's first snapshot has."""
    paths = folder.glob("*-0.050.safetensors")
    return {
        int(stored(path)[0]["step"]): len(open_tensors(path).links) or 1 for path in sorted(paths)
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_tracked_is_as_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    options: dict[str, Any] = {"raw": True, "ignore_names": ["turned"], "make": Tied}
    whole, packed, *both = (tmp_path / name for name in ("whole", "packed", "streamed", "held"))
    tracked(whole, 10, store="whole", dtype=torch.float32, **options)
    for folder in both:
        tracked(folder, 10, dtype=dtype, delta_memory=folder.name == "held", **options)
    snapshots = open_snapshots(whole).contents.usable()
    jobs = plan_pack(snapshots, packed, keyframe_every=3)
    pack(jobs, str(dtype).removeprefix("torch."), verify=True)
    for folder in both:
        assert sorted(folder_bytes(packed)) == sorted(folder_bytes(folder))
        for path in packed.glob("*.safetensors"):
            (one, tensors), (other, here) = (stored(each / path.name) for each in (packed, folder))
            for key in ("scale", "scales", "step", "encoding"):
                assert one.get(key) == other.get(key)
            for metadata in (one, other) if "encoding" in one else ():
                metadata["of"] = str([(name, c) for name, _, c in bases_in(metadata)])
            assert one.get("of") == other.get("of")
            assert tensors.keys() == here.keys()
            for name, (code, values) in tensors.items():
                assert here[name][0] == code
                assert here[name][1].tobytes() == values.tobytes(), (path.name, name)
        assert links(folder) == {2: 1, 4: 2, 6: 3, 8: 1, 10: 2}


class Killed(BaseException):
    """What nothing catches."""


def test_killed_between_any_two_files_it_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state every third step; also killed as old chains are removed or later ones set aside."""
    options: dict[str, Any] = {"keep": 1, "keyframe_every": 2, "delta_memory": True}
    changes = [0, 0]  # how many files came or went, and at which it is killed
    places: list[tuple[Any, str]] = [
        (writer, "write_snapshot"),
        (writer, "write_difference"),
        (snapshot_files, "remove_whole"),
        (shared.os, "replace"),
    ]

    def counting(function: Any) -> Any:
        def counted(*values: Any, **named: Any) -> Any:
            changes[0] += 1
            if changes[0] == changes[1]:
                raise Killed
            return function(*values, **named)

        return counted

    for module, name in places:
        monkeypatch.setattr(module, name, counting(getattr(module, name)))

    def run(folder: Path, state: Any) -> Any:
        """Train to the end, or be killed; returns the last state."""
        model = small()
        ema = PostHocEMA(
            model, folder=folder, checkpoint_every=2, store="delta", later="set aside", **options
        )
        ema.run = "the run"
        if state is not None:
            model.load_state_dict(state[0])
            ema.load_state_dict(state[1])
        else:
            state = copy.deepcopy((model.state_dict(), ema.state_dict()))
        try:
            while ema.step < 8:
                train(model, ema, 1)
                if ema.step % 3 == 0:
                    state = copy.deepcopy((model.state_dict(), ema.state_dict()))
        except Killed:
            pass
        ema.close()
        return state

    warnings.simplefilter("ignore", RuntimeWarning)
    run(tmp_path / "whole", None)
    expected, total = folder_bytes(tmp_path / "whole"), changes[0]
    assert len(expected) == 4
    for at in range(1, total + 1):
        folder = tmp_path / str(at)
        changes[:] = [0, at]
        state = run(folder, None)
        contents = open_snapshots(folder).contents if list(folder.glob("ema*")) else None
        assert contents is None or not contents.problems
        changes[:] = [0, at % 5 + 1]  # and once more, as it resumes
        state = run(folder, state)
        if list(folder.glob("ema*")):
            assert not open_snapshots(folder).contents.problems
        changes[:] = [0, 0]
        run(folder, state)
        assert folder_bytes(folder) == expected, at


def test_keep_removes_whole_chains(tmp_path: Path) -> None:
    tracked(tmp_path / "one", 10, keep=2)
    assert links(tmp_path / "one") == {8: 1, 10: 2}
    assert len(folder_bytes(tmp_path / "one")) == 4
    tracked(tmp_path / "two", 14, keep=2)
    assert links(tmp_path / "two") == {8: 1, 10: 2, 12: 3, 14: 1}


def test_a_chain_goes_on_with_another_length_and_dtype(tmp_path: Path) -> None:
    ema = tracked(tmp_path, 6)
    resumed = resume(
        tmp_path, ema.state_dict(), ema.model, keyframe_every=5, dtype=torch.float8_e4m3fn
    )
    train(ema.model, resumed, 6)
    resumed.close()
    assert links(tmp_path) == {2: 1, 4: 2, 6: 3, 8: 4, 10: 5, 12: 1}
    again = resume(tmp_path, resumed.state_dict(), ema.model, keyframe_every=1, background=True)
    train(ema.model, again, 2)
    assert links(tmp_path)[14] == 1
    assert not open_snapshots(tmp_path).contents.problems
    averages = again.state_dict()["averages"]
    for average, width in zip(averages, ("0.050", "0.100"), strict=True):
        values = rebuilt(tmp_path / f"ema-step00000014-{width}.safetensors")
        for name, tensor in average.items():
            np.testing.assert_allclose(values[name], tensor.numpy(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("what", ["removed", "changed", "the first of the last step"])
def test_a_broken_chain_is_told_and_a_new_one_begun(what: str, tmp_path: Path) -> None:
    ema = tracked(tmp_path, 6)
    name = f"ema-step0000000{6 if what.startswith('the') else 4}-0.050.safetensors"
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if what == "changed":
        data[-1] ^= 1
        path.write_bytes(data)
    resumed = resume(tmp_path, ema.state_dict(), ema.model)
    with pytest.warns(RuntimeWarning, match=f"step 8 begins a new chain.*{name}"):
        train(ema.model, resumed, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ema.model, resumed, 2)
    assert {
        step: len(open_tensors(tmp_path / f"ema-step{step:08d}-0.050.safetensors").links) or 1
        for step in (8, 10)
    } == {8: 1, 10: 2}


def test_whole_snapshots_become_a_chain_of_exact_ones(tmp_path: Path) -> None:
    """The float16 of the ones before is nothing to build on: float32's is."""
    ema = tracked(tmp_path, 4, store="whole")
    train(ema.model, resume(tmp_path, ema.state_dict(), ema.model), 4)
    assert links(tmp_path) == {2: 1, 4: 1, 6: 1, 8: 2}
    assert stored(tmp_path / "ema-step00000006-0.050.safetensors")[1]["0.weight"][0] == "F32"
    assert not open_snapshots(tmp_path).contents.problems


def test_a_checkpoint_at_the_same_step_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of the renames it has lost nothing; nor, of other values, broken any."""
    ema = tracked(tmp_path, 8)
    before = folder_bytes(tmp_path)
    ema.checkpoint()
    assert folder_bytes(tmp_path) == before
    replace, link, left = os.replace, os.link, [0]

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    for changed in (False, True):
        if changed:
            for average in ema.state_dict()["averages"]:
                average["0.weight"] += 1
        for at in (1, 2):
            left[0] = at
            with monkeypatch.context() as patched, pytest.raises(Killed):
                patched.setattr(os, "replace", lambda *paths: (count(), replace(*paths)))
                patched.setattr(os, "link", lambda *paths: (count(), link(*paths)))
                ema.checkpoint()
            assert not open_snapshots(tmp_path).contents.problems
            if not changed:
                assert folder_bytes(tmp_path) == before
    assert links(tmp_path) == {2: 1, 4: 2, 6: 3, 8: 1}
    ema.checkpoint()
    values = rebuilt(tmp_path / "ema-step00000008-0.100.safetensors")["0.weight"]
    average = ema.state_dict()["averages"][1]["0.weight"]
    np.testing.assert_allclose(values, average.numpy(), rtol=0, atol=2e-3)


def test_what_is_set_aside_has_its_bases_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With links or without; it can be read where it is."""
    state, model = tracked(tmp_path, 4).state_dict(), small()
    train(model, resume(tmp_path, state, model, keyframe_every=9), 4)
    before = {path.name: rebuilt(path) for path in tmp_path.glob("*.safetensors")}
    for number, linked in enumerate((True, False), 1):
        if not linked:
            monkeypatch.setattr(os, "link", _no_links)
        again = resume(tmp_path, state, small(), keyframe_every=9)
        with pytest.warns(RuntimeWarning, match="the 4 after that are now in"):
            train(again.model, again, 4)
        aside = tmp_path / "other-runs" / (again.run if number == 1 else f"{again.run}.{number}")
        contents = open_snapshots(aside).contents
        assert not contents.problems
        assert len(contents.usable()) == len(before)
        if linked:
            for name, values in before.items():
                for key, value in rebuilt(aside / name).items():
                    assert value.tobytes() == values[key].tobytes()
        again.close()


def test_killed_while_it_sets_aside_it_goes_on_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, model = tracked(tmp_path / "0", 4).state_dict(), small()
    train(model, resume(tmp_path / "0", state, model, keyframe_every=9), 4)
    before = folder_bytes(tmp_path / "0")
    replace = os.replace
    for kill in range(1, 6):
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(kill))
        left = [kill]

        def replacing(*paths: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            replace(*paths)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replacing)
            again = resume(folder, state, small(), keyframe_every=9)
            with contextlib.suppress(Killed):
                again.update()
            again.close()
        again = resume(folder, state, small(), keyframe_every=9)
        warnings.simplefilter("ignore", RuntimeWarning)
        train(again.model, again, 1)
        again.close()
        asides = list((folder / "other-runs").iterdir())
        assert [path.name for path in asides] == [again.run]
        assert not open_snapshots(asides[0]).contents.problems
        assert folder_bytes(asides[0]) == before


def _no_links(*_: Any) -> None:
    raise OSError("no links here")


def test_synthesis_in_training_and_what_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = tracked(tmp_path / "delta", 6, delta_memory=True, keyframe_every=4)
    exact = tracked(tmp_path / "whole", 6, store="whole", dtype=torch.float32)
    made, right = (each.synthesize(sigma_rel=0.07) for each in (ema, exact))
    for name, value in made.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=1e-3)

    def full(*_: Any, **__: Any) -> None:
        raise MachineError("disk", "No space left on device", "free some")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_difference", full)
        with pytest.warns(RuntimeWarning, match="no snapshots of step 8.*No space") as caught:
            train(ema.model, ema, 2)
        assert len(caught) == 1
    train(ema.model, ema, 2)
    assert links(tmp_path / "delta") == {2: 1, 4: 2, 6: 3, 10: 4}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"store": "difference"}, "'whole' or 'delta'"),
        ({"dtype": torch.float32}, "torch.float16, torch.bfloat16 or torch.float8_e4m3fn"),
        ({"dtype": None}, "dtype None"),
        ({"keyframe_every": 0}, "keyframe_every 0"),
        ({"keyframe_every": 256}, "1 to 255"),
        ({"store": "whole", "delta_memory": True}, "give store='delta'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        PostHocEMA(small(), folder=tmp_path, **{"store": "delta"} | options)
