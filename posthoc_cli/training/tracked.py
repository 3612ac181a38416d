"""The averages that a tracker keeps of a network, one of each tensor for each profile."""

from __future__ import annotations

import fnmatch
import functools
import os
import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from posthoc_cli.training.averaging import (
    EmaUpdate,
    LiveTensors,
    TensorRoles,
    accumulation_dtype,
    as_sharded,
    check_same_tensors,
    distributed_rank,
    is_sharded,
    part_of,
    unwrap,
)

_MADE, _START = "posthoc_made_in", secrets.token_hex(8)
"""An attribute of DTensors in a state, and the beginning of its value in this process."""


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
            whole = self._live.whole
            self.tensors = [
                {
                    name: part_of(name, value, whole[name]) if name in whole else value
                    for name, value in averages.items()
                }
                for averages in self.tensors
            ]
            check_same_tensors(live, self.tensors[0])
        self.tensors = [
            {name: self._placed(value, live[name]) for name, value in averages.items()}
            for averages in self.tensors or [live] * self._profiles
        ]
        self._update = EmaUpdate(live, self.tensors, self.roles)
        return self._update

    def _placed(self, value: Tensor, live: Tensor) -> Tensor:
        """`value` as an average of `live`, in its dtype and on its device."""
        dtype, device = self._kind(live)
        if value is not live and value.dtype == dtype and value.device == device:
            return value
        return self._like(live).copy_(value)

    def _like(self, live: Tensor) -> Tensor:
        """Memory for an average of `live`."""
        dtype, device = self._kind(live)
        # Strides as those of the live tensor: both are then read in the order they lie in memory.
        return torch.empty_like(live, dtype=dtype, device=device, requires_grad=False)

    def _kind(self, live: Tensor) -> tuple[torch.dtype, torch.device]:
        return accumulation_dtype(live.dtype, self._dtype), self._device or live.device

    def own(self, name: str) -> str:
        """The name that the tensor called `name`, which may be tied, has in `tensors`, or ""."""
        return self._live.alias.get(name, "")

    def wanted(self) -> dict[str, Tensor]:
        """The network's tensors of which there are to be averages."""
        if self._live.refresh():
            self._update = None
        return self._live.whole

    def state(self) -> list[dict[str, Tensor]]:
        """The averages as a state to save: the live ones, sharded as the network is.

        Before there are any, tensors of their kind: torch.distributed.checkpoint loads into them.
        """
        whole = self.wanted()
        averages = self.tensors or [
            {name: self._like(live) for name, live in self._live.tensors.items()}
            for _ in range(self._profiles)
        ]
        return [
            {name: _as_live(value, whole.get(name)) for name, value in each.items()}
            for each in averages
        ]

    def load(self, state: Sequence[Mapping[str, Tensor]], rank: int | None = None) -> None:
        """Go on with copies of what `state` returned in process `rank`.

        Raises ValueError for another process' part of what is sharded, unless
        torch.distributed.checkpoint has put into it what is this one's.
        """
        values = [value for averages in state for value in averages.values()]
        strange = any(is_sharded(each) and getattr(each, _MADE, "") != _here() for each in values)
        if strange and rank != (here := distributed_rank()):
            raise ValueError(
                f"the state has process {rank}'s part of the averages, and this is process {here}; "
                "save and load it with torch.distributed.checkpoint"
            )
        self.tensors = [
            {name: value.detach().clone() for name, value in averages.items()} for averages in state
        ]
        self._update = None


def _here() -> str:
    return f"{_START}-{os.getpid()}"


def _as_live(value: Tensor, live: Tensor | None) -> Tensor:
    """An average, sharded as the network's tensor is, and known to be of this process."""
    if live is None or is_sharded(value):
        return value
    made = as_sharded(value, live)
    if made is not value:
        setattr(made, _MADE, _here())
    return made


def _fits(include: Sequence[str], name: str) -> bool:
    return not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
