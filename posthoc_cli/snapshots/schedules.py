"""What says by which decay a running average was made, where its step is said elsewhere.

A `config.json` beside the network, as diffusers' `EMAModel.save_pretrained` leaves it, or the
file's own metadata with the same keys; the file's path; or what the caller says of all files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats import find_checkpoint
from posthoc_cli.solver import Schedule, Scheduled
from posthoc_cli.storage.metadata import DECAY, SCHEDULE, UPDATES
from posthoc_cli.storage.shards import find_network
from posthoc_cli.storage.stores import file_status, open_file

_LONGEST = 1 << 20
"""Bytes of a config.json that is read."""


def read_config(folder: Path) -> dict[str, Any]:
    """What the config.json says that lies beside the one network of a folder; {} for none."""
    config = folder / "config.json"
    if file_status(config) is None or not (find_network(folder) or find_checkpoint(folder)):
        return {}
    with open_file(config) as (file, _):
        text = file.read(_LONGEST)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def stated_schedule(said: Mapping[str, Any]) -> tuple[Scheduled, int | None] | None:
    """A schedule that metadata or a config says, and how many updates there were; None for none.

    It is that of an average of step 1. A decay alone is none: some layers have one too. Raises
    SnapshotError for what makes no sense.
    """
    if DECAY not in said or not any(key in said for key in (*SCHEDULE, UPDATES)):
        return None
    try:
        told = {
            each.name: _value(said[each.name], str(each.type))
            for each in fields(Schedule)
            if each.name in said
        }
        updates = _value(said[UPDATES], "int") if UPDATES in said else None
        return Scheduled(1, Schedule(**told)), updates
    except (ValueError, TypeError, OverflowError) as error:
        raise SnapshotError(
            "", f"the schedule of its EMA makes no sense: {error}", "correct it, or give ema_decay="
        ) from None


def begun(average: Scheduled, updates: int) -> Scheduled:
    """The average with its schedule counted in training steps, where it is of so many `updates`.

    Up to the step where it began the average is taken to be the network, as diffusers' is up to
    `update_after_step`. Raises SnapshotError where it may as well be updated every few steps.
    """
    step = int(average.step)
    late = step - updates
    if late < 0 or (late and (updates == 0 or step % updates == 0)):
        raise SnapshotError(
            "",
            f"its EMA was updated {updates} times up to step {step}",
            "leave it out with only=, or give pattern= with {decay}",
        )
    schedule = average.schedule
    late += schedule.update_after_step
    return replace(average, schedule=replace(schedule, update_after_step=late))


def _value(value: Any, kind: str) -> Any:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    number = float(value)
    if kind == "int" and number != int(number):
        raise ValueError(f"{value!r} is no whole number")
    return int(number) if kind == "int" else number


def no_steps(file: str, unit: str) -> SnapshotError:
    """The error for an average whose file counts no steps, as other averages of it do."""
    return SnapshotError(
        file,
        f"its name counts {unit}, and a decay is one a step",
        "give pattern= with {step}, and as ema_decay= the decay from one number to the next, which "
        "is that of a step to the power of the steps",
    )
