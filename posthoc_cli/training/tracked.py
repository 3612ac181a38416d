"""The averages that a tracker keeps of a network, one of each tensor for each profile."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from posthoc_cli.training.averaging import (
    EmaUpdate,
    LiveTensors,
    TensorRoles,
    accumulation_dtype,
    check_same_tensors,
    unwrap,
)


class Averages:
    """Averages of the tensors of `model` whose names fit one of `include`, all without any.

    `tensors` has them by profile, then by name; of what is sharded, this process' part. `device`
    and `dtype` are as PostHocEMA has them.
    """

    def __init__(
        self,
        model: nn.Module,
        profiles: int,
        include: Sequence[str],
        roles: TensorRoles,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._profiles = profiles
        self._include = tuple(include)
        self.roles = roles
        self._device = torch.device(device) if device is not None else None
        self._dtype = dtype
        # Not a method of this: in a circle they would stay when nobody has them any more.
        self.included = functools.partial(_fits, self._include)
        self._live = LiveTensors(model, self.included)
        self.tensors: list[dict[str, Tensor]] = []
        self._update: EmaUpdate | None = None

    def update(self, weights: Sequence[float]) -> None:
        """Take the network's present weights in, with a weight (1 - decay) for each profile."""
        self.bind()(weights)

    def bind(self) -> EmaUpdate:
        """The update, fitted to the network; makes averages, or checks that they still match.

        Raises ValueError when they don't, and when there is nothing to average.
        """
        if self._live.refresh():
            self._update = None
        if self._update is not None:
            return self._update
        live = self._live.tensors
        if not live:
            raise ValueError(
                f"{type(unwrap(self._model)).__name__} has nothing to average"
                + (f" with a name that fits include={self._include}" if self._include else "")
            )
        if self.tensors:
            check_same_tensors(live, self.tensors[0])
        self.tensors = [
            {name: self._placed(value, live[name]) for name, value in averages.items()}
            for averages in self.tensors or [live] * self._profiles
        ]
        self._update = EmaUpdate(live, self.tensors, self.roles)
        return self._update

    def _placed(self, value: Tensor, live: Tensor) -> Tensor:
        """`value` as an average of `live`, in its dtype and on its device."""
        dtype = accumulation_dtype(live.dtype, self._dtype)
        device = self._device or live.device
        if value is not live and value.dtype == dtype and value.device == device:
            return value
        # Strides as those of the live tensor: both are then read in the order they lie in memory.
        return torch.empty_like(live, dtype=dtype, device=device, requires_grad=False).copy_(value)

    def own(self, name: str) -> str:
        """The name that the tensor called `name`, which may be tied, has in `tensors`, or ""."""
        return self._live.alias.get(name, "")

    def state(self) -> list[dict[str, Tensor]]:
        """The averages as a state to save; as with a network's, they are the live ones."""
        return [dict(averages) for averages in self.tensors]

    def load(self, state: Sequence[dict[str, Tensor]]) -> None:
        """Go on with copies of what `state` returned."""
        self.tensors = [
            {name: value.detach().clone() for name, value in averages.items()} for averages in state
        ]
        self._update = None


def _fits(include: Sequence[str], name: str) -> bool:
    return not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
