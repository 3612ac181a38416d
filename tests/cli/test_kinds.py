"""Snapshots of other kinds than power functions, and of several kinds in one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc_cli.solver import Average, Decay, Profile, Schedule, Scheduled, sigma_rel_to_gamma
from tests.command import Posthoc, write_snapshot
from tests.support import read_tensors

END = ".safetensors"
STEPS = tuple(range(100, 1300, 100))


@pytest.fixture(scope="module")
def way() -> np.ndarray:
    """The weights [step, parameter] of a network that walks and drifts; the first is the start."""
    random = np.random.default_rng(0)
    steps = random.normal(0.02, 1.0, (STEPS[-1] + 1, 4000))
    return np.cumsum(steps, axis=0)


def averaged(way: np.ndarray, average: Average) -> np.ndarray:
    """The average by its definition: a sum over all steps."""
    share = average.share(np.arange(average.step + 1.0))
    return np.diff(share, prepend=0.0) @ way[: int(average.step) + 1]


def save(path: Path, way: np.ndarray, average: Average, **metadata: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": averaged(way, average).astype(np.float32)}, path, metadata)


def inspected(posthoc: Posthoc, *arguments: str) -> list[tuple[int, object]]:
    """Step and profile of each snapshot; the profile in short."""
    run = posthoc("inspect", "run", "--json", *arguments)
    assert run.code == 0, run
    short = {"power": "gamma", "decay": "beta", "scheduled": "decay"}
    return [
        (each["step"], each["profile"][short[each["profile"]["kind"]]])
        for each in run.json["snapshots"]
    ]


def test_an_ema_of_fixed_decay_beside_the_network(
    posthoc_here: Posthoc, tmp_path: Path, way: np.ndarray, check_json
) -> None:
    """guided-diffusion's folder: its update is `average = beta average + (1 - beta) network`."""
    ema = way[0].copy()
    for step in range(1, STEPS[-1] + 1):
        ema = 0.99 * ema + 0.01 * way[step]
        if step in STEPS:
            for name, values in ((f"ema_0.99_{step:06d}", ema), (f"model{step:06d}", way[step])):
                path = tmp_path / "run" / f"{name}{END}"
                path.parent.mkdir(exist_ok=True)
                save_file({"w": values.astype(np.float32)}, path)
    save_file({"state": np.zeros(3, np.float32)}, tmp_path / "run" / f"optimizer{END}")
    assert inspected(posthoc_here) == [(step, beta) for step in STEPS for beta in (0.0, 0.99)]
    shown = posthoc_here("inspect", "run").out
    assert "decay 0.99" in shown
    assert shown.endswith("12 steps, 100 to 1200; decay 0.99, raw\n") or "optimizer" in shown
    solved = posthoc_here("solve", "run", "--sigma-rel", "0.07", "--json").json
    check_json("solve", solved)
    assert solved["method"] == "blup"
    wanted = averaged(way, Profile(STEPS[-1], float(sigma_rel_to_gamma(0.07))))
    distance = np.linalg.norm(wanted - way[-1])
    off = {}
    for only in ("*", "ema*", "model*"):
        raw = ("--raw",) if only == "model*" else ()
        target = ("--sigma-rel", "0.07", "--method", "blup", "-o", "x.safetensors", "--force")
        run = posthoc_here("synthesize", "run", *target, "--only", only, *raw)
        assert run.code == 0, run
        made = read_tensors(tmp_path / "x.safetensors")["w"]
        off[only] = np.linalg.norm(made - wanted) / distance
    assert off["*"] < off["ema*"] < 0.05
    assert off["model*"] > 5 * off["ema*"]
    run = posthoc_here("synthesize", "run", *target, "--json")
    check_json("synthesize", run.json)
    recipe = posthoc_here("inspect", "x.safetensors", "--json")
    check_json("inspect", recipe.json)
    assert recipe.json["recipe"]["sources"][1]["profile"] == {
        "kind": "decay",
        "step": 100,
        "beta": 0.99,
    }
    assert "decay 0.99" in posthoc_here("inspect", "x.safetensors", "--all").out
    assert posthoc_here("verify", "x.safetensors", "run").code == 0


