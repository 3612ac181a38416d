"""Writing snapshots as differences to each other, and reading them back: in flat memory, tensor by
tensor, along the whole chain at once.

What was rounded away of one snapshot is in the difference to the next, so that of a chain only the
last rounding remains. A tensor's scale depends on its largest difference. Of one that is taken in
pieces it is guessed by the first; where one of its files shows that to be wrong it is done again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from posthoc_cli.errors import SnapshotError, printable
from posthoc_cli.storage import TensorIndex, TensorInfo, fingerprint, make_header, read_header
from posthoc_cli.storage.atomic import AtomicFile, opened
from posthoc_cli.storage.deltas import header_of, links_of
from posthoc_cli.storage.dtypes import DTYPES, FLOATS, FloatArray, bytes_of, decode
from posthoc_cli.storage.workers import background_flush
from posthoc_cli.synthesis.bases import (
    AT_ONCE,
    Base,
    Bytes,
    Value,
    add,
    elements,
    new_buffer,
    padded,
    parts,
)
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.kernels import STRIDE, quantize

DELTA_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
"""What differences can be stored as."""

_PIECE_BYTES = 1 << 26
"""Memory for the pieces of a tensor, in float64, of all that is held of a step's snapshots."""

_SAMPLE = 64
"""Elements by which a tensor is taken to change, or not, when space is reserved."""

_ROOM = 6
"""Powers of two above the first tensor's largest difference that one scale of float16 is good for;
and 11 below it lose nothing either."""

How = int | str
"""How a tensor is stored: as a difference with a scale of that exponent, as _WHOLE, or _SAME."""

_WHOLE, _SAME = "whole", "same"

ReadElements = Callable[[str, int, Bytes], None]
"""Fills an array with the bytes of a tensor's elements, by name, from the element on."""


