"""Tensors out of strided blocks: any range of them is NumPy's, whatever the blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli.storage import Part, bands, blocks
from posthoc_cli.storage.blocks import Block, Blocks, make_parts, whole
from posthoc_cli.storage.header import ReadAt, spans

Cuts = Sequence[Sequence[int]]


def reader(data: bytes) -> ReadAt:
    def read(offset: int, into: memoryview) -> None:
        assert len(into)
        assert 0 <= offset <= offset + len(into) <= len(data)
        into[:] = data[offset : offset + len(into)]

    return read


def content_of(
    whole: npt.NDArray, cuts: Cuts, orders: Sequence[Sequence[int]], files: int, swapped: int = 0
) -> tuple[Blocks, list[bytes]]:
    """`whole` cut at `cuts` of each dimension, each block laid out in the order of one of `orders`
    in one of `files`, with some bytes before it."""
    bounds = [[0, *cut, size] for cut, size in zip(cuts, whole.shape, strict=True)]
    data = [bytearray() for _ in range(files)]
    made = []
    for number, box in enumerate(itertools.product(*(itertools.pairwise(b) for b in bounds))):
        block = whole[tuple(slice(*ends) for ends in box)]
        order = orders[number % len(orders)]
        laid = block.transpose(order).copy()
        strides = [0] * whole.ndim
        for at, stride in zip(order, laid.strides, strict=True):
            strides[at] = stride // whole.itemsize
        into = data[number % files]
        into += bytes(number % 5)
        first, sizes = tuple(begin for begin, _ in box), block.shape
        made.append(Block(first, sizes, tuple(strides), len(into), number % files))
        into += laid.byteswap().tobytes() if swapped else laid.tobytes()
    made.sort(key=lambda block: block.offset)
    return Blocks(whole.shape, whole.itemsize, tuple(made), swapped), [bytes(d) for d in data]


def read_all(content: Blocks, files: Sequence[bytes], ranges: Sequence[tuple[int, int]]) -> bytes:
    read = content.open([reader(data) for data in files])
    into = bytearray(math.prod(content.shape) * content.itemsize)
    for start, stop in ranges:
        read(start, memoryview(into)[start:stop])
    return bytes(into)


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    dims = draw(st.integers(0, 4))
    shape = [draw(st.integers(1, 9)) for _ in range(dims)]
    cuts = [
        sorted(draw(st.sets(st.integers(1, s - 1), max_size=3)) if s > 1 else []) for s in shape
    ]
    orders = draw(st.lists(st.permutations(range(dims)), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["u1", "u2", "u4", "u8", "V16"]))
    swapped = draw(st.sampled_from([0, np.dtype(kind).itemsize])) if kind != "V16" else 0
    values = np.random.default_rng(0).bytes(math.prod(shape) * np.dtype(kind).itemsize)
    whole = np.frombuffer(values, kind).reshape(shape)
    ends = draw(st.lists(st.integers(0, len(values)), max_size=5))
    return whole, cuts, orders, draw(st.integers(1, 3)), swapped, ends


@given(cases(), st.sampled_from([1, 16, 100, 1 << 20]), st.sampled_from([0, 8, 1 << 14]))
@settings(max_examples=150, deadline=None)
def test_any_range_of_any_blocks(case: tuple, scratch: int, gap: int) -> None:
    whole_, cuts, orders, files, swapped, ends = case
    content, data = content_of(whole_, cuts, orders, files, swapped)
    assert whole(content.shape, content.blocks)
    ranges = list(itertools.pairwise(sorted({0, *ends, whole_.nbytes})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SCRATCH_BYTES", scratch)
        patch.setattr(blocks, "GAP_BYTES", gap)
        assert read_all(content, data, ranges) == whole_.tobytes()
    parts = make_parts(content, 7)
    assert (parts[0].first, sum(part.length for part in parts)) == (7, whole_.nbytes)
    found = bytearray()
    for at, offset, count in spans(parts, 7, whole_.nbytes):
        into = bytearray(count)
        content_ = parts[at].content
        files_ = [reader(one) for one in data]
        (content_.open(files_) if content_ else files_[parts[at].file])(offset, memoryview(into))
        found += into
    assert found == whole_.tobytes()


STORE = np.random.default_rng(0).integers(0, 256, 400_000, dtype=np.uint8)


def views() -> Iterator[tuple[str, npt.NDArray]]:
    base = STORE[64:240_064].view(np.int32)
    yield "no dimensions", base[7:8].reshape(())
    yield "empty", base[:0].reshape(0, 3)
    yield "transposed", base[:50_000].reshape(200, 250).T
    yield "transposed, tall", base[:50_000].reshape(10_000, 5).T
    yield "transposed, wide", base[:50_000].reshape(5, 10_000).T
    yield "channels last", base[:48_000].reshape(10, 20, 30, 8).transpose(0, 3, 1, 2)
    yield "permuted", base[:48_000].reshape(10, 20, 30, 8).transpose(2, 0, 3, 1)
    yield "reversed axes", base[:48_000].reshape(10, 20, 30, 8).T
    yield "expanded", np.broadcast_to(base[:300].reshape(300, 1), (300, 70))
    yield "expanded in front", np.broadcast_to(base[:300], (70, 300))
    yield "one element, expanded", np.broadcast_to(base[5:6], (3, 500))
    yield "every third", base[: 3 * 9000 : 3]
    yield "a column", base.reshape(60, 1000)[:, 17]
    yield "columns", base.reshape(60, 1000)[:, 900:910]
    yield "columns far apart", base.reshape(6, 10_000)[:, ::4999].T
    yield "overlapping", np.lib.stride_tricks.as_strided(base, (900, 50), (8, 4))
    yield "bytes, unaligned", STORE[33:50_033].reshape(100, 500).T
    yield "complex", STORE[64:160_064].view(np.complex64).reshape(100, 200).T
    yield "ones between", base[:6000].reshape(60, 1, 100).transpose(2, 1, 0)


@pytest.mark.parametrize("name", dict(views()))
@pytest.mark.parametrize("scratch", [4096, 1 << 20])
def test_views(name: str, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SCRATCH_BYTES", scratch)
    if scratch == 4096:
        for what, size in (("LEAST_BYTES", 100), ("BAND_BYTES", 9000), ("POOL_BYTES", 20_000)):
            monkeypatch.setattr(bands, what, size)
    array = dict(views())[name]
    offset = array.__array_interface__["data"][0] - STORE.ctypes.data
    strides = tuple(stride // array.itemsize for stride in array.strides)
    block = Block((0,) * array.ndim, array.shape, strides, offset)
    content = Blocks(array.shape, array.itemsize, (block,))
    for step in (array.nbytes + 1, 1000, 37_001):
        ranges = [(at, min(at + step, array.nbytes)) for at in range(0, array.nbytes, step)]
        with ThreadPoolExecutor(2) as pool:
            read = content.open([reader(STORE.tobytes())])
            into = memoryview(bytearray(array.nbytes))
            starts, ends = [at for at, _ in ranges], [into[at:end] for at, end in ranges]
            list(pool.map(read, starts, ends))
        assert into == array.tobytes()


def test_shards_of_the_first_dimension_are_plain_parts() -> None:
    whole_ = np.arange(10 * 6, dtype=np.int16).reshape(10, 6)
    content, _ = content_of(whole_, [[3, 7], []], [(0, 1)], 2)
    assert [part.content for part in make_parts(content, 0)] == [None] * 3
    assert [part.first for part in make_parts(content, 5)] == [5, 41, 89]
    replicas = Blocks(content.shape, 2, content.blocks + content.blocks)
    assert make_parts(replicas, 0) == make_parts(content, 0)
    assert whole(content.shape, replicas.blocks)
    assert not whole(content.shape, content.blocks[:2])
    columns, _ = content_of(whole_, [[], [2]], [(0, 1)], 2)
    assert make_parts(columns, 3) == (Part(3, 120, 0, content=columns),)


def test_a_complex_number_swaps_its_halves() -> None:
    values = np.arange(12, dtype=np.float32).view(np.complex64).reshape(2, 3)
    content = Blocks((2, 3), 8, (Block((0, 0), (2, 3), (3, 1), 0),), 4)
    assert read_all(content, [values.astype(">c8").tobytes()], [(0, 48)]) == values.tobytes()


def test_memory_does_not_grow_with_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0

    def read(offset: int, into: memoryview) -> None:
        nonlocal longest
        longest = max(longest, len(into))

    block = Block((0, 0), (1 << 16, 1 << 16), (1, 1 << 16), 0)
    content = Blocks(block.sizes, 2, (block,))
    content.open([read])(0, memoryview(bytearray(1 << 19)))
    assert 0 < longest <= blocks.SCRATCH_BYTES


def transposed(rows: int, columns: int) -> Blocks:
    return Blocks((rows, columns), 2, (Block((0, 0), (rows, columns), (1, rows), 0),))


def test_what_lies_scattered_is_read_once_for_several_reads() -> None:
    rows, columns, read_bytes = 1024, 2048, 0
    data = np.arange(rows * columns, dtype=np.uint32).astype(np.uint16)

    def read(offset: int, into: memoryview) -> None:
        nonlocal read_bytes
        read_bytes += len(into)
        into[:] = data.view(np.uint8).data[offset : offset + len(into)]

    contents = [transposed(rows, columns).open([read]) for _ in range(3)]
    into = [np.empty(data.size, np.uint16) for _ in contents]
    step = 1 << 19
    for start in range(0, data.nbytes, step):
        for content, one in zip(contents, into, strict=True):
            content(start, memoryview(one.view(np.uint8))[start : start + step])
    expected = np.ascontiguousarray(data.reshape(columns, rows).T)
    assert all(one.tobytes() == expected.tobytes() for one in into)
    assert read_bytes == 3 * data.nbytes


def test_an_error_reaches_every_thread_and_the_next_read() -> None:
    def read(offset: int, into: memoryview) -> None:
        raise OSError("the disk is gone")

    content = transposed(1024, 2048).open([read])
    buffers = [memoryview(bytearray(1 << 19)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(content, at << 19, one) for at, one in enumerate(buffers)]
        assert all(isinstance(task.exception(), OSError) for task in tasks)


def test_bands_take_no_more_than_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "POOL_BYTES", 4 << 20)
    made = [transposed(4096, 1024).open([lambda offset, into: None]) for _ in range(40)]
    for _ in range(3):
        for content in made:
            content(0, memoryview(bytearray(1 << 19)))
    owners = {id(owner): owner for _, owner in bands._pool._made}
    assert 0 < sum(len(band.data) for owner in owners.values() for band in owner) <= 4 << 20
