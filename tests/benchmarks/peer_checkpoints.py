"""Write posthoc snapshots again as the checkpoints that ema-pytorch's PostHocEMA reads.

    python peer_checkpoints.py FOLDER WEIGHTS.json CHECKPOINTS

WEIGHTS.json is what `posthoc solve --json` prints: it says which profile and step each file has.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

folder, weights, checkpoints = map(Path, sys.argv[1:])
entries = json.loads(weights.read_text())["targets"][0]["weights"]
profiles = sorted({entry["sigma_rel"] for entry in entries})
for entry in entries:
    # PostHocEMA.checkpoint writes everything in half precision, its two counters too.
    state = {"initted": torch.tensor(1.0).half(), "step": torch.tensor(float(entry["step"])).half()}
    for name, tensor in load_file(folder / entry["file"]).items():
        state[f"ema_model.{name}"] = tensor.clone()
    index = profiles.index(entry["sigma_rel"])
    torch.save(state, checkpoints / f"{index}.{entry['step']}.pt")
