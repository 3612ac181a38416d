"""Verification: what synthesize wrote passes, whatever its dtypes; one wrong bit doesn't."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.solver.profiles import Profile
from posthoc_cli.solver.targets import make_targets
from posthoc_cli.storage.header import read_header
from posthoc_cli.storage.metadata import RECIPE
from posthoc_cli.storage.readers import fingerprint
from posthoc_cli.storage.shards import open_tensors
from posthoc_cli.synthesis import comparison
from posthoc_cli.synthesis.comparison import Problem, allowed
from posthoc_cli.synthesis.outputs import write_outputs
from posthoc_cli.synthesis.recipe import make_recipe
from posthoc_cli.synthesis.verification import Report, find_output, verify
from tests.support import STORED, plan_of, read_tensors, snapshot_of, write_layout, write_tensors

END = ".safetensors"


def tensors_of(rng: np.random.Generator) -> dict[str, npt.NDArray]:
    """Tensors of every kind; those of another call are others, but for `same.*`."""
    tensors: dict[str, npt.NDArray] = {
        f"float.{name}": rng.standard_normal((3, 50)).astype(STORED[name])
        for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
    }
    tensors["complex"] = rng.standard_normal((5, 8)).astype(np.float32).view(np.complex64)
    tensors["count"] = rng.integers(0, 1000, (4, 2))
    tensors["flags"] = rng.integers(0, 2, 9).astype(np.bool_)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    tensors["scalar"] = np.array(rng.standard_normal(), np.float16)
    tensors["same.F16"] = np.linspace(-1, 1, 70, dtype=np.float16)
    tensors["same.F64"] = np.array([np.nan, -0.0, 1 / 3, np.inf])
    return tensors


def snapshots_in(folder: Path, count: int, tensors: Any = tensors_of) -> list[Snapshot]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    snapshots = []
    for number in range(count):
        contents = tensors(rng)
        order = list(contents) if number % 2 else list(reversed(contents))
        path = folder / f"{number:03d}{END}"
        write_tensors(path, contents, {"step": str(number)}, order=order)
        snapshots.append(snapshot_of(path, 100 * (number // 2 + 1)))
    return snapshots


def synthesize(
    snapshots: Sequence[Snapshot],
    out: Path,
    weights: Sequence[float] | None = None,
    *,
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
    old: bool = False,
    device: str = "cpu",
    **how: Any,
) -> Path:
    """Write one output, with a recipe as `posthoc synthesize` makes them."""
    if weights is None:
        weights = np.random.default_rng(1).standard_normal(len(snapshots)).tolist()
        weights[0] += 1 - sum(weights)
    dtype = how.pop("dtype", "same")
    recipe = make_recipe(
        "edm2",
        *make_targets(gamma=3.0),
        100,
        snapshots,
        weights,
        [fingerprint(each.index) for each in snapshots],
        copied=() if old else copy,
        dropped=() if old else drop,
    )
    if old:
        recipe["sources"] = [
            {key: value for key, value in source.items() if key not in ("bytes", "fingerprint")}
            for source in recipe["sources"]
        ]
    plan = plan_of(snapshots, dtype=dtype, copy=copy, drop=drop)
    write_outputs(plan, np.array([weights]), [out], [recipe], device=device, **how)
    return out


def check(out: Path, folder: Path | None = None, **how: Any) -> Report:
    return verify(find_output(out), folder, **how)


def only_problem(report: Report) -> Problem:
    (problem,) = report.problems
    return problem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are less than all of a small file."""
    monkeypatch.setattr(comparison, "BLOCKS", 3)
    monkeypatch.setattr(comparison, "_FEWEST_BLOCKS", 3)
    monkeypatch.setattr(comparison, "BLOCK", 8)


# What is right


