"""A callback for the Trainer of Hugging Face transformers.

from posthoc_cli.adapters.transformers import PostHocEMACallback

Trainer(..., callbacks=[PostHocEMACallback(sigma_rels=(0.05, 0.10), folder="snapshots")])
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from posthoc_cli.errors import UsageError
from posthoc_cli.storage.stores import file_status
from posthoc_cli.training.adapters import state_of
from posthoc_cli.training.posthoc_ema import PostHocEMA

STATE = "posthoc-ema.pt"
"""The file in a checkpoint of the Trainer that holds the averages."""


class PostHocEMACallback(TrainerCallback):
    """Track post-hoc EMAs of the Trainer's model.

    All other arguments are those of PostHocEMA. Steps are the Trainer's `global_step`. The
    averages are saved with each of its checkpoints; `train(resume_from_checkpoint=...)` takes them
    from `output_dir/checkpoint-<step>`, or from the folder `resume_from` if that is given. `ema` is
    the tracker, from the start of training on. Of a sharded network the averages are saved whole.

    Raises UsageError when training is resumed from a checkpoint that has no averages.
    """

    def __init__(
        self,
        sigma_rels: Any = None,
        *,
        resume_from: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.ema: PostHocEMA | None = None
        self._resume_from = resume_from
        self._options = {"sigma_rels": sigma_rels, **options}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.ema = PostHocEMA(model, **self._options)
        if not state.global_step:
            return
        path = Path(self._resume_from or _checkpoint(args, state)) / STATE
        if file_status(path) is None:
            raise UsageError(
                str(path),
                f"doesn't exist, and training resumes at step {state.global_step}",
                "give resume_from=, the checkpoint's folder, or begin anew without the checkpoint",
            )
        self.ema.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ema is not None:
            self.ema.update(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ema is None or args.save_only_model:
            return
        averages = state_of(self.ema)
        if state.is_world_process_zero:
            torch.save(averages, _checkpoint(args, state) / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ema is not None:
            self.ema.close()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
