"""Post-hoc EMA: rebuild an EMA of any length from the snapshots of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posthoc_cli._version import __version__

if TYPE_CHECKING:
    from posthoc_cli.training.karras import KarrasEMA
    from posthoc_cli.training.posthoc_ema import PostHocEMA

__all__ = ["KarrasEMA", "PostHocEMA", "__version__"]


def __getattr__(name: str) -> Any:
    # Only a training loop needs torch; the command line must not wait a second for its import.
    if name == "KarrasEMA":
        from posthoc_cli.training.karras import KarrasEMA

        return KarrasEMA
    if name == "PostHocEMA":
        from posthoc_cli.training.posthoc_ema import PostHocEMA

        return PostHocEMA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
