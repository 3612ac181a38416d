"""What holds for every output: exactness, independence of how it was made, all or nothing."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.storage import workers
from posthoc_cli.storage.header import read_header
from posthoc_cli.storage.metadata import RECIPE
from posthoc_cli.synthesis import engine as synthesis
from posthoc_cli.synthesis.accumulators import TorchAccumulator
from posthoc_cli.synthesis.engine import Engine, Results
from posthoc_cli.synthesis.nonfinite import NonfiniteReport
from posthoc_cli.synthesis.outputs import write_outputs
from posthoc_cli.synthesis.plan import Chunk
from tests.support import STORED, plan_of, read_tensors, snapshot_of, write_tensors

Weights = npt.NDArray[np.float64]


def make_snapshots(
    folder: Path,
    contents: Sequence[Mapping[str, npt.NDArray]],
    metadata: Mapping[str, str] | None = None,
    orders: Sequence[Sequence[str]] | None = None,
) -> list[Snapshot]:
    made = []
    cache: dict = {}
    for k, tensors in enumerate(contents):
        path = folder / f"s{k:03d}.safetensors"
        write_tensors(path, tensors, metadata, orders[k] if orders else None)
        made.append(snapshot_of(path, 100 * (k + 1), cache))
    return made


def synthesize(
    snapshots: Sequence[Snapshot],
    weights: Weights,
    folder: Path,
    *,
    dtype: str = "same",
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
    **options: object,
) -> list[Path]:
    weights = np.atleast_2d(weights)
    folder.mkdir(exist_ok=True)
    outputs = [folder / f"out{t}.safetensors" for t in range(len(weights))]
    plan = plan_of(snapshots, dtype=dtype, copy=copy, drop=drop)
    written = write_outputs(
        plan,
        weights,
        outputs,
        [{"sources": []}] * len(weights),
        **options,  # type: ignore[arg-type]
    )
    assert [out.bytes for out in written.outputs] == [path.stat().st_size for path in outputs]
    return outputs


def random_contents(
    dtype: str, count: int, shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> list[dict[str, npt.NDArray]]:
    rng = np.random.default_rng(seed)
    return [
        {name: rng.standard_normal(shape).astype(STORED[dtype]) for name, shape in shapes.items()}
        for _ in range(count)
    ]


SHAPES = {"a": (300, 7), "b": (5,), "c": (), "d": (0, 3), "e": (129,)}


def float64_sum(
    contents: Sequence[Mapping[str, npt.NDArray]], weights: Weights, name: str
) -> npt.NDArray[np.float64]:
    stacked = np.stack([tensors[name].astype(np.float64) for tensors in contents])
    return np.tensordot(weights, stacked, axes=1)


def spacing(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """One unit in the last place of `dtype` at each value."""
    info = ml_dtypes.finfo(STORED[dtype])
    _, exponent = np.frexp(np.abs(values))
    return np.maximum(np.ldexp(1.0, exponent - 1 - info.nmant), float(info.smallest_subnormal))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_sums_are_within_half_a_unit_of_the_float64_result(tmp_path: Path, dtype: str) -> None:
    contents = random_contents(dtype, 20, SHAPES)
    # Weights that amplify and cancel, as a solve near its limits gives them.
    weights = np.random.default_rng(1).standard_normal((3, 20)) * 30
    outputs = synthesize(make_snapshots(tmp_path, contents), weights, tmp_path / "out")
    for target, path in enumerate(outputs):
        result = read_tensors(path)
        assert result.keys() == SHAPES.keys()
        for name in SHAPES:
            exact = float64_sum(contents, weights[target], name)
            slack = 1e-12 if dtype == "F64" else 0.5001 * spacing(exact, dtype)
            assert result[name].dtype == STORED[dtype]
            assert np.all(np.abs(result[name].astype(np.float64) - exact) <= slack)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_float8_is_averaged_too(tmp_path: Path, dtype: str) -> None:
    contents = random_contents(dtype, 3, SHAPES)
    weights = np.array([0.2, 0.3, 0.5])
    result = read_tensors(synthesize(make_snapshots(tmp_path, contents), weights, tmp_path)[0])
    for name in SHAPES:
        exact = float64_sum(contents, weights, name)
        error = np.abs(result[name].astype(np.float64) - exact)
        assert np.all(error <= 0.5001 * spacing(exact, dtype))


def test_complex_tensors_are_averaged_part_by_part(tmp_path: Path) -> None:
    contents = [{"z": np.array([1 + 2j, -3j], np.complex64)}, {"z": np.zeros(2, np.complex64)}]
    snapshots = make_snapshots(tmp_path, contents)
    for dtype in ("same", "float16"):  # there is no complex dtype of 32 bits
        out = synthesize(snapshots, np.array([0.5, 0.5]), tmp_path, dtype=dtype, overwrite=True)[0]
        assert np.array_equal(read_tensors(out)["z"], np.array([0.5 + 1j, -1.5j], np.complex64))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(["F16", "BF16", "F32", "F64", "F8_E4M3", "C64"]),
    seed=st.integers(0, 2**32 - 1),
    total=st.sampled_from([1.0, 0.7, 1.1]),
)
def test_constants_come_out_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, seed: int, total: float
) -> None:
    folder = tmp_path_factory.mktemp("constants")
    rng = np.random.default_rng(seed)
    stored = STORED[dtype]
    bits = rng.integers(0, 256, 200 * stored.itemsize, np.uint8)  # NaN payloads, -0.0, subnormals
    constant = bits.view(stored)
    contents = [
        {"constant": constant, "varies": rng.standard_normal(1000).astype(stored)} for _ in range(4)
    ]
    weights = rng.standard_normal(4)
    weights *= total / weights.sum()
    out = synthesize(make_snapshots(folder, contents), weights, folder, row_bytes=512)[0]
    assert read_tensors(out)["constant"].tobytes() == constant.tobytes()


def test_a_tensor_that_varies_in_one_late_element_of_one_snapshot_is_summed(
    tmp_path: Path,
) -> None:
    contents = [{"w": np.full(5000, 3.0, np.float32)} for _ in range(40)]
    contents[33]["w"][4999] = 5.0
    weights = np.full(40, 1.0)
    result = read_tensors(
        synthesize(make_snapshots(tmp_path, contents), weights, tmp_path, row_bytes=512)[0]
    )["w"]
    assert np.array_equal(result, np.r_[np.full(4999, 120.0), 122.0].astype(np.float32))


def test_integers_and_booleans_come_from_the_newest(tmp_path: Path) -> None:
    contents = [
        {"i": np.array([k, 7]), "t": np.array([k == 2]), "w": np.ones(3, np.float32)}
        for k in range(3)
    ]
    result = read_tensors(
        synthesize(make_snapshots(tmp_path, contents), np.array([1, -1, 1.0]), tmp_path)[0]
    )
    assert list(result["i"]) == [2, 7]
    assert list(result["t"]) == [True]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float64", "F64"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")],
)
def test_dtype_of_the_output(tmp_path: Path, dtype: str, stored: str) -> None:
    contents = random_contents("F32", 3, {"w": (1000,), "copied": (1000,)})
    for tensors in contents:
        tensors["same"] = np.float32([0.1, 0.2])
        tensors["n"] = np.array([1])
    weights = np.array([0.25, 0.25, 0.5])
    snapshots = make_snapshots(tmp_path, contents)
    result = read_tensors(synthesize(snapshots, weights, tmp_path, dtype=dtype, copy=["copied"])[0])
    assert {str(k): v.dtype for k, v in result.items()} == {
        "w": STORED[stored], "copied": STORED[stored], "same": STORED[stored],
        "n": np.dtype(np.int64),
    }  # fmt: skip
    exact = float64_sum(contents, weights, "w")
    assert np.all(np.abs(result["w"].astype(np.float64) - exact) <= 0.5001 * spacing(exact, stored))
    for name in ("copied", "same"):
        assert np.array_equal(result[name], contents[-1][name].astype(STORED[stored]))


def test_copied_tensors_are_not_read_from_older_snapshots(tmp_path: Path) -> None:
    contents = random_contents("F32", 4, {"w": (10,), "alpha": (6,)})
    seen: list[int] = []
    snapshots = make_snapshots(tmp_path, contents)
    out = synthesize(
        snapshots, np.full(4, 0.25), tmp_path, copy=["alpha"], drop=["w"], progress=seen.append
    )[0]
    result = read_tensors(out)
    assert result.keys() == {"alpha"}
    assert result["alpha"].tobytes() == contents[-1]["alpha"].tobytes()
    assert sum(seen) == 24


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(["F16", "BF16", "F32", "F8_E5M2"]),
    row_bytes=st.sampled_from([512, 1024, 4096, 1 << 17]),
    workers=st.integers(1, 5),
    group=st.integers(1, 20),
    data=st.data(),
)
def test_bytes_depend_on_nothing_but_the_content(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    row_bytes: int,
    workers: int,
    group: int,
    data: st.DataObject,
) -> None:
    """Workers, chunks, groups, the tensors' order in each file, other targets in the same pass."""
    folder = tmp_path_factory.mktemp("bytes")
    names = list(SHAPES)
    contents = random_contents(dtype, 18, SHAPES)
    weights = np.random.default_rng(5).standard_normal((9, 18))
    plain = synthesize(make_snapshots(folder, contents), weights[4], folder / "plain", workers=1)
    shuffled = folder / "shuffled"
    shuffled.mkdir()
    orders = [data.draw(st.permutations(names)) for _ in contents]
    snapshots = make_snapshots(shuffled, contents, orders=orders)
    before = synthesis.BATCH
    synthesis.BATCH = group
    try:
        many = synthesize(snapshots, weights, folder / "many", workers=workers, row_bytes=row_bytes)
    finally:
        synthesis.BATCH = before
    assert many[4].read_bytes() == plain[0].read_bytes()


