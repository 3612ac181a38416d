"""The straightforward script: every tensor of every file, added to a dict of float32, then saved.

    python plain_script.py FOLDER WEIGHTS.json OUTPUT [--in-place]

WEIGHTS.json is what `posthoc solve --json` prints. With --in-place it is written as someone would
who knows torch well: without a temporary tensor for each product.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

folder, weights, output, *options = sys.argv[1:]
total: dict[str, torch.Tensor] = {}
dtypes = {}
for entry in json.loads(Path(weights).read_text())["targets"][0]["weights"]:
    weight = entry["weight"]
    with safe_open(Path(folder) / entry["file"], framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            dtypes[name] = tensor.dtype
            if name not in total:
                total[name] = tensor.float() * weight
            elif options:
                total[name].add_(tensor.float(), alpha=weight)
            else:
                total[name] += tensor.float() * weight
save_file({name: tensor.to(dtypes[name]) for name, tensor in total.items()}, output)
