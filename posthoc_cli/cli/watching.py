"""What `tune` shows while it runs: a table on a terminal, a line for each evaluation elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from posthoc_cli.cli.console import counted, note, plain_table, stderr_console
from posthoc_cli.errors import percent

if TYPE_CHECKING:
    from rich.console import RenderableType

    from posthoc_cli.api.tuner import Trial, Tuner
    from posthoc_cli.tuning.journal import Evaluation
    from posthoc_cli.tuning.metric import CommandMetric

_SHOWN = 14
"""Evaluations in the table: the last ones."""


class Watch:
    """Is told what happens, by one thread, and draws it when it is asked to, by another."""

    def __init__(self, command: CommandMetric, parallel: int, quiet: bool, live: bool) -> None:
        self.tuner: Tuner | None = None
        self.command, self.parallel, self.quiet, self.live = command, parallel, quiet, live
        self.running: dict[Trial, float] = {}
        self.reading: tuple[int, int] = (0, 0)
        self.best = ""
        self.refresh: Callable[[], None] = lambda: None
        self._noted = False
        self._lock = threading.Lock()

    def begin(self, tuner: Tuner) -> None:
        self.tuner = tuner
        self.best = known(tuner)
        if found := len(tuner.measured):
            note(f"{tuner.journal.path}: {counted(found, 'evaluation')} from before", self.quiet)
        if not self.live:
            low, high = tuner.axis.low, tuner.axis.high
            note(f"searching {low} to {high.text}", self.quiet)

    def progress(self, count: int, total: int) -> None:
        """Called from any thread with the bytes just read, and those of this pass."""
        with self._lock:
            read, of = self.reading
            self.reading = (count if read >= of else read + count), total

    def report(self, tuner: Tuner, trial: Trial, evaluation: Evaluation | None) -> None:
        if evaluation is None:
            self.running[trial] = time.monotonic()
            self.refresh()
            return
        self.running.pop(trial, None)
        self.best = known(tuner)
        if self.command.notes and not self._noted:
            self._noted = True
            note(f"metric=: {self.command.notes[0]}", self.quiet)
        at = f"{len(tuner.measured)}/{tuner.evaluations} {trial.target}"
        at += f" at step {trial.step}" if tuner.steps else ""
        if evaluation.failed:
            rest = f"; waiting for {len(self.running)} that still run" if self.running else ""
            note(f"{trial.target}: {evaluation.failed}{rest}", self.quiet or not self.running)
        elif not self.live:
            error = evaluation.expected_error
            off = "" if error is None else f"expected error {percent(error)}, "
            told = f"{at}: {evaluation.metric:.6g} ({off}{evaluation.seconds:.1f} s)"
            note(f"{told}; {self.best}", self.quiet)
        self.refresh()

    def draw(self) -> RenderableType:
        """The table: what was measured, what runs, the best so far and the time left."""
        from rich.console import Group
        from rich.text import Text

        tuner = self.tuner
        if tuner is None:
            return Text("reading the snapshots", "dim")
        steps = ["step"] if tuner.steps else []
        table = plain_table(
            right=[tuner.axis.parameter, *steps, "metric", "expected error", "time"]
        )
        done = tuner.measured
        least = min if tuner.minimize else max
        lucky = least((each.metric for each in done if each.metric is not None), default=None)
        for one in done[-_SHOWN:]:
            error = "" if one.expected_error is None else percent(one.expected_error)
            at = [str(one.step)] if steps else []
            cells = [one.target.partition(":")[2], *at, f"{one.metric:.6g}", error]
            style = "bold" if one.metric == lucky else ""
            table.add_row(*cells, f"{one.seconds:.1f} s", style=style)
        for trial, began in list(self.running.items()):
            error = "" if trial.expected_error is None else percent(trial.expected_error)
            at = [str(trial.step)] if steps else []
            since = f"{time.monotonic() - began:.0f} s"
            table.add_row(trial.target.text, *at, "...", error, since, style="dim")
        lines = [f"{len(done)} of {tuner.evaluations}{self._left(tuner)}"]
        lines += [self.best] if self.best else []
        read, total = self.reading
        if read < total:
            lines.append(f"writing networks: {read / total:.0%} read")
        return Group(table, Text(""), *(Text(line) for line in lines))

    def _left(self, tuner: Tuner) -> str:
        took = [each.seconds for each in tuner.measured]
        rest = tuner.left + len(tuner.pending)
        if not took or not rest:
            return ""
        seconds = sum(took) / len(took) * rest / self.parallel
        for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
            if seconds >= 1.5 * size or size == 1:
                return f", about {seconds / size:.0f} {unit} left"
        return ""


def known(tuner: Tuner) -> str:
    """What is known so far, in a line; nothing before anything was measured."""
    belief, best = tuner.posterior, tuner.best
    if belief is None or best is None:
        return ""
    target, step, value = best
    low, high = (tuner.axis.target(each).text for each in belief.interval)
    at = f" at step {step}" if tuner.steps else ""
    return f"best so far {target} ({low} to {high}){at}: {value:.6g}"


@contextlib.contextmanager
def watching(command: CommandMetric, parallel: int, quiet: bool) -> Iterator[Watch]:
    """Shows on stderr what is reported in the `with` block, and, if it is interrupted, what is
    known by then."""
    console = stderr_console()
    live = console.is_terminal and not console.is_dumb_terminal and not quiet
    watch = Watch(command, parallel, quiet, live)
    try:
        with contextlib.ExitStack() as stack:
            if live:
                from rich.live import Live

                shown = stack.enter_context(
                    Live(
                        get_renderable=watch.draw,
                        console=console,
                        refresh_per_second=4,
                        transient=True,
                        redirect_stdout=False,
                        vertical_overflow="crop",
                    )
                )
                watch.refresh = shown.refresh
            yield watch
    except (KeyboardInterrupt, SystemExit):
        if watch.tuner is not None:
            done = counted(len(watch.tuner.measured), "evaluation")
            best = f"; {watch.best}" if watch.best else ""
            where = f"{done} kept in {watch.tuner.journal.path}; the same call goes on there"
            note(f"{where}{best}", quiet)
        raise
