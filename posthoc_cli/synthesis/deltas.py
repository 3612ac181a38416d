"""Writing snapshots as differences to each other, and reading them back: in flat memory, tensor by
tensor, along the whole chain at once.

What was rounded away of one snapshot is in the difference to the next, so that of a chain only the
last rounding remains. A tensor's scale depends on the largest of its first differences, and leaves
room above it; where one of its files shows that to be too little, the tensor is done again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from posthoc_cli.storage import TensorInfo, fingerprint, make_header, read_header
from posthoc_cli.storage.aside import flush_folder
from posthoc_cli.storage.atomic import AtomicFile, opened
from posthoc_cli.storage.deltas import MOST_SCALE, header_of
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, FloatArray, bytes_of
from posthoc_cli.storage.header import Base
from posthoc_cli.storage.workers import (
    MAX_WORKERS,
    background_flush,
    default_workers,
    run_workers,
)
from posthoc_cli.synthesis.bases import Bases
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.kernels import STRIDE, quantize
from posthoc_cli.synthesis.values import (
    AT_ONCE,
    Bytes,
    Value,
    elements,
    new_buffer,
    padded,
    parts,
)

DELTA_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
"""What differences can be stored as."""

_PIECE_BYTES = 1 << 24
"""Memory for the pieces of a tensor, in float64, of all that a thread holds of a step's snapshots:
what the processor's cache has room for."""

_SAMPLE = 64
"""Elements by which a tensor is taken to change, or not, when space is reserved."""

_FIRST = 1 << 14
"""Elements by which a tensor's scale is chosen."""

_ROOM = {"F16": 6, "F8_E4M3": 2}
"""Powers of two that a scale leaves above the largest of those: what so few bits lack is below."""

_LOWER = {"F16": 17, "F8_E4M3": 2, "BF16": 600}
"""Powers of two below what a scale is good for at most down to which nothing is lost either."""

How = int | str
"""How a tensor is stored: as a difference with a scale of that exponent, as _WHOLE, or _SAME."""

_WHOLE, _SAME = "whole", "same"

ReadElements = Callable[[str, int, Bytes], None]
"""Fills an array with the bytes of a tensor's elements, by name, from the element on."""


