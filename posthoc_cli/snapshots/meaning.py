"""Tensors whose average is nothing that a network can use.

Names and dtypes tell most of it: placeholders without elements, quantized weights beside their
scales, statistics of batch normalization. Only where much of a network is integers, which have no
average, a sample of their values is read, to know whether they differ at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from posthoc_cli.errors import percent
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.storage import Reader, TensorInfo, fits_any
from posthoc_cli.storage.dtypes import AVERAGED, DTYPES, FLOAT8

MOSTLY = 0.05
"""The part of a network's bytes above which integers matter; counters and indices are less."""

_COUNTERS = 8
"""Elements of the largest integer tensor that is taken for counters or a shape."""

_PLACEHOLDERS = 0.1
"""The part of the tensors: ZeRO-3 keeps small ones whole, which may be most of them."""

_SAMPLED, _BLOCKS, _BLOCK = 8, 4, 4096
"""Integer tensors to read a sample of, at the most; how many blocks of each, and their bytes."""

_LOW_BIT = {
    code
    for code, dtype in DTYPES.items()
    if code in FLOAT8 or (dtype.bits <= 32 and code not in AVERAGED and code != "BOOL")
}
"""What quantized values are stored as, also several in one integer."""

_INTEGERS = {code for code in DTYPES if code[0] in "IU" or code == "BOOL"}

_VALUES = re.compile(r"weight|kernel|qdata|_data\Z|packed|codes|w_q|_blocks\Z|proj")
"""What a tensor of quantized values has in its name, in its last part."""

_SCALE = (
    r"(?:_?(?:(?:weight|input|output|act|activation|global|nested|per_tensor)_)*[qw]?"
    r"(?:scales?(?:_inv|_2)?|zeros?|zero_points?|absmax|quant_map|shift|g_idx|codebooks?)"
    r"|scale_(?:weight|input|inv)|scb|weight_format|comfy_quant)"
)
"""What the scales, zeros and tables beside it are called: by GPTQ, AWQ, HQQ, AQLM, EETQ,
bitsandbytes, torchao, quanto, compressed-tensors, ModelOpt, DeepSeek and ComfyUI."""

_BESIDE = re.compile(_SCALE)
_OF_TENSOR = re.compile(rf"[._:]{_SCALE}|[.:]quant_state[.:].*")
"""What follows the name of a quantized tensor in that of its scales."""

_STATISTICS = {"running_mean", "running_var"}

_AVERAGE = re.compile(r"(?:.*_)?ema(?:_.*)?")
"""What a network's own average is called, by the first part of its tensors' names."""

_OPTIMIZER = re.compile(
    r"(?:\A|[./])(?:optim(?:izer)?s?|opt_state)[./]"
    r"|(?:\A|[./])(?:exp_avg(?:_sq)?|momentum_buffer|max_exp_avg_sq)(?:[./]|\Z)"
)
"""The state of an optimizer among the tensors, by their names."""

_LONGEST = 1000
"""Characters of a name beyond which it is none that a tool gives, and would be slow to search."""


