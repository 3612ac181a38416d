"""`Run.tune`: the loop around a Tuner that writes networks and has them measured."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli.api.solution import Progress
from posthoc_cli.api.tuner import Trial, Tuned, Tuner, check_local
from posthoc_cli.errors import MachineError, PosthocError, UsageError
from posthoc_cli.storage.disk import already_exists, free_bytes, is_full, make_folder
from posthoc_cli.storage.places import is_url, place
from posthoc_cli.storage.shared import remove_whole
from posthoc_cli.tuning.checks import check_whole, shown, values_of
from posthoc_cli.tuning.journal import Evaluation
from posthoc_cli.tuning.metric import CommandMetric
from posthoc_cli.tuning.reading import NoMetric, finite

if TYPE_CHECKING:
    from posthoc_cli.api.run import Run
    from posthoc_cli.synthesis.output_files import Output

Measure = Callable[[Trial, "Output | None", int], list[float]]
"""The values of a trial's metric, from its network and the slot that it is measured in."""

Report = Callable[[Tuner, Trial, Evaluation | None], None]
"""Called when the measurement of a trial begins, and, with what came of it, when it ends."""

GIVEN = ("state_dict", "path")

_MARGIN = 1 << 20
"""Bytes of a network besides its tensors, generously."""


def tune(
    run: Run,
    metric: str | CommandMetric | Callable[[Any], float],
    *,
    given: str = "state_dict",
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    skip_existing: bool = False,
    workdir: str | os.PathLike[str] | None = None,
    parallel: int = 1,
    report: Report | None = None,
    progress: Progress | None = None,
    started: Callable[[Tuner], None] | None = None,
    **search: Any,
) -> Tuned:
    """What `Run.tune` does. `report` is told of each measurement, `started` of the search itself,
    `progress` of the bytes that are read for networks."""
    if isinstance(metric, str):
        metric = CommandMetric(metric)
    elif not callable(metric) and not isinstance(metric, CommandMetric):
        problem = f"{shown(metric)} is neither a command nor a function"
        raise UsageError("metric=", problem, "give one of the two")
    command = metric if isinstance(metric, CommandMetric) else None
    layout = search.get("layout", "file")
    if command:
        command.check(search.get("parameter", "sigma_rel"), layout)
        search.setdefault("name", command.as_dict())
    if given not in GIVEN:
        raise UsageError("given=", f"'{given}' is not known", "choose state_dict or path")
    if not command and given == "state_dict" and search.get("lora", "factors") != "factors":
        problem = "goes with commands, or given='path': exact factors are made for files"
        raise UsageError("lora='exact'", problem, "add given='path'")
    check_whole("parallel", parallel, "1")
    if parallel < 1 or (parallel > 1 and not command):
        remedy = "give 1 or more" if command else "only commands run in parallel; use run.tuner()"
        raise UsageError("parallel=", f"{parallel} doesn't go", remedy)
    check_local("workdir", workdir)
    if force and skip_existing:
        raise UsageError("force=True", "doesn't go with skip_existing=True", "leave one out")
    if output is not None and _is_there(run, os.fspath(output), layout) and not force:
        if not skip_existing:
            raise already_exists(place(output))
        search["evaluations"] = 0
    journal = search.get("journal")
    if output is not None and journal is not None and not is_url(output):
        check_local("journal", journal)
        if os.path.abspath(output) == os.path.abspath(journal):
            raise UsageError("journal=", f"'{journal}' is the output", "name another file")
    search.setdefault("name", {"callable": _name(metric)})
    with Tuner(run, **search) as tuner, contextlib.ExitStack() as stack:
        if started:
            started(tuner)
        folder = None
        if command:
            known = sum(len(each.values) for each in tuner.measured)
            command.seeds = itertools.count(tuner.seed + known)
        if command or given == "path":
            folder = stack.enter_context(_workplace(tuner.journal.path, workdir))
        measure = _by_command(command) if command else _by_call(metric, tuner.made)  # type: ignore[arg-type]
        loop = _Loop(tuner, measure, folder, parallel if command else 0, report, progress)
        try:
            loop.run()
        except BaseException:
            if command:
                command.stop()
            raise
        result = tuner.result()
        if output is None or result.best is None:
            return result
        how: dict[str, Any] = {"force": force, "skip_existing": skip_existing}
        how |= tuner.written | tuner.planned
        saved = result.best.solution.save(output, progress=progress, **how)
        return replace(result, output=saved)


def _is_there(run: Run, output: str, layout: str) -> bool:
    """Whether the output exists; raises UsageError where it can't be one, and for a template."""
    from posthoc_cli.synthesis.output_files import is_there
    from posthoc_cli.synthesis.paths import is_folder

    if "{" in output or (layout == "file" and is_folder(output)):
        problem = f"'{output}' names no single file"
        raise UsageError("output=", problem, "give one, such as best.safetensors")
    (path,) = run.paths(output, sigma_rel=0.1, layout=layout)
    return is_there(path, layout == "folder")


def _name(metric: object) -> str:
    kind = type(metric)
    named = [getattr(metric, each, None) for each in ("__module__", "__qualname__")]
    return ".".join(map(str, named if all(named) else (kind.__module__, kind.__qualname__)))


