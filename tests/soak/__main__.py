"""Run the sections of the soak, and say what was tried and what was lost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tests.soak.big import big
from tests.soak.changing import changing
from tests.soak.disk import disk
from tests.soak.fuzz import fuzz
from tests.soak.heavy import heavy
from tests.soak.kill import interrupt, kill
from tests.soak.races import races
from tests.soak.special import special
from tests.soak.tally import Tally

SECTIONS: dict[str, Callable[[int, Tally], None]] = {
    "fuzz": fuzz,
    "heavy": heavy,
    "kill": kill,
    "interrupt": interrupt,
    "disk": disk,
    "changing": changing,
    "races": races,
    "special": special,
    "big": big,
}

SEED = 20231204


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--seed", type=int, default=SEED)
    wanted = parser.parse_args()
    for name in wanted.sections:
        if name not in SECTIONS:
            parser.error(f"there is no section {name}: choose of {', '.join(SECTIONS)}")
    tallies = []
    for name in wanted.sections or SECTIONS:
        tally = Tally(name)
        SECTIONS[name](wanted.seed, tally)
        print(tally, flush=True)
        tallies.append(tally)
    tried, lost = (sum(tally.total for tally in tallies), sum(len(t.losses) for t in tallies))
    print(f"soak, seed {wanted.seed}: {tried:,} tried in {len(tallies)} sections, {lost:,} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
