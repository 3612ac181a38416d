"""A sample of the snapshots' values: how far they are from each other, and how much is rounding.

The elements of all averaged tensors, in the order in which safetensors files have them, are cut
into strata of equal length, and one block is read of each: the same elements of every snapshot, in
every run. They are held for some blocks at a time, and of thousands of snapshots some are read, so
memory grows with neither size nor number. Each file is opened once, and several are read at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import NoValuesError
from posthoc_cli.snapshots.folder import Snapshot
from posthoc_cli.snapshots.pieces import Layout, Piece, choose_pieces
from posthoc_cli.storage import Reader, TensorIndex, TensorInfo, fits_any
from posthoc_cli.storage.deltas import with_bases
from posthoc_cli.storage.dtypes import FloatArray, decode, rounding_variances
from posthoc_cli.storage.ranks import Part, Running, check_there, share
from posthoc_cli.storage.readers import can_open, check_unchanged, reading_ahead
from posthoc_cli.storage.workers import MAX_WORKERS, run_workers

if TYPE_CHECKING:
    from posthoc_cli.solver.trajectory import Trajectory

BLOCKS = 128
"""Places that are read in each snapshot."""

BUNDLES = 16
"""Parts of the sample that are summed by themselves, and by several ranks at once: so that their
number, or that of the snapshots held, makes no difference to the digits."""

VERY_MANY = 128

MEASURED = 192
"""About how many of the snapshots are sampled when thousands are used: enough to see how training
went."""

BLOCK = 2048
"""Elements read at each, half as many of very many snapshots: a disk that is far away takes longer
to begin than to read them."""

_HELD_BYTES = 1 << 25
"""The most that the values of all snapshots held at a time may take, as float64."""

_HUGE = 1e150
"""Values beyond it, whose squares overflow, count as infinite."""


@dataclass(frozen=True, slots=True)
class SampleMoments:
    """Means over the sampled elements; tensors that are the same in all snapshots don't count.

    `differences` [snapshots, snapshots]: squared differences. `rounding` [snapshots]: variance of
    the rounding to the stored dtype, ulp^2 / 12. `squares` [snapshots]: squared values. `values`
    is the number of elements they are taken over, of `sampled`; `broken` how many were left out as
    some snapshot has NaN or infinity there.
    """

    differences: FloatArray
    rounding: FloatArray
    squares: FloatArray
    values: int
    sampled: int
    broken: int


def sample_moments(
    snapshots: Sequence[Snapshot],
    *,
    leave_out: Sequence[str] = (),
    blocks: int = BLOCKS,
    block: int | None = None,
) -> SampleMoments:
    """Measure a consistent set of snapshots on some `blocks * block` of their elements.

    `leave_out` are globs of tensors that won't be averaged, and so shall not count. Raises
    NoValuesError when no sampled element is finite in all snapshots, SnapshotError when a file
    changed since its header was read, MachineError when one can't be read.
    """
    if block is None:
        block = BLOCK if len(snapshots) <= VERY_MANY else BLOCK // 2
    tensors = {
        name: info
        for name, info in snapshots[-1].index.tensors.items()
        if not fits_any(name, leave_out)
    }
    pieces = choose_pieces(tensors, blocks, block)
    held = 8 if not any(each.index.links for each in snapshots) else 24
    most = max(_HELD_BYTES // (held * len(snapshots)), block)
    bundles = [list(each) for each in np.array_split(np.arange(len(pieces)), BUNDLES)]
    indexes = [snapshot.index for snapshot in snapshots]
    sums = _Sums(len(snapshots))
    parts = share(_sum_part, indexes, [[pieces[at] for at in each] for each in bundles], most)
    for _, each in sorted((each for part in parts for each in part), key=lambda each: each[0]):
        sums.add(each)
    sampled = sum(piece.count for piece in pieces)
    if sampled and sums.broken == sampled:
        raise NoValuesError(
            str(snapshots[-1].index.path.parent),
            "every value that was sampled is NaN or infinite in some snapshot",
            "leave out the snapshots taken after training broke, with only= or step=",
        )
    return sums.means(sampled)


class _Sums:
    """Running sums over elements."""

    def __init__(self, snapshots: int) -> None:
        self.products = np.zeros((snapshots, snapshots))
        self.rounding = np.zeros(snapshots)
        self.squares = np.zeros(snapshots)
        self.values = 0
        self.broken = 0

    def add(self, other: _Sums) -> None:
        self.products += other.products
        self.rounding += other.rounding
        self.squares += other.squares
        self.values += other.values
        self.broken += other.broken

    def means(self, sampled: int) -> SampleMoments:
        count = max(self.values, 1)
        own = np.diagonal(self.products)
        differences = np.maximum(own[:, None] + own[None, :] - 2 * self.products, 0.0)
        return SampleMoments(
            differences=differences / count,
            rounding=self.rounding / count,
            squares=self.squares / count,
            values=self.values,
            sampled=sampled,
            broken=self.broken,
        )


def _sum_part(
    part: Part,
    indexes: Sequence[TensorIndex],
    bundles: Sequence[Sequence[Piece]],
    most: int,
) -> Running:
    """The sums over a rank's part of the bundles, with their places, `most` elements at a time."""
    found = []
    check_there(part, indexes)
    own = range(part.size - 1 - part.rank, len(bundles), part.size)  # rank 0 has more to do
    groups = {at: _groups(bundles[at], most) for at in own}
    with _open(indexes) as readers, _ahead(indexes, readers, [*chain(*groups.values())]):
        for at in own:
            sums = _Sums(len(indexes))
            for group in groups[at]:
                _add(sums, indexes, readers, group)
            found.append((at, sums))
        # What lies in a store is asked for by its etag each time.
        check_unchanged([reader for reader in readers.values() if not reader.remote])
    yield from ()  # there is nothing to agree on
    return found


