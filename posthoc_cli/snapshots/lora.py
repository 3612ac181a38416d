"""LoRA networks: the pairs of factors of each module, and their `.alpha` tensors.

Trainers store the factors of each module, `X.lora_down.weight` and `X.lora_up.weight`, with
`X.alpha`, the scale of their product. It is set before training: checkpoints that differ in it are
of different networks, and their average would be of neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_cli.snapshots.majority import most
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.storage import Reader, TensorInfo, fits_any
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, decode

_FACTOR = re.compile(r"\.(?:lora|hada|lokr|b?oft|glora|dora)[._]")
"""What follows a module's name in those of its factors, by all trainers that store an alpha."""

_ALPHA = ".alpha"

_UP = re.compile(
    r"(?P<module>.+?)(?P<mark>[._]lora)(?P<kind>_up\.|_B\.|_embedding_B|\.up\.|_linear_layer\.up\.)"
    r"(?P<rest>(?:[^.]+\.)?weight|\.[^.]+|)"
)
"""The factor that comes last, as kohya, peft and diffusers call it; older diffusers have
`.lora.up`, `to_q_lora.up` and `lora_linear_layer.up`, and peft's own state dicts the adapter's name
before `weight`."""

_DOWN = {
    "_up.": "_down.",
    "_B.": "_A.",
    "_embedding_B": "_embedding_A",
    ".up.": ".down.",
    "_linear_layer.up.": "_linear_layer.down.",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one module, by name: it changes a layer by `scale * up @ down`.

    `alpha` is the tensor that says its scale, if there is one; `bias` is one beside `up`, which is
    scaled too. With `own_rank`, what loads it takes the scale from the module alone; the others
    share one rank, or need a configuration that says each.
    """

    module: str
    up: str
    down: str
    alpha: str | None
    bias: str | None
    own_rank: bool

    @property
    def names(self) -> list[str]:
        return [self.up, self.down, *([self.bias] if self.bias else [])]


def pairs(tensors: Mapping[str, TensorInfo]) -> tuple[list[Pair], list[str]]:
    """The pairs of factors, by module; and the modules whose factors are no product of two.

    The latter have a third factor between (`lora_mid`), or groups of channels.
    """
    found: list[Pair] = []
    odd: list[str] = []
    for name in sorted(tensors):
        match = _UP.fullmatch(name)
        if match is None:
            continue
        module, mark, kind, rest = match.groups()
        down = f"{module}{mark}{_DOWN[kind]}{rest}"
        if down not in tensors:
            continue
        alpha = next((a for a in (module + _ALPHA, module + mark + _ALPHA) if a in tensors), None)
        bias = name.removesuffix("weight") + "bias"
        shapes = tensors[name].shape, tensors[down].shape
        if f"{module}{mark}_mid.{rest}" in tensors or not _is_product(*shapes):
            odd.append(module)
        elif {tensors[name].dtype, tensors[down].dtype} <= FLOATS:
            own = alpha is not None or kind == "_up."
            has_bias = rest.endswith("weight") and bias in tensors
            found.append(Pair(module, name, down, alpha, bias if has_bias else None, own))
    return found, odd


def _is_product(up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether `up` [out, rank, 1...] and `down` [rank, in...] multiply as matrices; none empty."""
    flat = len(up) >= 2 and len(down) >= 2 and all(size == 1 for size in up[2:])
    return flat and up[1] == down[0] and min(*up, *down) > 0


def without_rank(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor, with -1 in place of the rank where it is a factor of a LoRA."""
    if len(shape) < 2 or "lora" not in name:
        return shape
    if _UP.fullmatch(name):
        return shape[0], -1, *shape[2:]
    as_up = (name.replace(down, up) for up, down in _DOWN.items() if down in name)
    return (-1, *shape[1:]) if any(map(_UP.fullmatch, as_up)) else shape


def of_several_shapes(snapshots: Sequence[Snapshot], settled: Sequence[str] = ()) -> list[str]:
    """The names of the tensors that have not one shape in all of `snapshots`.

    Those that a glob `settled` fits are none.
    """
    layouts = list({id(each.index.tensors): each.index.tensors for each in snapshots}.values())
    return [
        name
        for name, info in (layouts[0].items() if len(layouts) > 1 else ())
        if any(name in other and other[name].shape != info.shape for other in layouts[1:])
        and not fits_any(name, settled)
    ]


def alphas(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names of a LoRA's alphas: one number each, beside the factors of a module."""
    modules = {name[: match.start()] for name in tensors if (match := _FACTOR.search(name))}
    return [
        name
        for name, info in tensors.items()
        if name.endswith(_ALPHA) and info.elements == 1 and name[: -len(_ALPHA)] in modules
    ]


def different_alphas(
    snapshots: Sequence[Snapshot], settled: Sequence[str] = ()
) -> Iterator[tuple[Snapshot, str]]:
    """Those of `snapshots` that have other alphas than most, and the first difference.

    Only the alphas are read, and of these none that a glob `settled` fits. Raises what Reader does.
    """
    if len(snapshots) < 2:
        return
    found = sorted(alphas(snapshots[-1].index.tensors))
    names = [name for name in found if not fits_any(name, settled)]
    if not names:
        return
    groups: dict[tuple[str | None, ...], list[Snapshot]] = {}
    for snapshot in snapshots:
        tensors = snapshot.index.tensors
        with Reader(snapshot.index) as reader:
            # Tensors that aren't the same are told elsewhere.
            values = tuple(
                _value(tensors[name].dtype, _read(reader, tensors[name]))
                if name in tensors and tensors[name].elements == 1
                else None
                for name in names
            )
        groups.setdefault(values, []).append(snapshot)
    place, where = most(list(groups.values()), snapshots[-1])
    right = list(groups)[place]
    for values, group in groups.items():
        for name, here, there in zip(names, values, right, strict=True):
            if here is not None and there is not None and here != there:
                for snapshot in group:
                    yield snapshot, f"tensor '{name}' is {here} here and {there} {where}"
                break


def _read(reader: Reader, info: TensorInfo) -> bytes:
    data = bytearray(info.end - info.start)
    reader.read(info.start, memoryview(data))
    return bytes(data)


def _value(dtype: str, data: bytes) -> str:
    """The number that an alpha is, for people; its bytes where it is of a rare dtype."""
    if dtype in FLOATS:
        value = float(decode(dtype, np.frombuffer(data, np.uint8))[0])
        return f"{value:.9g}" if float(f"{value:.9g}") == value else repr(value)
    if dtype[0] in "IU":
        return str(np.frombuffer(data, DTYPES[dtype].numpy())[0])
    return f"0x{data[::-1].hex()}"
