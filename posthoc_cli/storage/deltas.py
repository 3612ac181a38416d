"""Snapshots stored as differences: a chain of files whose sum is the snapshot.

A delta is a safetensors file whose metadata names its `bases`, files beside it, each with its
fingerprint and a coefficient. Of a tensor t it holds the difference to the sum of what they come
to, scaled by a power of two, or all of it, or nothing where it is what it is in the first base:

    value(t) = c_1 * value_1(t) + c_2 * value_2(t) + ... + 2^e * stored(t)

in float64, in that order, each product and each sum rounded. The first link, the keyframe, is a
plain file. `open_chain` makes of a delta the index of the network that it stands for: names, shapes
and dtypes are the keyframe's, and whoever reads gets the sums.
"""

from __future__ import annotations

import bisect
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    Base,
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
from posthoc_cli.storage.metadata import (
    BASE,
    BASE_FINGERPRINT,
    BASES,
    DELTA,
    DELTAS,
    ENCODING,
    SCALE,
    SCALES,
)
from posthoc_cli.storage.readers import fingerprint
from posthoc_cli.storage.stores import exists

MOST_LINKS = 256
"""Links of the longest chain that is read: on the longest way from a snapshot to its keyframe."""

MOST_BASES = 16
"""Files that one is a difference to."""

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
    links: dict[str, Link] = {}  # each after its bases
    way = {own.path.name: _link(own)}
    while way:
        name, link = next(reversed(way.items()))
        new = next((base.name for base in link.bases if base.name not in links), None)
        if new is None:
            for base in link.bases:
                if _fingerprint(links[base.name].index, cache) != base.fingerprint:
                    raise LinkError(str(own.path), base.name, "is not the file that it was")
            links[name] = way.pop(name)
            continue
        _check_name(new, link.index.path)
        if new in way:
            raise _senseless(own.path, f"its chain comes back to '{printable(new)}'")
        if len(way) == MOST_LINKS:
            raise _senseless(own.path, f"its chain has more than {MOST_LINKS} links")
        found = _open_base(own.path.with_name(new), cache)
        if isinstance(found, str):
            raise LinkError(str(own.path), new, found)
        way[new] = found
    every = tuple(links.values())
    root = every[0].index
    for link in every[1:]:
        key = "fits", id(link), id(root.tensors)
        if key not in cache:
            _check_tensors(link, root.tensors)
        if link is not every[-1]:  # it is in the cache, and its id stays its own
            cache[key] = root.tensors
    files = tuple(link.index.files[0] for link in every)
    part = Part(0, root.parts[0].length, 0, 0, ChainSum(every))
    return TensorIndex(path, root.tensors, own.metadata, files, (part,), links=every)


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
    """A file as a link of a chain; raises SnapshotError for a delta that makes no sense."""
    if not is_delta(index.metadata):
        return Link(index, None, {})
    known = index.metadata[ENCODING]
    if known not in DELTAS:
        raise SnapshotError(
            str(index.path),
            f"its encoding, '{printable(known)}', is not known",
            "use a newer posthoc",
        )
    bases = bases_of(index.metadata)
    if not bases:
        raise _senseless(index.path, "it says not what it is a difference to")
    try:
        default = int(index.metadata[SCALE])
        others = json.loads(index.metadata.get(SCALES, "{}"))
        exponents = [default, *(each for each in others.values() if each is not None)]
    except (KeyError, ValueError, AttributeError, RecursionError):
        raise _senseless(index.path, "its scales are no whole numbers") from None
    for each in exponents:
        if not isinstance(each, int) or isinstance(each, bool) or abs(each) > MOST_SCALE:
            raise _senseless(index.path, f"a scale is not within 2^+-{MOST_SCALE}")
    return Link(index, default, others, bases)


def bases_of(metadata: Mapping[str, str]) -> tuple[Base, ...]:
    """What a file with this metadata is a difference to; nothing where it doesn't say so, or in no
    way that makes sense."""
    if metadata.get(ENCODING) not in DELTAS:
        return ()
    said: Any = [[metadata.get(BASE), metadata.get(BASE_FINGERPRINT), 1.0]]
    try:
        if metadata[ENCODING] == DELTA:
            said = json.loads(metadata[BASES])
        bases = tuple(Base(name, known, float(number)) for name, known, number in said)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return ()
    right = all(
        isinstance(base.name, str)
        and isinstance(base.fingerprint, str)
        and math.isfinite(base.coefficient)
        for base in bases
    )
    right = right and len({base.name for base in bases}) == len(bases) <= MOST_BASES
    return bases if right else ()


def _check_name(name: str, path: Path) -> None:
    """Raise SnapshotError unless a base of the file at `path` can lie beside it."""
    plain = name == os.path.basename(name) and name not in ("", ".", "..")
    if not plain or any(mark in name for mark in "\\:\0"):
        raise _senseless(path, f"its base '{printable(name)}' is no name of a file beside it")


