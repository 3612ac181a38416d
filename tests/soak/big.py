"""Snapshots beyond 4 GiB, tensors beyond 2^31 elements, and more snapshots than open files."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np

from posthoc_cli.storage.header import read_header
from tests.command import Run, run_command
from tests.soak.fuzz import MOST_BYTES, harm_of
from tests.soak.heavy import measured
from tests.soak.scenes import make_snapshots
from tests.soak.tally import Tally

SNAPSHOTS, OPEN_FILES = 2_000, 256

_ELEMENTS = 2**31 + 1_000_003
"""More than fits into 32 bits with a sign; as float16, more bytes than fit into 32 without."""

_PLACES = (0, 1, 2**30, 2**31 - 1, 2**31, _ELEMENTS - 1)
"""Where the snapshots have something else than zero."""


def big(seed: int, tally: Tally) -> None:
    """Sparse files for the size; a limit on open files for the number."""
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        base = Path(scratch)
        for dtype, stored in (("F16", np.dtype("<f2")), ("I8", np.dtype("i1"))):
            kind = f"single tensors of {_ELEMENTS:,} {dtype}"
            if shutil.disk_usage(base).free < 2 * _ELEMENTS * stored.itemsize:
                tally.skip(kind, "no room for the output")
            else:
                tally.count(kind, _large(base, dtype, stored, tally))
        for count, limit in ((SNAPSHOTS, OPEN_FILES), (100, 64)):
            losses = _many(base, count, limit, seed)
            tally.count(f"folders of {count:,} snapshots with {limit} open files", losses)


def _large(base: Path, dtype: str, stored: np.dtype[np.generic], tally: Tally) -> list[str]:
    """Two snapshots of one tensor; the output has what it should where they aren't zero."""
    folder = base / f"large-{dtype}"
    folder.mkdir()
    size = _ELEMENTS * stored.itemsize
    for step in (1000, 2000):
        entry = {"dtype": dtype, "shape": [_ELEMENTS], "data_offsets": [0, size]}
        metadata = {"step": str(step), "sigma_rel": "0.1"}
        header = json.dumps({"__metadata__": metadata, "w": entry}).encode()
        with open(folder / f"{step}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for number, place in enumerate(_PLACES):
                file.seek(8 + len(header) + place * stored.itemsize)
                file.write(stored.type(number + step // 1000).tobytes())
            file.truncate(8 + len(header) + size)
    words = ["synthesize", folder.name, "--sigma-rel", "0.12", "-o", "large.safetensors", "--json"]
    done = measured(words, base)
    losses = harm_of(done.run, codes=(0,))
    if done.bytes > MOST_BYTES:
        losses.append(f"took {done.bytes / 1e6:.0f} MB")
    if not losses:
        weights = [one["weight"] for one in done.run.json["targets"][0]["weights"]]
        losses += _wrong_values(base / "large.safetensors", stored, np.array(weights))
        shown = measured(["inspect", folder.name, "--json"], base).run.json["snapshots"]
        losses += [f"shown as {one}" for one in shown if one["parameters"] != _ELEMENTS]
    tally.figures.append(f"{dtype} at {2 * size / done.seconds / 1e6:.0f} MB/s read")
    (base / "large.safetensors").unlink(missing_ok=True)
    shutil.rmtree(folder)
    return losses


def _wrong_values(path: Path, stored: np.dtype[np.generic], weights: np.ndarray) -> list[str]:
    (part,) = read_header(path).parts
    values = np.memmap(path, stored, "r", part.data_start)
    averaged = stored.kind == "f"
    losses = [f"{len(values)} elements"] if len(values) != _ELEMENTS else []
    for number, place in enumerate(_PLACES):
        pair = np.array([number + 1, number + 2], np.float64)
        wanted = stored.type(weights @ pair) if averaged else stored.type(pair[-1])
        if values[place] != wanted:
            losses.append(f"element {place} is {values[place]}, not {wanted}")
    between = values[2**31 + 1 : 2**31 + 500_000]
    return losses + (["zeros are no longer zero"] if between.any() else [])


def _many(base: Path, count: int, limit: int, seed: int) -> list[str]:
    """All of them in one run, though only `limit` files may be open at once."""
    folder = base / f"many-{count}"
    make_snapshots(folder, count, megabytes=0.01, seed=seed)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    losses = []
    for arguments, check in (
        (["inspect", folder.name, "--json"], lambda run: len(run.json["snapshots"])),
        (["synthesize", folder.name, "--sigma-rel", "0.07", "--json", "-q"], _sources),
        (["synthesize", folder.name, "--sigma-rel", "0.07", "--json", "-q", "--method", "blup"],
         _sources),
    ):  # fmt: skip
        output = ["-o", "many.safetensors"] if arguments[0] == "synthesize" else []
        run = run_command(base, *arguments, *output, preexec_fn=limited)
        found = harm_of(run, codes=(0,))
        if not found and check(run) != count:
            found.append(f"{check(run)} snapshots")
        losses += [f"{' '.join(arguments)}: {one}" for one in found]
        (base / "many.safetensors").unlink(missing_ok=True)
    shutil.rmtree(folder)
    left = [name for name in os.listdir(base) if name.endswith(".posthoc-tmp")]
    return losses + [f"left {name}" for name in left]


def _sources(run: Run) -> int:
    return len(run.json["targets"][0]["weights"])
