"""What chains of differences come to, tensor by tensor: read from files, or held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import cast

import numpy as np

from posthoc_cli.storage import File, Reader, TensorIndex, TensorInfo
from posthoc_cli.storage.deltas import Sum, last_uses, links_of, sums_of
from posthoc_cli.storage.dtypes import FloatArray, bytes_of
from posthoc_cli.storage.header import Link
from posthoc_cli.synthesis.values import (
    AT_ONCE,
    Buffer,
    Bytes,
    Value,
    add,
    combine,
    elements,
    new_buffer,
    padded,
    parts,
)


class Stored:
    """What the files `bases` come to, of chains or plain ones; a context manager that has the
    chains' files open."""

    def __init__(self, bases: Sequence[TensorIndex]) -> None:
        links = {link.index.path: link for index in bases for link in links_of(index)}
        self._links = tuple(links.values())
        self._bases = {index.path: list(links).index(index.path) for index in bases}
        self._free: list[FloatArray] = []

    def __enter__(self) -> Stored:
        with ExitStack() as stack:
            self._readers = [stack.enter_context(Reader(link.index)) for link in self._links]
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def check_unchanged(self) -> None:
        for reader in self._readers:
            reader.check_unchanged()

    def values(self, name: str, first: int, count: int, buffer: Buffer) -> dict[Path, Value]:
        """A tensor's elements from `first` on, by the path of each base."""
        sums, wanted = sums_of(self._links, name, list(self._bases.values()))
        found: dict[int, Value] = {}
        for each in sums:
            if each.at in wanted and each.exponent is None:
                info = self._links[each.at].index.tensors[name]
                found[each.at] = Value(info.dtype, self._read(each.at, info, first, count), None)
            elif each.at in wanted:
                total = buffer(count)
                found[each.at] = Value(None, total.view(np.uint8), total)
        if len(found) < len(sums) or any(each.bases for each in sums):
            gone = last_uses(sums)
            for part in parts(count):
                self._add_up(name, first, part, sums, gone, found)
        return {path: found[at] for path, at in zip(self._bases, wanted, strict=True)}

    def _add_up(
        self,
        name: str,
        first: int,
        part: slice,
        sums: Sequence[Sum],
        gone: Mapping[int, Sequence[int]],
        found: Mapping[int, Value],
    ) -> None:
        size = part.stop - part.start
        minus: dict[int, FloatArray] = {}
        for at, exponent, bases in sums:
            info, value = self._links[at].index.tensors[name], found.get(at)
            if value is None or value.sums is None:
                room = self._free.pop() if self._free else new_buffer(AT_ONCE)
            else:
                room = value.sums[part.start :]
            minus[at] = room[:size]
            data = self._read(at, info, first + part.start, size)
            before = [(number, minus[base]) for base, number in bases]
            total = combine(before, minus[at]) if before else None
            add(info.dtype, data, -(2.0 ** (exponent or 0)), total, minus[at])
            for base in gone.get(at, ()):
                self._give_back(minus.pop(base), base, found)
        for at, rest in minus.items():
            self._give_back(rest, at, found)

    def _give_back(self, room: FloatArray, at: int, found: Mapping[int, Value]) -> None:
        if at not in found or found[at].sums is None:
            self._free.append(cast(FloatArray, room.base))

    def _read(self, at: int, info: TensorInfo, first: int, count: int) -> Bytes:
        data = padded(info.dtype, count)
        self._readers[at].read(info.start + bytes_of(info.dtype, first), data.data)
        return data


class Held:
    """What chains come to, held in memory: of tensors that are sums in 8 bytes an element.

    Of chains that have grown only what is new is read. What is no base is held no longer, unless
    it was one when `at` was last called for the same `who`.
    """

    def __init__(self) -> None:
        self._values: dict[File, dict[str, Value]] = {}
        self._last: dict[object, list[File]] = {}

    def at(self, bases: Sequence[TensorIndex], who: object = None) -> AbstractContextManager[Held]:
        """Itself, brought to the values of `bases`."""
        known, self._values = self._values, {}  # not of what is half read
        wanted = {index.path: links_of(index)[-1].index.files[0] for index in bases}
        links = {link.index.files[0]: link for index in bases for link in links_of(index)}
        for file in self._missing(known, links, list(wanted.values())):
            by_name = {each.path.name: each for each in links}
            of = [(base.coefficient, known[by_name[base.name]]) for base in links[file].bases]
            known[file] = self._values_of(links[file], of)
        self._bases = {path: known[file] for path, file in wanted.items()}
        self._last[who] = list(wanted.values())
        kept = {file for files in self._last.values() for file in files}
        self._values = {file: each for file, each in known.items() if file in kept}
        return nullcontext(self)

    def _missing(
        self, known: Mapping[File, object], links: Mapping[File, Link], wanted: Sequence[File]
    ) -> list[File]:
        """The files that are to be read, each after its bases."""
        by_name = {each.path.name: each for each in links}
        missing = {each for each in wanted if each not in known}
        for file in reversed(list(links)):
            if file in missing:
                bases = {by_name[base.name] for base in links[file].bases}
                missing |= bases - known.keys()
        return [file for file in links if file in missing]

    def _values_of(
        self, link: Link, bases: Sequence[tuple[float, Mapping[str, Value]]]
    ) -> dict[str, Value]:
        values = dict(bases[0][1]) if bases else {}
        with Reader(link.index) as reader:
            for name, info in link.index.tensors.items():
                data = padded(info.dtype, info.elements)
                reader.read(info.start, data.data)
                if (exponent := link.exponent(name)) is None:
                    values[name] = Value(info.dtype, data, None)
                    continue
                total = new_buffer(info.elements)
                for part in parts(info.elements):
                    stored = elements(info.dtype, data, part)
                    before = combine([(c, each[name].part(part)) for c, each in bases], total[part])
                    add(info.dtype, stored, -(2.0**exponent), before, total[part])
                values[name] = Value(None, total.view(np.uint8), total)
            reader.check_unchanged()
        return values

    def values(self, name: str, first: int, count: int, buffer: Buffer) -> dict[Path, Value]:
        part, found = slice(first, first + count), {}
        for path, every in self._bases.items():
            whole = every[name]
            if whole.sums is not None and whole.dtype is None:
                total = buffer(count)
                total[:] = whole.sums[part]
                found[path] = Value(None, total.view(np.uint8), total)
                continue
            assert whole.dtype is not None
            data = padded(whole.dtype, count)
            data[:] = elements(whole.dtype, whole.data, part)
            found[path] = Value(whole.dtype, data, None)
        return found

    def check_unchanged(self) -> None:
        """What it was read from was checked then."""


Bases = Stored | Held
