"""Snapshots stored as differences, as the files that they are sums of.

All that is done with snapshots is linear: weights of snapshots become weights of files, tensor by
tensor, and each file is read once, however many snapshots it is a term of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from posthoc_cli.storage import TensorIndex, TensorInfo
from posthoc_cli.storage.deltas import links_of, terms
from posthoc_cli.storage.dtypes import FloatArray
from posthoc_cli.storage.header import Link


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """The sources that a tensor is a sum of, as `plan.Segment` has them, and its group."""

    group: int
    sources: Sequence[int]
    weights: FloatArray | None = None
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
    links: list[Link] = []
    places: dict[Path, int] = {}
    chains: list[list[int]] = []
    names: list[Mapping[str, str]] = []  # the snapshots' own of tensors
    olds: list[Mapping[str, str]] = []  # and those of the sources
    renamed: dict[tuple[int, int], Mapping[str, TensorInfo]] = {}
    for snapshot in snapshots:
        chains.append([])
        every = links_of(snapshot)
        root = every[0].index.tensors
        own = {} if snapshot.tensors is root else dict(zip(root, snapshot.tensors, strict=True))
        names.append({new: old for old, new in own.items()})
        for link in every:
            index = link.index
            path = index.files[0].path
            if path not in places:
                places[path] = len(sources)
                if own:
                    key = id(index.tensors), id(snapshot.tensors)
                    if key not in renamed:
                        renamed[key] = {own[old]: info for old, info in index.tensors.items()}
                    index = replace(index, tensors=renamed[key])
                sources.append(index)
                links.append(link)
                olds.append(names[-1])
            chains[-1].append(places[path])
    last = snapshots[newest]
    if last.links:
        sources.append(last)
    place = len(sources) - 1 if last.links else chains[newest][0]
    found = {}
    shared: dict[object, Terms | None] = {}
    weights: dict[object, FloatArray] = {}
    for name, group in averaged.items():
        stored = tuple(
            source.tensors[name].dtype if name in source.tensors else None
            for source in sources[: len(links)]
        )
        exponents = tuple(
            link.exponent(old.get(name, name)) if there else None
            for link, old, there in zip(links, olds, stored, strict=True)
        )
        which = group, stored, exponents
        if which not in shared:
            pattern = stored, tuple(each is None for each in exponents)
            if pattern not in weights:
                weights[pattern] = _weights(
                    snapshots, chains, [own.get(name, name) for own in names]
                )
            shared[which] = _terms(group, weights[pattern], stored, exponents)
        made = shared[which]
        if made is not None:
            found[name] = made
    return sources, place, found


def _weights(
    snapshots: Sequence[TensorIndex],
    chains: Sequence[Sequence[int]],
    names: Sequence[str],
) -> FloatArray:
    """The weights of a tensor's files in the snapshots, [snapshots, files], without the scales."""
    weights = np.zeros((len(snapshots), max(map(max, chains)) + 1))
    for row, snapshot, chain, name in zip(weights, snapshots, chains, names, strict=True):
        for at, weight in terms(links_of(snapshot), name).items():
            row[chain[at]] = weight
    return weights


def _terms(
    group: int,
    weights: FloatArray,
    stored: Sequence[str | None],
    exponents: Sequence[int | None],
) -> Terms | None:
    """The files of a tensor and their `weights`; None where it is one sum of several in all."""
    used = np.flatnonzero(weights.any(axis=0)).tolist()
    whole = bool((np.count_nonzero(weights, axis=1) == 1).all())
    if not whole and (weights == weights[0]).all():
        return None
    order = sorted(used, key=lambda at: (stored[at], at))
    kept = () if whole else tuple(exponents[at] or 0 for at in order)
    return Terms(group, tuple(order), weights[:, order], kept)
