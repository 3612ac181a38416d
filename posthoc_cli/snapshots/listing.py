"""What lies in a folder that may be a snapshot: networks, and what only looks like one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posthoc_cli.errors import MachineError, SnapshotError, UsageError, quoted
from posthoc_cli.formats import (
    METADATA,
    as_snapshot,
    find_checkpoint,
    holds_distributed,
    in_ranks,
    is_beside,
    is_distributed,
    list_checkpoints,
    of_training,
)
from posthoc_cli.snapshots.counts import read_counts
from posthoc_cli.snapshots.names import Pattern, read_name
from posthoc_cli.storage import ENDING, made_by_posthoc
from posthoc_cli.storage.places import common_folder, normal, place
from posthoc_cli.storage.shards import (
    find_network,
    is_index,
    is_output,
    is_training_state,
    list_networks,
)
from posthoc_cli.storage.stores import exists, forget, is_file, is_folder, list_folder

MADE_BY_POSTHOC = "made by posthoc: it carries a recipe"

_BELOW = 2
"""Folders below a step folder in which its networks may lie: `checkpoint-500/ema/unet`."""

_COMPONENT = re.compile(
    r"(?i)(?:unet|vae|transformer|text_encoder|image_encoder|controlnet|prior|tokenizer|ema|model"
    r"|(?:text_encoder|tokenizer)_[2-4]|transformer_2|pytorch_model_fsdp_[0-9]+)(?:_ema)?"
)
"""Parts of a network, as diffusers and accelerate name their folders: text_encoder_2 is of no step
2."""

Seen = Callable[[Path, list[str]], list[str]]
"""What of the names in a folder counts."""

_TAG = re.compile(r"global_step[0-9]+")
"""What DeepSpeed calls its folder in a trainer's step folder, beside the network itself."""

