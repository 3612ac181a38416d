"""Other tools' files as tables of tensors that say where in the file each lies."""

from posthoc_cli.formats.checkpoint import Checkpoint, auxiliary, state_dict
from posthoc_cli.formats.tensors import Storage, StoredTensor
from posthoc_cli.formats.tools import (
    DEFAULT_UPDATE_EVERY,
    KINDS,
    averaged_steps,
    effective_gamma,
    kind_of,
    network_tensors,
    stated_profile,
)
from posthoc_cli.formats.torchfile import read_checkpoint

__all__ = [
    "DEFAULT_UPDATE_EVERY",
    "KINDS",
    "Checkpoint",
    "Storage",
    "StoredTensor",
    "auxiliary",
    "averaged_steps",
    "effective_gamma",
    "kind_of",
    "network_tensors",
    "read_checkpoint",
    "state_dict",
    "stated_profile",
]
