"""Train a small network with the trackers of ema-pytorch and pytorch-posthoc-ema beside it.

    python peer_training.py OUT STEPS EVERY UPDATE_EVERY SIGMA_RELS TARGETS

Their checkpoints go to OUT/ema-pytorch and OUT/posthoc-ema. OUT/exact.pt gets, for each target, the
average that is meant, tracked at every step in float64, and the network itself; OUT/loaded.pt what
each tool makes of its last checkpoints, by its own loader.
"""

import copy
import json
import sys
from pathlib import Path

import ema_pytorch
import posthoc_ema
import torch
from posthoc_ema.karras_ema import KarrasEMA

out, steps, every, update_every = Path(sys.argv[1]), *map(int, sys.argv[2:5])
sigma_rels, targets = (tuple(map(float, text.split(","))) for text in sys.argv[5:7])
torch.manual_seed(0)
torch.set_num_threads(1)


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.BatchNorm1d(64), torch.nn.SiLU(),
        torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8),
    )  # fmt: skip


model, teacher = network(), network()
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
first = ema_pytorch.PostHocEMA(
    model, sigma_rels=sigma_rels, update_every=update_every, checkpoint_every_num_steps=every,
    checkpoint_folder=str(out / "ema-pytorch"),
)  # fmt: skip
second = posthoc_ema.PostHocEMA.from_model(
    model, out / "posthoc-ema", max_checkpoints=10**6, sigma_rels=sigma_rels,
    update_every=update_every, checkpoint_every=every,
)  # fmt: skip
gammas = [ema_pytorch.post_hoc_ema.sigma_rel_to_gamma(target) for target in targets]


def doubles() -> dict[str, torch.Tensor]:
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


exact = [doubles() for _ in targets]
for step in range(1, steps + 1):
    inputs = torch.randn(32, 32)
    with torch.no_grad():
        wanted = teacher(inputs) + 0.3 * torch.randn(32, 8)
    loss = torch.nn.functional.mse_loss(model(inputs), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    first.update()
    second.update_(model)
    now = doubles()
    for average, gamma in zip(exact, gammas, strict=True):
        decay = (1 - 1 / step) ** (1 + gamma)
        for name in average:
            average[name].lerp_(now[name], 1 - decay)
torch.save({"exact": exact, "network": now}, out / "exact.pt")

loaded = {}
for index, sigma_rel in enumerate(sigma_rels):
    tracker = ema_pytorch.post_hoc_ema.KarrasEMA(copy.deepcopy(model), sigma_rel=sigma_rel)
    file = f"{index}.{steps}.pt"
    tracker.load_state_dict(torch.load(out / "ema-pytorch" / file, weights_only=True))
    loaded[f"ema-pytorch/{file}"] = tracker.ema_model.state_dict()
    tracker = KarrasEMA(copy.deepcopy(model), sigma_rel=sigma_rel)
    tracker.load_state_dict(torch.load(out / "posthoc-ema" / file, weights_only=True))
    loaded[f"posthoc-ema/{file}"] = tracker.ema_model.state_dict()
torch.save(loaded, out / "loaded.pt")
print(json.dumps({"ema-pytorch": gammas, "loss": loss.item()}))
