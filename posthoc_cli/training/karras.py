"""One power-function EMA of a network, as a module: `KarrasEMA`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from posthoc_cli.solver import decay, gamma_to_sigma_rel
from posthoc_cli.training.averaging import (
    EmaUpdate,
    LiveTensors,
    TensorRoles,
    accumulation_dtype,
    check_same_tensors,
    named_tensors,
    unwrap,
)
from posthoc_cli.training.counting import check_counts, crosses_multiple, next_step, resolve_gamma


class KarrasEMA(nn.Module):
    """One power-function EMA of a network, as a network that can be called.

    Arguments:
        model: the network. It is not a submodule: moving or saving this leaves it alone.
        sigma_rel: relative width of the EMA. Or
        gamma: its exponent.
        ema_model: the network to hold the average, or a function that makes it; by default a copy
            of `model`. Give it if `model` can't be copied.
        update_every: steps between updates of the average.
        frozen: count the steps, but leave the average as it is.
        param_or_buffer_names_no_ema: names of tensors to copy rather than average.
        ignore_names, ignore_startswith_names: tensors to leave as they were at the first update.
        allow_different_devices: whether `ema_model` may be on another device than `model`.
        move_ema_to_online_device: move `ema_model` to the device of `model` when they differ.

    Where `ema_model` has narrower tensors than float32, the averages are kept beside it in
    float32 and it gets them rounded: in bfloat16 an average with a decay of 0.9999 stands still.

    Raises ValueError unless one of `sigma_rel` and `gamma` is given, TypeError when `model` can't
    be copied.
    """

    ema_model: nn.Module
    _home: Tensor

    def __init__(
        self,
        model: nn.Module,
        sigma_rel: float | None = None,
        gamma: float | None = None,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        update_every: int = 1,
        frozen: bool = False,
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
    ) -> None:
        super().__init__()
        self.gamma = resolve_gamma(sigma_rel, gamma)
        check_counts(update_every=update_every)
        self.online_model = [model]  # in a list, lest it becomes a submodule
        if ema_model is None:
            try:
                ema_model = copy.deepcopy(unwrap(model))
            except Exception as error:
                raise TypeError(
                    f"the model can't be copied ({error}); give ema_model=, a second network of "
                    "the same shape"
                ) from error
        elif not isinstance(ema_model, nn.Module):
            ema_model = ema_model()
        self.ema_model = ema_model.requires_grad_(False)
        self.update_every = update_every
        self.frozen = frozen
        self.allow_different_devices = allow_different_devices
        self.move_ema_to_online_device = move_ema_to_online_device
        self.initted = False
        self.step = 0
        self._updated = 0
        self._covered = 0
        self._roles = TensorRoles(
            param_or_buffer_names_no_ema, ignore_names, ignore_startswith_names
        )
        self._online = LiveTensors(model, transient=True)
        self._ema = LiveTensors(self.ema_model, transient=True)
        self._wide: dict[str, Tensor] = {}
        self._update: EmaUpdate | None = None
        self.register_buffer("_home", torch.empty(0), persistent=False)

    @property
    def model(self) -> nn.Module:
        """The network that is averaged."""
        return self.online_model[0]

    @property
    def sigma_rel(self) -> float:
        """Relative width of the average's profile."""
        return float(gamma_to_sigma_rel(self.gamma))

    @property
    def beta(self) -> float:
        """What the last update multiplied the average with; 0 for the first, which copies."""
        if not self._updated:
            return 0.0
        return float(decay(self.gamma, self._updated, self._covered))

    def update(self, step: int | None = None) -> None:
        """Take the network's present weights in; call it after each `optimizer.step()`.

        `step` is how far training has come (images, tokens, ...), by default one more than at the
        call before. Raises ValueError when it goes back, or when the network is another or
        elsewhere than the average.
        """
        now = next_step(self.step, step)
        if now == self.step:
            return
        if crosses_multiple(self.update_every, self._updated, now):
            if not self.initted:
                self.copy_params_from_model_to_ema()
            if not self.frozen or not self.initted:
                self._covered = now - self._updated
                self._average(1 - decay(self.gamma, now, self._covered))
                self._updated = now
            self.initted = True
        self.step = now

    @torch.no_grad()
    def copy_params_from_model_to_ema(self) -> None:
        """Set the average to the network's weights, whatever is ignored included."""
        self._bound_update()
        live = named_tensors(self.model, transient=True)
        for name, average in self._averages().items():
            average.copy_(live[name])
        self._round()

    @torch.no_grad()
    def copy_params_from_ema_to_model(self) -> None:
        """Set the network's weights to the average."""
        self._bound_update()
        live = named_tensors(self.model, transient=True)
        for name, average in self._averages().items():
            live[name].copy_(average)

    def iter_all_ema_params_and_buffers(self) -> Iterator[Tensor]:
        """The averages, without what is copied or ignored."""
        self._bound_update()
        for name, average in self._averages().items():
            if self._roles.averaged(name):
                yield average

    def restore_ema_model_device(self) -> None:
        """Move `ema_model` back to where this module was moved last."""
        self.ema_model.to(self._home.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged network."""
        return self.ema_model(*args, **kwargs)

    def eval(self) -> nn.Module:  # type: ignore[override]
        """Put the averaged network into evaluation mode, and return it."""
        return self.ema_model.eval()

    def _averages(self) -> dict[str, Tensor]:
        """The averages by name; `_bound_update` must have been called."""
        return {**self._ema.tensors, **self._wide}

    @torch.no_grad()
    def _average(self, weight: float) -> None:
        self._bound_update()([weight])
        self._round()

    def _round(self) -> None:
        """Give `ema_model` what is kept beside it in float32."""
        if self._wide:
            narrow = [self._ema.tensors[name] for name in self._wide]
            torch._foreach_copy_(narrow, list(self._wide.values()))

    @torch.no_grad()
    def _bound_update(self) -> EmaUpdate:
        """The update, fitted to the network: the same tensors, on devices that are allowed."""
        if any([self._online.refresh(), self._ema.refresh()]):
            self._update = None
        if self._update is not None:
            return self._update
        online = self._online.by_every_name()
        self._check_devices(online)
        ema = self._ema.by_every_name()
        check_same_tensors({name: online[name] for name in online if name in ema}, ema)
        kept, self._wide = self._wide, {}
        for name, tensor in self._ema.tensors.items():
            dtype = accumulation_dtype(tensor.dtype, torch.float32)
            if dtype != tensor.dtype:
                self._wide[name] = kept.get(name, tensor).to(tensor.device, dtype)
            elif name in kept:  # it was narrow, and has been widened
                tensor.copy_(kept[name])
        self._update = EmaUpdate(online, [self._averages()], self._roles)
        return self._update

    def _check_devices(self, online: Mapping[str, Tensor]) -> None:
        devices = {tensor.device for tensor in online.values()}
        averages = list(self._ema.tensors.values())
        if all(tensor.device in devices for tensor in averages):
            return
        here, there = averages[0].device, next(iter(devices))
        if self.move_ema_to_online_device:
            self.ema_model.to(there)
            self._ema.refresh()
        elif not self.allow_different_devices:
            raise ValueError(
                f"the average is on {here}, the model on {there}: move one, or give "
                "allow_different_devices=True or move_ema_to_online_device=True"
            )

    # The counters are plain numbers, since reading a tensor would wait for its device.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._counters().items():
            destination[prefix + name] = torch.tensor(value)
        for name, average in self._wide.items():
            destination[f"{prefix}average.{name}"] = average

    def _counters(self) -> dict[str, int]:
        return {
            "initted": self.initted,
            "step": self.step,
            "updated": self._updated,
            "covered": self._covered,
        }

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        numbers = self._counters()
        for name in numbers:
            if prefix + name in state_dict:
                numbers[name] = state_dict.pop(prefix + name).item()
            elif strict:
                missing_keys.append(prefix + name)
        self.initted, self.step = bool(numbers["initted"]), int(numbers["step"])
        self._updated, self._covered = int(numbers["updated"]), int(numbers["covered"])
        opening = f"{prefix}average."
        self._wide = {
            key[len(opening) :]: state_dict.pop(key).detach().clone()
            for key in list(state_dict)
            if key.startswith(opening)
        }
        self._update = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *others
        )
