"""What may stand nowhere in the source: whatever runs code that came with a file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import ROOT

PACKAGE = sorted((ROOT / "posthoc_cli").rglob("*.py"))
ALL = [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "docs").rglob("*.py"))]

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""Modules that turn bytes into objects by calling what the bytes name."""

RUNNERS = {"eval", "exec", "compile", "__import__", "execfile"}

UNDER_ANOTHER_NAME = {
    "builtins": RUNNERS,
    "os": {"system", "popen"},
    "torch": {"load"},
    "torch.serialization": {"load"},
    "importlib": {"import_module"},
}
"""What may only be called by its full name, so that the calls are seen."""

WITH_TORCH = {
    "training/demo.py",
    *(
        f"training/{name}.py"
        for name in ("adapters/lightning", "adapters/transformers", "averaging", "karras")
    ),
    *(f"training/{name}.py" for name in ("posthoc_ema", "reading", "snapshot_files", "tracked")),
}
"""Modules for a training loop, where torch is there anyway; the commands start without it."""

AS_DATA = "posthoc_cli/formats/pickles.py"
"""The one module of the package that may import pickle, and that only for `allowed_of_pickle`."""

EXCEPTIONS = {
    AS_DATA: {"pickle"},
    # What the ranks of one job say to one another, as torch.distributed does it: from no file.
    "posthoc_cli/storage/peers.py": {"pickle", "pickle.loads()"},
    "posthoc_cli/storage/ranks.py": {"pickle", "pickle.loads()"},
    # The user's own metric command.
    "posthoc_cli/tuning/metric.py": {"shell=True"},
    "tests/training/write_sharded.py": {"torch.load() without weights_only=True"},
    "tests/test_docs.py": {"shell=True"},
    "tests/training/test_documentation.py": {"exec()", "compile()"},
    "tests/formats/test_pickles.py": {"pickle.loads()"},
}
"""They run what our own documentation shows, as a reader would; or compare what is read as data
with what Python makes of a pickle that the test itself has made; or read pickles as data."""


def forbidden(tree: ast.AST, *, ours: bool) -> Iterator[tuple[int, str]]:
    """Line and name of what may not stand in a module; `ours`: in the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and ours:
            yield from ((node.lineno, name) for name in _modules(node) if name in UNPICKLERS)
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            loaders = {"load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"}
            yield from ((node.lineno, one.name) for one in node.names if one.name in loaders)
        if isinstance(node, ast.ImportFrom):
            hidden = UNDER_ANOTHER_NAME.get(node.module or "", set())
            yield from ((node.lineno, one.name) for one in node.names if one.name in hidden)
        if isinstance(node, ast.Call):
            yield from ((node.lineno, problem) for problem in _calls(node, ours=ours))


def _modules(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        yield (node.module or "").partition(".")[0]
    else:
        yield from (alias.name.partition(".")[0] for alias in node.names)


def _calls(call: ast.Call, *, ours: bool) -> Iterator[str]:
    """What is wrong with a call."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = ast.unparse(call.func)
    base, _, method = name.rpartition(".")
    if name in RUNNERS or (base == "builtins" and method in RUNNERS):
        yield f"{name}()"
    if base in UNPICKLERS and method.lstrip("_") in ("load", "loads", "Unpickler", "open"):
        yield f"{name}()"
    if name in ("torch.load", "torch.serialization.load") and not _is(
        given.get("weights_only"), True
    ):
        yield "torch.load() without weights_only=True"
    if name in ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"):
        yield f"{name}()"
    if method == "load" and base in ("np", "numpy") and "allow_pickle" in given:
        yield from [] if _is(given["allow_pickle"], False) else ["np.load() with allow_pickle"]
    if base == "yaml" and method.startswith(("load", "unsafe", "full")):
        yield f"{name}()"
    if name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
        yield f"{name}()"
    if "shell" in given and not _is(given["shell"], False):
        yield "shell=True"
    if ours and method in ("import_module", "run_path", "run_module"):
        yield from [] if call.args and isinstance(call.args[0], ast.Constant) else [f"{name}()"]


def misused_pickle(tree: ast.AST) -> list[str]:
    """What a module does with pickle besides `import pickle`, its opcodes' names, its error, and
    its unpickler as a base class or for its table of opcodes.

    The class that has that base must say itself what a name stands for, what a persistent id does,
    and how opcodes are dispatched.
    """
    allowed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "pickle._Unpickler" in map(ast.unparse, node.bases):
            methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
            if {"load", "find_class", "persistent_load"} <= methods:
                allowed |= {base.value for base in node.bases if isinstance(base, ast.Attribute)}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name == "pickle._Unpickler.dispatch" and isinstance(node.value, ast.Attribute):
                allowed.add(node.value.value)
            elif re.fullmatch(r"pickle\.(UnpicklingError|[A-Z][A-Z0-9_]+)", name):
                allowed.add(node.value)
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "pickle"]
    misused = [f"line {node.lineno}" for node in uses if node not in allowed]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "pickle" in _modules(node):
            misused += [] if ast.unparse(node) == "import pickle" else [ast.unparse(node)]
    return misused


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_nothing_that_comes_from_a_file_is_ever_run(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), name_of(path))
    allowed = EXCEPTIONS.get(name_of(path), set())
    found = {(line, what) for line, what in forbidden(tree, ours=path in PACKAGE)}
    assert {(line, what) for line, what in found if what not in allowed} == set()
    assert allowed <= {what for _, what in found}, "an exception that is no longer needed"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "from os import system as run",
        "from torch import load",
        "from builtins import eval as value_of",
        "pickle.load(file)",
        "pickle.Unpickler(file)",
        "pickle._Unpickler(file)",
        "eval('1')",
        "exec(code)",
        "builtins.exec(code)",
        "compile(code, '', 'exec')",
        "__import__(name)",
        "importlib.import_module(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_it_would_be_found(code: str) -> None:
    assert list(forbidden(ast.parse(code), ours=True))


def test_pickle_is_only_used_to_read_pickles_as_data() -> None:
    assert not misused_pickle(ast.parse((ROOT / AS_DATA).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    [
        "pickle.loads(data)",
        "run = pickle.loads",
        "pickle.Unpickler(file).load()",
        "pickle._Unpickler(file).load()",
        "made = pickle._Unpickler",
        "pickle._Unpickler.find_class(self, module, name)",
        "pickle._loads(data)",
        "getattr(pickle, name)(data)",
        "import pickle as p",
        "from pickle import STOP",
        "class Mine(pickle._Unpickler): pass",
        "class Mine(pickle._Unpickler):\n def load(self): pass\n def find_class(self): pass",
        "class Mine(pickle.Unpickler):\n def find_class(self, module, name): pass",
    ],
)
def test_pickle_used_otherwise_would_be_found(code: str) -> None:
    assert misused_pickle(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "re.compile(text)",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "json.load(file)",
        "subprocess.run(words, check=True)",
        "importlib.import_module('torch')",
    ],
)
def test_what_is_harmless_may_stand(code: str) -> None:
    assert not list(forbidden(ast.parse(code), ours=True))


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_only_what_trains_imports_torch_at_once(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = [
        name
        for node in _at_import(tree)
        for name in _modules(node)
        if name in ("torch", "lightning", "transformers", "accelerate", "matplotlib")
    ]
    allowed = path.relative_to(ROOT / "posthoc_cli").as_posix() in WITH_TORCH
    assert allowed or not at_once


def _at_import(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: not those in functions, nor for types."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody"):
                waiting += getattr(node, field, [])
            for handler in getattr(node, "handlers", []):
                waiting += handler.body
