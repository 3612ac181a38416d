"""Snapshots to work on, and the commands whose outputs must come out whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.command import Run, start_command

TEMPORARY = ".posthoc-tmp"
"""How the names of unfinished outputs end."""

Files = dict[str, bytes]
"""The files of a folder, by their paths below it."""


def make_snapshots(folder: Path, count: int = 6, megabytes: float = 16, seed: int = 0) -> None:
    """`count` snapshots of `megabytes` each, in float16, at two profiles."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    elements = int(megabytes * 500_000) // 4
    base = [rng.standard_normal(elements).astype(np.float16) for _ in range(4)]
    for at in range(count):
        step, sigma_rel = 1000 * (at // 2 + 1), ("0.05", "0.10")[at % 2]
        tensors = {f"layer{k}.weight": one + np.float16(at) for k, one in enumerate(base)}
        metadata = {"step": str(step), "sigma_rel": sigma_rel}
        save_file(tensors, folder / f"ema-{step}-{sigma_rel}.safetensors", metadata)


def make_checkpoints(folder: Path, count: int = 4, megabytes: float = 16, seed: int = 0) -> None:
    """`count` checkpoints of torch, which names give step and profile of."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for at in range(count):
        weight = torch.randn(int(megabytes * 250_000), generator=generator)
        torch.save({"layer.weight": weight}, folder / f"run_{1000 * (at + 1)}_6.94.pt")


@dataclass(frozen=True)
class Scene:
    """A command, run in `base` again and again; it writes to the folder `written` there.

    `old` is what is there before, `new` what a whole run leaves. An output in shards
    stands when its `index` does: until then it is absent, whatever files lie around. Of one that is
    a folder the manifest is taken for that.
    """

    name: str
    base: Path
    arguments: Sequence[str]
    old: Files = field(default_factory=dict)
    new: Files = field(default_factory=dict)
    index: str | None = None
    several: bool = False
    """Whether it gets several outputs, each of which appears by itself."""
    seconds: float = 0.0
    writing: float = 0.0
    """How long the command takes, and how long of that it has something to write."""

    @property
    def work(self) -> Path:
        return self.base / "written"

    def reset(self, files: Files | None = None) -> None:
        """Put `work` back to what it was."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name, content in (self.old if files is None else files).items():
            (self.work / name).parent.mkdir(exist_ok=True)
            (self.work / name).write_bytes(content)

    def start(self, **options: object) -> subprocess.Popen[str]:
        """The command, started."""
        return start_command(self.base, *self.arguments, **options)

    def run(self, **options: object) -> Run:
        with self.start(**options) as process:
            out, err = process.communicate()
        return Run(process.returncode, out, err)

    def files(self) -> Files:
        """The files in `work`, but for unfinished ones."""
        return {
            path.relative_to(self.work).as_posix(): path.read_bytes()
            for path in self.work.rglob("*")
            if path.is_file() and not path.relative_to(self.work).parts[0].endswith(TEMPORARY)
        }

    def left_behind(self) -> list[str]:
        """The unfinished files in `work`."""
        return [name for name in os.listdir(self.work) if name.endswith(TEMPORARY)]

    def harm(self) -> list[str]:
        """What is neither as before nor as a whole run leaves it."""
        found = self.files()
        if found in (self.old, self.new):
            return []
        whole = all(content in _either(self, name) for name, content in found.items())
        absent = self.index is not None and self.index not in found
        if whole and (absent or self.several):
            return []
        return [f"{name} ({len(content):,} bytes)" for name, content in found.items()]

    def harm_of_another_run(self) -> list[str]:
        """What is wrong when the command is run again, whatever was there."""
        found = self.files()
        stands = bool(found) and (self.index is None or self.index in found) and not self.several
        again = Scene(self.name, self.base, [*self.arguments, *(["--force"] if stands else [])])
        run = again.run()
        if run.code != 0:
            return [f"another run ended in {run.code}: {run.err!r}"]
        losses = [f"another run left {name}" for name in self.left_behind()]
        after = self.files()
        kept = {name: content for name, content in after.items() if name in self.new}
        if kept != self.new or (set(after) - set(self.new)) - set(self.old):
            losses.append(f"another run gave {sorted(after)}")
        return losses


def _either(scene: Scene, name: str) -> tuple[bytes | None, ...]:
    return scene.old.get(name), scene.new.get(name)


def _measured(scene: Scene) -> Scene:
    """The scene with what a whole run leaves, and its times."""
    scene.reset()
    begin = time.monotonic()
    first_write = None
    with scene.start() as process:
        while process.poll() is None:
            if first_write is None and scene.left_behind():
                first_write = time.monotonic()
            time.sleep(0.001)
        _, err = process.communicate()
    end = time.monotonic()
    assert process.returncode == 0, err
    return Scene(
        scene.name,
        scene.base,
        scene.arguments,
        scene.old,
        scene.files(),
        scene.index,
        scene.several,
        end - begin,
        end - (first_write or begin),
    )


def scenes(base: Path, megabytes: float = 16, seed: int = 0) -> Iterator[Scene]:
    """The commands that write, each in a folder of its own below `base`."""
    rng = np.random.default_rng(seed)
    make_snapshots(base / "snapshots", megabytes=megabytes, seed=seed)
    words = ["synthesize", "../snapshots", "--sigma-rel", "0.07", "-o"]
    one = "written/x.safetensors"
    shards = ["--max-shard-size", f"{megabytes / 4:g}MB"]
    index = "x.safetensors.index.json"

    yield _scene(base, "synthesize", [*words, one])
    yield _scene(
        base, "synthesize --force", [*words, one, "--force"], old={"x.safetensors": rng.bytes(99)}
    )
    sharded = _scene(base, "synthesize in shards", [*words, one, *shards], index=index)
    yield sharded
    other = [*words[:3], "0.06", "-o", one, *shards, "--force"]
    yield _scene(base, "shards over shards", other, old=sharded.new, index=index)
    (base / "snapshots" / "config.json").write_bytes(rng.bytes(99))
    folder = [*words, "written/x", "--layout", "folder"]
    manifest = "x/posthoc.json"
    whole = _scene(base, "a folder", folder, index=manifest)
    yield whole
    other = [*other[:3], "0.06", "-o", *folder[5:], "--force"]
    yield _scene(base, "a folder over a folder", other, old=whole.new, index=manifest)
    make_checkpoints(base / "checkpoints", megabytes=megabytes, seed=seed)
    yield _scene(base, "convert", ["convert", "../checkpoints", "written"], several=True)
    packed = "pack ../snapshots written --dtype float8_e4m3fn --keyframe-every 2"
    yield _scene(base, "pack", packed.split(), several=True)


def scenes_of_several(base: Path, seed: int = 0) -> Iterator[Scene]:
    """More of them, with the snapshots of `scenes`: several targets, pictures, a file to shards."""
    rng = np.random.default_rng(seed)
    words = ["synthesize", "../snapshots", "-o"]
    four = [*words, "written/{sigma_rel}.safetensors", "--sigma-rel", "0.06,0.07,0.08,0.09"]
    old = {f"0.0{at}.safetensors": rng.bytes(99) for at in range(6, 10)}
    yield _scene(base, "four targets", four, several=True)
    yield _scene(base, "four targets --force", [*four, "--force"], old=old, several=True)
    shards = [*words, "written/x.safetensors", "--sigma-rel", "0.07", "--max-shard-size", "12kB"]
    index = "x.safetensors.index.json"
    one = {"x.safetensors": rng.bytes(99)}
    more = _scene(base, "more shards", shards, index=index)
    yield _scene(base, "shards over a file", [*shards, "--force"], old=one, index=index)
    fewer = [*shards[:-1], "25kB", "--force"]
    yield _scene(base, "fewer shards", fewer, old=more.new, index=index)
    plot = ["plot", "../snapshots", "--sigma-rel", "0.07", "-o", "written/x.png"]
    yield _scene(base, "plot", plot)
    yield _scene(base, "plot --force", [*plot, "--force"], old={"x.png": rng.bytes(99)})


def _scene(base: Path, name: str, arguments: Sequence[str], **more: object) -> Scene:
    folder = base / name.replace(" ", "-")
    folder.mkdir()
    return _measured(Scene(name, folder, arguments, **more))  # type: ignore[arg-type]
