"""What lies beside the snapshots of a plan, for outputs that are folders."""

from __future__ import annotations

import math
from pathlib import Path

from posthoc_cli.formats.companions import Companions, companions, in_shards
from posthoc_cli.synthesis.plan import TensorPlan
from posthoc_cli.synthesis.products import Products


def what_lies_beside(plan: TensorPlan | Products, top: Path) -> Companions:
    """What an output needs beside its tensors, from the newest source in the folder `top`.

    Raises SnapshotError for a link that leads nowhere, MachineError for what can't be read.
    """
    plan = plan.plan if isinstance(plan, Products) else plan
    networks = [[file.path for file in source.files] for source in plan.sources]
    return companions(networks.pop(plan.newest), top, networks)


def own_shard_size(plan: TensorPlan | Products) -> int | None:
    """Bytes of an output's shards, to be like those of the newest source; None if it has none."""
    plan = plan.plan if isinstance(plan, Products) else plan
    files = plan.sources[plan.newest].files
    if not in_shards([file.path for file in files]):
        return None
    sizes = [file.size for file in files]
    return math.ceil(max(sizes) * plan.bytes_to_write / sum(sizes))