def test_power_functions_decays_and_raw_checkpoints_together(
    posthoc_here: Posthoc, tmp_path: Path, way: np.ndarray
) -> None:
    for step in STEPS[1::2]:
        power, folder = Profile(step, 6.94), tmp_path / "run"
        save(folder / f"ema_{step}_6.94{END}", way, power)
        save(folder / f"fixed-{step}{END}", way, Decay(step, 0.98), step=str(step), decay="0.98")
        save(folder / f"net-{step}{END}", way, Decay(step, 0.0))
    mixed = [(step, each) for step in STEPS[1::2] for each in (0.0, 0.98, 6.94)]
    assert sorted(inspected(posthoc_here, "--raw")) == mixed
    posthoc_here("solve", "run", "--sigma-rel", "0.1").failed(3, r".*net-1000.*add --raw .*")
    off = {}
    for exclude in ("nothing*", "net*", "fixed*"):
        arguments = ("--exclude", exclude) if exclude != "nothing*" else ()
        run = posthoc_here(
            *("synthesize", "run", "--raw", "--sigma-rel", "0.07", "-o", "x.safetensors"),
            *("--method", "blup", "--force", *arguments),
        )
        assert run.code == 0, run
        made = read_tensors(tmp_path / "x.safetensors")["w"]
        wanted = averaged(way, Profile(STEPS[-1], float(sigma_rel_to_gamma(0.07))))
        off[exclude] = np.linalg.norm(made - wanted)
    assert off["nothing*"] < min(off["net*"], off["fixed*"])
    for method in ("edm2", "algorithm3", "share"):
        run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1", "--method", method)
        run.failed(2, r"--method \w+: .*; use blup")
    run = posthoc_here(
        *("solve", "run", "--sigma-rel", "0.1", "--exclude", "net*", "--method", "edm2", "--json")
    )
    assert run.json["targets"][0]["profile_error"] < 0.05


