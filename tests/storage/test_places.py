"""Paths and URLs: what a user's text stands for, and URLs that act like paths."""

from __future__ import annotations

import base64
import copy
import os
from pathlib import Path

import pytest

from posthoc_cli.errors import UsageError, printable
from posthoc_cli.storage.places import Url, common_folder, normal, place


@pytest.mark.parametrize(
    ("text", "stands_for"),
    [
        ("s3://bucket/run/a.safetensors", "s3://bucket/run/a.safetensors"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket//run/./x/../", "s3://bucket/run"),
        ("S3A://bucket/run", "s3://bucket/run"),
        ("gcs://bucket/run", "gs://bucket/run"),
        (
            "wasbs://files@account.blob.core.windows.net/x",
            "az://files@account.blob.core.windows.net/x",
        ),
        ("s3://bucket/.../a[1]?b=c", "s3://bucket/.../a[1]?b=c"),
        ("https://host:8000/my%20run", "https://host:8000/my run"),
        ("http://host/a%25b%3Fc%23d/[1]+*", "http://host/a%25b%3Fc%23d/[1]+*"),
        ("https://[::1]:8000/run", "https://[::1]:8000/run"),
        ("https://me:pass%40word@host/run", "https://host/run"),
        ("hf://datasets/owner/repo@main/run", "hf://datasets/owner/repo@main/run"),
        (Path("s3://bucket/run"), "s3://bucket/run"),
    ],
)
def test_urls(text: str | Path, stands_for: str) -> None:
    url = place(text)
    assert isinstance(url, Url)
    assert (str(url), os.fspath(url), url.as_posix()) == (stands_for,) * 3
    assert place(url) is url
    assert place(str(url)) == url
    assert copy.deepcopy(url) == url


@pytest.mark.parametrize("text", ["a/b", "/a", "c:/run", r"c:\\run", "run:/7", "a@b:c"])
def test_paths(text: str) -> None:
    path = place(text)
    assert type(path) is type(Path())
    assert path == Path(text)


def test_a_path_stays_what_it_is(tmp_path: Path) -> None:
    assert place(tmp_path) is tmp_path
    assert place(Path("ftp:/x")) == Path("ftp:/x")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ftp://host/run", "ftp:// is not known"),
        ("file:///run", "is a URL of the local disk"),
        ("file:/run", "is a URL of the local disk"),
        *((text, "is not a whole URL") for text in ("s3:/run", "gs:run", r"S3:\\b", "s3:///run")),
        ("az://account.blob.core.windows.net/run", "'account.blob.core.windows.net' can't be"),
        ("http://host:99999/run", "'host:99999' can't be"),
        ("https://huggingface.co/me/net/tree/v1/ema", "is a page .* write hf://me/net@v1/ema"),
        ("s3://my bucket/run", "'my bucket' can't be the name of a bucket"),
        ("s3://", "is not a whole URL"),
        ("s3://bucket/../other", "is not a whole URL"),
        ("https://host/a?X-Amz-Signature=1", "ends in a query"),
    ],
)
def test_wrong_urls(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        place(text)


def test_a_folder_may_be_called_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    assert place("s3:/run") == Path("s3:/run")


@pytest.mark.parametrize(
    "text",
    [
        "http://me:secret@host/run",
        "https://secret@host/a?b",
        "https://me:secret@host:70000/run",
        "s3://me:secret@bucket/run",
        "https://host/a?X-Amz-Date=1&X-Amz-Signature=secret",
        "az://files@account/run?sv=2020&sig=secret",
        "ftp://me:secret@host/run",
    ],
)
def test_nothing_shows_a_secret(text: str) -> None:
    try:
        shown = repr(place(text))
    except UsageError as error:
        shown = str(error)
    assert "secret" not in shown
    assert "secret" not in printable(f"Url: '{text}', and more")


def test_who_asks_is_known_to_the_server_alone() -> None:
    url = place("https://me:pass%40word@host:8000/run")
    assert isinstance(url, Url)
    assert url.login == f"Basic {base64.b64encode(b'me:pass@word').decode()}"
    assert Url("https:", "host:8001").login is None


def test_urls_are_taken_apart_as_paths_are() -> None:
    url = place("s3://bucket/run/step-7/a.safetensors")
    folder = place("s3://bucket/run")
    assert isinstance(url, Url)
    assert (url.scheme, url.key) == ("s3", "run/step-7/a.safetensors")
    assert (url.name, url.stem, url.suffix) == ("a.safetensors", "a", ".safetensors")
    assert str(url.with_name("b.pt")) == "s3://bucket/run/step-7/b.pt"
    assert str(url.parent.parent) == str(folder)
    assert str(folder / "x" / "y") == f"{folder / 'x'}/y" == "s3://bucket/run/x/y"
    assert url.relative_to(folder).as_posix() == "step-7/a.safetensors"
    assert folder.relative_to(folder).as_posix() == "."
    assert url.is_relative_to(folder)
    assert not url.is_relative_to(place("gs://bucket"))
    assert url.absolute() == url.resolve() == normal(url) == url
    assert {url: 1}[folder / "step-7" / "a.safetensors"] == 1
    assert sorted([url, folder])[0] == folder


def test_common_folders() -> None:
    urls = [place(f"s3://bucket/{name}") for name in ("run/a", "run/b/c", "runs")]
    assert common_folder(urls[:2]) == place("s3://bucket/run")
    assert common_folder(urls) == place("s3://bucket")
    assert common_folder([Path("a"), Path("b")]) == Path()
    for others in (place("s3://other"), place("gs://bucket"), Path("run")):
        with pytest.raises(ValueError, match="several stores"):
            common_folder([urls[0], others])
