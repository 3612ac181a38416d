"""The library: a folder of snapshots in, any other average out.

    run = open_snapshots("snapshots")
    solution = run.solve(sigma_rel=[0.05, 0.10])
    paths = solution.save("emas/ema-{sigma_rel}.safetensors")

This is the one pipeline: the command line, the trackers and `verify` go through it. Everything
raises PosthocError or one of its kinds, whose messages name files and arguments.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli.errors import SnapshotError, UsageError, percent
from posthoc_cli.snapshots import FolderContents, read_folder, select
from posthoc_cli.snapshots.snapshot import Snapshot, check_norms
from posthoc_cli.solver import METHODS, choose_method, solve
from posthoc_cli.solver import Profile as Profile
from posthoc_cli.solver.arrays import resolve_device
from posthoc_cli.solver.targets import Target, make_targets

if TYPE_CHECKING:
    import torch

    from posthoc_cli.snapshots.sampling import SampleMoments
    from posthoc_cli.solver import METHODS, SolvedWeights, choose_method, solve
    from posthoc_cli.solver.arrays import FloatArray
    from posthoc_cli.solver.blup import ExpectedError, Trajectory
    from posthoc_cli.solver.estimates import MethodEstimate
    from posthoc_cli.synthesis.outputs import Saved
    from posthoc_cli.synthesis.plan import TensorPlan
    from posthoc_cli.synthesis.verification import Report

Progress = Callable[[int, int], None]
"""Called, from any thread, with the bytes just read and all that there are to read."""

Numbers = float | Iterable[float] | None
"""A number, several, or none."""


def open_snapshots(
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    pattern: str | None = None,
    profiles: Sequence[float] | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    run: str | None = None,
    raw: bool = False,
    skip_incomplete: bool = False,
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> Run:
    """Read which snapshots a folder holds; their headers only.

    Arguments:
        folder: the folder of snapshots; or a list of files and folders that lie in one.
        pattern: a file-name pattern, such as "run7_{step}_{sigma_rel}.safetensors".
        profiles: the sigma_rel values that `{index}` counts, from index 0 on.
        only: globs for the files to use, by name or path below the folder; no other is opened.
        exclude: globs for those to leave out.
        run: of several training runs in the folder, the one to use.
        raw: the files are no EMAs but plain checkpoints, of which only the steps are to be known.
        skip_incomplete: leave out files whose end is missing, instead of taking them for problems.
        copy, drop: those that `save` will be given: what is odd in these tensors is no problem.

    What is wrong with single files is collected in `problems`. Raises UsageError when an argument
    or the folder doesn't fit, SnapshotError when there is no safetensors file, MachineError when
    the folder or a file can't be read.
    """
    contents = read_folder(
        folder,
        pattern=pattern,
        profiles=profiles,
        only=only,
        exclude=exclude,
        run=run,
        raw=raw,
        skip_incomplete=skip_incomplete,
        copy=copy,
        drop=drop,
    )
    return Run(contents, raw)


@dataclass(frozen=True, slots=True)
class Run:
    """The snapshots of one training run, as `open_snapshots` found them."""

    contents: FolderContents
    raw: bool
    _plans: dict[Any, TensorPlan] = field(default_factory=dict, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        return self.contents.folder

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those with a step and a profile, by step, sigma_rel and file name."""
        return self.contents.snapshots

    @property
    def problems(self) -> list[tuple[str, str]]:
        """What keeps the snapshots from being used: file, and what is wrong with it."""
        return self.contents.problems

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """What was left out: file, and why."""
        return self.contents.skipped

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """What is odd, but stops nothing: file (or ""), and what it is."""
        return self.contents.warnings

    def until(self, step: int | None = None) -> tuple[list[Snapshot], int]:
        """The snapshots to use for a target step, and that step: by default the last snapshot's.

        They are those not after it; of thousands that can't be solved together, those that add
        most. Raises SnapshotError for the first of the `problems`, UsageError for a step out of
        range.
        """
        from posthoc_cli.solver.choice import usable

        snapshots, step = select(self.contents.usable(), step)
        return [snapshots[at] for at in usable([each.profile for each in snapshots])], step

    def plan(
        self,
        step: int | None = None,
        *,
        dtype: str = "same",
        copy: Sequence[str] = (),
        drop: Sequence[str] = (),
    ) -> TensorPlan:
        """Which bytes an output is made of; what `save` does, apart from the weights.

        Raises what `until` does; UsageError for an unknown dtype or a glob that fits no tensor,
        SnapshotError for a tensor whose dtype has no average.
        """
        from posthoc_cli.synthesis.plan import make_plan, newest_of

        snapshots, step = self.until(step)
        key = step, dtype, tuple(copy), tuple(drop)
        if key not in self._plans:
            newest = newest_of([snapshot.step for snapshot in snapshots])
            sources = [snapshot.index for snapshot in snapshots]
            self._plans[key] = make_plan(sources, newest, dtype=dtype, copy=copy, drop=drop)
        return self._plans[key]

    def paths(
        self,
        output: str | os.PathLike[str],
        *,
        sigma_rel: Numbers = None,
        gamma: Numbers = None,
        step: int | None = None,
    ) -> list[Path]:
        """Where `solve(...).save(output)` will write; raises UsageError where it can't."""
        from posthoc_cli.synthesis.paths import output_paths

        name = self.folder.resolve().name
        _, step = self.until(step)
        return output_paths(os.fspath(output), name, make_targets(sigma_rel, gamma), step)

    def solve(
        self,
        *,
        sigma_rel: Numbers = None,
        gamma: Numbers = None,
        step: int | None = None,
        method: str | None = None,
        device: str = "cpu",
        sample: bool = False,
        leave_out: Sequence[str] = (),
        glance: bool = False,
    ) -> Solution:
        """The weights that rebuild other averages from these snapshots.

        Arguments:
            sigma_rel: relative widths of the EMAs that are wanted, 0 < sigma_rel < 12^-0.5.
            gamma: the same by exponent (eq. 123), gamma > -1.
            step: the target step, by default the last snapshot's; later snapshots are not used.
            method: "edm2" (the default: algorithm 3 of arXiv 2312.02696, weights rescaled to sum
                one), "algorithm3" (not rescaled), "blup" (least expected error); for raw
                checkpoints "share" (the default) or "blup".
            device: where to compute: "cpu", "cuda", "cuda:1" or "auto".
            sample: read a sample of the values even if the method needs none, to know the error
                that is to be expected.
            leave_out: globs of tensors that shall not be part of the sample.
            glance: without a sample, read a few values, to see if one is of another network.

        Raises UsageError for arguments out of bounds, SnapshotError for the first of the
        `problems`, or where no weights can be found, MachineError when a device or a file fails.
        """
        method = choose_method(method, self.raw)
        targets = make_targets(sigma_rel, gamma)
        device = resolve_device(device)
        snapshots, step = self.until(step)
        profiles = [snapshot.profile for snapshot in snapshots]
        wanted = [target.profile(step) for target in targets]
        if not METHODS[method].needs_values and not self.raw:
            check_norms(snapshots, method)
        moments = trajectory = expected = seen = None
        if sample or METHODS[method].needs_values:
            from posthoc_cli.snapshots.sampling import fit_snapshots

            moments, trajectory = fit_snapshots(snapshots, leave_out)
        elif glance:
            from posthoc_cli.snapshots.sampling import glance as glance_at

            seen = glance_at(snapshots, leave_out)
        solved = solve(profiles, wanted, method, device, trajectory)
        for target, total in zip(targets, solved.sum_of_weights.tolist(), strict=True):
            if not abs(total) < float("inf"):
                remedy = "use more snapshots, or another target"
                raise SnapshotError(str(self.folder), f"no weights give {target}", remedy)
        if trajectory is not None:
            from posthoc_cli.solver.blup import expected_error

            expected = expected_error(trajectory, profiles, wanted, solved.weights)
        return Solution(
            self, snapshots, targets, step, device, solved, moments, trajectory, expected, seen
        )


