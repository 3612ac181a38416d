"""What a file that ends in .safetensors and is none really is, by its first bytes.

One table: the bytes a format begins with, what to call it, and what to do. It is asked only of
files that are no safetensors files, as a header's length could be any eight bytes.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO

from posthoc_cli.errors import brief, printable

READ = 1 << 16
"""Bytes of the beginning that are looked at."""

_AGAIN = "download it again"
_AGAIN_BY_LIBRARY = "write it again with the safetensors library"
_DOWNLOAD = f"the download failed: log in, or check the address, and {_AGAIN}"
_UNPACK = "unpack it first"
_RENAME = "rename it to .pt: it is read as it is"
_OF_WHAT = "use the checkpoint that it was made of, or save its tensors as safetensors"
_EXPORT = "save its tensors as safetensors with the library that wrote it"

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer", "run git lfs pull"),
    (b"version https://hawser.github.com/", "a Git LFS pointer", "run git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer", "run git annex get"),
    (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46", "an old torch checkpoint", _RENAME),
    (b"GGUF", "a GGUF file", "use the checkpoint that it was made of"),
    (b"lmgg", "a GGML file", "use the checkpoint that it was made of"),
    (b"tjgg", "a GGML file", "use the checkpoint that it was made of"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    (b"CDF\x01", "a NetCDF file", _EXPORT),
    (b"CDF\x02", "a NetCDF file", _EXPORT),
    (b"\x93NUMPY", "a NumPy array (.npy)", _EXPORT),
    (b"\x1f\x8b", "gzip-compressed", _UNPACK),
    (b"BZh", "bzip2-compressed", _UNPACK),
    (b"\xfd7zXZ\x00", "xz-compressed", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK),
    (b"\x04\x22\x4d\x18", "lz4-compressed", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _AGAIN),
    (b"SQLite format 3\x00", "an SQLite database", "leave it out with only="),
    (b"%PDF-", "a PDF", "leave it out with only="),
    (b"\x89PNG\r\n\x1a\n", "a picture", "leave it out with only="),
    (b"\xff\xd8\xff", "a picture", "leave it out with only="),
    (b"ARROW1\x00\x00", "an Arrow file", _EXPORT),
    (b"PAR1", "a Parquet file", _EXPORT),
    (b"Salted__", "encrypted", "decrypt it first"),
    (b"-----BEGIN PGP", "encrypted", "decrypt it first"),
    (b"age-encryption.org/", "encrypted", "decrypt it first"),
)

_LENGTH = struct.Struct("<Q")


def sniff(start: bytes, size: int) -> tuple[str, str] | None:
    """What a file of `size` bytes that begins with `start` is, and what to do; None if unknown.

    What it says goes into `<it is> ..., not a safetensors file`.
    """
    if _could_be_safetensors(start):
        return _wrong_length(start)
    for magic, what, remedy in _MAGIC:
        if start.startswith(magic):
            return what, remedy
    if start.startswith(b"PK\x03\x04"):
        return _zip(start)
    if start[:1] == b"{" and b'"data_offsets"' in start:
        return "a header without its length before it", _AGAIN_BY_LIBRARY
    if binary := _binary(start):
        return binary, _OF_WHAT
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, as torch.save and pickle.dump write it", _RENAME
    return _text(start, size)


def _binary(start: bytes) -> str:
    """What begins with more than fixed bytes: a count or a name comes first."""
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite file"
    if len(start) < 8:
        return ""
    # Protocol buffers: the version, then the name of the program that wrote it.
    if start[0] == 8 and start[2] == 0x12 and start[4 : 4 + start[3]].isalnum():
        return "an ONNX file"
    # A map whose first key is a short text.
    if 0x81 <= start[0] <= 0x8F and 0xA1 <= start[1] <= 0xBF and start[2:5].isalnum():
        return "a Flax checkpoint (msgpack)"
    return ""


def unfilled(start: bytes, allocated: int | None = None) -> bool:
    """Whether a file is space that was reserved for a download, which never came.

    `allocated` is how many bytes of it the disk holds, where that is known.
    """
    return not any(start) and (len(start) > 8 or allocated == 0)


def being_downloaded(path: Path) -> str | None:
    """The name of what a download program keeps beside `path` until it is whole."""
    control = path.name + ".aria2"
    return control if os.path.lexists(path.with_name(control)) else None


def where_link_leads(path: Path) -> tuple[str, str]:
    """What a link that leads nowhere is, and what to do."""
    try:
        target = os.readlink(path).replace("\\", "/")
    except OSError:
        target = ""
    if "annex/objects/" in target:
        return "a git-annex link to contents that are not here", "run git annex get"
    if re.search(r"(^|/)blobs/[0-9a-f]{40,64}$", target):
        return "a link into a Hugging Face cache whose file is not there", _AGAIN
    return "a link that leads nowhere", "restore the file or remove it"


def read_start(file: BinaryIO) -> bytes:
    """The beginning of an open file."""
    file.seek(0)
    return file.read(READ)


def _could_be_safetensors(start: bytes) -> bool:
    """Whether it begins as a header does: a length below 2^32, and a brace."""
    return start[4:8] == bytes(4) and start[8:].lstrip()[:1] in (b"", b"{")


def _wrong_length(start: bytes) -> tuple[str, str] | None:
    """A header that is whole, but of another length than the file says."""
    text = start[8:].decode("latin-1")
    try:
        document, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return None
    said = _LENGTH.unpack(start[:8])[0]
    end += len(text) - len(text.lstrip())
    blank = said >= end and not text[end:said].strip(" \t\r\n")  # as the library pads it
    if blank or not _describes(document):
        return None
    return (
        f"one whose first 8 bytes say that its header has {said} bytes, where it has {end}",
        _AGAIN_BY_LIBRARY,
    )


def _describes(document: object) -> bool:
    """Whether a JSON document describes tensors as a header does."""
    return isinstance(document, dict) and any(
        isinstance(entry, dict) and "data_offsets" in entry for entry in document.values()
    )


def _zip(start: bytes) -> tuple[str, str]:
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    if b".pkl" in name or b"data.pkl" in start or b"/version" in name or b".format_version" in name:
        return "a torch checkpoint (a zip archive)", _RENAME
    if name.endswith(b".npy"):
        return "an archive of NumPy arrays (.npz)", _EXPORT
    if b"keras" in start or name in (b"metadata.json", b"config.json"):
        return "a Keras model (a zip archive)", _EXPORT
    return "a zip archive", _UNPACK


_ENCODINGS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def _text(start: bytes, size: int) -> tuple[str, str] | None:
    """What kind of text it is, if it is text."""
    mark, encoding = b"", "utf-8"
    for begin, name in _ENCODINGS:
        if start.startswith(begin):
            mark, encoding = begin, name
    head = start[len(mark) : len(mark) + 4096]
    text = head.decode(encoding, "replace" if len(head) == 4096 else "ignore")
    if not text.strip() or any(char < " " and char not in "\t\r\n\f" for char in text):
        return None
    lost = encoding == "utf-8" and len(text.encode()) < len(head) - 3  # what is no UTF-8
    if text.count("\ufffd") > 1 or lost:
        return None
    text = text.strip()
    low = text[:4096].lower()
    if low.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in low[:1024]:
        return "an HTML page", _DOWNLOAD
    if low.startswith(("<?xml", "<error")):
        return "an XML message", _DOWNLOAD
    if low.startswith(("{", "[")):
        if '"weight_map"' in text:
            return "an index of shards (JSON)", "let its name end in .safetensors.index.json"
        return f"JSON text ({_quoted(text)})", _DOWNLOAD
    if low.startswith(("oid sha256:", "outs:", "md5:")):
        return "a pointer to data that is kept elsewhere", "fetch the data itself"
    if size < 1 << 20:
        return f"plain text ({_quoted(text)})", _DOWNLOAD
    return "plain text", "leave it out with only="


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return f"'{brief(printable(line[:60]))}{'...' if len(line) > 60 else ''}'"
