"""The average of a LoRA's products, as factors again.

A module of a LoRA changes a layer by `scale * up @ down`, and the average of that over snapshots,

    P = sum over i of w_i s_i U_i D_i,

is not the product of the averages of U and D. With all U_i side by side, U = Q_u R_u, and all D_i
one above the other, D^T = Q_d R_d (QR), P = Q_u C Q_d^T, where the small core is
C = R_u diag(w_i s_i) R_d^T. The singular values of C are those of P: the largest of them, with
their vectors, are the factors of the best approximation of that rank. The full matrix is never
made, and one module at a time is in memory: its factors of all snapshots, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posthoc_cli.errors import SnapshotError, UsageError, either, printable
from posthoc_cli.snapshots import Snapshot
from posthoc_cli.snapshots.lora import Pair, pairs
from posthoc_cli.snapshots.lora_scale import PEFT, Scale, scales
from posthoc_cli.storage import Reader, TensorIndex, TensorInfo, fits_any
from posthoc_cli.storage.dtypes import DTYPES, FLOAT8, FLOATS, FloatArray, decode
from posthoc_cli.storage.readers import can_open
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.plan import (
    Groups,
    TensorPlan,
    common_group,
    make_plan,
    newest_of,
    output_dtype,
)

TOLERANCE = 1e-3
"""The part of a product's largest singular value below which the others are left out."""

MODES = ("factors", "exact")

_HUGE = 1e150
"""Numbers beyond it, whose products overflow, count as infinite."""

SIDE = 128
"""Rows and columns of a product that are enough to see how far two averages are apart."""


