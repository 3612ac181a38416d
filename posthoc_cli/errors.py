"""The errors a user can meet, each with its exit code.

PosthocError
├── MachineError    1  the machine failed: disk full, permission, device out of memory
├── UsageError      2  the command line is wrong
└── SnapshotError   3  the snapshots are wrong: corrupt, inconsistent, none found, no profile
    ├── IncompleteError    ... a part of one isn't there: it may still be being written
    │   └── LinkError      ... a file that a delta builds on is missing, broken or another
    ├── NoNetworkError     ... a file holds something else: a log, an optimizer's state
    ├── NoValuesError      ... nothing in their values is finite
    ├── UnknownError       ... nothing says the step and profile of one
    └── AmbiguousError     ... their names can be read in two ways
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

LEFT_BEHIND: list[str] = []
"""What interrupted work couldn't undo, for the command to tell: an interrupt has no words."""


_SECRET = re.compile(
    r"""(?x) (?<=://) (?: (?<=http://|ttps://) [^/\s]* | [^/\s:@]* : [^/\s]* ) @  # a login
    | (?<=\?) (?= \S* \b(?:sig|[a-z-]*signature|[a-z-]*token|[a-z-]*credential)= ) [^\s'"<>]*
    """,
    re.IGNORECASE,
)
"""What of a URL is nobody's business: a name and password, a query that is signed."""


def without_secrets(text: str) -> str:
    """`text` without the logins and signatures of the URLs in it."""
    return _SECRET.sub(lambda found: "" if found[0].endswith("@") else "...", text)


def printable(text: str) -> str:
    """`text` with everything that could steer a terminal escaped, on one line.

    What a file says about itself (names, metadata) is not ours to trust: it passes through here
    before it is shown.
    """
    if "://" in text:
        text = without_secrets(text)
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def brief(text: str) -> str:
    """`text`, or the beginning and the end of a long one: a tensor's name may be a megabyte."""
    return text if len(text) <= 800 else f"{text[:500]} ... {text[-250:]}"


def in_line(text: str) -> str:
    """`text` for a line of a message: short, and nothing in it steers a terminal.

    It is cut before its characters are looked at one by one, as it may have millions of them.
    """
    return brief(printable(brief(text)))


def in_bytes(count: float) -> str:
    """`count` bytes for people: `512.0 MB`."""
    return in_units(count, (" B", " kB", " MB", " GB", " TB", " PB"))


def in_units(count: float, units: Sequence[str]) -> str:
    """`count` in that one of `units`, each 1000 times the one before, that has up to 3 digits."""
    power = 0
    while count >= 999.95 and power < len(units) - 1:
        count /= 1000
        power += 1
    return f"{count:.{1 if power else 0}f}{units[power]}"


def either(choices: Iterable[str]) -> str:
    """`cpu, cuda or auto`."""
    *others, last = choices
    return f"{', '.join(others)} or {last}"


def quoted(names: Sequence[str], most: int) -> str:
    """`'a', 'b' and 3 more`: at most so many of `names`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def percent(fraction: float) -> str:
    """`3.42%`: three digits that count."""
    value = 100 * fraction
    if not math.isfinite(value):
        return "unknown"
    if value >= 999.5:
        return f"{value:,.0f}%"
    return f"{value:.3g}%" if value >= 1e-3 else "<0.001%"


class PosthocError(Exception):
    """One line for the user: which file or option, what is wrong with it, and what to do."""

    exit_code = 1

    def __init__(self, subject: str, problem: str, remedy: str) -> None:
        super().__init__(subject, problem, remedy)
        self.subject = subject
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        subject, problem = map(in_line, (self.subject, self.problem))
        return f"{subject}: {problem}; {printable(self.remedy)}"


class MachineError(PosthocError):
    """The machine failed: disk full, permission denied, device out of memory."""

    exit_code = 1


class UsageError(PosthocError):
    """The command line is wrong."""

    exit_code = 2


class SnapshotError(PosthocError):
    """The snapshots are wrong: corrupt, inconsistent, none found, or without a profile."""

    exit_code = 3


class IncompleteError(SnapshotError):
    """A part of a snapshot isn't there: it may still be being written."""


class LinkError(IncompleteError):
    """A file that a snapshot stored as a difference builds on is missing, broken or another.

    `link` is its name, `state` what is wrong with it.
    """

    def __init__(self, subject: str, link: str, state: str) -> None:
        problem = f"'{printable(link)}', which it builds on, {state}"
        super().__init__(subject, problem, "copy that again, or use skip_incomplete=True")
        self.link = link
        self.state = state


class NoNetworkError(SnapshotError):
    """A file holds something else than a network: a log, an optimizer's state."""


class NoValuesError(SnapshotError):
    """Nothing in the values of snapshots is finite, so that nothing can be measured."""


class UnknownError(SnapshotError):
    """Nothing says the step and profile of a snapshot."""


class AmbiguousError(SnapshotError):
    """The names of snapshots can be read in two ways, or more.

    `rows` are the files with the steps by each reading, `patterns` those that decide for it; None
    where no pattern can.
    """

    def __init__(
        self,
        subject: str,
        problem: str,
        remedy: str,
        patterns: Sequence[str | None] = (),
        rows: Sequence[tuple[str, tuple[int, ...]]] = (),
    ) -> None:
        super().__init__(subject, problem, remedy)
        self.patterns = patterns
        self.rows = rows
