"""Which bytes come from which: runs, chunks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.storage.header import make_header, read_header
from tests.support import plan_of, snapshot_of, write_layout


def snapshots(folder: Path, tensors: dict[str, np.ndarray], count: int = 3) -> list[Snapshot]:
    made = []
    cache: dict = {}
    for step in range(1, count + 1):
        path = folder / f"{step}.safetensors"
        save_file(tensors, path)
        made.append(snapshot_of(path, step, cache))
    return made


MIXED = {
    "w1": np.zeros((3, 5), np.float32),
    "w2": np.zeros(7, np.float32),
    "half": np.zeros(4, np.float16),
    "count": np.array(3),
    "none": np.zeros((0, 2), np.float32),
}


def test_neighbours_of_one_dtype_are_one_run(tmp_path: Path) -> None:
    plan = plan_of(snapshots(tmp_path, MIXED))
    assert [(run.names, run.bounds, run.averaged) for run in plan.segments] == [
        (("count",), (0, 1), False),
        (("w1", "w2"), (0, 15, 22), True),
        (("half",), (0, 4), True),
    ]
    assert plan.bytes_to_read == 8 + 3 * (88 + 8)
    assert plan.bytes_to_write == 8 + 88 + 8
    assert set(plan.tensors) == set(MIXED)


def test_a_run_ends_where_any_snapshot_has_another_order(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    tensors = dict.fromkeys(("a", "b", "c"), ("F32", (10,)))
    write_layout(paths[0], tensors, order=["a", "b", "c"])
    write_layout(paths[1], tensors, order=["c", "a", "b"])
    made = [snapshot_of(path, step) for step, path in enumerate(paths, 1)]
    plan = plan_of(made)
    assert [run.names for run in plan.segments] == [("a", "b"), ("c",)]
    assert [run.starts for run in plan.segments] == [(0, 40), (80, 0)]
    assert [run.out_start for run in plan.segments] == [0, 80]


def test_chunks_cover_every_element_once(tmp_path: Path) -> None:
    plan = plan_of(snapshots(tmp_path, MIXED))
    for most in (1, 4, 64):
        covered = [0] * len(plan.segments)
        for chunk in (piece for whole in plan.whole() for piece in whole.cut(most)):
            place = plan.segments.index(chunk.segment)
            assert chunk.first == covered[place]
            assert 0 < chunk.elements <= most
            covered[place] = chunk.last
        assert covered == [each.elements for each in plan.segments]


def test_the_output_is_laid_out_where_the_runs_say(tmp_path: Path) -> None:
    plan = plan_of(snapshots(tmp_path, MIXED), dtype="float64")
    infos = make_header(plan.tensors, {})[1]
    assert {name: dtype for name, (dtype, _) in plan.tensors.items()} == {
        "w1": "F64", "w2": "F64", "half": "F64", "none": "F64", "count": "I64",
    }  # fmt: skip
    for run in plan.segments:
        for name, bound in zip(run.names, run.bounds, strict=False):
            assert infos[name].start == run.out_start + run.out_size_of(bound)


def test_copied_and_dropped_tensors(tmp_path: Path) -> None:
    made = snapshots(tmp_path, MIXED)
    plan = plan_of(made, copy=["w[12]"], drop=["half", "n*"])
    assert [(run.names, run.averaged) for run in plan.segments] == [
        (("count",), False),
        (("w1", "w2"), False),
    ]
    with pytest.raises(UsageError, match=r"copy='x\*': matches no tensor"):
        plan_of(made, copy=["x*"])
    with pytest.raises(UsageError, match="leaves no tensor"):
        plan_of(made, drop=["*"])


def test_the_newest_snapshot_is_the_one_of_the_last_step(tmp_path: Path) -> None:
    made = snapshots(tmp_path, MIXED)
    assert plan_of(made).newest == 2
    assert plan_of(made[::-1]).newest == 0


def test_parts_of_block_formats_have_no_average(tmp_path: Path) -> None:
    write_layout(tmp_path / "x", {"scale": ("F8_E8M0", (8,)), "packed": ("F4", (16,))})
    made = [snapshot_of(tmp_path / "x", 1)]
    with pytest.raises(SnapshotError, match="tensor scale: its dtype F8_E8M0 has no average"):
        plan_of(made, copy=["packed"])
    plan = plan_of(made, copy=["*"])
    assert plan.bytes_to_write == 16
    assert read_header(tmp_path / "x").tensors.keys() == plan.tensors.keys()
