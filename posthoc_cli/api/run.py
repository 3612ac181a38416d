"""A folder of snapshots in, weights for any other average out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli.api.solution import Progress, Solution
from posthoc_cli.errors import NoValuesError, SnapshotError, UsageError
from posthoc_cli.snapshots import FolderContents, read_folder, select
from posthoc_cli.snapshots.lora import of_several_shapes
from posthoc_cli.snapshots.snapshot import Snapshot, check_norms
from posthoc_cli.solver import (
    METHODS,
    Average,
    SolvedWeights,
    choose_method,
    plain_method,
    solve_apart,
)
from posthoc_cli.solver.arrays import resolve_device
from posthoc_cli.solver.groups import TargetFor, TensorGroup, globs_of, make_groups
from posthoc_cli.solver.targets import Values, make_targets
from posthoc_cli.storage.places import place
from posthoc_cli.storage.stores import own_name

if TYPE_CHECKING:
    from posthoc_cli.api.tuner import Tuned, Tuner
    from posthoc_cli.snapshots.sampling import Sample
    from posthoc_cli.synthesis.plan import TensorPlan
    from posthoc_cli.synthesis.products import Products
    from posthoc_cli.synthesis.verification import Report


def open_snapshots(
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    pattern: str | None = None,
    profiles: Sequence[float] | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    run: str | None = None,
    raw: bool = False,
    ema_decay: float | None = None,
    skip_incomplete: bool = False,
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
    lora: str = "factors",
    key: str | None = None,
    tool: str = "auto",
    update_every: int | None = None,
) -> Run:
    """Read which snapshots a folder holds; their headers only.

    Arguments:
        folder: the folder of snapshots; or a list of files and folders that lie in one.
        pattern: a file-name pattern, such as "run7_{step}_{sigma_rel}.safetensors".
        profiles: the sigma_rel values that `{index}` counts, from index 0 on.
        only: globs for the files to use, by name or path below the folder; no other is opened.
        exclude: globs for those to leave out.
        run: of several training runs in the folder, the one to use.
        raw: files that nothing says a profile of are no EMAs but plain checkpoints.
        ema_decay: they are EMAs of this decay a step; with `raw`, those that are called `ema`.
        skip_incomplete: leave out files whose end is missing, instead of taking them for problems.
        copy, drop: those that `save` will be given: what is odd in these tensors is no problem.
        lora: what `save` will be given: with "exact", the ranks of a LoRA may differ.
        key: where in a checkpoint of torch the network is: "ema", or "outer.inner".
        tool: what wrote such checkpoints: "ema-pytorch", "posthoc-ema", "edm2", "torch" for any
            other state dict, or "auto", by their contents.
        update_every: that of training with ema-pytorch or posthoc-ema, 1 without it: above 1 their
            averages have another width than was asked for.

    What is wrong with single files is collected in `problems`. Raises UsageError when an argument
    or the folder doesn't fit, SnapshotError when there is no file that may be a snapshot,
    MachineError when the folder or a file can't be read.
    """
    contents = read_folder(
        folder,
        pattern=pattern,
        profiles=profiles,
        only=only,
        exclude=exclude,
        run=run,
        raw=raw,
        ema_decay=ema_decay,
        skip_incomplete=skip_incomplete,
        copy=copy,
        drop=drop,
        lora=lora,
        key=key,
        tool=tool,
        update_every=update_every,
    )
    return Run(contents, (*copy, *drop))


@dataclass(frozen=True, slots=True)
class Run:
    """The snapshots of one training run, as `open_snapshots` found them."""

    contents: FolderContents
    _settled: tuple[str, ...] = ()
    """Globs of the tensors that are copied or dropped, as `open_snapshots` was told."""
    _plans: dict[Any, TensorPlan | Products] = field(
        default_factory=dict, repr=False, compare=False
    )
    _samples: dict[Any, Sample] = field(default_factory=dict, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        return self.contents.folder

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those with a step and a profile, by step, width and file name."""
        return self.contents.snapshots

    @property
    def raw(self) -> bool:
        """Whether all snapshots are raw checkpoints, no EMAs."""
        return bool(self.snapshots) and all(each.profile.raw for each in self.snapshots)

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
        target_for: TargetFor = (),
        **lora: Any,
    ) -> TensorPlan | Products:
        """Which bytes an output is made of; what `save` does, apart from the weights.

        `lora` are the arguments of `save` that begin so. Raises what `until` does; UsageError for
        an unknown dtype or a glob that fits no tensor, SnapshotError for a tensor whose dtype has
        no average.
        """
        from posthoc_cli.synthesis.products import plan_outputs

        snapshots, step = self.until(step)
        groups = globs_of(make_groups(target_for))
        key = step, dtype, tuple(copy), tuple(drop), groups, *lora.items()
        if key not in self._plans:
            made: dict[str, Any] = {"dtype": dtype, "copy": copy, "drop": drop, "groups": groups}
            self._plans[key] = plan_outputs(snapshots, **made, **lora)
        return self._plans[key]

    def paths(
        self,
        output: str | os.PathLike[str],
        *,
        step: int | None = None,
        layout: str = "file",
        **targets: Values,
    ) -> list[Path]:
        """Where `solve(...).save(output)` will write; raises UsageError where it can't."""
        from posthoc_cli.synthesis.paths import output_paths

        name = own_name(self.folder)
        _, step = self.until(step)
        return output_paths(os.fspath(output), name, make_targets(**targets), step, layout=layout)

    def solve(
        self,
        *,
        sigma_rel: Values = None,
        gamma: Values = None,
        window: Values = None,
        lr_decay: Values = None,
        decay: Values = None,
        half_life: Values = None,
        target_for: TargetFor = (),
        step: int | None = None,
        method: str | None = None,
        device: str = "cpu",
        sample: bool = False,
        try_sample: bool = False,
        leave_out: Sequence[str] = (),
    ) -> Solution:
        """The weights that rebuild other averages from these snapshots.

        Arguments:
            sigma_rel: relative widths of the EMAs that are wanted, 0 < sigma_rel < 12^-0.5.
            gamma: the same by exponent (eq. 123), gamma > -1.
            window: means of the last steps: 480 of them, or "5%" of the target step.
            lr_decay: what a decay of the learning rate over the last steps would have led to, by
                its shape (linear, 1-sqrt or cosine) and length: "1-sqrt:10%".
            decay: EMAs of a fixed decay a step, such as 0.999; half_life: the same by the steps
                after which half is left, or a part of the target step: 480, "5%".
            target_for: another target for some tensors of every output, by a glob of their names:
                {"*.attn.*": 0.15, "*.bias": "window:5%"}, or pairs; the last glob that fits counts.
            step: the target step, by default the last snapshot's; later snapshots are not used.
            method: "blup" (the default: least expected error), "edm2" (algorithm 3 of arXiv
                2312.02696, weights rescaled to sum one), "algorithm3" (not rescaled); "share" for
                raw checkpoints only.
            device: where to compute: "cpu", "cuda", "cuda:1" or "auto".
            sample: read a sample of the values even if the method needs none, to know the error
                that is to be expected; try_sample: the same, unless none can be had.
            leave_out: globs of tensors that shall not be part of the sample.

        By default "edm2" ("share") takes the place of "blup" where the values can't be compared, or
        are not like those of one training run at all; the solution's `doubt` says so.

        Raises UsageError for arguments out of bounds, SnapshotError for the first of the
        `problems`, or where no weights can be found, MachineError when a device or a file fails.
        """
        leave_out = (*leave_out, *self._settled)
        chosen = choose_method(method, [snapshot.profile for snapshot in self.snapshots])
        targets = make_targets(sigma_rel, gamma, window, lr_decay, decay, half_life)
        device = resolve_device(device)
        snapshots, step = self.until(step)
        profiles = [snapshot.profile for snapshot in snapshots]
        groups = make_groups(target_for)
        if groups:
            groups = _counted(groups, snapshots, leave_out)
        wanted: list[Average] = [target.profile(step) for target in targets]
        wanted += [group.profile(step) for group in groups]
        plain = plain_method(all(profile.raw for profile in profiles))
        if not METHODS[chosen].needs_values:
            check_norms(snapshots, chosen)
        needed = sample or (method is not None and METHODS[chosen].needs_values)
        sampled, doubt = None, ""
        if needed or try_sample or METHODS[chosen].needs_values:
            sampled, doubt = self._measure(snapshots, leave_out, needed)
        trajectory = sampled.trajectory if sampled else None

        def solved_by(name: str) -> SolvedWeights:
            return solve_apart(profiles, wanted, len(targets), name, device, trajectory)

        solved = None
        if doubt and method is None:
            with contextlib.suppress(UsageError, *([SnapshotError] if sampled else [])):
                solved = solved_by(plain)
        solved = solved or solved_by(chosen)
        errors = {}
        if trajectory is not None:
            from posthoc_cli.solver.blup import expected_errors

            rivals = [solved]
            with contextlib.suppress(UsageError, SnapshotError):
                rivals += [] if solved.method == plain else [solved_by(plain)]
            several = [each.weights for each in rivals]
            found = expected_errors(trajectory, profiles, wanted, several)
            errors = {each.method: error for each, error in zip(rivals, found, strict=True)}
        solution = Solution(
            *(self, snapshots, targets, step, device, solved),
            *(sampled, errors, doubt, groups),
        )
        for target, total in zip(solution.wanted, solved.sum_of_weights.tolist(), strict=True):
            if not abs(total) < float("inf"):
                remedy = "use more snapshots, or another target"
                raise SnapshotError(str(self.folder), f"no weights give {target}", remedy)
        return solution

    def tuner(self, *, minimize: bool, **search: Any) -> Tuner:
        """A search for the average that a metric likes best, for a loop of one's own.

        The arguments are those of `tune` from `parameter` on. Ask it for networks with `ask()`, and
        `tell()` it what was measured.
        """
        from posthoc_cli.api.tuner import Tuner

        return Tuner(self, minimize=minimize, **search)

    def tune(
        self,
        metric: str | Callable[[Any], float],
        *,
        minimize: bool,
        given: str = "state_dict",
        output: str | os.PathLike[str] | None = None,
        force: bool = False,
        skip_existing: bool = False,
        workdir: str | os.PathLike[str] | None = None,
        parallel: int = 1,
        **search: Any,
    ) -> Tuned:
        """Look for the average that `metric` likes best, and write it as `output`.

        Arguments:
            metric: what measures a network: a function of its tensors by name or, with
                given="path", of a file; or a command of the shell with `{file}` in it, whose metric
                is the last number it prints.
            minimize: whether less is better.
            output, force, skip_existing: where to write the best, as `save` has them.
            workdir: where networks lie while they are measured, by default beside the journal.
            parallel: how many commands to run at once.
            parameter: what is searched: "sigma_rel", "window", "half_life" or "decay".
            range: from where to where: "0.02:0.25" or a pair; by default the widest range within
                `max_error`, the error that is to be expected (0.05).
            also: "step", to search which step is best as well.
            step, method, device: those of `solve`; dtype, copy, drop, layout, max_shard_size,
                strict, lora, lora_rank, lora_tolerance: those of `save`, of all networks.
            evaluations: how many networks to measure, 14 by default.
            tolerance: stop before that when the best is known so well: 0.1 is to about 10 %.
            seed: what `{seed}` in a command counts up from, 0 by default.
            journal: a file that keeps each evaluation, so that the same call goes on where an
                earlier one ended.

        The first seven lengths are evenly spaced in log, all written in one pass over the
        snapshots; the others are where most is to be learned about the best. Raises what `solve`
        and `save` do; MachineError when a command fails or prints no number, and what the function
        raises.
        """
        from posthoc_cli.api.tune import tune

        return tune(
            self,
            metric,
            minimize=minimize,
            given=given,
            output=output,
            force=force,
            skip_existing=skip_existing,
            workdir=workdir,
            parallel=parallel,
            **search,
        )

    def _measure(
        self, snapshots: list[Snapshot], leave_out: Sequence[str], needed: bool
    ) -> tuple[Sample | None, str]:
        """A sample of the values, and what makes one doubt it; None where it can't be had.

        Where it is needed, what keeps it from being had is raised.
        """
        from posthoc_cli.snapshots.sampling import fit_snapshots

        ranks = of_several_shapes(snapshots, leave_out)
        if ranks:
            problem = f"LoRAs of several ranks have no values to compare (tensor '{ranks[0]}')"
            if needed:
                raise UsageError("method=", problem, "use another method, and no max_error=")
            return None, problem
        key = snapshots[-1].step, len(snapshots), tuple(leave_out)
        try:
            if key not in self._samples:
                self._samples[key] = fit_snapshots(snapshots, leave_out)
            sampled = self._samples[key]
        except NoValuesError as error:
            if needed:
                raise
            return None, error.problem
        if sampled.trajectory.fits:
            return sampled, ""
        factor = math.exp(sampled.trajectory.misfit)
        return sampled, (
            "the snapshots are not like those of one training run: their squared differences are "
            f"off by a factor of {factor:.1f} from any model of one"
        )