@dataclass(frozen=True, slots=True, eq=False)
class NewFile:
    """A snapshot, whose `tensors` are given by `read`, that is to lie at `path`: as the difference
    to the files `bases` beside it, times their coefficients, or whole."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    read: ReadElements
    metadata: Mapping[str, str]
    bases: Sequence[tuple[Path, float]] = ()
    overwrite: bool = False
    sampled: bool = True
    """Whether a few elements are read before all."""


class Rounded(NamedTuple):
    """What differences are rounded to: `stored` elements, and the `sums` that it then comes to."""

    dtype: str
    exponent: int
    stored: Bytes
    sums: FloatArray


class Walk:
    """Goes along several snapshots, each of which comes after its bases, piece by piece.

    `outside` has those that are not among them.
    """

    def __init__(self, files: Sequence[NewFile], outside: Bases | None) -> None:
        self.files = files
        self.outside = outside
        self._last = {path: at for at, each in enumerate(files) for path, _ in each.bases}
        born = {each.path: at for at, each in enumerate(files)}
        held = [
            sum(born.get(path, -1) < at <= last for path, last in self._last.items())
            for at in range(len(files))
        ]
        self.piece = max(_PIECE_BYTES // 8 // (max(held) + 1) // AT_ONCE, 1) * AT_ONCE
        most = max((info.elements for info in files[0].tensors.values()), default=0)
        self._bytes = 8 * (min(self.piece, most) + STRIDE)
        self._data = np.empty(self._bytes, np.uint8)
        self.stored = np.empty(self._bytes // 4, np.uint8)
        self._free: list[Bytes] = []
        self._spare: Value | None = None
        self._taken: Value | None = None

    def buffer(self, count: int) -> FloatArray:
        room = self._free.pop() if self._free else np.empty(self._bytes, np.uint8)
        return room.view(np.float64)[:count]

    def room(self, count: int) -> FloatArray:
        """Room for the sums of the file at hand, which may be where those of a base are that is
        needed no more: what is read of that is read before."""
        if self._spare is None or self._spare.sums is None:
            return self.buffer(count)
        self._taken = self._spare
        return self._spare.sums

    def free(self, sums: FloatArray) -> None:
        """Give back what `buffer` gave."""
        self._free.append(cast(Bytes, sums.base))

    def pieces(self, info: TensorInfo) -> list[tuple[int, int]]:
        """The first element of each piece of a tensor, and how many it has."""
        every = range(0, info.elements, self.piece)
        return [(first, min(self.piece, info.elements - first)) for first in every]

    def go(
        self, name: str, first: int, count: int, step: Callable[[int, Bytes, list[Value]], Value]
    ) -> None:
        """Call `step` for each file with a piece of its tensor, and those of its bases; it returns
        what the file comes to."""
        values: dict[Path, Value] = {}
        if self.outside is not None:
            values |= self.outside.values(name, first, count, self.buffer)
        for at, new in enumerate(self.files):
            data = self._data[: bytes_of(new.tensors[name].dtype, count)]
            new.read(name, first, data)
            before = [values[path] for path, _ in new.bases]
            over = [path for path in values if self._last.get(path, 0) <= at]
            kept = [each for path, each in values.items() if path not in over]
            free = (each for each in before if each.sums is not None and each not in kept)
            self._spare, self._taken = next(free, None), None
            values[new.path] = step(at, data, before)
            if self._taken is not None:
                self._taken.sums = None
            for path in over if new.path in self._last else [*over, new.path]:
                gone = values.pop(path)
                if gone.sums is not None and all(gone is not each for each in values.values()):
                    self.free(gone.sums)

    def difference(
        self,
        info: TensorInfo,
        data: Bytes,
        bases: Sequence[tuple[float, Value]],
        to: Rounded | None = None,
        part: slice | None = None,
    ) -> float:
        """The largest difference of `data` to the bases, infinite or NaN if one is; of a `part`.
        They are rounded `to` what is given."""
        count = data.size * 8 // DTYPES[info.dtype].bits
        part = part or slice(0, count)
        minus = [(c, base.minus(self.buffer, count)[part]) for c, base in bases]
        here = elements(info.dtype, data, part)
        dtype, exponent, stored, sums = to or ("", None, here, minus[0][1])
        return quantize(info.dtype, here, minus, exponent, dtype, stored, sums)

    def unchanged(self, info: TensorInfo, data: Bytes, base: Value, differs: bool) -> bool:
        """Whether `data` are what the base is: to the bit, or where numbers can be differences, but
        for the signs of zeros."""
        count = data.size * 8 // DTYPES[info.dtype].bits
        return all(
            base.same(info.dtype, elements(info.dtype, data, part), part)
            or (differs and self.difference(info, data, [(1.0, base)], part=part) == 0)
            for part in [slice(0, min(STRIDE, count)), *parts(count)]  # most differ at once
        )

    def check_unchanged(self) -> None:
        if self.outside is not None:
            self.outside.check_unchanged()


class _Output:
    """A file that is being written: a tensor's place shows once those before it are written."""

    def __init__(self, new: NewFile, code: str) -> None:
        self.new = new
        self._code = code
        self.differ = {
            name
            for name, info in new.tensors.items()
            if info.dtype in FLOATS and DTYPES[info.dtype].bits > DTYPES[code].bits
        }
        self.kinds = {
            name: code if name in self.differ else info.dtype for name, info in new.tensors.items()
        }
        rank = {each: place for place, each in enumerate(DTYPES)}
        self.names = sorted(new.tensors, key=lambda name: (rank[self.kinds[name]], name))
        self.usual: int | None = 0 if code == "BF16" else None
        self._scales: dict[str, int | None] = {}
        self._position = 0
        self._places: dict[str, TensorInfo] = {}
        if not new.bases:
            shapes = {name: (info.dtype, info.shape) for name, info in new.tensors.items()}
            self._header, self._places = make_header(shapes, new.metadata)
            self._room = len(self._header)
            return
        # Room for a header that names a scale for each tensor: only the data tell which there are.
        most = sum(info.end - info.start for info in new.tensors.values())
        largest = {
            name: TensorInfo("F8_E4M3FNUZ", new.tensors[name].shape, most, most)
            for name in self.names
        }
        scales = {name: -300 - at for at, name in enumerate(self.names)}
        bases = [Base(path.name, 32 * "0", number) for path, number in new.bases]
        self._room = len(header_of(largest, scales, bases, new.metadata))

    def reserve(self, changes: Callable[[str], bool]) -> AtomicFile:
        """The file, with room for the tensors that change."""
        size = self._room + sum(
            bytes_of(self.kinds[name] if self.new.bases else info.dtype, info.elements)
            for name, info in self.new.tensors.items()
            if not self.new.bases or changes(name)
        )
        self.file = AtomicFile(self.new.path, size, overwrite=self.new.overwrite)
        return self.file

    def how(self, name: str, same: bool, peak: float, first: float) -> How:
        """How a tensor is to be stored that is the `same` as in its first base, or else whose
        largest difference is `peak`, and among the first elements `first`."""
        if same:
            return _SAME
        if name not in self.differ or not math.isfinite(peak):
            return _WHOLE
        if (least := self._least(peak)) > MOST_SCALE:
            return _WHOLE
        usual = self.usual
        if usual is None:
            usual = min(self._least(first or peak) + _ROOM[self._code], MOST_SCALE)
        return usual if usual - _LOWER[self._code] <= least <= usual else least

    def _least(self, peak: float) -> int:
        """The exponent of the least scale by which `peak` can be stored."""
        return max(math.frexp(peak / DTYPES[self._code].largest)[1], -MOST_SCALE)

    def write(self, name: str, first: int, data: Bytes, dtype: str) -> None:
        """Write a piece of the tensor that is next, or of any of a whole file."""
        start = self._position if self.new.bases else self._places[name].start
        self.file.write_at(self._room + start + bytes_of(dtype, first), data.data)

    def end(self, name: str, how: How) -> None:
        """Note how a tensor that has been written is stored."""
        if how == _SAME:
            return
        info, exponent = self.new.tensors[name], how if isinstance(how, int) else None
        stored = info.dtype if exponent is None else self._code
        if info.dtype in FLOATS:
            self._scales[name] = exponent
        if self._code == "F16" and self.usual is None:
            self.usual = exponent
        end = self._position + bytes_of(stored, info.elements)
        self._places[name] = TensorInfo(stored, info.shape, self._position, end)
        self._position = end

    def finish(self, known: Callable[[Path], str]) -> None:
        """Give the file its header, with the fingerprints of its bases, which have their own."""
        if not self.new.bases:
            self.file.write_at(0, self._header)
            return
        bases = [Base(path.name, known(path), number) for path, number in self.new.bases]
        header = header_of(self._places, self._scales, bases, self.new.metadata, self._room)
        self.file.write_at(0, header)
        self.file.shrink(self._room + self._position)


