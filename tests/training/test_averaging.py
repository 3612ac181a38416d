"""Updates of averages: every layout, dtype and thread; the live tensors of a network."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence

import pytest
import torch

from posthoc_cli.training import averaging
from posthoc_cli.training.averaging import EmaUpdate, LiveTensors, TensorRoles
from tests.training.networks import Tied


def update_of(
    sources: Sequence[torch.Tensor], averages: Sequence[Sequence[torch.Tensor]]
) -> EmaUpdate:
    """An update of averages [profiles][tensors], all of them averaged."""
    live = {str(k): source for k, source in enumerate(sources)}
    columns = [{str(k): average for k, average in enumerate(each)} for each in averages]
    return EmaUpdate(live, columns, TensorRoles())


@pytest.mark.parametrize("serial", [1 << 15, 200, 0], ids=["threads", "both", "one"])
def test_an_update_is_the_plain_formula_for_every_layout(
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
    wide = [averaging.accumulation_dtype(each.dtype, torch.float32) for each in sources]
    averages = [
        [
            torch.empty_like(s, dtype=d).copy_(torch.randn(s.shape))
            for s, d in zip(sources, wide, strict=True)
        ]
        for _ in range(3)
    ]
    before = [[each.clone() for each in column] for column in averages]
    weights = (0.25, 1e-3, 1.0)
    update_of(sources, averages)(weights)
    for weight, old, new in zip(weights, before, averages, strict=True):
        for source, was, now in zip(sources, old, new, strict=True):
            torch.testing.assert_close(now, was + weight * (source.to(now.dtype) - was))


def move_once(averages: list[list[torch.Tensor]]) -> None:
    update_of([torch.ones(10) for _ in averages[0]], averages)([0.5])


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
    update_of([torch.ones(3)], averages)([1.0])
    assert torch.equal(averages[0][0], torch.ones(3))


def test_live_tensors_hold_each_tied_tensor_once() -> None:
    live = LiveTensors(Tied(), lambda name: True)
    assert live.refresh()
    assert not live.refresh()
    assert live.alias["head.weight"] == "embedding.weight"
    assert "head.weight" not in live.tensors
    assert not {"mask", "table", "norm.num_batches_tracked"} & set(live.tensors)
