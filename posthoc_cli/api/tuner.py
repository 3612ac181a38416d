"""Which length a metric likes best: ask for networks, and tell what was measured of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli.api.doubts import doubts
from posthoc_cli.api.lengths import identity, reached, searched_steps
from posthoc_cli.api.solution import Solution
from posthoc_cli.errors import UsageError
from posthoc_cli.solver.targets import Target, Value, plain_number
from posthoc_cli.storage import ENDING
from posthoc_cli.storage.places import is_url
from posthoc_cli.synthesis.plan import TensorPlan
from posthoc_cli.tuning.axis import Axis, check_parameter, length_of, read_axis
from posthoc_cli.tuning.checks import check_positive, check_whole, shown, values_of
from posthoc_cli.tuning.journal import Evaluation, Journal
from posthoc_cli.tuning.reading import MOST
from posthoc_cli.tuning.search import (
    Observation,
    Point,
    Posterior,
    Space,
    first_points,
    posterior,
    suggest,
)

if TYPE_CHECKING:
    import torch

    from posthoc_cli.api.run import Run
    from posthoc_cli.synthesis.output_files import Output
    from posthoc_cli.synthesis.outputs import Saved

EVALUATIONS, FIRST = 14, 7
"""How many networks are measured by default, and how many of them before it is known where."""

MAX_ERROR = 0.05
"""The expected error up to which lengths are searched where no range is given."""

_FEWEST = 3
"""Networks measured before a place for another can be reckoned."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A network whose metric is wanted: the target number `at` of `solution`."""

    solution: Solution
    at: int

    @property
    def target(self) -> Target:
        return self.solution.targets[self.at]

    @property
    def step(self) -> int:
        return self.solution.step

    @property
    def sigma_rel(self) -> float | None:
        """The relative width; None of what is no power function."""
        return self.target.sigma_rel

    @property
    def length(self) -> float:
        """The target's value; of a decay its half-life in steps."""
        return length_of(self.target)

    @property
    def expected_error(self) -> float | None:
        """Relative, as `solve` expects it; None where it isn't known."""
        errors = self.solution.expected_error
        value = math.nan if errors is None else float(errors[self.at])
        return value if math.isfinite(value) else None

    def state_dict(self, **how: Any) -> dict[str, torch.Tensor]:
        """The network's tensors by name; `how` are the arguments of `Solution.state_dict`."""
        return self.solution.state_dict(self.at, **how)


@dataclass(frozen=True)
class Best:
    """The best average by all that was measured: the minimum of the curve through it.

    `metric` is the curve's value there, `interval` the values of the parameter between which the
    best lies with a probability of 0.9, `metric_interval` the same of the metric.
    """

    target: Target
    step: int
    metric: float
    interval: tuple[Target, Target]
    metric_interval: tuple[float, float]
    expected_error: float | None
    solution: Solution

    @property
    def sigma_rel(self) -> float | None:
        return self.target.sigma_rel


@dataclass(frozen=True)
class Tuned:
    """What came of a search: the `best`, None where nothing was measured; every evaluation, those
    that failed too; `notes` on what speaks against trusting it; the `output`, if it was saved."""

    best: Best | None
    evaluations: list[Evaluation]
    posterior: Posterior | None
    notes: list[str] = field(default_factory=list)
    output: Saved | None = None