def test_sums_are_linear_in_the_weights(tmp_path: Path) -> None:
    contents = random_contents("F64", 5, SHAPES)
    snapshots = make_snapshots(tmp_path, contents)
    rng = np.random.default_rng(3)
    one, two = rng.standard_normal((2, 5))
    outs = synthesize(snapshots, np.stack([one, two, one - 2 * two]), tmp_path / "out")
    first, second, both = (read_tensors(path) for path in outs)
    for name in SHAPES:
        assert np.allclose(both[name], first[name] - 2 * second[name], rtol=0, atol=1e-12)


def test_a_lora_of_thousands_of_tiny_tensors(tmp_path: Path) -> None:
    shapes = {f"lora_unet_{k:04d}.down": (2, 3 + k % 5) for k in range(3000)}
    contents = random_contents("F16", 4, shapes)
    # No round numbers: their sums may lie halfway between two float16.
    weights = np.array([0.1234567, 0.2345678, 0.3456789, 0.2962966])
    result = read_tensors(synthesize(make_snapshots(tmp_path, contents), weights, tmp_path)[0])
    for name in list(shapes)[::37]:
        exact = float64_sum(contents, weights, name)
        assert np.array_equal(result[name], exact.astype(np.float16))


def test_metadata_is_carried_over_less_what_no_longer_holds(tmp_path: Path) -> None:
    metadata = {
        "format": "pt", "ss_base_model": "x", "step": "7", "gamma": "1", "sigma_rel": "0.1",
        "sshs_model_hash": "0", "sshs_legacy_hash": "0",
    }  # fmt: skip
    snapshots = make_snapshots(tmp_path, random_contents("F32", 2, {"w": (2,)}), metadata)
    out = synthesize(snapshots, np.array([0.5, 0.5]), tmp_path)[0]
    assert read_header(out).metadata == {
        "format": "pt",
        "ss_base_model": "x",
        RECIPE: '{"sources": []}',
    }


