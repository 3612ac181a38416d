"""Post-hoc EMA: rebuild an EMA of any length from the snapshots of a training run.

    run = posthoc_cli.open_snapshots("snapshots")
    run.solve(sigma_rel=0.07).save("ema-0.07.safetensors")

docs/python.md tells it all. Importing the package imports neither torch nor NumPy: each name below
is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posthoc_cli._version import __version__

if TYPE_CHECKING:
    from posthoc_cli.api import Profile, Run, Solution, open_snapshots, verify
    from posthoc_cli.errors import (
        IncompleteError,
        MachineError,
        PosthocError,
        SnapshotError,
        UnknownError,
        UsageError,
    )
    from posthoc_cli.training.karras import KarrasEMA
    from posthoc_cli.training.posthoc_ema import PostHocEMA

__all__ = [
    "IncompleteError",
    "KarrasEMA",
    "MachineError",
    "PostHocEMA",
    "PosthocError",
    "Profile",
    "Run",
    "SnapshotError",
    "Solution",
    "UnknownError",
    "UsageError",
    "__version__",
    "open_snapshots",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "KarrasEMA":
        from posthoc_cli.training.karras import KarrasEMA

        return KarrasEMA
    if name == "PostHocEMA":
        from posthoc_cli.training.posthoc_ema import PostHocEMA

        return PostHocEMA
    if name.endswith("Error"):
        from posthoc_cli import errors

        return getattr(errors, name)
    from posthoc_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
