"""Whether snapshots are of one network, and which of them are not.

Each check gives the file names and messages of those that don't go with the others: where many
agree the few are named, else the newest snapshot, the last one, is right.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

from posthoc_cli.snapshots.kinds import same_kind
from posthoc_cli.snapshots.lora import different_alphas, pairs, without_rank
from posthoc_cli.snapshots.majority import most
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.storage import TensorInfo, fits_any
from posthoc_cli.storage.dtypes import FLOATS


def inconsistencies(
    snapshots: Sequence[Snapshot], settled: Sequence[str] = (), *, products: bool = False
) -> Iterator[tuple[str, str]]:
    """What is wrong with snapshots that are in order: file name and message of each problem.

    Tensors that a glob `settled` fits may be as they like; where the `products` of a LoRA's factors
    are to be averaged, so may their ranks and alphas.
    """
    yield from _same_average(snapshots)
    if not snapshots:
        return
    different = partial(_different_tensors, snapshots, settled, dtypes=False)
    remedy = (
        "leave out with only= what isn't of the same network, or such tensors with drop= (copy= "
        "takes them from the newest)"
    )
    found = list(different(products=products))
    if found and not any(different(products=True)):
        remedy = "of LoRAs of several ranks synthesize averages the products with lora='exact'"
    for snapshot, difference in found:
        yield snapshot.file, f"{difference}; {remedy}"
    if products:  # each product has the alpha of its own snapshot
        known = pairs(snapshots[-1].index.tensors)[0]
        settled = (*settled, *(glob.escape(pair.alpha) for pair in known if pair.alpha))
    for snapshot, difference in different_alphas(snapshots, settled):
        yield (
            snapshot.file,
            f"{difference}; leave out with only= what isn't of the same network",
        )


def different_dtypes(
    snapshots: Sequence[Snapshot], settled: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """A warning if some snapshots are stored in another precision than others."""
    found = list(_different_tensors(snapshots, settled, dtypes=True)) if snapshots else []
    if found:
        (snapshot, difference), more = found[0], len(found) - 1
        also = f" (and in {more} more)" if more else ""
        yield (
            snapshot.file,
            f"{difference}{also}: summed in the widest; outputs have the newest's, unless dtype= "
            "says which",
        )


def _same_average(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, str]]:
    """Two of one step and profile: no weights could tell them apart."""
    for one, other in pairwise(snapshots):
        if one.step != other.step or not same_kind(one.profile, other.profile):
            continue
        if one.profile.raw:
            yield (
                other.file,
                f"has the step ({other.step}) of '{one.file}'; leave out one of the two, "
                f"as with exclude='{other.file}', or say with pattern= which number of the names "
                "it is",
            )
        else:
            yield (
                other.file,
                f"has the step ({other.step}) and profile ({other.profile}) of "
                f"'{one.file}'; leave out one of the two, as with exclude='{other.file}'",
            )


def _different_tensors(
    snapshots: Sequence[Snapshot],
    settled: Sequence[str],
    *,
    dtypes: bool,
    products: bool = False,
) -> Iterator[tuple[Snapshot, str]]:
    """Snapshots whose tensors are not those of most, and the first difference.

    It is one of names, shapes and kinds of dtypes, or with `dtypes` only one of floating dtypes.
    """
    groups: list[list[Snapshot]] = []
    known: dict[int, int] = {}
    for snapshot in snapshots:
        tensors = snapshot.index.tensors
        if id(tensors) not in known:
            alike = (
                at
                for at, group in enumerate(groups)
                if not _difference(tensors, group[0].index.tensors, settled, dtypes, products)
            )
            known[id(tensors)] = at = next(alike, len(groups))
            if at == len(groups):
                groups.append([])
        groups[known[id(tensors)]].append(snapshot)
    if len(groups) < 2:
        return
    place, where = most(groups, snapshots[-1])
    right = groups[place][-1].index.tensors
    said: dict[int, str | None] = {}
    for snapshot in snapshots:
        tensors = snapshot.index.tensors
        if known[id(tensors)] != place:
            if id(tensors) not in said:
                said[id(tensors)] = _difference(tensors, right, settled, dtypes, products)
            yield snapshot, f"{said[id(tensors)]} {where}"


def _difference(
    tensors: Mapping[str, TensorInfo],
    right: Mapping[str, TensorInfo],
    settled: Sequence[str],
    dtypes: bool,
    products: bool,
) -> str | None:
    """The first tensor, by name, in which the two differ: `tensor 'w' is F32 [2] here and ...`."""
    for name in sorted(tensors.keys() | right.keys()):
        here, there = tensors.get(name), right.get(name)
        if here is not None and there is not None:
            floats = here.dtype in FLOATS and there.dtype in FLOATS
            same_kind = floats or here.dtype == there.dtype
            if dtypes:
                same = not floats or here.dtype == there.dtype
            else:
                shapes = here.shape, there.shape
                if products:
                    shapes = without_rank(name, shapes[0]), without_rank(name, shapes[1])
                same = same_kind and shapes[0] == shapes[1]
        else:
            same = dtypes
        if not same and not fits_any(name, settled):
            return f"tensor '{name}' is {_form(here, dtypes)} here and {_form(there, dtypes)}"
    return None


def _form(info: TensorInfo | None, dtypes: bool) -> str:
    if info is None:
        return "missing"
    return info.dtype if dtypes else f"{info.dtype} {list(info.shape)}"
