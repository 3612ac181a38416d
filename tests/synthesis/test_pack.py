"""Packed snapshots against sums in float64 that are made by other means."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from posthoc_cli.api import open_snapshots, verify
from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.formats import open_network
from posthoc_cli.storage.dtypes import DTYPES as FORMATS
from posthoc_cli.synthesis.pack import Packed, pack, plan_pack
from tests.packing import (
    Tensors,
    averages,
    bases_in,
    rebuilt,
    stored,
    write,
    write_first_version,
)
from tests.support import contents

CODES = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}


def packed(
    source: Path, to: Path, dtype: str = "float16", every: int = 4, **more: Any
) -> list[Packed]:
    snapshots = open_snapshots(source).contents.usable()
    return pack(plan_pack(snapshots, to, keyframe_every=every), dtype, **more)


def read(path: Path) -> Tensors:
    """What a reader of the whole network gets."""
    whole = contents(open_network(path)).items()
    return {
        name: np.frombuffer(data, FORMATS[dtype].numpy()).reshape(shape)
        for name, (dtype, shape, data) in whole
    }


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert each.dtype == other[name].dtype
        assert each.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_values_are_those_of_the_last_rounding(tmp_path: Path, dtype: str) -> None:
    made = averages()
    source = write(tmp_path / "plain", made)
    found = packed(source, tmp_path / "packed", dtype, verify=True)
    assert all(sum(number for _, number in one.job.bases) in (0, 1) for one in found)
    keyframes = [one for one in found if one.job.base is None]
    assert len(keyframes) == 2
    for one in found:
        snapshot = one.job.snapshot
        wanted = made[snapshot.step, f"{snapshot.sigma_rel:.2f}"]
        metadata, own = stored(one.job.output)
        sums, values = rebuilt(one.job.output), read(one.job.output)
        if one.job.base is None:
            same(values, wanted)
            continue
        assert bases_in(metadata)[0][0] == one.job.base.name
        assert own.keys() <= {"a.weight", "b.bias", "count"}, "what never changes is stored once"
        for name in ("frozen", "count", "mask", "none"):
            assert values[name].tobytes() == wanted[name].tobytes()
        for name in ("a.weight", "b.bias"):
            code, difference = own[name]
            assert code == CODES[dtype]
            assert np.array_equal(values[name], sums[name].astype(np.float32))
            exponent = json.loads(metadata.get("scales", "{}")).get(name, int(metadata["scale"]))
            spacing = FORMATS[code].spacing(difference.astype(np.float64)) * 2.0**exponent
            assert (np.abs(sums[name] - wanted[name]) <= spacing / 2 * (1 + 1e-9)).all()
            peak = np.abs(difference.astype(np.float64)).max()
            assert peak > 2.0**-4 or code == "BF16", "the format's range is used"


@pytest.mark.parametrize("now", [{"ema_decay": 0.999}, {"ema_decay": 0.99, "key": "model"}])
def test_what_is_there_is_of_the_same_profile_and_network(
    tmp_path: Path, now: dict[str, Any]
) -> None:
    for step in (10, 20):
        state = {"ema": {"w": torch.full((8,), 1.0 + step)}, "model": {"w": torch.zeros(8)}}
        torch.save(state, tmp_path / f"model_{step}.pt")
    before: dict[str, Any] = {"ema_decay": 0.99, "key": "ema"}
    for how in (before, before | now):
        snapshots = open_snapshots(tmp_path, **how).contents.usable()
        jobs = plan_pack(snapshots, tmp_path / "packed")
        if how == before:
            assert all(one.seconds is not None for one in pack(jobs, "float16"))
            assert all(one.seconds is None for one in pack(jobs, "float16"))
        else:
            with pytest.raises(UsageError, match="not what this makes"):
                pack(jobs, "float16")


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_outputs_are_the_sums_in_float64(tmp_path: Path, dtype: str) -> None:
    source = write(tmp_path / "plain", averages())
    packed(source, tmp_path / "packed", dtype)
    run = open_snapshots(tmp_path / "packed")
    solution = run.solve(sigma_rel=[0.04, 0.07], method="blup")
    paths = solution.save(tmp_path / "out-{sigma_rel}.safetensors", dtype="float64")
    assert "scale" not in stored(paths[0])[0]
    for path, weights in zip(paths, solution.weights, strict=True):
        out = load_file(path)
        sums = [rebuilt(snapshot.index.path) for snapshot in run.snapshots]
        for name in ("a.weight", "b.bias"):
            terms = [
                w * each[name].astype(np.float64) for w, each in zip(weights, sums, strict=True)
            ]
            assert np.abs(out[name] - np.sum(terms, 0)).max() < 1e-13 * np.abs(terms).max()
        assert out["count"] == 120
        newest = averages()[120, "0.10"]
        assert out["frozen"].tobytes() == newest["frozen"].astype(np.float64).tobytes()
        assert verify(path, tmp_path / "packed", full=True).problems == []


def test_some_snapshots_of_a_chain(tmp_path: Path) -> None:
    """Links are read along; what is the same in those used comes out bit for bit."""
    made = averages(8)
    for (step, _), tensors in made.items():
        tensors["late"] = np.full(3, 0.5 if step < 60 else 0.25, np.float32)
    source = write(tmp_path / "plain", made)
    packed(source, tmp_path / "packed", every=100)
    run = open_snapshots(tmp_path / "packed", only=["*-01[024]0-*"])
    assert len(run.snapshots) == 6
    solution = run.solve(sigma_rel=0.07)
    out = load_file(solution.save(tmp_path / "out.safetensors")[0])
    late = read(tmp_path / "packed" / "ema-0140-0.05.safetensors")["late"]
    assert out["late"].tobytes() == late.tobytes()
    assert (late == 0.25).all()
    step = open_snapshots(tmp_path / "packed").solve(sigma_rel=0.07, step=60)
    assert {each.step for each in step.snapshots} == {20, 40, 60}
    assert open_snapshots(tmp_path / "packed").solve(sigma_rel=0.07).state_dict()["late"].shape == (
        3,
    )


def test_the_first_version_is_read_too(tmp_path: Path) -> None:
    """And packed again."""
    made = averages()
    folder = write_first_version(tmp_path / "first", made)
    run = open_snapshots(folder)
    assert [len(each.chain) for each in run.snapshots] == [0, 2, 2, 3, 3, 4, 0, 2, 2, 3, 3, 4]
    for snapshot in run.snapshots:
        values = rebuilt(snapshot.index.path)
        wanted = made[snapshot.step, f"{snapshot.sigma_rel:.2f}"]
        for name, each in read(snapshot.index.path).items():
            assert np.array_equal(each, values[name].astype(each.dtype))
            assert np.allclose(each.astype(float), wanted[name], rtol=0, atol=2e-4)
    packed(folder, tmp_path / "second", every=100, verify=True)
    solution = run.solve(sigma_rel=0.07)
    path = solution.save(tmp_path / "out.safetensors", dtype="float64")[0]
    known: dict[Path, Tensors] = {}
    sums = [rebuilt(each.index.path, known)["a.weight"] for each in run.snapshots]
    wanted = np.tensordot(solution.weights[0], [each.astype(np.float64) for each in sums], 1)
    assert np.allclose(load_file(path)["a.weight"], wanted, rtol=0, atol=1e-13)
    assert verify(path, folder, full=True).problems == []


def test_profiles_of_any_number_and_raw_ones(tmp_path: Path) -> None:
    """Some of steps of their own, at an uneven pace; a raw one tells of its step what averages do
    of theirs."""
    steps = [3, 6, 9, 12, 13, 14, 15, 40, 41, 90, 140]
    kinds: dict[str, tuple[dict[str, str], float]] = {
        "0.05": ({"sigma_rel": "0.05"}, 16.97),
        "0.10": ({"sigma_rel": "0.10"}, 6.94),
        "0.20": ({"sigma_rel": "0.20"}, 1.6),
        "raw": ({"decay": "0"}, np.inf),
    }
    rng = np.random.default_rng(0)
    network = rng.normal(size=3000)
    values = {name: np.zeros(3000) for name in kinds}
    made: dict[str, Tensors] = {}
    folder = tmp_path / "plain"
    folder.mkdir()
    for step in range(1, steps[-1] + 1):
        network += 0.05 * rng.normal(size=3000)
        for name, (metadata, gamma) in kinds.items():
            values[name] += (1 - (1 - 1 / step) ** (gamma + 1)) * (network - values[name])
            if step in steps and (name != "0.20" or step % 2 == 0) and (name != "raw" or step > 12):
                file = f"s-{step:03d}-{name}.safetensors"
                made[file] = {"w": values[name].astype(np.float32)}
                save_file(made[file], folder / file, metadata | {"step": str(step)})
    for dtype, most in (("float16", 1e-3), ("float8_e4m3fn", 0.1)):
        found = packed(folder, tmp_path / dtype, dtype, every=100, verify=True)
        known: dict[Path, Tensors] = {}
        off = {}
        for one in found:
            name = one.job.output.name
            value, wanted = rebuilt(one.job.output, known)["w"], made[name]["w"]
            assert np.array_equal(read(one.job.output)["w"], value.astype(np.float32))
            off[name] = np.sqrt(np.mean((value - wanted.astype(np.float64)) ** 2))
            assert off[name] < most * np.abs(wanted).max()
        # Rounded to as many digits, an average of which much is known loses little.
        for step, most in ((140, 0.3), (15, 0.1)):
            names = [f"s-{step:03d}-{width}.safetensors" for width in ("0.05", "0.10")]
            assert off[names[1]] < most * off[names[0]]


def test_beside_plain_snapshots(tmp_path: Path) -> None:
    """Of a folder with both, and of dtypes of their own."""
    made = averages()
    source = write(tmp_path / "plain", made)
    both = tmp_path / "both"
    packed(source, both, every=100)
    for width in ("0.05", "0.10"):
        tensors = {
            n: t.astype(np.float16) if t.dtype == np.float32 else t
            for n, t in made[120, width].items()
        }
        write(both, {(120, width): tensors})
    run = open_snapshots(both)
    assert [bool(each.chain) for each in run.snapshots] == [False, *[True] * 9, False, False]
    solution = run.solve(sigma_rel=0.07)
    out = load_file(solution.save(tmp_path / "out.safetensors", dtype="float64")[0])
    sums = [
        rebuilt(each.index.path) if each.step < 120 else load_file(each.index.path)
        for each in run.snapshots
    ]
    for name in ("a.weight", "b.bias"):
        wanted = np.tensordot(
            solution.weights[0], [each[name].astype(np.float64) for each in sums], 1
        )
        assert np.allclose(out[name], wanted, rtol=0, atol=1e-13 * np.abs(wanted).max() * 100)
    assert verify(tmp_path / "out.safetensors", both, full=True).problems == []


def test_what_is_not_finite_is_stored_whole(tmp_path: Path) -> None:
    """And the chain goes on behind it."""
    made = averages()
    made[60, "0.05"]["a.weight"][3, 4] = np.nan
    made[60, "0.10"]["b.bias"][2] = np.inf
    source = write(tmp_path / "plain", made)
    packed(source, tmp_path / "packed", every=100, verify=True)
    for step, width in ((60, "0.05"), (60, "0.10"), (80, "0.05")):
        found = read(tmp_path / "packed" / f"ema-{step:04d}-{width}.safetensors")
        if step == 60:
            assert np.isfinite(found["a.weight"]).sum() == 2800 - (width == "0.05")
        else:
            same({"a": found["a.weight"]}, {"a": made[80, "0.05"]["a.weight"]})
    for path in sorted((tmp_path / "packed").glob("*-0[01][0-9]0-*")):
        step, width = int(path.name[4:8]), path.name[9:13]
        found, wanted = read(path), made[step, width]
        near = np.isclose(
            found["a.weight"], wanted["a.weight"], rtol=1e-2, atol=1e-3, equal_nan=True
        )
        assert near.all()


def test_small_and_large_differences_keep_their_digits(tmp_path: Path) -> None:
    made = averages()
    for number, tensors in enumerate(made.values()):
        tensors["tiny"] = np.float32(1e-30) * np.linspace(1, 2 + number, 50, dtype=np.float32)
        tensors["huge"] = np.float32(1e30) * np.linspace(1, 2 + number, 50, dtype=np.float32)
    source = write(tmp_path / "plain", made)
    for dtype, most in (("float16", 2**-11), ("bfloat16", 2**-8), ("float8_e4m3fn", 2**-4)):
        packed(source, tmp_path / dtype, dtype, every=100, verify=True)
        for (step, width), wanted in made.items():
            found = read(tmp_path / dtype / f"ema-{step:04d}-{width}.safetensors")
            for name in ("tiny", "huge"):
                assert np.abs(found[name] / wanted[name] - 1).max() < 1.1 * most


def test_float16_and_float64_snapshots(tmp_path: Path) -> None:
    """What has no more bits than the differences would have is kept as it is."""
    for name, dtype in (("half", np.float16), ("double", np.float64)):
        made = averages(3, dtype=dtype)
        source = write(tmp_path / name, made)
        for one in packed(source, tmp_path / f"{name}-packed", verify=True):
            snapshot = one.job.snapshot
            wanted = made[snapshot.step, f"{snapshot.sigma_rel:.2f}"]
            found = read(one.job.output)
            if dtype == np.float16:
                same(found, wanted)
            else:
                assert np.allclose(found["a.weight"], wanted["a.weight"], rtol=0, atol=3e-4)
                assert np.array_equal(found["a.weight"], rebuilt(one.job.output)["a.weight"])


def test_differences_beyond_all_scales(tmp_path: Path) -> None:
    made = averages(3, dtype=np.float64)
    for at, tensors in enumerate(made.values()):
        tensors["vast"] = np.array([(-1e300, 1e300)[at % 2], 1.0])
    source = write(tmp_path / "plain", made)
    for one in packed(source, tmp_path / "packed", "float8_e4m3fn", every=100, verify=True):
        wanted = made[one.job.snapshot.step, f"{one.job.snapshot.sigma_rel:.2f}"]
        same({"vast": read(one.job.output)["vast"]}, {"vast": wanted["vast"]})


def test_blup_knows_the_rounding(tmp_path: Path) -> None:
    """Its noise is that of the last difference, not of what the file's numbers look like."""
    from posthoc_cli.snapshots.sampling import sample_moments

    made = averages(12)
    source = write(tmp_path / "plain", made)
    packed(source, tmp_path / "packed", "float8_e4m3fn", every=100)
    run = open_snapshots(tmp_path / "packed")
    moments = sample_moments(run.snapshots)
    for at, snapshot in enumerate(run.snapshots):
        found = rebuilt(snapshot.index.path)
        wanted = made[snapshot.step, f"{snapshot.sigma_rel:.2f}"]
        names = ("a.weight", "b.bias")
        off = np.concatenate([(found[n] - wanted[n].astype(np.float64)).ravel() for n in names])
        if snapshot.chain:
            assert 0.5 < np.mean(off**2) / moments.rounding[at] < 1.5
        else:
            assert moments.rounding[at] < 1e-14
    values = np.array(
        [np.concatenate([rebuilt(s.index.path)[n].ravel() for n in names]) for s in run.snapshots],
        float,
    )
    assert np.allclose(moments.differences[3, 7], np.mean((values[3] - values[7]) ** 2), rtol=1e-9)


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    made = averages()
    source = write(tmp_path / "plain", made)
    whole = packed(source, tmp_path / "whole")
    jobs = plan_pack(open_snapshots(source).contents.usable(), tmp_path / "parts", keyframe_every=4)
    for count in (1, 5, 8):
        pack(jobs[:count], "float16")
    again = pack(jobs, "float16", verify=True)
    assert [one.seconds is None for one in again] == 8 * [True] + 4 * [False]
    for one, other in zip(whole, again, strict=True):
        assert one.job.output.read_bytes() == other.job.output.read_bytes()
    again[5].job.output.unlink()
    assert sum(one.seconds is not None for one in pack(jobs, "float16")) == 1
    with pytest.raises(UsageError, match="not what this makes"):
        pack(jobs, "bfloat16")
    assert all(one.seconds is not None for one in pack(jobs, "bfloat16", overwrite=True)[1:])
    pack(jobs, "bfloat16", verify=True)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_bytes_do_not_depend_on_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Nor on threads. Of tensors in pieces the scales are guessed, and made right; the last one is
    odd."""
    made = averages(3)
    draw = np.random.default_rng(0)
    for at, tensors in enumerate(made.values()):
        tensors["large"] = draw.standard_normal(150_001, np.float32)
        tensors["broken"] = tensors["large"].copy()
        tensors["rising"] = tensors["large"] * np.geomspace(1, 1000, 150_001, dtype=np.float32)
        tensors["late"] = np.where(np.arange(150_001) < 140_000, 1, tensors["large"])
        tensors["zeros"] = np.full(3, (-0.0, 0.0)[at % 2], np.float32)
        tensors["broken"][-1] = (1, np.nan, np.inf)[at % 3]
    source = write(tmp_path / "plain", made)
    found = []
    for at, (size, workers) in enumerate(((1 << 26, 1), (0, 1), (0, 3))):
        monkeypatch.setattr("posthoc_cli.synthesis.deltas._PIECE_BYTES", size)
        monkeypatch.setattr("posthoc_cli.synthesis.deltas.default_workers", lambda n=workers: n)
        every = packed(source, tmp_path / str(at), dtype, verify=True)
        found.append([one.job.output.read_bytes() for one in every])
    assert found[0] == found[1] == found[2]


class Killed(BaseException):
    """What nothing catches."""


def test_killed_between_any_two_files_it_leaves_whole_chains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on to the same bytes, however many files are written together."""
    source = write(tmp_path / "plain", averages(4))
    for one in packed(source, tmp_path / "whole", every=3):
        assert one.seconds is not None
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    link = os.link
    for most in (0, 5, 100):
        told: list[int] = []
        monkeypatch.setattr("posthoc_cli.synthesis.pack.can_open", lambda files, n=most: files <= n)
        folder = tmp_path / str(most)
        for at in (1, 2, 4, 0):
            left = [at]

            def linking(*paths: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                link(*paths)

            monkeypatch.setattr(os, "link", linking)
            told.clear()
            with contextlib.suppress(Killed):
                packed(source, folder, every=3, verify=at == 0, progress=told.append)
            there = {path.name for path in folder.glob("*.safetensors")}
            if there:
                contents = open_snapshots(folder).contents
                assert not contents.problems
                assert {each.file for each in contents.usable()} == there
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
        values = sum(each.bytes for each in open_snapshots(source).contents.usable())
        assert 1.5 * values < sum(told) <= 2 * values


def test_only_what_is_to_be_written_must_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What never changes takes no space; what may change is told before anything is written."""
    made = averages(4)
    for tensors in made.values():
        tensors["frozen too"] = np.ones(100_000, np.float32)
    source = write(tmp_path / "plain", made)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=700_000))
    assert sum(one.bytes for one in packed(source, tmp_path / "packed", every=100)) < 700_000
    for at, tensors in enumerate(made.values()):
        tensors["frozen too"] = np.full(100_000, at, np.float32)
    source = write(tmp_path / "other", made)
    with pytest.raises(MachineError, match="are missing on its disk"):
        packed(source, tmp_path / "full", every=100)
    assert not list((tmp_path / "full").iterdir())


def test_verify_finds_what_the_disk_did(tmp_path: Path) -> None:
    source = write(tmp_path / "plain", averages(3))
    found = packed(source, tmp_path / "packed")
    last = found[-1].job.output
    data = bytearray(last.read_bytes())
    data[-700] ^= 0x44
    last.write_bytes(data)
    with pytest.raises(SnapshotError, match=r"is not what it was made of.*remove the file"):
        packed(source, tmp_path / "packed", verify=True)
    last.unlink()
    assert packed(source, tmp_path / "packed", verify=True)[-1].seconds is not None


def test_what_builds_on_a_damaged_file_names_that(tmp_path: Path) -> None:
    """To replace what builds on it alone would hide the damage."""
    source = write(tmp_path / "plain", averages(3))
    packed(source, tmp_path / "packed")
    wanted = {path: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    damaged = tmp_path / "packed" / "ema-0040-0.05.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 0x44
    damaged.write_bytes(data)
    with pytest.raises(SnapshotError, match=f"remove '{damaged.name}', and pack again"):
        packed(source, tmp_path / "packed")
    damaged.unlink()
    packed(source, tmp_path / "packed")
    assert {path: path.read_bytes() for path in wanted} == wanted


def test_nothing_makes_no_jobs(tmp_path: Path) -> None:
    assert plan_pack([], tmp_path / "packed") == []


def test_the_folder_itself_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "plain", averages(1))
    with pytest.raises(UsageError, match="the snapshots lie in it"):
        packed(source, source)
    with pytest.raises(UsageError, match="out of bounds"):
        packed(source, tmp_path / "out", every=0)


def test_packed_snapshots_are_packed_again(tmp_path: Path) -> None:
    source = write(tmp_path / "plain", averages(3))
    packed(source, tmp_path / "one")
    packed(tmp_path / "one", tmp_path / "two", verify=True)
    assert len(open_snapshots(tmp_path / "two").snapshots) == 6
