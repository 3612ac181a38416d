"""What lies beside the snapshots of a plan, for outputs that are folders."""

from __future__ import annotations

import math
from pathlib import Path

from posthoc_cli.errors import UsageError
from posthoc_cli.formats.companions import Companions, companions, in_shards
from posthoc_cli.synthesis.plan import TensorPlan
from posthoc_cli.synthesis.products import Products

_LORA = ("adapter_model", "pytorch_lora_weights")


def what_lies_beside(plan: TensorPlan | Products, top: Path) -> Companions:
    """What an output needs beside its tensors, from the newest source in the folder `top`.

    Raises SnapshotError for a link that leads nowhere, MachineError for what can't be read.
    """
    plan = plan.plan if isinstance(plan, Products) else plan
    networks = [[file.path for file in source.files] for source in plan.sources]
    return companions(networks.pop(plan.newest), top, networks)


def shard_size(plan: TensorPlan | Products, beside: Companions, asked: int | None) -> int | None:
    """Bytes of a folder's shards: as `asked`, else to be like those of the newest source, if any.

    Raises UsageError where a LoRA would be in shards: no library loads those.
    """
    plan = plan.plan if isinstance(plan, Products) else plan
    name = Path(beside.weights).name
    if asked is not None and name.startswith(_LORA) and plan.bytes_to_write > asked:
        problem = f"'{name}' would be in shards, and libraries load a LoRA from one file"
        raise UsageError("max_shard_size=", problem, "leave it out")
    files = plan.sources[plan.newest].files
    if asked is not None or not in_shards([file.path for file in files]):
        return asked
    sizes = [file.size for file in files]
    return math.ceil(max(sizes) * plan.bytes_to_write / sum(sizes))
