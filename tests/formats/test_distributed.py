"""torch.distributed checkpoints, written by torch itself, are read where they lie."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from posthoc_cli.errors import IncompleteError, SnapshotError
from posthoc_cli.formats import distributed
from posthoc_cli.formats.distributed import is_distributed, read_distributed
from posthoc_cli.storage import read_header
from posthoc_cli.storage.readers import fingerprint
from tests.command import ENVIRONMENT, ROOT, Posthoc
from tests.support import contents

KEYS = {"plain": "state.network"}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that four processes wrote, once a session."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.formats.write_distributed", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("way", ["fsdp", "tensor_parallel", "placed", "plain", "megatron", "hf"])
def test_every_sharding_gives_the_whole_network(written: Path, way: str) -> None:
    cache: dict = {}
    prints = set()
    for step in (100, 200):
        folder = written / way / f"step-{step}"
        assert is_distributed(folder)
        index = read_distributed(folder, KEYS.get(way), cache)
        whole = written / f"{way}-whole" / f"step-{step}.safetensors"
        assert contents(index) == contents(read_header(whole))
        assert index.path == folder
        prints.add(fingerprint(index))
    assert len(prints) == 2
    first = read_distributed(written / way / "step-100", KEYS.get(way), cache)
    again = read_distributed(written / way / "step-200", KEYS.get(way), cache)
    assert first.tensors is again.tensors
    assert not is_distributed(written)
    assert not is_distributed(whole)


def test_first_dimension_shards_are_plain_parts(written: Path) -> None:
    index = read_distributed(written / "fsdp" / "step-100")
    assert all(part.content is None for part in index.parts)
    assert len(index.files) == 2
    assert index.metadata["step"] == "100"


def test_the_key_says_which_dict(written: Path) -> None:
    folder = written / "fsdp" / "step-100"
    for key in ("app.model", "model"):
        chosen = read_distributed(folder, key)
        assert chosen.tensors.keys() == read_distributed(folder).tensors.keys()
    moments = read_distributed(folder, "app.optim.state.up.weight")
    assert moments.tensors.keys() == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(
        SnapshotError, match="step-100: has nothing at key='module'; there is model, optim"
    ):
        read_distributed(folder, "module")


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "fsdp" / "step-100", tmp_path / "step-100"))


def test_what_is_not_finished_is_told(checkpoint: Path) -> None:
    (checkpoint / ".metadata").rename(checkpoint / ".metadata.tmp")
    assert is_distributed(checkpoint)
    with pytest.raises(IncompleteError, match=r"step-100: is not finished: it has no .metadata y"):
        read_distributed(checkpoint)


@pytest.mark.parametrize("seen", [True, False])
def test_missing_and_truncated_files_are_named(checkpoint: Path, seen: bool) -> None:
    cache: dict = {}
    if seen:
        read_distributed(checkpoint, None, cache)
    file = checkpoint / "__1_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(IncompleteError, match=rf"__1_0.distcp: ends too early: .* {size:,} bytes"):
        read_distributed(checkpoint, None, cache)
    file.unlink()
    with pytest.raises(IncompleteError, match=r"__1_0.distcp: is missing: .metadata names it; "):
        read_distributed(checkpoint, None, cache)


def test_a_checkpoint_that_lies_in_another_way_is_read_anew(checkpoint: Path) -> None:
    cache: dict = {}
    read_distributed(checkpoint, None, cache)
    file = checkpoint / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    at = data.rindex(b"PK\x03\x04", 0, data.index(b"torch._utils"))
    data[at : at + 4] = b"PK\x00\x00"
    file.write_bytes(data)
    with pytest.raises(SnapshotError, match=r"__0_0.distcp: .*not a whole checkpoint"):
        read_distributed(checkpoint, None, cache)


def edited(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / ".metadata"
        data = change(path.read_bytes())
        path.unlink()
        path.write_bytes(data)

    return edit


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/should-not-be",)


HOSTILE = {
    "empty": (edited(lambda data: b""), "not a whole checkpoint"),
    "no pickle": (edited(lambda data: b"{}"), "not a whole checkpoint"),
    "cut": (edited(lambda data: data[:-300]), "not a whole checkpoint"),
    "runs something": (edited(lambda data: pickle.dumps(Bomb())), "needs 'posix.system'"),
    "another object": (edited(lambda data: pickle.dumps({"a": 1})), "no Metadata where"),
    "out of the folder": (
        edited(lambda data: data.replace(b"__0_0.distcp", b"../../secret")),
        "names a file that is none of its own",
    ),
    "an impossible place": (
        edited(lambda data: data.replace(b"\x06offset", b"\x06offsat")),
        "shape or place is impossible",
    ),
    "no boxes": (
        edited(lambda data: data.replace(b"\x06chunks", b"\x06chanks")),
        "doesn't say what",
    ),
    "extensions": (
        edited(lambda data: data.replace(b"\x06length", b"\x15transform_descriptors", 1)),
        "extensions, such as compression",
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_metadata_ends_with_one_line(checkpoint: Path, how: str) -> None:
    change, message = HOSTILE[how]
    change(checkpoint)
    with pytest.raises(SnapshotError, match=message) as caught:
        read_distributed(checkpoint)
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert not Path("/tmp/should-not-be").exists()


@pytest.mark.parametrize("seed", range(3))
def test_damaged_metadata_is_refused_or_read(checkpoint: Path, seed: int) -> None:
    """Whatever bytes are changed, there are tensors within the files or one line."""
    rng = np.random.default_rng(seed)
    path = checkpoint / ".metadata"
    original = path.read_bytes()
    refused = 0
    for _ in range(60):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(SnapshotError):
            refused += 1
            contents(read_distributed(checkpoint))
            refused -= 1
    assert refused > 20


def test_a_box_that_is_missing_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = distributed.read_table

    def without_a_box(data: bytes) -> distributed.Table:
        table = real(data)
        del table.entries["app.model.up.weight"].boxes[1]
        return table

    monkeypatch.setattr(distributed, "read_table", without_a_box)
    with pytest.raises(SnapshotError, match=r"parts of 'up.weight' are missing, or there twice"):
        read_distributed(checkpoint)


# Through the command.


def data_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return contents(read_header(path))


@pytest.mark.parametrize("way", ["fsdp", "tensor_parallel", "hf"])
def test_the_same_output_as_from_safetensors(
    written: Path, tmp_path: Path, posthoc_here: Posthoc, way: str
) -> None:
    whole = written / f"{way}-whole"
    mixed = tmp_path / "mixed"
    shutil.copytree(written / way, mixed)
    shutil.rmtree(mixed / "step-200")
    shutil.copy(whole / "step-200.safetensors", mixed)
    for number, folder in enumerate((written / way, mixed, whole)):
        (tmp_path / f"out{number}").mkdir()
        template = f"out{number}/{{sigma_rel}}.safetensors"
        options = ("--raw", "--sigma-rel", "0.2,0.25", "-o", template)
        assert posthoc_here("synthesize", folder, *options).code == 0
    for name in os.listdir(tmp_path / "out2"):
        expected = data_of(tmp_path / "out2" / name)
        assert data_of(tmp_path / "out0" / name) == expected
        assert data_of(tmp_path / "out1" / name) == expected
        assert posthoc_here("verify", f"out0/{name}", written / way).code == 0
    assert len(os.listdir(tmp_path / "out2")) == 2


def test_inspect_and_solve(written: Path, posthoc_here: Posthoc) -> None:
    found = posthoc_here("inspect", written / "fsdp", "--raw", "--json").json
    assert [(each["file"], each["step"]) for each in found["snapshots"]] == [
        ("step-100", 100),
        ("step-200", 200),
    ]
    weights = [
        posthoc_here("solve", written / name, "--raw", "--sigma-rel", "0.2", "--json").json
        for name in ("fsdp", "fsdp-whole")
    ]
    first, second = (
        [(each["step"], each["weight"]) for each in one["targets"][0]["weights"]] for one in weights
    )
    assert first == second
    one = posthoc_here("inspect", written / "fsdp" / "step-200", "--raw", "--json").json
    assert [each["file"] for each in one["snapshots"]] == ["step-200"]
    without = posthoc_here("inspect", written / "fsdp", "--json")
    assert without.code == 3
    assert "--raw" in without.json["problems"][0]["message"]


def test_one_that_is_not_finished_stops_the_command(
    written: Path, tmp_path: Path, posthoc_here: Posthoc
) -> None:
    shutil.copytree(written / "fsdp", tmp_path / "run")
    (tmp_path / "run/step-200/.metadata").unlink()
    options = ("run", "--raw", "--sigma-rel", "0.2")
    message = (
        r".*step-200: is not finished: it has no .metadata yet; wait until it is written, or.*"
    )
    posthoc_here("solve", *options).failed(3, message)
    assert posthoc_here("solve", *options, "--skip-incomplete").code == 0


@pytest.mark.parametrize(
    ("step", "inside", "beside"),
    [
        ("step{}", "model_and_optim", ()),  # OLMo
        ("checkpoint-{}", "pytorch_model_fsdp_0", ("optimizer_0",)),  # accelerate
        ("iter_{:07}", "", ()),  # Megatron-LM
        ("epoch=3-step={}.ckpt", "", ()),  # Lightning
    ],
)
def test_where_trainers_put_them(
    written: Path, tmp_path: Path, posthoc_here: Posthoc, step: str, inside: str, beside: tuple
) -> None:
    for number in (100, 200):
        folder = tmp_path / "run" / step.format(number)
        for name in (inside, *beside):
            shutil.copytree(written / "placed" / f"step-{number}", folder / name)
        (folder / "common.pt").write_bytes(b"not looked at")
    found = posthoc_here("inspect", "run", "--raw", "--json")
    assert found.code == 0, found
    assert [each["step"] for each in found.json["snapshots"]] == [100, 200]
    assert found.json["snapshots"][0]["file"] == os.path.join(step.format(100), inside).rstrip("/")


def test_shards_beside_what_they_were_consolidated_to_are_no_network_of_their_own(
    written: Path, tmp_path: Path, posthoc_here: Posthoc
) -> None:
    for step in (100, 200):
        folder = tmp_path / "run" / f"step-{step}"
        shutil.copytree(written / "hf" / f"step-{step}", folder / "sharded")
        whole = written / "hf-whole" / f"step-{step}.safetensors"
        shutil.copy(whole, folder / "model.safetensors")
    found = posthoc_here("inspect", "run", "--raw", "--json")
    assert found.code == 0, found
    assert [each["file"] for each in found.json["snapshots"]] == ["step-100", "step-200"]


@pytest.mark.parametrize(
    ("names", "tool"),
    [
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "tools/checkpoint/"),
        (["mp_rank_00_000/model_optim_rng.pt", "mp_rank_00_001/a.pt"], "tools/checkpoint/convert"),
        (
            [f"zero_pp_rank_{rank}_mp_rank_00_{what}.pt" for rank in (0, 1) for what in
             ("model_states", "optim_states")],
            "zero_to_fp32.py",
        ),
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "ds_to_universal.py"),
    ],
)  # fmt: skip
def test_networks_cut_by_rank_name_the_tool_that_joins_them(
    tmp_path: Path, posthoc_here: Posthoc, names: list[str], tool: str
) -> None:
    for step in (1000, 2000):
        for name in names:
            file = tmp_path / "run" / f"iter_{step:07}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
    message = rf".*iter_0001000: is a checkpoint of .*, in 2 parts, .*{tool}.*"
    posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2").failed(3, message)