def two_snapshots(folder: Path, elements: int = 1000) -> list[Snapshot]:
    return make_snapshots(folder, random_contents("F32", 2, {"w": (elements,)}))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_output_never_lands_on_a_snapshot(tmp_path: Path) -> None:
    snapshots = two_snapshots(tmp_path)
    plan = plan_of(snapshots)
    (tmp_path / "link").symlink_to(snapshots[0].index.path)
    os.link(snapshots[1].index.path, tmp_path / "hard")
    for name in ("s000.safetensors", "link", "hard"):
        with pytest.raises(UsageError, match="is one of the snapshots"):
            write_outputs(
                plan, np.ones((1, 2)), [tmp_path / name], [{"sources": []}], overwrite=True
            )
    assert [read_header(s.index.path).size for s in snapshots] == [s.index.size for s in snapshots]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def touch_again(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "when"),
    [
        (cut, "before"),
        (cut, "during"),
        (touch_again, "before"),
        (touch_again, "during"),
        (Path.unlink, "before"),  # once open, a file outlives its name
    ],
)
def test_a_snapshot_that_changes_stops_everything(
    tmp_path: Path, change: Callable[[Path], None], when: str
) -> None:
    snapshots = two_snapshots(tmp_path, 200_000)
    path = snapshots[1].index.path
    if when == "before":
        change(path)
    once = threading.Event()

    def progress(_: int) -> None:
        if when == "during" and not once.is_set():
            once.set()
            change(path)

    before = files(tmp_path)
    with pytest.raises(SnapshotError, match=r"s001\.safetensors: changed while it was read"):
        synthesize(snapshots, np.ones((3, 2)), tmp_path, progress=progress, row_bytes=4096)
    assert files(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_or_a_fault_in_a_worker_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    snapshots = two_snapshots(tmp_path, 200_000)

    def progress(_: int) -> None:
        raise error

    before = files(tmp_path)
    with pytest.raises(error):
        synthesize(snapshots, np.ones((3, 2)), tmp_path, progress=progress, row_bytes=4096)
    assert files(tmp_path) == before


def test_a_disk_that_fails_to_read_or_write_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = two_snapshots(tmp_path)
    before = files(tmp_path)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    for call in ("preadv", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, broken)
            with pytest.raises(MachineError, match="Input/output error"):
                synthesize(snapshots, np.ones(2), tmp_path)
        assert files(tmp_path) == before


def test_a_disk_that_fails_to_flush_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = two_snapshots(tmp_path)
    before = files(tmp_path)
    flushed = threading.Event()

    def broken(_: int) -> None:
        flushed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    monkeypatch.setattr(workers, "FLUSH_EVERY", 0)
    with pytest.raises(MachineError, match=r"out0\.safetensors: cannot be written \(Input"):
        synthesize(snapshots, np.ones(2), tmp_path, progress=lambda _: flushed.wait(10))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it", "out of memory"),
        (
            "CUDA error: an illegal memory access\nMore of it",
            "CUDA error: an illegal memory access",
        ),
    ],
)
def test_a_device_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    snapshots = two_snapshots(tmp_path)
    before = files(tmp_path)

    def failing(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(synthesis, "TorchAccumulator", failing)
    with pytest.raises(MachineError, match=rf"^device='cuda:1': {told}; free some.*device='cpu'$"):
        synthesize(snapshots, np.ones(2), tmp_path, device="cuda:1")
    assert files(tmp_path) == before


def test_the_device_path_gives_what_the_cpu_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine around the torch sums, with torch's own CPU in place of a GPU."""
    monkeypatch.setattr(
        synthesis, "TorchAccumulator", lambda *sizes: TorchAccumulator(*sizes[:-1], "cpu")
    )
    contents = random_contents("F16", 20, SHAPES)
    for tensors in contents:
        tensors["same"] = np.arange(9, dtype=np.float16)
        tensors["n"] = np.array([len(contents)])
    snapshots = make_snapshots(tmp_path, contents)
    weights = np.random.default_rng(4).standard_normal((2, 20))
    for dtype in ("same", "float32"):
        here = synthesize(snapshots, weights, tmp_path / f"c{dtype}", dtype=dtype)
        there = synthesize(
            snapshots, weights, tmp_path / f"d{dtype}", dtype=dtype, device="cuda", row_bytes=512
        )
        for cpu, device in zip(map(read_tensors, here), map(read_tensors, there), strict=True):
            for name, expected in cpu.items():
                unit = spacing(expected.astype(np.float64), "F16" if dtype == "same" else "F32")
                exact = name in ("same", "n")
                difference = np.abs(expected.astype(np.float64) - device[name].astype(np.float64))
                assert np.all(difference <= (0 if exact else unit))


def test_short_reads_and_writes_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = random_contents("F32", 2, {"w": (1000,)})
    snapshots = make_snapshots(tmp_path, contents)
    whole = synthesize(snapshots, np.ones(2), tmp_path / "whole")[0].read_bytes()
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:99]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:77], at))
    assert synthesize(snapshots, np.ones(2), tmp_path / "short")[0].read_bytes() == whole