class Tuner:
    """A search for the average that a metric likes best, for a loop of one's own.

        with run.tuner(minimize=True) as tuner:
            while trials := tuner.ask():
                for trial in trials:
                    tuner.tell(trial, metric(trial.state_dict()))
            tuner.result().best

    The arguments are those of `Run.tune`. Raises UsageError for arguments that don't fit,
    SnapshotError where nothing is within `max_error`, and what `solve` raises.
    """

    def __init__(
        self,
        run: Run,
        *,
        minimize: bool,
        parameter: str = "sigma_rel",
        range: str | tuple[Value, Value] | None = None,
        also: str | None = None,
        step: int | None = None,
        evaluations: int = EVALUATIONS,
        tolerance: float | None = None,
        max_error: float = MAX_ERROR,
        method: str | None = None,
        device: str = "cpu",
        dtype: str = "same",
        copy: Sequence[str] = (),
        drop: Sequence[str] = (),
        layout: str = "file",
        max_shard_size: int | None = None,
        strict: bool = False,
        seed: int = 0,
        journal: str | os.PathLike[str] | None = None,
        name: Any = None,
        **lora: Any,
    ) -> None:
        if not isinstance(minimize, bool):
            raise UsageError("minimize=", f"{shown(minimize)} is no answer", "give True or False")
        check_whole("evaluations", evaluations, "14")
        if evaluations < 0:
            raise UsageError("evaluations=", f"{evaluations} is less than none", "give, say, 14")
        check_whole("seed", seed, "0")
        if seed < 0:
            raise UsageError("seed=", f"{seed} is less than 0", "give, say, 0")
        if tolerance is not None:
            check_positive("tolerance", tolerance, "0.1")
        check_parameter(parameter)
        check_positive("max_error", max_error, "0.05 for 5%")
        if step is not None:
            check_whole("step", step, "that of a snapshot")
        check_local("journal", journal)
        self.run, self.minimize, self.evaluations = run, minimize, evaluations
        self.tolerance, self.seed = tolerance, seed
        self.made: dict[str, Any] = {"dtype": dtype, "copy": tuple(copy), "drop": tuple(drop)}
        self.written: dict[str, Any] = {"layout": layout, "strict": strict}
        self.written["max_shard_size"] = max_shard_size
        self._solving: dict[str, Any] = {"method": method, "device": device, "try_sample": True}
        if also not in (None, "step"):
            raise UsageError("also=", f"'{also}' can't be searched", "only step can")
        snapshots, self.step = run.until(step)
        self.steps = searched_steps(run, self.step) if also else ()
        self.planned = self.made | lora
        run.plan(step, **self.planned)  # refuses globs and dtypes that don't fit
        self.pending: list[Trial] = []
        self._belief: tuple[int, Posterior] | None = None
        self.journal = Journal(None if journal is None else Path(journal))
        try:
            self.axis = self._axis(parameter, range, max_error)
            for end in (self.axis.low, self.axis.high):
                end.profile(min(self.steps or (self.step,)))
            self.space = Space(*self.axis.bounds, self.steps)
            self.journal.begin(
                {
                    "folder": str(run.folder),
                    "count": len(snapshots),
                    "snapshots": identity(run, self.step) if journal else "",
                    "metric": name,
                    "goal": "minimize" if minimize else "maximize",
                    "parameter": parameter,
                    "range": [self.axis.low.text, self.axis.high.text],
                    "bounds": list(self.axis.bounds),
                    "step": self.step,
                    "steps": list(self.steps),
                    "method": method,
                    "layout": layout,
                    "lora": lora if lora.get("lora", "factors") != "factors" else None,
                    "seed": seed,
                    **self.made,
                }
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the journal."""
        self.journal.close()

    def _axis(
        self, parameter: str, range: str | tuple[Value, Value] | None, max_error: float
    ) -> Axis:
        if range is not None:
            return read_axis(parameter, range)
        header = self.journal.header
        if self.measured and header.get("parameter") == parameter:
            return read_axis(parameter, header.get("range"))
        return reached(parameter, self.step, max_error, self._solve)

    def _solve(self, targets: Sequence[Target], step: int) -> Solution:
        given: dict[str, Any] = {targets[0].argument: [_given(target) for target in targets]}
        return self.run.solve(step=step, leave_out=self._settled, **given, **self._solving)

    @property
    def _settled(self) -> tuple[str, ...]:
        return (*self.made["copy"], *self.made["drop"])

    # Asking and telling

    @property
    def measured(self) -> list[Evaluation]:
        """The evaluations that gave a metric."""
        return [each for each in self.journal.evaluations if each.metric is not None]

    @property
    def left(self) -> int:
        """How many evaluations may still be asked for."""
        return max(self.evaluations - len(self.measured) - len(self.pending), 0)

    @property
    def first(self) -> list[Point]:
        """The points of the first, even, round that are still to be asked for."""
        count = min(FIRST, self.evaluations)
        missing = count - len(self.measured) - len(self.pending)
        known = {(each.target, each.step) for each in self.measured}
        known |= {(trial.target.named, trial.step) for trial in self.pending}
        points = first_points(self.space, count)
        return [each for each in points if self._named(each) not in known][: max(missing, 0)]

    def _named(self, point: Point) -> tuple[str, int]:
        return self.axis.target(point[0]).named, self._step_of(point)

    def _step_of(self, point: Point) -> int:
        return int(point[1]) if self.steps else self.step

    def ask(self, count: int = 1) -> list[Trial]:
        """Up to `count` networks to be measured next; none when the search is done, or must wait
        for those that were asked for before."""
        count = min(count, self.left)
        points = self.first[:count]
        if not points and count and len(self.measured) >= min(_FEWEST, self.evaluations):
            if self.settled:
                return []
            waiting = [self.point(trial.length, trial.step) for trial in self.pending]
            points = suggest(self.space, self._observations(), waiting, count)
        found: list[Trial] = []
        for step in dict.fromkeys(map(self._step_of, points)):
            targets = [self.axis.target(each[0]) for each in points if self._step_of(each) == step]
            solution = self._solve(targets, step)  # the same may be worth to be measured twice
            found += [Trial(solution, solution.targets.index(target)) for target in targets]
        self.pending += found
        return found

    def point(self, length: float, step: int) -> Point:
        """As the search counts it."""
        return (length, float(step)) if self.steps else (length,)

    def tell(
        self, trial: Trial, metric: float | Sequence[float], *, seconds: float = 0.0
    ) -> Evaluation:
        """The metric of a network that was asked for; or several, of as many measurements.

        It is in the journal when this returns. Raises UsageError for what is no finite number, and
        for a network that isn't waited for; MachineError when the journal can't be written.
        """
        values = values_of(metric)
        if not all(abs(each) < MOST for each in values):
            problem = f"{shown(metric)} is no finite number"
            raise UsageError("metric=", problem, "see what went wrong, and tell of it by fail()")
        mean = math.fsum(values) / len(values)
        return self._end(trial, metric=mean, values=tuple(values), seconds=seconds)

    def fail(self, trial: Trial, why: str, *, seconds: float = 0.0) -> Evaluation:
        """A network that was asked for could not be measured; it may be asked for again."""
        return self._end(trial, metric=None, failed=why, seconds=seconds)

    def forget(self, trials: Sequence[Trial]) -> None:
        """Networks that were asked for will not be measured; they may be asked for again."""
        self.pending = [each for each in self.pending if each not in trials]

    def _end(self, trial: Trial, **outcome: Any) -> Evaluation:
        if trial not in self.pending:
            known = isinstance(trial, Trial)
            told = f"{trial.target} isn't waited for" if known else f"{shown(trial)} is no trial"
            remedy = "tell once of each trial that ask() has given"
            raise UsageError("trial=", told, remedy)
        evaluation = Evaluation(
            target=trial.target.named,
            length=trial.length,
            sigma_rel=trial.sigma_rel,
            step=trial.step,
            expected_error=trial.expected_error,
            **outcome,
        )
        self.journal.add(evaluation)
        self.forget([trial])
        return evaluation

    # What is known

    def _observations(self) -> list[Observation]:
        sign = 1.0 if self.minimize else -1.0
        return [
            Observation(self.point(each.length, each.step), sign * value)
            for each in self.measured
            for value in each.values
        ]

    @property
    def posterior(self) -> Posterior | None:
        """What is known of the metric over lengths; None before anything was measured.

        It is of what is to be minimised: of a metric to be maximised, its negative.
        """
        count = len(self.measured)
        if not count:
            return None
        if self._belief is None or self._belief[0] != count:
            self._belief = count, posterior(self.space, self._observations())
        return self._belief[1]

    @property
    def best(self) -> tuple[Target, int, float] | None:
        """The best target by all that was told so far, its step and the metric there.

        It is where the curve is best, or, before there are enough for a curve, what was measured.
        """
        belief, sign = self.posterior, 1.0 if self.minimize else -1.0
        if belief is None:
            return None
        if len(self.measured) >= _FEWEST:
            target = self.axis.target(belief.best[0])
            return target, self._step_of(belief.best), sign * belief.value
        metric, at = min((sign * (each.metric or 0.0), at) for at, each in enumerate(self.measured))
        one = self.measured[at]
        return self.axis.target(one.length), one.step, sign * metric

    @property
    def settled(self) -> bool:
        """Whether the best is known to within the tolerance."""
        belief = self.posterior
        enough = self.tolerance is not None and len(self.measured) >= FIRST
        return bool(enough and belief and belief.width <= (self.tolerance or 0.0))

    def result(self) -> Tuned:
        """The best by all that was told so far."""
        belief = self.posterior
        evaluations = list(self.journal.evaluations)
        if belief is None or self.best is None:
            return Tuned(None, evaluations, None)
        target, step, value = self.best
        sign = 1.0 if self.minimize else -1.0
        values = sorted(sign * each for each in belief.value_interval)
        solution = self._solve([target], step)
        best = Best(
            target,
            step,
            value,
            (self.axis.target(belief.interval[0]), self.axis.target(belief.interval[1])),
            (values[0], values[1]),
            Trial(solution, 0).expected_error,
            solution,
        )
        doubted = len(self.measured) >= _FEWEST
        notes = list(doubts(self, Trial(solution, 0), belief)) if doubted else []
        return Tuned(best, evaluations, belief, notes)

    # Files

    def bytes_of_network(self) -> int:
        """What a network's tensors take on the disk."""
        plan = self.run.plan(self.step, **self.planned)
        return plan.bytes_to_write if isinstance(plan, TensorPlan) else 0

    def save(
        self,
        trials: Sequence[Trial],
        folder: Path,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[Trial, Output]:
        """Write the networks into `folder`, those of one solution in one pass."""
        ending = "" if self.written["layout"] == "folder" else ENDING
        place = str(folder).replace("{", "{{").replace("}", "}}")
        template = os.path.join(place, "{target}-step{step}" + ending)
        how: dict[str, Any] = {"force": True, "progress": progress, **self.written, **self.planned}
        outputs: dict[Trial, Output] = {}
        for solution in {id(trial.solution): trial.solution for trial in trials}.values():
            made = solution.save(template, **how).outputs
            outputs |= {each: made[each.at] for each in trials if each.solution is solution}
        return outputs


def check_local(argument: str, path: str | os.PathLike[str] | None) -> None:
    """Raise UsageError for a URL, and for what stands for no file."""
    if path is None:
        return
    text = os.fspath(path)
    if is_url(path):
        problem = f"'{text}' is no path of a disk"
        raise UsageError(f"{argument}=", problem, "give one: only the output may be a URL")
    if text in ("", "-"):
        raise UsageError(f"{argument}=", f"'{text}' is no path", "give one, as it is read again")


def _given(target: Target) -> Value:
    """What `solve` takes for it."""
    return f"{plain_number(target.value)}%" if target.percent else target.value
