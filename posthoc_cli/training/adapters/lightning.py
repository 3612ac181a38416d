"""A callback for Lightning's Trainer.

from posthoc_cli.adapters.lightning import PostHocEMACallback

Trainer(callbacks=[PostHocEMACallback(sigma_rels=(0.05, 0.10), folder="snapshots")])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same library under its older name
    from pytorch_lightning import Callback

from posthoc_cli.training.adapters import state_of
from posthoc_cli.training.posthoc_ema import PostHocEMA


class PostHocEMACallback(Callback):
    """Track post-hoc EMAs of a LightningModule, or of the part of it called `module`.

    All other arguments are those of PostHocEMA. Steps are the trainer's `global_step`: batches
    whose gradients are only accumulated don't count. The averages are in Lightning's checkpoints,
    so that `fit(ckpt_path=...)` goes on with them; those of a sharded network whole. `ema` is the
    tracker, from the start of training on.
    """

    def __init__(
        self, sigma_rels: Any = None, *, module: str | None = None, **options: Any
    ) -> None:
        self.ema: PostHocEMA | None = None
        self._module = module
        self._options = {"sigma_rels": sigma_rels, **options}
        self._state: Mapping[str, Any] | None = None

    # The start of training is the first moment at which the module is on its device.
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        module = pl_module.get_submodule(self._module) if self._module else pl_module
        ema = self.ema
        if ema is None or ema.model is not module or ema.step > trainer.global_step or self._state:
            self.ema = PostHocEMA(module, **self._options)
        if self.ema is not None and self._state:
            self.ema.load_state_dict(self._state)
        self._state = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.ema is not None:
            self.ema.update(trainer.global_step)

    def on_train_end(self, *_: Any) -> None:
        if self.ema is not None:
            self.ema.close()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def state_dict(self) -> dict[str, Any]:
        return state_of(self.ema) if self.ema is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._state = state_dict
