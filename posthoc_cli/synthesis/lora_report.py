"""What there is to tell of a LoRA's outputs: how far its two averages are apart, and its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posthoc_cli.errors import SnapshotError
from posthoc_cli.snapshots.lora import pairs
from posthoc_cli.snapshots.lora_scale import scales
from posthoc_cli.synthesis.accumulators import Weights
from posthoc_cli.synthesis.plan import TensorPlan
from posthoc_cli.synthesis.products import SIDE, Factors, Products, Ranks, spread, together


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What there is to tell of a LoRA's outputs; by target, which an output that was kept is not.

    `distances` are those of the average of the factors from that of the products, relative to the
    latter in the Frobenius norm, on `measured` of the `modules`; None where ranks or alphas differ.
    With `exact`, `ranks` are the lowest and the highest of each target's modules, and `shared` is
    the one that all must have whose rank is not their own. `in_config`: it stands in peft's
    configuration beside the file. `odd` are modules whose factors are averaged as they are.
    """

    exact: bool
    modules: int
    measured: int
    distances: dict[int, float | None]
    ranks: dict[int, tuple[int, int]]
    shared: dict[int, int | None]
    in_config: bool
    odd: tuple[str, ...]


def report_products(
    plan: TensorPlan | Products, weights: Weights, targets: Sequence[int], found: Ranks | None
) -> LoraReport | None:
    """What there is to tell of the outputs of `targets`; None where there are no factors."""
    if isinstance(plan, Products) and found is not None:
        ranks = dict(zip(targets, found.ranks, strict=True))
        return LoraReport(
            True,
            len(plan.pairs),
            found.measured,
            dict(zip(targets, found.distances, strict=True)),
            {at: (min(each), max(each)) for at, each in ranks.items()},
            {at: plan.shared_rank(each) for at, each in ranks.items()},
            plan.in_config,
            plan.odd,
        )
    assert isinstance(plan, TensorPlan)
    group = {
        name: segment.group
        for segment in plan.segments
        if segment.averaged
        for name in segment.names
    }
    try:
        some = [
            pair
            for pair in pairs(plan.sources[plan.newest].tensors)[0]
            if {*pair.names} <= group.keys() and len({group[name] for name in pair.names}) == 1
        ]
        if not some:
            return None
        chosen = spread(len(some))
        each = [scales(source, [some[at] for at in chosen]) for source in plan.snapshots]
        looked_at = tuple(some[at] for at in chosen)
        own = tuple(group[pair.up] for pair in looked_at)
        each_scale = tuple(zip(*each, strict=True))
        products = Products(plan, looked_at, each_scale, (), "", None, 0, own)
        with Factors.open(products) as factors:
            apart = [
                factors.distances(at, factors.stack(at, SIDE), weights)
                for at in range(len(products.pairs))
            ]
    except SnapshotError:  # of NaN, or a configuration that makes no sense: it stops nothing here
        return None
    distances, measured = together(apart, weights.shape[1])
    by_target = dict(zip(targets, distances, strict=True))
    return LoraReport(False, len(some), measured, by_target, {}, {}, False, ())
