"""Networks that lie in one file a rank, cut in a way that only the tool that wrote them knows."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats.pickles import refused
from posthoc_cli.storage.stores import is_folder, list_folder

_TOOLS = (
    (
        re.compile(r"zero_pp_rank_[0-9]+_mp_rank_[0-9]+_model_states\.pt"),
        "a checkpoint of DeepSpeed's ZeRO-3, in {} parts",
        "make one file of them with DeepSpeed's zero_to_fp32.py, which it puts beside them",
    ),
    (
        re.compile(r"mp_rank_[0-9]+_model_states\.pt"),
        "a checkpoint of DeepSpeed's model parallelism, in {} parts",
        "make one checkpoint of them with DeepSpeed's ds_to_universal.py, and then one file",
    ),
    (
        re.compile(r"mp_rank_[0-9]+(?:_[0-9]+)*"),
        "a checkpoint of Megatron-LM in its legacy format, in {} parts",
        "make one of them with Megatron-LM's tools/checkpoint/convert.py",
    ),
    (
        re.compile(r"consolidated\.[0-9]{2}\.(?:pth|safetensors)"),
        "a checkpoint of Llama's model parallelism, in {} parts",
        "make one of them with transformers' convert_llama_weights_to_hf.py",
    ),
    (
        re.compile(r"(?i)(?:.*[-_.])?world_size_[0-9]+_rank_[0-9]+\.(?:bin|ckpt|pth?)"),
        "a checkpoint of FSDP, in {} parts",
        "make one of them with the tool that saved them, or save a full state dict",
    ),
)


def in_ranks(names: Collection[str]) -> SnapshotError | None:
    """The error for a folder with these names that holds a network in parts; None for another."""
    for regex, what, remedy in _TOOLS:
        parts = sum(regex.fullmatch(name) is not None for name in names)
        if parts > 1:
            return refused(
                f"is {what.format(parts)}, which only its own tool puts together", remedy
            )
    return None


def is_in_ranks(folder: Path) -> bool:
    """Whether a network lies in `folder` in one part a rank."""
    return is_folder(folder) and in_ranks(list_folder(folder)) is not None


def refuse(folder: Path) -> NoReturn:
    """Raise SnapshotError, which says with which tool to make one file of the parts."""
    error = in_ranks(list_folder(folder)) or refused("is no longer what it was", "try again")
    raise SnapshotError(str(folder), error.problem, error.remedy)