def meaningless(snapshots: Sequence[Snapshot], settled: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What can't be averaged, file and message, but for the tensors that a glob `settled` fits.

    Raises what Reader does.
    """
    seen: dict[int, list[Snapshot]] = {}
    for snapshot in snapshots:
        seen.setdefault(id(snapshot.index.tensors), []).append(snapshot)
    quantized = False
    for alike in seen.values():
        tensors = _unsettled(alike[0].index.tensors, settled)
        more = f" (and {len(alike) - 1} files like it)" if len(alike) > 1 else ""
        if empty := _placeholders(tensors):
            yield (
                alike[0].file,
                f"{len(empty)} of its {len(alike[0].index.tensors)} tensors, such as '{empty[0]}', "
                f"are without elements{more}: DeepSpeed's ZeRO-3 leaves such placeholders; "
                "consolidate the checkpoint by its zero_to_fp32.py, or save with "
                "stage3_gather_16bit_weights_on_model_save",
            )
        if found := _quantized(tensors, alike[0].index.tensors):
            quantized = True
            (name, scale), others = found[0], len(found) - 1
            also = f", and {others} more" if others else ""
            yield (
                alike[0].file,
                f"tensor '{name}' ({tensors[name].dtype}) is quantized, with '{scale}' beside "
                f"it{also}{more}: averages of the two are not those of the weights; dequantize "
                "the checkpoints first, or average those that were quantized (what training left "
                "as it was can be taken from the newest with copy=, or left out with drop=)",
            )
    if not quantized:
        yield from _different_integers(snapshots, settled)


def misfitting(snapshots: Sequence[Snapshot], settled: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Warnings of what can be averaged, but fits no network exactly."""
    if not snapshots:
        return
    tensors = _unsettled(snapshots[-1].index.tensors, settled)
    found = [
        name
        for name, info in tensors.items()
        if info.dtype in AVERAGED and _split(name)[1] in _STATISTICS
    ]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield (
            "",
            f"'{found[0]}'{more}: running statistics of batch normalization, which fit no network "
            "exactly when they are averaged; recompute them on data with the network that comes "
            "out (torch.optim.swa_utils.update_bn)",
        )
    moments = [name for name in tensors if _OPTIMIZER.search(name[-_LONGEST:])]
    if moments:
        yield (
            "",
            f"'{moments[0]}' and {len(moments) - 1} more: an optimizer's state, beside the network "
            "itself; leave it out with drop=",
        )
    first = {name: name.partition(".")[0] for name in tensors if "." in name}
    kept = [name for name, part in first.items() if _AVERAGE.fullmatch(part.lower())]
    if 4 * len(kept) > len(tensors) and len(kept) < len(first):
        yield (
            "",
            f"'{kept[0]}' and {len(kept) - 1} more: an EMA that training kept, beside the network "
            "itself, and both are taken for the same here; leave one of them out with "
            f"drop='{first[kept[0]]}.*'",
        )


def _unsettled(
    tensors: Mapping[str, TensorInfo], settled: Sequence[str]
) -> Mapping[str, TensorInfo]:
    return {name: info for name, info in tensors.items() if not fits_any(name, settled)}


def _placeholders(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The tensors that are placeholders, if so many are that they can be nothing else."""
    empty = [name for name, info in tensors.items() if info.shape == (0,)]
    many = 2 * len(empty) >= len(tensors) or len(empty) >= max(_PLACEHOLDERS * len(tensors), 4)
    return sorted(empty) if many else []


def _quantized(
    tensors: Mapping[str, TensorInfo], beside: Mapping[str, TensorInfo]
) -> list[tuple[str, str]]:
    """The quantized ones of `tensors`, each with one of its scales, which are among `beside`."""
    if not any(info.dtype in _LOW_BIT for info in tensors.values()):
        return []
    inside: dict[str, list[str]] = {}  # by module: the scales that are called by their own name
    after: dict[str, list[str]] = {}  # by tensor: those that are called by its name
    for name in sorted(name for name in beside if len(name) <= _LONGEST):
        module, last = _split(name)
        if _BESIDE.fullmatch(last.lower()):
            inside.setdefault(module, []).append(name)
        for end in re.finditer(r"[._:]", name):
            if _OF_TENSOR.fullmatch(name[end.start() :].lower()):
                after.setdefault(name[: end.start()], []).append(name)
    found = []
    for name in sorted(tensors):
        info = tensors[name]
        if info.dtype not in _LOW_BIT or info.elements < 2 or len(name) > _LONGEST:
            continue
        if _is_scale(name):
            continue
        module, last = _split(name)
        whole = re.sub(r"(?:[.:]_data)+\Z|_blocks\Z", "", name)
        scales = after.get(name, []) + (after.get(whole, []) if whole != name else [])
        if _VALUES.search(last.lower()):
            scales += inside.get(module, [])
        # In a network that is float8 as a whole, a parameter may be called scale; zeros are stored
        # as the values are.
        alike = info.dtype in FLOAT8
        if scale := next((s for s in scales if not alike or beside[s].dtype != info.dtype), ""):
            found.append((name, scale))
    return found


def _is_scale(name: str) -> bool:
    return _BESIDE.fullmatch(_split(name)[1].lower()) is not None


def _split(name: str) -> tuple[str, str]:
    """The module of a tensor, and the last part of its name."""
    at = max(name.rfind("."), name.rfind(":"))
    return name[: max(at, 0)], name[at + 1 :]


def _different_integers(
    snapshots: Sequence[Snapshot], settled: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The first snapshot whose integers are not those of the newest, where many are integers."""
    if len(snapshots) < 2:
        return
    newest = snapshots[-1].index
    integers = {
        name: info
        for name, info in _unsettled(newest.tensors, settled).items()
        if info.dtype in _INTEGERS and info.elements > _COUNTERS
    }
    total = sum(info.end - info.start for info in newest.tensors.values())
    share = sum(info.end - info.start for info in integers.values()) / max(total, 1)
    if share <= MOSTLY:
        return
    largest = sorted(integers, key=lambda name: (integers[name].start - integers[name].end, name))
    sampled = largest[:_SAMPLED]
    with Reader(newest) as reader:
        wanted = {name: _sample(reader, integers[name]) for name in sampled}
    for snapshot in (snapshots[0], snapshots[len(snapshots) // 2], snapshots[-2]):
        tensors = snapshot.index.tensors
        with Reader(snapshot.index) as reader:
            for name in sampled:
                info = tensors.get(name)
                if info is None or (info.dtype, info.shape) != (
                    integers[name].dtype,
                    integers[name].shape,
                ):
                    continue  # told elsewhere
                if _sample(reader, info) != wanted[name]:
                    yield (
                        snapshot.file,
                        f"tensor '{name}' ({info.dtype}) is not what it is in the newest snapshot, "
                        f"'{snapshots[-1].file}', and {percent(share)} of the network are "
                        "integers, which have no average; average checkpoints before they are "
                        "quantized or packed, or take such tensors from the newest with copy= or "
                        "leave them out with drop=",
                    )
                    return


def _sample(reader: Reader, info: TensorInfo) -> bytes:
    """Some blocks of a tensor, from its first byte to its last."""
    length = info.end - info.start
    block = min(_BLOCK, length)
    data = bytearray(_BLOCKS * block)
    for at in range(_BLOCKS):
        start = info.start + (length - block) * at // (_BLOCKS - 1)
        reader.read(start, memoryview(data)[at * block : (at + 1) * block])
    return bytes(data)
