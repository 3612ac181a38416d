"""`posthoc pack`, and packed folders as the other commands see them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from posthoc_cli.api import open_snapshots
from posthoc_cli.cli.inspect import _draw_snapshots
from tests.command import ENVIRONMENT, ROOT, Posthoc
from tests.packing import averages, bases_in, rebuilt, stored, write


@pytest.fixture
def packed(tmp_path: Path, posthoc_here: Posthoc) -> Path:
    """12 snapshots of 6 steps, with a keyframe at the first and the fifth."""
    write(tmp_path / "plain", averages())
    assert posthoc_here("pack", "plain", "packed", "--keyframe-every", "4", "-q").code == 0
    return tmp_path / "packed"


def test_pack_tells_bytes_and_errors(
    tmp_path: Path, posthoc_here: Posthoc, check_json: Callable[[str, Any], None]
) -> None:
    write(tmp_path / "plain", averages())
    run = posthoc_here("pack", "plain", "out", "--dtype", "float8_e4m3fn", "--verify", "--json")
    assert run.code == 0, run
    check_json("pack", run.json)
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert run.json["bytes"] == sum(sizes)
    assert run.json["bytes"] < 0.5 * run.json["bytes_before"]
    assert [one["base"] is None for one in run.json["packed"]] == [True] + 11 * [False]
    assert [each["sigma_rel"] for each in run.json["expected"]] == [0.03, 0.071, 0.15]
    assert all(each["after"] >= 0.9 * each["before"] > 0 for each in run.json["expected"])
    again = posthoc_here("pack", "plain", "out", "--dtype", "float8_e4m3fn", "-q")
    assert "12 snapshots" in again.out
    assert again.out.endswith("done already\n")
    again = posthoc_here("pack", "plain", "out", "--dtype", "float8_e4m3fn", "--verify", "-q")
    assert again.out.endswith("done already; verified\n")
    posthoc_here("pack", "plain", "plain").failed(2, "plain: the snapshots lie in it; .*")
    run = posthoc_here("pack", "plain", "x", "--keyframe-every", "0")
    run.failed(2, "--keyframe-every: 0 is out of bounds; give 1 to 255")
    posthoc_here("pack", "plain", "x", "--dtype", "int8").failed(2, "--dtype: 'int8' is not .*")


def test_inspect_shows_the_chain(
    packed: Path, posthoc_here: Posthoc, check_json: Callable[[str, Any], None]
) -> None:
    run = posthoc_here("inspect", "packed", "--json")
    assert run.code == 0, run
    check_json("inspect", run.json)
    assert [len(each["chain"]) for each in run.json["snapshots"]] == [
        *(0, 2),  # of the first profile, and of the second
        *(2, 4),
        *(3, 6),
        *(4, 8),
        *(0, 2),
        *(2, 4),
    ]
    third = run.json["snapshots"][3]
    assert third["encoding"] == "delta"
    assert third["chain"] == [
        f"ema-00{step}.safetensors" for step in ("20-0.05", "20-0.10", "40-0.05", "40-0.10")
    ]
    assert third["dtypes"] == {"BOOL": 1, "F32": 4, "I64": 1}
    told = posthoc_here("inspect", "packed").out
    assert "F16 to ema-0020-0.05.safetensors  " in told
    assert "F16 to ema-0020-0.10.safetensors and 2 more" in told


@pytest.mark.parametrize(("width", "stored"), [(50, 0), (60, 1), (80, 1), (100, 1)])
def test_inspect_shows_differences_on_narrow_terminals(
    packed_once: Path, capsys: pytest.CaptureFixture[str], width: int, stored: int
) -> None:
    """Columns that go leave room for the names that were cut to keep them."""
    _draw_snapshots(Console(width=width), open_snapshots(packed_once).snapshots)
    _, *told = capsys.readouterr().out.splitlines()[:13]
    assert max(map(len, told)) <= width
    assert sum(line.count("F16 difference") for line in told) == 10 * stored
    assert len({line.split()[0] for line in told}) == 12


def test_what_synthesize_makes_of_it(packed: Path, tmp_path: Path, posthoc_here: Posthoc) -> None:
    for folder in ("plain", "packed"):
        out = f"{folder}.safetensors"
        run = posthoc_here("synthesize", folder, "--sigma-rel", "0.07", "-o", out, "-q")
        assert run.code == 0, run
        assert posthoc_here("verify", out, folder, "--full").code == 0
    one, other = (load_file(tmp_path / f"{each}.safetensors") for each in ("plain", "packed"))
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert np.allclose(each, other[name], rtol=0, atol=5e-4)
    assert one["frozen"].tobytes() == other["frozen"].tobytes()
    link = packed / "ema-0040-0.05.safetensors"
    data = bytearray(link.read_bytes())
    data[-8] ^= 1
    link.write_bytes(data)
    run = posthoc_here("verify", "packed.safetensors", "packed")
    assert run.code == 3
    assert "ema-0040-0.05.safetensors: is not the file" in run.err
    assert "(5 more problems" in run.err


@pytest.mark.parametrize(
    ("how", "cut"),
    [*(("missing", cut) for cut in range(12)), *product(("truncated", "replaced"), (0, 5, 8))],
)
def test_a_broken_link_takes_with_it_what_builds_on_it(
    tmp_path: Path, posthoc_here: Posthoc, packed_once: Path, how: str, cut: int
) -> None:
    """All else works, and is offered."""
    folder = tmp_path / "cut"
    shutil.copytree(packed_once, folder)
    paths = sorted(folder.iterdir())
    names = [path.name for path in paths]
    until = 8 if cut < 8 else 12
    leading = cut % 2 == 0  # what is of the first profile, all that come after it build on
    lost = names[cut + 1 : until] if leading else names[cut + 2 : until : 2]
    if how == "missing":
        paths[cut].unlink()
    elif how == "truncated":
        with paths[cut].open("r+b") as file:
            file.truncate(paths[cut].stat().st_size - 100)
    else:
        data = bytearray(paths[cut].read_bytes())
        data[-1] ^= 1
        paths[cut].write_bytes(data)
    run = posthoc_here("inspect", "cut", "--json")
    found = {each["file"] for each in run.json["snapshots"]}
    gone = {*lost} | ({names[cut]} if how != "replaced" else set())
    assert found == {*names} - gone
    problems = {each["file"]: each["message"] for each in run.json["problems"]}
    if lost:
        assert run.code == 3
        assert problems.keys() == {names[cut]}
        assert f"{len(lost)} snapshot" in problems[names[cut]]
        assert all(f"'{name}'" in problems[names[cut]] for name in lost[:3])
        refused = posthoc_here("solve", "cut", "--sigma-rel", "0.07")
        assert refused.code == 3
        assert refused.err.count("\n") == 1
    if len(found) > 3:
        out = tmp_path / "out.safetensors"
        run = posthoc_here(
            "synthesize", "cut", "--sigma-rel", "0.07", "-o", out, "--skip-incomplete", "-q"
        )
        assert run.code == 0, run


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from posthoc_cli.api import open_snapshots
    from posthoc_cli.synthesis.pack import pack, plan_pack

    folder = tmp_path_factory.mktemp("packed")
    snapshots = open_snapshots(write(folder / "plain", averages())).contents.usable()
    pack(plan_pack(snapshots, folder / "packed", keyframe_every=4), "float16")
    return folder / "packed"


def _change(path: Path, **metadata: str | None) -> None:
    """Write other metadata into a file; the data stay as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= metadata
    header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


