"""Files moved out of the way, so that nothing is lost."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from posthoc_cli.storage.disk import make_folder, write_errors


def set_aside(paths: Sequence[Path], place: Path, *, replace: bool = False) -> None:
    """Move files into the folder `place`, which is made, on the same disk.

    A file of that name there is replaced with `replace`; otherwise the moved one gets a number.
    Raises MachineError when that fails.
    """
    make_folder(place, parents=True)
    for path in paths:
        target = place / path.name
        numbers = itertools.count(2)
        while not replace and os.path.lexists(target):
            target = place / f"{path.stem}.{next(numbers)}{path.suffix}"
        with write_errors(path):
            os.replace(path, target)
