"""The sections of the soak, by name."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from tests.soak.big import big
from tests.soak.calls import calls
from tests.soak.changing import changing
from tests.soak.disk import disk
from tests.soak.fuzz import fuzz
from tests.soak.heavy import heavy
from tests.soak.kill import interrupt, kill
from tests.soak.pickles import pickles
from tests.soak.races import races
from tests.soak.ranks import ranks
from tests.soak.special import special
from tests.soak.tally import Tally
from tests.soak.trackers import trackers
from tests.soak.tuning import tuning
from tests.soak.uploads import uploads
from tests.soak.values import values

SECTIONS: dict[str, Callable[[int, Tally], None]] = {
    "fuzz": fuzz,
    "heavy": heavy,
    "interrupt": interrupt,
    "kill": kill,
    "calls": calls,
    "changing": changing,
    "disk": disk,
    "tuning": tuning,
    "races": races,
    "big": big,
    "special": special,
    "pickles": pickles,
    "values": values,
    "trackers": trackers,
    "ranks": ranks,
    "uploads": uploads,
}
"""In the order in which they begin: the longest first."""

ALONE = ("fuzz", "heavy")
"""The first takes all processors by itself, the second is about time."""


def run_section(name: str, seed: int) -> tuple[Tally, str]:
    """What came of one section, with the line that says it."""
    tally = Tally(name)
    try:
        SECTIONS[name](seed, tally)
    except Exception:  # a night's other sections shall not be lost with it
        tally.count("ends of the section itself", [traceback.format_exc()])
    return tally, str(tally)
