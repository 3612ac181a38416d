"""What `posthoc plan` says of a synthesis on other machines: bytes, requests and seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from posthoc_cli.cli.console import counted, plain_table, print_table
from posthoc_cli.cli.options import in_panel
from posthoc_cli.errors import UsageError, in_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from posthoc_cli.synthesis.cost import Cost

_PANEL = "What synthesize will take"
_LATENCY = "50ms"
_MOST_NODES = _MOST_IN_FLIGHT = 1_000_000


@dataclass(frozen=True, slots=True)
class Machines:
    """Where averages will be made: the options that say so, under a heading of their own."""

    bandwidth: Annotated[
        str | None,
        in_panel(
            _PANEL,
            "RATE",
            "Of a node's link to the snapshots: 3GB/s, or 25Gb/s in bits. Says what each node "
            "moves, and for how long; needs --bytes-per-snapshot.",
            show_default=False,
        ),
    ] = None
    nodes: Annotated[
        int | None,
        in_panel(_PANEL, "N", "Nodes that share the work.  [default: 1]", show_default=False),
    ] = None
    latency: Annotated[
        str | None,
        in_panel(
            _PANEL,
            "TIME",
            "From a request to its answer: about 50ms of a bucket, 1ms of a parallel file system."
            f"  [default: {_LATENCY}]",
            show_default=False,
        ),
    ] = None
    in_flight: Annotated[
        int | None,
        in_panel(
            _PANEL,
            "N",
            "Requests that a node has under way at once; by default as many as posthoc has of a "
            "bucket.",
            show_default=False,
        ),
    ] = None

    def costs(self, snapshots: int, size: int | None, targets: int) -> list[Cost]:
        """What one node takes, and each of several; nothing without a bandwidth. Raises UsageError
        for values that can't be, and for options that say nothing without another."""
        given = {"--nodes": self.nodes, "--latency": self.latency, "--in-flight": self.in_flight}
        if self.bandwidth is None:
            for option, value in given.items():
                if value is not None:
                    raise UsageError(option, "says nothing alone", "give --bandwidth too")
            return []
        rate = read_bandwidth("--bandwidth", self.bandwidth)
        if size is None:
            raise UsageError("--bandwidth", "needs a size", "give --bytes-per-snapshot too")
        latency = read_time("--latency", _LATENCY if self.latency is None else self.latency)
        for option, number, most in (
            ("--nodes", self.nodes, _MOST_NODES),
            ("--in-flight", self.in_flight, _MOST_IN_FLIGHT),
        ):
            if number is not None and not 1 <= number <= most:
                raise UsageError(option, f"{number} is not from 1 to {most:,}", "give another")
        from posthoc_cli.synthesis.cost import cost

        return [
            cost(snapshots, size, targets, nodes, rate, latency, self.in_flight)
            for nodes in sorted({1, self.nodes or 1})
        ]


_SCALES = {"": 1.0, **{letter: 1000.0 ** (at + 1) for at, letter in enumerate("kMGT")}}
_SCALES |= {f"{letter}i": 1024.0 ** (at + 1) for at, letter in enumerate("KMGT")}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def read_bandwidth(option: str, text: str) -> float:
    """Bytes a second: `3GB/s`, `800 MB/s`, `1GiB/s`; of bits `25Gb/s`. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([kMGT]|[KMGT]i)?(B|b|bit)/s", text)
    if match is None or not float(match[1]):
        raise UsageError(option, f"'{text}' is no bandwidth", "give, say, 3GB/s, or 25Gb/s in bits")
    return float(match[1]) * _SCALES[match[2] or ""] / (1 if match[3] == "B" else 8)


def read_time(option: str, text: str) -> float:
    """Seconds: `50ms`, `0.2s`, `300us`, `0`. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,9})?) ?(us|ms|s)?", text)
    if match is None or (match[2] is None and float(match[1])):
        raise UsageError(option, f"'{text}' is no time", "give, say, 50ms or 0.2s")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def describe_costs(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """What --json prints; docs/json.md has its schema."""
    return [
        {
            "nodes": one.nodes,
            "bytes_read": one.bytes_read,
            "bytes_written": one.bytes_written,
            "request_bytes": one.request_bytes,
            "requests": one.requests,
            "in_flight": one.in_flight,
            "transfer_seconds": one.transfer,
            "waiting_seconds": one.waiting,
            "seconds": one.seconds,
        }
        for one in costs
    ]


def draw_costs(console: Console, costs: Sequence[Cost], targets: int) -> None:
    """A line for one node and one for several: what each moves, and how long that takes."""
    headings = ("nodes", "each reads", "writes", "requests", "bytes", "waiting", "in all")
    table = plain_table(right=headings)
    for one in costs:
        times = (duration(each) for each in (one.transfer, one.waiting, one.seconds))
        moved = in_bytes(one.bytes_read), in_bytes(one.bytes_written), f"{one.requests:,}"
        table.add_row(str(one.nodes), *moved, *times)
    size, at_once = in_bytes(costs[-1].request_bytes), costs[-1].in_flight
    console.print(f"\nto synthesize {counted(targets, 'target')}, by a model", style="bold")
    print_table(console, table)
    console.print(f"requests of {size}, {at_once} at once; see docs/scaling.md", style="dim")


def duration(seconds: float) -> str:
    """`0.42 s`, `12 min`, `5.1 h` or `3.2 days`."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
