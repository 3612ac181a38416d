"""Targets of every kind, through the command and the library."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import posthoc_cli
from posthoc_cli.solver.averages import Decay, LrDecay, Window
from posthoc_cli.solver.profiles import Average, Profile, sigma_rel_to_gamma
from tests.command import Posthoc

LAST, EVERY = 960, 40
AVERAGES: dict[str, Average] = {
    "sigma0.07": Profile(LAST, float(sigma_rel_to_gamma(0.07))),
    "gamma3": Profile(LAST, 3.0),
    "window10pct": Window(LAST, 96),
    "window200": Window(LAST, 200),
    "lr-decay-1-sqrt-20pct": LrDecay(LAST, "1-sqrt", 192),
    "lr-decay-cosine-192": LrDecay(LAST, "cosine", 192),
    "decay0.99": Decay(LAST, 0.99),
    "half-life5pct": Decay(LAST, 2 ** (-1 / 48)),
}
ASKED = [
    *("--half-life", "5%", "--decay", "0.99", "--lr-decay", "1-sqrt:20%,cosine:192"),
    *("--window", "10%,200", "--gamma", "3", "--sigma-rel", "0.07", "--window", "10.0%"),
]


def weights_of(average: Average) -> npt.NDArray[np.float64]:
    return np.diff(average.share(np.arange(LAST + 1.0)), prepend=0.0)


@pytest.fixture(scope="module")
def walk() -> npt.NDArray[np.float64]:
    """A network's way from its start, [steps + 1, values]: noisy steps, ever smaller."""
    rng = np.random.default_rng(3)
    steps = rng.normal(size=(LAST, 400)) / np.sqrt(1 + np.arange(LAST))[:, None]
    return np.vstack([np.zeros((1, 400)), np.cumsum(steps, axis=0)])


@pytest.fixture
def walked(tmp_path: Path, walk: npt.NDArray[np.float64]) -> Path:
    """`walk/` in `tmp_path`: power-function EMAs of the walk, two every 40 steps."""
    folder = tmp_path / "walk"
    folder.mkdir()
    for width in (0.05, 0.10):
        gamma, average = float(sigma_rel_to_gamma(width)), np.zeros(400)
        for step in range(1, LAST + 1):
            decay = (1 - 1 / step) ** (gamma + 1)
            average = decay * average + (1 - decay) * walk[step]
            if step % EVERY == 0:
                metadata = {"step": str(step), "sigma_rel": str(width)}
                save_file(
                    {"w": average.astype(np.float32)},
                    folder / f"{step:04d}-{width:.2f}.safetensors",
                    metadata,
                )
    return folder


@pytest.mark.parametrize(("method", "within"), [("blup", 0.05), ("edm2", 0.08)])
def test_every_kind_in_one_pass_is_near_the_true_average(
    posthoc_here: Posthoc,
    walked: Path,
    walk: npt.NDArray[np.float64],
    method: str,
    within: float,
    check_json: Any,
) -> None:
    run = posthoc_here("synthesize", "walk", *ASKED, "--method", method, "-o", "out/", "--json")
    assert run.code == 0, run.err
    check_json("synthesize", run.json)
    outputs = [Path(target["output"]) for target in run.json["targets"]]
    assert [path.name for path in outputs] == [
        f"walk-step960-{tag}.safetensors" for tag in AVERAGES
    ]
    for path, (tag, average) in zip(outputs, AVERAGES.items(), strict=True):
        true = weights_of(average) @ walk
        made = load_file(walked.parent / path)["w"]
        off = np.linalg.norm(made - true) / np.linalg.norm(true - walk[-1])
        assert off < within * (2 if "1-sqrt" in tag else 1), tag
    for target, average in zip(run.json["targets"], AVERAGES.values(), strict=True):
        told = target["target"]
        assert {key: told[key] for key in average.as_dict()} == average.as_dict()
        assert (told["sigma_rel"], told["gamma"]) == (target["sigma_rel"], target["gamma"])


