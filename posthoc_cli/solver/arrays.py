"""Arrays on the CPU (NumPy) or on a device (torch), spoken to with the functions they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

Array = Any
"""A NumPy array or a torch tensor, of float64."""


def namespace(*arrays: Array) -> Any:
    """The module whose functions take `arrays`: numpy or torch."""
    if all(isinstance(array, (np.ndarray, np.generic, int, float)) for array in arrays):
        return np
    import torch  # only here and below: it takes a second to import

    return torch


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
