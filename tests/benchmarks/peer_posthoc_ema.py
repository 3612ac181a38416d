"""Synthesize with pytorch-posthoc-ema, from checkpoints to one float16 safetensors file.

    python peer_posthoc_ema.py CHECKPOINTS SIGMA_RELS SIGMA_REL OUTPUT

What was chosen, by measurement, all to its advantage:
- its checkpoints are mapped rather than read (a setting of torch, off by default): less copying;
- a stand-in is given for the model: without one it loads every checkpoint twice, and a real one it
  would copy for each profile, while synthesizing needs neither;
- float32 for the sums, its default. It solves for the weights in float32 then too, which costs it
  some of their digits; float64 would mend that, and takes longer;
- threads are torch's default;
- the result goes straight to the file: it isn't flushed to disk, as posthoc's is.
"""

import sys

import torch
import torch.utils.serialization
import torch.utils.serialization.config
from posthoc_ema import PostHocEMA
from safetensors.torch import save_file

torch.utils.serialization.config.load.mmap = True
folder, sigma_rels, sigma_rel, output = sys.argv[1:]
ema = PostHocEMA.from_path(
    folder, torch.nn.Linear(1, 1), sigma_rels=tuple(map(float, sigma_rels.split(",")))
)
with torch.no_grad(), ema.state_dict(sigma_rel=float(sigma_rel)) as state:
    save_file({name.removeprefix("ema_model."): t for name, t in state.items()}, output)