def test_what_is_made_tells_which_average_it_is(
    posthoc_here: Posthoc, walked: Path, check_json: Any
) -> None:
    template = ["--lr-decay", "1-sqrt:20%", "--window", "200", "-o", "{step}-{target}.safetensors"]
    run = posthoc_here("synthesize", "walk", *template, "--step", "480", "--method", "blup")
    assert (run.code, run.err) == (0, "")
    name = "480-lr-decay-1-sqrt-20pct.safetensors"
    recipe = posthoc_here("inspect", name, "--json").json
    check_json("inspect", recipe)
    target = {"kind": "lr-decay", "step": 480, "shape": "1-sqrt", "length": 96}
    none = {"sigma_rel": None, "gamma": None}
    assert recipe["recipe"]["target"] == {**target, **none, "text": "lr-decay:1-sqrt:20%"}
    assert "lr-decay 1-sqrt:20% (96 steps) at step 480" in posthoc_here("inspect", name).out
    shown = posthoc_here("inspect", "480-window200.safetensors").out
    assert "window 200 (41.7% of 480) at step 480" in shown
    assert posthoc_here("verify", name, "walk", "--full").code == 0
    again = posthoc_here("synthesize", "walk", *template, "--step", "480", "--skip-existing")
    assert again.err.count("exists already; skipped") == 2


def test_solve_shows_targets_of_every_kind(
    posthoc_here: Posthoc, walked: Path, check_json: Any
) -> None:
    run = posthoc_here("solve", "walk", *ASKED, "--diagnose", "--json")
    check_json("solve", run.json)
    assert [entry["target"]["text"] for entry in run.json["diagnosis"]["targets"]] == [
        *("sigma-rel:0.07", "gamma:3", "window:10%", "window:200"),
        *("lr-decay:1-sqrt:20%", "lr-decay:cosine:192", "decay:0.99", "half-life:5%"),
    ]
    lines = posthoc_here("solve", "walk", *ASKED, "-q").out.splitlines()
    assert re.fullmatch("target +sum of weights +noise gain +expected error", lines[0])
    assert lines[3].startswith("window 10%  ")
    one = posthoc_here("solve", "walk", "--decay", "0.99")
    assert one.out.startswith("decay 0.99 (half-life 68.97 steps) at step 960, from 48 snapshots")
    one = posthoc_here("solve", "walk", "--half-life", "5%")
    assert one.out.startswith("half-life 5% (decay 0.985663) at step 960")
    one = posthoc_here("solve", "walk", "--window", "1%", "--method", "edm2")
    assert "window 1%: a profile error of up to " in one.err
    rows = list(csv.DictReader(io.StringIO(posthoc_here("solve", "walk", *ASKED, "--csv").out)))
    assert (rows[-1]["target"], rows[-1]["target_sigma_rel"]) == ("half-life:5%", "")


def test_a_half_life_is_the_decay_that_it_says(posthoc_here: Posthoc, walked: Path) -> None:
    both = ["--half-life", "48", "--decay", repr(2 ** (-1 / 48))]
    targets = posthoc_here("solve", "walk", *both, "--json").json["targets"]
    assert targets[0]["weights"] == targets[1]["weights"]


def test_the_library_takes_the_same(walked: Path) -> None:
    run = posthoc_cli.open_snapshots(walked)
    solution = run.solve(
        sigma_rel=0.07, window=["5%", 480], lr_decay="1-sqrt:10%", decay=0.99, half_life=(48, "1%")
    )
    assert [target.named for target in solution.targets] == [
        *("sigma-rel:0.07", "window:5%", "window:480", "lr-decay:1-sqrt:10%"),
        *("decay:0.99", "half-life:48", "half-life:1%"),
    ]
    assert solution.weights.shape == (7, 48)
    alone = run.solve(window="5%").weights[0]
    assert solution.weights[1] == pytest.approx(alone, abs=1e-9)
    paths = run.paths("{target}.safetensors", window="5%", half_life=48)
    assert [path.name for path in paths] == ["window5pct.safetensors", "half-life48.safetensors"]
    with pytest.raises(posthoc_cli.PosthocError, match=r"^window=: 1000 is longer than the 960 "):
        run.solve(window=1000)


