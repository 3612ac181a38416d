"""The sink that keeps one target's sums in memory, as torch tensors."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from posthoc_cli.errors import SnapshotError, printable
from posthoc_cli.storage import make_header
from posthoc_cli.storage.dtypes import DTYPES
from posthoc_cli.synthesis.engine import Part, Results
from posthoc_cli.synthesis.plan import Chunk, TensorPlan

if TYPE_CHECKING:
    import torch


class MemorySink:
    """Gathers the first target's output in host memory; `tensors` has it by name.

    Raises SnapshotError for a tensor whose dtype torch doesn't have.
    """

    def __init__(self, plan: TensorPlan) -> None:
        import torch  # only here: writing files needs none

        self.tensors: dict[str, torch.Tensor] = {}
        self._starts: list[int] = []
        self._memory: list[memoryview] = []
        places = make_header(plan.tensors, {})[1]
        for name in plan.tensors:
            code, shape = plan.tensors[name]
            if DTYPES[code].name is None:
                raise SnapshotError(
                    f"tensor {printable(name)}",
                    f"torch has no dtype {code}",
                    "leave it out with drop=",
                )
            self.tensors[name] = torch.empty(shape, dtype=DTYPES[code].torch())
        for name, info in places.items():
            if info.end > info.start:
                tensor = self.tensors[name]
                self._starts.append(info.start)
                self._memory.append(tensor.view(-1).view(torch.uint8).numpy().data)

    def take_sums(self, chunk: Chunk, results: Results, unsettled: Sequence[Part]) -> None:
        self.take_copies(chunk, results)

    def take_copies(self, chunk: Chunk, results: Results) -> None:
        start, data = chunk.out_start, results(0)
        at = bisect.bisect_right(self._starts, start) - 1
        while data:
            inside = start - self._starts[at]
            count = min(len(data), len(self._memory[at]) - inside)
            self._memory[at][inside : inside + count] = data[:count]
            start, data, at = start + count, data[count:], at + 1