def _counted(
    groups: Sequence[TensorGroup], snapshots: Sequence[Snapshot], leave_out: Sequence[str]
) -> list[TensorGroup]:
    """The groups that later ones leave any tensors, with their numbers.

    Raises UsageError for a glob that fits no tensor that is averaged.
    """
    from posthoc_cli.storage import fits_any
    from posthoc_cli.synthesis.plan import averaged_in_groups, check_groups, newest_of

    tensors = snapshots[newest_of([each.step for each in snapshots])].index.tensors
    check_groups(tensors, globs_of(groups), [each for each in tensors if fits_any(each, leave_out)])
    counts = averaged_in_groups(tensors, globs_of(groups), leave_out)
    return [replace(group, tensors=n) for group, n in zip(groups, counts, strict=True) if n]


def verify(
    output: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    full: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check that an output is what its recipe says, and that its snapshots are what they were.

    `output` is the file, the index of its shards, or the folder; `folder` where its snapshots lie,
    by default beside it. A sample of the values is compared, or with `full` all of them. What is
    wrong is in the report's `problems`.

    Raises UsageError when the output or the folder isn't there, SnapshotError for an output without
    a recipe, or when a file changes meanwhile, MachineError when one can't be read.
    """
    from posthoc_cli.synthesis.verification import find_output
    from posthoc_cli.synthesis.verification import verify as verify_output

    index = find_output(place(output))
    where = None if folder is None else place(folder)
    return verify_output(index, where, full=full, progress=progress)
