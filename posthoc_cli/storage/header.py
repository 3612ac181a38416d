"""The safetensors format: where each tensor of a file lies.

A safetensors file is eight bytes of header length, a JSON header that maps each tensor's name to
its dtype, shape and place, and the tensors' bytes.
"""

from __future__ import annotations

import bisect
import json
import math
import struct
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from posthoc_cli.errors import IncompleteError, SnapshotError, in_bytes
from posthoc_cli.storage.disk import allocated
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, bytes_of
from posthoc_cli.storage.layout import Malformed, parse_tensors, split_metadata
from posthoc_cli.storage.layout import TensorInfo as TensorInfo
from posthoc_cli.storage.places import File as File
from posthoc_cli.storage.sniffing import being_downloaded, read_start, sniff, unfilled
from posthoc_cli.storage.stores import open_file

MAX_HEADER = 32 << 20
"""Bytes of the longest header that is read; of 100,000 tensors it takes some 12 MB."""

MAX_TENSORS = 150_000
"""Tensors of the largest file that is read: more take seconds and gigabytes for the header alone,
and no network has so many."""

_MAX_ITEMS = 12 * MAX_TENSORS
"""The most quotes, or commas, of a header; a tensor takes ten quotes and some seven commas."""

_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")


ReadAt = Callable[[int, memoryview], None]
"""Fills the second argument with the bytes from the first on. Any thread may call it."""


class Content(Protocol):
    """Bytes that lie in no file as they are: deflated, in another order, in blocks."""

    def open(self, files: Sequence[ReadAt]) -> ReadAt:
        """What reads them, from the files of the index."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `first` to `first + length` of an index's data.

    They are those of file `file` of the index from byte `data_start` on, or what `content` gives;
    then `data_start` is 0 and `file` says nothing.
    """

    first: int
    length: int
    data_start: int
    file: int = 0
    content: Content | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TensorIndex:
    """Where the tensors of one network lie, in one file or several, of any format.

    The tensors' offsets are within `parts`, laid end to end; between them may lie what is no
    tensor's. Networks whose tensors lie alike share one `tensors` mapping: 600 snapshots of a large
    network cost little more than one. `structure` is what a format other than safetensors has in
    place of headers: what its fingerprint goes by. A snapshot stored as a difference has the
    `links` of its chain, each after its bases: from the keyframe to its own file (see `deltas`).
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    files: tuple[File, ...]
    parts: tuple[Part, ...]
    structure: bytes | None = None
    links: tuple[Link, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all its files; of a difference those of its own."""
        if self.links:
            return self.links[-1].index.size
        return sum(file.size for file in self.files)


class Base(NamedTuple):
    """A file that another, beside it, is a difference to; what it comes to enters that one's value
    times `coefficient`."""

    name: str
    fingerprint: str
    coefficient: float


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A file of a chain of differences, as it is; the first is a plain one, without `bases`.

    The scales of its tensors are powers of two with the exponent `scale`, but for those of `scales`
    by name, where None says that it holds all of the tensor.
    """

    index: TensorIndex
    scale: int | None
    scales: Mapping[str, int | None]
    bases: tuple[Base, ...] = ()

    def exponent(self, name: str) -> int | None:
        """The exponent of a tensor's scale; None for one that is no difference."""
        if self.scale is None or self.index.tensors[name].dtype not in FLOATS:
            return None
        return self.scales.get(name, self.scale)