@dataclass(frozen=True, slots=True, eq=False)
class NewFile:
    """A snapshot, whose `tensors` are given by `read`, that is to lie at `path`: as the difference
    to the file `base` beside it, or whole."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    read: ReadElements
    metadata: Mapping[str, str]
    base: Path | None = None
    overwrite: bool = False


class Rounded(NamedTuple):
    """What differences are rounded to: `stored` elements, and the `sums` that it then comes to."""

    dtype: str
    exponent: int
    stored: Bytes
    sums: FloatArray


class _Walk:
    """Goes along several snapshots, each of which comes after its base, piece by piece.

    `bases` are those that are not among them.
    """

    def __init__(self, files: Sequence[NewFile], bases: Mapping[Path, Base]) -> None:
        self.files = files
        self.bases = bases
        self._last = {each.base: at for at, each in enumerate(files) if each.base is not None}
        born = {each.path: at for at, each in enumerate(files)}
        held = [
            sum(born.get(path, at) <= at <= last for path, last in self._last.items())
            for at in range(len(files))
        ]
        self.piece = max(_PIECE_BYTES // 8 // (max(held) + 1) // AT_ONCE, 1) * AT_ONCE
        most = max((info.elements for info in files[0].tensors.values()), default=0)
        self._bytes = 8 * (min(self.piece, most) + STRIDE)
        self._data = np.empty(self._bytes, np.uint8)
        self._free: list[Bytes] = []

    def buffer(self, count: int) -> FloatArray:
        room = self._free.pop() if self._free else np.empty(self._bytes, np.uint8)
        return room.view(np.float64)[:count]

    def free(self, sums: FloatArray) -> None:
        """Give back what `buffer` gave."""
        self._free.append(cast(Bytes, sums.base))

    def pieces(self, info: TensorInfo) -> list[tuple[int, int]]:
        """The first element of each piece of a tensor, and how many it has."""
        every = range(0, info.elements, self.piece)
        return [(first, min(self.piece, info.elements - first)) for first in every]

    def go(
        self, name: str, first: int, count: int, step: Callable[[int, Bytes, Value | None], Value]
    ) -> None:
        """Call `step` for each file with a piece of its tensor, and that of its base; it returns
        what the file comes to."""
        values: dict[Path, Value] = {}
        for at, new in enumerate(self.files):
            data = self._data[: bytes_of(new.tensors[name].dtype, count)]
            new.read(name, first, data)
            if new.base is not None and new.base not in values:
                values[new.base] = self.bases[new.base].value(name, first, count, self.buffer)
            values[new.path] = step(at, data, values[new.base] if new.base else None)
            for path in [path for path in values if self._last.get(path, 0) <= at]:
                gone = values.pop(path)
                if gone.sums is not None and all(gone is not each for each in values.values()):
                    self.free(gone.sums)

    def difference(
        self, info: TensorInfo, data: Bytes, base: Value, to: Rounded | None = None
    ) -> float:
        """The largest difference of `data` to the base, infinite or NaN if one is. They are rounded
        `to` what is given."""
        count = data.size * 8 // DTYPES[info.dtype].bits
        if to is None and base.same(info.dtype, data, slice(0, count)):
            return 0.0
        minus, peak = base.minus(self.buffer, count), 0.0
        dtype, exponent, stored, sums = to or ("", None, data, minus)
        # What has stayed as it was is no difference, even if infinite: in pieces of one size.
        for part in parts(count) if base.dtype == info.dtype else [slice(0, count)]:
            here = elements(info.dtype, data, part)
            out = stored if to is None else elements(dtype, stored, part)
            if not base.same(info.dtype, here, part):
                there = quantize(info.dtype, here, minus[part], exponent, dtype, out, sums[part])
                peak = float(np.maximum(peak, there))
            elif to is not None:
                out[:] = 0
                sums[part] = minus[part]
        return peak

    def check_unchanged(self) -> None:
        for base in self.bases.values():
            base.check_unchanged()


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
        if new.base is None:
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
        self._room = len(header_of(largest, scales, (new.base.name, 32 * "0"), new.metadata))

    def reserve(self, changes: Callable[[str], bool]) -> AtomicFile:
        """The file, with room for the tensors that change."""
        size = self._room + sum(
            bytes_of(self.kinds[name] if self.new.base else info.dtype, info.elements)
            for name, info in self.new.tensors.items()
            if self.new.base is None or changes(name)
        )
        self.file = AtomicFile(self.new.path, size, overwrite=self.new.overwrite)
        return self.file

    def how(self, name: str, peak: float) -> How:
        """How a tensor is to be stored whose largest difference is `peak`."""
        if peak == 0.0:
            return _SAME
        if name not in self.differ or not math.isfinite(peak):
            return _WHOLE
        least = max(math.frexp(peak / DTYPES[self._code].largest)[1], -300)
        if self._code == "BF16":
            return max(least, 0)
        if self._code == "F16" and self.usual is None:
            return least + _ROOM
        if self.usual is not None and self.usual - 11 <= least + _ROOM <= self.usual + _ROOM:
            return self.usual
        return least

    def write(self, name: str, first: int, data: Bytes, dtype: str) -> None:
        """Write a piece of the tensor that is next, or of any of a whole file."""
        start = self._places[name].start if self.new.base is None else self._position
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

    def finish(self, base: Path | None) -> None:
        """Give the file its header, and wait until it is on the disk; so `base`, its base, is."""
        if self.new.base is None or base is None:
            self.file.write_at(0, self._header)
        else:
            where = self.new.base.name, fingerprint(read_header(base))
            header = header_of(self._places, self._scales, where, self.new.metadata, self._room)
            self.file.write_at(0, header)
            self.file.shrink(self._room + self._position)
        self.file.finish()


def write_chain(
    files: Sequence[NewFile],
    dtype: str,
    bases: Mapping[Path, Base],
    *,
    progress: Progress | None = None,
    check: Callable[[Path], None] = lambda first: None,
) -> None:
    """Write snapshots of the same tensors, each after its base and as the difference to it.

    They lie in one folder, as do those `bases` that are not among them. `dtype` is one of
    DELTA_DTYPES. A tensor with NaN or infinity, of another kind than real floating point, or of no
    more bits than `dtype` has, is written as it is; one that is what it is in the base not at all.
    The files appear one after the other in their order, each whole or not at all. Right before,
    when all are on the disk, `check` is called with where the first now lies; it may raise what
    speaks against it. `progress` is told the bytes just read.

    Raises SnapshotError when a file changes meanwhile, UsageError when one exists and may not be
    overwritten, MachineError when the disk fails.
    """
    code = DELTA_DTYPES[dtype]
    outputs = [_Output(each, code) for each in files]
    walk = _Walk(files, bases)
    new = [each.reserve(_changes(walk, each.new)) for each in outputs]
    with opened(new):
        with background_flush(new):
            for name in outputs[-1].names:
                _write_tensor(walk, outputs, name, code, progress)
        walk.check_unchanged()
        written = {each.new.path: each.file.temporary for each in outputs}
        for output in outputs:
            base = output.new.base
            output.finish(written.get(base, base) if base else None)
        check(new[0].temporary)
        for file in new:
            file.commit()


def _changes(walk: _Walk, new: NewFile) -> Callable[[str], bool]:
    """Whether a tensor seems to be another than in the base, by a few of its elements."""
    before = next((each for each in walk.files if each.path == new.base), None)

    def changes(name: str) -> bool:
        info = new.tensors[name]
        if info.elements < AT_ONCE:
            return True
        first = info.elements // 2 // _SAMPLE * _SAMPLE
        count = min(_SAMPLE, info.elements - first)
        data = padded(info.dtype, count)
        new.read(name, first, data)
        if before is None:
            assert new.base is not None
            base = walk.bases[new.base].value(name, first, count, new_buffer)
        else:
            dtype = before.tensors[name].dtype
            base = Value(dtype, padded(dtype, count), None)
            before.read(name, first, base.data)
        return not base.same(info.dtype, data, slice(0, count))

    return changes


def _write_tensor(
    walk: _Walk, outputs: Sequence[_Output], name: str, code: str, progress: Progress | None
) -> None:
    places = {each.new.path: at for at, each in enumerate(outputs)}
    peaks: list[float] = []
    guess: list[How] = []

    def step(at: int, data: Bytes, base: Value | None) -> Value:
        output = outputs[at]
        info = output.new.tensors[name]
        if anew and progress is not None:
            progress(data.size)
        if base is None:
            output.write(name, first, data, info.dtype)
            return Value(info.dtype, _copy(info.dtype, data, count), None)
        same, differs = slice(0, count), name in output.differ
        starts = anew and first == 0
        how: How | None = guess[at]
        if starts:  # as the tensor was stored before, unless there is a usual one
            before = guess[places.get(output.new.base or output.new.path, at)]
            how = before if output.usual is None else output.usual
        if not differs or (starts and base.same(info.dtype, data, same)):
            how = None
        rounded: Rounded | None = None

        def peak_of(how: How | None) -> float:
            nonlocal rounded
            if not differs:
                return 0.0 if base.same(info.dtype, data, same) else 1.0
            if not isinstance(how, int):
                return walk.difference(info, data, base)
            kept = rounded or Rounded(code, how, padded(code, count), walk.buffer(count))
            rounded = kept._replace(exponent=how)
            return walk.difference(info, data, base, rounded)

        peak = peak_of(how)
        peaks[at] = float(np.maximum(peaks[at], peak))
        if starts:
            guess[at] = output.how(name, peak)
            if isinstance(guess[at], int) and guess[at] != how:
                peak_of(guess[at])
        if isinstance(guess[at], int):
            assert rounded is not None
            if not anew or output.how(name, peaks[at]) == guess[at]:  # or it is done again
                output.write(name, first, rounded.stored, code)
            return Value(None, rounded.sums.view(np.uint8), rounded.sums)
        if rounded is not None:
            walk.free(rounded.sums)
        if guess[at] == _SAME:
            return base
        output.write(name, first, data, info.dtype)
        return Value(info.dtype, _copy(info.dtype, data, count), None)

    anew = True
    right: list[How] = []
    while anew or guess != right:
        guess = right or [_SAME] * len(outputs)
        peaks = [0.0] * len(outputs)
        for first, count in walk.pieces(outputs[0].new.tensors[name]):
            walk.go(name, first, count, step)
        right = [each.how(name, peak) for each, peak in zip(outputs, peaks, strict=True)]
        anew = False
    for output, how in zip(outputs, right, strict=True):
        if output.new.base is not None:
            output.end(name, how)


def _copy(dtype: str, data: Bytes, count: int) -> Bytes:
    copy = padded(dtype, count)
    copy[:] = data
    return copy


def check_chain(
    made: Sequence[tuple[NewFile, TensorIndex, ReadElements]],
    bases: Mapping[Path, Base],
    *,
    progress: Progress | None = None,
) -> None:
    """Read files that `write_chain` has made back: raise SnapshotError unless each value is, up to
    the rounding of its own file, that of the snapshot.

    `made` has with each what lies there, and what reads its stored elements; the files that they
    are differences to are `bases`, or among them.
    """
    walk = _Walk([new for new, _, _ in made], bases)

    def step(at: int, data: Bytes, base: Value | None) -> Value:
        new, index, read = made[at]
        if progress is not None:
            progress(data.size)
        info, link = new.tensors[name], links_of(index)[-1]
        there = link.index.tensors.get(name)
        value = base
        if there is None and base is not None:
            # But for the signs of zeros it is what the base is.
            right = base.same(info.dtype, data, slice(0, count)) or (
                info.dtype in FLOATS and walk.difference(info, data, base) == 0
            )
        else:
            assert there is not None
            stored = padded(there.dtype, count)
            read(name, first, stored)
            if base is None or (exponent := link.exponent(name)) is None:
                right = there.dtype == info.dtype and np.array_equal(stored, data)
                value = Value(there.dtype, stored, None)
            else:
                minus, total = base.minus(walk.buffer, count), walk.buffer(count)
                right, rest = True, new_buffer(AT_ONCE)
                for part in parts(count):
                    here, wanted = (
                        elements(there.dtype, stored, part),
                        elements(info.dtype, data, part),
                    )
                    add(there.dtype, here, -(2.0**exponent), minus[part], total[part])
                    off = rest[: part.stop - part.start]
                    add(info.dtype, wanted, 1.0, total[part], off)
                    spacing = DTYPES[there.dtype].spacing(decode(there.dtype, here).astype(float))
                    odd = ~(np.abs(off) <= spacing * 2.0**exponent * (0.5 + 1e-6))
                    if odd.any():  # an infinity that has stayed where it was is no difference
                        values = decode(info.dtype, wanted)[odd]
                        same = np.array_equal(-total[part][odd], values, equal_nan=True)
                        right = right and same and not np.isfinite(values).any()
                value = Value(None, total.view(np.uint8), total)
        if not right:
            problem = f"tensor '{printable(name)}' is not what it was made of"
            raise SnapshotError(str(index.path), problem, "check the disk, and pack it anew")
        assert value is not None
        return value

    for name, info in made[0][0].tensors.items():
        for first, count in walk.pieces(info):
            walk.go(name, first, count, step)
    walk.check_unchanged()
