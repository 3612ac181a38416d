"""Measure `posthoc synthesize` beside what else there is: one command, medians and ratios.

    python tests/benchmarks/speed.py                 # every section; 40 GB of disk, half an hour
    python tests/benchmarks/speed.py half memory     # some of them
    python tests/benchmarks/speed.py half --peers    # with other tools, installed apart

Data is made in a temporary folder (--folder to choose where) and removed. Commands run in turn,
round after round, so that all of them see the same machine; the page cache is warm unless said
otherwise. Times are of whole processes. The **floor** of a run is `cat` of all its inputs to
/dev/null plus `dd conv=fsync` of as many bytes as it writes, in the same rounds; its **work time**
is the whole process less that of the same command on snapshots of 1 kB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from posthoc_cli.storage.header import make_header

HERE = Path(__file__).parent
POSTHOC = shutil.which("posthoc", path=sysconfig.get_path("scripts")) or "posthoc"
PROFILES = (0.05, 0.10)
EIGHT = "0.03,0.04,0.06,0.07,0.08,0.12,0.15,0.20"
STORED = {
    "float16": (np.dtype(np.float16), "F16"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float32": (np.dtype(np.float32), "F32"),
}


@dataclass
class Command:
    """A command with what its runs took: wall seconds, peak MB.

    `reads` is a folder whose files are brought into the page cache before each run.
    """

    name: str
    arguments: Sequence[str]
    writes: Sequence[Path] = ()
    reads: Path | None = None
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    def run(self, warm_up: bool = False) -> None:
        if self.reads is not None:
            cat = ["cat", *map(str, self.reads.iterdir())]
            subprocess.run(cat, stdout=subprocess.DEVNULL, check=True)
        begin = time.perf_counter()
        process = subprocess.Popen(self.arguments, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        self.clean_up()
        if status:
            sys.exit(f"{self.name} failed: {' '.join(map(str, self.arguments))}")
        if not warm_up:
            self.seconds.append(seconds)
            self.peak = max(self.peak, usage.ru_maxrss / 1024)

    def clean_up(self) -> None:
        """Remove what was written, and let the disk come to rest: the next command starts equal."""
        for path in self.writes:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        os.sync()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(commands: Sequence[Command], rounds: int, before: Callable[[], None] | None = None):
    """Run all commands in turn, `rounds` times after one round that does not count."""
    for turn in range(rounds + 1):
        for command in commands:
            if before is not None:
                before()
            command.run(warm_up=turn == 0)


def make_snapshots(
    folder: Path, count: int, parameters: int, dtype: str = "float16", tensors: int = 64
) -> list[Path]:
    """`count` snapshots of `parameters` random numbers in `tensors` tensors of unequal sizes.

    Made in a process of its own: a command's peak memory is counted from that of the process which
    starts it, so this one has to stay small.
    """
    maker = multiprocessing.get_context("spawn").Process(
        target=_make_snapshots, args=(folder, count, parameters, dtype, tensors)
    )
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit("could not make the snapshots")
    return sorted(folder.iterdir())


def _make_snapshots(folder: Path, count: int, parameters: int, dtype: str, tensors: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.5, 1.5, tensors)
    sizes = np.maximum((shares / shares.sum() * parameters).astype(int), 1)
    pool = rng.standard_normal(1 << 22).astype(np.float32) * 0.02
    for k in range(count):
        # Slices of one pool at shifting places: random enough, and quick to make.
        moved = pool + 0.001 * np.float32(k)
        content = {}
        for t, size in enumerate(sizes):
            start = int(rng.integers(len(pool)))
            values = np.resize(np.roll(moved, -start), size).astype(STORED[dtype][0])
            content[f"blocks.{t:04d}.weight"] = values
        step, sigma_rel = 1000 * (k // 2 + 1), PROFILES[k % 2]
        path = folder / f"s{step:06d}-{sigma_rel:.2f}.safetensors"
        _write(path, content, {"step": str(step), "sigma_rel": str(sigma_rel)})


def _write(path: Path, content: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """As safetensors.numpy.save_file, which has no bfloat16."""
    names = dict(STORED.values())
    header, places = make_header(
        {name: (names[array.dtype], array.shape) for name, array in content.items()}, metadata
    )
    with open(path, "wb") as file:
        file.write(header)
        for name in places:
            file.write(content[name].tobytes())


def synthesize(folder: Path, targets: str, output: Path, *more: str) -> Command:
    count = targets.count(",") + 1
    words = ["synthesize", str(folder), "--sigma-rel", targets, "-o", f"{output}/", "-q", *more]
    return Command(f"posthoc, {count} target{'s' * (count > 1)}", [POSTHOC, *words], [output])


def floor_of(paths: Sequence[Path], written: int, scratch: Path) -> list[Command]:
    """`cat` of the inputs, and `dd` of `written` bytes."""
    blocks = -(-written // (4 << 20))
    return [
        Command("cat of the inputs", ["cat", *map(str, paths)]),
        Command(
            "dd of the outputs",
            ["dd", "if=/dev/zero", f"of={scratch}", "bs=4M", f"count={blocks}", "conv=fsync",
             "status=none"],
            [scratch],
        ),
    ]  # fmt: skip


class Bench:
    """The folder, the sizes and the tables of one run of this script."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.parameters, self.rounds = folder, options.parameters, options.rounds
        self.peers, self.plot, self.tensors = options.peers, options.plot, options.tensors
        make_snapshots(folder / "tiny", 16, 500, tensors=4)

    def work(self, title: str, folder: Path, paths: Sequence[Path], targets: str, limit: float):
        """One scenario against its floor; returns its command."""
        size = paths[0].stat().st_size
        count = targets.count(",") + 1
        output, scratch = self.folder / "out", self.folder / "scratch"
        ours = synthesize(folder, targets, output)
        idle = synthesize(self.folder / "tiny", targets, self.folder / "out-tiny")
        floor = floor_of(paths, size * count, scratch)
        alternate([ours, idle, *floor], self.rounds)
        base = sum(command.median for command in floor)
        work = ours.median - idle.median
        print(
            f"| {title} | {len(paths)} x {size / 1e6:.0f} MB | {floor[0].median:.2f} s | "
            f"{floor[1].median:.2f} s | {ours.median:.2f} s | {idle.median:.2f} s | {work:.2f} s | "
            f"**{work / base:.2f}** | {limit} | {ours.peak:.0f} MB |",
            flush=True,
        )
        return ours

    def head(self, title: str) -> None:
        print(f"\n### {title}\n")

    def floor_head(self) -> None:
        print(
            "| scenario | inputs | cat | dd | posthoc | on 1 kB | work | work / floor | to meet |"
            " peak |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        )

    # Sections

    def half(self) -> None:
        """float16: one target and eight, against the floor, the plain script and the peers."""
        folder = self.folder / "half"
        paths = make_snapshots(folder, 16, self.parameters, tensors=self.tensors)
        self.head("float16 snapshots")
        self.floor_head()
        self.work("one target", folder, paths, "0.07", 1.5)
        self.work("eight targets", folder, paths, EIGHT, 1.5)
        ours = [
            synthesize(folder, "0.07", self.folder / "out"),
            synthesize(folder, EIGHT, self.folder / "out8"),
        ]
        others = [*self.plain_scripts(folder), *(self.peer_commands(folder) if self.peers else [])]
        for command in [*ours, *others]:
            command.reads = command.reads or folder
        alternate([*ours, *others], max(self.rounds // 2, 2))
        print("\n| whole process | seconds | posthoc is faster by | for eight | peak |")
        print("| --- | --- | --- | --- | --- |")
        for command in [*ours, *others]:
            one, eight = command.median / ours[0].median, 8 * command.median / ours[1].median
            ratios = "| |" if command in ours else f"{one:.1f} times | {eight:.1f} times |"
            print(f"| {command.name} | {command.median:.2f} | {ratios} {command.peak:.0f} MB |")
        shutil.rmtree(folder)
        shutil.rmtree(self.folder / "peers", ignore_errors=True)

    def plain_scripts(self, folder: Path) -> list[Command]:
        weights = self.folder / "weights.json"
        solved = subprocess.run(
            [POSTHOC, "solve", str(folder), "--sigma-rel", "0.07", "--json", "-q"],
            capture_output=True,
            check=True,
        )
        weights.write_bytes(solved.stdout)
        commands = []
        for name, option in (("plain script", ""), ("plain script, in-place adds", "--in-place")):
            output = self.folder / f"plain{option}.safetensors"
            script = [sys.executable, str(HERE / "plain_script.py")]
            arguments = [*script, str(folder), str(weights), str(output), *option.split()]
            commands.append(Command(name, arguments, [output]))
        return commands

    def peer_commands(self, folder: Path) -> list[Command]:
        from peers import prepare

        scratch = self.folder / "peers"
        return [
            Command(
                name,
                arguments,
                writes,
                scratch / "checkpoints" if str(scratch / "checkpoints") in arguments else None,
            )
            for name, arguments, writes in prepare(folder, scratch)
        ]

    def dtypes(self) -> None:
        """bfloat16 and float32: bytes per second against float16's."""
        self.head("Dtypes, at the same bytes")
        self.floor_head()
        rates = {}
        for dtype in ("float16", "bfloat16", "float32"):
            folder = self.folder / dtype
            parameters = self.parameters * 2 // STORED[dtype][0].itemsize
            paths = make_snapshots(folder, 8, parameters, dtype)
            rates[dtype] = self.work(dtype, folder, paths, "0.07", 1.5).median
            shutil.rmtree(folder)
        print(
            "\nTime at the same bytes, over float16's: "
            + ", ".join(f"{d} {s / rates['float16']:.2f}" for d, s in rates.items())
        )

    def lora(self) -> None:
        """20 LoRA files of 150 MB in 2,000 tensors each."""
        folder = self.folder / "lora"
        paths = make_snapshots(folder, 20, 75_000_000, tensors=2000)
        self.head("A LoRA: 2,000 tensors a file")
        self.floor_head()
        self.work("LoRA, one target", folder, paths, "0.07", 2)
        shutil.rmtree(folder)

    def groups(self) -> None:
        """Every other tensor of another EMA length, beside one length for all."""
        self.head("Lengths per tensor")
        print("| inputs | tensors | targets | one length | every other another | ratio | peak |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for parameters, tensors in ((self.parameters, 64), (self.parameters // 8, 2000)):
            folder = self.folder / f"groups{tensors}"
            paths = make_snapshots(folder, 16, parameters, tensors=tensors)
            for targets in ("0.07", EIGHT):
                runs = [
                    synthesize(folder, targets, self.folder / f"out{at}", *rule)
                    for at, rule in enumerate(([], ["--target-for", "*[02468].weight=0.1"]))
                ]
                alternate(runs, self.rounds)
                one, two = (run.median for run in runs)
                print(
                    f"| 16 x {paths[0].stat().st_size / 1e6:.0f} MB | {tensors} |"
                    f" {targets.count(',') + 1} | {one:.2f} s | {two:.2f} s |"
                    f" **{two / one:.2f}** | {runs[1].peak:.0f} MB |",
                    flush=True,
                )
            shutil.rmtree(folder)

    def memory(self) -> None:
        """Peak memory as snapshots get larger and more."""
        self.head("Peak memory")
        print("| snapshots | targets | peak |\n| --- | --- | --- |")
        small = self.parameters // 2
        for count, parameters in ((4, small), (4, 4 * small), (16, small), (64, small)):
            folder = self.folder / "memory"
            make_snapshots(folder, min(count, 16), parameters)
            _multiply(folder, count)
            for targets in ("0.07", EIGHT):
                command = synthesize(folder, targets, self.folder / "out", *_NAMES)
                command.run()
                size = next(folder.iterdir()).stat().st_size
                print(
                    f"| {count} x {size / 1e6:.0f} MB | {targets.count(',') + 1} | "
                    f"{command.peak:.0f} MB |",
                    flush=True,
                )
            shutil.rmtree(folder)

    def scaling(self) -> None:
        """Seconds for 4, 16 and 64 snapshots and 1 to 16 targets."""
        self.head("Cost by snapshots and targets")
        folder = self.folder / "scaling"
        make_snapshots(folder, 16, self.parameters // 4)
        size = next(folder.iterdir()).stat().st_size
        targets = {
            n: ",".join(f"{0.03 + 0.01 * k:.2f}" for k in range(n)) for n in (1, 2, 4, 8, 16)
        }
        commands = {}
        folders = {}
        for count in (4, 16, 64):
            folders[count] = self.folder / f"scaling-{count}"
            folders[count].mkdir()
            for path in sorted(folder.iterdir())[:count]:
                os.link(path, folders[count] / path.name)
            _multiply(folders[count], count)
            for n, text in targets.items():
                output = self.folder / f"out-{count}-{n}"
                commands[count, n] = synthesize(folders[count], text, output, *_NAMES)
        alternate(list(commands.values()), self.rounds)
        print(f"Snapshots of {size / 1e6:.0f} MB; seconds, whole process.\n")
        print("| snapshots | " + " | ".join(f"{n} targets" for n in targets) + " |")
        print("| --- |" + " --- |" * len(targets))
        for count in folders:
            row = " | ".join(f"{commands[count, n].median:.2f}" for n in targets)
            print(f"| {count} | {row} |")
        if self.plot:
            _plot_scaling({key: c.median for key, c in commands.items()}, size, self.plot)
        for path in [folder, *folders.values()]:
            shutil.rmtree(path)

    def start(self) -> None:
        """Start-up, against importing NumPy."""
        self.head("Start-up, 32 small snapshots")
        folder = self.folder / "small"
        make_snapshots(folder, 32, 10_000, tensors=32)
        numpy = Command("python -c 'import numpy'", [sys.executable, "-c", "import numpy"])
        ours = [
            Command("posthoc --help", [POSTHOC, "--help"]),
            Command("posthoc inspect", [POSTHOC, "inspect", str(folder)]),
            Command("posthoc solve", [POSTHOC, "solve", str(folder), "--sigma-rel", "0.07"]),
        ]
        alternate([numpy, *ours], 4 * self.rounds)
        print("| command | seconds | over NumPy's |\n| --- | --- | --- |")
        for command in [numpy, *ours]:
            ratio = command.median / numpy.median
            print(f"| {command.name} | {command.median:.3f} | {ratio:.2f} |")
        shutil.rmtree(folder)

    def cold(self) -> None:
        """With the snapshots out of the page cache: edm2, which reads all once, and blup's sample
        before that, against `cat`."""
        self.head("Cold cache")
        folder = self.folder / "cold"
        paths = make_snapshots(folder, 16, self.parameters)
        commands = [
            *(synthesize(folder, "0.07", self.folder / f"out-{method}", "--method", method)
              for method in ("edm2", "blup")),
            floor_of(paths, 1, self.folder / "scratch")[0],
        ]  # fmt: skip
        alternate(commands, self.rounds, before=lambda: _drop(paths))
        edm2, blup, cat = (command.median for command in commands)
        print(
            f"cat {cat:.2f} s, edm2 {edm2:.2f} s: {edm2 / cat:.2f} times (to meet: 1.3); "
            f"blup {blup:.2f} s: {blup / edm2:.2f} times edm2's"
        )
        shutil.rmtree(folder)


def _plot_scaling(seconds: dict[tuple[int, int], float], size: int, file: str) -> None:
    """Whole-process seconds by number of snapshots, a line for each number of targets."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    counts = sorted({count for count, _ in seconds})
    targets = sorted({n for _, n in seconds})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours = plt.get_cmap("viridis")
    for at, n in enumerate(targets):
        label = f"{n} target{'s' if n > 1 else ''}"
        times = [seconds[count, n] for count in counts]
        axes[0].plot(counts, times, "o-", color=colours(at / len(targets)), label=label)
    for at, count in enumerate(counts):
        times = [seconds[count, n] for n in targets]
        colour = colours(at / len(counts))
        axes[1].plot(targets, times, "o-", color=colour, label=f"{count} snapshots")
    axes[0].set_xlabel(f"snapshots of {size / 1e6:.0f} MB")
    axes[1].set_xlabel("targets in one pass")
    for axis, ticks in zip(axes, (counts, targets), strict=True):
        axis.set_xticks(ticks)
        axis.set_ylabel("seconds, whole process")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(file)


_NAMES = ("--pattern", "s{step}-{sigma_rel}.safetensors")


def _multiply(folder: Path, count: int) -> None:
    """Make `count` snapshots of those in `folder`, by hard links under names of later steps."""
    paths = sorted(folder.iterdir())
    last = max(int(path.name[1:7]) for path in paths)
    for k in range(len(paths), count):
        source = paths[k % len(paths)]
        step = int(source.name[1:7]) + last * (k // len(paths))
        os.link(source, folder / f"s{step:06d}{source.name[7:]}")


def _drop(paths: Sequence[Path]) -> None:
    """Take the files out of the page cache."""
    os.sync()
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


SECTIONS = ("half", "dtypes", "lora", "groups", "memory", "scaling", "start", "cold")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--folder", help="where to put the data")
    parser.add_argument("--parameters", type=int, default=268_000_000, help="of a large snapshot")
    parser.add_argument("--tensors", type=int, default=64, help="of a snapshot, in section half")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", metavar="FILE", help="draw the scaling section's table")
    parser.add_argument("--peers", action="store_true", help="install and measure other tools too")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}")
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} processors, Python {platform.python_version()}; "
        f"medians of {options.rounds} alternating rounds"
    )
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="posthoc-bench-") as folder:
        bench = Bench(Path(folder), options)
        for section in options.sections or SECTIONS:
            getattr(bench, section)()


if __name__ == "__main__":
    main()
