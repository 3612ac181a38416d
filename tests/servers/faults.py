"""A proxy in front of a server that does to requests and answers what networks do."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.servers.base import Handler, Request, Server


@dataclass
class Fault:
    """What happens to the next `count` requests (all, if negative) that fit; after `skip` of them.

    `method` and `path` (a part of it, query included) say which fit; `ranged`: only those that ask
    for a range. `status` is answered in the server's place, with `body`. `after` cuts the answer
    after so many bytes of its body: by a reset, or with `quietly` by an orderly end. `upload` cuts
    the connection after so many bytes of the request's. `hang` answers nothing. `etag` replaces the
    answer's. `lost` hands the request on and then resets, as when the answer is lost.
    """

    method: str | None = None
    path: str = ""
    ranged: bool = False
    count: int = 1
    skip: int = 0
    status: int | None = None
    body: bytes = b""
    after: int | None = None
    quietly: bool = False
    upload: int | None = None
    hang: bool = False
    etag: str | None = None
    lost: bool = False

    def fits(self, request: Request, path: str) -> bool:
        return (
            (self.method is None or request.method == self.method)
            and self.path in path
            and (not self.ranged or "range" in request.headers)
        )


class ProxyHandler(Handler):
    def answer(self, request: Request) -> None:
        owner = self.server.owner
        assert isinstance(owner, Proxy)
        fault = owner.take(request, self.path)
        if fault and fault.upload is not None:
            self.rfile.read(min(fault.upload, int(self.headers.get("Content-Length") or 0)))
            self._reset()
            return
        body = self.body()
        if fault and fault.hang:
            owner.stopped.wait()
            self._reset()
            return
        if fault and fault.status is not None:
            self.send(fault.status, fault.body)
            return
        self._forward(owner.host, body, fault)

    def _forward(self, host: str, body: bytes, fault: Fault | None) -> None:
        server = http.client.HTTPConnection(host)
        dropped = ("connection", "transfer-encoding", "content-length", "expect")
        headers = {key: text for key, text in self.headers.items() if key.lower() not in dropped}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        try:
            server.request(self.command, self.path, body or None, headers)
            answer = server.getresponse()
            data = answer.read()
        finally:
            server.close()
        if fault and fault.lost:
            self._reset()
            return
        given = {
            key.replace("-", "_"): text
            for key, text in answer.getheaders()
            if key.lower() not in ("connection", "transfer-encoding", "date", "server")
        }
        given.pop("content_length", None)
        if fault and fault.etag is not None:
            given = {key: text for key, text in given.items() if key.lower() != "etag"}
            given["ETag"] = fault.etag
        if self.command != "HEAD":
            given.pop("Content_Length", None)
        if fault is None or fault.after is None:
            self.send(answer.status, data, **given)
            return
        self.send(answer.status, data[: fault.after], Content_Length=str(len(data)), **given)
        self.wfile.flush()
        if fault.quietly:
            self.close_connection = True
        else:
            self._reset()

    def _reset(self) -> None:
        """Close the connection so that the client sees a reset."""
        self.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True


class Proxy(Server):
    """Hands requests on to the server at `url`, `latency` seconds late, with the faults added."""

    handler = ProxyHandler

    def __init__(self, url: str, *, latency: float = 0) -> None:
        super().__init__()
        self.host = urlsplit(url).netloc
        self.latency = latency
        self.stopped = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, *faults: Fault) -> None:
        with self._lock:
            self._faults.extend(faults)

    def clear(self) -> None:
        """Take all faults away and forget the requests; what hangs is let go."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
        self.stopped.set()
        self.stopped = threading.Event()

    def take(self, request: Request, path: str) -> Fault | None:
        """The first fault that is for this request."""
        with self._lock:
            for fault in self._faults:
                if fault.count and fault.fits(request, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.count -= 1
                    return fault
        return None

    def stop(self) -> None:
        self.stopped.set()
        super().stop()
