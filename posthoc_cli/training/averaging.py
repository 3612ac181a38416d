"""The arithmetic of tracking: the tensors of a network in training, and updates of their averages.

Files and profiles are dealt with elsewhere: an update is given its weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into the names of what they wrap."""

_CACHE_BLOCK = 1 << 20
"""Elements of a block on the CPU: few enough that the network's part is still in the cache for
the second profile's average, and enough for all threads to share one operation."""

_SERIAL = 1 << 15
"""Elements up to which torch uses one thread for an operation on the CPU."""

_STAGED_BLOCK = 1 << 24
"""Elements of a block that is converted or moved on the way: 64 MB of float32."""


def unwrap(module: nn.Module) -> nn.Module:
    """The bare module in a compiled or data-parallel one. Raises TypeError for FSDP1."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif any(type(each).__name__ == "FullyShardedDataParallel" for each in module.modules()):
            raise TypeError(
                "FullyShardedDataParallel keeps its parameters in flat pieces that have no names; "
                "shard the model with torch.distributed.fsdp.fully_shard instead"
            )
        else:
            return module


def named_tensors(module: nn.Module, *, transient: bool = False) -> dict[str, Tensor]:
    """The live tensors of `module` under the names that the bare module's state_dict gives them.

    A tensor with two names (tied weights) is there twice. With `transient`, so are the buffers
    that a state_dict leaves out.
    """
    bare = unwrap(module)
    named: dict[str, Any] = dict(bare.state_dict(keep_vars=True))
    if transient:
        named |= dict(bare.named_buffers(remove_duplicate=False))
    return {_clean(name): value for name, value in named.items() if isinstance(value, Tensor)}


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def accumulation_dtype(dtype: torch.dtype, least: torch.dtype) -> torch.dtype:
    """The dtype for averages of `dtype`: at least float32, and never narrower than `least`."""
    # Torch has no promotion for float8.
    return torch.promote_types(dtype if dtype.itemsize > 1 else torch.float32, least)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded (DTensor)."""
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    return distributed_rank() == 0


def distributed_rank() -> int:
    """The number of this process among those that train together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    return distributed.get_rank()


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor as a tensor that is sharded as `like` is."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is sharded as `like` is; every process must call it."""
    whole: Any = part if is_sharded(part) else as_sharded(part, like)
    return whole.full_tensor() if is_sharded(like) else part


