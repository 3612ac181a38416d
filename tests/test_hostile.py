"""Files made to do harm: each ends in exit code 3, or works, and says so in one line.

`make soak` tries thousands more of the same kind, and files that take a process of their own.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from posthoc_cli.errors import SnapshotError
from posthoc_cli.storage import header as tensorfile
from posthoc_cli.storage.header import read_header
from posthoc_cli.storage.shards import open_tensors
from tests.command import Posthoc, write_snapshot
from tests.fuzzing import MUTATIONS, Case, make_case
from tests.soak.fuzz import harm_of, try_case

SEED = 1
EACH = 12
"""Cases of each kind of mutation."""

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file names")


@pytest.mark.parametrize("at", range(len(MUTATIONS)), ids=list(MUTATIONS))
def test_a_few_hundred_hostile_files(at: int, tmp_path: Path) -> None:
    for number in range(at, EACH * len(MUTATIONS), len(MUTATIONS)):
        case = make_case(SEED, number)
        tried = try_case(case, tmp_path)
        assert tried.losses == [], f"{case}: {case.files}"
        assert tried.runs >= 5


def test_a_case_can_be_made_again() -> None:
    assert make_case(7, 1234) == make_case(7, 1234)
    assert make_case(7, 1234) != make_case(8, 1234)


# A corpus made by hand: what each of these does is known


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


STATED = '"__metadata__":{"step":"1000","sigma_rel":"0.05"}'

REFUSED = {
    "no header": (b"{}", 0),
    "a list": (b"[]", 2),
    "no brace": (b'{"a":', 5),
    "overlapping": (f'{{"a":{entry()},"b":{entry()}}}'.encode(), None),
    "a hole": (f'{{"a":{entry(shape=[3], offsets=[1, 4])}}}'.encode(), None),
    "past the end": (f'{{"a":{entry(shape=[5], offsets=[0, 5])}}}'.encode(), None),
    "backwards": (f'{{"a":{entry(offsets=[4, 0])}}}'.encode(), None),
    "below zero": (f'{{"a":{entry(offsets=[-4, 0])}}}'.encode(), None),
    "a fraction": (f'{{"a":{entry(offsets=[0, 4.0])}}}'.encode(), None),
    "an overflow": (f'{{"a":{entry(shape=[2**63, 2, 2])}}}'.encode(), None),
    "another dtype": (f'{{"a":{entry("F128")}}}'.encode(), None),
    "a number as text": (f'{{"a":{entry(shape=["4"])}}}'.encode(), None),
    "true for one": (f'{{"a":{entry(shape=[4, True])}}}'.encode(), None),
    "metadata of numbers": (f'{{"__metadata__":{{"step":1}},"a":{entry()}}}'.encode(), None),
    "metadata twice": (f'{{{STATED},{STATED},"a":{entry()}}}'.encode(), None),
    "NaN": (b'{"a":NaN}', None),
    "half a pair": (b'{"\\ud800":' + entry().encode() + b"}", None),
    "bad UTF-8": (b'{"\xff":' + entry().encode() + b"}", None),
    "nested": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "2^63 long": (b"{}", 2**63),
    "2^64 - 1 long": (b"{}", 2**64 - 1),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_network_has_is_refused(kind: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    header, length = REFUSED[kind]
    content = struct.pack("<Q", len(header) if length is None else length) + header + b"abcd"
    (tmp_path / "x_1000_6.94.safetensors").write_bytes(content)
    posthoc_here("inspect", "x_1000_6.94.safetensors").failed(
        3, r"x_1000_6\.94\.safetensors: not a whole safetensors file \(.+\); .+"
    )
    run = posthoc_here("synthesize", ".", "--gamma", "3", "-o", "y.safetensors")
    run.failed(3, r"x_1000_6\.94\.safetensors: .+")
    assert os.listdir(tmp_path) == ["x_1000_6.94.safetensors"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in ("step", "gamma", "sigma_rel")
        for value in ("nan", "-1", "1e400", "-1e400", "inf", "", " 12", "１２", "1_0", "9" * 10_000)
    ]
    + [
        ("step", "0"),
        ("step", "1e-3"),
        ("step", "12.5"),
        ("step", "1,200"),
        ("step", str(2**53 + 1)),
    ]
    + [("sigma_rel", "0"), ("sigma_rel", "0.2887"), ("gamma", "-1.0"), ("gamma", "1e13")],
)
def test_no_snapshot_has_such_a_step_or_profile(
    key: str, value: str, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    metadata = {"step": "1000", "gamma": "3"} | ({key: value} if key != "sigma_rel" else {})
    if key == "sigma_rel":
        metadata = {"step": "1000", "sigma_rel": value}
    write_snapshot(tmp_path / "x.safetensors", 1.0, **metadata)
    run = posthoc_here("solve", ".", "--gamma", "3")
    run.failed(3, r"x\.safetensors: its metadata.+")
    assert len(run.err) < 250


NAMES = ["\x1b[2J", "\x9b31m", "\x00", "\u202egnp", "a\nb", "\u2028", "[red]a[/red]", "../../a", ""]


@pytest.mark.parametrize("name", [*NAMES, "x" * 1_000_000], ids=lambda name: ascii(name[:12]))
def test_names_of_tensors_do_nothing(name: str, posthoc_here: Posthoc, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for step, extra in ((1000, name), (2000, name + "?")):
        header = f'{{"__metadata__":{{"step":"{step}","gamma":"3"}},{json.dumps(extra)}:{entry()}}}'
        content = struct.pack("<Q", len(header)) + header.encode() + b"abcd"
        (folder / f"{step}.safetensors").write_bytes(content)
    for arguments in (["solve", "snapshots", "--gamma", "3"], ["inspect", "snapshots"]):
        run = posthoc_here(*arguments)
        assert run.code == 3
        assert harm_of(run) == []
    (folder / "1000.safetensors").unlink()
    run = posthoc_here("synthesize", "snapshots", "--gamma", "3", "-o", "y.safetensors")
    assert (run.code, harm_of(run)) == (0, [])
    assert list(read_header(tmp_path / "y.safetensors").tensors) == [name + "?"]


@posix
@pytest.mark.parametrize(
    "name",
    [
        b"two words",
        b"new\nline",
        b"\xff\xfe",
        b"caf\xe9",
        b"\x1b]0;x\x07",
        b"\xe2\x80\xae",
        b"-o",
        b"'\"",
        b"[a]*",
        b"a" * 243,
    ],
)
def test_any_name_of_a_file_works(name: bytes, posthoc_here: Posthoc, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    path = folder / os.fsdecode(name + b".safetensors")
    write_snapshot(path, 1.0, step="1000", gamma="3")
    for arguments in (
        ["inspect", folder],
        ["inspect", path],
        ["inspect", folder, "--json"],
        ["solve", folder, "--gamma", "3", "--json"],
    ):
        run = posthoc_here(*arguments)
        assert (run.code, harm_of(run)) == (0, [])
    if "--json" in arguments:
        (weight,) = run.json["targets"][0]["weights"]
        assert os.fsencode(weight["file"]) == name + b".safetensors"
    made = tmp_path / os.fsdecode(b"made" + name[:200] + b".safetensors")
    run = posthoc_here("synthesize", folder, "--gamma", "3", "-o", made)
    if b"{" not in name:
        assert (run.code, harm_of(run)) == (0, [])
    run = posthoc_here("inspect", made)
    assert (run.code, harm_of(run)) == (0, [])
    assert "sum of weights" in run.out


# What reading a header may cost


def header_of(tensors: int) -> bytes:
    entries = ",".join(
        f'"{at}":{{"dtype":"U8","shape":[],"data_offsets":[{at},{at + 1}]}}'
        for at in range(tensors)
    )
    return f"{{{STATED},{entries}}}".encode()


def test_a_header_with_too_much_in_it_is_not_even_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorfile, "MAX_TENSORS", 100)
    monkeypatch.setattr(tensorfile, "_MAX_ITEMS", 1_200)
    path = tmp_path / "x.safetensors"
    for tensors in (100, 150):
        header = header_of(tensors)
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(tensors))
        if tensors == 100:
            assert len(read_header(path).tensors) == 100
            continue
        with pytest.raises(SnapshotError, match=r"header holds more than 100 tensors need"):
            read_header(path)
    many = ",".join(f'"{at}":""' for at in range(400)).encode()
    header = b'{"__metadata__":{' + many + b"}}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(SnapshotError, match=r"header holds more than 100 tensors need"):
        read_header(path)


def test_a_header_that_is_too_long_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", tensorfile.MAX_HEADER + 8))
        file.truncate(tensorfile.MAX_HEADER + 16)
    with pytest.raises(SnapshotError, match=r"a header of 33\.6 MB, above 33\.6 MB"):
        read_header(path)


def test_reading_maps_nothing_and_looks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have no mmap; and between two looks a file could change."""
    monkeypatch.setattr(mmap, "mmap", None)
    monkeypatch.setattr(safetensors, "safe_open", None)
    path = tmp_path / "x.safetensors"
    write_snapshot(path, 1.0, step="1")
    opened = []
    real = open

    def counted(name: Any, *arguments: Any, **more: Any) -> Any:
        opened.append(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr("builtins.open", counted)
    assert read_header(path).metadata == {"step": "1"}
    assert opened == [path]


# Indexes of shards


@pytest.mark.parametrize(
    "index",
    [
        b'{"weight_map":{"a":"/x.safetensors"}}',
        b'{"weight_map":{"a":"x\\u0000.safetensors"}}',
        b'{"weight_map":{"a":"\\ud800.safetensors"}}',
        b'{"weight_map":{"a":"x.safetensors"},"metadata":{"\\udfff":""}}',
        b'{"weight_map":{"a":"x.safetensors"},"metadata":{"\xed\xa0\x80":""}}',
        b'{"weight_map":{"a":"gone.safetensors"}}',
        b'{"weight_map":{"b":"x.safetensors"}}',
        b'{"weight_map":{"a":"x.safetensors"},"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"weight_map":{"a":"x.safetensors"},"n":1' + b"0" * 10_000 + b"}",
        b'{"weight_map":{"\xff":"x.safetensors"}}',
    ],
    ids=range(10),
)
def test_an_index_that_makes_no_sense(index: bytes, tmp_path: Path) -> None:
    header = f'{{"a":{entry()}}}'.encode()
    content = struct.pack("<Q", len(header)) + header + b"abcd"
    (tmp_path / "x.safetensors").write_bytes(content)
    path = tmp_path / "x.safetensors.index.json"
    path.write_bytes(index)
    with pytest.raises(SnapshotError):
        open_tensors(path)
    path.write_bytes(b'{"weight_map":{"a":"x.safetensors"},"metadata":{"step":7}}')
    assert open_tensors(path).metadata == {"step": "7"}


# Values


def test_signalling_nans_are_counted_and_cause_no_warnings(
    posthoc_here: Posthoc, tmp_path: Path
) -> None:
    signalling = np.array([0x7C01, 0x3C00, 0xFC02, 0x3C00], "<u2")
    for step in (1000, 2000):
        header = (
            f'{{"__metadata__":{{"step":"{step}","gamma":"3"}},"a":{entry("F16", [4], [0, 8])}}}'
        ).encode()
        content = struct.pack("<Q", len(header)) + header + signalling.tobytes()
        (tmp_path / f"{step}.safetensors").write_bytes(content)
    run = posthoc_here("solve", ".", "--gamma", "2", "--diagnose")
    assert (run.code, harm_of(run)) == (0, [])
    assert "2 of 4 sampled values are NaN or infinite" in run.err


def test_a_case_says_what_it_is() -> None:
    assert str(Case(1, 2, ("holes", "shapes"), b"", b"", {})) == "case 2 of seed 1 (holes, shapes)"
