"""A snapshot: one average of the network at one step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posthoc_cli.errors import SnapshotError
from posthoc_cli.snapshots.kinds import OfAverage
from posthoc_cli.solver import Average
from posthoc_cli.storage import TensorIndex, TensorInfo


@dataclass(frozen=True, slots=True)
class Contents:
    """What the tensors of a file add up to: `dtypes` counts tensors, `parameters` all elements."""

    dtypes: Mapping[str, int]
    parameters: int

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo]) -> Contents:
        return cls.of_layout({name: (info.dtype, info.shape) for name, info in tensors.items()})

    @classmethod
    def of_layout(cls, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Contents:
        dtypes = Counter(dtype for dtype, _ in tensors.values())
        elements = sum(math.prod(shape) for _, shape in tensors.values())
        return cls(dict(sorted(dtypes.items())), elements)


@dataclass(frozen=True, slots=True)
class Snapshot(OfAverage):
    """One average of the network at one step: its `profile` says which.

    `source` says where step and profile are from: "pattern", "metadata", "config" or "name".
    `contents` is shared between snapshots of the same tensors.
    """

    index: TensorIndex
    profile: Average
    source: str
    contents: Contents | None = field(default=None, repr=False, compare=False)
    below: str = ""

    @property
    def file(self) -> str:
        """Its path below the folder, with `/`, as it is: pass it through `printable` to show it."""
        return self.below or self.index.path.name

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype."""
        return dict((self.contents or Contents.of(self.index.tensors)).dtypes)

    @property
    def tensors(self) -> int:
        """How many tensors the file holds."""
        return len(self.index.tensors)

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors, whatever their dtype."""
        return (self.contents or Contents.of(self.index.tensors)).parameters

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return self.index.size

    @property
    def chain(self) -> tuple[str, ...]:
        """Of one stored as a difference the names of the files that it is a sum of; its own is the
        last."""
        return tuple(link.index.files[0].path.name for link in self.index.links)


def check_norms(snapshots: Sequence[Snapshot], method: str) -> None:
    """Raise SnapshotError for a snapshot whose profile has no norm, which `method` goes by."""
    for snapshot in snapshots:
        if snapshot.gamma <= -0.5:
            raise SnapshotError(
                str(snapshot.index.path),
                f"'{method}' has no weights for its gamma, {snapshot.gamma:g}",
                "use method='blup', or leave it out with only=",
            )
