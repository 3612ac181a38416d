"""NaN, infinity and sums that an output's dtype can't hold: planted, counted, told or refused."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tests.command import Run
from tests.soak.fuzz import harm_of, run_here
from tests.soak.tally import Tally
from tests.support import write_tensors

ROUNDS = 60

TENSORS = ("body.weight", "head.weight", "neck.weight")
_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)

Planted = dict[str, tuple[int, int, set[str]]]
"""Of each tensor how many NaN and infinities were put into it, and into which files."""


def values(seed: int, tally: Tally, rounds: int = ROUNDS) -> None:
    """As many folders with something planted, and as many whose sums are too large."""
    rng = random.Random(f"values/{seed}")
    for _ in range(rounds):
        tally.count("folders with NaN or infinity", _scene(rng, _plant))
        tally.count("sums too large for float16", _scene(rng, _too_large))
        tally.count("folders of finite numbers", _scene(rng, lambda rng, files: {}))


def _scene(rng: random.Random, spoil: Any) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="posthoc-soak-") as scratch:
        base = Path(scratch)
        (base / "snapshots").mkdir()
        dtype = np.dtype(rng.choice(_DTYPES))
        if spoil is _too_large:
            dtype = np.dtype(np.float32)
        count = rng.choice((2, 5, 18))
        files = {f"s{at}.safetensors": _network(rng, dtype) for at in range(count)}
        planted = spoil(rng, files)
        for at, (name, tensors) in enumerate(files.items()):
            metadata = {"step": str(1000 + 100 * (at // 2)), "sigma_rel": ("0.05", "0.1")[at % 2]}
            write_tensors(base / "snapshots" / name, tensors, metadata)
        method = rng.choice(("edm2", "algorithm3", "blup"))
        return _told(base, planted, method, too_large=spoil is _too_large)


def _network(rng: random.Random, dtype: np.dtype[Any]) -> dict[str, npt.NDArray[Any]]:
    made = np.random.default_rng(rng.getrandbits(32))
    shapes = dict.fromkeys(TENSORS, (50, 41)) | {TENSORS[0]: (3,)}
    return {name: made.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _plant(rng: random.Random, files: dict[str, dict[str, npt.NDArray[Any]]]) -> Planted:
    planted: Planted = {}
    places = {
        (rng.choice(list(files)), name, rng.randrange(files["s0.safetensors"][name].size))
        for name in rng.sample(TENSORS, rng.randint(1, 2))
        for _ in range(rng.choice((1, 2, 7)))
    }
    for file, name, place in sorted(places):
        nan = rng.random() < 0.5
        value = np.nan if nan else rng.choice((np.inf, -np.inf))
        files[file][name].reshape(-1)[place] = value
        nans, infinities, where = planted.get(name, (0, 0, set()))
        planted[name] = (nans + nan, infinities + (not nan), where | {file})
    return planted


def _too_large(rng: random.Random, files: dict[str, dict[str, npt.NDArray[Any]]]) -> Planted:
    """Float32, in which they are well: the output is to be float16, which ends at 65,504."""
    name, place = rng.choice(TENSORS), rng.randrange(3)
    for tensors in files.values():
        tensors[name].reshape(-1)[place] = rng.uniform(2e5, 3e5)
    return {name: (0, 0, set())}


def _told(base: Path, planted: Planted, method: str, *, too_large: bool) -> list[str]:
    output = base / "x.safetensors"
    words = ["synthesize", str(base / "snapshots"), "--sigma-rel", "0.07", "--method", method]
    words += ["-o", str(output), "--json", *(["--dtype", "float16"] if too_large else [])]
    losses = []
    if planted and method == "blup" and not too_large:
        words[words.index("blup")] = "edm2"  # it needs a sample of finite values to go by
    strict = run_here([*words, "--strict"])
    losses += harm_of(strict, codes=(3,) if planted else (0,))
    if planted and (
        output.exists() or sorted(os.listdir(base)) != ["snapshots"] or "--strict" not in strict.err
    ):
        losses.append(f"--strict left {sorted(os.listdir(base))}, and said {strict.err!r}")
    output.unlink(missing_ok=True)
    run = run_here(words)
    losses += harm_of(run, codes=(0,))
    losses += [] if losses else _counted(run, planted, too_large=too_large)
    shutil.rmtree(base / "snapshots")
    return losses


def _counted(run: Run, planted: Planted, *, too_large: bool) -> list[str]:
    found = run.json["nonfinite"]
    losses = []
    if too_large:
        (name,) = planted
        if [(one["tensor"], one["overflowed"]) for one in found] != [(name, 1)]:
            losses.append(f"of one sum too large in {name}: {found}")
        if f"'{name}'" not in run.err or "--dtype bfloat16 or float32" not in run.err:
            losses.append(f"says no dtype that holds it: {run.err!r}")
        return losses
    counted = {one["tensor"]: (one["nan"], one["infinite"], set(one["files"])) for one in found}
    if counted != planted:
        losses.append(f"counted {counted}, planted {planted}")
    first = min(planted, default=None)
    if (f"tensor '{first}'" in run.err) != bool(planted):
        losses.append(f"the first tensor is {first}, and stderr {run.err!r}")
    return losses
