"""What lies beside a network's weights: what a library needs to load them, and what it doesn't.

Hugging Face's libraries load a folder: weights under a name of theirs, a config, a tokenizer, or a
whole pipeline, whose model_index.json names its parts. Trainers save their own state beside that.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from posthoc_cli.errors import PosthocError
from posthoc_cli.storage import ENDING, File
from posthoc_cli.storage.places import common_folder
from posthoc_cli.storage.shards import is_known, is_training_state
from posthoc_cli.storage.stores import is_file, is_folder, list_folder, open_file, own_name

_FOR_LOADERS = re.compile(
    r"(?i)(?:tokenizer|vocab|merges|sentencepiece|spiece|licen[cs]e|notice).*"
    r"|.*\.(?:json|jinja|txt|md|ya?ml|py|model|spm|tiktoken|vocab|bpe|codes)"
)
"""Files that belong to a model, by name: what tokenizers have is of all sorts."""

_KNOWN = re.compile(
    r"(?i)(?:(?:adapter|generation|\w*processor|feature_extractor|tokenizer|sentence_bert"
    r"|quantiz\w+)_)?config\.json|(?:added_tokens|special_tokens_map|feature_extractor)\.json"
    r"|(?:tokenizer|vocab|merges|sentencepiece|spiece|chat_template)\..+|[a-z]+\.spm"
    r"|(?:configuration|modeling|tokenization|processing|\w+_processing|feature_extraction)_.+\.py"
)
"""The same where other things lie as well, as in the folder of a run."""

_STATE = re.compile(
    r"(?i)train(?:er|ing)?[-_](?:state|args|config).*|global_step[0-9]+|latest|zero_to_fp32\.py"
    r"|latest_checkpointed_iteration\.txt|(?:all|train|eval|test|predict)_results\.json"
    r"|(?:optimizer|pytorch_model_fsdp|zero_pp_rank|mp_rank|rng_state|random_states|profiler?)_.*"
    r"|(?:data(?:loader|set)?|sampler|rng|scaler|optimizer|scheduler)[-_]states?\.\w+"
    r"|events\.out\.tfevents.*|.*\.log|logs?\.(?:txt|jsonl?)|metrics\.jsonl?|log_history\.json"
    r"|wandb|runs|(?:tb_|tensorboard_?)?logs?|tensorboard|mlruns|__pycache__|samples"
)
"""Training state and logs, beside what storage knows of the former."""

_WEIGHTS = re.compile(
    r"(?i)(?!tokenizer|vocab|merges|sentencepiece|spiece)"
    r"(?P<stem>.+?)(?:\.(?P<variant>[a-z]\w*))?(?P<shard>-[0-9]{5}-of-[0-9]{5})?"
    r"(?:\.(?P<after>[a-z]\w*))?"
    r"(?P<ending>\.safetensors|\.bin|\.ckpt|\.distcp|\.gguf|\.h5|\.msgpack|\.npz|\.onnx|\.ot"
    r"|\.pickle|\.pkl|\.pt|\.pth)(?:_data|\.index(?:\.(?P<of>\w+))?\.json)?"
)
"""Files of tensors, and the indexes of their shards; a variant is such as fp16."""

_SAME = re.compile(r"(?:flax|pytorch|tf)_(?=model\Z)")
_BEST = (ENDING, ".bin")
"""The forms of weights that loaders take first."""

_PARTS = {"model_index.json": dict, "modules.json": list}
"""What names the parts of a whole: diffusers' and sentence-transformers'."""

_CONFIGS = ("adapter_config.json", "config.json")

_MOST_LEVELS = 8


@dataclass(slots=True)
class Companions:
    """What a folder shall hold besides the tensors of an average, by paths below it.

    `weights` is where those go, `source` the folder that the rest is copied from, or most of it, in
    the folder `top` of the run; `left_out` is what lies there and isn't copied, with the reason,
    and `missing` what a loader will ask for.
    """

    source: Path
    top: Path
    weights: str = ""
    copied: dict[str, File] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of what is copied."""
        return sum(file.size for file in self.copied.values())

    def origin(self, name: str = "") -> str:
        """The folder that a file is copied from, or that most are: below the run's, or its name."""
        source = self.copied[name].path.parent if name else self.source
        if name and source.is_relative_to(self.source):
            source = self.source
        return own_name(self.top) if source == self.top else source.relative_to(self.top).as_posix()

    def leave_out(self, path: Path, why: str) -> None:
        name = path.relative_to(self.source).as_posix()
        self.left_out.append((f"{name}/" if is_folder(path) else name, why))

    def copy(self, path: Path, name: str) -> None:
        remedy = "restore it, or take it out of the folder"
        with open_file(path, remedy) as (_, file):
            self.copied[name] = file


class _Weights(NamedTuple):
    """What a file of tensors is by its name."""

    stem: str
    variant: str
    ending: str


