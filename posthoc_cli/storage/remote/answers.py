"""What stores and their client say when something fails, as one line that says what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posthoc_cli.errors import MachineError, printable

_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or for a public "
    "bucket AWS_SKIP_SIGNATURE=true, AWS_REQUEST_PAYER=true for one whose reader pays",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket GOOGLE_SKIP_SIGNATURE=true",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or for a public "
    "container AZURE_SKIP_SIGNATURE=true",
    "hf": "log in with hf auth login, or set HF_TOKEN",
}
"""How to say who asks."""

_BEFORE_HOST = "check the address; if it asks for a login, write NAME:PASSWORD@ before the host"

_ENDPOINTS = {
    "s3": "AWS_ENDPOINT_URL",
    "gs": "gcs_base_url in GOOGLE_SERVICE_ACCOUNT_KEY",
    "az": "AZURE_STORAGE_ENDPOINT",
    "hf": "HF_ENDPOINT",
}
"""What leads to another store than the usual one."""

_LOGIN = "whether the network asks you to log in"
_REGION = "{cannot}: the bucket is in another region", "set AWS_REGION to the bucket's"

_ODD_NAME = "object with invalid path"

_KNOWN = [
    ("<Code>NoSuchBucket<", "there is no such bucket", "check its name"),
    ("<Code>ContainerNotFound<", "there is no such container", "check its name"),
    ("<Code>InvalidBucketName<", "{host} takes no such name for a bucket", "check it"),
    ("169.254.169.254|metadata.google.internal", "no credentials were found", "{keys}"),
    (
        "Account must be specified|Invalid Access Key|One of service account|SecretAccessKey"
        "|service account file|pem file|SAS query",
        "{line}",
        "{keys}",
    ),
    ("Generic Config error", "{line}", "check the variables that set it up"),
    (
        "redirect without LOCATION|<Code>(PermanentRedirect|Authorization|IllegalLocation)",
        *_REGION,
    ),
    (
        "<Code>\\w*Expired|TokenRefreshRequired|ExpiredToken|has expired|specified time frame",
        "{cannot}: the credentials have expired",
        "renew them",
    ),
    (
        "RequestTimeTooSkewed|date header too old|reasonable timeframe",
        "{cannot}: this machine's clock is wrong",
        "set it, and try again",
    ),
    (
        "<Code>InvalidToken<",
        "{cannot}: {host} doesn't know the session token",
        "check AWS_SESSION_TOKEN, which belongs to the two keys",
    ),
    ("invalid_grant", "{cannot}: Google doesn't take the credentials", "make them anew"),
    (
        "<Code>(InvalidObjectState|BlobArchived)<",
        "{cannot}: it is archived",
        "restore it, or copy it to another storage class",
    ),
    (
        "<Code>QuotaExceeded|StorageFull|status code: 507",
        "{cannot}: the store is full",
        "make room there, or write elsewhere",
    ),
    ("HTTPS? request to an HTTPS|request was sent to HTTPS", "{host} wants https", "{check}"),
    ("InvalidContentType", "{host} has no https", "write http://, or {check}"),
    (
        "(?i)certificate",
        "the certificate of {host} is not trusted",
        "set SSL_CERT_FILE to the certificate of who signed it",
    ),
    (r"hyper::Error\(\s*(Parse|UnexpectedMessage)", "{host} is no web server", "{check}"),
    ("TooManyRedirects", "{host} leads in a circle", f"{{check}}, and {_LOGIN}"),
    ("status code: 407", "the proxy asks for a login", "give it in HTTPS_PROXY"),
    ("status code: 511", "the network asks you to log in", "do that in a browser"),
    (
        "Range request not supported|NotPartial",
        "is on a server that gives no parts of files",
        "copy the files to a disk{serve}",
    ),
    (
        _ODD_NAME,
        "{cannot}: a name below it has a part that is empty, . or .., or isn't printable",
        "rename that object, or give the URLs of the files",
    ),
    ("Could not parse path", "{cannot}: it has what isn't printable", "rename it"),
    ("dns error|failed to lookup", "{cannot}: there is no host {host}", "{network}"),
]
"""What may be said: a pattern, the problem and what to do."""

_PAGE = (
    r"(?is)got invalid \w+ response|header missing|status code: (30\d|40[0245]).*<(html|!doctype)"
)
_NO_STORE = "what answers is no store of objects", f"{{check}}, and {_LOGIN}"

_WRONG_KEYS = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AuthenticationFailed")


class Refused(MachineError):
    """The error of a request that the server won't answer."""


