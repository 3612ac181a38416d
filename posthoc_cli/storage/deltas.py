"""Snapshots stored as differences: a chain of files whose sum is the snapshot.

A delta is a safetensors file whose metadata names its `base`, a file beside it, with its
fingerprint. Of a tensor t it holds the difference to what the base comes to, scaled by a power of
two, or all of it, or nothing where it is the same:

    value(t) = sum over the links from the last that holds all of t:  2^e * stored(t)

added in that order in float64. The first link, the keyframe, is a plain file. `open_chain` makes of
a delta the index of the network that it stands for: names, shapes and dtypes are the keyframe's,
and whoever reads gets the sums.
"""

from __future__ import annotations

import bisect
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import LinkError, MachineError, SnapshotError, printable
from posthoc_cli.storage.dtypes import (
    DTYPES,
    FLOATS,
    FloatArray,
    bytes_of,
    decode,
)
from posthoc_cli.storage.header import (
    Cache,
    Link,
    Part,
    ReadAt,
    TensorIndex,
    as_entry,
    encode_header,
    read_header,
)
from posthoc_cli.storage.layout import TensorInfo
from posthoc_cli.storage.metadata import BASE, BASE_FINGERPRINT, DELTA, ENCODING, SCALE, SCALES
from posthoc_cli.storage.readers import fingerprint
from posthoc_cli.storage.stores import exists

MOST_LINKS = 256
"""Links of the longest chain that is read."""

MOST_SCALE = 300
"""Exponents of scales are from minus this to this."""

_AT_ONCE = 1 << 16
"""Elements that are summed at a time."""

_REMEDY = "copy it again, or leave it out with exclude="


def is_delta(metadata: Mapping[str, str]) -> bool:
    """Whether a file with this metadata is a delta, of this version or another."""
    return metadata.get(ENCODING, "").startswith("delta")


def open_chain(path: Path, own: TensorIndex, cache: Cache | None = None) -> TensorIndex:
    """The network that the delta `own`, found at `path`, stands for.

    Raises LinkError for a base that is missing, broken or not the file it was; SnapshotError for a
    delta that makes no sense; MachineError for what can't be read.
    """
    cache = {} if cache is None else cache
    links = [_link(own)]
    while is_delta(links[-1].index.metadata):
        index = links[-1].index
        name, known = _base(index)
        if any(link.index.path.name == name for link in links):
            raise _senseless(own.path, f"its chain comes back to '{printable(name)}'")
        if len(links) == MOST_LINKS:
            raise _senseless(own.path, f"its chain has more than {MOST_LINKS} links")
        base = _open_base(own.path.with_name(name), cache)
        if isinstance(base, str):
            raise LinkError(str(own.path), name, base)
        if _fingerprint(base.index, cache) != known:
            raise LinkError(str(own.path), name, "is not the file that it was")
        links.append(base)
    links.reverse()
    root = links[0].index
    for link in links[1:]:
        key = "fits", id(link), id(root.tensors)
        if key not in cache:
            _check_tensors(link, root.tensors)
        if link is not links[-1]:  # it is in the cache, and its id stays its own
            cache[key] = root.tensors
    files = tuple(link.index.files[0] for link in links)
    part = Part(0, root.parts[0].length, 0, 0, ChainSum(tuple(links)))
    return TensorIndex(path, root.tensors, own.metadata, files, (part,), links=tuple(links))


def _open_base(path: Path, cache: Cache) -> Link | str:
    """The link at `path`, or what is wrong with it."""
    key = "link", path
    if key not in cache:
        try:
            cache[key] = _link(read_header(path, cache))
        except SnapshotError as error:
            cache[key] = f"is {error.problem}".replace("is is ", "is ")
        except MachineError:
            if exists(path):
                raise
            cache[key] = "is missing"
    found: Link | str = cache[key]
    return found


def _fingerprint(index: TensorIndex, cache: Cache) -> str:
    key = "fingerprint", index.files[0]
    if key not in cache:
        cache[key] = fingerprint(index)
    found: str = cache[key]
    return found


def _link(index: TensorIndex) -> Link:
    """A file as a link of a chain; raises SnapshotError for scales that make no sense."""
    if not is_delta(index.metadata):
        return Link(index, None, {})
    known = index.metadata[ENCODING]
    if known != DELTA:
        raise SnapshotError(
            str(index.path),
            f"its encoding, '{printable(known)}', is not known",
            "use a newer posthoc",
        )
    try:
        default = int(index.metadata[SCALE])
        others = json.loads(index.metadata.get(SCALES, "{}"))
        exponents = [default, *(each for each in others.values() if each is not None)]
    except (KeyError, ValueError, AttributeError, RecursionError):
        raise _senseless(index.path, "its scales are no whole numbers") from None
    for each in exponents:
        if not isinstance(each, int) or isinstance(each, bool) or abs(each) > MOST_SCALE:
            raise _senseless(index.path, f"a scale is not within 2^+-{MOST_SCALE}")
    return Link(index, default, others)


