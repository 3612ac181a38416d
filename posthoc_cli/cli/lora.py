"""What `synthesize` and `inspect` tell of a LoRA."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from posthoc_cli.cli.console import counted
from posthoc_cli.errors import percent, printable

if TYPE_CHECKING:
    from posthoc_cli.synthesis.lora_report import LoraReport
    from posthoc_cli.synthesis.outputs import Saved


_THREADS = "OPENBLAS_NUM_THREADS"


def load_numpy() -> None:
    """Import NumPy with one thread for linear algebra, where nobody has said how many.

    Of matrices as small as a LoRA's, OpenBLAS's threads spend most of their time waiting for each
    other: on two busy processors they took 20 times as long as one.
    """
    if "numpy" not in sys.modules and _THREADS not in os.environ:
        os.environ[_THREADS] = "1"
        import numpy  # noqa: F401 (it reads the variable now, and programs that we start shall not)

        del os.environ[_THREADS]


def lora_lines(saved: Saved) -> Iterator[str]:
    """How far the two averages are apart, and what is to be done before the outputs are loaded."""
    report = saved.lora
    if report is None:
        return
    known = [each for each in report.distances.values() if each is not None]
    span = (
        " to ".join(dict.fromkeys(percent(each) for each in (min(known), max(known))))
        if known
        else ""
    )
    modules = counted(report.modules, "module")
    if not report.exact:
        if known:
            some = "" if report.measured == report.modules else f"{report.measured} of "
            yield (
                f"the factors of the LoRA are averaged as they are: what they do is {span} from "
                f"the average of what they did (in {some}{modules}); --lora exact writes the latter"
            )
        return
    low = min(each[0] for each in report.ranks.values())
    high = max(each[1] for each in report.ranks.values())
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    apart = f"; the average of the factors would be {span} from it" if known else ""
    yield f"the products of {modules} are averaged, and have {ranks}{apart}"
    if report.odd:
        yield (
            f"{counted(len(report.odd), 'module')}, such as '{printable(report.odd[0])}', averaged "
            "factor by factor: what they do is no product of two factors"
        )
    from posthoc_cli.snapshots.lora_scale import changes

    for at, shared in report.shared.items():
        if shared is not None and report.in_config and saved.outputs[at].manifest is None:
            yield (
                f"{saved.outputs[at].path}: the adapter_config.json beside it has to say "
                f"{json.dumps(changes(shared))[1:-1]}"
            )


def lora_row(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """What `inspect` shows of a recipe's products: label and text, if there are any."""
    lora = recipe.get("lora")
    if not isinstance(lora, dict):
        return []
    most = "" if lora.get("rank") is None else f", of rank {lora['rank']} at most"
    return [("lora", f"{lora.get('mode')}: factors of averaged products{most}")]


def describe_lora(document: dict[str, Any], report: LoraReport | None) -> None:
    """Add what --json has of a LoRA to a document; docs/json.md has its schema."""
    if report is None:
        document["lora"] = None
        return
    document["lora"] = {
        "mode": "exact" if report.exact else "factors",
        "modules": report.modules,
        "measured": report.measured,
        "odd": list(report.odd),
    }
    for at, target in enumerate(document["targets"]):
        if at not in report.distances:
            continue
        target["lora"] = {"distance": report.distances[at]}
        if report.exact:
            from posthoc_cli.snapshots.lora_scale import changes

            shared = report.shared[at] if report.in_config else None
            target["lora"]["ranks"] = list(report.ranks[at])
            target["lora"]["adapter_config"] = None if shared is None else changes(shared)
