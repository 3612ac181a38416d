"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.storage import File, make_header, temporary
from posthoc_cli.storage.atomic import AtomicFile, Group, commit_together
from posthoc_cli.storage.folders import AtomicFolder, replaced_folder
from posthoc_cli.storage.manifest import read_manifest
from posthoc_cli.storage.metadata import RECIPE
from posthoc_cli.storage.temporary import clean_up, make_temporary

MANIFEST = b'{"posthoc": "1", "weights": "w/m.safetensors", "from": "s", "copied": [], ' + (
    b'"left_out": [], "missing": []}'
)
WEIGHTS = make_header({}, {RECIPE: '{"sources": []}'})[0]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def group(path: Path, copied: dict[str, File] | None = None, *, overwrite: bool = False) -> Group:
    weights = AtomicFile(path / "w" / "m.safetensors", len(WEIGHTS))
    folder = AtomicFolder(path, [weights], copied or {}, {"posthoc.json": MANIFEST})
    return Group([folder], lambda: replaced_folder(path, overwrite), path)


def fill(*groups: Group) -> None:
    for each in groups:
        [folder] = each.files
        assert isinstance(folder, AtomicFolder)
        folder.copy(lambda count: None)
        folder._files[0].write_at(0, WEIGHTS)


def write(*groups: Group) -> None:
    with commit_together(groups):
        fill(*groups)


WHOLE = {"w/m.safetensors": WEIGHTS, "posthoc.json": MANIFEST}


def test_a_folder_and_its_copies(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"some text")
    copied = {"a/b/c": File.of(source, source.stat()), "d": File.of(source, source.stat())}
    out = tmp_path / "out"
    out.mkdir()  # an empty one holds nothing to lose
    with commit_together([one := group(out, copied)]):
        fill(one)
        assert os.listdir(out) == []
    assert files(out) == WHOLE | {"a/b/c": b"some text", "d": b"some text"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    source.write_bytes(b"another")
    with pytest.raises(SnapshotError, match="changed while it was read"):
        write(group(tmp_path / "other", copied))
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_only_folders_of_ours_are_replaced(tmp_path: Path) -> None:
    write(group(tmp_path / "out"))
    with pytest.raises(UsageError, match="exists already"):
        write(group(tmp_path / "out"))
    write(group(tmp_path / "out", overwrite=True))
    (tmp_path / "out" / ".DS_Store").touch()
    (tmp_path / "out" / "__pycache__").mkdir()
    (tmp_path / "out" / "__pycache__" / "m.pyc").touch()
    write(group(tmp_path / "out", overwrite=True))
    assert files(tmp_path / "out") == WHOLE
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "posthoc.json").write_bytes(MANIFEST)
    (tmp_path / "out" / "w" / "notes").mkdir()
    (tmp_path / "out" / "w" / "notes" / "x").touch()
    before = files(tmp_path)
    for name, problem in (
        ("link", "a link that posthoc didn't make"),
        ("file", "a file that posthoc didn't make is in its place; choose another output"),
        ("mine", "a folder that posthoc didn't make is in its place; name a new one"),
        ("out", "'w/notes/x', which posthoc didn't put there, would be lost"),
    ):
        with pytest.raises(UsageError, match=problem):
            write(group(tmp_path / name, overwrite=True))
    assert files(tmp_path) == before


def test_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three can't be put in its place: the first, and the old second, are as before."""
    write(group(tmp_path / "two"))
    (tmp_path / "two" / "d").write_bytes(b"old")  # as if it had been copied
    kept = files(tmp_path)
    rename = os.rename

    def fail(source: Path, place: Path) -> None:
        if Path(place) == tmp_path / "three":
            raise OSError(5, "Input/output error")
        rename(source, place)

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr("posthoc_cli.storage.folders._inside", lambda folder: [])
    with pytest.raises(MachineError, match="three: cannot be written"):
        write(*(group(tmp_path / name, overwrite=True) for name in ("one", "two", "three")))
    assert files(tmp_path) == kept


def test_another_run_was_faster(tmp_path: Path) -> None:
    with pytest.raises(UsageError), commit_together([one := group(tmp_path / "out")]):
        fill(one)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
    assert sorted(files(tmp_path)) == ["out/file"]


def test_abandoned_folders_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, place = make_temporary(tmp_path / "out", folder=True)
    (place / "x").mkdir()
    (place / "x" / "file").touch()
    clean_up(tmp_path)
    assert place.is_dir()  # it is still written to
    if fd >= 0:
        os.close(fd)
    clean_up(tmp_path)
    assert os.listdir(tmp_path) == []
    # Without locks it is by age: of the newest file in it.
    monkeypatch.setattr(temporary, "fcntl", None)
    fd, place = make_temporary(tmp_path / "out", folder=True)
    assert fd == -1
    (place / "file").touch()
    os.utime(place, (0, 0))
    clean_up(tmp_path)
    assert place.is_dir()
    os.utime(place / "file", (0, 0))
    os.utime(place, (0, 0))
    clean_up(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        MANIFEST.replace(b"w/m", b"../m"),
        MANIFEST.replace(b"w/m.safetensors", b"/etc/passwd"),
        MANIFEST.replace(b'"1"', b"1"),
        MANIFEST.replace(b'[], "left', b'[{"file": "x"}], "left'),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / "posthoc.json").write_bytes(content)
    assert read_manifest(tmp_path) is None
