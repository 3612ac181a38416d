"""Trackers that write to a bucket: what they do on a disk, but for locks and differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import UsageError
from posthoc_cli.storage.stores import forget
from tests.servers.buckets import Buckets
from tests.training.networks import folder_bytes, small, train

pytest.importorskip("obstore")


@pytest.fixture
def bucket(server: Buckets, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """An empty bucket's objects."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    forget()
    server.buckets["bucket"].clear()
    server.deny = None
    yield server.buckets["bucket"]
    forget()


def tracker(scheme: str = "s3", **options: Any) -> PostHocEMA:
    return PostHocEMA(small(), folder=f"{scheme}://bucket/run", checkpoint_every=2, **options)


def names(*steps: int) -> list[str]:
    return [f"run/ema-step{s:08d}-{p}.safetensors" for s in steps for p in ("0.050", "0.100")]


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize("background", [False, True])
def test_the_same_bytes_as_on_a_disk(
    bucket: dict[str, Any], scheme: str, background: bool, tmp_path: Any
) -> None:
    ema = tracker(scheme, keep=2, background=background)
    local = PostHocEMA(small(), folder=tmp_path, checkpoint_every=2, keep=2)
    local.run = ema.run
    for each in (ema, local):
        train(each.model, each, 8)
        each.close()
    assert sorted(bucket) == names(6, 8)
    on_disk = folder_bytes(tmp_path)
    assert {f"run/{name}": data for name, data in on_disk.items()} == {
        key: each.data for key, each in bucket.items()
    }
    made, expected = ema.synthesize(0.07), local.synthesize(0.07)
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_another_run_is_refused_or_set_aside(bucket: dict[str, Any]) -> None:
    first = tracker()
    train(first.model, first, 4)
    first.close()
    with pytest.raises(UsageError, match=r"s3://bucket/run: holds another run's snapshots"):
        tracker().update()
    assert sorted(bucket) == names(2, 4)
    second = tracker(overwrite=True)
    with pytest.warns(RuntimeWarning, match=f"the 4 of run {first.run} are now in s3://bucket/"):
        train(second.model, second, 2)
    moved = [name.replace("run/", f"run/other-runs/{first.run}/") for name in names(2, 4)]
    assert sorted(bucket) == sorted([*names(2), *moved])
    second.close()


def test_a_run_goes_on_from_the_snapshots_in_a_bucket(bucket: dict[str, Any]) -> None:
    ema = tracker(dtype=torch.float32)
    train(ema.model, ema, 6)
    ema.close()
    state = load(bucket[names(4)[1]].data)
    again = tracker(dtype=torch.float32, later="set aside")
    assert again.load_snapshots(4) == 4
    read = again.state_dict()["averages"][1]
    assert all(torch.equal(read[name], state[name]) for name in state)
    with pytest.warns(RuntimeWarning, match="up to step 6, and it resumes at step 4; the 2 after"):
        train(again.model, again, 2)
    assert len([key for key in bucket if "other-runs" in key]) == 2


def test_what_the_store_refuses_is_a_warning_and_training_goes_on(
    server: Buckets, bucket: dict[str, Any]
) -> None:
    ema = tracker()
    train(ema.model, ema, 1)
    server.deny = lambda request: (403, "AccessDenied") if request.method == "PUT" else None
    with pytest.warns(RuntimeWarning, match="no snapshot of step 2: .*permission denied"):
        train(ema.model, ema, 1)
    assert not bucket
    server.deny = None
    train(ema.model, ema, 2)
    assert sorted(bucket) == names(4)
    ema.close()


def test_what_is_not_written_to() -> None:
    with pytest.raises(UsageError, match=r"https:// can be read, but not written"):
        PostHocEMA(small(), folder="https://host/run")
    with pytest.raises(ValueError, match="store='delta' writes to a disk"):
        tracker(store="delta")