class Denied(Refused):
    """The error of a request without permission, or of what can't be listed."""


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
    """Raise a store's errors as one line each; FileNotFoundError as it is."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise told(path, str(error)) from None
        raise
    except (BaseError, ValueError, NotImplementedError) as error:
        raise told(path, str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise told(path, f"obstore fails: {error}") from None


def told(path: Path, text: str, doing: str = "read") -> MachineError:
    """The error that a store's own text stands for, met when the object was read or "written"."""
    again = "try again" if doing == "written" else "try again, or copy the files to a disk"
    cannot, scheme = f"cannot be {doing}", path.parts[0][:-1]
    # Names in URLs may read like anything.
    host = printable(_first(r"https?://(?:[^/\s\"',?]*@)?([^/\s\"',?]+)", text))
    text = re.sub(r"(https?://[^/\s\"',?]+)[^\s\"',]*", r"\1", text)
    status, code = _first(r"status(?: code)?: (\d{3})", text), _first(r"<Code>(\w+)</Code>", text)
    words = {
        "cannot": cannot,
        "host": host or "the store",
        "keys": _KEYS.get(scheme, _BEFORE_HOST),
        "check": f"check {_ENDPOINTS.get(scheme, 'the address')}",
        "serve": ", or have nginx, Apache or Caddy serve them" * scheme.startswith("http"),
        "network": "check the network and the address",
        "line": f"{cannot} ({printable(' '.join(text.split('Debug source:')[0].split()))[:200]})",
    }

    def line(problem: str, remedy: str, kind: type[MachineError] = MachineError) -> MachineError:
        return kind(str(path), problem.format_map(words), remedy.format_map(words))

    for pattern, problem, remedy in _KNOWN:
        if re.search(pattern, text):
            region = _first(r"<Region>([\w-]+)</Region>", text) if remedy == _REGION[1] else ""
            kind_of = Denied if pattern == _ODD_NAME else MachineError
            return line(problem, f"set AWS_REGION={region}" if region else remedy, kind_of)
    if scheme in ("s3", "gs", "az"):
        if re.search(_PAGE, text):
            return line(*_NO_STORE)
        if status == "404" and not code:
            return line("{host} has no such bucket", "check its name; {check}")
    if status in ("401", "403") or code == "PublicAccessNotPermitted":
        remedy = "{keys}" if code not in _WRONG_KEYS else "check the keys, and whose they are"
        needed = _first(r"(?:to perform: |not have )([a-z0-9]+[:.][\w:.]+)", text)
        takes = f", it takes {needed}" if needed else ""
        return line(f"{{cannot}}: permission denied ({code or status}){takes}", remedy, Denied)
    if status or code:
        answer = f"{status} ({code})" if status and code else status or code
        return line(f"{{cannot}}: the server answers {answer}", again, Refused)
    kind = _first(r"kind: (\w+)", text)
    if kind == "Timeout" or "timed out" in text or "TimedOut" in text:
        return line("{cannot}: {host} doesn't answer", "{network}")
    if kind == "Connect":
        return line("{cannot}: no connection to {host}", "{network}")
    if kind:
        return line("{cannot}: the connection to {host} was lost", "{network}")
    return line("{line}", again)


def check_store(path: Path, found: Any) -> None:
    """Raise MachineError for an object that is none of a store: a page, such as one that asks for
    a login or that a program answers to everything, or what has neither etag nor time."""
    page = is_page(found) and path.suffix.lower() not in (".html", ".htm")
    if page or (found.meta["e_tag"] is None and not found.meta["last_modified"].timestamp()):
        remedy = _NO_STORE[1].format(check=f"check {_ENDPOINTS[path.parts[0][:-1]]}")
        raise MachineError(str(path), _NO_STORE[0], remedy)


def is_page(found: Any) -> bool:
    """Whether what obstore got is what browsers show."""
    kind = str(found.attributes.get("Content-Type", "")).lower()
    return kind.startswith(("text/html", "application/xhtml"))


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
