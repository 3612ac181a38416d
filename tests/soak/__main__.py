"""Run the sections of the soak, and say what was tried and what was lost."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.soak.sections import ALONE, SECTIONS, run_section
from tests.soak.tally import Tally

SEED = 20231204


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=2, help="sections at a time (default: 2)")
    wanted = parser.parse_args()
    for name in wanted.sections:
        if name not in SECTIONS:
            parser.error(f"there is no section {name}: choose of {', '.join(SECTIONS)}")
    names = wanted.sections or list(SECTIONS)
    begin = time.monotonic()
    tried = lost = 0
    for tally, line in _run(names, wanted.seed, max(wanted.jobs, 1)):
        print(line, flush=True)
        tried += tally.total
        lost += len(tally.losses)
    print(
        f"soak, seed {wanted.seed}: {tried:,} tried in {len(names)} sections, {lost:,} lost "
        f"({time.monotonic() - begin:.0f} s)"
    )
    return 1 if lost else 0


def _run(names: list[str], seed: int, jobs: int) -> Iterator[tuple[Tally, str]]:
    """Each section's tally, with the line that says it, as they end."""
    for name in names:
        if name in ALONE:
            yield run_section(name, seed)
    # Started afresh: what a section does to its process, such as its working folder, is its own.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        others = [pool.submit(run_section, name, seed) for name in names if name not in ALONE]
        for done in as_completed(others):
            yield done.result()


if __name__ == "__main__":
    sys.exit(main())
