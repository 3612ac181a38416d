"""Objects of a bucket appear whole or not at all, whatever the network does."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from posthoc_cli.errors import LEFT_BEHIND, MachineError, PosthocError, UsageError
from posthoc_cli.storage.outputs import Group
from posthoc_cli.storage.places import place
from posthoc_cli.storage.remote import uploads
from posthoc_cli.storage.remote.uploads import ObjectFile
from posthoc_cli.storage.writing import commit_together
from tests.servers.base import Request
from tests.servers.buckets import PART, Buckets
from tests.servers.faults import Fault, Proxy

pytest.importorskip("obstore")

DATA = random.Random(0).randbytes(7 * PART + 3)


def url(name: str = "out", scheme: str = "s3") -> Path:
    return place(f"{scheme}://bucket/{name}")


def write(file: ObjectFile, data: bytes, *, chunk: int = 1 << 15, shuffled: bool = False) -> None:
    """Write `data` by four threads, each taking the next chunk."""
    offsets = list(range(0, len(data), chunk))
    if shuffled:
        random.Random(1).shuffle(offsets)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda at: file.write_at(at, data[at : at + chunk]), offsets))


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize("size", [0, 100, PART, PART + 1, len(DATA)])
def test_sizes(server: Buckets, proxy: Proxy, scheme: str, size: int) -> None:
    with ObjectFile(url(scheme=scheme), size) as file:
        write(file, DATA[:size])
        assert server.keys("bucket") == []
    assert server.get("bucket", "out") == DATA[:size]
    assert not server.uploads
    assert not server.blocks


def test_any_order(server: Buckets, proxy: Proxy) -> None:
    with ObjectFile(url(), len(DATA), in_order=False) as file:
        assert not file.in_order
        file.write_at(0, bytes(1000))
        write(file, DATA, shuffled=True)
    assert server.get("bucket", "out") == DATA


def test_far_ahead(server: Buckets, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that waits for those before it doesn't wait for ever."""
    monkeypatch.setattr(uploads, "LONGEST_LEAD", 0.01)
    with ObjectFile(url(), len(DATA)) as file:
        for offset in reversed(range(0, len(DATA), 1 << 16)):
            file.write_at(offset, DATA[offset : offset + (1 << 16)])
    assert server.get("bucket", "out") == DATA


@pytest.mark.parametrize("size", [100, len(DATA)])
def test_what_is_there_stays(server: Buckets, proxy: Proxy, size: int) -> None:
    server.put("bucket", "out", b"old")
    with pytest.raises(UsageError, match="exists"), ObjectFile(url(), size):
        raise AssertionError
    with ObjectFile(url(), size, overwrite=True) as file:
        write(file, DATA[:size])
    assert server.get("bucket", "out") == DATA[:size]
    server.buckets["bucket"].clear()
    with pytest.raises(UsageError, match="exists"), ObjectFile(url(), size) as file:
        write(file, DATA[:size])
        server.put("bucket", "out", b"newer")  # another run was faster
    assert server.get("bucket", "out") == b"newer"
    assert not server.uploads


def test_a_condition_is_the_stores_business(server: Buckets, proxy: Proxy) -> None:
    """Between the look and the request another object may appear: of one request the store sees."""
    with pytest.raises(UsageError, match="exists"), ObjectFile(url(), 100) as file:
        write(file, DATA[:100])
        server.put("bucket", "out", b"newer")
        proxy.add(Fault(method="HEAD", status=404))
    assert server.get("bucket", "out") == b"newer"


