"""Post-hoc EMA: rebuild an EMA of any length from the snapshots of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posthoc_cli.karras import KarrasEMA
    from posthoc_cli.tracking import PostHocEMA

__version__ = "0.1.0"
__all__ = ["KarrasEMA", "PostHocEMA", "__version__"]


def __getattr__(name: str) -> Any:
    # Only a training loop needs torch; the command line must not wait a second for its import.
    if name == "KarrasEMA":
        from posthoc_cli.karras import KarrasEMA

        return KarrasEMA
    if name == "PostHocEMA":
        from posthoc_cli.tracking import PostHocEMA

        return PostHocEMA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
