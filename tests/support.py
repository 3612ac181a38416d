"""What several test modules need to make snapshots and to say what is right."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.solver.profiles import Profile
from posthoc_cli.storage import Reader, TensorIndex
from posthoc_cli.storage.dtypes import DTYPES
from posthoc_cli.storage.header import TensorInfo, read_header
from posthoc_cli.synthesis.plan import TensorPlan, make_plan, newest_of

STORED = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The NumPy dtype of what safetensors calls by each name."""

NAMES = {dtype: name for name, dtype in STORED.items()}

Tensors = Mapping[str, npt.NDArray]


def write_layout(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
) -> None:
    """Write a safetensors file of any dtypes, with its tensors in any order."""
    entries: dict = {"__metadata__": dict(metadata)} if metadata else {}
    blob = b""
    for name in order or list(tensors):
        dtype, shape = tensors[name]
        size = int(np.prod(shape)) * DTYPES[dtype].bits // 8
        content = data[name] if data else bytes(size)
        assert len(content) == size
        offsets = [len(blob), len(blob) + size]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        blob += content
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + blob)


def write_tensors(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
) -> None:
    """Write arrays, bfloat16 and float8 ones of ml_dtypes included."""
    write_layout(
        path,
        {name: (NAMES[array.dtype], array.shape) for name, array in tensors.items()},
        {name: array.tobytes() for name, array in tensors.items()},
        metadata,
        order,
    )


def write_shards(
    folder: Path,
    tensors: Tensors,
    groups: Sequence[Sequence[str]] = (),
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> Path:
    """Write `tensors` as shards: one for each group of names, or each name. Returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    groups, places = groups or [[name] for name in tensors], {}
    for at, names in enumerate(groups, 1):
        file = f"{stem}-{at:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in names}, metadata)
        places |= dict.fromkeys(names, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def read_tensors(path: Path) -> dict[str, npt.NDArray]:
    """Every tensor of a file, as an array."""
    layout = read_header(path)
    data = path.read_bytes()[layout.parts[0].data_start :]
    return {
        name: np.frombuffer(data[info.start : info.end], STORED[info.dtype]).reshape(info.shape)
        for name, info in layout.tensors.items()
    }


def snapshot_of(
    path: Path,
    step: int,
    cache: dict[bytes, Mapping[str, TensorInfo]] | None = None,
    gamma: float = 6.94,
) -> Snapshot:
    layout = read_header(path, cache)
    return Snapshot(layout, Profile(step, gamma), "metadata")


def write_kohya(
    path: Path, value: float, *, alpha: npt.NDArray | None = None, **metadata: str
) -> None:
    """A small LoRA as kohya's trainers write it, all factors `value`; keywords are its metadata."""
    alpha = np.array(8, np.float16) if alpha is None else alpha
    tensors = {}
    for module in ("lora_te_q", "lora_unet_mid_block_k"):
        tensors[f"{module}.alpha"] = alpha
        tensors[f"{module}.lora_down.weight"] = np.full((4, 16), value, np.float16)
        tensors[f"{module}.lora_up.weight"] = np.full((16, 4), value, np.float16)
    stated = {"ss_output_name": "x", "ss_network_alpha": "8", "ss_network_dim": "4"}
    write_tensors(path, tensors, stated | metadata)


def plan_of(snapshots: Sequence[Snapshot], **options: Any) -> TensorPlan:
    """The plan of a set of snapshots, as the library makes it."""
    newest = newest_of([snapshot.step for snapshot in snapshots])
    return make_plan([snapshot.index for snapshot in snapshots], newest, **options)


def contents(index: TensorIndex) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor, read as the engine reads them."""
    found = {}
    with Reader(index) as reader:
        for name, info in index.tensors.items():
            data = bytearray(info.end - info.start)
            reader.read(info.start, memoryview(data))
            found[name] = info.dtype, info.shape, bytes(data)
        reader.check_unchanged()
    return found
