"""A small run whose averages are stored, and differences read by other means than ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

WIDTHS = {"0.05": 16.97, "0.10": 6.94}
DTYPES = {"F16": "<f2", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}

Tensors = dict[str, np.ndarray[Any, Any]]


def averages(
    steps: int = 6, seed: int = 0, dtype: Any = np.float32
) -> dict[tuple[int, str], Tensors]:
    """Averages of a random walk, by step and width; some tensors never change, one is a counter."""
    rng = np.random.default_rng(seed)
    made: dict[tuple[int, str], Tensors] = {}
    weights = {"a.weight": rng.normal(size=(40, 70)), "b.bias": 1e-4 * rng.normal(size=9)}
    before = {width: {name: 0 * each for name, each in weights.items()} for width in WIDTHS}
    for step in range(1, 20 * steps + 1):
        for each in weights.values():
            each += 0.03 * each.std() * rng.normal(size=each.shape)
        for width, gamma in WIDTHS.items():
            beta = (1 - 1 / step) ** (gamma + 1)
            for name, each in weights.items():
                before[width][name] = beta * before[width][name] + (1 - beta) * each
            if step % 20 == 0:
                made[step, width] = {
                    **{name: each.astype(dtype) for name, each in before[width].items()},
                    "frozen": np.array([0.1, -0.0, np.inf, 1e-40], dtype),
                    "count": np.array(step, np.int64),
                    "mask": np.array([True, False]),
                    "none": np.zeros((0, 2), dtype),
                }
    return made


def write(folder: Path, made: dict[tuple[int, str], Tensors]) -> Path:
    folder.mkdir(exist_ok=True)
    for (step, width), tensors in made.items():
        path = folder / f"ema-{step:04d}-{width}.safetensors"
        save_file(tensors, path, {"step": str(step), "sigma_rel": width})
    return folder


def stored(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, np.ndarray[Any, Any]]]]:
    """The metadata of a file, and its tensors with their dtypes."""
    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = (8 + length + each for each in entry["data_offsets"])
            kind = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "BOOL": "?"} | DTYPES
            values = np.frombuffer(data[first:last], kind[entry["dtype"]])
            found[name] = entry["dtype"], values.reshape(entry["shape"])
    return metadata, found


def rebuilt(path: Path) -> Tensors:
    """A snapshot by the description of the format in the documentation."""
    metadata, tensors = stored(path)
    values = {name: each for name, (_, each) in tensors.items()}
    if "encoding" not in metadata:
        return values
    bases = [(rebuilt(path.with_name(name)), c) for name, _, c in bases_in(metadata)]
    scales = json.loads(metadata.get("scales", "{}"))
    found = dict(bases[0][0])
    for name, (dtype, each) in tensors.items():
        exponent = scales.get(name, int(metadata["scale"]))
        if dtype in ("I64", "BOOL") or exponent is None:
            found[name] = each
        else:
            terms = [c * base[name].astype(np.float64) for base, c in bases]
            found[name] = sum(terms[1:], terms[0]) + each.astype(np.float64) * 2.0**exponent
    return found


def bases_in(metadata: dict[str, str]) -> list[tuple[str, str, float]]:
    """Name, fingerprint and coefficient of each file that one is a difference to."""
    if metadata["encoding"] == "delta-1":
        return [(metadata["base"], metadata["base_fingerprint"], 1.0)]
    return [(name, known, c) for name, known, c in json.loads(metadata["bases"])]
