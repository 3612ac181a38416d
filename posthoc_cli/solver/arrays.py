"""Arrays on the CPU (NumPy) or on a device (torch), spoken to with the functions they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import MachineError, UsageError

FloatArray = npt.NDArray[np.float64]

Array = Any
"""A NumPy array or a torch tensor, of float64."""


def namespace(*arrays: Array) -> Any:
    """The module whose functions take `arrays`: numpy or torch."""
    if all(isinstance(array, (np.ndarray, np.generic, int, float)) for array in arrays):
        return np
    import torch  # only here and below: it takes a second to import

    return torch


def distinct(*values: FloatArray | Sequence[float]) -> FloatArray:
    """All of `values` in order, each once. np.unique does the same, but loads half of NumPy."""
    ordered = np.sort(np.concatenate([np.asarray(each, np.float64) for each in values]))
    found: FloatArray = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    return found


def on_device(values: Any, device: str) -> Array:
    """`values` as float64 where a system is solved: NumPy's on "cpu", else torch's on `device`."""
    array = np.asarray(values, np.float64)
    if device == "cpu":
        return array
    import torch

    return torch.as_tensor(array, device=device)


def to_numpy(array: Array) -> FloatArray:
    """`array`, brought back to the CPU if it is elsewhere."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.cpu())


def resolve_device(device: str) -> str:
    """The device to compute on: "cpu", or what torch calls a CUDA device; "auto" takes either.

    torch is only imported to look for another than the CPU. Raises UsageError for a word that is
    no device, MachineError for one that isn't there.
    """
    if device == "cpu":
        return device
    if not re.fullmatch(r"auto|cuda(:[0-9]{1,3})?", device):
        raise UsageError("device=", f"'{device}' is not known", "choose cpu, cuda, cuda:1 or auto")
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    subject = f"device='{device}'"
    if not torch.cuda.is_available():
        remedy = "use device='cpu', or install a torch that supports your GPU"
        raise MachineError(subject, "torch finds no CUDA device here", remedy)
    found = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= found:
        raise MachineError(subject, f"not there: {found} found", f"give cuda:0 to cuda:{found - 1}")
    return device