def companions(files: Sequence[Path], top: Path, others: Sequence[Sequence[Path]]) -> Companions:
    """What lies beside the network in `files`, in the folder `top` of a run or somewhere below it.

    `others` are the files of the run's other networks: a folder that holds several is no network's
    own, and only what is known by its name is taken from there.

    Raises SnapshotError for a link that leads nowhere, MachineError for what can't be read.
    """
    home = _home(files)
    own = home != top and all(_home(each) != home for each in others)
    root = _whole(home, top) if own else home
    parts = _parts(root) if own else []
    place = _place(home, root, parts)
    found = Companions(root, top)
    if own:
        _Taking(found, home, place, parts, {_weights(path.name) for path in files}).take(root, "")
    _take_known(found, place, home, top, own)
    config = _read_json(found.copied, f"{place}config.json")
    adapter = f"{place}adapter_config.json" in found.copied
    name = _weights_name(files, others if own else None, config, adapter)
    found.weights = f"{place}{name}"
    there = [*found.copied, found.weights]
    gone = [part for part in parts if not any(each.startswith(f"{part}/") for each in there)]
    found.missing += [f"{part}/" for part in gone]
    # A LoRA's config is that of the network it is for.
    known = any(f"{place}{each}" in found.copied for each in _CONFIGS)
    if not known and not name.startswith("pytorch_lora_weights"):
        found.missing.append(f"{place}config.json")
    return found


def in_shards(files: Sequence[Path]) -> bool:
    """Whether a network's files are shards that an index lists."""
    found = [_WEIGHTS.fullmatch(path.name) for path in set(files)]
    return len(found) > 1 and all(match and match["shard"] for match in found)


def _home(files: Sequence[Path]) -> Path:
    return common_folder([path.parent for path in files])


def _whole(home: Path, top: Path) -> Path:
    """The folder of the whole that the network in `home` is a part of; `home` if there is none."""
    for folder in (home, *home.parents):
        if folder == top or not folder.is_relative_to(top):
            break
        if any(is_file(folder / name) for name in _PARTS):
            return folder
    return home


def _parts(root: Path) -> list[str]:
    """The folders that the parts of a whole lie in, by its index."""
    for name, kind in _PARTS.items():
        document = _parsed(root / name)
        if not isinstance(document, kind):
            continue
        if isinstance(document, dict):
            return [part for part, of in document.items() if isinstance(of, list) and of and of[0]]
        paths = [each.get("path") for each in document if isinstance(each, dict)]
        return [path for path in paths if isinstance(path, str) and path]
    return []


def _place(home: Path, root: Path, parts: Collection[str]) -> str:
    """Where below the output the network in `home` goes: `unet/`.

    Of a pipeline with a unet, what is averaged in unet_ema takes the place of the unet.
    """
    if home == root:
        return ""
    below = home.relative_to(root).as_posix()
    plain = below.removesuffix("_ema")
    return f"{plain if below not in parts and plain in parts else below}/"


def _parsed(path: Path) -> Any:
    if not is_file(path):
        return None
    try:
        with open_file(path) as (file, _):
            return json.loads(file.read(1 << 20))
    except (PosthocError, ValueError, RecursionError):
        return None


def _read_json(copied: Mapping[str, File], name: str) -> dict[str, Any]:
    document = _parsed(copied[name].path) if name in copied else None
    return document if isinstance(document, dict) else {}


def _weights(name: str) -> _Weights | None:
    match = _WEIGHTS.fullmatch(name)
    if match is None:
        return None
    variant = match["variant"] or match["after"] or match["of"] or ""
    return _Weights(_SAME.sub("", match["stem"]), variant, match["ending"].lower())


def _is_state(name: str) -> bool:
    return is_training_state(name) or _STATE.fullmatch(name) is not None


def _visible(folder: Path) -> list[str]:
    return [name for name in list_folder(folder) if not name.startswith(".")]