def test_shapes_and_units_hold_on_in_a_list(posthoc_here: Posthoc, walked: Path) -> None:
    lists = ["--lr-decay", "1-sqrt:10%,20%,...,40%,cosine:96", "--window", "48, 96,...,192"]
    targets = posthoc_here("solve", "walk", *lists, "--json").json["targets"]
    assert [target["target"]["text"] for target in targets] == [
        *("window:48", "window:96", "window:144", "window:192"),
        *(f"lr-decay:1-sqrt:{part}%" for part in (10, 20, 30, 40)),
        "lr-decay:cosine:96",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--window", "5 %"], "--window: '5 %' is not a length; give lengths .*"),
        (["--window", "5%,"], "--window: a length is missing in '5%,'; .*"),
        (["--window", "0%"], "--window: 0% is no length; give, say, 480 or 5%"),
        (["--window", "0.05"], r"--window: 0\.05 is less than one step; .* ends in %"),
        (["--window", "0.01%"], r"--window: 0\.01% of step 960 is less than one step; .* 0\.11%.*"),
        (["--window", "961"], "--window: 961 is longer than the 960 steps up to the target; .*"),
        (["--window", "100", "--step", "80"], "--window: 100 is longer than the 80 steps .*"),
        (["--window", "5%,10%,...,480"], "--window: '5%,10%,...,480': the dots lead from 5% .*"),
        (["--window", "5%,10%,...,32%"], "--window: .*: steps of 5 from 10% miss 32%; .* 30 or 35"),
        (["--window", "200%"], "--window: 200% is more than there is; give up to 100%"),
        (["--lr-decay", "1-sqrt"], "--lr-decay: '1-sqrt' has no length; .*1-sqrt:10%"),
        (["--lr-decay", "10%"], "--lr-decay: '10%' has no shape; .*1-sqrt:10%"),
        (["--lr-decay", "cosine:5%,linear"], "--lr-decay: 'linear' has no length; .*"),
        (["--lr-decay", "exp:10%"], "--lr-decay: 'exp' is no shape; choose linear, 1-sqrt or .*"),
        (["--lr-decay", "linear:10%,1-sqrt:20%,...,1-sqrt:40%"], "--lr-decay: .* another kind .*"),
        (["--decay", "1"], "--decay: 1 is out of bounds; give values above 0 and below 1, .*"),
        (["--decay", "5%"], "--decay: '5%' is not a number; .*"),
        (["--half-life", "0"], "--half-life: 0 is no length; .*"),
        (["--half-life", "1e13"], "--half-life: 10000000000000 is out of bounds; .*"),
    ],
)
def test_mistakes_cost_a_line(
    posthoc_here: Posthoc, walked: Path, arguments: list[str], line: str
) -> None:
    posthoc_here("solve", "walk", *arguments).failed(2, line)


def test_a_field_that_says_nothing_of_a_target(posthoc_here: Posthoc, walked: Path) -> None:
    run = posthoc_here("synthesize", "walk", "--window", "5%", "-o", "{gamma}.safetensors")
    run.failed(2, "-o: {gamma} in .* says nothing of window 5%; write {target} in its place")


def test_plot_draws_them(posthoc_here: Posthoc, walked: Path) -> None:
    asked = ["--window", "20%", "--lr-decay", "1-sqrt:20%", "--half-life", "48", "-o", "x.svg"]
    run = posthoc_here("plot", "walk", *asked)
    assert run.code == 0, run.err
    text = (walked.parent / "x.svg").read_text()
    for title in ("window 20%", "lr-decay 1-sqrt:20%", "half-life 48"):
        assert title in text


def test_a_single_snapshot_says_that_nothing_tells_how_far_off_it_is(
    snapshots: Path, posthoc_here: Posthoc
) -> None:
    only = ("solve", "snapshots", "--only", "ema-4000-0.05*")
    done = posthoc_here(*only, "--sigma-rel", "0.05,0.2", "--window", "5%")
    assert done.code == 0
    assert done.err == (
        "posthoc: sigma_rel 0.2 and 1 more: how far off is unknown, as a single snapshot doesn't "
        "tell how the network moved; what comes out is that snapshot\n"
    )
    assert posthoc_here(*only, "--sigma-rel", "0.05").err == ""
