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
        for bucket in buckets:
            request = urllib.request.Request(f"{url}/{bucket}", method="PUT")
            with urllib.request.urlopen(request):
                pass
        yield url
    finally:
        server.stop()
