"""Which files may be checkpoints of torch, by their names: networks, shards, states of training."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from posthoc_cli.errors import IncompleteError
from posthoc_cli.storage import ENDING, shards
from posthoc_cli.storage.stores import list_folder

ENDINGS = (".pt", ".pth", ".pkl", ".ckpt", ".bin")
"""Of files that may be checkpoints, in capitals too; `.tar` may follow."""

INDEX = ".index.json"

KNOWN = (
    *("pytorch_model", "diffusion_pytorch_model", "model", "adapter_model"),
    *("pytorch_lora_weights", "mp_rank_00_model_states"),
)
"""What libraries call the network in a folder of its own, without ending."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
_ZERO_3 = re.compile(r".*zero_pp_rank_[0-9]+_mp_rank_[0-9]+_model_states\.pt")
_COUNTED = r"(?:[-_.]?[0-9]+)*"
_OF_TRAINING = [
    (re.compile(rf"(?i:{regex})"), reason)
    for regex, reason in (
        (r"training[-_]state.*", "a state of training, to go on from"),
        (r"trainer[-_]state.*", "a state of the trainer"),
        (r"training[-_]args.*", "the arguments of training"),
        (rf"(?:.*[-_.])?(?:optimizer|optim)(?:[-_.]states?)?{_COUNTED}", "an optimizer's state"),
        (r".*_optim_states|opt[0-9]+", "an optimizer's state"),
        (rf"(?:lr[-_]?)?scheduler(?:[-_.]states?)?{_COUNTED}", "a scheduler's state"),
        (rf"(?:grad[-_]?)?scaler(?:[-_.]states?)?{_COUNTED}", "a gradient scaler's state"),
        (rf"(?:rng|random)[-_.]?states?{_COUNTED}", "random states"),
        (rf"(?:sampler|dl_state_dict|dataloader)(?:[-_.]states?)?{_COUNTED}", "a sampler's state"),
    )
]
"""Names, without ending, of what training saves beside the network."""


def without_ending(name: str) -> str | None:
    """A checkpoint's name without its ending; None for what doesn't end as one does."""
    name = name.removesuffix(INDEX)
    bare = name[:-4] if name.lower().endswith(".tar") else name
    stem, ending = os.path.splitext(bare)
    if ending.lower() in ENDINGS and stem:
        return stem
    return bare if bare != name else None  # `name.tar`, as torch's tutorials have it


def as_snapshot(name: str) -> str:
    """The name by which a checkpoint's step and profile are read: that of its snapshot."""
    folder, slash, last = name.rpartition("/")
    stem = without_ending(last)
    return name if stem is None else f"{folder}{slash}{stem}{ENDING}"


def of_training(name: str) -> str | None:
    """What a file is by its name that training saves beside the network; None for a network."""
    stem = without_ending(name) or ""
    return next((reason for regex, reason in _OF_TRAINING if regex.fullmatch(stem)), None)


def may_be_other(name: str) -> bool:
    """Whether a file's name is as usual for quite other things: `vocab.bin`, `images.tar`."""
    name = name.lower()
    bare = os.path.splitext(name)[0]
    other = name.endswith(".bin") or (name.endswith(".tar") and not bare.endswith(ENDINGS))
    return other and bare not in KNOWN


def list_checkpoints(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that may be checkpoints; shards are one, by their index's name.

    The index need not be there.
    """
    found = dict[str, None]()
    names = list(names)
    ranks = [name for name in names if _ZERO_3.fullmatch(name)]
    for name in names:
        # Of a network in ranks' files none has values.
        if without_ending(name) and not name.endswith(INDEX) and name not in ranks[1:]:
            found[index_of_shard(name) or name] = None
    return list(found)


def preferred(names: Sequence[str]) -> list[str]:
    """Those of several networks in one folder, of any format, that libraries call so; else all."""
    known = [name for name in names if without_ending(name) in KNOWN or shards.is_known(name)]
    return known or list(names)


def index_of_shard(name: str) -> str | None:
    """`a-00001-of-00003.bin` -> `a.bin.index.json`; None for no shard of a checkpoint."""
    stem = without_ending(name)
    match = _SHARD.fullmatch(stem) if stem else None
    return f"{match['stem']}{name[len(stem or '') :]}{INDEX}" if match else None


def shards_of(index: Path) -> list[Path]:
    """The shards that belong to an index, which need not be there itself.

    Raises IncompleteError where one is missing.
    """
    found: dict[int, str] = {}
    count = 0
    for name in list_folder(index.parent):
        if index_of_shard(name) == index.name:
            match = _SHARD.fullmatch(without_ending(name) or "")
            assert match
            found[int(match["number"])] = name
            count = int(match["count"])
    for number in range(1, count + 1):
        if number not in found:
            first = found[min(found)]
            lacking = re.sub("[0-9]{5}-of", f"{number:05}-of", first)
            raise IncompleteError(
                str(index.with_name(lacking)),
                f"missing: {len(found)} of {count} shards are there",
                "wait until it is written, copy it again, or leave it out with exclude=",
            )
    return [index.with_name(found[number]) for number in sorted(found)]
