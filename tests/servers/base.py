"""What all servers have: threads, a URL, a list of requests, ranges."""

from __future__ import annotations

import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

Self = TypeVar("Self", bound="Server")


@dataclass(frozen=True)
class Request:
    """What a server was asked: `query` has the first value of each name."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class Handler(BaseHTTPRequestHandler):
    """One connection; `answer` is what a server has to write."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body of an answer go in one packet
    server: Listening

    def answer(self, request: Request) -> None:
        raise NotImplementedError

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        query = {
            name: values[0]
            for name, values in parse_qs(parts.query, keep_blank_values=True).items()
        }
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(parts.path), query, headers)
        self.server.owner.note(request)
        time.sleep(self.server.owner.latency)
        self.answer(request)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = _handle

    def body(self) -> bytes:
        """All of the request's body."""
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes | memoryview = b"", **headers: str) -> None:
        """Send an answer; `_` in a header's name stands for `-`. To HEAD its body is left out."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_range(self, data: bytes | memoryview, *, ranges: bool = True, **headers: str) -> None:
        """Send `data`, or the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not ranges or asked is None:
            if ranges:
                headers["Accept_Ranges"] = "bytes"
            self.send(200, data, **headers)
            return
        first, last = (int(text) if text else None for text in asked.groups())
        if first is None:
            first, last = max(len(data) - (last or 0), 0), len(data) - 1
        end = min(len(data) if last is None else last + 1, len(data))
        if first >= end:
            self.send(416, Content_Range=f"bytes */{len(data)}")
            return
        where = f"bytes {first}-{end - 1}/{len(data)}"
        self.send(206, memoryview(data)[first:end], Content_Range=where, **headers)

    def log_message(self, *_: Any) -> None:
        pass


class Listening(ThreadingHTTPServer):
    """The socket of a server."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    owner: Server

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what some tests are about."""


class Server:
    """A server that runs within a `with` block, or from `start` to `stop`."""

    handler: type[Handler]
    latency = 0.0
    """Seconds that each answer comes late."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._listening = Listening(("127.0.0.1", 0), self.handler)
        self._listening.owner = self
        self.port = self._listening.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def note(self, request: Request) -> None:
        self.requests.append(request)

    def start(self: Self) -> Self:
        poll = {"poll_interval": 0.02}
        threading.Thread(target=self._listening.serve_forever, kwargs=poll, daemon=True).start()
        return self

    def stop(self) -> None:
        self._listening.shutdown()
        self._listening.server_close()

    def __enter__(self: Self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def unused_url() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"
