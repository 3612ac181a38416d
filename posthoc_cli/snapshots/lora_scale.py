"""What a LoRA's products are scaled by: `alpha / rank`, wherever each tool keeps its alpha.

kohya's trainers keep it in a tensor beside the factors; peft in the `adapter_config.json` beside
the file; diffusers in the file's metadata. Files of diffusers that say nothing have alpha = rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import SnapshotError, printable
from posthoc_cli.snapshots.lora import Pair
from posthoc_cli.storage import Reader, TensorIndex
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, decode
from posthoc_cli.storage.stores import is_file, open_file

CONFIG = "adapter_config.json"
"""peft's, beside the weights."""

METADATA = "lora_adapter_metadata"
"""diffusers' key in a file's metadata: peft's configurations as JSON, by part of the pipeline."""

PEFT = "base_model.model."
"""What the names begin with in the files that peft saves."""

_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """How the rank of a module makes its scale: `alpha / rank`, or by its root; 1 without alpha."""

    alpha: float | None = None
    by_root: bool = False

    def at(self, rank: int) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


def scales(index: TensorIndex, pairs: Sequence[Pair]) -> list[Scale]:
    """The scale of each of the `pairs` in one snapshot.

    In a file of peft without its configuration alpha is not known: there it is taken for 1, which
    is right up to a factor that all snapshots share.

    Raises SnapshotError for a configuration that makes no sense or an alpha that is 0 or not
    finite, and what Reader does.
    """
    configs = _configs(index)
    found = []
    with Reader(index) as reader:
        for pair in pairs:
            if pair.alpha is not None:
                info = index.tensors[pair.alpha]
                data = np.empty(info.end - info.start, np.uint8)
                if info.elements != 1 or (info.dtype not in FLOATS and info.dtype[0] not in "IU"):
                    raise _wrong(index.path, pair.alpha, "is no number")
                reader.read(info.start, data.data)
                stored = info.dtype in FLOATS
                values = (
                    decode(info.dtype, data) if stored else data.view(DTYPES[info.dtype].numpy())
                )
                scale = Scale(float(values[0]))
            else:
                scale = _configured(index, pair, configs)
            if scale.alpha is not None and not (math.isfinite(scale.alpha) and scale.alpha):
                raise _wrong(index.path, pair.alpha or pair.up, f"has the alpha {scale.alpha:g}")
            found.append(scale)
    return found


def changes(rank: int) -> dict[str, Any]:
    """What in peft's configuration must be otherwise beside factors that all have one `rank`.

    Alphas stay as they are: the factors are written so that their product is right with them.
    """
    return {"r": rank, "rank_pattern": {}}


def adapter_config(path: Path, rank: int) -> bytes:
    """peft's configuration at `path` as it must be beside factors that all have one `rank`.

    Raises SnapshotError where it makes no sense, MachineError where it can't be read.
    """
    with open_file(path) as (file, _):
        config = _parsed(file.read(_MAX_BYTES), str(path))
    return json.dumps({**config, **changes(rank)}, indent=2).encode() + b"\n"


def lora_metadata(
    metadata: Mapping[str, str], rank: int | None, ranks: Sequence[int]
) -> dict[str, str]:
    """A file's `metadata` as it must be with factors of these `ranks`; `rank` if all share one."""
    changed = dict(metadata)
    if rank is not None and METADATA in metadata:
        config = _parsed(metadata[METADATA], METADATA)
        for key in config:
            config[key] = changes(rank).get(key.rpartition(".")[2], config[key])
        changed[METADATA] = json.dumps(config, indent=2, sort_keys=True)
    if "ss_network_dim" in metadata:
        changed["ss_network_dim"] = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
    return changed


def _configs(index: TensorIndex) -> dict[str, Mapping[str, Any]]:
    """Configurations by what the names of their modules begin with."""
    path = index.files[0].path.parent / CONFIG
    if is_file(path):
        with open_file(path) as (file, _):
            config = _parsed(file.read(_MAX_BYTES), str(path))
        if config.get("target_parameters"):
            raise SnapshotError(
                str(path), "its target_parameters are of several experts", "average the factors"
            )
        return {PEFT: config}
    if METADATA not in index.metadata:
        return {}
    config = _parsed(index.metadata[METADATA], f"{index.path}: {METADATA}")
    parts = [key.removesuffix("r") for key in config if key == "r" or key.endswith(".r")]
    return {
        part: {key[len(part) :]: value for key, value in config.items() if key.startswith(part)}
        for part in sorted(parts, key=len, reverse=True)
    }


def _configured(index: TensorIndex, pair: Pair, configs: Mapping[str, Mapping[str, Any]]) -> Scale:
    if pair.own_rank:
        return Scale()
    part = next((each for each in configs if pair.module.startswith(each)), None)
    if part is None:
        return Scale(1.0 if pair.module.startswith(PEFT) else None)
    config = configs[part]
    name = pair.module.removeprefix(part)
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha")
    try:
        # As peft does: the first key that the end of the module's name fits.
        fitting = (key for key in patterns if re.match(rf"(.*\.)?({key})$", name))
        alpha = float(str(patterns.get(next(fitting, None), alpha)))
    except (TypeError, ValueError, AttributeError, re.error):
        raise _wrong(index.path, pair.up, f"has no alpha in {CONFIG} or {METADATA}") from None
    return Scale(alpha, bool(config.get("use_rslora")))


def _parsed(text: str | bytes, subject: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise SnapshotError(subject, "is no JSON object", "put the right one in its place")
    return config


def _wrong(path: Path, name: str, problem: str) -> SnapshotError:
    return SnapshotError(
        str(path), f"tensor '{printable(name)}' {problem}", "leave it out with drop="
    )