def on_first(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whole, in the first process' host memory; elsewhere only what is not sharded.

    Every process must call it.
    """
    whole = {}
    for name, value in values.items():
        full = gather(value, value)
        if full is value or is_first_process():
            whole[name] = full if full is value else full.cpu()
    return whole


def box_of(like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first element and the sizes of what this process holds of a tensor.

    Raises ValueError where that is no box.
    """
    sizes = tuple(local(like).shape)
    if not is_sharded(like):
        return (0,) * len(sizes), sizes
    chunks: Any = like.__create_chunk_list__()  # type: ignore[attr-defined]
    if 0 in sizes:
        return (0,) * len(sizes), sizes
    if len(chunks) != 1 or tuple(chunks[0].sizes) != sizes:
        raise ValueError("a tensor is sharded so that a process' part of it is no box")
    return tuple(chunks[0].offsets), sizes


def part_of(name: str, value: Tensor, like: Tensor) -> Tensor:
    """What this process shall hold of `value`, which is whole, or its part, or sharded as `like`.

    Raises ValueError when it is sharded in another way.
    """
    if is_sharded(value):
        ways = [getattr(each, "placements", None) for each in (value, like)]
        if ways[0] != ways[1] or value.device_mesh != like.device_mesh:  # type: ignore[attr-defined]
            raise ValueError(
                f"the average of {name!r} is sharded in another way than the network is; load the "
                "state with torch.distributed.checkpoint, which gives each process its part"
            )
        return local(value)
    if is_sharded(like) and value.shape == like.shape:
        for dim, (first, size) in enumerate(zip(*box_of(like), strict=True)):
            value = value.narrow(dim, first, size)
        return value.clone()  # or the whole would stay in memory
    return value


class LiveTensors:
    """The tensors of a module that can be averaged, each once, as they are now.

    Parameters and layers can be replaced at any time (`module.to`, `param.data = ...`); `refresh`
    notices, without collecting all names anew each time. `tensors` has this process' part of each
    by name; `alias` leads from any name, tied ones too, to the name that its tensor has there.
    """

    def __init__(
        self,
        module: nn.Module,
        wanted: Callable[[str], bool] | None = None,
        *,
        transient: bool = False,
    ) -> None:
        self._module = module
        self._wanted = wanted
        self._transient = transient
        self._tables: list[tuple[dict[str, Any], list[Any]]] = []
        self._whole: list[Tensor] = []
        self._addresses: list[int] = []
        self.alias: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}

    @property
    def whole(self) -> dict[str, Tensor]:
        """`tensors` as the module has them: sharded ones as what they are."""
        return dict(zip(self.tensors, self._whole, strict=True))

    def refresh(self) -> bool:
        """Bring `tensors` up to date; returns whether any is another tensor than before."""
        if (
            self._tables
            and all(_unchanged(table, values) for table, values in self._tables)
            and list(map(_address, self._whole)) == self._addresses
        ):
            return False
        self._tables = [
            (table, list(table.values()))
            for module in self._module.modules()
            for table in (module._modules, module._parameters, module._buffers)
            if table
        ]
        held = {id(value) for _, values in self._tables for value in values}
        self._whole, self.alias, self.tensors = [], {}, {}
        known: dict[Any, str] = {}
        for name, tensor in named_tensors(self._module, transient=self._transient).items():
            averageable = tensor.is_floating_point() or tensor.is_complex()
            if not (averageable and id(tensor) in held):
                continue
            if self._wanted is not None and not self._wanted(name):
                continue
            part = local(tensor)
            # The same memory seen in the same way is one tensor, whatever objects stand for it.
            same: Any = (part.data_ptr(), part.shape, part.stride(), part.dtype, part.device)
            if not part.data_ptr():
                same = id(tensor)
            self.alias[name] = known.setdefault(same, name)
            if self.alias[name] == name:
                self._whole.append(tensor)
                self.tensors[name] = part
        self._addresses = list(map(_address, self._whole))
        return True

    def by_every_name(self) -> dict[str, Tensor]:
        """`tensors`, and each tied one under its other names too."""
        return {name: self.tensors[first] for name, first in self.alias.items()}


def _unchanged(table: dict[str, Any], values: list[Any]) -> bool:
    return len(table) == len(values) and all(map(is_, table.values(), values))


def _address(tensor: Tensor) -> int:
    return local(tensor).data_ptr() if is_sharded(tensor) else tensor.data_ptr()


class TensorRoles:
    """What happens to the tensor of a name: it is averaged, copied, or ignored."""

    def __init__(
        self,
        copied: Collection[str] = (),
        ignored: Collection[str] = (),
        starts: Collection[str] = (),
    ) -> None:
        for names in (copied, ignored, starts):
            if isinstance(names, str):
                raise TypeError(f"give a collection of names, such as {{{names!r}}}")
        self.copied, self._ignored, self._starts = set(copied), set(ignored), tuple(starts)

    def ignored(self, name: str) -> bool:
        return name in self._ignored or name.startswith(self._starts)

    def averaged(self, name: str) -> bool:
        return name not in self.copied and not self.ignored(name)


@dataclass(slots=True)
class _Block:
    """Pieces that are updated together: `averages` is [profiles][pieces]."""

    sources: list[Tensor]
    staging: list[Tensor]
    averages: list[list[Tensor]]
    copied: bool