def write_chain(
    files: Sequence[NewFile],
    dtype: str,
    outside: Bases | None = None,
    *,
    progress: Progress | None = None,
    check: Callable[[Path], None] = lambda first: None,
) -> None:
    """Write snapshots of the same tensors, each after its bases and as the difference to them.

    They lie in one folder, as do those bases that are not among them, which `outside` has. `dtype`
    is one of DELTA_DTYPES. A tensor with NaN or infinity, of another kind than real floating point,
    or of no more bits than `dtype` has, is written as it is; one that is what it is in the first
    base not at all. The files appear one after the other in their order, each whole or not at all.
    Right before, when all are on the disk, `check` is called with where the first now lies; it may
    raise what speaks against it. `progress` is told the bytes just read.

    Raises SnapshotError when a file changes meanwhile, UsageError when one exists and may not be
    overwritten, MachineError when the disk fails.
    """
    code = DELTA_DTYPES[dtype]
    outputs = [_Output(each, code) for each in files]
    # Sums of links are made, and one snapshot is read, by one thread.
    workers = 1 if outside or len(files) == 1 else default_workers()
    walks = [Walk(files, outside) for _ in range(workers)]
    new = [each.reserve(_changes(walks[0], each.new)) for each in outputs]
    with opened(new):
        with background_flush(new):
            for name in outputs[-1].names:
                _write_tensor(walks, outputs, name, code, progress)
        walks[0].check_unchanged()
        written = {each.new.path: each.file.temporary for each in outputs}

        @cache
        def known(path: Path) -> str:
            return fingerprint(read_header(written.get(path) or path))

        for output in outputs:
            output.finish(known)
        at_once = min(len(new), MAX_WORKERS)
        run_workers(iter(new), lambda file, _: file.finish(), lambda: True, at_once)
        check(new[0].temporary)
        for file in new:
            file.place(overwrite=file.overwrite)
        flush_folder(new[0].path.parent)


