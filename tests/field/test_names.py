"""Files as people and tools really name them: which number is the step, and which is no profile."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from posthoc_cli.solver import sigma_rel_to_gamma
from posthoc_cli.solver.averages import Decay
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile
from tests.command import Posthoc, write_snapshot
from tests.support import read_tensors

END = ".safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def write(folder: Path, names: Sequence[str], apart: float = 0, **metadata: str) -> None:
    """Networks of the values 1, 2, 3 in the order of training, `apart` seconds from one another."""
    for value, name in enumerate(names, start=1):
        path = folder / (name + END)
        path.parent.mkdir(exist_ok=True)
        write_snapshot(path, value, **metadata)
        os.utime(path, times=(1.7e9 + apart * value,) * 2)
        if path.parent != folder:
            os.utime(path.parent, times=(1.7e9 + apart * value,) * 2)


def steps_of(posthoc: Posthoc, *options: str) -> list[int]:
    """The steps that `inspect --raw` shows, in their order, after it has found no problem."""
    run = posthoc("inspect", "run", "--raw", "--json", *options)
    assert run.code == 0, run
    return [each["step"] for each in run.json["snapshots"]]


def average(posthoc: Posthoc, tmp_path: Path, *options: str) -> float:
    """The value of the network that `synthesize --raw` makes."""
    target = ("--sigma-rel", "0.2", "--method", "share", "-o", "out.safetensors", "--force")
    run = posthoc("synthesize", "run", "--raw", *target, *options)
    assert run.code == 0, run
    return float(read_tensors(tmp_path / "out.safetensors")["body.weight"][0, 0])


def expected(steps: Sequence[float]) -> float:
    """The same of networks 1, 2, 3 at these steps."""
    profiles = [Decay(step, 0.0) for step in steps]
    target = Profile(max(steps), float(sigma_rel_to_gamma(0.2)))
    return float(sum(k * w for k, w in enumerate(solve(profiles, [target], "share").weights[0], 1)))


READ_IN_ONE_WAY: Mapping[str, tuple[Sequence[str], Sequence[int]]] = {
    "Lightning": (
        ["epoch=0-step=500", "epoch=1-step=1000", "epoch=4-step=2500"],
        [500, 1000, 2500],
    ),
    "kohya's epochs": (["style-000001", "style-000002", "style-000004"], [1, 2, 4]),
    "kohya's epochs of a dated name": (
        ["lora_20240115-000001", "lora_20240115-000002", "lora_20240115-000070"],
        [1, 2, 70],
    ),
    "kohya's steps": (["x-step00001200", "x-step00002400"], [1200, 2400]),
    "diffusers, SimpleTuner": (
        [f"checkpoint-{step}/model" for step in (500, 1000, 2500)],
        [500, 1000, 2500],
    ),
    "accelerate's examples": (["step_100/model", "step_200/model", "step_400/model"], [1, 2, 4]),
    "detectron2": (["model_0004999", "model_0009999"], [4999, 9999]),
    "mmdet's epochs": (["epoch_1", "epoch_2", "epoch_12"], [1, 2, 12]),
    "mmdet's iterations": (["iter_8000", "iter_16000", "iter_40000"], [8000, 16000, 40000]),
    "guided-diffusion": (["model010000", "model020000", "model050000"], [1, 2, 5]),
    "nanoGPT with a step": (["ckpt_250", "ckpt_1000"], [250, 1000]),
    "StyleGAN's kimg": (["network-snapshot-000200", "network-snapshot-001000"], [200, 1000]),
    "timm": (["checkpoint-1", "checkpoint-2", "checkpoint-10"], [1, 2, 10]),
    "ai-toolkit": (["name_000000500", "name_000001500"], [500, 1500]),
    "ai-toolkit with a version": (["sd15_v2_000000500", "sd15_v2_000001500"], [500, 1500]),
    "musubi": (["wan-e000001", "wan-e000005"], [1, 5]),
    "fairseq's epochs": (["checkpoint1", "checkpoint2", "checkpoint12"], [1, 2, 12]),
    "fairseq, several updates an epoch": (
        ["checkpoint_1_500", "checkpoint_1_1000", "checkpoint_2_2500"],
        [500, 1000, 2500],
    ),
    "fairseq, an epoch each time": (
        ["checkpoint_1_500", "checkpoint_2_1000", "checkpoint_3_1500"],
        [500, 1000, 1500],
    ),
    "Stable-Baselines3": (["rl_model_10000_steps", "rl_model_30000_steps"], [10000, 30000]),
    "OLMo": (["step1000-tokens4B", "step3000-tokens12B"], [1000, 3000]),
    "ZeRO's": (["global_step500", "global_step2000"], [500, 2000]),
    "not padded": (["net-5", "net-10", "net-100"], [5, 10, 100]),
    "thousands": (["step5k", "step7.5k", "step10k"], [5000, 7500, 10000]),
    "thousands of some": (["step500", "step1k", "step1.5k"], [500, 1000, 1500]),
    "thousands before the word": (["10k_steps", "20k_steps", "50k_steps"], [10, 20, 50]),
    "millions without a word": (
        ["net-500k", "net-1M", "net-1.5M"],
        [500_000, 1_000_000, 1_500_000],
    ),
    "millions alone": (["0.5M", "1M", "1.5M"], [500_000, 1_000_000, 1_500_000]),
    "thousands that are none": (["llama-8k-512px-500", "llama-8k-512px-900"], [500, 900]),
    "short words": (["ep1-it200", "ep2-it450", "ep3-it600"], [200, 450, 600]),
    "iterations in each epoch": (["ep1-it500", "ep2-it500", "ep4-it500"], [1, 2, 4]),
    "a dimension behind": (["lora_1000_64", "lora_2000_64", "lora_5000_64"], [1000, 2000, 5000]),
    "a dimension before": (["lora_64_1000", "lora_64_2000"], [1000, 2000]),
    "a seed and a rate": (["x_seed-7_lr-1e-4_100", "x_seed-7_lr-1e-4_300"], [100, 300]),
    "a loss": (["ckpt_100_0.53", "ckpt_200_0.41", "ckpt_500_0.39"], [100, 200, 500]),
    "a number and its loss": (["ckpt-100-loss-7", "ckpt-200-loss-5"], [100, 200]),
    "updates": (["update-100_v2", "update-300_v2"], [100, 300]),
}


@pytest.mark.parametrize("case", READ_IN_ONE_WAY)
def test_read_in_one_way(posthoc_here: Posthoc, folder: Path, tmp_path: Path, case: str) -> None:
    names, steps = READ_IN_ONE_WAY[case]
    write(folder, names)
    found = steps_of(posthoc_here)
    assert [step * steps[0] for step in found] == [step * found[0] for step in steps]
    assert average(posthoc_here, tmp_path) == pytest.approx(expected(steps), rel=1e-3)
    assert "warning" not in posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2").err


COUNTED_FROM_ZERO = {
    "accelerate": ["checkpoint_0/model", "checkpoint_1/model", "checkpoint_2/model"],
    "timm": ["checkpoint-0", "checkpoint-1", "checkpoint-2"],
    "DiffSynth": ["epoch-0", "epoch-1", "epoch-2"],
    "saves": ["save0", "save1", "save2"],
}


@pytest.mark.parametrize("case", COUNTED_FROM_ZERO)
def test_saves_are_counted_from_zero(
    posthoc_here: Posthoc, folder: Path, tmp_path: Path, case: str
) -> None:
    write(folder, COUNTED_FROM_ZERO[case])
    assert steps_of(posthoc_here) == [1, 2, 3]
    assert average(posthoc_here, tmp_path) == pytest.approx(expected([1, 2, 3]), rel=1e-3)
    run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    assert "from 0 on: save 0 is taken for step 1, and save k for step k + 1" in run.err


@pytest.mark.parametrize("names", [["net-0", "net-500", "net-1000"], ["step0", "step1", "step2"]])
def test_step_0_is_no_save(posthoc_here: Posthoc, folder: Path, names: list[str]) -> None:
    write(folder, names)
    posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2").failed(
        3, rf"run/{names[0]}\.safetensors: its name says step 0, not one .*"
    )


# step, epoch, and step within the epoch
ONETRAINER = ["run-save-2000-5-400", "run-save-2500-6-500", "run-save-4000-10-600"]
DATED = [
    "2024-01-15_22-30-45-save-2000-5-400",
    "2024-01-15_23-02-01-save-2500-6-500",
    "2024-01-16_00-12-59-save-4000-10-600",
]


@pytest.mark.parametrize(
    ("names", "readings", "patterns"),
    [
        (
            ONETRAINER,
            "2000, 5 or 400",
            {
                "run-save-{step}-*-*.safetensors": [2000, 2500, 4000],
                "run-save-*-{step}-*.safetensors": [5, 6, 10],
                "run-save-*-*-{step}.safetensors": [400, 500, 600],
            },
        ),
        (
            DATED,
            "2000, 5 or 400",
            {
                "*-save-{step}-*-*.safetensors": [2000, 2500, 4000],
                "*-save-*-{step}-*.safetensors": [5, 6, 10],
            },
        ),
        (
            ["checkpoint_1_900", "checkpoint_2_1500", "checkpoint_4_3900"],
            "1 or 900",
            {
                "checkpoint_{step}_*.safetensors": [1, 2, 4],
                "checkpoint_*_{step}.safetensors": [900, 1500, 3900],
            },
        ),
        (
            ["run-ep1-it300", "run-ep2-it100", "run-ep3-it200"],
            "step 300 or epoch 1",
            {"run-ep{step}-it*.safetensors": [1, 2, 3]},
        ),
        (
            ["a_42_100", "a_41_200"],
            "42 or 100",
            {"a_*_{step}.safetensors": [100, 200]},
        ),
        (
            ["{a}*b_9_10", "{a}*b_8_20"],
            "8 or 20",
            {"*b_{step}_*.safetensors": [8, 9], "*b_*_{step}.safetensors": [10, 20]},
        ),
        (
            ["net-1k-7", "net-2k-6", "net-3k-5"],
            "1000 or 7",
            {"net-*-{step}.safetensors": [5, 6, 7]},
        ),
    ],
)
def test_read_in_two_ways(
    posthoc_here: Posthoc,
    folder: Path,
    names: list[str],
    readings: str,
    patterns: dict[str, list[int]],
) -> None:
    write(folder, names)
    run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    run.failed(3, r"run/.*: the step in its name can be read in (two|three) ways, .*; give .*")
    assert readings in run.err
    shown = posthoc_here("inspect", "run", "--raw")
    assert shown.code == 3
    for number, (pattern, steps) in enumerate(patterns.items(), start=1):
        assert f"--pattern '{pattern}'" in run.err
        assert re.search(rf"^reading \d: --pattern '{re.escape(pattern)}'$", shown.out, re.M), (
            number
        )
        assert steps_of(posthoc_here, "--pattern", pattern) == steps
    table = shown.out[shown.out.index("\nfile ") :].splitlines()
    assert table[1].split()[:3] == ["file", "reading", "1"]
    assert {line.split()[0] for line in table[2:5]} >= {name + END for name in names[:2]}
    told = posthoc_here("inspect", "run", "--raw", "--json")
    assert told.code == 3
    assert len(told.json["problems"]) == 1


def test_times_tell_which_number_rises(posthoc_here: Posthoc, folder: Path, tmp_path: Path) -> None:
    names = ["net_9_1000", "net_4_2000", "net_7_5000"]  # the first number is a score
    write(folder, names, apart=60)
    assert steps_of(posthoc_here) == [1000, 2000, 5000]
    assert average(posthoc_here, tmp_path) == pytest.approx(expected([1000, 2000, 5000]), rel=1e-3)
    run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    assert "as the files' times go by it (--pattern 'net_*_{step}.safetensors' says" in run.err
    write(folder, names)  # all of one time, as after a copy
    assert posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2").code == 3


def test_times_of_a_copy_say_nothing(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, ["net_4_2000", "net_7_5000", "net_9_1000"], apart=0.01)
    assert posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2").code == 3


def test_times_never_overrule_what_is_read_in_one_way(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, ["step_1000", "step_200", "step_3000"], apart=60)
    assert steps_of(posthoc_here) == [200, 1000, 3000]


def test_metadata_of_some_tells_the_number(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, ["net_9_1000", "net_4_2000", "net_7_5000"])
    for name, step in (("net_9_1000", "1000"), ("net_4_2000", "2000")):
        write_snapshot(folder / (name + END), 1, ss_steps=step)
    assert steps_of(posthoc_here) == [1000, 2000, 5000]


def test_metadata_goes_before_names(posthoc_here: Posthoc, folder: Path) -> None:
    for name, step in zip(ONETRAINER, ("20", "25", "40"), strict=True):
        write(folder, [name], ss_steps=step)
    assert steps_of(posthoc_here) == [20, 25, 40]


def test_the_last_file_of_a_run_is_no_step_64(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, ["style_64-000001", "style_64-000002", "style_64"])
    run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    run.failed(3, r"run/style_64\.safetensors: neither its name nor its metadata says its step; .*")


def test_two_runs_of_one_numbering_are_a_problem(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, ["anna-000001", "anna-000002", "berta-000001", "berta-000002"])
    run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    assert run.code == 3
    assert "run/berta-000001.safetensors: has the step (1) of 'anna-000001" in run.err


def test_shards_without_an_index_are_no_steps(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, [f"model-0000{part}-of-00003" for part in (1, 2, 3)])
    run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2")
    assert run.code == 3


# Profiles


COUNTS_ALONE = {
    "fairseq": ["checkpoint_3_1500", "checkpoint_4_2000", "checkpoint_5_2600"],
    "small updates": ["ckpt_1_30", "ckpt_2_60", "ckpt_3_90"],
    "several updates an epoch": ["ckpt_1_50", "ckpt_1_100", "ckpt_2_150", "ckpt_2_200"],
    "updates within an epoch": ["ckpt_1_50", "ckpt_1_100", "ckpt_2_50", "ckpt_2_100"],
    "step and epoch": ["ckpt_100_1", "ckpt_200_1", "ckpt_300_2", "ckpt_400_2"],
    "many epochs": [f"ckpt_{100 * epoch}_{epoch}" for epoch in range(1, 12)],
    "one alone": ["checkpoint_3_1500"],
}


@pytest.mark.parametrize("case", COUNTS_ALONE)
def test_two_counts_are_no_profile(posthoc_here: Posthoc, folder: Path, case: str) -> None:
    names = COUNTS_ALONE[case]
    write(folder, names)
    run = posthoc_here("solve", "run", "--sigma-rel", "0.2")
    _, step, gamma = min(names).split("_")
    run.failed(
        3,
        rf"run/{min(names)}\.safetensors: its name says two counts, {step} and {gamma}, and no "
        r"profile; add --raw if it is a plain checkpoint and no EMA, else give --pattern.*",
    )


def test_a_loss_is_no_gamma(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, ["ckpt_100_0.53", "ckpt_200_0.41", "ckpt_300_0.39"])
    run = posthoc_here("solve", "run", "--sigma-rel", "0.2")
    run.failed(3, r"run/ckpt_100_0\.53.*: its name says 100 and 0\.53, which is no gamma.*--raw.*")


@pytest.mark.parametrize("gammas", [["6.94", "16.97"], ["7", "17"], ["5", "16.97"], ["6.94"]])
def test_gammas_are_few_and_repeat(posthoc_here: Posthoc, folder: Path, gammas: list[str]) -> None:
    write(folder, [f"ema_{step}_{gamma}" for step in (100, 200, 300) for gamma in gammas])
    run = posthoc_here("inspect", "run", "--json")
    assert run.code == 0
    found = {(each["step"], each["gamma"]) for each in run.json["snapshots"]}
    assert found == {(step, float(gamma)) for step in (100, 200, 300) for gamma in gammas}


def test_a_pattern_makes_it_a_gamma(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, ["ckpt_100_1", "ckpt_200_2", "ckpt_300_3"])
    run = posthoc_here("inspect", "run", "--json", "--pattern", "ckpt_{step}_{gamma}.safetensors")
    assert [(each["step"], each["gamma"]) for each in run.json["snapshots"]] == [
        (100, 1.0),
        (200, 2.0),
        (300, 3.0),
    ]


def test_the_number_before_a_gamma_may_be_the_epoch(posthoc_here: Posthoc, folder: Path) -> None:
    names = [
        f"ema_{step}_{epoch}_{gamma}"
        for step, epoch in ((1500, 3), (2000, 5), (4000, 9))
        for gamma in ("6.94", "16.97")
    ]
    write(folder, names)
    run = posthoc_here("solve", "run", "--sigma-rel", "0.2")
    run.failed(3, r"run/ema_1500_3_.*: the step in its name can be read in two ways, 1500 or 3.*")
    pattern = "ema_{step}_*_{gamma}.safetensors"
    assert f"--pattern '{pattern}' or --pattern 'ema_*_{{step}}_{{gamma}}.safetensors'" in run.err
    shown = posthoc_here("inspect", "run", "--json", "--pattern", pattern)
    assert {each["step"] for each in shown.json["snapshots"]} == {1500, 2000, 4000}


def test_two_emas_of_one_ratio_need_no_question(posthoc_here: Posthoc, folder: Path) -> None:
    write(folder, [f"ema_{epoch}_{500 * epoch}_6.94" for epoch in (1, 2, 3)])
    run = posthoc_here("inspect", "run", "--json")
    assert [each["step"] for each in run.json["snapshots"]] == [500, 1000, 1500]


def test_edm2_names_are_read_as_ever(posthoc_here: Posthoc, folder: Path) -> None:
    write(
        folder,
        [f"net-000{kimg}-0.{width}" for kimg in ("2147", "4194") for width in ("050", "100")],
    )
    run = posthoc_here("inspect", "run", "--json")
    assert {each["step"] for each in run.json["snapshots"]} == {2147328, 4194304}
    assert {each["sigma_rel"] for each in run.json["snapshots"]} == {0.05, 0.1}


# A step that is missing


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ([f"net-{step}" for step in (100, 200, 300, 500)], [400]),
        ([f"net-{step}" for step in (500, 1000, 2000, 2500, 2700)], [1500]),
        ([f"net-{step}" for step in (100, 200, 400, 500, 600, 800, 900, 1000)], [300, 700]),
        ([f"net-{step}" for step in (100, 200, 300, 400)], []),
        ([f"net-{step}" for step in (100, 200, 300, 350)], []),
        ([f"net-{step}" for step in (100, 200, 400, 800)], []),
        ([f"net-{step}" for step in (100, 200, 400)], []),
        ([f"net-{step}" for step in (100, 130, 210, 400, 450)], []),
    ],
)
def test_a_gap_is_told(
    posthoc_here: Posthoc, folder: Path, names: list[str], missing: list[int]
) -> None:
    write(folder, names)
    run = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.2", "--json")
    assert run.code == 0
    assert re.findall(r"warning: no snapshot of step (\d+): all others are", run.err) == [
        str(step) for step in missing
    ]


def test_a_gap_of_one_width_is_told(posthoc_here: Posthoc, folder: Path) -> None:
    for step in (100, 200, 300, 400, 500):
        for gamma in ("6.94", "16.97"):
            if (step, gamma) != (300, "6.94"):
                write(folder, [f"ema_{step}_{gamma}"])
    run = posthoc_here("inspect", "run")
    assert "no snapshot of step 300 and sigma_rel 0.0999723: all others are 100 apart" in run.err


# convert


def checkpoints(folder: Path, names: Sequence[str]) -> None:
    torch = pytest.importorskip("torch")
    for value, name in enumerate(names, start=1):
        torch.save({"body.weight": torch.full((3, 4), float(value))}, folder / name)
        os.utime(folder / name, times=(1.7e9 + 60 * value,) * 2)


def test_convert_takes_two_counts_for_no_profile(posthoc_here: Posthoc, folder: Path) -> None:
    checkpoints(folder, ["ckpt_1_30.pt", "ckpt_2_60.pt", "checkpoint_3_1500.pt"])
    run = posthoc_here("convert", "run", "out", "--json")
    assert run.code == 0
    assert [(each["step"], each["gamma"]) for each in run.json["converted"]] == [(None, None)] * 3
    assert "nothing says its profile, so it is only good for --raw" in run.err


def test_convert_refuses_what_can_be_read_in_two_ways(posthoc_here: Posthoc, folder: Path) -> None:
    names = ["ema_1500_3_6.94.pt", "ema_2000_5_6.94.pt", "ema_4000_9_6.94.pt"]
    checkpoints(folder, names)
    run = posthoc_here("convert", "run", "out", "--json")
    assert run.code == 3
    message = run.json["problems"][0]["message"]
    assert "can be read in two ways, 1500 or 3" in message
    assert "give --pattern 'ema_{step}_*_{gamma}.pt' or" in message
    run = posthoc_here("convert", "run", "out", "--json", "--pattern", "ema_{step}_*_{gamma}.pt")
    assert [each["step"] for each in run.json["converted"]] == [1500, 2000, 4000]


def test_what_was_converted_keeps_its_time(
    posthoc_here: Posthoc, folder: Path, tmp_path: Path
) -> None:
    checkpoints(folder, ["net_9_1000.pt", "net_4_2000.pt", "net_7_5000.pt"])
    assert posthoc_here("convert", "run", "out").code == 0
    run = posthoc_here("inspect", "out", "--raw", "--json")
    assert [each["step"] for each in run.json["snapshots"]] == [1000, 2000, 5000]
