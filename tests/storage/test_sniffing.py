"""What a file that is no safetensors file says it is; and the same verdict as the library."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from posthoc_cli.errors import IncompleteError, PosthocError, SnapshotError
from posthoc_cli.storage.header import read_header
from tests.fuzzing import make_case

TENSORS = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)}
WHOLE = save(TENSORS, {"step": "3"})
ARRAY = np.arange(100, dtype=np.float32)


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, w=ARRAY)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, ARRAY)
    return file.getvalue()


def torch_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": 1}, 2))
    return file.getvalue()


def plain_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "x" * 100)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("model.safetensors")
        entry.size = len(WHOLE)
        archive.addfile(entry, io.BytesIO(WHOLE))
    return file.getvalue()


def other_length(change: int) -> bytes:
    (length,) = struct.unpack("<Q", WHOLE[:8])
    return struct.pack("<Q", length + change) + WHOLE[8:]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 3438\n" % (b"0a" * 32)
ANNEX = b"/annex/objects/SHA256E-s3438--0a0a.safetensors\n"

KINDS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "lfs": (lambda: LFS, "a Git LFS pointer", "git lfs pull"),
    "annex": (lambda: ANNEX, "a git-annex pointer", "git annex get"),
    "html": (lambda: b"<!DOCTYPE html>\n<html><head>", "an HTML page", "log in"),
    "html with a mark": (lambda: b"\xef\xbb\xbf\r\n <HTML lang=en>", "an HTML page", "log in"),
    "html with a comment": (lambda: b"<!-- x --><html><body>", "an HTML page", "log in"),
    "html in UTF-16": (lambda: "\ufeff<html><body>".encode("utf-16-le"), "an HTML page", "log in"),
    "xml": (lambda: b'<?xml version="1.0"?><Error><Code>', "an XML message", "log in"),
    "s3": (lambda: b"<Error><Code>AccessDenied</Code>", "an XML message", "log in"),
    "json": (lambda: b'{"error":"Repository not found"}', "Repository not found", "log in"),
    "json list": (lambda: b'[\n {"a": 1}]', "JSON text", "log in"),
    "an index": (lambda: b'{"weight_map":{"a":"x.safetensors"}}', "an index", "index.json"),
    "text": (lambda: b"Entry not found", "'Entry not found'", "log in"),
    "text with accents": (lambda: "Accès refusé à ce modèle".encode(), "plain text", "log in"),
    "no length": (lambda: WHOLE[8:], "without its length", "write it again"),
    "torch": (torch_zip, "a torch checkpoint", "rename it to .pt"),
    "zip": (plain_zip, "a zip archive", "unpack"),
    "empty zip": (lambda: b"PK\x05\x06" + bytes(18), "an empty zip", "download"),
    "pickle": (lambda: pickle.dumps(list(range(99))), "a pickle", "rename it to .pt"),
    "pickle 2": (lambda: pickle.dumps({"w": [1.0]}, 2), "a pickle", "rename it to .pt"),
    "old torch": (
        lambda: bytes.fromhex("80028a0a6cfc9c46f9206aa85019") + bytes(9),
        "an old torch checkpoint",
        "rename it to .pt",
    ),
    "gguf": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(40), "a GGUF file", "use the checkpoint"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file", "as safetensors"),
    "npy": (npy, "a NumPy array", "as safetensors"),
    "npz": (npz, "NumPy arrays", "as safetensors"),
    "gzip": (lambda: gzip.compress(WHOLE), "gzip-compressed", "unpack"),
    "bz2": (lambda: bz2.compress(WHOLE), "bzip2-compressed", "unpack"),
    "xz": (lambda: lzma.compress(WHOLE), "xz-compressed", "unpack"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(40), "zstd-compressed", "unpack"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(40), "a 7z archive", "unpack"),
    "tar": (tar, "a tar archive", "unpack"),
    "length too small": (lambda: other_length(-7), "first 8 bytes say", "write it again"),
    "length too large": (lambda: other_length(+9), "first 8 bytes say", "write it again"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_is(kind: str, tmp_path: Path) -> None:
    content, what, remedy = KINDS[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content())
    with pytest.raises(SnapshotError) as caught:
        read_header(path)
    assert "not a safetensors file" in caught.value.problem
    assert what in caught.value.problem
    assert remedy in caught.value.remedy
    assert not isinstance(caught.value, IncompleteError)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [9, 130, 100_000])
def test_zeros_are_space_that_nothing_came_into(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.truncate(size)
    with pytest.raises(IncompleteError, match="zeros in place of a header"):
        read_header(path)
    path.write_bytes(bytes(size))
    with pytest.raises(IncompleteError, match="zeros in place of a header"):
        read_header(path)


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(IncompleteError, match="it is empty"):
        read_header(path)


def test_a_download_that_goes_on_is_told_by_what_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    control = tmp_path / "x.safetensors.aria2"
    control.touch()
    with pytest.raises(IncompleteError, match=r"its download goes on: 'x\.safetensors\.aria2'"):
        read_header(path)
    control.unlink()
    assert read_header(path).metadata == {"step": "3"}


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("gone", "a link that leads nowhere"),
        ("x.safetensors", "a link that leads nowhere"),
        (".git/annex/objects/1a/2b/SHA256E-s1--0a/SHA256E-s1--0a", "a git-annex link"),
        (f"../../blobs/{'0a' * 32}", "a Hugging Face cache"),
    ],
)
def test_a_link_says_where_it_leads(target: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.symlink_to(target)
    with pytest.raises(SnapshotError, match=what):
        read_header(path)


# The library's verdict


def library_reads(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="np"):
            return True
    except (safetensors.SafetensorError, UnicodeError):
        return False


def we_read(path: Path) -> bool:
    try:
        read_header(path)
    except PosthocError:
        return False
    return True


def test_thousands_of_hostile_files_get_the_librarys_verdict(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tried = {True: 0, False: 0}
    for number in range(1_500):
        for name, content in make_case(13, number).files.items():
            if not name.endswith(b".safetensors"):
                continue
            path.write_bytes(content)
            verdict = library_reads(path)
            assert we_read(path) == verdict, (number, content[:2000])
            tried[verdict] += 1
    assert min(tried.values()) > 500


def test_a_header_changed_at_random_gets_the_librarys_verdict(tmp_path: Path) -> None:
    """By single characters, and by pieces put where others belong."""
    rng = random.Random(13)
    path = tmp_path / "x.safetensors"
    entries = {
        "a": ("F32", [6], [0, 24]),
        "b": ("F16", [2, 2], [24, 32]),
        "c": ("U8", [0], [32, 32]),
    }
    fields = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": place}
        for name, (dtype, shape, place) in entries.items()
    }
    text = json.dumps({"__metadata__": {"step": "3"}, **fields}, separators=(",", ":"))
    pieces = (
        *('"a":', "{", "}", "[", "]", ",", ":", "0", "-0", "1.0", "24", '"F32"', "null", "true"),
        *('"dtype":', '"shape":', '"data_offsets":', '"__metadata__":', "\\u0061", "\\ud800"),
        *('{"dtype":"F32","shape":[6],"data_offsets":[0,24]}', "[0,24]", "[]", "{}", "1e5", "é"),
        *(" ", "\n", ""),
    )
    accepted = 0
    for _ in range(2_500):
        changed = text
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(changed) + 1)
            gone = rng.choice((0, 0, 1, 2, 5))
            changed = changed[:at] + rng.choice(pieces) + changed[at + gone :]
        header = changed.encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
        verdict = library_reads(path)
        assert we_read(path) == verdict, changed
        accepted += verdict
    assert accepted > 50


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"U8","shape":[9223372036854775808,4,0],"data_offsets":[0,0]}',
        '{"dtype":"U8","shape":[0,9223372036854775808,4],"data_offsets":[0,0]}',
        '{"dtype":"F64","shape":[2305843009213693952,0],"data_offsets":[0,0]}',
        '{"dtype":"F64","shape":[18446744073709551615,0],"data_offsets":[0,0]}',
        '{"dtype":"F64","shape":[18446744073709551616,0],"data_offsets":[0,0]}',
        '{"dtype":"F4","shape":[7],"data_offsets":[0,4]}',
        '{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1e999}',
        '{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":' + "9" * 309 + "}",
        '{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":' + "[" * 125 + "]" * 125 + "}",
        '{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":' + "[" * 126 + "]" * 126 + "}",
        '{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{"a":1,"a":2}}',
        '{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}',
        '{"dtype":"U8","shape":[0],"data_offsets":[0,-0]}',
        '{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8"}',
        '5,"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
        '{"dtype":"F9","shape":[0],"data_offsets":[0,0]}',
    ],
    ids=range(16),
)
def test_limits_are_the_librarys(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for header in (f'{{"a":{entry}}}', f'{{"__metadata__":{{"s":"1"}}, "a":{entry} }}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
        assert we_read(path) == library_reads(path)


def test_a_corrupt_file_names_the_same_tensor_every_time(tmp_path: Path) -> None:
    entries = {
        f"t{at}": {"dtype": "U8", "shape": [1], "data_offsets": [at + 1, at + 2]}
        for at in range(500)
    }
    header = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(501))
    messages = set()
    for _ in range(3):
        with pytest.raises(SnapshotError, match="tensor 't0' is at bytes 1 to 2") as caught:
            read_header(path)
        messages.add(str(caught.value))
    assert len(messages) == 1