class EmaUpdate:
    """An update of averages, a mapping for each profile, from the tensors of the same names.

    Tensors are read once for all profiles. One that differs from its averages in dtype or device
    is converted once, block by block.
    """

    def __init__(
        self,
        live: Mapping[str, Tensor],
        averages: Sequence[Mapping[str, Tensor]],
        roles: TensorRoles,
    ) -> None:
        groups: dict[Any, list[tuple[Tensor, list[Tensor]]]] = {}
        for name, first in averages[0].items():
            if roles.ignored(name):
                continue
            source = live[name]
            alike = source.device == first.device and source.dtype == first.dtype
            small = alike and source.device.type == "cpu" and source.numel() <= _SERIAL
            kinds = (source.device, source.dtype, first.device, first.dtype)
            group = groups.setdefault((small, name in roles.copied, *kinds), [])
            group.append((source, [each[name] for each in averages]))
        self._small: list[_Block] = []
        self._others: list[_Block] = []
        for (small, copied, *_), group in groups.items():
            (self._small if small else self._others).extend(_blocks(group, copied))

    def __call__(self, weights: Sequence[float]) -> None:
        """`average += weight * (source - average)`, one weight (1 - decay) for each profile."""
        _update(self._others, weights)
        # Torch works on a small tensor with one thread, which can't fill the memory's bandwidth.
        threads = torch.get_num_threads()
        shares = min(threads, len(self._small))
        if shares > 1:
            parts = [self._small[k::shares] for k in range(shares)]
            list(_pool(threads).map(_update, parts, repeat(weights)))
        else:
            _update(self._small, weights)


@torch.no_grad()
def _update(blocks: Sequence[_Block], weights: Sequence[float]) -> None:
    for block in blocks:
        ends = block.sources
        if block.staging:
            torch._foreach_copy_(block.staging, block.sources)
            ends = block.staging
        for averages, weight in zip(block.averages, weights, strict=True):
            if (
                block.copied or weight == 1
            ):  # lerp would read the average, and it may not be finite yet
                torch._foreach_copy_(averages, ends)
            else:
                torch._foreach_lerp_(averages, ends, weight)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="posthoc averages")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _blocks(group: list[tuple[Tensor, list[Tensor]]], copied: bool) -> list[_Block]:
    """The blocks of tensors that agree in dtype and device."""
    source, (average, *_) = group[0]
    staged = source.dtype != average.dtype or source.device != average.device
    if average.device.type == "cpu" and source.device.type == "cpu":
        size = _CACHE_BLOCK
    else:  # kernels that take all tensors at once want them all, but staging takes memory
        size = _STAGED_BLOCK if staged else 1 << 62
    blocks: list[_Block] = []
    elements = size
    for source, averages in group:
        for piece, *mine in _pieces([source, *averages], size):
            if elements >= size:
                blocks.append(_Block([], [], [[] for _ in averages], copied))
                elements = 0
            blocks[-1].sources.append(piece)
            for column, average in zip(blocks[-1].averages, mine, strict=True):
                column.append(average)
            elements += piece.numel()
    if staged:
        total = max(sum(piece.numel() for piece in block.sources) for block in blocks)
        pinned = source.is_cuda and average.device.type == "cpu"
        buffer = torch.empty(total, dtype=average.dtype, device=average.device, pin_memory=pinned)
        for block in blocks:
            sizes = [piece.numel() for piece in block.sources]
            parts = torch.split(buffer[: sum(sizes)], sizes)
            block.staging += [p.view(s.shape) for p, s in zip(parts, block.sources, strict=True)]
    return blocks


def _pieces(tensors: Sequence[Tensor], size: int) -> Iterable[tuple[Tensor, ...]]:
    """Equal-shaped tensors in pieces of at most `size` elements, where their memory allows."""
    first = tensors[0]
    if first.numel() <= size:
        return [tuple(tensors)]
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    dense = [each.permute(order) for each in tensors]
    if not all(each.is_contiguous() for each in dense):
        return [tuple(tensors)]
    return zip(*(torch.split(each.view(-1), size) for each in dense), strict=True)


def check_same_tensors(live: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the network's tensors have the names and shapes of the averages."""
    for name in sorted(live.keys() | averages.keys()):
        here, there = (
            str(list(tensors[name].shape)) if name in tensors else "missing"
            for tensors in (live, averages)
        )
        if here != there:
            raise ValueError(
                f"tensor {name!r} is {here} in the model and {there} in the average: "
                "an average is of one network; make a new one for another"
            )


@contextlib.contextmanager
def swapped(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> Iterator[None]:
    """Put the values of `state`, which is emptied, into `own`; on leaving, what was there.

    The own values wait in host memory. Of what is sharded, `state` has the whole.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for name, tensor in own.items():
            part = local(tensor)
            saved.append((part, part.to("cpu", copy=True)))
            part.copy_(part_of(name, state.pop(name), tensor))
        yield
    finally:
        for tensor, value in reversed(saved):  # of tied tensors, the first one saved is right
            tensor.copy_(value)
