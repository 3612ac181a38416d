"""`posthoc demo`: train a small network, then do with its snapshots what a user would do."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli.console import note, plain_table, print_table, stderr_console, stdout_console
from posthoc_cli.errors import MachineError, UsageError, percent

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

_SHOWN = 0.07
"""The target whose samples are drawn."""


def demo(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="A new folder for what the demo makes.", show_default=True
        ),
    ] = "posthoc-demo",
    steps: Annotated[
        int, typer.Option(metavar="STEPS", min=64, help="Training steps.", hidden=True)
    ] = 8000,
) -> None:
    """Try posthoc on a network that is trained here and now, in less than a minute.

    A small denoiser learns the points of a spiral, and EMAs at sigma_rel 0.05 and 0.10 are saved
    as snapshots. From these, posthoc rebuilds EMAs at 0.03, 0.07, 0.15 and 0.20. As the demo has
    really tracked those too, it can say how near posthoc comes.

    \b
    Examples:
      posthoc demo
      posthoc demo my-demo
    """
    from posthoc_cli.storage.manifest import is_taken
    from posthoc_cli.storage.places import Url, place

    base = place(folder)
    if isinstance(base, Url):
        raise UsageError(folder, "is a URL", "name a new folder of this machine")
    if is_taken(base):
        raise UsageError(folder, "exists already", "name a new or an empty folder")
    try:
        from posthoc_cli.training.demo import TRUE_PROFILES, distance, sample, score, train
    except ModuleNotFoundError as missing:
        raise MachineError(
            "posthoc demo", f"needs {missing.name}", f"pip install {missing.name}"
        ) from None
    from safetensors.torch import load_file

    from posthoc_cli.storage.disk import make_folder

    console = stdout_console()
    with _one_thread(), _training_bar(steps) as progress:
        final, tracked = train(base, steps, progress)
    snapshots, output = base / "snapshots", base / "synthesized"
    targets = ",".join(map(str, TRUE_PROFILES))
    _run(console, "inspect", str(snapshots))
    _run(console, "solve", str(snapshots), "--sigma-rel", str(_SHOWN))
    make_folder(output)
    made: dict[tuple[str, float], Mapping[str, Tensor]] = {}
    for method in ("edm2", "blup"):
        template = str(output / method) + "-{sigma_rel}.safetensors"
        chosen = () if method == "edm2" else ("--method", method)
        wanted = ("--sigma-rel", targets, *chosen)
        _run(console, "synthesize", str(snapshots), *wanted, "-o", template, "-q")
        for sigma_rel in TRUE_PROFILES:
            made[method, sigma_rel] = load_file(output / f"{method}-{sigma_rel}.safetensors")

    headings = ("sigma_rel", "edm2 off by", "blup off by", "loss of edm2's", "of the tracked")
    table = plain_table(right=headings)
    for sigma_rel, truth in tracked.items():
        away = distance(truth, final)
        table.add_row(
            str(sigma_rel),
            *(percent(distance(made[m, sigma_rel], truth) / away) for m in ("edm2", "blup")),
            f"{score(made['edm2', sigma_rel]):.4f}",
            f"{score(truth):.4f}",
        )
    console.print("How near the synthesized EMAs come to EMAs that were really tracked:\n")
    print_table(console, table)
    console.print(
        "\nOff by: the distance to the tracked EMA, over that EMA's distance to the final "
        f"weights. The loss of the final weights is {score(final):.4f}. All files are in {base}.",
        style="dim",
    )
    _draw_samples(
        console,
        {
            "final weights": sample(final),
            f"tracked EMA, {_SHOWN}": sample(tracked[_SHOWN]),
            f"synthesized, {_SHOWN}": sample(made["edm2", _SHOWN]),
        },
    )


def _run(console: Console, *arguments: str) -> None:
    """Run a command of posthoc as a user would, under the line that a user would type."""
    console.print(f"$ posthoc {shlex.join(arguments)}", style="bold", soft_wrap=True)
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "posthoc_cli", *arguments], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    console.print()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The network is so small that threads would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _training_bar(steps: int) -> Iterator[Callable[[int], None] | None]:
    console = stderr_console()
    if not console.is_terminal or console.is_dumb_terminal:
        note(f"training a small denoiser for {steps} steps", quiet=False)
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True, expand=True) as bar:
        task = bar.add_task("training a small denoiser", total=steps)
        yield lambda step: bar.update(task, completed=step)


def _draw_samples(console: Console, samples: Mapping[str, Tensor]) -> None:
    """Points drawn from the networks, side by side, where the terminal has dots for it."""
    if not console.encoding.lower().startswith("utf"):
        return
    table: Any = plain_table()
    for title in samples:
        table.add_column(title, justify="center")
    table.add_row(*(_scatter(points.tolist()) for points in samples.values()))
    console.print("\nPoints drawn from the networks:\n")
    print_table(console, table)


def _scatter(points: list[list[float]], columns: int = 24, rows: int = 12) -> str:
    """Points of the square from -1.1 to 1.1 in braille, two by four dots a character."""
    dots = [[0] * columns for _ in range(rows)]
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    for x, y in points:
        column, row = int((x / 2.2 + 0.5) * 2 * columns), int((0.5 - y / 2.2) * 4 * rows)
        if 0 <= column < 2 * columns and 0 <= row < 4 * rows:
            dots[row // 4][column // 2] |= bits[row % 4][column % 2]
    return "\n".join("".join(chr(0x2800 + cell) for cell in line) for line in dots)
