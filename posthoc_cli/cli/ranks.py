"""Processes that torchrun or srun has started together: they share one call."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from posthoc_cli.errors import MachineError, PosthocError, UsageError


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the processes this is: `rank` of `size`, `local_rank` on its machine."""

    rank: int
    size: int
    local_rank: int


_TORCH = "RANK", "WORLD_SIZE", "LOCAL_RANK"
_SLURM = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
"""What torchrun, and a step of srun, say in the environment. A batch script has only the first and
last of Slurm's: it is no step."""

_MOST_DIGITS = 9

_ENDING = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a process, where there are such."""


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among the ranks; None where it is alone.

    Raises UsageError when the variables make no sense.
    """
    said = {name for name, text in environment.items() if text}
    names = next((each for each in (_TORCH, _SLURM) if {*each[:2]} <= said), None)
    if names is None:
        return None
    found = []
    for name in names:
        text = environment.get(name) or "0"
        if not text.isascii() or not text.isdecimal() or len(text) > _MOST_DIGITS:
            raise UsageError(
                name, f"'{text}' is not a whole number", "start it by torchrun or srun"
            )
        found.append(int(text))
    rank, size, local_rank = found
    if size == 1:
        return None
    from posthoc_cli.storage.ranks import is_helper

    if is_helper(names[0]):
        return None
    if not rank < size:
        raise UsageError(
            names[0], f"{rank} is none of {size} ranks", "start it by torchrun or srun"
        )
    return Place(rank, size, local_rank)


def check_address(place: Place, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError unless the environment says where the ranks meet."""
    for name, example in (("MASTER_ADDR", "the first machine's name"), ("MASTER_PORT", "29500")):
        if not environment.get(name):
            problem = f"is not set, and this is one of {place.size} tasks that share a call"
            remedy = f"set it to {example}; or start each alone, by env -u SLURM_PROCID -u RANK"
            raise UsageError(name, problem, remedy)
    port = environment["MASTER_PORT"]
    if not port.isascii() or not port.isdecimal() or not 0 < int(port[:_MOST_DIGITS]) < 1 << 16:
        raise UsageError("MASTER_PORT", f"'{port}' is no port", "set it to a free one, as 29500")


def run_as(place: Place, command: Callable[[], int], tell: Callable[[Exception], int]) -> int:
    """Run `command` on rank 0, with the help of the others; returns its exit code, on all.

    `tell` prints an error and returns its exit code. What is wrong is told by one rank.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what it would say is said by us
    from posthoc_cli.storage import ranks
    from posthoc_cli.storage.signs import Left

    code = 1
    try:
        check_address(place)
        ranks.join(place.rank, place.size, place.local_rank, sys.argv[1:], tell)
        if place.rank:
            ranks.serve()
        code = command()
    except Left as left:
        code = left.code
    except PosthocError as error:  # never of the command, which tells its own
        code = error.exit_code
        if ranks.leave(code, error) and (isinstance(error, MachineError) or not place.rank):
            tell(error)
    except KeyboardInterrupt:
        code = 130
        if not place.rank:
            raise
    except SystemExit as leaving:  # terminated
        code = leaving.code if isinstance(leaving.code, int) else 1
    finally:
        for name in _ENDING:  # all are told this code, and it is too late for another
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        ranks.leave(code)
    return code


def trouble() -> PosthocError | None:
    """Why this rank was interrupted, if it was because another is lost."""
    ranks = sys.modules.get("posthoc_cli.storage.ranks")
    return ranks.trouble() if ranks else None
