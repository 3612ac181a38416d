"""S3 as moto has it: what our own server may have got wrong, it has not."""

from __future__ import annotations

import contextlib
import logging
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def moto(*buckets: str) -> Iterator[str]:
    """The URL of a server with empty `buckets`."""
    from moto.server import ThreadedMotoServer  # half a second

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        _ask(f"{url}/moto-api/reset", "POST")  # what another one had, this one has
        for bucket in buckets:
            _ask(f"{url}/{bucket}", "PUT")
        yield url
    finally:
        server.stop()


def _ask(url: str, method: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, method=method)):
        pass
