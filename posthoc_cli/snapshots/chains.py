"""Links of chains that are missing, broken or replaced: told once, with all that goes with them."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from posthoc_cli.errors import LinkError, in_line, quoted


def broken_links(problems: list[tuple[str, str]], found: Sequence[tuple[str, LinkError]]) -> None:
    """Add a problem for each broken link of the snapshots in `found`, by their names.

    Snapshots before it, and of other chains, are in order.
    """
    by_link: dict[str, list[str]] = {}
    states: dict[str, str] = {}
    for name, error in found:
        link = posixpath.join(posixpath.dirname(name), error.link)
        by_link.setdefault(link, []).append(name)
        states[link] = error.state
    known = dict(problems)
    for link, names in by_link.items():
        one = len(names) == 1
        which = f"{len(names)} snapshot{'' if one else 's'} {'is a' if one else 'are'} difference"
        state = known[link].rpartition("; ")[0] if link in known else states[link]
        message = (
            f"{state}, and {which}{'' if one else 's'} that build{'s' if one else ''} on it "
            f"({quoted(names, 3)}); copy it again, or leave out what needs it with "
            "skip_incomplete=True"
        )
        problems[:] = [each for each in problems if each[0] != link]
        problems.append((link, in_line(message)))
