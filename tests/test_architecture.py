"""The walls between the packages, read from the sources: docs/architecture.md draws them."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import ENVIRONMENT, ROOT, write_snapshot

PACKAGE = ROOT / "posthoc_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MOST_FLAT = 8
MOST_LINES = 450

LAYERS = (
    "storage",
    "formats",
    "snapshots",
    "synthesis",
    "tuning",
    "api",
    "training",
    "adapters",
    "plotting",
    "cli",
    "__main__",
)
"""Each may import those before it, the solver, and what is `FOR_ALL`; none after it."""

FOR_ALL = {"errors", "_version"}

LAZY = {"api", "training"}
"""What the package's `__init__` names, but imports only when it is asked for."""

ONLY_STORAGE = {
    *("copy_file_range", "fdatasync", "fsync", "ftruncate", "link", "listdir", "lstat", "open"),
    *("posix_fallocate", "posix_fadvise", "pread", "preadv", "pwrite", "pwritev", "remove"),
    *("rename", "readlink", "replace", "scandir", "stat", "symlink", "truncate", "unlink", "walk"),
    *("path.exists", "path.getmtime", "path.getsize", "path.isdir", "path.isfile", "path.islink"),
    *("path.lexists", "path.realpath", "path.samefile"),
}
"""Functions of `os` that read, write or move files, or ask what is at a path: of a URL they would
know nothing (see `storage/stores.py`)."""

ONLY_STORAGE_METHODS = {
    *("exists", "glob", "hardlink_to", "is_dir", "is_file", "is_symlink", "iterdir", "lstat"),
    *("read_bytes", "read_text", "rename", "resolve", "rglob", "samefile", "stat", "symlink_to"),
    *("touch", "unlink", "write_bytes", "write_text"),
}
"""Methods of `Path` that do; its `replace` is told from that of a string by its one argument."""

OF_THE_PROCESS = {
    "gc.disable",
    "gc.enable",
    "gc.freeze",
    "gc.set_threshold",
    "resource.setrlimit",
    "signal.pthread_sigmask",
    "signal.signal",
    "sys.setrecursionlimit",
    "torch.set_num_threads",
}
"""What changes the whole process: it is for the command to do, not for a library."""

EXCEPTIONS = {
    # It puts /dev/null where the caller has closed a standard stream.
    "cli/__init__.py": {"os.open"},
}


@dataclass(frozen=True)
class Module:
    """A module of the package and what it imports of the package."""

    path: Path
    tree: ast.Module

    @property
    def inside(self) -> str:
        """Its path below the package."""
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The package it lies in, or its own name if it lies flat."""
        return room_of(self.name)

    def imports(self, *, types: bool = True) -> set[str]:
        """The modules it imports, also inside functions; `types`: and those only for types."""
        return set(_imports(self.tree, types=types))


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@functools.cache
def modules() -> dict[str, Module]:
    found = [Module(path, ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES]
    return {module.name: module for module in found}


@functools.cache
def names() -> frozenset[str]:
    """The dotted names of all modules, known before any is parsed."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in SOURCES]
    return frozenset(".".join(path.parts).removesuffix(".__init__") for path in paths)


def _imports(node: ast.AST, *, types: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import in line {child.lineno}"
            if (child.module or "").split(".")[0] == "posthoc_cli":
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield whole if whole in names() else str(child.module)
        elif isinstance(child, ast.Import):
            yield from (
                alias.name for alias in child.names if alias.name.split(".")[0] == "posthoc_cli"
            )
        elif isinstance(child, ast.If) and _is_for_types(child.test) and not types:
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), types=types)
        else:
            yield from _imports(child, types=types)