def _check_tensors(link: Link, root: Mapping[str, TensorInfo]) -> None:
    """Raise SnapshotError unless the tensors of a link fit those of the keyframe."""
    if link.scale is None and len(link.index.tensors) < len(root):
        raise _senseless(link.index.path, "it lacks tensors that its chain's keyframe has")
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
    bases: Sequence[Base],
    metadata: Mapping[str, str],
    length: int = 0,
) -> bytes:
    """The header of a delta to the files `bases`, of `length` bytes or more.

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
            BASES: json.dumps(bases, separators=(",", ":")),
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


class Sum(NamedTuple):
    """How a link's value of a tensor is made: of what it stores, times 2^`exponent`, and of what
    the links at the places `bases` come to, times their coefficients. Without any it is as it is
    stored."""

    at: int
    exponent: int | None
    bases: tuple[tuple[int, float], ...]


def sums_of(
    links: Sequence[Link], name: str, wanted: Sequence[int] = (-1,)
) -> tuple[list[Sum], list[int]]:
    """The sums of which a tensor's values in the links at `wanted` are made, in an order in which
    they can be; and those among them, by place, that are the values."""
    places = {link.index.path.name: at for at, link in enumerate(links)}
    same: list[int] = []  # where the value of each link is made
    made: dict[int, Sum] = {}
    for at, link in enumerate(links):
        if name not in link.index.tensors:
            same.append(same[places[link.bases[0].name]])
            continue
        exponent = link.exponent(name)
        bases = () if exponent is None else link.bases
        of = tuple((same[places[base.name]], base.coefficient) for base in bases)
        made[at] = Sum(at, exponent, of)
        same.append(at)
    values = [same[at] for at in wanted]
    needed = set(values)
    for at in reversed(made):
        if at in needed:
            needed.update(base for base, _ in made[at].bases)
    return [made[at] for at in sorted(needed)], values


def terms(links: Sequence[Link], name: str) -> dict[int, float]:
    """The links that a tensor is a weighted sum of, by place, without the scales.

    Of one alone, whose weight is 1 then, the tensor is a copy.
    """
    every, (last,) = sums_of(links, name)
    weights = dict.fromkeys((each.at for each in every), 0.0)
    weights[last] = 1.0
    for each in reversed(every):
        for base, coefficient in each.bases:
            weights[base] += coefficient * weights[each.at]
    return weights


def last_uses(sums: Sequence[Sum]) -> dict[int, list[int]]:
    """After which sum, by place, the values of which others are needed no more."""
    last = {base: each.at for each in sums for base, _ in each.bases}
    gone: dict[int, list[int]] = {}
    for base, at in last.items():
        gone.setdefault(at, []).append(base)
    return gone


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
        sums, (last,) = sums_of(self._links, name)
        stored = self._links[last].index
        there = stored.tensors[name]
        if len(sums) == 1 and there.dtype == info.dtype:
            self._files[last](stored.parts[0].data_start + there.start + start, into)
            return
        item = DTYPES[info.dtype].bits // 8
        first, end = start // item, -(-(start + len(into)) // item)
        for begin in range(first, end, _AT_ONCE):
            count = min(_AT_ONCE, end - begin)
            values = self._value(name, sums, begin, count)
            with np.errstate(all="ignore"):
                data = values.astype(DTYPES[info.dtype].numpy()).view(np.uint8)
            inside = max(start - begin * item, 0)
            data = data[inside : start + len(into) - begin * item]
            to = max(begin * item - start, 0)
            into[to : to + len(data)] = data.data

    def _value(self, name: str, sums: Sequence[Sum], first: int, count: int) -> FloatArray:
        """The last of `sums`, in float64."""
        values: dict[int, FloatArray] = {}
        gone = last_uses(sums)
        for at, exponent, bases in sums:
            info = self._links[at].index.tensors[name]
            data = np.empty(bytes_of(info.dtype, count), np.uint8)
            start = self._links[at].index.parts[0].data_start + info.start
            self._files[at](start + bytes_of(info.dtype, first), data.data)
            with np.errstate(all="ignore"):  # of what is not finite
                stored = decode(info.dtype, data).astype(np.float64) * 2.0 ** (exponent or 0)
                values[at] = with_bases(stored, [(c, values[base]) for base, c in bases])
            for base in gone.get(at, ()):
                del values[base]
        return values[sums[-1].at]


def with_bases(stored: FloatArray, bases: Sequence[tuple[float, FloatArray]]) -> FloatArray:
    """What a file comes to: `stored` times its scale, and its bases by their coefficients."""
    total: FloatArray | None = None
    for coefficient, value in bases:
        product = value if coefficient == 1.0 else coefficient * value
        total = product if total is None else total + product
    return stored if total is None else total + stored
