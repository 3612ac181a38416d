"""Processes that torchrun or srun has started together: they share one call."""

from __future__ import annotations

import os
import re
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


_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""What torchrun, mpirun and a step of srun say in the environment. Slurm comes last: its step may
have started the daemons of mpirun. A batch script has only the first and last of Slurm's names: it
is no step."""

_SAME = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "SLURM_STEP_ID")
"""What differs, beside ranks, from one launch to another."""

_MOST_DIGITS = 9

_ENDING = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a process, where there are such."""


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among the ranks; None where it is alone.

    Raises UsageError when the variables make no sense.
    """
    said = {name for name, text in environment.items() if text}
    names = next((each for each in _NAMES if {*each[:2]} <= said), None)
    if names is None:
        return None
    found = []
    for name in (*names[:2], names[2] if names[2] in said else "SLURM_LOCALID"):
        text = environment.get(name) or "0"
        if not _is_number(text):
            raise UsageError(
                name, f"'{text}' is not a whole number", "start it by torchrun or srun"
            )
        found.append(int(text))
    rank, size, local_rank = found
    if size == 1:
        return None
    from posthoc_cli.storage.ranks import is_helper

    if is_helper(environment, (*names[:2], *_SAME)):
        return None
    if not rank < size:
        raise UsageError(
            names[0], f"{rank} is none of {size} ranks", "start it by torchrun or srun"
        )
    return Place(rank, size, local_rank)


def find_address(place: Place, environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Where the ranks meet: by MASTER_ADDR and MASTER_PORT, or else as Slurm's job says.

    Raises UsageError where nothing says so.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    job, step = (environment.get(name) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    by_slurm = [first_node(nodes), ""]
    if nodes and _is_number(job) and _is_number(step):
        by_slurm[1] = str(12_000 + (16 * int(job) + int(step)) % 18_000)
    said = []
    for name, other, example in zip(
        ("MASTER_ADDR", "MASTER_PORT"), by_slurm, ("the first machine's name", "29500"), strict=True
    ):
        said.append(environment.get(name) or other)
        if not said[-1]:
            from posthoc_cli.storage.wires import ALONE

            problem = f"is not set, and this is one of {place.size} ranks that share a call"
            raise UsageError(name, problem, f"set it to {example}, or {ALONE}")
    address, port = said
    if not _is_number(port) or not 0 < int(port) < 1 << 16:
        raise UsageError("MASTER_PORT", f"'{port}' is no port", "set it to a free one, as 29500")
    return address, int(port)


def first_node(nodes: str) -> str:
    """The first of a list of Slurm's, such as `node[07-09,12],login`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def run_as(place: Place, command: Callable[[], int], tell: Callable[[Exception], int]) -> int:
    """Run `command` on rank 0, with the help of the others; returns its exit code, on all.

    `tell` prints an error and returns its exit code. What is wrong is told by one rank.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what it would say is said by us
    from posthoc_cli.storage import ranks
    from posthoc_cli.storage.signs import Left

    code = 1
    try:
        address = find_address(place)
        ranks.join(place.rank, place.size, place.local_rank, address, sys.argv[1:], tell)
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
