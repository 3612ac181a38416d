"""An output of a LoRA's products held against the products of its snapshots, module by module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posthoc_cli.storage import Reader, TensorIndex
from posthoc_cli.storage.dtypes import DTYPES, FloatArray, decode
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.comparison import ANEW, Compared, Problem
from posthoc_cli.synthesis.products import (
    Factors,
    Products,
    read_matrix,
    rounded,
    spread,
    triangle,
)


def written_ranks(products: Products, out: TensorIndex) -> list[int]:
    """The rank of each pair in the output; 0 where a factor is no matrix."""
    shapes = [out.tensors[pair.up].shape for pair in products.pairs]
    return [shape[1] if len(shape) > 1 else 0 for shape in shapes]


def compare_products(
    products: Products, weights: Weights, out: TensorIndex, *, full: bool
) -> Compared:
    """Compare factors in `out` with those of `weights` [groups, 1, sources]; with `full` all.

    The same libraries on such a machine make the same bytes. Others are right if their product is
    the same up to the rounding of the factors. Raises what Reader does, and SnapshotError for a
    factor that is not finite.
    """
    ranks = written_ranks(products, out)
    chosen = range(len(ranks)) if full else spread(len(ranks))
    compared = differ = 0
    problems, needs = [], {}
    with Factors.open(products) as factors, Reader(out) as there:
        for at in chosen:
            pair, rank, stack = products.pairs[at], ranks[at], factors.stack(at)
            needs[at] = factors.ranks(at, stack, weights)[0]
            wanted = next(factors.factors(at, stack, weights, [rank]))
            found = [read_matrix(there, out, name) for name in pair.names]
            codes = [out.tensors[name].dtype for name in pair.names]
            sizes = sum(each.size for each in found)
            compared += sizes
            as_rounded = (
                decode(code, rounded(name, each, code)).reshape(each.shape)
                for name, each, code in zip(pair.names, wanted, codes, strict=True)
            )
            if not all(map(np.array_equal, found, as_rounded)):
                if _apart(found, wanted) > _rounding(found, codes):
                    what = f"and '{pair.down}' don't make the product that they should"
                    problems.append(Problem(out.path, what, ANEW, pair.up))
                differ += sizes
        there.check_unchanged()
    shared = max((needs[at] for at in chosen if not products.pairs[at].own_rank), default=0)
    for at in chosen:
        pair = products.pairs[at]
        right = needs[at] if pair.own_rank else shared
        # Of a sample, another module may need the rank that all share.
        if ranks[at] != right and (pair.own_rank or full or ranks[at] < right):
            text = f"has the rank {ranks[at]} and should have {right}"
            problems.insert(0, Problem(out.path, text, ANEW, pair.up))
    return Compared(compared, 0 if problems else differ, problems)


def _apart(found: Sequence[FloatArray], wanted: Sequence[FloatArray]) -> float:
    """The Frobenius norm of the difference of two products, and of the biases."""
    left = triangle(np.hstack([found[0], wanted[0]]))
    right = triangle(np.vstack([found[1], -wanted[1]]).T)
    biases = [one - other for one, other in zip(found[2:], wanted[2:], strict=True)]
    return float(np.linalg.norm([np.linalg.norm(each) for each in (left @ right.T, *biases)]))


def _rounding(found: Sequence[FloatArray], codes: Sequence[str]) -> float:
    """What the product, and the bias, may be off by where each element is off by one unit."""
    norm = np.linalg.norm
    units = [norm(DTYPES[code].spacing(each)) for each, code in zip(found, codes, strict=True)]
    least = 1e-12 * norm(found[0]) * norm(found[1])  # of the libraries' own arithmetic
    off = norm(found[0]) * units[1] + norm(found[1]) * units[0] + units[0] * units[1]
    return float(off + least + sum(units[2:]))