def _groups(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    """`pieces`, some `most` elements at a time."""
    groups: list[list[Piece]] = []
    elements = most
    for piece in pieces:
        if elements + piece.count > most:
            groups.append([])
            elements = 0
        groups[-1].append(piece)
        elements += piece.count
    return groups


_Readers = Mapping[int | Path, Reader]


@contextlib.contextmanager
def _open(wanted: Sequence[TensorIndex]) -> Iterator[_Readers]:
    """The files of the snapshots, by the number of their index or the path of a link."""
    indexes: dict[int | Path, TensorIndex] = {}
    for index in wanted:
        indexes |= {link.index.path: link.index for link in index.links}
        if not index.links:
            indexes[id(index)] = index
    keep_open = can_open(sum(len(index.files) for index in indexes.values()))
    with contextlib.ExitStack() as opened:
        yield {
            key: opened.enter_context(Reader(index, keep_open=keep_open))
            for key, index in indexes.items()
        }


def _ahead(
    indexes: Sequence[TensorIndex], readers: _Readers, groups: Sequence[Sequence[Piece]]
) -> contextlib.AbstractContextManager[None]:
    """Have what will be read of each group, of all snapshots, fetched from a store."""

    def reads() -> Iterator[tuple[int, Reader, int, int]]:
        for step, group in enumerate(groups):
            reading = _Reading(group, readers)
            for opened, layout in dict(chain(*map(reading.layouts, indexes))).items():
                for start, count, _ in layout.ranges:
                    yield step, readers[opened], start, count

    return reading_ahead(list(readers.values()), reads)


def _add(
    sums: _Sums, snapshots: Sequence[TensorIndex], readers: _Readers, pieces: Sequence[Piece]
) -> None:
    """Add the elements of `pieces` to the sums."""
    elements = sum(piece.count for piece in pieces)
    values = np.empty((len(snapshots), elements))
    # Each tensor's part is judged by itself: one that never changes carries no rounding noise, as
    # it comes out of every sum with weights that sum to one as it went in.
    places = np.cumsum([0, *(piece.count for piece in pieces)])
    parts = [
        int(places[at])
        for at, piece in enumerate(pieces)
        if at == 0 or piece.name != pieces[at - 1].name
    ]
    rounding = np.empty((len(snapshots), len(parts)))
    reading = _Reading(pieces, readers)

    def read(row: int, _: object) -> None:
        values[row], variances = reading.values(snapshots[row])
        rounding[row] = np.add.reduceat(variances, parts)

    # Threads wait for the disk, however few processors there are; differences wait for their base.
    alone = any(index.links for index in snapshots)
    run_workers(iter(range(len(snapshots))), read, object, 1 if alone else MAX_WORKERS)

    finite = (np.abs(values) < _HUGE).all(axis=0)
    broken = elements - int(np.count_nonzero(finite))
    if broken:
        values[:, ~finite] = 0.0
    # All that follows is about differences, which may be a millionth of the values.
    reference = values[-1].copy()
    squares = np.einsum("ij,ij->i", values, values)
    constant_squares = reference**2
    values -= reference
    moved = values.any(axis=0)
    varying = np.logical_or.reduceat(moved, parts)
    lengths = np.diff([*parts, elements])
    still = np.repeat(~varying, lengths)
    sums.products += values @ values.T
    sums.rounding += rounding[:, varying].sum(axis=1)
    sums.squares += squares - constant_squares[still].sum()
    sums.values += int(np.count_nonzero(finite & ~still))
    sums.broken += broken


class _Reading:
    """The elements of `pieces` in one snapshot after the other.

    Those stored as differences are added to what their bases came to, so that each file is read
    once.
    """

    def __init__(self, pieces: Sequence[Piece], readers: _Readers) -> None:
        self._pieces, self._readers = pieces, readers
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._known: dict[Path, tuple[FloatArray, FloatArray]] = {}

    def values(self, index: TensorIndex) -> tuple[FloatArray, FloatArray]:
        """[elements]: the values in float64, and the variance of what rounded them last."""
        if not index.links:
            return self._own(id(index), index, index.tensors, index.tensors)[1:]
        root = index.links[0].index.tensors
        for link in index.links:
            path = link.index.path
            if path not in self._known:
                layout, values, variances = self._own(path, link.index, index.tensors, root)
                if link.bases:
                    known = [self._known[path.with_name(base.name)] for base in link.bases]
                    exponents = [link.exponent(piece.name) for piece in layout.pieces]
                    counts = [piece.count for piece in layout.pieces]
                    whole = np.repeat([each is None for each in exponents], counts)
                    scales = np.repeat([2.0 ** (each or 0) for each in exponents], counts)
                    at = layout.elements
                    before = [
                        (base.coefficient, each[at])
                        for base, (each, _) in zip(link.bases, known, strict=True)
                    ]
                    values = np.where(whole, values, with_bases(values * scales, before))
                    variances = variances * scales**2
                    values, variances = (
                        _replaced(old, at, new)
                        for old, new in zip(known[0], (values, variances), strict=True)
                    )
                self._known[path] = values, variances
        return self._known[index.links[-1].index.path]

    def layouts(self, index: TensorIndex) -> Iterator[tuple[int | Path, Layout]]:
        """Where the pieces lie in each file that `values` reads, by what it is opened as."""
        if not index.links:
            yield id(index), self._layout(index, index.tensors, index.tensors)
        for link in index.links:
            root = index.links[0].index.tensors
            yield link.index.path, self._layout(link.index, index.tensors, root)

    def _layout(
        self,
        index: TensorIndex,
        tensors: Mapping[str, TensorInfo],
        root: Mapping[str, TensorInfo],
    ) -> Layout:
        """Where the pieces lie in a file, whose names are those of `tensors`."""
        key = id(index.tensors), id(tensors)
        if key not in self._layouts:
            own = dict(zip(tensors, root, strict=True)) if tensors is not root else {}
            self._layouts[key] = Layout.of(self._pieces, index.tensors, own)
        return self._layouts[key]

    def _own(
        self,
        opened: int | Path,
        index: TensorIndex,
        tensors: Mapping[str, TensorInfo],
        root: Mapping[str, TensorInfo],
    ) -> tuple[Layout, FloatArray, FloatArray]:
        """What one file has of the pieces, whose names are those of `tensors`."""
        layout = self._layout(index, tensors, root)
        values, variances = np.empty((2, len(layout.elements)))
        raw = layout.read(self._readers[opened])
        for dtype, first, last, start, end in layout.runs:
            data = raw[start:end]
            with np.errstate(invalid="ignore"):  # a signalling NaN, which is counted later
                values[first:last] = decode(dtype, data)
            variances[first:last] = rounding_variances(dtype, data)
        return layout, values, variances


def _replaced(old: FloatArray, at: npt.NDArray[np.intp], new: FloatArray) -> FloatArray:
    copied: FloatArray = old.copy()
    copied[at] = new
    return copied


class Sample(NamedTuple):
    """What was measured of `snapshots`, and the trajectory that was fitted to it.

    Of very many snapshots they are some, but the trajectory's `noise` is that of each.
    """

    moments: SampleMoments
    trajectory: Trajectory
    snapshots: Sequence[Snapshot]


def fit_snapshots(snapshots: Sequence[Snapshot], leave_out: Sequence[str] = ()) -> Sample:
    """Measure a sample of the snapshots' values, and fit how the network moved.

    Of very many, some are measured, and the sample is of those. `leave_out` are globs of tensors
    that won't be averaged. Raises what `sample_moments` does.
    """
    from posthoc_cli.solver.chains import MANY
    from posthoc_cli.solver.choice import choose
    from posthoc_cli.solver.fitting import fit_trajectory

    steps = [float(snapshot.step) for snapshot in snapshots]
    chosen: Sequence[int] = range(len(snapshots))
    if len(snapshots) > MANY:  # those at both ends: where training began, it moved most
        backwards = choose([-step for step in steps], MEASURED // 2)
        chosen = sorted({*choose(steps, MEASURED // 2), *backwards})
    measured = [snapshots[at] for at in chosen]
    moments = sample_moments(measured, leave_out=leave_out)
    profiles = [snapshot.profile for snapshot in measured]
    fitted = fit_trajectory(profiles, moments.differences, moments.rounding, moments.squares)
    if len(measured) < len(snapshots):  # the others' rounding is like their neighbours'
        known, place = np.unique([steps[at] for at in chosen], return_inverse=True)
        noise = np.bincount(place, moments.rounding) / np.bincount(place)
        fitted = replace(fitted, noise=np.interp(steps, known, noise))
    return Sample(moments, fitted, measured)
