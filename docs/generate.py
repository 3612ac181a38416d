"""Write what the documentation takes from the program itself: `make docs`.

docs/commands.md is every command's --help; a test checks that it is up to date. docs/terminal.svg
is a picture of a real run: the demo's snapshots, inspected, solved and synthesized.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = 80
COMMANDS = ("inspect", "convert", "pack", "solve", "synthesize", "tune", "verify")
COMMANDS += ("plot", "plan", "demo")


def posthoc(*arguments: str, cwd: Path = HERE, colour: bool = False) -> str:
    """What the command prints, as on a terminal of 80 columns."""
    command = shutil.which("posthoc", path=sysconfig.get_path("scripts")) or "posthoc"
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    if colour:
        environment["FORCE_COLOR"] = "1"
    done = subprocess.run(
        [command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def command_reference() -> str:
    """The text of docs/commands.md."""
    parts = [
        "# Commands\n\nWhat each command says with `--help`. Written by `make docs`, "
        "and checked by a test.\n",
    ]
    for command in ("", *COMMANDS):
        title = f"posthoc {command}".strip()
        text = posthoc(*command.split(), "--help").strip("\n")
        parts.append(f"## {title}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def picture() -> str:
    """The SVG of a run on the demo's snapshots."""
    from rich.console import Console
    from rich.terminal_theme import DIMMED_MONOKAI
    from rich.text import Text

    with tempfile.TemporaryDirectory() as temporary, open(os.devnull, "w") as nowhere:
        folder = Path(temporary)
        posthoc("demo", "demo", cwd=folder)
        (folder / "demo" / "snapshots").rename(folder / "snapshots")
        console = Console(
            record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        for line in (
            "posthoc solve snapshots --sigma-rel 0.07",
            "posthoc synthesize snapshots --sigma-rel 0.03,0.07,0.15 -o emas/",
        ):
            console.print(Text(f"$ {line}", "bold green"))
            console.print(Text.from_ansi(posthoc(*line.split()[1:], cwd=folder, colour=True)))
    svg = console.export_svg(title="posthoc", theme=DIMMED_MONOKAI, unique_id="posthoc")
    # The picture must not fetch a font from anywhere: any monospaced one does.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace")


if __name__ == "__main__":
    (HERE / "commands.md").write_text(command_reference(), encoding="utf-8")
    if "--no-picture" not in sys.argv:
        (HERE / "terminal.svg").write_text(picture(), encoding="utf-8")