HOSTILE: dict[str, dict[str, str | None]] = {
    "its own base": {"name": "ema-0120-0.10.safetensors"},
    "outside": {"name": "../plain/ema-0100-0.05.safetensors"},
    "absolute": {"name": "/etc/passwd"},
    "a folder": {"name": ".."},
    "of another system": {"name": "a\\b.safetensors"},
    "not there": {"name": "nothing.safetensors"},
    "another": {"fingerprint": "0" * 32},
    "no number": {"coefficient": "NaN"},
    "infinite": {"coefficient": "1e400"},
    "no bases": {"bases": None},
    "an empty list": {"bases": "[]"},
    "a list of text": {"bases": '["ema-0100-0.10.safetensors"]'},
    "two words": {"bases": '[["ema-0100-0.10.safetensors", "0"]]'},
    "lists": {"bases": "[[[], [], 1.0]]"},
    "broken JSON": {"bases": "[["},
    "deep bases": {"bases": "[" * 100_000},
    "one twice": {"bases": json.dumps([["ema-0100-0.10.safetensors", "0", 0.5]] * 2)},
    "a large number": {"bases": f'[["ema-0100-0.10.safetensors", "0", 1{"0" * 400}]]'},
    "very many": {"bases": json.dumps([[f"{at}.safetensors", "0", 0.5] for at in range(99)])},
    "no scale": {"scale": None},
    "a large scale": {"scale": "100000000000000000000000"},
    "a small scale": {"scale": "-5000"},
    "a fraction": {"scale": "1.5"},
    "no object": {"scales": "[1]"},
    "no JSON": {"scales": "{"},
    "deep JSON": {"scales": "[" * 100_000},
    "text": {"scales": '{"a.weight": "8"}'},
    "large": {"scales": '{"a.weight": 1e400}'},
    "another version": {"encoding": "delta-3"},
    "the first version, without a base": {"encoding": "delta-1"},
    "the first version": {
        "encoding": "delta-1",
        "base": "ema-0100-0.10.safetensors",
        "base_fingerprint": "0" * 32,
    },
}


