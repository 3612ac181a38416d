"""The buckets of the tests answer as those of moto do, and faults come as they are asked for.

That plain servers and the hub answer their clients, `cli/test_remote.py` shows.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from tests.servers import buckets, faults, s3

obstore = pytest.importorskip("obstore")
from obstore import store as stores  # noqa: E402

PART = 5 << 20
SOON = {
    "backoff": {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(seconds=0.1)},
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=10),
}


@pytest.fixture(scope="module")
def server() -> Iterator[buckets.Buckets]:
    with buckets.Buckets("bucket", page=3) as server:
        yield server


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with s3.moto("bucket") as url:
        yield url


@pytest.fixture(params=["s3", "gcs", "azure", "moto"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket by each protocol, reached by the environment alone."""
    server = request.getfixturevalue("server")
    url = request.getfixturevalue("moto") if request.param == "moto" else server.url
    for name, value in server.environment(url).items():
        monkeypatch.setenv(name, value)
    server.buckets["bucket"].clear()
    kinds: dict[str, Callable[..., Any]] = {
        "gcs": stores.GCSStore,
        "azure": stores.AzureStore,
    }
    kind = kinds.get(request.param, stores.S3Store)
    return kind("bucket", client_options={"allow_http": True}, retry_config=SOON)


def test_objects(store: Any) -> None:
    for name in ("a/1", "a/2", "a/3 ä&", "a/b/4", "c"):
        obstore.put(store, name, name.encode())
    found = [each["path"] for page in store.list() for each in page]
    assert sorted(found) == ["a/1", "a/2", "a/3 ä&", "a/b/4", "c"]
    below = store.list_with_delimiter("a")
    assert sorted(each["path"] for each in below["objects"]) == ["a/1", "a/2", "a/3 ä&"]
    assert below["common_prefixes"] == ["a/b"]
    assert bytes(obstore.get_range(store, "a/b/4", start=2, end=4)) == b"b/"
    head = obstore.head(store, "c")
    assert head["size"] == 1
    assert obstore.get(store, "c", options={"if_match": head["e_tag"]}).bytes() == b"c"
    with pytest.raises(obstore.exceptions.PreconditionError):
        obstore.get(store, "c", options={"if_match": '"other"'})
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "c", b"new", mode="create")
    obstore.delete(store, "c")
    with pytest.raises(FileNotFoundError):
        obstore.head(store, "c")


def test_parts(store: Any, server: buckets.Buckets) -> None:
    data = bytes(range(256)) * (2 * PART // 256) + b"end"
    with obstore.open_writer(store, "whole", buffer_size=PART) as writer:
        writer.write(data)
        assert [each["path"] for page in store.list() for each in page if "whole" in each] == []
    assert bytes(obstore.get(store, "whole").bytes()) == data
    writer = obstore.open_writer(store, "aborted", buffer_size=PART)
    writer.write(data)
    writer.__exit__(ValueError, ValueError(), None)
    assert server.uploads == {}
    with pytest.raises(FileNotFoundError):
        obstore.head(store, "aborted")


def test_refusals(server: buckets.Buckets) -> None:
    def store(bucket: str) -> Any:
        return stores.S3Store(bucket, retry_config=SOON, **server.s3())

    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        obstore.put(store("none"), "x", b"")
    server.deny = lambda request: (403, "AccessDenied") if request.method == "PUT" else None
    try:
        with pytest.raises(obstore.exceptions.PermissionDeniedError, match="AccessDenied"):
            obstore.put(store("bucket"), "x", b"")
    finally:
        server.deny = None


@pytest.fixture
def proxied(server: buckets.Buckets) -> Iterator[tuple[faults.Proxy, Any]]:
    """A bucket behind a proxy, with the object `x` of 100,000 bytes."""
    with faults.Proxy(server.url) as proxy:
        store = stores.S3Store("bucket", retry_config=SOON, **server.s3(proxy.url))
        server.put("bucket", "x", bytes(100_000))
        yield proxy, store


@pytest.mark.parametrize(
    "fault",
    [
        faults.Fault(status=503, count=2),
        faults.Fault(status=500),
        faults.Fault(after=50_000),
        faults.Fault(after=50_000, quietly=True),
        faults.Fault(lost=True),
    ],
    ids=str,
)
def test_a_fault_passes(proxied: tuple[faults.Proxy, Any], fault: faults.Fault) -> None:
    proxy, store = proxied
    proxy.add(fault)
    assert len(obstore.get(store, "x").bytes()) == 100_000
    assert fault.count == 0
    assert len(proxy.requests) > 1


def test_a_fault_in_an_upload_passes(proxied: tuple[faults.Proxy, Any]) -> None:
    proxy, store = proxied
    proxy.add(faults.Fault(method="PUT", upload=1000), faults.Fault(method="PUT", status=503))
    obstore.put(store, "y", bytes(100_000), use_multipart=False)
    assert len(obstore.get(store, "y").bytes()) == 100_000
    assert [request.method for request in proxy.requests] == ["PUT", "PUT", "PUT", "GET"]


def test_latency_hangs_and_etags(proxied: tuple[faults.Proxy, Any]) -> None:
    proxy, store = proxied
    proxy.latency = 0.1
    begin = time.perf_counter()
    obstore.head(store, "x")
    assert time.perf_counter() - begin >= 0.1
    proxy.clear()
    proxy.add(faults.Fault(etag='"other"'))
    assert obstore.head(store, "x")["e_tag"] == '"other"'
    proxy.add(faults.Fault(hang=True, count=-1))
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(f"{proxy.url}/bucket/x", timeout=0.2)
