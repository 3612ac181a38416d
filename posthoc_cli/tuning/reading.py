"""The metric in what a command has printed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from posthoc_cli.errors import UsageError, in_line

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""What steers a terminal: colours, movements, titles."""

_NUMBER = re.compile(
    r"(?<![\w.])(?<!\d[-+])"
    r"([-+]?(?:\d+(?:,\d+)*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf|infinity))"
    r"(?!\w)(?!\.\d)",
    re.IGNORECASE,
)
"""A number that stands alone: 3.2 of `FID-50k: 3.2` and of `fid=3.2%`, nothing of `v1.2` or `50k`.

One with commas in it is looked at again.
"""

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")


_LONGEST, _MOST_DOCUMENTS = 10_000, 1000
"""Characters of a line, and beginnings of JSON, that are looked at: the last ones."""


class NoMetric(Exception):
    """There is no metric in it; the text says why."""


def clean(text: str) -> str:
    """`text` as a terminal would show it: without colours, and only what bars show at their end."""
    lines = _ESCAPES.sub("", text).replace("−", "-").replace("\r\n", "\n").split("\n")
    return "\n".join(_last_shown(line) for line in lines)


def _last_shown(line: str) -> str:
    shown = [part for part in line.split("\r") if part.strip()]
    return shown[-1] if shown else ""


def last_number(text: str) -> tuple[float, str]:
    """The last number on the last line that isn't empty; and what is ambiguous about it, if so.

    Raises NoMetric.
    """
    lines = [line.strip() for line in clean(text).split("\n") if line.strip()]
    if not lines:
        raise NoMetric("it printed nothing")
    line = lines[-1][-_LONGEST:]
    numbers = list(_numbers(line))
    if not numbers:
        raise NoMetric(f"no number stands on its last line, '{in_line(line[-200:])}'")
    if len(numbers) == 1:
        return numbers[0], ""
    shown = f"{numbers[-1]:g}"
    return numbers[
        -1
    ], f"of the {len(numbers)} numbers in '{in_line(line[-200:])}' the last, {shown}"


def _numbers(line: str) -> Iterator[float]:
    matches = list(_NUMBER.finditer(line))
    for match in matches:
        text = match[1]
        if "," not in text:
            yield float(text)
            continue
        groups = text.split(",")
        if _THOUSANDS.fullmatch(text) and (len(groups) > 2 or "." in text):
            yield float(text.replace(",", ""))
        elif len(groups) == 2 and "." not in text and match is matches[-1]:
            raise NoMetric(f"'{text}' may be {text.replace(',', '.')} or {text.replace(',', '')}")
        else:
            yield from map(float, groups)


def by_regex(text: str, pattern: re.Pattern[str]) -> float:
    """The first group of the last match of `pattern`, or the whole match. Raises NoMetric."""
    matches = list(pattern.finditer(clean(text)))
    if not matches:
        raise NoMetric("nothing in what it printed fits metric_regex=")
    found = matches[-1][1 if pattern.groups else 0] or ""
    try:
        return float(found.strip().rstrip("%"))
    except ValueError:
        raise NoMetric(f"metric_regex= finds '{in_line(found)}', which is no number") from None


def read_pattern(text: str) -> re.Pattern[str]:
    """Raises UsageError for what is no regular expression."""
    try:
        return re.compile(text, re.MULTILINE)
    except re.error as error:
        raise UsageError(
            "metric_regex=", f"'{text}' is no regular expression ({error})", "write 'FID: (.*)'"
        ) from None


def by_key(text: str, key: str) -> float:
    """The value at the dotted `key` of the last JSON that was printed. Raises NoMetric."""
    value = None
    for document in _documents(clean(text)):
        value = _at(document, key)
        if value is not None:
            break
    else:
        raise NoMetric(f"there is no JSON with '{key}' in what it printed")
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        shown = in_line(json.dumps(value))
        raise NoMetric(f"'{key}' is {shown}, which is no number") from None


def _documents(text: str) -> Iterator[Any]:
    """The JSON objects and lists that begin a line, the last first."""
    decoder = json.JSONDecoder()
    begins = list(re.finditer(r"^[ \t]*(?=[{\[])", text, re.MULTILINE))
    for match in reversed(begins[-_MOST_DOCUMENTS:]):
        try:
            yield decoder.raw_decode(text, match.end())[0]
        except (ValueError, RecursionError):
            continue


def _at(document: Any, key: str) -> Any:
    """What lies at `a.b.0` of nested objects and lists; None where there is nothing.

    A key that has dots itself goes first.
    """
    if isinstance(document, list) and key.partition(".")[0].isdecimal():
        first, _, rest = key.partition(".")
        if int(first) >= len(document):
            return None
        return _at(document[int(first)], rest) if rest else document[int(first)]
    if not isinstance(document, dict):
        return None
    if key in document:
        return document[key]
    parts = key.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        inside = document.get(".".join(parts[:cut]))
        found = None if inside is None else _at(inside, ".".join(parts[cut:]))
        if found is not None:
            return found
    return None


MOST = 1e150
"""No metric is so large: its square, which the search takes, is no number."""


def finite(value: float) -> float:
    """`value`; raises NoMetric unless it is a finite number."""
    if not abs(value) < MOST:
        kind = "NaN" if math.isnan(value) else "infinite" if math.isinf(value) else "too large"
        raise NoMetric(f"the metric is {kind}")
    return value