def spans(parts: Sequence[Part], start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Where bytes `start` to `start + length` of the data lie: part, offset in its file, bytes."""
    at = bisect.bisect_right(parts, start, key=lambda part: part.first) - 1
    while length:
        part = parts[at]
        inside = start - part.first
        count = min(length, part.length - inside)
        if count > 0:  # some parts hold no data
            yield at, part.data_start + inside, count
            start, length = start + count, length - count
        at += 1


Cache = dict[Hashable, Any]
"""The tensors of headers read before, by what tells them apart; `formats` keeps more in it."""


def read_header(path: Path, cache: Cache | None = None) -> TensorIndex:
    """Read and check the header of the safetensors file at `path`; none of its data.

    `cache` lets calls share `tensors` between files with the same tensors at the same places.
    Raises IncompleteError for the beginning of a safetensors file, SnapshotError for one that is
    none, MachineError for one that cannot be read.
    """
    with open_file(path) as (file, found):
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
        header = file.read(length) if length <= MAX_HEADER else b""
        try:
            metadata, tensors = _parse(path, start, header, length, cache)
            data_start, data_length = _LENGTH.size + length, _data_length(tensors)
            if data_start + data_length > found.size:
                raise _incomplete(path)
            if rest := found.size - data_start - data_length:
                raise _corrupt(path, f"{rest:,} bytes follow its last tensor")
            if control := being_downloaded(path):
                raise _unfinished(path, f"its download goes on: '{control}' lies beside it")
        except SnapshotError as error:
            raise _what_it_is(read_start(file), found) or error from None
    part = Part(0, data_length, data_start)
    return TensorIndex(path, tensors, metadata, (found,), (part,))


def _parse(
    path: Path, start: bytes, header: bytes, length: int, cache: Cache | None
) -> tuple[dict[str, str], Mapping[str, TensorInfo]]:
    """Metadata and tensors of a `header` that shall have `length` bytes, after `start`."""
    if length > MAX_HEADER:
        raise _corrupt(path, f"a header of {in_bytes(length)}, above {in_bytes(MAX_HEADER)}")
    if len(start) < _LENGTH.size or len(header) < length:
        if header[:1] in (b"", b"{"):
            raise _incomplete(path)
        raise _corrupt(path, "its header is no JSON object")
    check_items(path, header)
    try:
        metadata, rest = split_metadata(header)
        tensors = cache.get(rest) if cache is not None else None
        if tensors is None:
            tensors = parse_tensors(rest)
            if cache is not None:
                cache[rest] = tensors
    except Malformed as error:
        raise _corrupt(path, str(error)) from None
    return metadata, tensors


def _what_it_is(start: bytes, file: File) -> SnapshotError | None:
    """The error that says what a file really is which is no whole safetensors file."""
    path = file.path
    if not file.size:
        return _unfinished(path, "not a whole safetensors file (its end is missing): it is empty")
    if unfilled(start, allocated(path)):
        return _unfinished(
            path,
            "zeros in place of a header, not a safetensors file: a download that never came",
        )
    if len(start) < _LENGTH.size:
        return None
    found = sniff(start, file.size)
    if found is None:
        return None
    return SnapshotError(str(path), f"{found[0]}, not a safetensors file", found[1])


def check_items(path: Path, header: bytes) -> None:
    """Raise SnapshotError for a header that would be slow to parse, before anyone parses it."""
    items = max(header.count(b'"'), header.count(b","))
    if header.count(b"{") > MAX_TENSORS + 2 or items > _MAX_ITEMS:
        raise SnapshotError(
            str(path),
            f"its header holds more than {MAX_TENSORS:,} tensors need",
            "leave it out with only=",
        )


def _incomplete(path: Path) -> IncompleteError:
    return IncompleteError(
        str(path),
        "not a whole safetensors file (its end is missing)",
        "wait until it is written, copy it again, or leave it out",
    )


def _unfinished(path: Path, problem: str) -> IncompleteError:
    return IncompleteError(str(path), problem, "wait for it, download it again, or leave it out")


def _corrupt(path: Path, detail: str) -> SnapshotError:
    return SnapshotError(
        str(path), f"not a whole safetensors file ({detail})", "copy it again or leave it out"
    )


def _data_length(tensors: Mapping[str, TensorInfo]) -> int:
    return max((info.end for info in tensors.values()), default=0)


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a file that shall hold `tensors`, name -> (dtype, shape).

    Returns the header, its length included, and where each tensor lies after it. Tensors go by
    dtype, largest elements first so that each is aligned, then by name: the same tensors always
    get the same places.
    """
    infos: dict[str, TensorInfo] = {}
    position = 0
    rank = {code: place for place, code in enumerate(DTYPES)}
    for name in sorted(tensors, key=lambda name: (rank[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = position + bytes_of(dtype, math.prod(shape))
        infos[name] = TensorInfo(dtype, tuple(shape), position, end)
        position = end
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries |= {name: as_entry(info) for name, info in infos.items()}
    return encode_header(entries), infos


def as_entry(info: TensorInfo) -> dict[str, Any]:
    """What a header says of a tensor."""
    return {
        "dtype": info.dtype,
        "shape": list(info.shape),
        "data_offsets": [info.start, info.end],
    }


def encode_header(entries: Mapping[str, Any], length: int = 0) -> bytes:
    """The bytes of a header, its length included; filled with spaces where it needs fewer than
    `length`."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * max(-(_LENGTH.size + len(text)) % _ALIGNMENT, length - _LENGTH.size - len(text))
    return _LENGTH.pack(len(text)) + text