@dataclass(frozen=True, slots=True)
class Products:
    """Which products make an output, whatever the weights.

    `plan` has all other tensors. `scales` [pairs][sources] are those of the snapshots, `written`
    [pairs] that of the outputs: the newest snapshot's, its alpha as it is written. Singular values
    above `tolerance` times the largest are kept, `most` at most. `odd` are the modules whose
    factors are averaged as they are. `groups` [pairs] says which weights are theirs.
    """

    plan: TensorPlan
    pairs: tuple[Pair, ...]
    scales: tuple[tuple[Scale, ...], ...]
    written: tuple[Scale, ...]
    dtype: str
    most: int | None
    tolerance: float
    groups: tuple[int, ...]
    odd: tuple[str, ...] = ()

    @property
    def bytes_to_read(self) -> int:
        """Bytes that will be read from all sources together: factors twice, first for the ranks."""
        return self.plan.bytes_to_read + 2 * sum(map(self.bytes_of, self.pairs))

    def bytes_of(self, pair: Pair) -> int:
        """Bytes that the factors of a module have in all sources."""
        infos = (each.tensors[name] for each in self.plan.snapshots for name in pair.names)
        return sum(info.end - info.start for info in infos)

    @property
    def in_config(self) -> bool:
        """Whether the rank stands in peft's configuration, beside the file."""
        return any(not pair.own_rank and pair.module.startswith(PEFT) for pair in self.pairs)

    def tensors(self, ranks: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of an output whose pairs have these ranks."""
        source = self.plan.sources[self.plan.newest].tensors
        shapes = dict(self.plan.tensors)
        for pair, rank in zip(self.pairs, ranks, strict=True):
            up, down = source[pair.up].shape, source[pair.down].shape
            for name, shape in zip(
                pair.names, ((up[0], rank, *up[2:]), (rank, *down[1:]), up[:1]), strict=False
            ):
                shapes[name] = output_dtype(source[name], self.dtype), shape
        return {name: shapes[name] for name in source if name in shapes}

    def shared_rank(self, ranks: Sequence[int]) -> int | None:
        """The rank that all modules have whose rank is not their own; None without such."""
        shared = [rank for pair, rank in zip(self.pairs, ranks, strict=True) if not pair.own_rank]
        return max(shared, default=None)


def check_mode(lora: str, rank: int | None, tolerance: float) -> bool:
    """Whether products are to be averaged; raises UsageError for what doesn't fit together."""
    if lora not in MODES:
        raise UsageError("lora=", f"'{lora}' is not known", f"choose {either(MODES)}")
    if lora == "factors":
        for argument, given in (
            ("lora_rank=", rank is not None),
            ("lora_tolerance=", tolerance != TOLERANCE),
        ):
            if given:
                raise UsageError(argument, "is for lora='exact' alone", "give both or neither")
    if rank is not None and rank < 1:
        raise UsageError("lora_rank=", f"{rank} is out of bounds", "give 1 or more")
    if not 0 <= tolerance < 1:
        raise UsageError("lora_tolerance=", f"{tolerance:g} is out of bounds", "give, say, 0.001")
    return lora == "exact"


def plan_outputs(
    snapshots: Sequence[Snapshot],
    *,
    lora: str = "factors",
    lora_rank: int | None = None,
    lora_tolerance: float = TOLERANCE,
    **made: Any,
) -> TensorPlan | Products:
    """The plan of the outputs of `snapshots`, with products by `lora` "exact".

    `made` are the options of `make_plan`. Raises what that, `check_mode` and `make_products` do.
    """
    exact = check_mode(lora, lora_rank, lora_tolerance)
    newest = newest_of([snapshot.step for snapshot in snapshots])
    sources = [snapshot.index for snapshot in snapshots]
    if exact:
        return make_products(sources, newest, most=lora_rank, tolerance=lora_tolerance, **made)
    return make_plan(sources, newest, **made)


def make_products(
    sources: Sequence[TensorIndex],
    newest: int,
    *,
    dtype: str = "same",
    copy: Sequence[str] = (),
    drop: Sequence[str] = (),
    most: int | None = None,
    tolerance: float = TOLERANCE,
    groups: Groups = (),
) -> Products:
    """Plan the outputs of a consistent set of LoRAs, of which `newest` is the last.

    `most` is the highest rank of a module. Pairs of which `copy` or `drop` fits a factor are none.
    Raises UsageError where there is no pair or one is of two `groups`, SnapshotError where the
    scales of the factors make no sense, and what `make_plan` does.
    """
    tensors = sources[newest].tensors
    found, odd = pairs(tensors)
    found = [
        replace(pair, bias=None) if pair.bias and fits_any(pair.bias, drop) else pair
        for pair in found
    ]
    kept = [pair for pair in found if not all(fits_any(each, drop) for each in pair.names)]
    globs = (*copy, *drop)
    chosen = [pair for pair in kept if not any(fits_any(each, globs) for each in pair.names)]
    if not chosen:
        problem = "the snapshots hold no pairs of LoRA factors"
        raise UsageError("lora='exact'", problem, "leave it out: they are averaged as they are")
    if any(not pair.own_rank for pair in chosen):
        alone = [*odd, *(pair.module for pair in kept if pair not in chosen)]
        if alone := [each for each in alone if not fits_any(each, drop)]:
            raise SnapshotError(
                f"module {printable(alone[0])}",
                "its factors keep their rank, and the configuration has one for all",
                "average the factors, without lora='exact'",
            )
    own = [group for pair in chosen if (group := common_group(pair.names, groups)) is not None]
    if len(own) < len(chosen):
        problem = "one product of LoRA factors can't have two targets"
        raise UsageError("target_for=", problem, "name whole modules, or leave out lora='exact'")
    each = [scales(source, chosen) for source in sources]
    return Products(
        make_plan(
            sources,
            newest,
            dtype=dtype,
            copy=copy,
            drop=drop,
            without={name for pair in chosen for name in pair.names},
            kept={pair.alpha for pair in chosen if pair.alpha is not None},
            groups=groups,
        ),
        tuple(chosen),
        tuple(zip(*each, strict=True)),
        tuple(
            Scale()  # as without an alpha
            if pair.alpha and fits_any(pair.alpha, drop)
            else _as_written(scale, tensors[pair.alpha] if pair.alpha else None, dtype)
            for pair, scale in zip(chosen, each[newest], strict=True)
        ),
        dtype,
        most,
        tolerance,
        tuple(own),
        tuple(odd),
    )


def _as_written(scale: Scale, alpha: TensorInfo | None, dtype: str) -> Scale:
    """A scale whose alpha is a tensor that is rounded to the dtype of the output."""
    if alpha is None or alpha.dtype not in FLOATS:
        return scale
    code = output_dtype(alpha, dtype)
    data = rounded("alpha", np.array([scale.alpha]), code)
    return Scale(float(decode(code, data)[0]), scale.by_root)


# One module


@dataclass(frozen=True, slots=True)
class Stack:
    """The factors of one module in all sources: `ups` [out, columns], `downs` [in, columns].

    `owners` [columns] is the source of each column, `scaled` [columns] the scale of its product;
    `bias` [sources, out], scaled, where there is one.
    """

    ups: FloatArray
    downs: FloatArray
    owners: np.ndarray[Any, np.dtype[np.intp]]
    scaled: FloatArray
    bias: FloatArray | None


class Factors:
    """The factors of some products, read module by module in a `with` block of `open`."""

    def __init__(self, products: Products, readers: Sequence[Reader]) -> None:
        self.products = products
        self._readers = readers

    @classmethod
    @contextmanager
    def open(cls, products: Products) -> Iterator[Factors]:
        sources = products.plan.snapshots
        # The engine, and the outputs, have as many files open again.
        keep_open = can_open(3 * sum(len(source.files) for source in sources))
        with ExitStack() as stack:
            readers = [
                stack.enter_context(Reader(source, keep_open=keep_open)) for source in sources
            ]
            yield cls(products, readers)
            for reader in readers:
                reader.check_unchanged()

    def stack(self, at: int, side: int | None = None) -> Stack:
        """The factors of the pair `at`, or up to `side` rows and columns of their product, spread
        evenly; raises SnapshotError for one that is not finite."""
        pair, scale = self.products.pairs[at], self.products.scales[at]
        ups, downs, biases = [], [], []
        for source, reader in enumerate(self._readers):
            index = self.products.plan.snapshots[source]
            up, down, *bias = (read_matrix(reader, index, name) for name in pair.names)
            ups.append(_thinned(up, side))
            downs.append(_thinned(down.T, side))
            if bias:
                biases.append(bias[0][:, 0] * scale[source].at(up.shape[1]))
        ranks = [up.shape[1] for up in ups]
        return Stack(
            np.concatenate(ups, axis=1),
            np.concatenate(downs, axis=1),
            np.repeat(np.arange(len(ranks)), ranks),
            np.repeat([one.at(rank) for one, rank in zip(scale, ranks, strict=True)], ranks),
            np.array(biases) if biases else None,
        )

    def scale_out(self, at: int, rank: int) -> float:
        """The scale that the pair `at` has in an output, if its rank is `rank` there."""
        return self.products.written[at].at(rank)

    def ranks(self, at: int, stack: Stack, weights: Weights) -> list[int]:
        """The rank that holds each target's product; `weights` is [groups, targets, sources]."""
        left, right = triangle(stack.ups), triangle(stack.downs)
        found = []
        for each in weights[self.products.groups[at]]:
            core = _core(stack, left, right, each)
            values: Any = np.linalg.svd(core, full_matrices=False, compute_uv=False)
            kept = int(np.count_nonzero(values > self.products.tolerance * values[0]))
            found.append(max(min(kept, self.products.most or kept), 1))
        return found

    def factors(
        self, at: int, stack: Stack, weights: Weights, ranks: Sequence[int]
    ) -> Iterator[list[FloatArray]]:
        """For each target the `up`, `down` and bias that an output of that rank has, in float64.

        A rank above the product's own is filled with zeros. Both factors are equally large.
        """
        (first, left), (last, right) = (np.linalg.qr(each) for each in (stack.ups, stack.downs))
        for each, rank in zip(weights[self.products.groups[at]], ranks, strict=True):
            scale = self.scale_out(at, rank)
            core = _core(stack, left, right, each)
            ours, values, theirs = np.linalg.svd(core, full_matrices=False)
            kept = min(rank, len(values))
            size = np.sqrt(values[:kept] / abs(scale))
            up = np.zeros((len(first), rank))
            down = np.zeros((rank, len(last)))
            up[:, :kept] = first @ ours[:, :kept] * size
            down[:kept] = size[:, None] * (theirs[:kept] @ last.T)
            # A pair of vectors has two signs: the largest element of `up` is above zero.
            signs = np.sign(up[np.abs(up).argmax(axis=0), np.arange(rank)])
            up *= signs
            down *= signs[:, None] * math.copysign(1.0, scale)
            bias = [] if stack.bias is None else [(each @ stack.bias)[:, None] / scale]
            yield [up, down, *bias]

    def distances(self, at: int, stack: Stack, weights: Weights) -> list[float] | None:
        """How far the product of the averaged factors is from each target's average of products.

        Relative to the latter, by the Frobenius norm, on up to SIDE of its rows and columns; None
        where ranks or alphas differ.
        """
        scale = self.products.scales[at]
        ranks = np.bincount(stack.owners)
        if len(set(ranks.tolist())) > 1 or len(set(scale)) > 1:
            return None
        left, right = _thinned(stack.ups, SIDE), _thinned(stack.downs, SIDE)
        found = []
        for each in weights[self.products.groups[at]]:
            exact = _core(stack, left, right, each)
            up, down = (
                (side.reshape(len(side), len(ranks), -1) * each[:, None]).sum(axis=1)
                for side in (left, right)
            )
            apart = np.linalg.norm(up @ down.T * scale[0].at(int(ranks[0])) - exact)
            whole = np.linalg.norm(exact)
            found.append(float(apart / whole) if whole else 0.0)
        return found


def _thinned(rows: FloatArray, most: int | None) -> FloatArray:
    """At most so many of the rows, at even distances."""
    return rows if most is None or len(rows) <= most else rows[:: -(-len(rows) // most)].copy()


def triangle(matrix: FloatArray) -> FloatArray:
    """The R of a matrix's QR."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _core(stack: Stack, left: FloatArray, right: FloatArray, weights: FloatArray) -> FloatArray:
    core: FloatArray = (left * (weights[stack.owners] * stack.scaled)) @ right.T
    return core


def read_matrix(reader: Reader, index: TensorIndex, name: str) -> FloatArray:
    """A factor as a matrix, in float64: all but its first dimension as one."""
    info = index.tensors[name]
    data = np.empty(info.end - info.start, np.uint8)
    reader.read(info.start, data.data)
    with np.errstate(invalid="ignore"):
        values = decode(info.dtype, data).astype(np.float64)
    if not (np.abs(values) < _HUGE).all():
        raise SnapshotError(
            str(index.path),
            f"tensor '{printable(name)}' holds NaN or infinity: its product has no factors",
            "leave out the snapshot with only=, or average the factors, without lora='exact'",
        )
    return values.reshape(info.shape[0], -1)


def rounded(name: str, values: FloatArray, dtype: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of `values` as elements of `dtype`, each the nearest.

    Raises SnapshotError where one is too large.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(all="ignore"):
        if dtype in FLOAT8:
            data = flat.astype(DTYPES[dtype].numpy()).view(np.uint8)
        else:
            from posthoc_cli.synthesis.rounding import round_to  # only here: it compiles

            data = np.empty(flat.size * DTYPES[dtype].bits // 8, np.uint8)
            round_to(data, dtype, flat.view("<u8"), "F64")
        finite = np.isfinite(decode(dtype, data)).all()
    if not finite:
        problem = f"{dtype} holds no number as large as {np.abs(flat).max():.3g}"
        raise SnapshotError(f"tensor '{printable(name)}'", problem, "choose dtype='float32'")
    return data


# All modules

MEASURED = 12
"""Modules that are looked at where it needn't be all."""


def spread(count: int) -> list[int]:
    """MEASURED of `count` places, spread evenly; all of fewer."""
    return sorted({count * k // MEASURED for k in range(MEASURED)}) if count else []


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of all modules [targets][pairs], and how far the averages of the factors would be
    from those of the products [targets], by all modules that can tell."""

    ranks: list[list[int]]
    distances: list[float | None]
    measured: int


def find_ranks(
    products: Products, weights: Weights, count: Callable[[int], None] | None = None
) -> Ranks:
    """The rank of each module in each target's output; `count` is told the bytes just read."""
    ranks: list[list[int]] = [[] for _ in weights[0]]
    apart = []
    with Factors.open(products) as factors:
        for at, pair in enumerate(products.pairs):
            stack = factors.stack(at)
            for own, rank in zip(ranks, factors.ranks(at, stack, weights), strict=True):
                own.append(rank)
            apart.append(factors.distances(at, stack, weights))
            if count is not None:
                count(products.bytes_of(pair))
    for own in ranks:
        if shared := products.shared_rank(own):
            own[:] = [
                rank if pair.own_rank else shared
                for pair, rank in zip(products.pairs, own, strict=True)
            ]
    return Ranks(ranks, *together(apart, len(ranks)))


def together(
    apart: Sequence[Sequence[float] | None], targets: int
) -> tuple[list[float | None], int]:
    """The root of the mean square of each target's distances, and of how many modules it is."""
    known = [each for each in apart if each is not None]
    if not known:
        return [None] * targets, 0
    return [float(each) for each in np.sqrt(np.mean(np.square(known), axis=0))], len(known)
