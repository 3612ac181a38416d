"""Snapshots stored as differences, as the files that they are sums of.

All that is done with snapshots is linear: weights of snapshots become weights of files, tensor by
tensor, and each file is read once, however many snapshots it is a term of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from posthoc_cli.storage import TensorIndex, TensorInfo
from posthoc_cli.storage.deltas import terms


@dataclass(frozen=True, slots=True)
class Terms:
    """The sources that a tensor is a sum of, as `plan.Segment` has them, and its group."""

    group: int
    sources: Sequence[int]
    members: tuple[tuple[int, ...], ...] = ()
    exponents: tuple[int, ...] = ()


def expand(
    snapshots: Sequence[TensorIndex], newest: int, averaged: Mapping[str, int]
) -> tuple[list[TensorIndex], int, dict[str, Terms]]:
    """The files of `snapshots`, the place of the newest, and of what the tensors are sums.

    `averaged` has the group of each tensor. The newest snapshot comes last, as itself, if it is
    none of the files: tensors are copied from it. One that is the same sum of differences in all
    snapshots is copied, and so not among what is returned.
    """
    sources: list[TensorIndex] = []
    places: dict[Path, int] = {}
    chains: list[list[int]] = []
    names: list[Mapping[str, str]] = []
    renamed: dict[tuple[int, int], Mapping[str, TensorInfo]] = {}
    for snapshot in snapshots:
        root = snapshot.links[0].index.tensors if snapshot.links else snapshot.tensors
        own = {} if snapshot.tensors is root else dict(zip(root, snapshot.tensors, strict=True))
        names.append({new: old for old, new in own.items()})
        chains.append([])
        for index in (link.index for link in snapshot.links) if snapshot.links else (snapshot,):
            path = index.files[0].path
            if path not in places:
                places[path] = len(sources)
                if own:
                    key = id(index.tensors), id(snapshot.tensors)
                    if key not in renamed:
                        renamed[key] = {own[old]: info for old, info in index.tensors.items()}
                    index = replace(index, tensors=renamed[key])
                sources.append(index)
            chains[-1].append(places[path])
    last = snapshots[newest]
    if last.links:
        sources.append(last)
    place = len(sources) - 1 if last.links else chains[newest][0]
    found = {}
    shared: dict[Terms, Terms] = {}
    for name, group in averaged.items():
        sums = [
            tuple((chain[at], exponent) for at, exponent in terms(each.links, own.get(name, name)))
            if each.links
            else ((chain[0], 0),)
            for each, chain, own in zip(snapshots, chains, names, strict=True)
        ]
        whole = all(len(each) == 1 for each in sums)
        if not whole and len(set(sums)) == 1:
            continue
        members: dict[tuple[int, int], list[int]] = {}
        for at, each in enumerate(sums):
            for term in each:
                members.setdefault(term, []).append(at)
        order = sorted(members, key=lambda term: (sources[term[0]].tensors[name].dtype, term))
        made = Terms(
            group,
            tuple(at for at, _ in order),
            tuple(tuple(members[term]) for term in order),
            () if whole else tuple(exponent for _, exponent in order),
        )
        found[name] = shared.setdefault(made, made)
    return sources, place, found