def _is_for_types(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _at_import(tree: ast.Module) -> set[str]:
    """What is imported of the package when the module itself is: not inside functions."""
    outside = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    return set(_imports(ast.Module(outside, []), types=False))


# The floor plan


def test_few_modules_lie_flat() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FLAT


def test_no_module_is_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {str(path): many for path, many in lines.items() if many > MOST_LINES} == {}


def test_each_package_says_what_it_is() -> None:
    for folder in {path.parent for path in SOURCES}:
        face = folder / "__init__.py"
        assert face in SOURCES, folder
        assert ast.get_docstring(ast.parse(face.read_text(encoding="utf-8"))), face


def test_tests_mirror_the_packages() -> None:
    def inside(folder: Path) -> set[str]:
        return {path.parent.name for path in folder.glob("*/__init__.py")}

    # The callbacks are tested with the training package, which they are in.
    assert inside(PACKAGE) - {"adapters"} == inside(ROOT / "tests") - {
        "soak",
        "benchmarks",
        "field",
        "servers",
    }
    for room in inside(PACKAGE) - {"adapters"}:
        assert list((ROOT / "tests" / room).glob("test_*.py")), room


# Imports


def test_imports_run_one_way() -> None:
    wrong = set()
    for module in modules().values():
        allowed = _allowed(module.room)
        wrong |= {
            f"{module.name} -> {name}"
            for name in module.imports()
            if room_of(name) not in allowed | {module.room}
        }
    assert wrong == set()


def _allowed(room: str) -> set[str]:
    """The rooms that `room` may import, besides itself."""
    if room == "":
        return FOR_ALL | LAZY
    if room in FOR_ALL:
        return set()
    if room == "solver":
        return {"errors"}
    below = LAYERS[: LAYERS.index(room)]  # a room that is not listed has to find its place first
    return {*below, "solver", *FOR_ALL}


def test_the_package_itself_imports_only_its_version() -> None:
    assert _at_import(modules()["posthoc_cli"].tree) <= {"posthoc_cli._version"}


def test_no_circles() -> None:
    graph = {module.name: module.imports(types=False) for module in modules().values()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


# What a room alone may do


def test_only_storage_touches_files() -> None:
    found = {
        f"{module.inside}:{line}: {what}"
        for module in modules().values()
        if module.room != "storage"
        for line, what in file_calls(module.tree)
        if what not in EXCEPTIONS.get(module.inside, set())
    }
    assert found == set()


def file_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what reads, writes, moves or asks for files by the system's own calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            hidden = {alias.name for alias in node.names} & {*ONLY_STORAGE, "path"}
            yield from ((node.lineno, f"os.{name}") for name in hidden)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "os.path"):
            called = ast.unparse(node).removeprefix("os.")
            if called in ONLY_STORAGE:  # also where it is only handed on
                yield node.lineno, f"os.{called}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            moves = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
            if ast.unparse(node.func.value) not in ("os", "os.path") and (
                node.func.attr in ONLY_STORAGE_METHODS or moves
            ):
                yield node.lineno, f".{node.func.attr}()"


def test_only_the_command_changes_the_process() -> None:
    found = {
        f"{module.inside}:{node.lineno}: {ast.unparse(node)}"
        for module in modules().values()
        if module.room != "cli"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in OF_THE_PROCESS
        if ast.unparse(node) not in EXCEPTIONS.get(module.inside, set())
    }
    assert found == set()


def test_only_the_command_spells_options() -> None:
    found = {
        f"{module.inside}:{line}: {option}"
        for module in modules().values()
        if module.room != "cli"
        for line, option in options(module.tree)
    }
    assert found == set()


def options(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each command-line option in a string or docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value)
            yield from ((node.lineno, option) for option in found)


def test_exceptions_are_needed() -> None:
    for inside, exceptions in EXCEPTIONS.items():
        source = (PACKAGE / inside).read_text(encoding="utf-8")
        assert all(exception in source for exception in exceptions), inside


@pytest.mark.parametrize(
    "code",
    [
        "os.open(path, 0)",
        "run(os.fsync, fd)",
        "from os import replace",
        "path.unlink(missing_ok=True)",
        "Path(a).rename(b)",
        "path.replace(other)",
        "path.write_text('x')",
        "os.path.isdir(path)",
        "filter(os.path.lexists, paths)",
        "from os import path",
        "os.stat(path).st_size",
        "path.is_file()",
        "(folder / name).exists()",
        "sorted(folder.glob('*'))",
    ],
)
def test_file_calls_are_found(code: str) -> None:
    assert list(file_calls(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["os.path.join(a, b)", "text.replace('a', 'b')", "replace(report, n=1)", "exists(path)"],
)
def test_other_calls_are_not(code: str) -> None:
    assert not list(file_calls(ast.parse(code)))


def test_options_and_imports_are_found() -> None:
    text = '"""Use --only."""\nf"{x}: give --max-error"\n"a -- b", "a--b", "-o"\n'
    assert [option for _, option in options(ast.parse(text))] == ["--only", "--max-error"]
    tree = ast.parse(
        "from posthoc_cli.storage import atomic, nothing\n"
        "if TYPE_CHECKING:\n    import posthoc_cli.cli\n"
        "def later():\n    from posthoc_cli.errors import PosthocError\n"
    )
    always = {"posthoc_cli.storage.atomic", "posthoc_cli.storage", "posthoc_cli.errors"}
    assert set(_imports(tree, types=False)) == always
    assert set(_imports(tree, types=True)) == always | {"posthoc_cli.cli"}


# What importing and using the library does

STATE = """
import gc, os, signal, sys, threading
try:
    import resource
except ImportError:
    resource = None

def state():
    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    torch = sys.modules.get("torch")
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.get_debug()),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "threads": (threading.active_count(), torch and torch.get_num_threads()),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
    }

def changed(before):
    return sorted(name for name, value in state().items() if value != before[name])
"""


def run(code: str, cwd: Path | None = None) -> str:
    """What `code` prints in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", STATE + code],
        cwd=cwd,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.usefixtures("unmeasured")
def test_importing_the_package_imports_little() -> None:
    code = "import posthoc_cli; print({'torch', 'numpy', 'typer', 'rich'} & set(sys.modules))"
    assert run(code) == "set()"


@pytest.mark.usefixtures("unmeasured")
def test_opening_snapshots_imports_no_torch(snapshots: Path) -> None:
    code = (
        "import posthoc_cli; run = posthoc_cli.open_snapshots('snapshots');"
        "print(len(run.snapshots), 'torch' in sys.modules)"
    )
    assert run(code, snapshots.parent) == "8 False"


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("first", ["", "torch"])
def test_importing_changes_nothing_of_the_process(first: str) -> None:
    """Every module but the command's own; those that train need torch, so it is imported first."""
    trains = ("training", "adapters")
    wanted = [
        module.name
        for module in modules().values()
        if module.room not in ("cli", "__main__")
        and not module.name.startswith("posthoc_cli.training.adapters.")
        and (first == "torch" or module.room not in trains)
    ]
    assert len(wanted) > 20
    code = (
        f"import importlib{', ' + first if first else ''}; before = state()\n"
        f"for name in {wanted}: importlib.import_module(name)\n"
        f"print(changed(before), {first!r} in sys.modules or {first!r} == '')"
    )
    assert run(code) == "[] True"


@pytest.mark.usefixtures("unmeasured")
def test_using_changes_nothing_of_the_process(tmp_path: Path) -> None:
    """More snapshots than files may be open by default, or it would have no need to."""
    (tmp_path / "snapshots").mkdir()
    for step in range(1, 101):
        path = tmp_path / "snapshots" / f"s{step}.safetensors"
        write_snapshot(path, step, step=str(step), gamma="6.94")
    code = (
        "import posthoc_cli\n"
        "if resource:\n"
        "    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "before = state()\n"
        "solution = posthoc_cli.open_snapshots('snapshots').solve(gamma=8)\n"
        "paths = solution.save('out.safetensors')\n"
        "print(changed(before), len(paths))"
    )
    assert run(code, tmp_path) == "[] 1"
