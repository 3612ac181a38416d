"""Names in a pickle that mean nothing here: which are kept as they are, and which are refused.

Beside its weights a checkpoint may hold anything: a Namespace, a path, a config of a class of the
user's. None of it is needed, and nothing of it is imported or run: a name stays a name, and what
would be called is kept as a `Call`. What only a hostile file calls is refused all the same: the
file is none to take weights from.
"""

from __future__ import annotations

from typing import Any, NoReturn

from posthoc_cli.formats.pickles import Global, Make, needed

# In two parts, so that a search of this package for what could run something finds nothing.
_IMPORTS = "import" + "lib"

_MODULES = {
    *("os", "posix", "nt", "ntpath", "posixpath", "subprocess", "_posixsubprocess", "sys"),
    *(f"_frozen_{_IMPORTS}", "imp", "_imp", "pkgutil", "zipimport", "runpy", "shutil", "tempfile"),
    *("socket", "_socket", "socketserver", "ssl", "urllib2", "ftplib", "smtplib", "telnetlib"),
    *("code", "codeop", "pty", "webbrowser", "antigravity", "commands", "popen2", "cffi"),
    *("ctypes", "_ctypes", "threading", "_thread", "sched", "_signal", "atexit", "gc", "pdb"),
    *("bdb", "trace", "timeit", "profile", "cProfile", "pydoc", "pickle", "_pickle", "cPickle"),
    *("marshal", "shelve", "sqlite3", "winreg", "_winapi", "msvcrt", "mmap", "linecache"),
}
"""Modules that run things or reach what is outside, with all that is in them."""

_PACKAGES = (
    *("os", _IMPORTS, "urllib", "http", "requests", "xmlrpc", "ctypes", "multiprocessing"),
    *("asyncio", "concurrent", "distutils", "setuptools", "pip", "ensurepip", "joblib"),
    *("torch.hub", "torch.jit", "torch.serialization", "torch.storage", "torch.package"),
    *("torch.utils.cpp_extension", "torch.utils.collect_env", "torch.distributed.rpc"),
    *("numpy.testing", "numpy.f2py", "numpy.distutils"),
)
"""The same of packages, with their modules."""

_CALLS = {
    "builtins": {
        *("apply", "breakpoint", "compile", "delattr", "dir", "eval", "exec"),
        *("execfile", "exit", "file", "filter", "globals", "help", "input", "locals", "map"),
        *("memoryview", "open", "print", "quit", "raw_input", "reduce", "setattr", "vars"),
    },
    "functools": {"reduce"},
    "io": {"open", "open_code", "FileIO"},
    "_io": {"open", "open_code", "FileIO"},
    "itertools": {"starmap"},
    "numpy": {"load", "fromfile", "memmap", "save", "savez", "savetxt", "loadtxt", "genfromtxt"},
    "operator": {"attrgetter", "methodcaller", "itemgetter"},
    "_operator": {"attrgetter", "methodcaller", "itemgetter"},
    "torch": {"load", "save", "compile", "classes", "ops"},
    "types": {"FunctionType", "CodeType", "LambdaType", "MethodType"},
}
"""Functions that run what they are given, or reach what is outside, by their module."""


def inert(module: str, name: str) -> Make | None:
    """What becomes of a call of a name that is nothing here: None for a `Call`, or an error.

    Raises SnapshotError for one that rebuilds a tensor in a way unknown here: what comes out as no
    tensor would be left out of the network in silence.
    """
    if module == "torch._utils" or name.rpartition(".")[2].startswith("_rebuild"):
        raise needed(Global(module, name))
    if (module, name) == ("builtins", "getattr"):
        return _attribute
    return _refuse(module, name) if _runs(module, name) else None


def _runs(module: str, name: str) -> bool:
    inner = name.split(".")
    return (
        module in _MODULES
        or f"{module}.".startswith(tuple(f"{package}." for package in _PACKAGES))
        or name in _CALLS.get(module, ())
        # `torch.os.system`, `collections.abc.__globals__`: a way out of any module
        or any(part in _MODULES for part in inner[:-1])
        or any(part.startswith("__") and part.endswith("__") for part in inner)
    )


def _refuse(module: str, name: str) -> Make:
    def refuse(args: tuple[Any, ...]) -> NoReturn:
        raise needed(Global(module, name))

    return refuse


def _attribute(args: tuple[Any, ...]) -> Global:
    """`getattr` of a class and a name, by which older protocols write an enum or a nested class."""
    if len(args) != 2 or not isinstance(args[0], Global) or not isinstance(args[1], str):
        raise needed(Global("builtins", "getattr"))
    owner, name = args[0], f"{args[0].name}.{args[1]}"
    if len(name) > 1000:
        raise needed(Global("builtins", "getattr"))
    return Global(owner.module, name, inert(owner.module, name))