@pytest.mark.parametrize("metadata", HOSTILE.values(), ids=HOSTILE)
def test_hostile_metadata_is_one_line(
    tmp_path: Path, posthoc_here: Posthoc, packed_once: Path, metadata: dict[str, str | None]
) -> None:
    shutil.copytree(packed_once, tmp_path / "odd")
    path = tmp_path / "odd" / "ema-0120-0.10.safetensors"
    name, fingerprint, _ = bases_in(stored(path)[0])[0]
    first = {"name": json.dumps(name), "fingerprint": json.dumps(fingerprint), "coefficient": "1.0"}
    changed = {key: metadata[key] for key in metadata if key in first}
    if changed:
        first |= {k: v if k == "coefficient" else json.dumps(v) for k, v in changed.items()}
        metadata = {"bases": f"[[{', '.join(first.values())}]]"}
    _change(path, **metadata)
    run = posthoc_here("solve", "odd", "--sigma-rel", "0.07")
    run.failed(3, "odd/[a-z0-9.-]+: .*")
    assert len(run.err) < 1000


def test_long_and_circular_chains_are_one_line(tmp_path: Path, posthoc_here: Posthoc) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    delta = {"encoding": "delta-1", "scale": "0"}
    value = {"w": np.ones(4, np.float32)}
    save_file(value, folder / "s-00000-0.050.safetensors", {"step": "1", "sigma_rel": "0.05"})
    from posthoc_cli.storage import fingerprint, read_header

    for at in range(1, 258):
        base = folder / f"s-{at - 1:05d}-0.050.safetensors"
        known = fingerprint(read_header(base))
        metadata = delta | {"base": base.name, "base_fingerprint": known, "step": str(at + 1)}
        save_file({}, folder / f"s-{at:05d}-0.050.safetensors", metadata | {"sigma_rel": "0.05"})
    run = posthoc_here("solve", folder, "--sigma-rel", "0.07")
    run.failed(3, r".*/deep/s-00256-0\.050\.safetensors: a delta that makes no sense .*256 links.*")
    circle = tmp_path / "circle"
    circle.mkdir()
    for one, other in ("ab", "bc", "ca"):
        metadata = delta | {"base": f"{other}.safetensors", "base_fingerprint": "0" * 32}
        metadata |= {"step": "1", "sigma_rel": "0.05"}
        save_file(value, circle / f"{one}.safetensors", metadata)
    posthoc_here("solve", "circle", "--sigma-rel", "0.07").failed(3, "circle/.*")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path / "plain", averages(10))
    code = "import sys; from posthoc_cli.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "pack", str(source), str(tmp_path / "out"), "-q"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    draw = random.Random(1)
    for _ in range(3):
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
            try:
                run.wait(0.5 + 0.8 * draw.random())
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
    from posthoc_cli.api import open_snapshots
    from posthoc_cli.synthesis.pack import pack, plan_pack

    for folder in ("out", "whole"):
        pack(plan_pack(open_snapshots(source).contents.usable(), tmp_path / folder), "float16")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_raw_checkpoints(tmp_path: Path, posthoc_here: Posthoc) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    made = {step: tensors for (step, width), tensors in averages().items() if width == "0.05"}
    for step, tensors in made.items():
        save_file(tensors, folder / f"net-step{step:05d}.safetensors")
    assert posthoc_here("pack", "raw", "out", "--raw", "-q").code == 0
    run = posthoc_here(
        "synthesize", "out", "--raw", "--sigma-rel", "0.1", "-o", "x.safetensors", "-q"
    )
    assert run.code == 0, run
    path = tmp_path / "out" / "net-step00100.safetensors"
    assert np.allclose(rebuilt(path)["a.weight"], made[100]["a.weight"], rtol=0, atol=3e-4)


def test_convert_unpacks(tmp_path: Path, posthoc_here: Posthoc, packed_once: Path) -> None:
    """Into plain files with the same metadata, which are as near as can be."""
    shutil.copytree(packed_once, tmp_path / "packed")
    run = posthoc_here("convert", "packed", "whole", "--json")
    assert run.code == 0, run
    assert len(run.json["converted"]) == 12
    for path in sorted((tmp_path / "packed").iterdir()):
        wanted, found = rebuilt(path), load_file(tmp_path / "whole" / path.name)
        assert found.keys() == wanted.keys()
        for name, each in found.items():
            assert np.array_equal(each, wanted[name].astype(each.dtype))
    save_file({"a": np.zeros(100)}, tmp_path / "packed" / "cut.safetensors", {"step": "5"})
    os.truncate(tmp_path / "packed" / "cut.safetensors", 500)
    run = posthoc_here("convert", "packed", "whole")
    assert "cut.safetensors: not a whole safetensors file" in run.out
    run = posthoc_here("inspect", "whole", "--json")
    assert [each["chain"] for each in run.json["snapshots"]] == 12 * [[]]
    assert {each["sigma_rel"] for each in run.json["snapshots"]} == {0.05, 0.1}