def _changes(walk: Walk, new: NewFile) -> Callable[[str], bool]:
    """Whether a tensor seems to be another than in the base, by a few of its elements."""
    if not new.sampled:
        return lambda name: True
    path = new.bases[0][0] if new.bases else None
    before = next((each for each in walk.files if each.path == path), None)

    def changes(name: str) -> bool:
        info = new.tensors[name]
        if info.elements < AT_ONCE:
            return True
        first = info.elements // 2 // _SAMPLE * _SAMPLE
        count = min(_SAMPLE, info.elements - first)
        data = padded(info.dtype, count)
        new.read(name, first, data)
        if before is None:
            assert path is not None
            assert walk.outside is not None
            base = walk.outside.values(name, first, count, new_buffer)[path]
        else:
            dtype = before.tensors[name].dtype
            base = Value(dtype, padded(dtype, count), None)
            before.read(name, first, base.data)
        return not base.same(info.dtype, data, slice(0, count))

    return changes


def _write_tensor(
    walks: Sequence[Walk],
    outputs: Sequence[_Output],
    name: str,
    code: str,
    progress: Progress | None,
) -> None:
    peaks: list[list[float]] = []
    same: list[list[bool]] = []
    firsts: list[float] = []
    guess: list[How] = []

    def write(piece: tuple[int, int], walk: Walk) -> None:
        walk.go(name, *piece, partial(step, walk, *piece))

    def step(
        walk: Walk, first: int, count: int, at: int, data: Bytes, before: list[Value]
    ) -> Value:
        output = outputs[at]
        info = output.new.tensors[name]
        if anew and progress is not None:
            progress(data.size)
        if not before:
            output.write(name, first, data, info.dtype)
            return Value(info.dtype, _copy(info.dtype, data, count), None)
        bases = [(c, value) for (_, c), value in zip(output.new.bases, before, strict=True)]
        differs = name in output.differ
        unchanged = walk.unchanged(info, data, before[0], differs)
        same[at].append(unchanged)

        def peak_of(to: Rounded | None = None, part: slice | None = None) -> float:
            return walk.difference(info, data, bases, to, part) if differs else 1.0

        if unchanged and guess[at] == _SAME:
            return before[0]
        if first == 0:
            firsts[at] = peak_of(part=slice(0, min(_FIRST, count)))
            if anew:
                guess[at] = output.how(name, False, firsts[at] or peak_of(), firsts[at])
        exponent = guess[at]
        if not isinstance(exponent, int):
            peaks[at].append(peak_of())
            if exponent == _SAME:
                return before[0]
            output.write(name, first, data, info.dtype)
            return Value(info.dtype, _copy(info.dtype, data, count), None)
        stored = elements(code, walk.stored, slice(0, count))
        sums = walk.room(count)
        peaks[at].append(peak_of(Rounded(code, exponent, stored, sums)))
        # Or it's wrong, and done again.
        if not anew or output.how(name, False, peaks[at][-1], firsts[at]) == exponent:
            output.write(name, first, stored, code)
        return Value(None, sums.view(np.uint8), sums)

    anew = True
    right: list[How] = []
    while anew or guess != right:
        guess = right or [_SAME] * len(outputs)
        peaks, firsts = [[0.0] for _ in outputs], [0.0] * len(outputs)
        same = [[] for _ in outputs]
        pieces = walks[0].pieces(outputs[0].new.tensors[name])
        alone = 1 if walks[1:] else len(pieces)  # the first tells how the others are stored
        for piece in pieces[:alone]:
            write(piece, walks[0])
        if rest := pieces[alone:]:
            run_workers(iter(rest), write, list(walks).pop, min(len(walks), len(rest)))
        found = zip(outputs, same, peaks, firsts, strict=True)
        right = [
            each.how(name, all(alike), float(np.max(peak)), first)
            for each, alike, peak, first in found
        ]
        anew = False
    for output, how in zip(outputs, right, strict=True):
        if output.new.bases:
            output.end(name, how)


def _copy(dtype: str, data: Bytes, count: int) -> Bytes:
    copy = padded(dtype, count)
    copy[:] = data
    return copy
