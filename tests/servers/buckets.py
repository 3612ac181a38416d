"""Object storage by three protocols: S3, Google Cloud Storage (its XML one) and Azure Blob.

As much of each as a client needs to list, read, write in parts and delete. Signatures are not
checked; what may be told by `deny` is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape, unescape

from tests.servers.base import Handler, Request, Server

PART = 1 << 18
"""Bytes of the parts in which the tests upload."""

ACCOUNT = "testaccount"
KEY = "a2V5"


@dataclass(frozen=True)
class Object:
    """What lies in a bucket under a key."""

    data: bytes
    generation: int
    changed: float = field(default_factory=time.time)

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data[:65536]).hexdigest()}-{self.generation}"'


@dataclass
class Upload:
    """An upload in parts that is not complete."""

    bucket: str
    key: str
    parts: dict[str, bytes] = field(default_factory=dict)


class BucketHandler(Handler):
    def answer(self, request: Request) -> None:
        owner = self.server.owner
        assert isinstance(owner, Buckets)
        body = self.body()
        if owner.deny is not None and (refused := owner.deny(request)) is not None:
            status, code = refused
            self._fail(status, code)
            return
        azure = request.path.startswith(f"/{ACCOUNT}/") or request.path == f"/{ACCOUNT}"
        path = request.path.removeprefix(f"/{ACCOUNT}") if azure else request.path
        bucket, _, key = path.lstrip("/").partition("/")
        objects = owner.buckets.get(bucket)
        if objects is None:
            self._fail(404, "ContainerNotFound" if azure else "NoSuchBucket")
        elif not key:
            self._bucket(request, objects, body, azure)
        elif request.method in ("GET", "HEAD"):
            self._get(objects.get(key), azure)
        elif request.method == "DELETE" and "uploadId" not in request.query:
            known = objects.pop(key, None)
            self.send(404 if azure and known is None else 202 if azure else 204)
        elif azure:
            self._put_azure(request, bucket, key, body)
        else:
            self._put(request, bucket, key, body)

    def _get(self, found: Object | None, azure: bool) -> None:
        if found is None:
            self._fail(404, "BlobNotFound" if azure else "NoSuchKey")
            return
        wanted = self.headers.get("If-Match")
        if wanted not in (None, "*", found.etag):
            self._fail(412, "PreconditionFailed")
            return
        self.send_range(found.data, **_headers(found))

    def _put(self, request: Request, bucket: str, key: str, body: bytes) -> None:
        owner, query = self.server.owner, request.query
        assert isinstance(owner, Buckets)
        if request.method == "POST" and "uploads" in query:
            name = owner.begin(bucket, key)
            self._xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>")
            return
        if "uploadId" not in query:
            self._store(request, bucket, key, body)
            return
        upload = owner.uploads.get(query["uploadId"])
        if upload is None:
            self._fail(404, "NoSuchUpload")
        elif request.method == "DELETE":
            del owner.uploads[query["uploadId"]]
            self.send(204)
        elif request.method == "PUT":
            upload.parts[query["partNumber"]] = body
            self.send(200, ETag=f'"{hashlib.md5(body[:65536]).hexdigest()}"')
        else:
            numbers = re.findall(rb"<PartNumber>\s*(\d+)\s*</PartNumber>", body)
            parts = [upload.parts.get(number.decode()) for number in numbers]
            if any(part is None for part in parts):
                self._fail(400, "InvalidPart")
            elif any(len(part or b"") < owner.smallest_part for part in parts[:-1]):
                self._fail(400, "EntityTooSmall")
            elif self._store(request, bucket, key, b"".join(filter(None, parts)), quiet=True):
                owner.uploads.pop(query["uploadId"], None)
                found = owner.buckets[bucket][key]
                text = f"<ETag>{escape(found.etag)}</ETag><Key>{escape(key)}</Key>"
                self._xml("CompleteMultipartUploadResult", text)

    def _put_azure(self, request: Request, bucket: str, key: str, body: bytes) -> None:
        owner, query = self.server.owner, request.query
        assert isinstance(owner, Buckets)
        blocks = owner.blocks.get((bucket, key), {})
        if query.get("comp") == "block":
            owner.blocks.setdefault((bucket, key), {})[query["blockid"]] = body
            self.send(201)
        elif query.get("comp") == "blocklist":
            names = re.findall(r"<(?:Uncommitted|Latest)>(.*?)</", body.decode())
            if any(unescape(name) not in blocks for name in names):
                self._fail(400, "InvalidBlockList")
                return
            data = b"".join(blocks[unescape(name)] for name in names)
            if self._store(request, bucket, key, data, status=201):
                owner.blocks.pop((bucket, key), None)
        else:
            self._store(request, bucket, key, body, status=201)

    def _store(
        self,
        request: Request,
        bucket: str,
        key: str,
        data: bytes,
        *,
        status: int = 200,
        quiet: bool = False,
    ) -> bool:
        """Put an object in its place, unless a condition of the request forbids it."""
        owner, headers = self.server.owner, request.headers
        assert isinstance(owner, Buckets)
        with owner.lock:
            for name, source in headers.items():
                if name.lower().endswith("-copy-source"):
                    path = unquote(urlsplit(source).path).removeprefix(f"/{ACCOUNT}")
                    at, _, copied = path.lstrip("/").partition("/")
                    data = owner.buckets[at][copied].data
            there = owner.buckets[bucket].get(key)
            absent = headers.get("if-none-match") == "*"
            absent |= headers.get("x-goog-if-generation-match") == "0"
            known = headers.get("if-match")
            if not owner.conditions:
                absent = known = None
            if (absent and there) or (known and (there is None or there.etag != known)):
                azure = status == 201
                self._fail(409 if azure else 412, "BlobAlreadyExists" if azure else "Precondition")
                return False
            found = owner.buckets[bucket][key] = Object(data, next(owner.generations))
        if not quiet:
            self.send(status, **_headers(found))
        return True

    def _bucket(
        self, request: Request, objects: dict[str, Object], body: bytes, azure: bool
    ) -> None:
        if request.method == "GET":
            (self._list_azure if azure else self._list)(request.query, objects)
        elif "delete" in request.query:
            keys = [unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", body.decode())]
            for key in keys:
                objects.pop(key, None)
            deleted = (f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            self._xml("DeleteResult", "".join(deleted))
        elif request.query.get("comp") == "batch":
            self._batch(objects, body)
        else:
            self._fail(501, "NotImplemented")

    def _batch(self, objects: dict[str, Object], body: bytes) -> None:
        """Azure's way to delete several: a request in each part of the body, and so the answers."""
        text = ""
        for path in re.findall(rb"^DELETE (\S+) HTTP", body, re.MULTILINE):
            key = unquote(urlsplit(path.decode()).path).lstrip("/").split("/", 2)[2]
            known = objects.pop(key, None)
            status = "404 The specified blob does not exist." if known is None else "202 Accepted"
            number = text.count("--batch")
            text += "--batch\r\nContent-Type: application/http\r\n"
            text += f"Content-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n"
        kind = "multipart/mixed; boundary=batch"
        self.send(202, f"{text}--batch--\r\n".encode(), Content_Type=kind)

    def _listed(
        self, query: dict[str, str], objects: dict[str, Object], after: str
    ) -> tuple[list[str], list[str], str]:
        """Keys and common prefixes of one page, and where the next begins."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        owner = self.server.owner
        assert isinstance(owner, Buckets)
        keys: list[str] = []
        folders: dict[str, None] = {}
        for key in sorted(objects):
            if not key.startswith(prefix) or key <= after:
                continue
            if len(keys) == owner.page:
                return keys, list(folders), keys[-1]
            inside, found, _ = (
                key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            )
            if found:
                folders[prefix + inside + delimiter] = None
            else:
                keys.append(key)
        return keys, list(folders), ""

    def _list(self, query: dict[str, str], objects: dict[str, Object]) -> None:
        after = max(query.get("continuation-token", ""), query.get("start-after", ""))
        keys, folders, more = self._listed(query, objects, after)
        text = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
        text += f"<KeyCount>{len(keys)}</KeyCount>"
        text += f"<NextContinuationToken>{escape(more)}</NextContinuationToken>" if more else ""
        for key in keys:
            found = objects[key]
            text += (
                f"<Contents><Key>{escape(key)}</Key><Size>{len(found.data)}</Size>"
                f"<LastModified>{_iso(found.changed)}</LastModified>"
                f"<ETag>{escape(found.etag)}</ETag></Contents>"
            )
        for folder in folders:
            text += f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
        self._xml("ListBucketResult", text)

    def _list_azure(self, query: dict[str, str], objects: dict[str, Object]) -> None:
        keys, folders, more = self._listed(query, objects, query.get("marker", ""))
        text = "<Blobs>"
        for key in keys:
            found = objects[key]
            text += (
                f"<Blob><Name>{escape(key)}</Name><Properties>"
                f"<Last-Modified>{formatdate(found.changed, usegmt=True)}</Last-Modified>"
                f"<Etag>{escape(found.etag)}</Etag>"
                f"<Content-Length>{len(found.data)}</Content-Length>"
                "<Content-Type>application/octet-stream</Content-Type>"
                "<BlobType>BlockBlob</BlobType></Properties></Blob>"
            )
        for folder in folders:
            text += f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>"
        self._xml("EnumerationResults", f"{text}</Blobs><NextMarker>{escape(more)}</NextMarker>")

    def _xml(self, root: str, inside: str, status: int = 200) -> None:
        text = f'<?xml version="1.0" encoding="utf-8"?><{root}>{inside}</{root}>'
        self.send(status, text.encode(), Content_Type="application/xml")

    def _fail(self, status: int, code: str) -> None:
        self._xml("Error", f"<Code>{code}</Code><Message>{code}</Message>", status)


def _headers(found: Object) -> dict[str, str]:
    return {
        "ETag": found.etag,
        "Last_Modified": formatdate(found.changed, usegmt=True),
        "x_goog_generation": str(found.generation),
    }


def _iso(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(when))


class Buckets(Server):
    """Buckets in memory: `buckets[bucket][key]`; `uploads` and `blocks` are what is not complete.

    `page` is how many keys a listing gives at once; `deny` may refuse a request by a status and a
    code, such as `(403, "AccessDenied")` or `(400, "ExpiredToken")`; without `conditions` those of
    requests are overlooked.
    """

    handler = BucketHandler

    def __init__(self, *buckets: str, page: int = 1000) -> None:
        super().__init__()
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.uploads: dict[str, Upload] = {}
        self.blocks: dict[tuple[str, str], dict[str, bytes]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.Lock()
        self.page = page
        self.smallest_part = 5 << 20
        self.conditions = True
        self.deny: Callable[[Request], tuple[int, str] | None] | None = None

    def begin(self, bucket: str, key: str) -> str:
        name = f"upload-{next(self.generations)}"
        self.uploads[name] = Upload(bucket, key)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.buckets.setdefault(bucket, {})[key] = Object(data, next(self.generations))

    def get(self, bucket: str, key: str) -> bytes:
        return self.buckets[bucket][key].data

    def keys(self, bucket: str) -> list[str]:
        return sorted(self.buckets[bucket])

    def environment(self, url: str | None = None) -> dict[str, str]:
        """Variables by which `s3://`, `gs://` and `az://` lead here, or to a proxy at `url`."""
        return environment(url or self.url)

    def s3(self, url: str | None = None) -> dict[str, Any]:
        """What obstore's S3Store needs besides the bucket's name."""
        return {
            "endpoint": url or self.url,
            "access_key_id": "key",
            "secret_access_key": "secret",
            "region": "us-east-1",
            "client_options": {"allow_http": True},
        }


def environment(url: str) -> dict[str, str]:
    """Variables by which `s3://`, `gs://` and `az://` lead to `url`."""
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account | {"private_key_id": ""}),
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_ENDPOINT": f"{url}/{ACCOUNT}",
    }
