"""Synthesize with ema-pytorch's PostHocEMA, from checkpoints to one float16 safetensors file.

    python peer_ema_pytorch.py CHECKPOINTS SIGMA_RELS SIGMA_REL OUTPUT

What was chosen, by measurement, all to its advantage:
- its checkpoints are mapped rather than read (a setting of torch, off by default): less copying;
- the networks it needs are made empty by `ema_model=`, where by default it copies the model four
  times;
- the network is float32. In float16 it takes about as long, and every addition is rounded to half
  precision: the result is then up to hundreds of units in the last place off;
- threads are torch's default;
- the result goes straight to the file: it isn't flushed to disk, as posthoc's is.
Version 0.8.3 keeps the target's gamma, which an earlier one overwrote: its numbers are right.
"""

import sys
from pathlib import Path

import torch
import torch.utils.serialization
import torch.utils.serialization.config
from ema_pytorch import PostHocEMA
from safetensors.torch import save_file

torch.utils.serialization.config.load.mmap = True
folder, sigma_rels, sigma_rel, output = sys.argv[1:]
state = torch.load(next(Path(folder).glob("*.pt")), mmap=True, weights_only=True)
prefix = "ema_model."
shapes = {n.removeprefix(prefix): t.shape for n, t in state.items() if n.startswith(prefix)}


def network() -> torch.nn.Module:
    """A network with the parameters of the checkpoints, as the user's own code would make it."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape)))
    return root


with torch.no_grad():
    ema = PostHocEMA(
        network(),
        ema_model=network,
        sigma_rels=tuple(map(float, sigma_rels.split(","))),
        checkpoint_every_num_steps="manual",
        checkpoint_folder=folder,
    )
    synthesized = ema.synthesize_ema_model(sigma_rel=float(sigma_rel)).ema_model
    save_file({name: t.half() for name, t in synthesized.state_dict().items()}, output)
