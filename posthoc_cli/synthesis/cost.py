"""What a synthesis moves and how long that takes, on machines that aren't here: a model.

docs/scaling.md tells where it comes from, and how near it came where it could be measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from posthoc_cli.storage.remote.fetching import (
    BUDGET,
    GENERATIONS,
    LARGEST,
    MOST_IN_FLIGHT,
    SMALLEST,
)
from posthoc_cli.synthesis.engine import BATCH, ROW_BYTES, WORKER_BYTES


@dataclass(frozen=True, slots=True)
class Cost:
    """What each of `nodes` moves: bytes, and requests of `request_bytes` bytes for those it reads,
    `in_flight` of them at once. `transfer` and `waiting` are the seconds of the two."""

    nodes: int
    bytes_read: int
    bytes_written: int
    request_bytes: int
    requests: int
    in_flight: int
    transfer: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.transfer + self.waiting


def request_size(snapshots: int, targets: int) -> int:
    """Bytes of a request, of snapshots and outputs of two bytes an element.

    What a worker reads of a snapshot at a time, or as many of these as the budget of the requests
    has room for.
    """
    sums = 8 * targets if snapshots > BATCH else 0
    element = 2 * min(snapshots, BATCH) + sums + 2 * targets
    row = min(ROW_BYTES["store"], 2 * (WORKER_BYTES["store"] // element))
    most = max(min(BUDGET // (GENERATIONS * snapshots), LARGEST), SMALLEST)
    return max(most // row, 1) * row


def cost(
    snapshots: int,
    size: int,
    targets: int,
    nodes: int,
    bandwidth: float,
    latency: float = 0.0,
    in_flight: int | None = None,
) -> Cost:
    """What it costs each of `nodes` to make `targets` averages of `snapshots` of `size` bytes.

    Each node makes its part of every output's bytes, and reads that of every snapshot once.
    What is looked at before, 0.5 MB of each snapshot, is not counted.
    `bandwidth` is that of a node's link each way, in bytes a second; `latency` that of a request,
    in seconds; `in_flight` requests are under way at once, by default as many as the reader has.
    Seconds are those of the bytes plus those of the requests,

        max(read, written) / bandwidth + requests * latency / in_flight.
    """
    read, written = (-(-count * size // nodes) for count in (snapshots, targets))
    request = min(request_size(snapshots, targets), -(-size // nodes))
    requests = snapshots * -(-size // (nodes * request))
    at_once = in_flight or max(min(MOST_IN_FLIGHT, BUDGET // request), 1)
    return Cost(
        nodes,
        read,
        written,
        request,
        requests,
        at_once,
        max(read, written) / bandwidth,
        max(requests / at_once, 1) * latency,
    )
