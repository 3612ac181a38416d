"""Post-hoc EMA: rebuild an EMA of any length from the snapshots of a training run."""

__version__ = "0.1.0"
