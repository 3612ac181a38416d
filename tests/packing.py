"""A small run whose averages are stored, and differences read by other means than ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from posthoc_cli.storage import fingerprint, read_header

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


def write_first_version(folder: Path, made: dict[tuple[int, str], Tensors]) -> Path:
    """The same as float16 differences to the step before, as the format's first version had them:
    the first and fourth step of width 0.05 are whole."""
    folder.mkdir()
    last: dict[str, tuple[Path, Tensors]] = {}
    for (step, width), tensors in made.items():
        path = folder / f"ema-{step:04d}-{width}.safetensors"
        metadata = {"step": str(step), "sigma_rel": width}
        if width == "0.05" and step in (20, 80):
            save_file(tensors, path, metadata)
            last = {"0.05": (path, tensors)}
            continue
        base, values = last.get(width, last["0.05"])
        own = {"count": tensors["count"]}
        for name in ("a.weight", "b.bias"):
            difference = np.ldexp(tensors[name] - values[name].astype(np.float64), 12)
            own[name] = difference.astype(np.float16)
        metadata |= {"encoding": "delta-1", "base": base.name, "scale": "-12"}
        save_file(own, path, metadata | {"base_fingerprint": fingerprint(read_header(base))})
        last[width] = path, rebuilt(path)
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


def rebuilt(path: Path, known: dict[Path, Tensors] | None = None) -> Tensors:
    """A snapshot by the description of the format in the documentation; of each in `known` it is
    known already."""
    known = {} if known is None else known
    if path in known:
        return known[path]
    metadata, tensors = stored(path)
    values = {name: each for name, (_, each) in tensors.items()}
    if "encoding" in metadata:
        bases = [(rebuilt(path.with_name(name), known), c) for name, _, c in bases_in(metadata)]
        scales = json.loads(metadata.get("scales", "{}"))
        for name, (dtype, each) in tensors.items():
            exponent = scales.get(name, int(metadata["scale"]))
            if dtype not in ("I64", "BOOL") and exponent is not None:
                terms = [c * base[name].astype(np.float64) for base, c in bases]
                values[name] = sum(terms[1:], terms[0]) + each.astype(np.float64) * 2.0**exponent
        values = bases[0][0] | values
    known[path] = values
    return values


def bases_in(metadata: dict[str, str]) -> list[tuple[str, str, float]]:
    """Name, fingerprint and coefficient of each file that one is a difference to."""
    if metadata["encoding"] == "delta-1":
        return [(metadata["base"], metadata["base_fingerprint"], 1.0)]
    return [(name, known, c) for name, known, c in json.loads(metadata["bases"])]
