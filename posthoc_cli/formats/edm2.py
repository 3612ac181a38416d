"""EDM2's network pickles: the network's tensors, by the names that its own `state_dict` gives them.

Such a pickle is a dict whose `ema` is the network. Each of its modules is kept as its source code
and the module's attributes; only the attributes are looked at, as data.
"""

from __future__ import annotations

from typing import Any

from posthoc_cli.formats.checkpoint import Checkpoint
from posthoc_cli.formats.pickles import Call, corrupt, naming, refused, shown
from posthoc_cli.formats.tensors import StoredTensor

_PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
_VERSION = 6
_MAX_WORK = 8 << 20
"""Characters in all names of a network's modules and tensors, and one for each."""


def is_edm2(checkpoint: Checkpoint) -> bool:
    """Whether this is a pickle of EDM2's training loop or of its reconstruction script."""
    root = checkpoint.root
    network = root.get("ema") if isinstance(root, dict) else None
    return (
        isinstance(network, Call)
        and (network.function.module, network.function.name) == _PERSISTENT
    )


def network_state(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors of the network in an EDM2 pickle, as `network.state_dict()` has them.

    Names and order are those of torch: of each module its parameters, its buffers, then its
    modules. Raises SnapshotError where there is no such network, or where it is broken.
    """
    with naming(checkpoint.path):
        if not is_edm2(checkpoint):
            raise refused("is not an EDM2 pickle", "read it with tool='torch'")
        return _state(checkpoint.root["ema"])


def _state(network: Any) -> dict[str, StoredTensor]:
    state: dict[str, StoredTensor] = {}
    pending = [("", network)]
    work = 0
    while pending:
        prefix, module = pending.pop()
        attributes = _attributes(module)
        tensors = _own_tensors(attributes)
        modules = _entries(attributes, "_modules")
        # A module that contains itself has no end, and shared ones may have very many names.
        work += sum(len(prefix) + len(name) + 1 for name, _ in (*tensors, *modules)) + 1
        if work > _MAX_WORK:
            raise corrupt("its network has too many modules")
        state.update((prefix + name, tensor) for name, tensor in tensors)
        pending += [(f"{prefix}{name}.", inner) for name, inner in reversed(modules)]
    if not state:
        raise refused("its network has no tensors", "leave it out")
    return state


def _attributes(module: Any) -> dict[Any, Any]:
    """The `__dict__` of a module: in the arguments of a persistent one, else its state."""
    if not isinstance(module, Call):
        raise corrupt("a module of its network isn't one")
    state = module.state
    if (module.function.module, module.function.name) == _PERSISTENT:
        meta = module.args[0] if module.args else None
        if not isinstance(meta, dict) or meta.get("type") != "class":
            raise corrupt("a module of its network isn't one")
        if meta.get("version") != _VERSION:
            raise refused(
                f"holds modules of another version than {_VERSION}",
                "save it again with the code of EDM2",
            )
        state = meta.get("state")
    if not isinstance(state, dict):
        raise corrupt("a module of its network has no attributes")
    return state


def _entries(attributes: dict[Any, Any], key: str) -> list[tuple[str, Any]]:
    """The named entries of one of a module's dicts, without those that are None."""
    entries = attributes.get(key)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise corrupt(f"a module of its network has no {key}")
    return [(name, value) for name, value in entries.items() if value is not None]


def _own_tensors(attributes: dict[Any, Any]) -> list[tuple[str, StoredTensor]]:
    """The tensors of one module that torch would save, in its order."""
    unsaved = attributes.get("_non_persistent_buffers_set", [])
    if not isinstance(unsaved, list | tuple):
        raise corrupt("a module of its network is broken")
    left_out = {name for name in unsaved if isinstance(name, str)}
    buffers = _entries(attributes, "_buffers")
    kept = [(name, tensor) for name, tensor in buffers if name not in left_out]
    tensors = _entries(attributes, "_parameters") + kept
    for name, tensor in tensors:
        if not isinstance(tensor, StoredTensor):
            raise corrupt(f"{shown(name)} isn't a tensor")
    return tensors
