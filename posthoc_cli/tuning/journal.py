"""The journal of a search: what it is of, and each evaluation, a line of JSON each.

docs/json.md has its schema. The first line is the header; those of KEYS say what the search is of,
and another search can't go on with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli._version import __version__
from posthoc_cli.errors import UsageError, in_line
from posthoc_cli.storage.lines import LineFile, read_lines
from posthoc_cli.storage.stores import exists

VERSION = 1

_BEGINNING = b'{"posthoc_tune":'

KEYS = {
    "snapshots": "other snapshots, or of ones that are read in another way",
    "metric": "another metric",
    "goal": "another goal",
    "parameter": "another parameter",
    "range": "another range",
    "step": "another step",
    "steps": "other steps",
    "method": "another method",
    "dtype": "another dtype",
    "layout": "another layout",
    "lora": "another average of a LoRA",
    "copy": "other tensors to copy",
    "drop": "other tensors to drop",
    "seed": "another seed",
}
"""What a journal can be of, besides what is wanted; in the order in which it is told."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One measured network: the metric at a target, of so many `seconds`.

    `length` is that of the target as tuning.axis counts it, `values` the metric of each repeat,
    `metric` their mean; None where it `failed`, and then that says why. `expected_error` is
    relative, None where it isn't known.
    """

    target: str
    length: float
    sigma_rel: float | None
    step: int
    metric: float | None
    values: tuple[float, ...] = ()
    seconds: float = 0.0
    expected_error: float | None = None
    failed: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As a line of the journal."""
        return {
            "target": self.target,
            "sigma_rel": self.sigma_rel,
            "length": self.length,
            "step": self.step,
            "metric": self.metric,
            "values": list(self.values),
            "seconds": self.seconds,
            "expected_error": self.expected_error,
            **({"failed": self.failed} if self.failed else {}),
        }


class Journal:
    """A search's evaluations, written to `path` if there is one, and those that were there.

    Raises UsageError for a file that is no journal, or one of another search; MachineError when
    another process writes it, and when the disk fails.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = LineFile(path) if path else None
        self.path = path
        self.header: dict[str, Any] = {}
        self.evaluations: list[Evaluation] = []
        try:
            if self._file and path:
                self.header, self.evaluations = _parse(path, self._file.lines)
        except BaseException:
            self.close()
            raise

    def begin(self, header: Mapping[str, Any]) -> None:
        """Say what the search is of; what was measured already has to be of the same."""
        begun = json.loads(json.dumps({"posthoc_tune": VERSION, "posthoc": __version__, **header}))
        if all(each.metric is None for each in self.evaluations) and self.header != begun:
            if self._file:
                self._file.restart()
            self._append(begun)
            self.header, self.evaluations = begun, []
            return
        for key, what in KEYS.items():
            was = self.header.get(key)
            if was != begun[key]:
                told = isinstance(was, (str, int)) and key != "snapshots"
                shown = f" ({in_line(str(was))})" if told else ""
                problem = f"a journal of {what}{shown}"
                remedy = "name another with journal=, or remove it to begin anew"
                if key == "snapshots" and self.header.get("step") != begun["step"]:
                    remedy = f"give step={in_line(str(self.header.get('step')))}, or {remedy}"
                raise UsageError(str(self.path), problem, remedy)

    def add(self, evaluation: Evaluation) -> None:
        """Add what was measured; it is on the disk when this returns."""
        self._append(evaluation.as_dict())
        self.evaluations.append(evaluation)

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file:
            self._file.append(json.dumps(entry, allow_nan=False))

    def close(self) -> None:
        """Let other processes have it."""
        if self._file:
            self._file.close()


def is_journal(path: str | os.PathLike[str]) -> bool:
    """Whether a file is called like a journal, or begins as one does."""
    if str(path).endswith(".jsonl"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False


def read_journal(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Evaluation]]:
    """The header of a journal and its evaluations; another process may be writing it.

    Raises UsageError for a file that is none, or isn't there; MachineError where it can't be read.
    """
    header, evaluations = _parse(Path(path), read_lines(Path(path))[0])
    if not header:
        problem = "is an empty journal" if exists(Path(path)) else "there is no such journal"
        raise UsageError(str(path), problem, "check the path")
    return header, evaluations


def _parse(path: Path, lines: Sequence[str]) -> tuple[dict[str, Any], list[Evaluation]]:
    def no_journal(problem: str) -> UsageError:
        return UsageError(str(path), problem, "name another file")

    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise no_journal(f"is no journal of posthoc tune (line {number} is no JSON object)")
        entries.append(entry)
    if not entries:
        return {}, []
    header, *rest = entries
    if "posthoc_tune" not in header:
        raise no_journal("is no journal of posthoc tune")
    if header["posthoc_tune"] != VERSION:
        raise no_journal("is a journal of another version of posthoc")
    try:
        return header, [_evaluation(entry) for entry in rest]
    except (KeyError, TypeError, ValueError) as error:
        raise no_journal(f"an evaluation in it makes no sense ({error})") from None


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    def number(key: str) -> float | None:
        value = entry.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            raise ValueError(f"its {key} is no number")
        return float(value)

    length, metric = number("length"), number("metric")
    if length is None or length <= 0 or (metric is None and not entry.get("failed")):
        raise ValueError("it has no length or no metric")
    values = entry.get("values") or ([] if metric is None else [metric])
    if not all(isinstance(each, (int, float)) and _finite(each) for each in values):
        raise ValueError("its values are no numbers")
    return Evaluation(
        target=str(entry["target"]),
        length=length,
        sigma_rel=number("sigma_rel"),
        step=int(entry["step"]),
        metric=metric,
        values=tuple(map(float, values)),
        seconds=number("seconds") or 0.0,
        expected_error=number("expected_error"),
        failed=str(entry.get("failed") or ""),
    )


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