def _base(index: TensorIndex) -> tuple[str, str]:
    """The name and fingerprint of the file that a delta is a difference to."""
    name, known = index.metadata.get(BASE), index.metadata.get(BASE_FINGERPRINT)
    if not name or not known:
        raise _senseless(index.path, "it says not what it is a difference to")
    plain = name == os.path.basename(name) and name not in (".", "..")
    if not plain or any(mark in name for mark in "\\:\0"):
        raise _senseless(index.path, f"its base '{printable(name)}' is no name of a file beside it")
    return name, known


def _check_tensors(link: Link, root: Mapping[str, TensorInfo]) -> None:
    """Raise SnapshotError unless the tensors of a link fit those of the keyframe."""
    for name, info in link.index.tensors.items():
        there = root.get(name)
        if there is None or there.shape != info.shape:
            raise _senseless(
                link.index.path, f"tensor '{printable(name)}' is none of its chain's keyframe"
            )
        if info.dtype != there.dtype and not {info.dtype, there.dtype} <= FLOATS:
            raise _senseless(
                link.index.path,
                f"tensor '{printable(name)}' is {info.dtype}, and {there.dtype} in the keyframe",
            )


def _senseless(path: Path, why: str) -> SnapshotError:
    return SnapshotError(str(path), f"a delta that makes no sense ({why})", _REMEDY)


# Writing


def header_of(
    tensors: Mapping[str, TensorInfo],
    scales: Mapping[str, int | None],
    base: tuple[str, str],
    metadata: Mapping[str, str],
    length: int = 0,
) -> bytes:
    """The header of a delta to the file `base`, a name and fingerprint; of `length` bytes or more.

    `scales` are the exponents of the tensors that are differences, and None of those whose dtype
    has differences but which are whole.
    """
    known = Counter(each for each in scales.values() if each is not None)
    scale = min(known, key=lambda each: (-known[each], each), default=0)
    others = {name: each for name, each in scales.items() if each != scale}
    entries: dict[str, Any] = {
        "__metadata__": {
            **metadata,
            ENCODING: DELTA,
            BASE: base[0],
            BASE_FINGERPRINT: base[1],
            SCALE: str(scale),
            **({SCALES: json.dumps(others, separators=(",", ":"))} if others else {}),
        }
    }
    entries |= {name: as_entry(info) for name, info in tensors.items()}
    return encode_header(entries, length)


# Reading


def links_of(index: TensorIndex) -> tuple[Link, ...]:
    """The links of a chain; a plain snapshot is its own."""
    return index.links or (Link(index, None, {}),)


def terms(links: Sequence[Link], name: str) -> list[tuple[int, int]]:
    """The links that a tensor is the sum of, each with its scale's exponent.

    They begin with the last that holds all of it; of one alone the tensor is a copy.
    """
    found: list[tuple[int, int]] = []
    for at in reversed(range(len(links))):
        if name in links[at].index.tensors:
            exponent = links[at].exponent(name)
            found.append((at, exponent or 0))
            if exponent is None:
                break
    return found[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class ChainSum:
    """Content of a part: the data section of the keyframe, if it held the chain's last network.

    Floating-point tensors that are sums are rounded to the keyframe's dtype.
    """

    links: tuple[Link, ...]

    def open(self, files: Sequence[ReadAt]) -> ReadAt:
        return _Opened(self.links, files).read


class _Opened:
    def __init__(self, links: Sequence[Link], files: Sequence[ReadAt]) -> None:
        root = links[0].index.tensors
        order = sorted(root, key=lambda name: root[name].start)
        self._tensors = [(name, root[name]) for name in order if root[name].elements]
        self._starts = [info.start for _, info in self._tensors]
        self._links, self._files = links, files

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the network from `start` on."""
        at = bisect.bisect_right(self._starts, start) - 1
        while into:
            name, info = self._tensors[at]
            count = min(len(into), info.end - start)
            if count > 0:
                self._read(name, info, start - info.start, into[:count])
                into, start = into[count:], start + count
            at += 1

    def _read(self, name: str, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from its byte `start` on."""
        found = terms(self._links, name)
        stored = self._links[found[0][0]].index
        there = stored.tensors[name]
        if len(found) == 1 and there.dtype == info.dtype:
            link = found[0][0]
            self._files[link](stored.parts[0].data_start + there.start + start, into)
            return
        item = DTYPES[info.dtype].bits // 8
        first, last = start // item, -(-(start + len(into)) // item)
        for begin in range(first, last, _AT_ONCE):
            end = min(begin + _AT_ONCE, last)
            values = self._sum(name, found, begin, end - begin)
            with np.errstate(all="ignore"):
                data = values.astype(DTYPES[info.dtype].numpy()).view(np.uint8)
            inside = max(start - begin * item, 0)
            data = data[inside : start + len(into) - begin * item]
            to = max(begin * item - start, 0)
            into[to : to + len(data)] = data.data

    def _sum(
        self, name: str, found: Sequence[tuple[int, int]], first: int, count: int
    ) -> FloatArray:
        total = np.zeros(count)
        for at, exponent in found:
            info = self._links[at].index.tensors[name]
            data = np.empty(bytes_of(info.dtype, count), np.uint8)
            start = self._links[at].index.parts[0].data_start + info.start
            self._files[at](start + bytes_of(info.dtype, first), data.data)
            with np.errstate(invalid="ignore"):  # of a signalling NaN
                values = decode(info.dtype, data).astype(np.float64)
            total += values * 2.0**exponent
        return total
