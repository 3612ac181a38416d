"""Ranks that share one call: the same bytes, told once, and what happens when one dies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc_cli.cli.ranks import Place, find_address, find_place, first_node
from posthoc_cli.errors import UsageError
from posthoc_cli.storage import read_header
from posthoc_cli.storage.ranks import Part
from posthoc_cli.synthesis.parts import parts_of
from posthoc_cli.synthesis.plan import make_plan
from tests.command import COMMAND, ENVIRONMENT, Posthoc
from tests.ranked import OWN_DISK, RankRun, group, run_groups
from tests.servers.buckets import Buckets, Object
from tests.synthesis.test_products import peft
from tests.synthesis.test_products import write as write_lora

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")

TWO = ["--sigma-rel", "0.06,0.09"]
OUTPUTS = {
    "one.safetensors": ["synthesize", "run", "--sigma-rel", "0.07"],
    "blup.safetensors": ["synthesize", "run", "--sigma-rel", "0.07", "--method", "blup"],
    "several/": ["synthesize", "run", *TWO, "--dtype", "float32"],
    "shards.safetensors": ["synthesize", "run", "--gamma", "5", "--max-shard-size", "300kB"],
    "folder": ["synthesize", "run", "--sigma-rel", "0.1", "--layout", "folder"],
    "for.safetensors": ["synthesize", "run", "--gamma", "9", "--target-for", "*.bias=0.1"],
    "raw.safetensors": ["synthesize", "raw", "--raw", "--window", "2000"],
    "deltas.safetensors": ["synthesize", "packed", "--sigma-rel", "0.08"],
    "lora.safetensors": ["synthesize", "lora", "--raw", "--gamma", "3", "--lora", "exact"],
}
OWN = f"/dev/fd/{OWN_DISK}"
Groups = dict[str, list[list[RankRun]]]
BIG = ["synthesize", "big", "--sigma-rel", "0.07", "-o"]


def write_run(folder: Path, *, raw: bool = False, elements: int = 70_001) -> None:
    """6 snapshots with tensors that never vary, that are no numbers, and that hold NaN."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    walk = rng.standard_normal(elements)
    fixed = rng.standard_normal(40_000).astype(np.float32)
    for at in range(6):
        walk = walk + 0.05 * rng.standard_normal(elements)
        odd = np.array([1.0, np.nan if at == 2 else 2.0, 3.0], np.float32)
        tensors = {
            "body.weight": walk.astype(np.float16),
            "body.bias": (2 * walk[:33_333]).astype(np.float32),
            "fixed": fixed,
            "odd": odd,
            "steps": np.array(at, np.int64),
            "tail": walk[::2].astype(np.float16),
        }
        said = {"step": str(1000 * (at + 1)), "sigma_rel": ("0.05", "0.10")[at % 2]}
        if raw:
            said = {"step": said["step"]}
        save_file(tensors, folder / f"step{1000 * (at + 1)}.safetensors", said)
    (folder / "config.json").write_text('{"model_type": "none"}')


def _synthesize(into: str) -> list[list[str]]:
    return [[*command, "-o", f"{into}/{output}"] for output, command in OUTPUTS.items()]


def _commands(size: int) -> list[list[str]]:
    """What each group runs; its outputs lie below a folder of its own."""
    return [
        *_synthesize(f"g{size}"),
        ["verify", f"g{size}/one.safetensors", "run", "--full", "--json"],
        ["synthesize", "run", "--sigma-rel", "0.07", "-o", f"g{size}/said.safetensors", "--json"],
        [*BIG, f"g{size}/big.safetensors"],
        *FAILING.values(),
    ]


