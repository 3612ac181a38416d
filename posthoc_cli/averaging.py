"""The arithmetic of tracking: which tensors of a module are averaged, and one pass that does it.

Knows no files and no profiles; a decay comes in, averages come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into the names of what they wrap."""


def unwrap(module: nn.Module) -> nn.Module:
    """The bare module in a compiled, data-parallel or distributed one."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors that `module.state_dict()` names, under the bare module's names.

    A tensor that has two names (tied weights) is there twice.
    """
    return {
        clean_name(name): value
        for name, value in unwrap(module).state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }


def clean_name(name: str) -> str:
    """`name` without what wrappers inside the module put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def wide(dtype: torch.dtype, least: torch.dtype) -> torch.dtype:
    """The dtype that averages of `dtype` are kept in: never narrower than `least`."""
    if dtype.is_complex:
        return torch.complex128 if torch.float64 in (dtype.to_real(), least) else torch.complex64
    return torch.float64 if torch.float64 in (dtype, least) else torch.float32
