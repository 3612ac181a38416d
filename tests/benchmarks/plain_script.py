"""The straightforward script: every tensor of every file, into a dict of float32, saved at the end.

    python plain_script.py FOLDER WEIGHTS.json OUTPUT

WEIGHTS.json is what `posthoc solve --json` prints.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

folder, weights, output = sys.argv[1:]
total: dict[str, torch.Tensor] = {}
dtypes = {}
for entry in json.loads(Path(weights).read_text())["targets"][0]["weights"]:
    with safe_open(Path(folder) / entry["file"], framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            dtypes[name] = tensor.dtype
            if name in total:
                total[name].add_(tensor.float(), alpha=entry["weight"])
            else:
                total[name] = tensor.float() * entry["weight"]
save_file({name: tensor.to(dtypes[name]) for name, tensor in total.items()}, output)
