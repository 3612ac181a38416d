"""Fixtures for the tests that run the installed command."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The tests share the processors: with threads of their own, torch and NumPy would wait for each
# other for most of the time. Said before NumPy is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Hundreds of processes are started, each of which would compile the package anew.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

import hypothesis
import jsonschema
import pytest
import typer

from posthoc_cli.cli import main
from tests.command import ENVIRONMENT, ROOT, Posthoc, Run, run_command, write_snapshot
from tests.servers.buckets import PART, Buckets
from tests.servers.faults import Proxy

sys.dont_write_bytecode = False  # of the test modules neither
# Half of a small run is making the command line from its description: once a process is enough.
typer.main.get_command = functools.cache(typer.main.get_command)

# A test that fails for one change is to fail for it again: the soak looks for other examples.
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture
def posthoc(tmp_path: Path) -> Posthoc:
    """Run `posthoc` with these arguments in `tmp_path`; `env` adds to the environment."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Run:
        return run_command(tmp_path, *arguments, env=ENVIRONMENT | (env or {}), timeout=120)

    return run


@pytest.fixture
def posthoc_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Posthoc:
    """The same in this process: for the many runs whose start-up is not the question."""

    def run(*arguments: str | Path) -> Run:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["posthoc", *map(str, arguments)])
        code = main()
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture
def snapshots(tmp_path: Path) -> Path:
    """`snapshots/` in `tmp_path`: steps 1000 to 4000, sigma_rel 0.05 and 0.10, as metadata."""
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for step in (1000, 2000, 3000, 4000):
        for sigma_rel in ("0.05", "0.10"):
            name = f"ema-{step}-{sigma_rel}.safetensors"
            write_snapshot(folder / name, step / 1000, step=str(step), sigma_rel=sigma_rel)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Buckets]:
    """A server with the empty bucket `bucket`, which takes small parts of uploads."""
    with Buckets("bucket") as server:
        server.smallest_part = PART
        yield server


@pytest.fixture
def proxy(server: Buckets, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """In front of `server`, whose bucket is empty again; `s3://`, `gs://` and `az://` lead to it,
    and parts are small."""
    from posthoc_cli.storage.remote import uploads

    server.buckets["bucket"].clear()
    server.uploads.clear()
    for name, value in (("PART", PART), ("HELD", PART), ("AT_ONCE", 2), ("LONGEST_RETURN", 0.1)):
        monkeypatch.setattr(uploads, name, value)
    with Proxy(server.url) as proxy:
        for name, value in server.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts run without coverage.

    For those whose time, memory, modules or last moments are the question: coverage imports
    modules of its own, slows Python down and writes its data at exit.
    """
    for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)


@pytest.fixture(scope="session")
def check_json() -> Callable[[str, Any], None]:
    """Check a document against the schema of a command that docs/json.md shows, to the last key."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    schemas = {}
    for block in re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        schema = json.loads(block)
        jsonschema.Draft202012Validator.check_schema(schema)
        schemas[schema["title"]] = _closed(schema)

    def check(command: str, document: Any) -> None:
        jsonschema.validate(document, schemas[f"posthoc {command} --json"])

    return check


def _closed(schema: Any) -> Any:
    """`schema` without room for keys that it doesn't mention: a new key has to be documented."""
    if isinstance(schema, list):
        return [_closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed["additionalProperties"] = False
    return closed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and start with the longest test."""
    # Run last, as its name has it, it would leave the other processes of xdist with nothing to do.
    items.sort(key=lambda item: item.path.name != "test_docs.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