def test_systems_without_positioned_calls_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = make_snapshots(tmp_path, random_contents("BF16", 5, SHAPES))
    weights = np.random.default_rng(0).standard_normal((2, 5))
    usual = [p.read_bytes() for p in synthesize(snapshots, weights, tmp_path / "usual")]
    for call in ("preadv", "pwrite", "posix_fallocate", "sched_getaffinity", "O_DIRECTORY"):
        monkeypatch.delattr(os, call, raising=False)
    plain = synthesize(snapshots, weights, tmp_path / "plain", row_bytes=512)
    assert [p.read_bytes() for p in plain] == usual


def test_the_last_target_that_exists_stops_the_first_from_landing(tmp_path: Path) -> None:
    snapshots = two_snapshots(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out2.safetensors").write_bytes(b"old")
    with pytest.raises(UsageError, match=r"out2\.safetensors: exists already"):
        synthesize(snapshots, np.ones((3, 2)), tmp_path / "out")
    assert files(tmp_path / "out") == {"out2.safetensors"}
    synthesize(snapshots, np.ones((3, 2)), tmp_path / "out", overwrite=True)
    assert len(files(tmp_path / "out")) == 3


def test_progress_counts_every_byte_of_the_plan(tmp_path: Path) -> None:
    contents = random_contents("F16", 20, SHAPES)
    for tensors in contents:
        tensors["n"] = np.array([1, 2])
    snapshots = make_snapshots(tmp_path, contents)
    seen: list[int] = []
    synthesize(snapshots, np.ones(20), tmp_path, progress=seen.append, row_bytes=512)
    assert sum(seen) == plan_of(snapshots).bytes_to_read


class Recorder:
    """A sink that keeps the bytes of one target's output, and where each write began."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.starts: list[tuple[int, int]] = []

    def take_sums(self, chunk: Chunk, results: Results, unsettled: object) -> None:
        self.take_copies(chunk, results)

    def take_copies(self, chunk: Chunk, results: Results) -> None:
        found = bytes(results(0))
        self.data[chunk.out_start : chunk.out_start + len(found)] = found
        self.starts.append((chunk.out_start, len(found)))


@pytest.mark.parametrize("dtype", ["same", "float16"])
def test_what_is_written_once_and_in_order_is_the_same(tmp_path: Path, dtype: str) -> None:
    """Tensors that never vary, that vary from their beginnings on, and only at one of their ends;
    with NaN, infinity and what overflows."""
    size, rng = 5000, np.random.default_rng(0)
    names = ["moves", "frozen", "late", "middle", "frozen too", "odd", "frozen odd", "moves too"]
    base = {name: rng.standard_normal(size).astype(np.float32) for name in names}
    for name in ("odd", "frozen odd"):
        base[name][:4] = np.nan, np.inf, -0.0, 1e6
    contents = []
    for k in range(4):
        tensors = {name: values.copy() for name, values in base.items()}
        for name in ("moves", "odd", "moves too"):
            tensors[name][4:] += k
        tensors["late"][-1] += k
        tensors["middle"][size // 2] += k == 2
        contents.append(tensors | {"count": np.array(k), "none": np.zeros((0, 3), np.float32)})
    snapshots = make_snapshots(tmp_path, contents)
    weights = np.array([[[0.1, 0.2, 0.3, 0.4]]])
    made = []
    for once in (False, True):
        plan = plan_of(snapshots, dtype=dtype)
        read: list[int] = []
        report = NonfiniteReport(plan, weights)
        how = {"report": report, "progress": read.append, "workers": 1, "row_bytes": 1}
        sink = Recorder(plan.bytes_to_write)
        with Engine(plan, weights, **how) as engine:  # type: ignore[arg-type]
            if once:
                engine.settle(plan.whole())
                engine.sum_in_order(sink, plan.whole())
            else:
                engine.run(sink)
        made.append((bytes(sink.data), str(report.tensors(engine.varies)), sum(read)))
    assert made[0] == made[1]
    ends = [start + count for start, count in sink.starts]
    assert [0, *ends] == [*(start for start, _ in sink.starts), plan.bytes_to_write]
