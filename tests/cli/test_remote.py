"""Snapshots in buckets, on servers and on the hub, read by the command as those on a disk are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest
from safetensors.numpy import load_file

from posthoc_cli.storage import stores
from posthoc_cli.storage.remote import objects, sources
from tests.command import Posthoc, Run
from tests.packing import averages, write
from tests.servers.base import Request, unused_url
from tests.servers.buckets import Buckets
from tests.servers.faults import Fault, Proxy
from tests.servers.files import Files
from tests.servers.hub import Hub
from tests.support import write_shards

WANTED = ("--sigma-rel", "0.07", "--method", "blup")
QUICK = {**sources.RETRY, "max_retries": 2}


class Servers(NamedTuple):
    buckets: Buckets
    proxy: Proxy
    files: Files
    hub: Hub
    folder: Path

    def url(self, kind: str, path: str) -> str:
        if kind == "http":
            return f"{self.files.url}/{path}"
        return f"hf://me/ema/{path}" if kind == "hf" else f"{kind}://bucket/{path}"

    def upload(self, folder: Path) -> None:
        """Put a folder into all of them, under its name."""
        shutil.copytree(folder, self.folder / folder.name, dirs_exist_ok=True)
        for path in folder.rglob("*"):
            if path.is_file():
                key = path.relative_to(folder.parent).as_posix()
                self.buckets.put("bucket", key, path.read_bytes())


@pytest.fixture(scope="module")
def all_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("served")
    with (
        Buckets("bucket") as buckets,
        Proxy(buckets.url) as proxy,
        Files(folder) as files,
        Hub({"me/ema": folder}) as hub,
    ):
        servers = Servers(buckets, proxy, files, hub, folder)
        servers.upload(write(tmp_path_factory.mktemp("made") / "snapshots", averages(4)))
        yield servers


@pytest.fixture
def servers(all_servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Servers:
    environment = all_servers.buckets.environment(all_servers.proxy.url)
    for name, text in {**environment, **all_servers.hub.environment()}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", all_servers.hub.url)
    monkeypatch.setattr(sources, "RETRY", QUICK)
    all_servers.proxy.clear()
    all_servers.buckets.deny = None
    all_servers.hub.token = None
    return all_servers


def same(posthoc: Posthoc, local: Path, url: str, *options: str) -> None:
    """Inspect, synthesize and verify give for a URL what they do for the folder."""
    here = posthoc("inspect", local, "--json", *options)
    there = posthoc("inspect", url, "--json", *options)
    assert (here.code, there.code, there.err) == (0, 0, here.err)
    found = json.loads(there.out.replace(url, str(local)))
    assert found == here.json
    for place, name in ((local, "here.safetensors"), (url, "there.safetensors")):
        made = posthoc("synthesize", place, *WANTED, *options, "-q", "-o", name, "--force")
        assert (made.code, made.err) == (0, "")
    work = local.parent
    assert Path("here.safetensors").read_bytes() == Path("there.safetensors").read_bytes(), work
    checked = posthoc("verify", "here.safetensors", url, "--full")
    assert (checked.code, checked.err) == (0, "")


@pytest.mark.parametrize("kind", ["s3", "gs", "az", "http", "hf"])
def test_every_store_reads_as_a_disk_does(
    kind: str, servers: Servers, posthoc_here: Posthoc
) -> None:
    same(posthoc_here, servers.folder / "snapshots", servers.url(kind, "snapshots"))


# Kinds of snapshots


def _shards(folder: Path) -> None:
    """Step folders with shards and an index, and what lies beside a network."""
    for (step, width), tensors in averages(3).items():
        if width != "0.05":
            continue
        place = folder / f"checkpoint-{step}"
        names = sorted(tensors)
        write_shards(place, tensors, [names[::2], names[1::2]], {"format": "pt"})
        (place / "config.json").write_text('{"model_type": "bert"}')
        (place / "optimizer.pt").write_bytes(b"x")


def _torch(folder: Path) -> None:
    import torch

    folder.mkdir()
    for (step, width), tensors in averages(3).items():
        state = {name: torch.from_numpy(value) for name, value in tensors.items()}
        torch.save({"state_dict": state}, folder / f"ema-{step:04d}-{width}.pt")


def _distributed(folder: Path) -> None:
    import torch
    from torch.distributed import checkpoint

    for (step, width), tensors in averages(3).items():
        if width == "0.05":
            state = {name: torch.from_numpy(tensors[name]) for name in ("a.weight", "b.bias")}
            with pytest.warns(UserWarning, match="no_dist|single process"):
                checkpoint.save(state, checkpoint_id=folder / f"step-{step}", no_dist=True)


def _packed(folder: Path) -> None:
    from posthoc_cli import open_snapshots
    from posthoc_cli.synthesis.pack import pack, plan_pack

    made = write(folder.with_name("plain"), averages(4))
    pack(plan_pack(open_snapshots(made).snapshots, folder), "float16")


@pytest.mark.parametrize("kind", ["s3", "http"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (_shards, ("--raw",)),
        (_torch, ("--pattern", "ema-{step}-{sigma_rel}.pt")),
        (_distributed, ("--raw",)),
        (_packed, ()),
    ],
)
def test_every_kind_of_snapshot(
    make: Callable[[Path], None],
    options: tuple[str, ...],
    kind: str,
    servers: Servers,
    tmp_path: Path,
    posthoc_here: Posthoc,
) -> None:
    folder = tmp_path / make.__name__.strip("_")
    make(folder)
    servers.upload(folder)
    same(posthoc_here, folder, servers.url(kind, folder.name), *options)


def test_only_and_pattern(servers: Servers, posthoc_here: Posthoc) -> None:
    url = servers.url("s3", "snapshots")
    few = (
        "--only",
        "*-0.05.*",
        "--exclude",
        "*0020*",
        "--pattern",
        "ema-{step}-{sigma_rel}.safetensors",
    )
    same(posthoc_here, servers.folder / "snapshots", url, *few)
    line = ".*: there is no such folder; give the folder, and --only the pattern"
    posthoc_here("inspect", f"{url}/*-0.05.*").failed(2, line)


def test_files_by_name_where_a_server_lists_nothing(
    servers: Servers, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    with Files(servers.folder, index=False, etags=False) as files:
        folder = f"{files.url}/snapshots"
        names = sorted(path.name for path in (servers.folder / "snapshots").iterdir())
        done = posthoc_here(
            "solve", *(f"{folder}/{name}" for name in names), *WANTED, "-q", "--json"
        )
        here = posthoc_here("solve", servers.folder / "snapshots", *WANTED, "-q", "--json")
        assert (done.code, done.err) == (0, "")
        assert done.json["targets"] == here.json["targets"]
        one = posthoc_here("inspect", f"{folder}/{names[0]}", "--json")
        assert [each["file"] for each in one.json["snapshots"]] == names[:1]
        posthoc_here("inspect", folder).failed(1, f"{folder}: .*: permission denied .403.; .*")


def test_files_of_a_server_that_hides_what_is_missing(
    servers: Servers, posthoc_here: Posthoc
) -> None:
    """As public buckets do by https for who may not list them."""
    name = sorted(path.name for path in (servers.folder / "snapshots").iterdir())[0]
    with Files(servers.folder, index=False, hides=True) as files:
        for missing in ("snapshots", "snapshots/x.safetensors"):
            url = f"{files.url}/{missing}"
            posthoc_here("inspect", url).failed(1, f"{url}: .*: permission denied .403.; .*")
        one = posthoc_here("inspect", f"{files.url}/snapshots/{name}", "--json")
        assert [each["file"] for each in one.json["snapshots"]] == [name]


def test_links_from_the_root(servers: Servers, posthoc_here: Posthoc) -> None:
    with Files(servers.folder, absolute=True) as files:
        done = posthoc_here("inspect", f"{files.url}/snapshots", "--json")
        assert len(done.json["snapshots"]) == 8


NGINX = '<a href="../">../</a>\\r\\n<a href="{quoted}">{cut}..&gt;</a>  28-Nov-2026 01:00  117'
INDEXES = {
    "nginx": NGINX,
    "apache": '<a href="?C=N;O=D">Name</a><a href="/">Up</a><a href="{quoted}">{n}</a>',
    "caddy": '<a href="./?sort=name&order=desc">x</a><a href="./{quoted}"><span>{n}</span></a>',
    "whole URLs": '<a href="http://{where}{quoted}">{n}</a><a href="http://other/{quoted}.pt">',
    "without a scheme": '<a href="//{where}{quoted}">{n}</a>',
    "by a base": '<base href="/"><a href="snapshots/{quoted}">{n}</a>',
    "from above": '<a href="../snapshots/{quoted}#top">{n}</a><a href="../other/{quoted}.pt">',
    "twice, one with a query": '<a href="{quoted}">{n}</a><a href="{quoted}?download=1">',
    "old": "<A HREF={quoted}>{n}</A><A NAME=x><A HREF>",
    "with what is no link": '<a href="{quoted}">{n}</a><a href="http://[x"><a href="mailto:a@b">',
    "with deeper ones": '<a href="{quoted}">{n}</a><a href="deep/er/{quoted}">',
}


HTML = "text/html; charset=utf-8"


@pytest.mark.parametrize(
    ("index", "kind"),
    [(each, HTML) for each in INDEXES] + [("old", "Text/HTML"), ("old", "application/xhtml+xml")],
)
def test_index_pages(index: str, kind: str, servers: Servers, posthoc_here: Posthoc) -> None:
    def page(where: str, names: list[str]) -> str:
        line = INDEXES[index]
        rows = (line.format(quoted=quote(n), n=n, cut=n[:9], where=where) for n in names)
        return f"<html><head><title>Index</title></head><body>{''.join(rows)}</body></html>"

    with Files(servers.folder) as files:
        files.page, files.page_type = page, kind
        done = posthoc_here("inspect", f"{files.url}/snapshots", "--json")
        assert (done.code, done.err) == (0, "")
        assert len(done.json["snapshots"]) == 8


def test_verify_names_urls(servers: Servers, posthoc_here: Posthoc) -> None:
    url = servers.url("s3", "snapshots")
    assert posthoc_here("synthesize", url, *WANTED, "-q", "-o", "x.safetensors").code == 0
    done = posthoc_here("verify", "x.safetensors", url, "--json")
    assert (done.json["folder"], done.json["ok"]) == (url, True)


def test_plot(servers: Servers, posthoc_here: Posthoc, tmp_path: Path) -> None:
    done = posthoc_here("plot", servers.url("gs", "snapshots"), *WANTED[:2], "-o", "a.svg")
    assert done.code == 0
    assert (tmp_path / "a.svg").stat().st_size > 10_000


def test_what_is_written_to_a_disk(servers: Servers, posthoc_here: Posthoc, tmp_path: Path) -> None:
    """Folders with what lies beside a network, conversions and packed snapshots."""
    for make in (_shards, _torch):
        folder = tmp_path / make.__name__.strip("_")
        make(folder)
        servers.upload(folder)
    sources = {"shards": ("synthesize", "--raw", *WANTED, "--layout", "folder", "-q", "-o")}
    sources["torch"] = ("convert",)
    sources["snapshots"] = ("pack",)
    for name, (command, *options) in sources.items():
        local = servers.folder / name
        for at, source in enumerate((local, servers.url("az", name))):
            where = f"{name}-{at}"
            done = posthoc_here(command, source, *options, where)
            assert done.code == 0, done
        here, there = (tmp_path / f"{name}-{at}" for at in range(2))
        names = sorted(path.relative_to(here) for path in here.rglob("*"))
        assert names == sorted(path.relative_to(there) for path in there.rglob("*"))
        assert len(names) > 2
        for path in names:
            if path.suffix == ".safetensors":  # metadata say when a source was written
                one, other = load_file(here / path), load_file(there / path)
                assert one.keys() == other.keys()
                assert all(one[each].tobytes() == other[each].tobytes() for each in one)
            elif path.suffix != ".json":
                assert (here / path).read_bytes() == (there / path).read_bytes(), path


def test_a_folder_with_very_many_files_is_listed_by_itself(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    _shards(folder)
    servers.upload(folder)
    monkeypatch.setattr(sources, "MOST_LISTED", 0)
    for kind in ("s3", "gs", "az"):
        same(posthoc_here, folder, servers.url(kind, "many"), "--raw")


def test_few_requests(servers: Servers, posthoc_here: Posthoc) -> None:
    posthoc_here("inspect", servers.url("s3", "snapshots"))
    asked = [(each.method, "range" in each.headers) for each in servers.buckets.requests]
    servers.buckets.requests.clear()
    posthoc_here("inspect", servers.url("s3", "snapshots"))
    asked = [(each.method, "range" in each.headers) for each in servers.buckets.requests]
    assert asked.count(("GET", True)) == 8  # the header of each file
    assert len(asked) <= 12


ODD = ("a[1]", "a%20b 100%", "a#b?c=d", "+*{}|^&;", "ü 日本", "...", "tree")


@pytest.mark.parametrize("kind", ["s3", "gs", "az", "http", "hf"])
def test_names_may_be_anything(
    kind: str, servers: Servers, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    """Of folders and files; `http` as its URLs have them quoted."""
    for name in ODD:
        folder = tmp_path / name
        folder.mkdir()
        for path in sorted((servers.folder / "snapshots").iterdir())[:2]:
            shutil.copy(path, folder / f"{path.stem}{name}.safetensors")
        servers.upload(folder)
        url = servers.url(kind, quote(name) if kind == "http" else name)
        done = posthoc_here("inspect", url, "--json")
        assert done.code == 0, done
        found = [each["file"] for each in done.json["snapshots"]]
        assert found == sorted(path.name for path in folder.iterdir())
        one = quote(found[0]) if kind == "http" else found[0]
        done = posthoc_here("inspect", f"{url}/{one}", "--json")
        assert [each["file"] for each in done.json["snapshots"]] == found[:1]
        if kind in ("s3", "gs", "az") and "{" not in name:
            out = f"{kind}://bucket/{name}/{kind}/{name}.safetensors"
            assert posthoc_here("synthesize", folder, *WANTED, "-o", out).code == 0
            assert posthoc_here("verify", out, url).code == 0


@pytest.mark.parametrize("odd", ["a\nb", "/a", "x/../a"])
def test_a_name_that_no_folder_has(odd: str, servers: Servers, posthoc_here: Posthoc) -> None:
    """It keeps its own folder from being listed, no other, nor files by their URLs."""
    name = sorted(path.name for path in (servers.folder / "snapshots").iterdir())[0]
    data = servers.buckets.get("bucket", f"snapshots/{name}")
    keys = [f"odd/{odd}", f"odd/{name}", f"odd/run/{name}", f"odd/run/checkpoint-1/logs/{odd}"]
    for key in keys:
        servers.buckets.put("bucket", key, data)
    try:
        for scheme in ("s3", "gs", "az"):
            url = f"{scheme}://bucket/odd"
            line = f"{url}.*: a name below it has .*; rename that object, or .*"
            posthoc_here("inspect", url).failed(1, line)
            assert posthoc_here("inspect", f"{url}/run").code == 0
            assert posthoc_here("inspect", f"{url}/{name}").code == 0
    finally:
        for key in keys:
            del servers.buckets.buckets["bucket"][key]


def test_only_what_is_asked_for_is_listed(servers: Servers, posthoc_here: Posthoc) -> None:
    """Permission may be for a folder alone, or for its files and not for the folder."""

    def deny(request: Request) -> tuple[int, str] | None:
        prefix = request.query.get("prefix", "")
        refused = request.path == "/bucket" and not prefix.startswith(allowed)
        return (403, "AccessDenied") if refused else None

    servers.buckets.deny = deny
    names = sorted(path.name for path in (servers.folder / "snapshots").iterdir())
    for allowed, asked in (("snapshots/", ("",)), ("none", [f"/{name}" for name in names])):
        urls = [f"s3://bucket/snapshots{name}" for name in asked]
        assert posthoc_here("solve", *urls, *WANTED, "-q").code == 0, allowed
    line = r"s3://bucket/snapshots: .*: permission denied .AccessDenied.; set AWS_ACCESS_KEY_ID .*"
    outcome(posthoc_here, "s3://bucket/snapshots").failed(1, line)


def test_a_password_is_for_the_server_alone(
    servers: Servers, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    with Files(servers.folder, login="Basic bWU6c2VjcmV0") as files:
        shown = f"{files.url}/snapshots"
        url = shown.replace("//", "//me:secret@")
        line = f"{shown}: .*: permission denied .401.; .* NAME:PASSWORD@ before the host"
        outcome(posthoc_here, shown).failed(1, line)
        runs = [
            posthoc_here("inspect", url),
            posthoc_here("inspect", url, "--json"),
            posthoc_here("solve", url, *WANTED, "--json"),
            posthoc_here("synthesize", url, *WANTED, "-o", "x.safetensors", "--json"),
            posthoc_here("verify", "x.safetensors", url, "--json"),
            posthoc_here("inspect", "x.safetensors"),
        ]
        assert [run.code for run in runs] == [0] * len(runs)
        runs += [
            posthoc_here("inspect", f"{url}/none"),
            posthoc_here("solve", url, "--pattern", "{step}", "--run", "x"),
            posthoc_here("synthesize", url, *WANTED, "-o", url),
            posthoc_here("inspect", url.replace("snapshots", "a?X-Amz-Signature=secret")),
            posthoc_here("inspect", url, f"--only={url}", "--nonsense"),
        ]
        assert not any("secret" in run.out + run.err for run in runs)
        assert b"secret" not in (tmp_path / "x.safetensors").read_bytes()


# Failures


def outcome(posthoc: Posthoc, url: str) -> Run:
    done = posthoc("synthesize", url, *WANTED, "-q", "-o", "out.safetensors")
    assert not list(Path().glob("*out*"))
    return done


@pytest.mark.parametrize(
    ("url", "code", "line"),
    [
        ("s3://bucket/none", 2, "there is no such folder"),
        ("gs://bucket/none", 2, "there is no such folder"),
        ("http/none", 2, "there is no such folder"),
        ("hf://me/ema/none", 2, "there is no such folder"),
        ("s3://none/run", 1, "there is no such bucket"),
        ("az://none/run", 1, "there is no such container"),
        ("hf://me/none/run", 1, "there is no such repository, or it is not yours to read"),
        ("hf://me/ema@none/run", 1, "there is no such revision"),
        ("hf://me", 2, "is not a whole URL"),
        ("ftp://host/run", 2, "ftp:// is not known"),
        ("https://host/run?key=1", 2, "ends in a query, which is not supported"),
    ],
)
def test_what_is_not_there(
    url: str, code: int, line: str, servers: Servers, posthoc_here: Posthoc
) -> None:
    url = url.replace("http/", f"{servers.files.url}/")
    outcome(posthoc_here, url).failed(code, f"[^;]*: {line}; .+")


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (403, "AccessDenied", r"permission denied \(AccessDenied\); set AWS_ACCESS_KEY_ID .+"),
        (403, "SignatureDoesNotMatch", r"permission denied \(SignatureDoesNotMatch\); .+"),
        (400, "ExpiredToken", "the credentials have expired; renew them"),
        (403, "InvalidAccessKeyId", r"permission denied \(InvalidAccessKeyId\); check the keys.*"),
        (403, "RequestTimeTooSkewed", "this machine's clock is wrong; set it, and try again"),
        (400, "InvalidToken", ".* doesn't know the session token; check AWS_SESSION_TOKEN.*"),
        (400, "TokenRefreshRequired", "the credentials have expired; renew them"),
        (403, "InvalidObjectState", "it is archived; restore it.*"),
        (301, "PermanentRedirect", "the bucket is in another region; set AWS_REGION .*"),
        (400, "AuthorizationHeaderMalformed", "the bucket is in another region; .*"),
        (503, "SlowDown", r"the server answers 503 \(SlowDown\); try again.*"),
    ],
)
def test_what_is_refused(
    status: int, code: str, line: str, servers: Servers, posthoc_here: Posthoc
) -> None:
    servers.buckets.deny = lambda request: (status, code)
    outcome(posthoc_here, "s3://bucket/snapshots").failed(1, f".*: cannot be read: {line}")


PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head><body></body></html>"
NO_STORE = "what answers is no store of objects; check AWS_ENDPOINT_URL, .*log in"


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (200, PAGE, NO_STORE),
        (200, PAGE.replace(b"<body>", b"<body><p>"), NO_STORE),
        (200, b"<html/>", NO_STORE),
        (200, b"", NO_STORE),
        (200, b'{"status": "ok"}', NO_STORE),
        (404, PAGE, NO_STORE),
        (405, PAGE, NO_STORE),
        (
            403,
            b"<Code>AccessDenied</Code><Message>User: arn:aws:iam::1:user/me is not authorized to "
            b'perform: s3:ListBucket on resource: "arn:aws:s3:::bucket"</Message>',
            r".*: permission denied .AccessDenied., it takes s3:ListBucket; set .*",
        ),
        (404, b"", ".* has no such bucket; check its name; check AWS_ENDPOINT_URL"),
        (400, b"Client sent an HTTP request to an HTTPS server.", ".* wants https; check AWS.*"),
        (407, b"", "the proxy asks for a login; .*"),
    ],
)
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_what_stores_and_others_answer(
    scheme: str,
    status: int,
    body: bytes,
    line: str,
    servers: Servers,
    posthoc_here: Posthoc,
    snapshots: Path,
) -> None:
    servers.proxy.add(Fault(status=status, body=body, count=-1))
    line = line.replace("AWS_ENDPOINT_URL", ".*[A-Z]_.*").replace("AWS", ".*")
    outcome(posthoc_here, f"{scheme}://bucket/snapshots").failed(1, f"{scheme}://bucket.*: {line}")
    out = f"{scheme}://bucket/out.safetensors"
    done = posthoc_here("synthesize", "snapshots", *WANTED, "-q", "-o", out)
    done.failed(1, f"{scheme}://bucket/out.*: {line}")


def test_a_page_for_everything(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a store's console has it, at the port beside the store's."""
    (servers.folder / "bucket").mkdir(exist_ok=True)
    with Files(servers.folder) as files:
        files.page = lambda where, names: "<!doctype html><html><body></body></html>"
        monkeypatch.setenv("AWS_ENDPOINT_URL", files.url)
        (servers.folder / "bucket/snapshots").mkdir(exist_ok=True)
        outcome(posthoc_here, "s3://bucket/snapshots").failed(
            1, f"s3://bucket/snapshots: {NO_STORE}"
        )