NAMED: dict[str, tuple[Sequence[str], tuple[str, ...], list[tuple[int, float]]]] = {
    "guided-diffusion, a task before it": (
        ["inpaint_ema_0.9999_010000", "inpaint_ema_0.9999_020000"],
        (),
        [(10000, 0.9999), (20000, 0.9999)],
    ),
    "a word for the step": (
        ["step1000-ema0.999", "step2000-ema0.999"],
        (),
        [(1000, 0.999), (2000, 0.999)],
    ),
    "a folder of each decay": (
        ["ema-0.99/100", "ema-0.99/200", "ema-0.999/100", "ema-0.999/200"],
        ("--only", "ema-*/*"),
        [(100, 0.99), (100, 0.999), (200, 0.99), (200, 0.999)],
    ),
    "step folders": (
        ["checkpoint-10/ema_0.999", "checkpoint-20/ema_0.999"],
        (),
        [(10, 0.999), (20, 0.999)],
    ),
    "said of all": (
        ["model_ema-100", "model_ema-200"],
        ("--ema-decay", "0.9998"),
        [(100, 0.9998), (200, 0.9998)],
    ),
    "said of those that are called ema": (
        ["ema-100", "ema-200", "net-100", "net-200"],
        ("--ema-decay", "0.99", "--raw"),
        [(100, 0.0), (100, 0.99), (200, 0.0), (200, 0.99)],
    ),
    "a pattern": (
        ["a-100-b0.99", "a-100-b.9", "a-200-b0", "a-200-b0.99"],
        ("--pattern", "a-{step}-b{decay}.safetensors"),
        [(100, 0.9), (100, 0.99), (200, 0.0), (200, 0.99)],
    ),
    "a pattern for the step": (
        ["a-3-ema-100", "a-3-ema-200"],
        ("--pattern", "a-3-ema-{step}.safetensors", "--ema-decay", "0.99"),
        [(100, 0.99), (200, 0.99)],
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_names_that_people_give(posthoc_here: Posthoc, tmp_path: Path, case: str) -> None:
    names, arguments, found = NAMED[case]
    for value, name in enumerate(names):
        path = tmp_path / "run" / (name + END)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_snapshot(path, value)
    assert inspected(posthoc_here, *arguments) == found


REFUSED = {
    "two decays": ("ema_0.99/ema_0.999_100", (), "says two decays, 0.99 and 0.999"),
    "epochs": ("epoch_3", ("--ema-decay", "0.99"), "its name counts epochs, and a decay is one a"),
    "a width": ("ema_0.05_100", (), "nothing says its profile"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_be_something_else_is_refused(
    posthoc_here: Posthoc, tmp_path: Path, case: str
) -> None:
    name, arguments, problem = REFUSED[case]
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    write_snapshot(tmp_path / "run" / (name + END), 1)
    deep = ("--only", "ema*/*") if "/" in name else ()
    run = posthoc_here("inspect", "run", "--json", *arguments, *deep)
    assert run.code == 3
    assert problem in run.json["problems"][0]["message"]


def test_metadata_that_makes_no_sense(posthoc_here: Posthoc, snapshots: Path) -> None:
    write_snapshot(snapshots / f"a{END}", 1, step="1500", decay="1.0")
    write_snapshot(snapshots / f"b{END}", 1, step="1500", decay="0.9", gamma="3")
    write_snapshot(snapshots / f"c{END}", 1, step="1500", decay="x")
    write_snapshot(snapshots / f"d{END}", 1, step="10", decay="0.9", power="-1")
    write_snapshot(snapshots / f"ema_0.99_1600{END}", 1, step="1600", decay="0.999")
    run = posthoc_here("inspect", "snapshots", "--json")
    assert [each["message"].partition(";")[0] for each in run.json["problems"]] == [
        "its metadata says decay 1, not one from 0 to below 1",
        "its metadata has a decay and a gamma",
        "its metadata's decay is 'x', not a plain number",
        "the schedule of its EMA makes no sense: power -1.0 is out of bounds",
    ]
    (warning,) = run.json["warnings"]
    assert warning["message"] == (
        "its name says step 1600, decay 0.99, its metadata step 1600, decay 0.999; the metadata is "
        "used"
    )


def test_the_same_kind_twice_is_a_problem(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_snapshot(tmp_path / "run" / f"ema_0.99_100{END}", 1)
    write_snapshot(tmp_path / "run" / f"again{END}", 2, step="100", decay="0.99")
    write_snapshot(tmp_path / "run" / f"other{END}", 3, step="100", decay="0.9")
    run = posthoc_here("inspect", "run", "--json")
    (problem,) = run.json["problems"]
    assert "has the step (100) and profile (decay 0.99) of " in problem["message"]


def write_config(folder: Path, **told: object) -> None:
    document = {"_class_name": "UNet2DModel", "decay": 0.99, "min_decay": 0.0, **told}
    (folder / "config.json").write_text(json.dumps(document))


def test_an_ema_of_diffusers(
    posthoc_here: Posthoc, tmp_path: Path, way: np.ndarray, check_json
) -> None:
    """The real EMAModel, with its state in the config as `save_pretrained` writes it."""
    torch = pytest.importorskip("torch")
    training_utils = pytest.importorskip("diffusers.training_utils")
    parameter = torch.nn.Parameter(torch.tensor(way[0]))
    ema = training_utils.EMAModel([parameter], decay=0.99, use_ema_warmup=True, inv_gamma=3.0)
    for step in range(1, STEPS[-1] + 1):
        parameter.data = torch.tensor(way[step])
        ema.step([parameter])
        if step in STEPS:
            folder = tmp_path / "run" / f"checkpoint-{step}" / "unet_ema"
            folder.mkdir(parents=True)
            values = ema.shadow_params[0].numpy()
            save_file({"w": values}, folder / f"diffusion_pytorch_model{END}")
            state = ema.state_dict()
            del state["shadow_params"]
            write_config(folder, **state)
    assert inspected(posthoc_here) == [(step, 0.99) for step in STEPS]
    run = posthoc_here("inspect", "run", "--json")
    check_json("inspect", run.json)
    assert {each["source"] for each in run.json["snapshots"]} == {"config"}
    assert "decay up to 0.99" in posthoc_here("inspect", "run").out
    schedule = Schedule(0.99, 3.0, use_ema_warmup=True)
    folder = tmp_path / "run" / "checkpoint-400" / "unet_ema"
    truth = read_tensors(folder / f"diffusion_pytorch_model{END}")["w"]
    assert np.allclose(averaged(way, Scheduled(400, schedule)), truth, rtol=1e-9)
    alone = posthoc_here("inspect", str(folder), "--json").json["snapshots"]
    assert [each["step"] for each in alone] == [400]


def test_an_average_that_began_late(posthoc_here: Posthoc, tmp_path: Path) -> None:
    for step, updates in ((1000, 300), (2000, 1300), (3000, 1500)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        write_snapshot(folder / f"model{END}", step)
        write_config(folder, optimization_step=updates, update_after_step=0)
    run = posthoc_here("inspect", "run", "--json")
    found = [(each["step"], each["profile"]["update_after_step"]) for each in run.json["snapshots"]]
    assert found == [(1000, 700), (2000, 700)]
    (problem,) = run.json["problems"]
    assert problem["message"].startswith("its EMA was updated 1500 times up to step 3000; ")


def test_an_ema_decay_that_no_file_takes_is_said(posthoc_here: Posthoc, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in (100, 200):
        write_snapshot(tmp_path / "run" / f"ema_0.99_{step:06}{END}", step / 100)
    run = posthoc_here("inspect", "run", "--ema-decay", "0.999")
    assert (run.code, "decay 0.99" in run.out) == (0, True)
    assert "warning: --ema-decay isn't used: names, metadata or a config.json say the" in run.err
    assert posthoc_here("inspect", "run", "--ema-decay", "0.99").err == ""
