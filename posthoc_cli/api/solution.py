"""Weights for each target, and the outputs that they make."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posthoc_cli.errors import SnapshotError, UsageError, percent
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.solver.groups import TensorGroup
from posthoc_cli.solver.targets import Target
from posthoc_cli.storage.stores import own_name

if TYPE_CHECKING:
    import torch

    from posthoc_cli.api.run import Run
    from posthoc_cli.snapshots.sampling import Sample
    from posthoc_cli.solver import SolvedWeights
    from posthoc_cli.solver.arrays import FloatArray
    from posthoc_cli.solver.blup import ExpectedError
    from posthoc_cli.solver.estimates import MethodEstimate
    from posthoc_cli.solver.trajectory import Trajectory
    from posthoc_cli.synthesis.outputs import Saved
    from posthoc_cli.synthesis.plan import TensorPlan
    from posthoc_cli.synthesis.products import Products

Progress = Callable[[int, int], None]
"""Called, from any thread, with the bytes just read and all that there are to read."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Weights for each target, and how good they are.

    `snapshots` are those used, `step` is the target step. When a `sample` of the values was read,
    `errors` has those to be expected of its method and of the plain one, "edm2" or "share", if that
    has weights. `doubt` says what keeps the values from telling anything, or is empty. `groups` are
    the tensors that have a target of their own; `solved` and `errors` are for the targets, and then
    for those of the groups.
    """

    run: Run
    snapshots: list[Snapshot]
    targets: list[Target]
    step: int
    device: str
    solved: SolvedWeights
    sample: Sample | None = None
    errors: Mapping[str, ExpectedError] = field(default_factory=dict)
    doubt: str = ""
    groups: Sequence[TensorGroup] = ()

    @property
    def method(self) -> str:
        return self.solved.method

    @property
    def trajectory(self) -> Trajectory | None:
        """How the network moved; None when no sample was read."""
        return None if self.sample is None else self.sample.trajectory

    @property
    def expected(self) -> ExpectedError | None:
        """The errors of these weights; None when no sample was read."""
        return self.errors.get(self.method)

    @property
    def plain(self) -> str | None:
        """The plain method that `errors` knows besides this one; None if there is none."""
        return next((name for name in self.errors if name != self.method), None)

    @property
    def found(self) -> int:
        """How many snapshots there are up to the target step; `snapshots` may be fewer."""
        return sum(snapshot.step <= self.step for snapshot in self.run.snapshots)

    @property
    def weights(self) -> FloatArray:
        """[targets, snapshots]: of all tensors, except those of `groups`."""
        return self.solved.weights[: len(self.targets)]

    @property
    def group_weights(self) -> FloatArray:
        """[groups, snapshots]: those of the tensors of each group, whatever the target."""
        return self.solved.weights[len(self.targets) :]

    @property
    def wanted(self) -> list[Target]:
        """The targets, and then those of the groups."""
        return [*self.targets, *(group.target for group in self.groups)]

    @property
    def expected_error(self) -> FloatArray | None:
        """[targets], relative to how far each target is from the network of its step; None when no
        sample was read."""
        return None if self.expected is None else self.expected.relative[: len(self.targets)]

    def errors_of(self, at: int) -> dict[str, Any]:
        """As JSON: the error to be expected of a target, and beside it the plain method's.

        Empty when no sample was read.
        """
        if self.expected is None:
            return {}
        told: list[dict[str, Any]] = [
            {
                "expected_error": float(self.errors[method].total[at]),
                "relative_error": float(self.errors[method].relative[at]),
            }
            for method in (self.method, self.plain)
            if method is not None
        ]
        if self.plain is not None:
            told[0]["compared"] = {"method": self.plain, **told[1]}
        return told[0]

    def estimate_methods(self) -> list[MethodEstimate]:
        """Every method's weights, with the errors that are to be expected: for the targets, and
        then for those of `groups`.

        Raises ValueError unless a sample was read.
        """
        from posthoc_cli.solver.estimates import estimate_methods

        if self.trajectory is None:
            raise ValueError("no sample was read: solve(sample=True)")
        profiles = [snapshot.profile for snapshot in self.snapshots]
        wanted = [target.profile(self.step) for target in self.wanted]
        return estimate_methods(profiles, wanted, self.trajectory, self.device)

    def check_error(self, max_error: float) -> None:
        """Raise SnapshotError for the first target whose expected error is above `max_error`.

        Raises UsageError unless it is above 0 and finite, ValueError unless a sample was read.
        """
        check_max_error(max_error)
        if self.expected is None:
            raise ValueError("no sample was read: solve(sample=True)")
        for target, error in zip(self.wanted, self.expected.relative.tolist(), strict=True):
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
        layout: str = "file",
        max_shard_size: int | None = None,
        max_error: float | None = None,
        strict: bool = False,
        lora: str = "factors",
        lora_rank: int | None = None,
        lora_tolerance: float = 1e-3,
        force: bool = False,
        skip_existing: bool = False,
        progress: Progress | None = None,
    ) -> Saved:
        """Write a safetensors file for each target, all in one pass; returns a list of their paths.

        Arguments:
            output: the file; with several targets a folder, or a template with `{sigma_rel}`,
                `{gamma}`, `{target}` or `{step}`. A path that ends in / is made if need be.
            dtype: of the floating-point tensors written: "same", "float64", "float32", "float16"
                or "bfloat16".
            copy, drop: globs of tensors to take from the newest snapshot, and to leave out.
            layout: "file", or "folder": each output is a folder that holds what a library loads it
                with, copied from the newest snapshot, as docs/folders.md tells. A single target's
                is `output` itself; its shards are as large as the snapshots' own, if they have any.
            max_shard_size: bytes above which an output becomes shards with an index; then the path
                is that of the index.
            max_error: write nothing when a larger error is to be expected, relative to how far the
                EMA is from the network; needs `solve(sample=True)`, or blup.
            strict: write nothing when there is NaN or infinity in the snapshots or the outputs.
            lora: "factors" averages the factors of a LoRA like all tensors; "exact" writes those of
                the average of their products. `lora_rank` is the most that such factors may have,
                `lora_tolerance` the part of the largest singular value below which they drop one.
            force: replace outputs that exist.
            skip_existing: keep outputs that exist and are what this would write, by their recipes,
                and write the others; one that is anything else raises UsageError.
            progress: called, from any thread, with the bytes just read and all there are to read.

        Each output appears whole or not at all; when anything fails none does. Raises UsageError
        when an argument doesn't fit or an output exists, SnapshotError when a snapshot changed
        meanwhile, MachineError when the disk or the device fails.
        """
        from posthoc_cli.storage.readers import fingerprints
        from posthoc_cli.synthesis.beside import shard_size, what_lies_beside
        from posthoc_cli.synthesis.outputs import save_outputs
        from posthoc_cli.synthesis.paths import make_folder, output_paths
        from posthoc_cli.synthesis.recipe import make_recipe

        if force and skip_existing:
            raise UsageError("force=True", "doesn't go with skip_existing=True", "leave one out")
        if max_error is not None:
            self.check_error(max_error)
        how = {"lora": lora, "lora_rank": lora_rank, "lora_tolerance": lora_tolerance}
        plan, weights = self._plan(dtype=dtype, copy=copy, drop=drop, **how)
        name = own_name(self.run.folder)
        paths = output_paths(os.fspath(output), name, self.targets, self.step, layout=layout)
        beside = what_lies_beside(plan, self.run.folder) if layout == "folder" else None
        if beside:
            max_shard_size = shard_size(plan, beside, max_shard_size)

        groups = [
            (group, self.solved.weights[at].tolist(), self.errors_of(at))
            for at, group in enumerate(self.groups, len(self.targets))
        ]

        make_folder(os.fspath(output), self.targets, layout)
        known = fingerprints([snapshot.index for snapshot in self.snapshots])
        recipes = [
            make_recipe(
                self.method,
                target,
                self.step,
                self.snapshots,
                self.weights[at].tolist(),
                known,
                copied=copy,
                dropped=drop,
                groups=groups,
                lora=plan,
                how=self.run.contents.how,
                errors=self.errors_of(at),
            )
            for at, target in enumerate(self.targets)
        ]
        return save_outputs(
            plan,
            weights,
            paths,
            recipes,
            skip_existing=skip_existing,
            device=self.device,
            overwrite=force,
            shard_bytes=max_shard_size,
            beside=beside,
            strict=strict,
            progress=progress,
        )

    def _plan(self, **how: Any) -> tuple[TensorPlan | Products, FloatArray]:
        """The plan, and its weights: [1 + groups, targets, snapshots]."""
        import numpy as np

        own = [(glob, group.target) for group in self.groups for glob in group.globs]
        rows = [np.broadcast_to(row, self.weights.shape) for row in self.group_weights]
        return self.run.plan(self.step, target_for=own, **how), np.stack([self.weights, *rows])

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
        from posthoc_cli.synthesis.plan import TensorPlan

        plan, weights = self._plan(dtype=dtype, copy=copy, drop=drop)
        assert isinstance(plan, TensorPlan)
        sink = MemorySink(plan)
        with Engine(plan, weights[:, [target]], device=self.device) as engine:
            engine.run(sink)
        return {name: tensor.to(device) for name, tensor in sink.tensors.items()}


def check_max_error(max_error: float) -> None:
    """Raise UsageError unless `max_error` is above 0 and finite."""
    if not 0 < max_error < float("inf"):
        raise UsageError("max_error=", f"{max_error:g} is out of bounds", "give, say, 0.05 for 5%")