@dataclass(frozen=True, slots=True)
class _Taking:
    """Takes what a network needs from a folder that is its own, or of the whole it is a part of.

    The network is in `home` and goes to `place`; `own` are its weights.
    """

    found: Companions
    home: Path
    place: str
    parts: Collection[str]
    own: Collection[_Weights | None]

    def take(self, folder: Path, below: str) -> None:
        """Take what lies in `folder`, which becomes `below` of the output."""
        below = self.place if folder == self.home else below
        for name in _visible(folder):
            path, goes_to = folder / name, f"{below}{name}"
            if is_folder(path):
                if self.home.is_relative_to(path):
                    self.take(path, f"{goes_to}/")
                elif f"{goes_to}/" == self.place:
                    self.found.leave_out(path, f"'{self.home.name}' takes its place")
                elif goes_to in self.parts:
                    self.take_part(path, f"{goes_to}/", 1)
                else:
                    self.take_plain(path, f"{goes_to}/")
            elif _is_state(name):
                self.found.leave_out(path, "training state")
            elif (weights := _weights(name)) is not None:
                if folder != self.home or weights not in self.own:
                    self.found.leave_out(path, "other weights")
            elif _FOR_LOADERS.fullmatch(name):
                self.found.copy(path, goes_to)
            else:
                self.found.leave_out(path, "nothing that loaders ask for")

    def take_part(self, folder: Path, below: str, level: int) -> None:
        """Take another part of the whole, its weights included."""
        names = _visible(folder)
        copies = dict(_copies(names))
        for name in names:
            path = folder / name
            if is_folder(path) and level < _MOST_LEVELS:
                self.take_part(path, f"{below}{name}/", level + 1)
            elif is_folder(path):
                self.found.leave_out(path, "folders in folders")
            elif _is_state(name):
                self.found.leave_out(path, "training state")
            elif name in copies:
                self.found.leave_out(path, copies[name])
            else:
                self.found.copy(path, f"{below}{name}")

    def take_plain(self, folder: Path, below: str) -> None:
        """Take a folder that nothing names, if all in it is what loaders ask for."""
        files = list(_files(folder, 1))
        odd = [path for path in files if not _FOR_LOADERS.fullmatch(path.name)]
        if _is_state(folder.name) or any(_is_state(path.name) for path in files):
            self.found.leave_out(folder, "training state")
        elif any(_weights(path.name) for path in files):
            self.found.leave_out(folder, "other weights")
        elif odd:
            self.found.leave_out(folder, "nothing that loaders ask for")
        else:
            for path in files:
                self.found.copy(path, f"{below}{path.relative_to(folder).as_posix()}")


def _files(folder: Path, level: int) -> Iterator[Path]:
    for name in _visible(folder):
        if not is_folder(folder / name):
            yield folder / name
        elif level < _MOST_LEVELS:
            yield from _files(folder / name, level + 1)


def _copies(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Which of the names in a folder are weights that another of them has too, and why."""
    alike: dict[str, dict[str, _Weights]] = defaultdict(dict)
    for name in names:
        if (weights := _weights(name)) is not None:
            alike[weights.stem][name] = weights
    for group in alike.values():
        variants = {each.variant for each in group.values()}
        for name, weights in group.items():
            forms = [each.ending for each in group.values() if each.variant == weights.variant]
            best = min(forms, key=_rank)
            if weights.variant and "" in variants:
                yield name, f"the weights as {weights.variant}, which are there plain"
            elif weights.ending != best:
                yield name, f"the weights in another form, which are there as {best}"


def _rank(ending: str) -> int:
    return _BEST.index(ending) if ending in _BEST else len(_BEST)


def _take_known(found: Companions, place: str, home: Path, top: Path, own: bool) -> None:
    """Take a config that isn't in the network's own folder, and what is known to go with it, from
    the folders above, up to the first with a config; without one nothing is of the run's folder."""
    for folder in (home, *home.parents)[1 if own else 0 :]:
        configs = {f"{place}{each}" for each in _CONFIGS}
        if not folder.is_relative_to(top) or configs & found.copied.keys():
            return
        known = [
            each for each in _visible(folder) if _KNOWN.fullmatch(each) and not _is_state(each)
        ]
        if folder == home or folder != top or set(known) & set(_CONFIGS):
            for name in known:
                if f"{place}{name}" not in found.copied and is_file(folder / name):
                    found.copy(folder / name, f"{place}{name}")


def _weights_name(
    files: Sequence[Path],
    others: Sequence[Sequence[Path]] | None,
    config: Mapping[str, Any],
    adapter: bool,
) -> str:
    """What the weights are called: as the snapshots' own are, unless a library has another name.

    `others` are the networks in folders like this one's; None where the files' names differ.
    """
    stem, ending = _main(files)
    if ending != ENDING and stem == "pytorch_model":
        stem = "model"
    if is_known(f"{stem}{ENDING}"):
        return f"{stem}{ENDING}"
    if adapter:
        return f"adapter_model{ENDING}"
    if "_class_name" in config:
        return f"diffusion_pytorch_model{ENDING}"
    lasting = others is not None and all(_main(each) == (stem, ending) for each in others)
    if ending == ENDING and lasting and "model_type" not in config:
        return f"{stem}{ENDING}"
    return f"model{ENDING}"


def _main(files: Sequence[Path]) -> tuple[str, str]:
    """The stem and ending of a network's file, or of its shards' index; "" where there is none."""
    matches = [_WEIGHTS.fullmatch(path.name) for path in files]
    names = {
        (match["stem"] + (f".{match['variant']}" if match["variant"] else ""), match["ending"])
        for match in matches
        if match
    }
    return names.pop() if len(names) == 1 else ("", "")