def _by_command(command: CommandMetric) -> Measure:
    def measure(trial: Trial, made: Output | None, slot: int) -> list[float]:
        assert made is not None
        path = made.path.absolute()
        weights = path if made.manifest is None else path / made.manifest["weights"]
        values = {
            "file": str(weights),
            "folder": str(path),
            "sigma_rel": trial.target.text,
            "step": str(trial.step),
            "target": trial.target.named,
        }
        return command.measure(values, slot)

    return measure


def _by_call(metric: Callable[[Any], Any], how: Mapping[str, Any]) -> Measure:
    def measure(trial: Trial, made: Output | None, slot: int) -> list[float]:
        network = trial.state_dict(**how) if made is None else made.path
        try:
            return [finite(each) for each in values_of(metric(network))]
        except NoMetric as error:
            raise MachineError("metric=", str(error), "see what went wrong") from None

    return measure


@contextlib.contextmanager
def _workplace(journal: Path | None, workdir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder for the networks that are measured, gone at the end.

    It lies beside the journal, or in `workdir`; what a killed run has left in it goes first. Who
    has the journal's lock has this folder.
    """
    if journal is None:
        with tempfile.TemporaryDirectory(prefix="posthoc-tune-", dir=workdir) as made:
            yield Path(made)
        return
    place = journal.with_name(f".{journal.name}.networks")
    if workdir is not None:
        make_folder(Path(workdir), parents=True)
        known = hashlib.blake2s(os.fsencode(journal.absolute())).hexdigest()[:12]
        place = Path(workdir, f"posthoc-tune-{known}")
    remove_whole(place)
    make_folder(place)
    try:
        yield place
    finally:
        with contextlib.suppress(MachineError):
            remove_whole(place)


def _remove(made: Output) -> None:
    for path in (made.path, *made.shards):
        remove_whole(path)


class _Here:
    """Runs what is submitted at once, in this thread."""

    def submit(self, call: Callable[..., list[float]], *given: Any) -> Future[list[float]]:
        future: Future[list[float]] = Future()
        try:
            future.set_result(call(*given))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class _Loop:
    """Networks are written, measured in `parallel` threads (0: in this one) and removed."""

    tuner: Tuner
    measure: Measure
    place: Path | None
    parallel: int
    report: Report | None
    progress: Progress | None
    queue: list[Trial] = field(default_factory=list)
    made: dict[Trial, Output] = field(default_factory=dict)
    running: dict[Future[list[float]], tuple[Trial, int, float]] = field(default_factory=dict)
    failure: tuple[Exception, Trial] | None = None

    def run(self) -> None:
        """Until the search is done. Raises the first failure, when what ran beside it has ended."""
        slots = max(self.parallel, 1)
        pool = ThreadPoolExecutor(slots) if self.parallel else None
        free = list(range(slots))
        try:
            while True:
                if not self.queue and free and self.failure is None:
                    self._write(len(free))
                while self.queue and free and self.failure is None:
                    self._start(pool or _Here(), self.queue.pop(0), free.pop(0))
                if not self.running:
                    break
                # A signal that comes just before the wait begins is heeded only when that ends.
                done, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    free = sorted([*free, self._finish(future)])
        finally:
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)
        if self.failure is not None:
            raise self._said(*self.failure)

    def _write(self, slots: int) -> None:
        """Ask for networks and write them: all of the first round in one pass, if the disk has room
        for them."""
        count = max(len(self.tuner.first), slots)
        if self.place is None:
            self.queue = self.tuner.ask(1)
            return
        size = self.tuner.bytes_of_network() + _MARGIN
        make_folder(self.place)  # again, if a metric has removed it
        count = max(int(min(count, free_bytes(self.place) // size)), 1)
        while True:
            self.queue = self.tuner.ask(count)
            try:
                self.made |= self.tuner.save(self.queue, self.place, self.progress)
                return
            except MachineError as error:  # as by a quota, which free_bytes doesn't know
                count = len(self.queue) // 2
                if not count or not is_full(error):
                    raise
                self.tuner.forget(self.queue)

    def _start(self, pool: ThreadPoolExecutor | _Here, trial: Trial, slot: int) -> None:
        if self.report:
            self.report(self.tuner, trial, None)
        began = time.perf_counter()
        future = pool.submit(self.measure, trial, self.made.get(trial), slot)
        self.running[future] = trial, slot, began

    def _finish(self, future: Future[list[float]]) -> int:
        """Keep what came of a measurement; returns its slot."""
        trial, slot, began = self.running.pop(future)
        seconds = round(time.perf_counter() - began, 3)
        try:
            keep = partial(self.tuner.tell, trial, future.result(), seconds=seconds)
        except Exception as error:
            why = error.problem if isinstance(error, PosthocError) else repr(error)
            keep = partial(self.tuner.fail, trial, why, seconds=seconds)
            self.failure = self.failure or (error, trial)
        made = self.made.pop(trial, None)
        try:
            evaluation = keep()
        except MachineError:  # the disk is full: what is measured is worth more than the network
            if made is None:
                raise
            _remove(made)
            evaluation = keep()
        if made is not None and made not in self.made.values():
            _remove(made)
        if self.report:
            self.report(self.tuner, trial, evaluation)
        return slot

    def _said(self, error: Exception, trial: Trial) -> Exception:
        """The failure, with what was measured, and what is kept of the rest."""
        if not isinstance(error, MachineError):
            return error
        kept, path = len(self.tuner.measured), self.tuner.journal.path
        where = f" ({kept} measured so far, kept in {path})" if path and kept else ""
        problem = f"{error.problem} at {trial.target}"
        return MachineError(error.subject, problem, error.remedy + where)