@pytest.mark.parametrize("dtype", ["same", "float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [1, 4, 35])
def test_what_synthesize_wrote_is_right(
    tmp_path: Path, folder: Path, dtype: str, count: int
) -> None:
    snapshots = snapshots_in(folder, count)
    out = synthesize(snapshots, tmp_path / f"x{END}", dtype=dtype)
    report = check(out, folder, full=True)
    values = sum(array.size for array in tensors_of(np.random.default_rng()).values()) + 20
    assert report == Report(count, count, 13, values, values, 0, [])


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("weights", [[0.5, 0.25, 0.25], [1.5, -2, 1.75]], ids=["sum 1", "sum 1.25"])
@pytest.mark.parametrize("dtype", ["same", "float32"])
def test_copied_dropped_and_constant_tensors(
    tmp_path: Path, folder: Path, weights: Sequence[float], dtype: str
) -> None:
    snapshots = snapshots_in(folder, 3)
    out = synthesize(
        snapshots,
        tmp_path / f"x{END}",
        weights,
        dtype=dtype,
        copy=["*.BF16", "float.F8*", "scal?r"],
        drop=["*.F64", "scal?r", "empty"],
    )
    report = check(out, folder, full=True)
    assert (report.problems, report.compared) == ([], report.values)
    sample = check(out, folder)
    assert (sample.problems, sample.known) == ([], 3)
    assert 0 < sample.compared < sample.values == report.values


def test_newest_is_the_first_of_the_last_step(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 4)
    for chosen in (snapshots, snapshots[::-1]):
        out = synthesize(chosen, tmp_path / f"x{END}", copy=["*"], overwrite=True)
        assert not check(out, folder, full=True).problems
        newest = read_tensors(max(chosen, key=lambda each: each.step).index.path)
        assert np.array_equal(read_tensors(out)["count"], newest["count"])


def test_without_a_folder_the_snapshots_lie_beside_it(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 2)
    out = synthesize(snapshots, tmp_path / f"x{END}")
    with pytest.raises(UsageError, match="lies beside it"):
        check(out)
    shutil.move(out, folder / "moved.safetensors")
    assert not check(folder / "moved.safetensors").problems


def test_an_old_recipe(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 2)
    out = synthesize(snapshots, tmp_path / f"x{END}", drop=["same.*"], old=True)
    assert "fingerprint" not in read_header(out).metadata[RECIPE]
    report = check(out, folder, full=True)
    assert (report.known, report.problems) == (0, [])


def test_the_file_may_be_laid_out_anew(tmp_path: Path, folder: Path) -> None:
    out = synthesize(snapshots_in(folder, 3), tmp_path / f"x{END}")
    tensors, metadata = read_tensors(out), read_header(out).metadata
    write_tensors(out, tensors, metadata, order=list(reversed(tensors)))
    assert not check(out, folder, full=True).problems


def test_shards_and_folders(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 3)
    (folder / "nested").mkdir()
    shutil.move(folder / f"001{END}", folder / "nested" / f"model{END}")
    snapshots[1] = Snapshot(open_tensors(folder / "nested"), Profile(100, 1.0), "metadata")
    out = synthesize(snapshots, tmp_path / f"x{END}", shard_bytes=1000)
    assert not out.exists()
    report = check(out, folder, full=True)
    assert (report.problems, report.tensors) == ([], 13)
    shard = tmp_path / "x-00002-of-00005.safetensors"
    assert shard.exists()
    assert not check(tmp_path / f"x{END}.index.json", folder).problems
    flip(shard, next(iter(read_header(shard).tensors)))
    assert only_problem(check(out, folder)).tensor == next(iter(read_header(shard).tensors))


def test_an_output_of_another_device_may_round_otherwise(tmp_path: Path, folder: Path) -> None:
    def tensors(rng: np.random.Generator) -> dict[str, npt.NDArray]:
        return {
            name: (rng.standard_normal(20000) * 10.0 ** rng.integers(-6, 4, 20000)).astype(
                STORED[name]
            )
            for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
        } | {"same": np.array([0.1, 0.2])}

    snapshots = snapshots_in(folder, 20, tensors)
    out = synthesize(snapshots, tmp_path / f"x{END}", device="cpu:0")  # torch, without fma
    report = check(out, folder, full=True)
    assert report.problems == []
    assert 0 < report.rounded < 40000
    assert check(out, folder).problems == []


# What is wrong


def flip(path: Path, name: str, byte: int = -1, bit: int = 3) -> None:
    """Flip a bit of a tensor in a file."""
    layout = read_header(path)
    info = layout.tensors[name]
    at = layout.parts[0].data_start + (info.start if byte >= 0 else info.end) + byte
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", ["same", "float32"])
def test_one_wrong_bit_anywhere(tmp_path: Path, folder: Path, dtype: str) -> None:
    snapshots = snapshots_in(folder, 4)
    right = synthesize(snapshots, tmp_path / f"right{END}", dtype=dtype, copy=["float.BF16"])
    names = [name for name, info in read_header(right).tensors.items() if info.elements]
    assert len(names) == 12
    out = tmp_path / f"x{END}"
    for name in names:
        shutil.copy(right, out)
        flip(out, name)  # a high bit of the last element
        info = read_header(out).tensors[name]
        last = tuple(length - 1 for length in info.shape)
        report = check(out, folder, full=True)
        problem = only_problem(report)
        assert (problem.path, problem.tensor, problem.element) == (out, name, last)
        there, wanted = read_tensors(out)[name], read_tensors(right)[name]
        if name.startswith("float"):
            text = problem.problem.removeprefix("is ").split(" and should be ")
            assert np.array(text, np.float64) == pytest.approx(
                [there[last].astype(np.float64), wanted[last].astype(np.float64)], rel=1e-8
            )
        assert only_problem(check(out, folder)) == problem  # few values: the sample is all


def test_sums_may_be_rounded_to_either_side(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 3)
    weights = [1.5, -2, 1.75]
    out = synthesize(snapshots, tmp_path / f"x{END}", weights)
    right, metadata = read_tensors(out), read_header(out).metadata
    sources = [read_tensors(each.index.path) for each in snapshots]
    for name in ("float.F16", "float.F32"):
        terms = [
            w * each[name].astype(np.float64) for w, each in zip(weights, sources, strict=True)
        ]
        up = np.copysign(np.inf, sum(terms) - right[name]).astype(right[name].dtype)
        other = right | {name: np.nextafter(right[name], up)}
        write_tensors(out, other, metadata)
        report = check(out, folder, full=True)
        assert (report.problems, report.rounded) == ([], 150)
        beyond = right[name].copy()
        for _ in range(1 if name == "float.F16" else 9):
            beyond = np.nextafter(beyond, -up)
        write_tensors(out, right | {name: beyond}, metadata)
        assert only_problem(check(out, folder, full=True)).tensor == name


def test_copies_may_not(tmp_path: Path, folder: Path) -> None:
    out = synthesize(snapshots_in(folder, 3), tmp_path / f"x{END}", copy=["float.F64"])
    for name in ("same.F16", "count", "float.F64"):
        flip(out, name, 0, 0)
        assert only_problem(check(out, folder)).tensor == name
        flip(out, name, 0, 0)


@pytest.mark.usefixtures("sampled")
def test_a_sample_sees_the_beginning_of_every_tensor(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 4)
    right = synthesize(snapshots, tmp_path / f"right{END}", [1.5, -2, 1.75, -0.9])
    out = tmp_path / f"x{END}"
    for name, info in read_header(right).tensors.items():
        if info.elements:
            shutil.copy(right, out)
            width = (info.end - info.start) // info.elements
            if name == "same.F64":
                flip(out, name, 2 * width + 7, 6)
            else:
                flip(out, name, (4 if name == "complex" else width) - 1)
            problem = only_problem(check(out, folder))
            assert problem.tensor == name
            assert problem.element is not None
            assert set(problem.element) <= {0, 2}


@pytest.mark.usefixtures("sampled")
def test_a_tensor_that_varies_only_outside_of_the_sample(tmp_path: Path, folder: Path) -> None:
    def tensors(rng: np.random.Generator) -> dict[str, npt.NDArray]:
        long = np.ones(5000, np.float32)
        long[-1] = rng.standard_normal()
        return {"long": long, "short": np.ones(5, np.float32)}

    snapshots = snapshots_in(folder, 3, tensors)
    out = synthesize(snapshots, tmp_path / f"x{END}", [1.5, -2, 1.75])
    assert read_tensors(out)["long"][0] == 1.25
    assert read_tensors(out)["short"][0] == 1
    for full in (False, True):
        assert check(out, folder, full=full).problems == []
    copied = read_tensors(out) | {"long": read_tensors(folder / f"002{END}")["long"]}
    write_tensors(out, copied, read_header(out).metadata)
    assert check(out, folder).problems == []  # it could be a copy, for all that the sample tells
    problem = only_problem(check(out, folder, full=True))
    assert (problem.tensor, problem.element, problem.problem) == (
        "long",
        (0,),
        "is 1 and should be 1.25",
    )


def test_the_first_of_several_in_the_order_of_the_file(tmp_path: Path, folder: Path) -> None:
    out = synthesize(snapshots_in(folder, 3), tmp_path / f"x{END}")
    names = list(read_header(out).tensors)
    for name in ("scalar", "float.F32", "count"):
        flip(out, name)
    found = [problem.tensor for problem in check(out, folder, full=True).problems]
    assert found == sorted(("scalar", "float.F32", "count"), key=names.index)


def test_another_weight(tmp_path: Path, folder: Path) -> None:
    out = synthesize(snapshots_in(folder, 2), tmp_path / f"x{END}", [0.5, 0.5])
    metadata = dict(read_header(out).metadata)
    recipe = json.loads(metadata[RECIPE])
    recipe["sources"][0]["weight"] = 0.52
    write_tensors(out, read_tensors(out), metadata | {RECIPE: json.dumps(recipe)})
    wrong = {problem.tensor for problem in check(out, folder).problems}
    assert {"float.F64", "float.F8_E4M3", "complex", "scalar"} <= wrong
    assert not wrong & {"count", "flags", "same.F16", "same.F64"}


def test_tensors_that_should_not_be_there_or_should(tmp_path: Path, folder: Path) -> None:
    out = synthesize(snapshots_in(folder, 2), tmp_path / f"x{END}", drop=["float.F16"])
    tensors, metadata = read_tensors(out), read_header(out).metadata

    def problems(changed: Mapping[str, npt.NDArray]) -> list[tuple[str | None, str]]:
        write_tensors(out, changed, metadata)
        report = check(out, folder)
        assert report.compared == 0
        return [(problem.tensor, problem.problem) for problem in report.problems]

    renamed = {("kount" if name == "count" else name): array for name, array in tensors.items()}
    assert problems(renamed) == [("kount", "is not in its snapshots"), ("count", "is missing")]
    flat = tensors | {"float.F32": tensors["float.F32"].ravel()}
    assert problems(flat) == [("float.F32", "is F32 [150] and should be F32 [3, 50]")]
    wide = tensors | {"float.BF16": tensors["float.BF16"].astype(np.float32)}
    assert problems(wide) == [("float.BF16", "is F32 [3, 50] and should be BF16 [3, 50]")]
    assert {found for _, found in problems({})} == {"is missing"}


# Sources


def test_sources_that_are_others(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 4)
    out = synthesize(snapshots, tmp_path / f"x{END}")
    copies = tmp_path / "copies"
    shutil.copytree(folder, copies, copy_function=shutil.copyfile)  # with other times
    assert check(out, copies).problems == []

    flip(copies / f"001{END}", "float.F64", 0)
    (copies / f"002{END}").unlink()
    (copies / f"003{END}").write_bytes(b"nothing of the kind")
    report = check(out, copies)
    assert report.compared == 0
    assert [problem.path.name for problem in report.problems] == [
        f"00{number}{END}" for number in (1, 2, 3)
    ]
    found = [problem.problem for problem in report.problems]
    assert found[:2] == ["is not the file that the output was made of", "is not there"]
    assert found[2] == "plain text ('nothing of the kind'), not a safetensors file"


def test_sources_of_an_old_recipe_that_are_others(tmp_path: Path, folder: Path) -> None:
    out = synthesize(snapshots_in(folder, 3), tmp_path / f"x{END}", old=True)
    write_tensors(folder / f"000{END}", {"w": np.ones(3, np.float32)})
    problem = only_problem(check(out, folder))
    assert (problem.path.name, problem.problem) == (
        f"000{END}",
        f"has other tensors than '002{END}'",
    )
    snapshots_in(folder, 3, lambda rng: tensors_of(np.random.default_rng(99)))
    assert check(out, folder).problems[0].problem.startswith("is ")


def test_a_source_that_changes_meanwhile(tmp_path: Path, folder: Path) -> None:
    snapshots = snapshots_in(folder, 2)
    out = synthesize(snapshots, tmp_path / f"x{END}")

    def replace(read: int, total: int) -> None:
        shutil.copy(folder / f"001{END}", folder / f"000{END}")

    with pytest.raises(SnapshotError, match="changed while it was read"):
        check(out, folder, full=True, progress=replace)


# Recipes


def source(**changes: Any) -> dict[str, Any]:
    return {"file": f"000{END}", "step": 1, "weight": 1.0} | changes


@pytest.mark.parametrize(
    "recipe",
    [
        {"sources": []},
        {"sources": 3},
        {"sources": [3]},
        *(
            {"sources": [source(file=file)]}
            for file in ("../../etc/passwd", "/etc/passwd", "", "..", ".", "a\0b", 7, None)
        ),
        *(
            {"sources": [source(weight=weight)]}
            for weight in (float("nan"), float("inf"), "1", None, True, [], 10**400)
        ),
        {"sources": [source(step="x")]},
        {"sources": [source(bytes="many")]},
        {"sources": [source(fingerprint=1)]},
        {"sources": [source()], "copied": "w"},
        {"sources": [source()], "dropped": [1]},
    ],
    ids=lambda recipe: json.dumps(recipe)[:60],
)
def test_recipes_that_make_no_sense(tmp_path: Path, recipe: dict[str, Any]) -> None:
    out = tmp_path / f"x{END}"
    write_tensors(out, {"w": np.ones(3)}, {RECIPE: json.dumps(recipe)})
    write_tensors(tmp_path / f"000{END}", {"w": np.ones(3)})
    with pytest.raises(SnapshotError, match="its recipe doesn't make sense"):
        check(out, tmp_path)


def test_no_recipe_no_file_no_folder(tmp_path: Path, folder: Path) -> None:
    out = synthesize(snapshots_in(folder, 1), tmp_path / f"x{END}")
    with pytest.raises(SnapshotError, match="posthoc didn't make it"):
        check(folder / f"000{END}", folder)
    with pytest.raises(UsageError, match="there is no such file"):
        check(tmp_path / f"y{END}", folder)
    with pytest.raises(UsageError, match="there is no such folder"):
        check(out, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a folder"):
        check(out, out)


# The bounds


def test_allowed() -> None:
    def judge(dtype: str, found: Any, sums: Any, largest: float = 1.0, terms: int = 2) -> list:
        found, sums = np.array(found, np.float64), np.array(sums, np.float64)
        with np.errstate(all="ignore"):
            return allowed(dtype, found, sums, np.full(sums.shape, largest), terms).tolist()

    ulp = 2.0**-10
    assert judge("F16", [1, 1 + ulp, 1 + 2 * ulp], [1 + ulp] * 3) == [True] * 3
    assert judge("F16", [1, 1 + 3 * ulp], [1 + 1.5 * ulp] * 2) == [False, False]
    inf, nan = np.inf, np.nan
    sums = [65530, 1e9, -1e9, 60000, nan, 1, inf, inf, inf]
    found = [inf, inf, inf, inf, nan, nan, inf, -inf, 65504]
    wanted = [True, True, False, False, True, False, True, False, False]
    assert judge("F16", found, sums) == wanted
    # Below the smallest normal number, the last place stays where it is.
    assert judge("F16", [2.0**-24, 2.0**-23, 0, -0.0], [0.0, 0.0, 0.0, 0.0]) == [
        True,
        False,
        True,
        True,
    ]
    assert judge("BF16", [1 + 2.0**-7, 1 + 2.0**-6], [1.0, 1.0]) == [True, False]
    last = 2.0**-23
    assert judge("F32", [4 * last, 5 * last], [0.0, 0.0]) == [True, False]
    assert judge("F32", [4000 * last, 5000 * last], [0.0, 0.0], largest=1024) == [True, False]
    last = 2.0**-52
    assert judge("F64", [4 * last, 5 * last], [0.0, 0.0]) == [True, False]
    assert judge("F64", [600 * last, 601 * last], [0.0, 0.0], terms=600) == [True, False]
    # Without infinities: not a number, or the largest there is.
    assert judge("F8_E4M3", [nan, 448, -448, nan, 400], [1e4, 1e4, 1e4, 300, 1e4]) == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert judge("F8_E5M2", [inf, 57344, -inf, inf], [1e9, 1e9, 1e9, 1e3]) == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F32", "F64"])
def test_whatever_is_nearest_is_allowed(dtype: str) -> None:
    rng = np.random.default_rng(3)
    sums = rng.standard_normal(20000) * 2.0 ** rng.integers(-200, 200, 20000)
    sums[:4] = 0, np.inf, -np.inf, np.nan
    with np.errstate(all="ignore"):
        nearest = sums.astype(STORED[dtype]).astype(np.float64)
        assert allowed(dtype, nearest, sums, np.abs(sums), 3).all()


# Memory, workers


def test_workers_agree(tmp_path: Path, folder: Path) -> None:
    def tensors(rng: np.random.Generator) -> dict[str, npt.NDArray]:
        return {name: rng.standard_normal(300_000).astype(np.float16) for name in "abc"}

    out = synthesize(snapshots_in(folder, 3, tensors), tmp_path / f"x{END}")
    for name in "bc":
        flip(out, name)
    one, many = (check(out, folder, full=True, workers=workers) for workers in (1, 4))
    assert one == many
    assert [problem.tensor for problem in one.problems] == ["b", "c"]
    assert one.problems[0].element == (299_999,)


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, folder: Path) -> None:
    folder.mkdir()
    peaks = []
    for length in (2_000_000, 8_000_000):
        for number in range(2):
            write_layout(
                folder / f"{number}{END}",
                {"w": ("F16", (length,))},
                {"w": np.random.default_rng(number).bytes(length * 2)},
            )
        snapshots = [snapshot_of(folder / f"{number}{END}", number + 1) for number in range(2)]
        out = synthesize(snapshots, tmp_path / f"x{END}", overwrite=True)
        tracemalloc.start()
        report = check(out, folder, full=True, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (report.compared, report.problems) == (length, [])
    assert peaks[1] < peaks[0] * 1.2
