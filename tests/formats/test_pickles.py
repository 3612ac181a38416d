"""The opcode interpreter against pickle itself, and against the hostile corpus."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats import pickles as unpickling
from posthoc_cli.formats.checkpoints import Checkpoint, read_checkpoint, state_dict
from posthoc_cli.formats.edm2 import is_edm2, network_state
from posthoc_cli.formats.pickles import Allowance, Call, Global, Key, Source, Span, unpickle
from tests import hostile_pickles
from tests.hostile_pickles import CORPUS, GOOD, RUNS, SENTINEL, name, text, whole

PROTOCOLS = (2, 3, 4, 5)


def source(data: bytes) -> Source:
    return Source(Path("x.pkl"), io.BytesIO(data), 0, len(data))


def read(data: bytes, *allowed: tuple[str, str], **options: Any) -> Any:
    return unpickle(source(data), allowed, **options)


def tensors(path: Path) -> dict[str, Any]:
    checkpoint: Checkpoint = read_checkpoint(path)
    return network_state(checkpoint) if is_edm2(checkpoint) else state_dict(checkpoint)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Data.

PLAIN: list[Any] = [
    None, True, False, 0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, 2**63,
    -(2**63), 2**2000, -(2**2000), 0.0, -1.5, float("inf"),
    "", "a", "ü\U0001f600\n", "x" * 300, "y" * 100_000,
    (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2, [3, [4]]], {}, {"a": 1},
    {1: {2.5: (None, {True: "x"})}}, list(range(5000)), dict.fromkeys(range(5000), "v"),
]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20])
def test_plain_values_are_what_pickle_reads(value: Any, protocol: int) -> None:
    result = read(pickle.dumps(value, protocol))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_cyclic_values_stay_so(protocol: int) -> None:
    shared = ["s"]
    value: dict[str, Any] = {"a": shared, "b": (shared, shared)}
    value["self"] = value
    result = read(pickle.dumps(value, protocol))
    assert result["a"] is result["b"][0] is result["b"][1]
    assert result["self"] is result


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 70_000])
def test_bytes_stay_in_the_file(length: int, protocol: int) -> None:
    content = os.urandom(length)
    data = pickle.dumps(["before", content, "after"], protocol)
    before, span, after = read(data)
    assert (before, after) == ("before", "after")
    assert isinstance(span, Span)
    assert data[span.offset : span.offset + span.length] == content


def test_a_bytearray_and_a_very_long_text_stay_in_the_file() -> None:
    data = pickle.dumps([bytearray(b"abc"), "z" * (unpickling.MAX_TEXT + 1)], 5)
    small, long = read(data)
    assert data[small.offset : small.offset + small.length] == b"abc"
    assert data[long.offset : long.offset + long.length] == b"z" * long.length


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_come_as_lists(protocol: int) -> None:
    made, frozen = read(pickle.dumps([{"a", "b"}, frozenset({"c"})], protocol))
    assert (sorted(made), frozen) == (["a", "b"], ("c",))


def test_several_pickles_follow_each_other() -> None:
    stream = source(b"".join(pickle.dumps(value, 4) for value in ("a", [1], 2)))
    assert [unpickle(stream, ()) for _ in range(3)] == ["a", [1], 2]
    assert stream.position == stream.end


def test_a_call_is_kept_and_never_made() -> None:
    data = whole(name("os", "getcwd") + b")R" + text("state") + b"b")
    call = read(data, ("os", "getcwd"))
    assert isinstance(call, Call)
    assert (str(call.function), call.args, call.state) == ("os.getcwd", (), "state")


def test_calls_become_what_the_caller_makes_of_them() -> None:
    def build(function: Global, args: tuple[Any, ...]) -> Any:
        return [function.name, *args]

    data = whole(name("a", "f") + b"K\x01\x85R" + name("a", "C") + b"K\x02\x85\x81\x86")
    assert read(data, ("a", "f"), ("a", "C"), build=build) == (["f", 1], ["C", 2])


def test_a_name_must_be_allowed_as_a_whole() -> None:
    for module, attribute in (("a", "b.f"), ("a.b.f", ""), ("b", "f"), ("a.b", "f.g")):
        with pytest.raises(SnapshotError, match=r"needs '.*', which isn't data"):
            read(whole(hostile_pickles.name_from_stack(module, attribute)), ("a.b", "f"))
    assert str(read(whole(name("a.b", "f")), ("a.b", "f"))) == "a.b.f"


def test_keys_that_could_be_slow_to_hash_stand_for_themselves() -> None:
    (key,) = read(pickle.dumps({(1, 2): "v"}, 4))
    assert isinstance(key, Key)
    assert key.value == (1, 2)
    large = read(pickle.dumps({2**64: "v"}, 4))
    assert [type(key) for key in large] == [Key]


def test_a_file_may_take_only_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_OPCODES", "MAX_HELD"):
        with monkeypatch.context() as context:
            context.setattr(unpickling, limit, 5)
            with pytest.raises(SnapshotError, match="too many values"):
                read(pickle.dumps([[], [], [], [], [], []], 4))


def test_an_allowance_is_used_up_by_several_pickles() -> None:
    allowance = Allowance()
    data = pickle.dumps(list(range(100)), 4)
    read(data, allowance=allowance)
    once = unpickling.MAX_OPCODES - allowance.opcodes, unpickling.MAX_HELD - allowance.held
    read(data, allowance=allowance)
    assert unpickling.MAX_OPCODES - allowance.opcodes == 2 * once[0]
    assert unpickling.MAX_HELD - allowance.held == 2 * once[1]
    assert min(once) > 100


@pytest.mark.usefixtures("unmeasured")
def test_the_library_imports_neither_pickle_nor_torch() -> None:
    code = (
        "import sys, posthoc_cli.formats.edm2, posthoc_cli.formats.checkpoints;"
        "import posthoc_cli.formats.pickles;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    folder = Path(unpickling.__file__).parent
    for module in ("pickles", "checkpoints", "edm2"):
        source_code = (folder / f"{module}.py").read_text()
        for word in ("import pickle", "import torch", "eval(", "exec(", "__import__", "importlib"):
            assert word not in source_code, (module, word)


# What is hostile.


@pytest.mark.parametrize("case", RUNS)
def test_the_corpus_is_really_hostile(case: str, workplace: Path) -> None:
    pickle.loads(CORPUS[case]())
    assert (workplace / SENTINEL).exists()


@pytest.mark.parametrize("case", CORPUS)
def test_hostile_files_are_refused_in_one_line_and_nothing_runs(case: str, workplace: Path) -> None:
    Path("x.pkl").write_bytes(CORPUS[case]())
    with pytest.raises(SnapshotError) as caught:
        tensors(Path("x.pkl"))
    line = str(caught.value)
    assert line.startswith("x.pkl: ")
    assert line.isprintable()
    assert len(line) < 400
    assert os.listdir() == ["x.pkl"]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("os.system", "os.system"),
        ("exec of Python 2", "builtins.exec"),
        ("reduce in a persistent id", "os.system"),
        ("reduce in a storage", "os.system"),
        ("a whole module", "torch.nn.modules.linear.Linear"),
        ("terminal escapes", r"\x1b]0;x\x07\x1b[2J.\x1b[31m\r"),
    ],
)
def test_what_a_file_needs_is_named(case: str, named: str, workplace: Path) -> None:
    Path("x.pkl").write_bytes(CORPUS[case]())
    with pytest.raises(SnapshotError) as caught:
        tensors(Path("x.pkl"))
    assert f"needs '{named}', which isn't data" in str(caught.value)


@pytest.mark.parametrize("case", GOOD)
def test_good_files_next_to_them_are_read(case: str, workplace: Path) -> None:
    Path("x.pkl").write_bytes(GOOD[case])
    (tensor,) = tensors(Path("x.pkl")).values()
    assert (tensor.dtype, tensor.shape) == ("F32", (4,))
    assert GOOD[case][tensor.offset : tensor.offset + 16] == bytes(16)
    assert os.listdir() == ["x.pkl"]


def damaged(good: bytes, chance: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(chance.randint(1, 3)):
        where = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[where] = chance.randrange(256)
            case 1:
                data[where] ^= 1 << chance.randrange(8)
            case 2:
                del data[where : where + chance.randint(1, 8)]
            case 3:
                data[where:where] = data[where : where + 9]
    return bytes(data)


@pytest.mark.parametrize("case", GOOD)
def test_damaged_files_are_read_or_refused(case: str, workplace: Path) -> None:
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        data = damaged(GOOD[case], chance)
        Path("x.pkl").write_bytes(data)
        try:
            found = tensors(Path("x.pkl"))
        except SnapshotError:
            refused += 1
            continue
        for tensor in found.values():
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
            assert tensor.offset >= 0
            assert not tensor.elements or tensor.offset + reach < len(data)
    assert 50 < refused < 150
    assert os.listdir() == ["x.pkl"]


PEAK = """
import json, sys
from pathlib import Path
from posthoc_cli.formats.edm2 import is_edm2, network_state
from posthoc_cli.formats.checkpoints import read_checkpoint, state_dict
from posthoc_cli.errors import SnapshotError

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

start, peaks = peak(), {}
for path in map(Path, sys.argv[1:]):
    try:
        checkpoint = read_checkpoint(path)
        (network_state if is_edm2(checkpoint) else state_dict)(checkpoint)
    except SnapshotError:
        peaks[path.name] = peak() - start
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.usefixtures("unmeasured")
def test_no_file_takes_much_memory(workplace: Path) -> None:
    heavy = [case for case in CORPUS if re.search(r"GB|2 \*\* |million|hundred|mega", case)]
    assert len(heavy) > 20
    for index, case in enumerate(heavy):
        Path(str(index)).write_bytes(CORPUS[case]())
    Path("sparse").write_bytes(b"\x80\x04\x8e" + (20 << 30).to_bytes(8, "little"))
    os.truncate("sparse", 30 << 30)
    files = sorted(os.listdir())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *files], capture_output=True, text=True, check=True
    )
    peaks = json.loads(done.stdout)
    assert sorted(peaks) == files
    assert max(peaks.values()) < 400  # MB