def test_a_token_that_is_missing(servers: Servers, posthoc_here: Posthoc) -> None:
    servers.hub.token = "secret"
    line = ".*: there is no such repository, or it is not yours to read; .*HF_TOKEN"
    outcome(posthoc_here, "hf://me/ema/snapshots").failed(1, line)


def test_a_login_of_the_hubs_address_is_not_shown(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(url: str) -> Run:
        endpoint = url.replace("//", "//me:secret@")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        return posthoc_here("inspect", "hf://me/ema/snapshots")

    assert at(servers.hub.url).code == 0
    monkeypatch.setenv("POSTHOC_DEBUG", "1")
    monkeypatch.setattr("posthoc_cli.storage.remote.hub._WAITS", ())
    done = at(unused_url())
    assert done.code == 1
    assert "no connection to the hub" in done.err
    assert "secret" not in done.err
    monkeypatch.delenv("POSTHOC_DEBUG")
    monkeypatch.setenv("HF_TOKEN", "hf_secr\u00e9t")
    line = "hf://me/ema: the token has characters that none has; .* HF_TOKEN"
    at(servers.hub.url).failed(1, line)


def test_the_hub_is_asked_again(servers: Servers, posthoc_here: Posthoc, monkeypatch) -> None:
    monkeypatch.setattr("posthoc_cli.storage.remote.hub._WAITS", (0.0, 0.0))
    servers.hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Proxy(servers.hub.url) as proxy:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", proxy.url)
        proxy.add(Fault(path="/api/", status=503, count=2))
        assert posthoc_here("inspect", "hf://me/ema/snapshots").code == 0
        proxy.add(Fault(path="/api/", status=503, count=3))
        line = "hf://me/ema: the hub answers 503; .*; try again"
        outcome(posthoc_here, "hf://me/ema/snapshots").failed(1, line)
        for status, body, line in (
            (429, b"", "the hub answers 429; try again later; .* HF_TOKEN"),
            (200, PAGE, "what answers is no hub; check HF_ENDPOINT, .*"),
        ):
            proxy.clear()
            proxy.add(Fault(path="/api/", status=status, body=body, count=-1))
            outcome(posthoc_here, "hf://me/ema/snapshots").failed(1, f"hf://me/ema: {line}")


def test_nothing_there(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = unused_url()
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    line = f".*: no connection to {url[7:]}; check the network and the address"
    outcome(posthoc_here, "s3://bucket/snapshots").failed(1, line)
    outcome(posthoc_here, "http://no-such-host.invalid/run").failed(1, ".*no-such-host.invalid; .+")
    posthoc_here("inspect", f"{url}/run").failed(1, f"{url}/run: .*: no connection to .*")


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "", "http://", "http://a b", "http://a:99999"]
)
def test_endpoints_that_are_none(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    line = f"AWS_ENDPOINT_URL: '{endpoint}' is no URL; write http:// or https:// and the host"
    outcome(posthoc_here, "s3://bucket/snapshots").failed(2, line)


@pytest.mark.parametrize(
    ("scheme", "name", "value", "line"),
    [
        ("s3", "AWS_ENDPOINT_URL", "http://me:secret@host", "has a name or a password; .*"),
        ("az", "AZURE_STORAGE_ENDPOINT", "nowhere", "'nowhere' is no URL; .*"),
        ("s3", "AWS_SESSION_TOKEN", "secret\n", "has a line break, or the like; .*"),
    ],
)
def test_variables_that_make_no_sense(
    scheme: str,
    name: str,
    value: str,
    line: str,
    servers: Servers,
    posthoc_here: Posthoc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    outcome(posthoc_here, f"{scheme}://bucket/snapshots").failed(2, f"{name}: {line}")


def test_an_account_that_is_missing(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    line = "az://bucket/snapshots: .*; set AZURE_STORAGE_ACCOUNT_NAME and .*"
    outcome(posthoc_here, "az://bucket/snapshots").failed(1, line)


def test_nothing_answers(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CLIENT", {**sources.CLIENT, "read_timeout": "200ms"})
    servers.proxy.add(Fault(hang=True, count=-1))
    line = f".*: {servers.proxy.url[7:]} doesn't answer; check the network and the address"
    outcome(posthoc_here, "s3://bucket/snapshots").failed(1, line)


def test_no_parts_of_files(servers: Servers, posthoc_here: Posthoc) -> None:
    with Files(servers.folder, ranges=False) as files:
        line = ".*: is on a server that gives no parts of files; copy the files to a disk, .*"
        outcome(posthoc_here, f"{files.url}/snapshots").failed(1, line)


def test_what_goes_wrong_on_the_way_is_tried_again(
    servers: Servers, posthoc_here: Posthoc, tmp_path: Path
) -> None:
    servers.proxy.add(
        Fault(method="GET", status=500, count=2),
        Fault(ranged=True, after=100, skip=2, count=2),
        Fault(ranged=True, after=100, quietly=True, skip=5, count=2),
        Fault(ranged=True, status=503, skip=20, count=2),
    )
    same(posthoc_here, servers.folder / "snapshots", servers.url("s3", "snapshots"))


def test_a_changed_object_is_noticed(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replaced after its header was read, and one that has another etag from then on."""
    line = r"s3://bucket/changing/ema-.*: changed while it was read; .+"
    url = "s3://bucket/changing"
    for path in (servers.folder / "snapshots").iterdir():
        servers.buckets.put("bucket", f"changing/{path.name}", path.read_bytes())
    servers.proxy.add(Fault(ranged=True, skip=20, count=-1, etag='"another"'))
    outcome(posthoc_here, url).failed(3, line)
    servers.proxy.clear()

    heads = stores.will_open

    def replaced(paths: list[Path]) -> None:
        heads(paths)
        store = objects.remote_store(paths[0])
        for path in paths:
            with store.open(path, ""):
                data = servers.buckets.get("bucket", f"changing/{path.name}")
        servers.buckets.put("bucket", f"changing/{path.name}", data)

    monkeypatch.setattr("posthoc_cli.snapshots.folder.will_open", replaced)
    outcome(posthoc_here, url).failed(3, line)


@pytest.mark.parametrize(
    ("url", "module"), [("s3://bucket/a", "obstore"), ("hf://me/ema/a", "huggingface_hub")]
)
def test_what_is_not_installed(
    url: str, module: str, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    line = f"{url}: needs {module}, which is not installed; pip install .posthoc-cli.remote.."
    outcome(posthoc_here, url).failed(2, line)


# Credentials


def test_profiles(
    servers: Servers, posthoc_here: Posthoc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    keys, config = tmp_path / "credentials", tmp_path / "config"
    keys.write_text("[mine]\naws_access_key_id = ours\naws_secret_access_key = secret\n")
    config.write_text(f"[profile mine]\nregion = eu-north-1\nendpoint_url = {servers.proxy.url}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    servers.buckets.requests.clear()
    assert posthoc_here("inspect", "s3://bucket/snapshots").code == 0
    signed = servers.buckets.requests[0].headers["authorization"]
    assert "Credential=ours/" in signed
    assert "/eu-north-1/s3/" in signed
    monkeypatch.setenv("AWS_PROFILE", "yours")
    line = ".*: there is no AWS profile 'yours'; check AWS_PROFILE"
    outcome(posthoc_here, "s3://bucket/snapshots").failed(2, line)


@pytest.mark.usefixtures("unmeasured")
def test_local_folders_import_none_of_it(snapshots: Path) -> None:
    code = (
        "import sys, posthoc_cli; run = posthoc_cli.open_snapshots('snapshots');"
        "run.solve(gamma=8).save('out.safetensors');"
        "print({'obstore', 'huggingface_hub', 'asyncio', 'posthoc_cli.storage.remote.objects'}"
        " & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=snapshots.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
