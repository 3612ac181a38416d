"""The keys of a safetensors file's `__metadata__`, where every value is a text.

Ours, and those of other tools that say something of a snapshot: kohya's trainers (`ss_*`, `sshs_*`)
and the Model Spec (`modelspec.*`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

STEP, GAMMA, SIGMA_REL, DECAY = "step", "gamma", "sigma_rel", "decay"
"""A snapshot's step and its profile, as one of the others: a power function's by its exponent or
its width, a fixed decay a step, 0 of a raw checkpoint."""

UPDATE_EVERY, ONE_STEP = "update_every", "one_step"
"""Of a power function that wasn't updated at every step, at which of them it was; and whether
by the decay of one step, as ema-pytorch's."""

SCHEDULE = ("inv_gamma", "power", "use_ema_warmup", "update_after_step", "min_decay")
"""With any of these the decay is one that rises, as diffusers' EMAModel has it."""

UPDATES = "optimization_step"
"""diffusers' own count of the updates of such an average."""

RUN = "run"
"""The training run that a snapshot is of."""

SESSION, NAME = "ss_session_id", "ss_output_name"
"""kohya's: a number drawn at each start of a training, and what its files are called after."""

STARTED, SAVED = "ss_training_started_at", "ss_training_finished_at"
"""kohya's, in seconds: when the session of a file began, and when the file was saved."""

CONVERTED = "converted"
"""What `convert` made a snapshot of, as JSON."""

TOOL, COUNTED = "posthoc_tool", "posthoc_counted"
"""What no file has: the index of another tool's checkpoint says so which tool wrote it, and what
its own counter of steps says, with the counter's relative rounding."""

PLACE, EPOCH = "posthoc_place", "posthoc_epoch"
"""The same: the key of the network in a checkpoint, and the epoch that stands beside it."""

RECIPE = "posthoc"
"""How an output was made, as JSON: the sources and their weights. No snapshot has it."""

MANIFEST = "posthoc.json"
"""The file in an output that is a folder which says what posthoc put there."""

FORMAT = "format"
"""The framework the tensors are of, "pt": some libraries load nothing without it."""

ENCODING, DELTA = "encoding", "delta-2"
"""What a snapshot has that is stored as a difference; the digit is the version of the format."""

DELTAS = frozenset({"delta-1", DELTA})
"""The versions that are read: the first had one base, whose coefficient was 1."""

BASES = "bases"
"""The files beside a delta that it is a difference to: their names, fingerprints and coefficients,
as JSON."""

BASE, BASE_FINGERPRINT = "base", "base_fingerprint"
"""The same in the first version."""

SCALE, SCALES = "scale", "scales"
"""The exponent of a delta's scale, and as JSON those of single tensors; null for what is whole."""

PACKED = "packed"
"""What `pack` made a snapshot of, as JSON."""

OF_DELTAS = frozenset({ENCODING, BASES, BASE, BASE_FINGERPRINT, SCALE, SCALES, PACKED})

SHARDING, SHARDS = "DCP_SHARDING_INFO", "shards"
"""Of a file that has parts of tensors, as HuggingFaceStorageWriter writes it: where in the whole
tensor each begins, as JSON. And how many such files there are, which torch doesn't say."""

COUNTS = {STEP: "step", "ss_steps": "step", "ss_epoch": "epoch"}
"""The keys that count training, the most reliable first, each with its unit."""

_HASHES = ("sshs_", "modelspec.hash_")
"""What the keys for hashes of a file's tensors begin with."""


def read_recipe(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The recipe in a file's metadata; None when posthoc did not write the file."""
    try:
        recipe = json.loads(metadata.get(RECIPE, "null"))
    except (ValueError, RecursionError):
        return None
    return recipe if isinstance(recipe, dict) and "sources" in recipe else None


def carried_over(metadata: Mapping[str, str]) -> dict[str, str]:
    """What an output takes over from the newest snapshot's metadata: all that still holds of it."""
    gone = {STEP, GAMMA, SIGMA_REL, DECAY, *SCHEDULE, UPDATES, CONVERTED, RECIPE, TOOL}
    gone |= {COUNTED, PLACE, EPOCH, UPDATE_EVERY, ONE_STEP, SHARDING, SHARDS, *OF_DELTAS}
    return {
        key: value
        for key, value in metadata.items()
        if key not in gone and not key.startswith(_HASHES)
    }
