"""What a checkpoint is: the tool that wrote it, its network's tensors, and what it says of itself.

ema-pytorch    <index>.<step>.pt       of ema-pytorch's PostHocEMA
posthoc-ema    <index>.<step>.pt       of pytorch-posthoc-ema's
edm2           <prefix>-<kimg>-<sigma_rel>.pkl
torch          any state dict that torch.save wrote
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from posthoc_cli.errors import PosthocError
from posthoc_cli.formats.averages import (
    COUNTERS,
    ONLINE,
    PREFIX,
    SHADOW,
    check_layout,
    check_values,
    shadow_tensors,
    without_prefix,
)
from posthoc_cli.formats.checkpoint import Checkpoint, candidates, state_dict
from posthoc_cli.formats.edm2 import is_edm2, network_state
from posthoc_cli.formats.laying import read_elements
from posthoc_cli.formats.pickles import naming, refused
from posthoc_cli.formats.tensors import StoredTensor
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, decode
from posthoc_cli.storage.metadata import DECAY, EPOCH, GAMMA, SCHEDULE, SIGMA_REL, UPDATES

KINDS = ("ema-pytorch", "posthoc-ema", "edm2", "torch")

DEFAULT_UPDATE_EVERY = {"ema-pytorch": 100, "posthoc-ema": 10}
"""Of the tools that update their averages at every N-th step, but by the decay of one: their N."""


def kind_of(checkpoint: Checkpoint) -> str:
    """One of KINDS, by the checkpoint's contents."""
    if is_edm2(checkpoint):
        return "edm2"
    root = checkpoint.root
    if isinstance(root, dict) and all(isinstance(root.get(n), StoredTensor) for n in COUNTERS):
        prefixed = Counter(name.startswith(PREFIX) for name in _averages(root))
        if len(prefixed) == 1:  # with both, it is the network beside an ordinary EMA of it
            return "ema-pytorch" if prefixed[True] and "sigma_rel" not in root else "posthoc-ema"
    return "torch"


def network_tensors(
    checkpoint: Checkpoint, kind: str, key: str | None = None, *, sure: bool = True
) -> dict[str, StoredTensor]:
    """The network's tensors in a checkpoint of `kind`, by the network's own names.

    `key` is as `state_dict` has it; of EDM2 there is nothing to choose from. Unless the kind is
    `sure`, a plain state dict that looks like an EMA library's is refused. Raises SnapshotError
    when there are no tensors, and when safetensors can't have the name of one.
    """
    with naming(checkpoint.path):
        if kind == "edm2":
            tensors = network_state(checkpoint)
        elif kind == "torch":
            shadow = shadow_tensors(checkpoint, key)
            tensors = state_dict(checkpoint, key) if shadow is None else shadow
            if not sure:
                check_layout(tensors)
        else:
            tensors = _of_library(checkpoint, kind, key)
        if not tensors:
            raise refused(f"is not a checkpoint of {kind}", "leave out tool=")
        check_values(checkpoint, tensors)
        for name in tensors:
            if name == "__metadata__" or not _is_text(name):
                raise refused(
                    f"a tensor's name, '{name}', is none that safetensors can have",
                    "save it under another name",
                )
    return tensors


def _of_library(checkpoint: Checkpoint, kind: str, key: str | None) -> dict[str, StoredTensor]:
    """The average in an EMA library's checkpoint, or in the only entry of it that holds one."""
    holder: Any = checkpoint.root
    if key is not None:
        holder = state_dict(checkpoint, key)
    elif not without_prefix(_averages(holder)):
        inside = [one for one in candidates(checkpoint).values() if without_prefix(one)]
        holder = inside[0] if len(inside) == 1 else holder
    tensors = _averages(holder)
    inner = without_prefix(tensors)
    bare = [name for name in tensors if not name.startswith((PREFIX, ONLINE))]
    return inner if kind == "ema-pytorch" or not bare else tensors


def _averages(root: Any) -> dict[str, StoredTensor]:
    """The tensors of a post-hoc EMA's checkpoint that are not its counters."""
    return {
        name: tensor
        for name, tensor in (root.items() if isinstance(root, dict) else ())
        if isinstance(name, str) and isinstance(tensor, StoredTensor) and name not in COUNTERS
    }


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def stated_profile(checkpoint: Checkpoint) -> dict[str, str]:
    """Step and profile where its root says them, as a snapshot's metadata would.

    A `decay` is one where it is that of a list of averages: diffusers' EMAModel keeps its schedule
    beside it, torch_ema the number of updates, with which it rises as diffusers' does by default.
    """
    root = checkpoint.root if isinstance(checkpoint.root, dict) else {}
    stated = {}
    for key in ("optimization_step", "global_step", "step"):
        value = _number(checkpoint, root.get(key))
        if value is not None and value >= 1 and value == math.floor(value):
            stated["step"] = str(int(value))
    epoch = _number(checkpoint, root.get("epoch"))
    if epoch is not None and 0 <= epoch == math.floor(epoch):
        stated[EPOCH] = str(int(epoch))
    for key in (GAMMA, SIGMA_REL, *(DECAY,) * (SHADOW in root)):
        value = _number(checkpoint, root.get(key))
        if value is not None:
            stated[key] = repr(float(value))
    if DECAY in stated:
        updates = _number(checkpoint, root.get(UPDATES, root.get("num_updates")))
        if updates is not None:
            stated[UPDATES] = repr(updates)
        schedule = {key: root[key] for key in SCHEDULE if isinstance(root.get(key), int | float)}
        stated |= {key: repr(value) for key, value in schedule.items()}
    return stated


def counter_of(checkpoint: Checkpoint) -> str:
    """pytorch-posthoc-ema's own counter of steps, and by how much of itself it may be rounded."""
    counter = checkpoint.root.get("step") if isinstance(checkpoint.root, dict) else None
    value = _number(checkpoint, counter)
    rounding = {"F16": 2.0**-11, "BF16": 2.0**-8}.get(getattr(counter, "dtype", ""), 0.0)
    return f"{0 if value is None else value} {rounding}"


def averaged_steps(counted: str, named: int) -> int:
    """The steps that pytorch-posthoc-ema has averaged over, where its file is named after `named`.

    Its averages start late, by default at step 100, and their decay goes by a counter that starts
    with them: see `counter_of`. Where that is rounded, what `named` would be rounded to is it.
    """
    value, rounding = map(float, counted.split())
    if not 1 <= value < named:
        return named
    return named if named - value <= named * rounding else int(value)


def effective_gamma(gamma: float, update_every: int) -> float:
    """The exponent of averages that were updated every so many steps by the decay of one.

    That leaves `prod (1 - 1 / t)^(1 + gamma)` over every N-th t: of an exponent with `1 + gamma`
    divided by N.
    """
    return (1 + gamma) / update_every - 1


def _number(checkpoint: Checkpoint, value: Any) -> int | float | None:
    """A finite number, or one in a tensor of one element; None for anything else."""
    if (
        isinstance(value, StoredTensor)
        and value.shape in ((), (1,))
        and value.dtype in FLOATS | {"I64", "I32"}
    ):
        try:
            data = np.frombuffer(read_elements(checkpoint, value, 1), np.uint8)
        except PosthocError:
            return None
        known = value.dtype in FLOATS
        stored = decode(value.dtype, data) if known else data.view(DTYPES[value.dtype].numpy())
        (value,) = stored.tolist()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
