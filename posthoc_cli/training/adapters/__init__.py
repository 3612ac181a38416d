"""Callbacks that track EMAs in other libraries' training loops; each imports its library."""

from __future__ import annotations

from typing import Any

from posthoc_cli.training.averaging import on_first
from posthoc_cli.training.posthoc_ema import PostHocEMA


def state_of(ema: PostHocEMA) -> dict[str, Any]:
    """A tracker's state for a checkpoint that the first process writes, which gets all of it there.

    Where the network is sharded, every process must call it.
    """
    state = ema.state_dict()
    return state | {"averages": [on_first(each) for each in state["averages"]]}