FAILING = {
    "no such option": ["solve", "run", "--sigmarel", "0.07"],
    "a file that exists": ["synthesize", "run", "--gamma", "5", "-o", "run/step1000.safetensors"],
    "strict": ["synthesize", "run", "--gamma", "5", "-o", "never.safetensors", "--strict"],
    "version": ["--version"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that are used."""
    made = tmp_path_factory.mktemp("ranks")
    write_run(made / "run")
    write_run(made / "raw", raw=True)
    write_run(made / "big", elements=600_000)
    write_lora(made / "lora", peft)
    pack = [COMMAND, "pack", "run", "packed", "--dtype", "float8_e4m3fn", "-q"]
    subprocess.run(pack, cwd=made, env=ENVIRONMENT, check=True)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Buckets]:
    """A bucket with `run/` in it."""
    pytest.importorskip("obstore")
    with Buckets("bucket") as server:
        for path in (folder / "run").iterdir():
            server.buckets["bucket"][f"run/{path.name}"] = Object(path.read_bytes(), 1)
        yield server


def _with_buckets(size: int) -> list[list[str]]:
    words = ["synthesize", "s3://bucket/run", "--gamma", "5,9", "-q", "-o"]
    return [
        [*words, f"b{size}/"],
        [*words, f"s3://bucket/b{size}/whole/"],
        [*words, f"s3://bucket/b{size}/shards/", "--max-shard-size", "100kB"],
    ]


@pytest.fixture(scope="module")
def groups(folder: Path, server: Buckets) -> Groups:
    """What groups of ranks came to, by name; all run at once."""
    odd = [
        [*BIG, f"{OWN}/x.safetensors", "-q"],
        [*BIG, f"{OWN}/x.safetensors", "--max-shard-size", "400kB", "-q"],
        [*BIG, f"{OWN}/x.safetensors", "--max-shard-size", "400kB", "-q"],
        [*BIG, f"{OWN}/y.safetensors", "--max-shard-size", "400kB", "--strict", "-q"],
        ["solve", "run", "--sigma-rel", "0.0%rank%7"],
    ]
    wanted = {
        "g1": group(1, _commands(1), "g1"),
        "g2": group(2, _commands(2), "g2"),
        "g3": group(3, _commands(3), "g3"),
        "odd": group(2, odd, "odd"),
        "shards": group(
            1, [[*BIG, "shards/x.safetensors", "--max-shard-size", "400kB", "-q"]], "shards"
        ),
        "b1": group(1, _with_buckets(1), "b1"),
        "b2": group(2, _with_buckets(2), "b2"),
        "g5": group(5, _synthesize("g5"), "g5", pages=True),
        "short": group(2, [[*BIG, "short/x.safetensors", "-q"]], "short", short=1),
        "ctrl-c": group(3, [[*BIG, "ctrl-c/x.safetensors", "-q"]], "ctrl-c", interrupted=True),
        "ctrl-c of one": group(
            3, [[*BIG, "ctrl-c-1/x.safetensors", "-q"]], "ctrl-c-1", interrupted=True, dies=1
        ),
        "early ctrl-c": group(
            3,
            [[*BIG, "ctrl-c-0/x.safetensors", "-q"]],
            "ctrl-c-0",
            *(0, None, True),
            interrupted=True,
            early=True,
        ),
        "early death": group(
            3, [[*BIG, "early/x.safetensors", "-q"]], "early", 1, None, True, early=True
        ),
        "k0": group(2, [[*BIG, "k0/x.safetensors", "-q"]], "k0", dies=0),
        "k1": group(3, [[*BIG, "k1/x.safetensors", "-q"]], "k1", dies=1),
        "k2": group(3, [[*BIG, "k2/x.safetensors", "-q"]], "k2", dies=2),
    }
    runs = run_groups(folder, *wanted.values(), env=server.environment())
    return dict(zip(wanted, runs, strict=True))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_bytes_are_those_of_one_process(folder: Path, groups: Groups, size: int) -> None:
    """Five of them write whole pages, as clients of a file server may."""
    runs = groups[f"g{size}"][: len(OUTPUTS)]
    assert [[run.code for run in ranks] for ranks in runs] == [[0] * size] * len(OUTPUTS), runs
    for ranks, alone in zip(runs, groups["g1"], strict=False):
        assert ranks[0].err.replace(f"g{size}/", "g1/") == alone[0].err
        assert all(not run.out and not run.err for run in ranks[1:])
    wanted, found = (_files(folder / f"g{each}") for each in (1, size))
    assert {name for name in found if found[name] != wanted[name]} == set()
    assert size == 5 or {*found} == {*wanted}
    assert len(found) > len(OUTPUTS)
    assert not [name for name in found if name.endswith(".posthoc-tmp")]


@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_reads_as_much(folder: Path, groups: Groups, size: int) -> None:
    (ranks,) = [runs for runs in groups[f"g{size}"] if "big.safetensors" in runs[0].out]
    (alone,) = [runs for runs in groups["g1"] if "big.safetensors" in runs[0].out]
    share = alone[0].read / size
    read = [run.read for run in ranks]
    assert all(abs(each - share) < 0.1 * share for each in read), (share, read)


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_told_is_the_same(groups: Groups, size: int) -> None:
    at = len(OUTPUTS)
    for own, alone in zip(groups[f"g{size}"][at : at + 2], groups["g1"][at:], strict=False):
        assert [run.code for run in own] == [0] * size, own
        told, wanted = (
            re.sub(rf'g{n}/|"seconds": [0-9.e-]+', "", run.out)
            for n, run in ((size, own[0]), (1, alone[0]))
        )
        assert told == wanted


@pytest.mark.parametrize("size", [2, 3])
def test_a_mistake_is_told_once(folder: Path, groups: Groups, size: int) -> None:
    ours, alone = (groups[name][-len(FAILING) :] for name in (f"g{size}", "g1"))
    for ranks, (wanted,) in zip(ours, alone, strict=True):
        assert [run.code for run in ranks] == [wanted.code] * size
        assert (ranks[0].out, ranks[0].err) == (wanted.out, wanted.err)
        assert all(not run.out and not run.err for run in ranks[1:])
    assert [wanted.code for (wanted,) in alone] == [2, 2, 3, 0]
    assert not (folder / "never.safetensors").exists()


def test_a_rank_that_can_not_write(folder: Path, groups: Groups) -> None:
    (ranks,) = groups["short"]
    ranks[0].failed(1, r"short/x.safetensors: cannot be written \(File too large\); raise .*")
    assert (ranks[1].code, ranks[1].out, ranks[1].err) == (1, "", "")
    assert not _files(folder / "short")


@pytest.mark.parametrize(
    ("name", "into"),
    [("ctrl-c", "ctrl-c"), ("ctrl-c of one", "ctrl-c-1"), ("early ctrl-c", "ctrl-c-0")],
)
def test_an_interrupt(folder: Path, groups: Groups, name: str, into: str) -> None:
    (ranks,) = groups[name]
    assert [run.code for run in ranks] == [130] * 3, ranks
    assert [run.err for run in ranks] == ["posthoc: interrupted\n", "", ""]
    assert not _files(folder / into)


def test_a_rank_that_dies_before_all_have_met(groups: Groups) -> None:
    (ranks,) = groups["early death"]
    ranks[0].failed(1, "rank 1: has ended, or its machine can't be reached; .*")
    assert (ranks[2].code, ranks[2].out, ranks[2].err) == (1, "", "")


def test_disks_of_their_own(folder: Path, groups: Groups) -> None:
    whole, shards, again, strict, _ = groups["odd"]
    whole[0].failed(2, rf"{OWN}: isn't the same folder for rank 1 \(on .*\): .*--max-shard-size")
    assert [run.code for run in shards] == [0, 0], shards
    again[0].failed(2, rf"{OWN}/x.safetensors.index.json: exists already; .*")
    strict[0].failed(3, "tensor 'odd': 1 NaN values .*; nothing is written, as --strict says")
    assert [(run.code, run.out, run.err) for run in (whole[1], again[1], strict[1])] == [
        (2, "", ""),
        (2, "", ""),
        (3, "", ""),
    ]
    wanted = _files(folder / "shards")
    one, other = (_files(folder / "odd" / f"disk{rank}") for rank in (0, 1))
    assert {*one} & {*other} == set()
    assert one | other == wanted
    assert len(one) > len(other) > 0  # the index is among them


def test_buckets(folder: Path, server: Buckets, groups: Groups) -> None:
    codes = [[run.code for run in ranks] for name in ("b1", "b2") for ranks in groups[name]]
    assert codes == [[0]] * 3 + [[0, 0]] * 3, groups["b2"]
    one, two = (_files(folder / name) for name in ("b1", "b2"))
    assert len(one) == 2
    assert one == two
    objects = server.buckets["bucket"]
    one, two = (
        {key[3:]: objects[key].data for key in objects if key.startswith(prefix)}
        for prefix in ("b1/", "b2/")
    )
    assert len(one) > 8
    assert one == two
    assert not server.uploads


def test_other_arguments(groups: Groups) -> None:
    ranks = groups["odd"][-1]
    ranks[0].failed(2, "rank 1: was given other arguments than rank 0 .*; .*")
    assert (ranks[1].code, ranks[1].out, ranks[1].err) == (2, "", "")


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_dead_rank_ends_the_others(
    folder: Path, groups: Groups, posthoc_here: Posthoc, dead: int
) -> None:
    (ranks,) = groups[f"k{dead}"]
    left = [run for at, run in enumerate(ranks) if at != dead]
    assert [run.code for run in left] == [1] * len(left), ranks
    told = "".join(run.err for run in left)
    line = f"posthoc: rank {dead}: has ended, or its machine can't be reached; see .*\n"
    assert re.fullmatch(line, told), told
    assert all(run.seconds < 30 for run in left)
    into = folder / f"k{dead}"
    assert not (into / "x.safetensors").exists()
    assert bool(list(into.glob(".*.posthoc-tmp"))) == (dead == 0)
    words = [folder / word if word == "big" else word for word in BIG]
    again = posthoc_here(*words, into / "x.safetensors", "-q")
    assert again.code == 0, again
    assert not list(into.glob(".*.posthoc-tmp"))


def test_torchrun(folder: Path, groups: Groups) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "--no-python", COMMAND]
    done = subprocess.run(
        [*command, *OUTPUTS["one.safetensors"], "-o", "torchrun.safetensors"],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torchrun.safetensors") == 1
    made = (folder / "torchrun.safetensors").read_bytes()
    assert made == (folder / "g1" / "one.safetensors").read_bytes()


# Which processes are ranks

TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
MPI = {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1"}
STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (TORCH, Place(1, 4, 1)),
        (TORCH | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        (STEP, Place(2, 3, 0)),
        # A batch script has these, though nothing was started by srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        # A launcher within a step, whose daemons are the step's tasks.
        (STEP | {f"OMPI_COMM_WORLD_{key}": value for key, value in MPI.items()}, Place(5, 8, 1)),
        (STEP | {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "3"}, Place(5, 8, 3)),
        # As some scripts say it to torch, of a step.
        (STEP | {"SLURM_LOCALID": "1", "RANK": "2", "WORLD_SIZE": "3"}, Place(2, 3, 1)),
    ],
)
def test_find_place(environment: dict[str, str], place: Place | None) -> None:
    assert find_place(environment) == place


def test_variables_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="RANK: '-1' is not a whole number"):
        find_place(TORCH | {"RANK": "-1"})
    with pytest.raises(UsageError, match="RANK: 4 is none of 4 ranks"):
        find_place(TORCH | {"RANK": "4"})
    with pytest.raises(UsageError, match=r"MASTER_ADDR: is not set, and this is one of 3 ranks"):
        find_address(Place(0, 3, 0), STEP)
    with pytest.raises(UsageError, match=r"WORLD_SIZE: '9{20}' is not a whole number"):
        find_place(TORCH | {"WORLD_SIZE": "9" * 20})
    for port in ("0", "abc", "-5", "99999", "9" * 30):
        with pytest.raises(UsageError, match=f"MASTER_PORT: '{port}' is no port"):
            find_address(Place(0, 3, 0), {"MASTER_ADDR": "here", "MASTER_PORT": port})
    assert find_place({"RANK": "", "WORLD_SIZE": ""}) is None


def test_where_they_meet() -> None:
    place = Place(0, 3, 0)
    said = {"MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    slurm = {"SLURM_STEP_NODELIST": "gpu[07-09,12],login", "SLURM_JOB_ID": "9300123"}
    assert find_address(place, said | slurm) == ("here", 29500)
    node, port = find_address(place, slurm)
    assert (node, 0 < port - 12_000 < 18_000) == ("gpu07", True)
    assert find_address(place, slurm | {"SLURM_STEP_ID": "1"}) == (node, port + 1)
    with pytest.raises(UsageError, match=r"MASTER_PORT: is not set.*29500, or run one .* -u PMI"):
        find_address(place, {"MASTER_ADDR": "here"})
    lists = ("a", "a,b", "a[3,5]", "a[3-5]", "r[1-2]n[01-16],x", "r1n[01-16]-ib,x", "")
    assert [*map(first_node, lists)] == ["a", "a", "a3", "a3", "r1n01", "r1n01-ib", ""]


def test_a_program_that_a_rank_starts_is_alone(posthoc: Posthoc, snapshots: Path) -> None:
    """As a training script may, all ranks of which share the variables; unless it is a launcher."""
    code = "import os, subprocess, sys; sys.exit(subprocess.run(sys.argv[2:]%s).returncode)"
    by_shell = ["sh", "-c", f"{COMMAND} inspect {snapshots}; exit $?"]
    for environment, changed, alone in (
        (TORCH, "", True),
        (STEP | {"SLURM_STEP_ID": "3"}, "", True),
        (TORCH, ", env=os.environ | {'TORCHELASTIC_RUN_ID': 'another'}", False),
        (STEP | {"SLURM_STEP_ID": "3"}, ", env=os.environ | {'SLURM_STEP_ID': '4'}", False),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code % changed, "-", *by_shell],
            env=ENVIRONMENT | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode == 0) == alone, done
        assert not alone or not done.stderr


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    devices = [Part(rank, 8, rank % 4).device("cuda") for rank in range(8)]
    assert devices == 2 * ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [Part(1, 8, 1).device(name) for name in ("cpu", "cuda:2")] == ["cpu", "cuda:2"]
    assert Part().device("cuda") == "cuda"


# The parts


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_parts_are_all_of_the_plan(folder: Path, size: int) -> None:
    paths = sorted((folder / "run").glob("*.safetensors"))
    plan = make_plan([read_header(path) for path in paths], 5)
    parts = [chunk for part in parts_of(plan, size) for chunk in part]
    for whole in plan.whole():
        own = [chunk for chunk in parts if chunk.segment is whole.segment]
        assert [0, *(each.last for each in own)] == [*(each.first for each in own), whole.elements]
    read = [sum(map(plan.bytes_of, part)) for part in parts_of(plan, size)]
    assert max(read) - min(read) < 64 * 4 * 6 * len(plan.segments)


def _files(folder: Path) -> dict[str, bytes]:
    """The outputs in a group's folder: nothing that it has told, nor what it printed as JSON."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".jsonl"
    }
