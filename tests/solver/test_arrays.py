"""Where to compute."""

from __future__ import annotations

import pytest

from posthoc_cli.errors import UsageError
from posthoc_cli.solver.arrays import resolve_device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "", "mps"])
def test_device_refuses(device: str) -> None:
    with pytest.raises(UsageError, match=r"^device=: .* is not known; choose cpu"):
        resolve_device(device)