_CHECKPOINT = re.compile(r"(?i).*(?:step|iter|epoch|ckpt|checkpoint)[a-z]*[-_= ]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Network:
    """A network in the folder: `path` is where its file or index lies below it.

    `name` is what it is known by: a folder's path stands for the one network in it.
    """

    path: str
    name: str

    @property
    def place(self) -> str:
        """The file, or the folder of what is in several without an index, as it is opened."""
        return self.name if self.path.endswith((f"/{METADATA}", "/ranks")) else self.path

    @property
    def home(self) -> str:
        """The step folder it lies in, or the first folder; "" for a file in the folder itself."""
        *folders, _ = self.path.split("/")
        # The last: in run1/step_100/unet, the first numbers a run.
        for at in reversed(range(len(folders))):
            tagged = at and _TAG.fullmatch(folders[at]) and counts(folders[at - 1])
            if counts(folders[at]) and not tagged:
                return "/".join(folders[: at + 1])
        return folders[0] if folders else ""

    @property
    def inside(self) -> str:
        """Where in the step folder it lies: `unet_ema`, or a file's name; DeepSpeed's as a glob."""
        below = self.path[len(self.home) + 1 :] if self.home else self.path
        return _TAG.sub("global_step*", os.path.dirname(below) or below)


@dataclass(slots=True)
class Listing:
    """What may be a snapshot, what is one only where it is asked for, and what is left out."""

    networks: list[Network] = field(default_factory=list)
    others: list[Network] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def folder_of(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[Path, list[str] | None]:
    """The folder that `paths`, as a shell's glob gives them, lie in, and where below it each is.

    The second is None for a folder alone. Raises UsageError for a path that isn't there.
    """
    forget()
    if isinstance(paths, (str, os.PathLike)):
        if not is_distributed(place(paths)):
            return place(paths), None
        paths = [paths]
    given = [normal(place(path)) for path in paths]
    if not given:
        raise UsageError("FOLDER", "lists nothing", "give a folder, or the files in it")
    if len(given) == 1 and is_distributed(given[0]):
        one = given[0].absolute()
        return one.parent, [one.name]
    if len(given) == 1 and not is_file(given[0]):
        return place(paths[0]), None
    for path in given:
        if not exists(path):
            raise UsageError(str(path), "there is no such file or folder", "check the path")
    if any(path.is_absolute() or path.parts[:1] == ("..",) for path in given):
        given = [normal(path.absolute()) for path in given]
    try:
        folder = common_folder([path.parent for path in given])
        return folder, [path.relative_to(folder).as_posix() for path in given]
    except ValueError:
        problem = "is on another drive or store"
        raise UsageError(str(given[0]), problem, "give files of one folder") from None


def every_name(folder: Path, names: list[str]) -> list[str]:
    return names


def list_candidates(
    folder: Path,
    pattern: Pattern | None,
    given: Collection[str] | None,
    deep: bool,
    seen: Seen = every_name,
) -> Listing:
    """What lies in `folder`, and in the step folders in it.

    `given` are the paths below it that alone are looked at; `deep`: other folders are looked into
    as step folders are; what is not `seen` is taken not to be there. Raises what list_folder does,
    and SnapshotError where nothing is found.
    """
    there = [name for name in list_folder(folder) if not name.startswith(".")]
    if given is not None:
        first = {path.split("/")[0] for path in given}
        there = [name for name in there if name in first or is_index(name)]
    there = seen(folder, there)
    folders = {name for name in there if is_folder(folder / name)}
    files = [name for name in there if name not in folders]
    listing = Listing()
    found, missing = list_networks(folder, files)
    checkpoints = list_checkpoints(files)
    stems = {as_snapshot(name) for name in found}
    ours = {index for index in missing if _left_by_posthoc(folder, index, files)}
    listing.left_out += [(index, "shards that posthoc wrote, without an index") for index in ours]
    single = {name: Network(name, name) for name in [*found, *missing] if name not in ours}
    empty = []
    for name in sorted({*there, *missing}):
        if name in single:
            listing.networks.append(single[name])
        elif name in folders and is_output(folder / name):
            listing.left_out.append((name, MADE_BY_POSTHOC))
        elif name in folders:
            state_of = name[: -len("-state")] + ENDING
            if name.endswith("-state") and state_of in (
                beside := {as_snapshot(f): f for f in files}
            ):
                text = f"the training state beside '{beside[state_of]}'"
                listing.left_out.append((name, text))
            elif given is None and name[-1].isdigit() and _COMPONENT.fullmatch(name):
                listing.left_out.append((name, "a part of a pipeline, by its name"))
            elif not _list_below(folder, name, listing, pattern, deep or given is not None, seen):
                empty.append(name)
        elif is_training_state(name) and name.lower().endswith(ENDING):
            listing.left_out.append((name, "an optimizer's, scheduler's or generator's state"))
    stepped = any(counts(network.home) for network in listing.networks if network.home)
    for name in checkpoints:
        if as_snapshot(name) in stems:
            listing.left_out.append((name, f"there is a {ENDING} file of its step"))
        elif reason := of_training(name):
            if not (found or stepped):
                listing.left_out.append((name, reason))
            listing.others.append(Network(name, name))
        elif counts(name) or not found:
            listing.networks.append(Network(name, name))
        else:
            listing.others.append(Network(name, name))
    shapes = {_shape(network.home) for network in listing.networks if network.home}
    listing.left_out += [
        (name, "a folder without a network") for name in empty if _shape(name) in shapes
    ]
    if listing.networks and given is None:
        further = {name: runs_below(folder, name, 1, seen) for name in empty}
        listing.left_out += [
            (name, "a folder with snapshots of its own" + (f", in '{runs[0]}'") * (runs[0] != name))
            for name, runs in further.items()
            if runs
        ]
    if not listing.networks and not listing.left_out:
        if given is not None:
            problem = f"no {ENDING} file, nor a folder that holds any"
            raise SnapshotError(str(folder / min(given)), problem, "give the snapshots' files")
        runs = [
            run for name in sorted(folders) for run in runs_below(folder, name, _BELOW + 1, seen)
        ]
        if runs and given is None:
            one = (
                "one of the folders below it that do" if runs[1:] else "the one below it that does"
            )
            remedy = f"give {one}: {quoted([str(folder / run) for run in runs], 3)}"
            raise SnapshotError(str(folder), f"holds no {ENDING} files itself", remedy)
        raise SnapshotError(
            str(folder),
            f"holds no {ENDING} files, nor checkpoints of another kind",
            "give the folder that they lie in",
        )
    return listing


def runs_below(folder: Path, name: str, levels: int, seen: Seen) -> list[str]:
    """The folders, `name` or below it, in which networks or step folders with networks lie."""
    below = Listing()
    try:
        _walk(folder, name, levels, below, seen)
    except MachineError:
        return []
    runs = []
    for network in below.networks:
        stepped = network.home if counts(network.home.rpartition("/")[2]) else network.path
        runs.append(os.path.dirname(stepped))
    return list(dict.fromkeys(runs))


def counts(name: str) -> bool:
    """Whether the name of a file or folder counts training, as `checkpoint-500` does."""
    if _COMPONENT.fullmatch(name):
        return False
    whole = as_snapshot(name)
    whole = whole if whole.lower().endswith(ENDING) else whole + ENDING
    return bool(read_counts(whole)) or read_name(whole) is not None


def title(name: str, pattern: Pattern | None) -> str:
    """The name that says a snapshot's step and profile: an index's without its own ending.

    The conventions need the ending of a file, which folders don't have; a pattern of the user's is
    for the path below the folder as it is, or the folder alone where it has no `/`.
    """
    if is_index(name):
        name = name[: -len(".index.json")]
    folders = name.split("/")[:-1]
    if pattern is not None:
        whole = "/" in pattern.text or pattern.greedy.fullmatch(name)
        return name if whole else next(filter(pattern.greedy.fullmatch, folders), name)
    last = as_snapshot(name).rpartition("/")[2]
    counting = [part for part in folders if counts(part)]
    sure = [part for part in counting if _CHECKPOINT.fullmatch(part)]
    if folders and read_name(last) is None and (sure or not counts(last)):
        last = (sure or counting or folders)[0]
    return last if last.lower().endswith(ENDING) else last + ENDING


def _list_below(
    folder: Path, name: str, listing: Listing, pattern: Pattern | None, deep: bool, seen: Seen
) -> bool:
    """Add to `listing` what lies in the folder `name`; whether that is anything."""
    stepped = counts(name) or (pattern is not None and pattern.greedy.fullmatch(name) is not None)
    levels = _BELOW + 1 if deep else _BELOW if stepped else 0
    below = Listing()
    try:
        _walk(folder, name, levels, below, seen)
    except MachineError as error:
        listing.left_out.append((name, f"a folder that {error.problem}"))
        return True
    if any(network.path.endswith(METADATA) for network in below.networks):
        below.others += [one for one in below.networks if _is_state_beside(one)]
        below.networks = [one for one in below.networks if not _is_state_beside(one)]
    listing.others += below.others
    listing.networks += below.networks
    listing.left_out += below.left_out
    if below.networks:
        return True
    if name.lower().endswith(ENDING):
        listing.left_out.append((name, "a folder, not a file"))
        return True
    return False


def _is_state_beside(network: Network) -> bool:
    """Whether, beside a checkpoint of torch.distributed, it is what each rank saved of training."""
    return not network.path.endswith((METADATA, ENDING, ".json"))


def _walk(folder: Path, place: str, levels: int, listing: Listing, seen: Seen) -> None:
    """Add the networks at `place`, and `levels` folders below it; and what is of other formats."""
    every = seen(folder / place, list_folder(folder / place))
    if holds_distributed(every):
        optimizer = is_beside(place.rpartition("/")[2])  # as accelerate has it
        kept = listing.others if optimizer else listing.networks
        kept.append(Network(f"{place}/{METADATA}", place))
        return
    if in_ranks(every) and find_network(folder / place) is None:
        listing.networks.append(Network(f"{place}/ranks", place))
        return
    names = [name for name in every if not name.startswith(".")]
    found, missing = list_networks(folder / place, names)
    safetensors = [*found, *missing]
    one = find_network(folder / place) if safetensors else find_checkpoint(folder / place)
    for name in sorted([*safetensors, *list_checkpoints(names)]):
        network = Network(f"{place}/{name}", place if name == one else f"{place}/{name}")
        beside = safetensors or of_training(name)  # the same network once more, or none
        (listing.others if beside and name not in safetensors else listing.networks).append(network)
    for name in names:
        made_of = bool(safetensors) and name == "sharded"  # what these were made of
        if not is_folder(folder / place / name) or made_of:
            continue
        if is_output(folder / place / name):
            listing.left_out.append((f"{place}/{name}", MADE_BY_POSTHOC))
        elif _TAG.fullmatch(name) and (safetensors or one) and counts(place.rpartition("/")[2]):
            text = "DeepSpeed's state, with a copy of the network beside it"
            listing.left_out.append((f"{place}/{name}", text))
        elif levels:
            _walk(folder, f"{place}/{name}", levels - 1, listing, seen)


def _left_by_posthoc(folder: Path, index: str, names: Sequence[str]) -> bool:
    """Whether shards whose index is missing are of an output that was never finished."""
    stem = index[: -len(".safetensors.index.json")]
    shard = re.compile(re.escape(stem) + r"-[0-9]{5}-of-[0-9]{5}\.safetensors", re.IGNORECASE)
    return any(shard.fullmatch(name) and made_by_posthoc(folder / name) for name in names)


def _shape(name: str) -> str:
    """`checkpoint-500` -> `checkpoint-#`."""
    return re.sub("[0-9]+", "#", name)