@dataclass(frozen=True, slots=True)
class Solution:
    """Weights for each target, and how good they are.

    `snapshots` are those used, `step` is the target step. `moments`, `trajectory` and `expected`
    are there when a sample of the values was read.
    """

    run: Run
    snapshots: list[Snapshot]
    targets: list[Target]
    step: int
    device: str
    solved: SolvedWeights
    moments: SampleMoments | None = None
    trajectory: Trajectory | None = None
    expected: ExpectedError | None = None
    glance: tuple[Sequence[Snapshot], SampleMoments] | None = None

    @property
    def method(self) -> str:
        return self.solved.method

    @property
    def found(self) -> int:
        """How many snapshots there are up to the target step; `snapshots` may be fewer."""
        return sum(snapshot.step <= self.step for snapshot in self.run.snapshots)

    @property
    def weights(self) -> FloatArray:
        """[targets, snapshots]."""
        return self.solved.weights

    @property
    def expected_error(self) -> FloatArray | None:
        """[targets], relative to how far each target is from the network of its step; None when no
        sample was read."""
        return None if self.expected is None else self.expected.relative

    def estimate_methods(self) -> list[MethodEstimate]:
        """Every method's weights for these targets, with the errors that are to be expected.

        Raises ValueError unless a sample was read.
        """
        from posthoc_cli.solver.estimates import estimate_methods

        if self.trajectory is None:
            raise ValueError("no sample was read: solve(sample=True)")
        profiles = [snapshot.profile for snapshot in self.snapshots]
        wanted = [target.profile(self.step) for target in self.targets]
        return estimate_methods(profiles, wanted, self.trajectory, self.device)

    def check_error(self, max_error: float) -> None:
        """Raise SnapshotError for the first target whose expected error is above `max_error`.

        Raises UsageError unless it is above 0 and finite, ValueError unless a sample was read.
        """
        check_max_error(max_error)
        if self.expected is None:
            raise ValueError("no sample was read: solve(sample=True)")
        for target, error in zip(self.targets, self.expected.relative.tolist(), strict=True):
            if not error <= max_error:
                known = (
                    f"{percent(error)}, more than" if error == error else "unknown, so not within"
                )
                better = "" if self.method == "blup" else "use method='blup', or "
                raise SnapshotError(
                    str(target),
                    f"its expected error is {known} max_error={percent(max_error)}",
                    f"{better}see estimate_methods() for what these snapshots can give",
                )

    def save(
        self,
        output: str | os.PathLike[str],
        *,
        dtype: str = "same",
        copy: Sequence[str] = (),
        drop: Sequence[str] = (),
        max_shard_size: int | None = None,
        max_error: float | None = None,
        strict: bool = False,
        force: bool = False,
        skip_existing: bool = False,
        progress: Progress | None = None,
    ) -> Saved:
        """Write a safetensors file for each target, all in one pass; returns a list of their paths.

        Arguments:
            output: the file; with several targets a folder, or a template with `{sigma_rel}`,
                `{gamma}` or `{step}`. A path that ends in / is made if need be.
            dtype: of the floating-point tensors written: "same", "float64", "float32", "float16"
                or "bfloat16".
            copy, drop: globs of tensors to take from the newest snapshot, and to leave out.
            max_shard_size: bytes above which an output becomes shards with an index; then the path
                is that of the index.
            max_error: write nothing when a larger error is to be expected, relative to how far the
                EMA is from the network; needs `solve(sample=True)`, or blup.
            strict: write nothing when there is NaN or infinity in the snapshots or the outputs.
            force: replace outputs that exist.
            skip_existing: keep outputs that exist, and write the others.
            progress: called, from any thread, with the bytes just read and all there are to read.

        Each output appears whole or not at all; when anything fails none does. Raises UsageError
        when an argument doesn't fit or an output exists, SnapshotError when a snapshot changed
        meanwhile, MachineError when the disk or the device fails.
        """
        from posthoc_cli.storage import existing_output, fingerprint
        from posthoc_cli.synthesis.nonfinite import summarize
        from posthoc_cli.synthesis.outputs import Output, Saved, kept_output, write_outputs
        from posthoc_cli.synthesis.paths import make_folder, output_paths
        from posthoc_cli.synthesis.recipe import make_recipe

        if force and skip_existing:
            raise UsageError("force=True", "doesn't go with skip_existing=True", "leave one out")
        if max_error is not None:
            self.check_error(max_error)
        plan = self.run.plan(self.step, dtype=dtype, copy=copy, drop=drop)
        name = self.run.folder.resolve().name
        paths = output_paths(os.fspath(output), name, self.targets, self.step)
        kept = {path for path in paths if skip_existing and existing_output(path)}
        wanted = [at for at, path in enumerate(paths) if path not in kept]
        outputs = {at: kept_output(path) for at, path in enumerate(paths) if path in kept}
        if not wanted:
            return Saved([outputs[at] for at in range(len(paths))], [], "")
        make_folder(os.fspath(output))
        fingerprints = [fingerprint(snapshot.index) for snapshot in self.snapshots]
        recipes = [
            make_recipe(
                self.method,
                self.targets[at],
                self.step,
                self.snapshots,
                self.weights[at].tolist(),
                fingerprints,
                copied=copy,
                dropped=drop,
            )
            for at in wanted
        ]
        begin = time.perf_counter()
        written = write_outputs(
            plan,
            self.weights[wanted],
            [paths[at] for at in wanted],
            recipes,
            device=self.device,
            overwrite=force,
            shard_bytes=max_shard_size,
            strict=strict,
            progress=progress and (lambda count: progress(count, plan.bytes_to_read)),
        )
        seconds = time.perf_counter() - begin
        for at, files, size in zip(wanted, written.files, written.sizes, strict=True):
            outputs[at] = Output(files[-1], files[:-1], size, seconds)
        found = written.nonfinite
        summary = ": ".join(summarize(plan, found)) if found else ""
        return Saved([outputs[at] for at in range(len(paths))], found, summary)

    def state_dict(
        self,
        target: int = 0,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "same",
        copy: Sequence[str] = (),
        drop: Sequence[str] = (),
    ) -> dict[str, torch.Tensor]:
        """The EMA of one of the targets as tensors in memory, by name; nothing is written.

        `target` is an index into `targets`, `device` where the tensors shall be; `dtype`, `copy`
        and `drop` are those of `save`. Memory holds the result, but not the snapshots.

        Raises IndexError for a target that isn't there, and what `save` does for the rest.
        """
        from posthoc_cli.synthesis.engine import Engine
        from posthoc_cli.synthesis.memory import MemorySink

        plan = self.run.plan(self.step, dtype=dtype, copy=copy, drop=drop)
        sink = MemorySink(plan)
        with Engine(plan, self.weights[[target]], device=self.device) as engine:
            engine.run(sink)
        return {name: tensor.to(device) for name, tensor in sink.tensors.items()}


def verify(
    output: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    full: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check that an output is what its recipe says, and that its snapshots are what they were.

    `output` is the file, or the index of its shards; `folder` where its snapshots lie, by default
    beside it. A sample of the values is compared, or with `full` all of them. What is wrong is in
    the report's `problems`.

    Raises UsageError when the output or the folder isn't there, SnapshotError for an output without
    a recipe, or when a file changes meanwhile, MachineError when one can't be read.
    """
    from posthoc_cli.synthesis.verification import find_output
    from posthoc_cli.synthesis.verification import verify as verify_output

    index = find_output(Path(output))
    where = None if folder is None else Path(folder)
    return verify_output(index, where, full=full, progress=progress)


def check_max_error(max_error: float) -> None:
    """Raise UsageError unless `max_error` is above 0 and finite."""
    if not 0 < max_error < float("inf"):
        raise UsageError("max_error=", f"{max_error:g} is out of bounds", "give, say, 0.05 for 5%")