@pytest.mark.parametrize("size", [100, len(DATA)])
def test_a_store_without_conditions(
    server: Buckets, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """It overlooks them, or knows that it has none: then what is there is only looked at."""

    def deny(request: Request) -> tuple[int, str] | None:
        return (501, "NotImplemented") if "if-none-match" in request.headers else None

    for attribute, value in (("conditions", False), ("deny", deny)):
        server.buckets["bucket"].clear()
        with monkeypatch.context() as patch:
            patch.setattr(server, attribute, value)
            with ObjectFile(url(), size) as file:
                write(file, DATA[:size])
            assert server.get("bucket", "out") == DATA[:size]
            with pytest.raises(UsageError, match="exists"), ObjectFile(url(), size):
                raise AssertionError
            with pytest.raises(UsageError, match="exists"), ObjectFile(url("new"), size) as file:
                write(file, DATA[:size])
                server.put("bucket", "new", b"newer")
            assert server.get("bucket", "new") == b"newer"


CONFLICT = b"<Error><Code>ConditionalRequestConflict</Code></Error>"


def test_two_at_the_same_moment(server: Buckets, proxy: Proxy) -> None:
    proxy.add(Fault(method="PUT", status=409, body=CONFLICT))
    with ObjectFile(url(), 100) as file:
        write(file, DATA[:100])
    assert server.get("bucket", "out") == DATA[:100]
    server.buckets["bucket"].clear()
    both = [ObjectFile(url(), 100), ObjectFile(url(), len(DATA))]
    for file in both:
        file.open()
        write(file, DATA[: file.size])
        file.finish()
    both[0].commit()
    with pytest.raises(UsageError, match="exists"):
        both[1].commit()
    for file in both:
        file.discard()
    assert server.get("bucket", "out") == DATA[:100]
    assert not server.uploads


INTERNAL = b'<?xml version="1.0"?>\n  \n<Error><Code>InternalError</Code></Error>'
PASSING = [
    Fault(method="POST", path="uploadId", status=200, body=INTERNAL),
    Fault(method="POST", path="uploads", after=0),
    Fault(method="POST", path="uploads", status=503),
    Fault(method="PUT", status=500, count=3),
    Fault(method="PUT", upload=10_000),
    Fault(method="PUT", lost=True),
    Fault(method="POST", path="uploadId", status=503),
    Fault(method="POST", path="uploadId", lost=True),
]


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_a_fault_passes(server: Buckets, proxy: Proxy, fault: Fault) -> None:
    proxy.add(Fault(**vars(fault)))
    with ObjectFile(url(), len(DATA)) as file:
        write(file, DATA)
    assert server.get("bucket", "out") == DATA
    assert not any(upload.parts for upload in server.uploads.values())


def test_the_answer_of_one_request_is_lost(server: Buckets, proxy: Proxy) -> None:
    proxy.add(Fault(method="PUT", lost=True))
    with ObjectFile(url(), 100) as file:
        write(file, DATA[:100])
    assert server.get("bucket", "out") == DATA[:100]


LASTING = [
    Fault(method="POST", path="uploads", status=403, count=-1),
    Fault(method="PUT", path="partNumber=1&", status=403, count=-1),
    Fault(method="PUT", path="partNumber=7", status=403, count=-1),
    Fault(method="PUT", path="partNumber=8", status=403, count=-1),  # of the few bytes at the end
    Fault(method="POST", path="uploadId", status=403, count=-1),
    Fault(method="POST", path="uploadId", status=200, body=b"<html/>", count=-1),
    Fault(method="PUT", path="partNumber=2&", status=400, body=INTERNAL, count=-1),
]


@pytest.mark.parametrize("fault", LASTING, ids=str)
def test_a_fault_lasts(server: Buckets, proxy: Proxy, fault: Fault) -> None:
    proxy.add(Fault(**vars(fault)))
    with (
        pytest.raises(MachineError, match="s3://bucket/out: "),
        ObjectFile(url(), len(DATA)) as file,
    ):
        write(file, DATA)
    assert server.keys("bucket") == []
    assert not server.uploads


def test_an_exception_aborts(server: Buckets, proxy: Proxy) -> None:
    with pytest.raises(KeyboardInterrupt), ObjectFile(url(), len(DATA)) as file:
        write(file, DATA[: 5 * PART])
        while not server.uploads:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert not server.uploads
    assert server.keys("bucket") == []


# Several together


def together(files: Sequence[ObjectFile], data: Sequence[bytes]) -> None:
    with commit_together([Group([file]) for file in files]):
        for file, each in zip(files, data, strict=True):
            write(file, each)


@pytest.mark.parametrize("sizes", [(100, len(DATA), 50), (len(DATA), PART, len(DATA) - 5)])
def test_all_appear_or_none(server: Buckets, proxy: Proxy, sizes: tuple[int, ...]) -> None:
    names = ["a", "b", "c"]
    data = [DATA[:size] for size in sizes]

    def files() -> list[ObjectFile]:
        return [ObjectFile(url(name), size) for name, size in zip(names, sizes, strict=True)]

    # The second part of the second, the completion of the last.
    for fault in (
        Fault(method="PUT", path="/b?partNumber=1&" if sizes[0] == 100 else "/a?part", status=403),
        Fault(
            method="POST" if sizes[2] > 100 else "PUT", path="/c", status=403, skip=sizes[2] > 100
        ),
    ):
        proxy.add(fault)
        with pytest.raises(MachineError):
            together(files(), data)
        assert fault.count == 0
        assert server.keys("bucket") == []
        assert not server.uploads
    together(files(), data)
    assert [server.get("bucket", name) for name in names] == data


@pytest.mark.parametrize("size", [100, len(DATA)])
def test_what_another_has_put_there_stays(
    server: Buckets, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Right after the upload, or before a later one of the same call fails."""
    complete = ObjectFile._complete

    async def overtaken(file: ObjectFile, *given: bool, **more: bool) -> None:
        await complete(file, *given, **more)
        server.put("bucket", "out", b"newer")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectFile, "_complete", overtaken)
        with pytest.raises(MachineError, match="has 5 bytes, and"), ObjectFile(url(), size) as file:
            write(file, DATA[:size])
    assert server.get("bucket", "out") == b"newer"
    first, second = ObjectFile(url("a"), size), ObjectFile(url("b"), size)
    with pytest.raises(UsageError, match="b: exists"), commit_together([Group([first, second])]):
        for file in (first, second):
            write(file, DATA[:size])
        place = second.place

        def late(*, overwrite: bool) -> None:
            server.put("bucket", "a", b"newer")
            server.put("bucket", "b", b"newer")
            place(overwrite=overwrite)

        monkeypatch.setattr(second, "place", late)
    assert server.get("bucket", "a") == server.get("bucket", "b") == b"newer"


def test_what_could_not_be_undone_is_told(server: Buckets, proxy: Proxy) -> None:
    server.put("bucket", "a", b"old")
    files = [ObjectFile(url(name), 100, overwrite=True) for name in ("a", "b", "c")]
    proxy.add(
        Fault(method="PUT", path="/c", status=403), Fault(method="POST", status=403, count=-1)
    )
    with pytest.raises(PosthocError) as found:
        together(files, [DATA[:100]] * 3)
    assert "s3://bucket/b couldn't be removed again" in str(found.value)
    assert "s3://bucket/a was replaced already" in str(found.value)
    proxy.clear()
    proxy.add(Fault(method="DELETE", status=403, count=-1))
    with pytest.raises(KeyboardInterrupt):
        file = ObjectFile(url("d"), len(DATA))
        with commit_together([Group([file])]):
            write(file, DATA[: 5 * PART])
            raise KeyboardInterrupt
    assert "parts of s3://bucket/d may be left" in LEFT_BEHIND.pop()
