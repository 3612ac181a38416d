"""Run folders as trainers leave them: which networks in them are averaged, and what is left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import posthoc_cli
from tests.command import Posthoc, Run, write_snapshot
from tests.support import write_shards

STEPS = (100, 200, 300)
MODEL = "model.safetensors"
UNET = "diffusion_pytorch_model.safetensors"


def save(path: Path, value: float, **metadata: str) -> Path:
    """A small network whose weights are all `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_snapshot(path, value, **metadata)
    return path


def save_steps(run: Path, files: Iterable[str], steps: Iterable[int] = STEPS) -> None:
    """Step folders with these files: the first holds step / 100, the others 10 and 20 more..."""
    for step in steps:
        for at, file in enumerate(files):
            save(run / f"checkpoint-{step}" / file, step / 100 + 10 * at)


def save_shards(folder: Path, value: float) -> Path:
    """A network in two shards; its index."""
    return write_shards(folder, {f"w{at}": np.full(4, value, np.float32) for at in (1, 2)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def averaged(posthoc: Posthoc, tmp_path: Path, *arguments: str, at: str = "body.weight") -> float:
    """The value of the raw EMA that comes out, which lies between those of the newest two."""
    out = tmp_path / "out.safetensors"
    out.unlink(missing_ok=True)
    arguments = arguments or ("run",)
    how = ("--raw", "--sigma-rel", "0.02", "--method", "share")
    done = posthoc("synthesize", *arguments, *how, "-o", out, "--json")
    assert done.code == 0, done
    (target,) = done.json["targets"]
    value = float(load_file(out)[at].flat[0])
    values = [each["weight"] for each in target["weights"]]
    assert sum(values) == pytest.approx(1)
    return value


def refused(run: Run, *words: str, code: int = 3) -> None:
    assert run.code == code, run
    for word in words:
        assert word in run.err, run.err


def files(run: Run, key: str = "snapshots") -> list[str]:
    return [each["file"] for each in run.json[key]]


def reasons(run: Run) -> dict[str, str]:
    return {each["file"]: each["reason"] for each in run.json["skipped"]}


# Several files in a step folder


@pytest.mark.parametrize(
    "beside",
    ["optimizer.safetensors", "scheduler.safetensors", "random_states_0.safetensors",
     "rng_state.safetensors", "optimizer-00001-of-00002.safetensors"],
)  # fmt: skip
def test_training_states_never_count(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, beside: str
) -> None:
    save_steps(run, [MODEL, beside])
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_args.bin"):
        (run / "checkpoint-300" / name).write_bytes(b"state")
    assert averaged(posthoc_here, tmp_path) == pytest.approx(3, abs=0.01)
    assert files(posthoc_here("inspect", "run", "--raw", "--json")) == [
        "checkpoint-100", "checkpoint-200", "checkpoint-300"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", [MODEL, UNET, "pytorch_lora_weights.safetensors", "adapter_model.safetensors"]
)
def test_the_well_known_name_is_taken_and_the_other_is_named(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, name: str
) -> None:
    save_steps(run, [name])
    save(run / "checkpoint-300" / "ema_weights.safetensors", 7)
    assert averaged(posthoc_here, tmp_path) == pytest.approx(3, abs=0.01)
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1", "--json")
    assert done.code == 0
    assert "checkpoint-300/ema_weights.safetensors: left out: " in done.err
    assert reasons(done).keys() == {"checkpoint-300/ema_weights.safetensors"}


def test_sharded_and_whole_networks_by_their_well_known_name(
    posthoc_here: Posthoc, tmp_path: Path, run: Path
) -> None:
    for step in STEPS:
        save_shards(run / f"checkpoint-{step}", step / 100)
        save(run / f"checkpoint-{step}" / "notes.safetensors", 50)
    assert averaged(posthoc_here, tmp_path, at="w2") == pytest.approx(3, abs=0.01)


def test_a_second_file_in_the_newest_alone_is_asked_for(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, ["lora.safetensors"])
    save(run / "checkpoint-300" / "ema.safetensors", 7)
    done = posthoc_here("synthesize", "run", "--raw", "--sigma-rel", "0.1", "-o", "x.safetensors")
    refused(
        done,
        "checkpoint-300: holds 2 networks ('ema.safetensors', 'lora.safetensors')",
        "--only '*/ema.safetensors' or --only '*/lora.safetensors'",
    )
    assert not (run.parent / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [(["--only", "*/lora.safetensors"], 3), (["--exclude", "ema*"], 3), (["--only", "ema*"], 7)],
)
def test_only_and_exclude_decide(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, option: list[str], value: float
) -> None:
    save_steps(run, ["lora.safetensors"])
    save(run / "checkpoint-300" / "ema.safetensors", 7)
    assert averaged(posthoc_here, tmp_path, "run", *option) == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize(
    "names",
    [
        [MODEL, "pytorch_lora_weights.safetensors"],
        [MODEL, "model_1.safetensors"],
        [f"unet/{UNET}", f"unet_ema/{UNET}"],
        [f"unet/{UNET}", f"text_encoder/{MODEL}"],
        [f"transformer/{UNET}", f"text_encoder_2/{MODEL}"],
        [MODEL, f"unet_ema/{UNET}"],
        [f"ema/unet/{UNET}", f"live/unet/{UNET}"],
    ],
)
def test_two_networks_a_step_are_refused_with_the_choices(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, names: list[str]
) -> None:
    save_steps(run, names)
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
    refused(done, "run/checkpoint-100: holds 2 networks", "as 2 more do; choose one of them with")
    for at, name in enumerate(names):
        key = name.rpartition("/")[0] or name
        assert f"--only '*/{key}'" in done.err
        value = averaged(posthoc_here, tmp_path, "run", "--only", f"*/{key}")
        assert value == pytest.approx(3 + 10 * at, abs=0.01)


@pytest.mark.parametrize("folder", ["model_{}", "ema-{}", "{}", "epoch_{}", "global_step{}"])
def test_step_folders_of_other_names(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, folder: str
) -> None:
    for step in (2, 3):
        save(run / folder.format(step) / "unet" / UNET, step)
    assert averaged(posthoc_here, tmp_path) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("name", [f"unet/{UNET}", f"transformer/{UNET}", f"weights/ema/{MODEL}"])
def test_a_network_one_or_two_folders_below(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, name: str
) -> None:
    save_steps(run, [name])
    assert averaged(posthoc_here, tmp_path) == pytest.approx(3, abs=0.01)
    below = name.rpartition("/")[0]
    expected = [f"checkpoint-{step}/{below}" for step in STEPS]
    assert files(posthoc_here("inspect", "run", "--raw", "--json")) == expected
    made = load_recipe(tmp_path / "out.safetensors")
    assert [each["file"] for each in made["sources"]] == expected
    assert posthoc_here("verify", "out.safetensors", "run", "--full").code == 0
    shutil.move(run / "checkpoint-200" / name, run / "checkpoint-200" / "gone")
    again = posthoc_here("verify", "out.safetensors", "run", "--json")
    assert [each["file"] for each in again.json["problems"]] == [f"checkpoint-200/{below}"]


def load_recipe(path: Path) -> dict:
    from posthoc_cli.storage import open_tensors
    from posthoc_cli.storage.metadata import read_recipe

    return read_recipe(open_tensors(path).metadata) or {}


def test_a_network_in_another_folder_in_the_newest_step(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [f"unet/{UNET}"], (100, 200))
    save_steps(run, [f"unet_ema/{UNET}"], (300,))
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
    refused(done, "checkpoint-300/unet_ema: its network lies in 'unet_ema/'", "in 'unet/'")


def test_one_without_the_network_asked_for_is_named(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [f"unet/{UNET}", f"unet_ema/{UNET}"], (100, 200))
    save_steps(run, [f"unet/{UNET}"], (300,))
    (run / "checkpoint-400").mkdir()
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1", "--only", "*/unet_ema")
    assert done.code == 0
    assert "posthoc: checkpoint-300: left out: nothing in it fits --only '*/unet_ema'" in done.err
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1", "--only", "*/unet")
    assert "300/unet" in done.out


def test_a_pattern_for_the_path(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [f"unet/{UNET}", f"unet_ema/{UNET}"])
    done = posthoc_here(
        "inspect", "run", "--raw", "--json",
        "--pattern", "checkpoint-{step}/unet_ema/*.safetensors",
    )  # fmt: skip
    assert [each["step"] for each in done.json["snapshots"]] == [*STEPS]
    assert all("unet_ema" in file for file in files(done))


def test_two_profiles_in_each_step_folder(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, ["ema_0.05.safetensors", "ema_0.10.safetensors"])
    asked = "solve", "run", "--sigma-rel", "0.07"
    refused(posthoc_here(*asked), "holds 2 networks ('ema_0.05.safetensors'")
    done = posthoc_here(
        *asked, "--pattern", "checkpoint-{step}/ema_{sigma_rel}.safetensors", "--json"
    )
    assert len(done.json["targets"][0]["weights"]) == 6


# What isn't whole, or of another format


@pytest.mark.parametrize("written", [1, 2])
def test_shards_without_their_index(posthoc_here: Posthoc, run: Path, written: int) -> None:
    for step in (100, 200):
        save_shards(run / f"checkpoint-{step}", step / 100)
    save_shards(run / "checkpoint-300", 3).unlink()
    if written == 1:
        (run / "checkpoint-300" / "model-00002-of-00002.safetensors").unlink()
    asked = "solve", "run", "--raw", "--sigma-rel", "0.1"
    refused(posthoc_here(*asked), "run/checkpoint-300: there are shards, but the index")
    done = posthoc_here(*asked, "--skip-incomplete")
    assert done.code == 0
    assert "checkpoint-300: left out: incomplete: " in done.err


def test_shards_without_their_index_in_the_folder_itself(posthoc_here: Posthoc, run: Path) -> None:
    save(run / "net-100.safetensors", 1)
    save_shards(run, 2).unlink()
    for path in run.glob("model-*"):
        path.rename(run / path.name.replace("model", "net-200"))
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
    refused(done, "net-200.safetensors.index.json: there are shards, but")


def save_torch(path: Path, value: float) -> Path:
    """The network of `save` as torch saves it."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    state = load_file(save(path.with_name("made.safetensors"), value))
    path.with_name("made.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize(
    "name", ["checkpoint-{}/pytorch_model.bin", "checkpoint-{}.pt", "checkpoint-{}.ckpt"]
)
def test_some_steps_in_another_format(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, name: str
) -> None:
    save_steps(run, [MODEL])
    for step in (400, 500):
        save_torch(run / name.format(step), step / 100)
    value = averaged(posthoc_here, tmp_path, "run")
    assert value == pytest.approx(5, abs=0.03)
    (run / name.format(600)).parent.mkdir(exist_ok=True)
    (run / name.format(600)).write_bytes(b"x")
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
    refused(done, "run/checkpoint-600", "neither a checkpoint of torch nor a pickle, but plain")


def test_the_same_step_in_another_format_is_left_out(posthoc_here: Posthoc, run: Path) -> None:
    save(run / "net-100.safetensors", 1)
    save(run / "net-200.safetensors", 2)
    (run / "net-200.pt").write_bytes(b"x")
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1", "--json")
    assert done.code == 0
    assert reasons(done) == {"net-200.pt": "there is a .safetensors file of its step"}
    assert "net-200.pt: left out" in done.err


def test_what_training_goes_on_from_is_no_snapshot(posthoc_here: Posthoc, run: Path) -> None:
    for step in (100, 200):
        save(run / f"ema_{step}_6.94.safetensors", step)
    (run / "epoch=3-step=150.ckpt").write_bytes(b"x")
    done = posthoc_here("solve", "run", "--sigma-rel", "0.1")
    assert done.code == 0
    assert "epoch=3-step=150.ckpt: left out: not a safetensors file" in done.err
    (run / "ema_300_6.94.pt").write_bytes(b"x")
    done = posthoc_here("solve", "run", "--sigma-rel", "0.1")
    refused(done, "ema_300_6.94.pt: neither a checkpoint of torch nor a pickle, but plain")


def test_an_empty_step_folder_is_named(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [MODEL])
    (run / "checkpoint-400").mkdir()
    (run / "logs").mkdir()
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
    assert done.code == 0
    (line,) = [each for each in done.err.splitlines() if "left out" in each]
    assert line == "posthoc: checkpoint-400: left out: a folder without a network"


# The last file of a run


@pytest.mark.parametrize("final", [MODEL, f"best/{MODEL}", f"final/{MODEL}"])
@pytest.mark.parametrize("value", [3, 3.5])
def test_a_final_network_beside_the_step_folders(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, final: str, value: float
) -> None:
    save_steps(run, [MODEL])
    save(run / final, value)
    name = final.removesuffix(f"/{MODEL}")
    if value == 3:
        assert averaged(posthoc_here, tmp_path) == pytest.approx(3, abs=0.01)
        done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
        assert f"{name}: left out: holds the same values as 'checkpoint-300'" in done.err
        return
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
    refused(done, f"run/{name}: ", f"leave it out with --exclude {name}, or put its step into")
    assert averaged(posthoc_here, tmp_path, "run", "--exclude", name) == pytest.approx(3, abs=0.01)


def test_a_final_pipeline_beside_the_step_folders(
    posthoc_here: Posthoc, tmp_path: Path, run: Path
) -> None:
    save_steps(run, [f"unet/{UNET}"])
    save(run / "unet" / UNET, 3)
    save_file({"t": np.zeros(3, np.float32)}, save(run / "text_encoder_2" / MODEL, 0))
    save_file({"v": np.zeros(3, np.float32)}, save(run / "vae" / UNET, 0))
    assert averaged(posthoc_here, tmp_path) == pytest.approx(3, abs=0.01)
    done = posthoc_here("inspect", "run", "--raw", "--json")
    assert reasons(done).keys() == {"unet", "text_encoder_2", "vae"}
    save(run / "unet" / UNET, 4)
    asked = "solve", "run", "--raw", "--sigma-rel", "0.1"
    refused(posthoc_here(*asked), "run/unet: ", "leave it out with --exclude ./unet, or")
    assert posthoc_here(*asked, "--exclude", "./unet").code == 0


@pytest.mark.parametrize("metadata", [{}, {"ss_steps": "300"}])
def test_the_last_file_of_kohya(
    posthoc_here: Posthoc, tmp_path: Path, run: Path, metadata: dict[str, str]
) -> None:
    for epoch in (1, 2, 3):
        save(run / f"style-{epoch:06d}.safetensors", epoch, ss_steps=str(100 * epoch))
    save(run / "style.safetensors", 3, **metadata)
    save(run / "style-000003-state" / MODEL, 3)
    assert averaged(posthoc_here, tmp_path) == pytest.approx(3, abs=0.01)
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1", "--json")
    assert len(done.json["targets"][0]["weights"]) == 3
    assert reasons(done)["style.safetensors"] == (
        "holds the same values as 'style-000003.safetensors'"
    )
    assert "the training state beside" in reasons(done)["style-000003-state"]
    save(run / "style.safetensors", 5, **metadata)
    done = posthoc_here("solve", "run", "--raw", "--sigma-rel", "0.1")
    refused(done, "run/style.safetensors: ", "--exclude style.safetensors")


def test_our_own_outputs_are_one_line(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [MODEL])
    asked = "run", "--raw", "--sigma-rel", "0.1,0.15"
    assert posthoc_here("synthesize", *asked, "-o", "run/").code == 0
    done = posthoc_here("solve", *asked)
    assert (done.code, done.err.count("left out")) == (0, 1)
    assert done.err.startswith("posthoc: 2 files: left out: made by posthoc")


# Choosing files


def test_globs_that_fit_nothing_are_told(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [MODEL])
    for option in ("--only", "--exclude"):
        done = posthoc_here("inspect", "run", "--raw", option, "*-100", option, "best*")
        refused(done, f"{option}: 'best*' fits none of 3 .safetensors files", code=2)
    done = posthoc_here("inspect", "run", "--raw", "--exclude", "checkpoint-*")
    refused(done, "--exclude: 'checkpoint-*' leaves none of 3", code=2)


def test_brackets_fit_themselves(posthoc_here: Posthoc, run: Path) -> None:
    for step in (1, 2):
        save(run / f"net[v2]-{step}.safetensors", step)
        save(run / f"net2-{step}.safetensors", step)
    for glob, names in (
        ("net[v2]-1.safetensors", ["net[v2]-1.safetensors"]),
        ("net[v2]-*", ["net2-1.safetensors", "net2-2.safetensors"]),
        ("*[v2]-2.safetensors", ["net2-2.safetensors"]),
    ):
        done = posthoc_here("inspect", "run", "--raw", "--only", glob, "--json")
        assert files(done) == names
    for path in run.glob("net2-*"):
        path.unlink()
    done = posthoc_here("inspect", "run", "--raw", "--only", "net[v2]-*", "--json")
    assert len(files(done)) == 2


def test_paths_below_the_folder(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [f"ema/{MODEL}", f"live/{MODEL}"])
    for options in (
        ["--only", "checkpoint-*/ema/*"],
        ["--only", "checkpoint-*/ema"],
        ["--only", "**/ema/model.safetensors"],
        ["--only", "ema"],
        ["--exclude", "*/live"],
        ["--exclude", "live/"],
    ):
        done = posthoc_here("inspect", "run", "--raw", *options, "--json")
        assert files(done) == [f"checkpoint-{step}/ema" for step in STEPS], options


def test_a_folder_without_a_number_by_its_path(posthoc_here: Posthoc, run: Path) -> None:
    for step in STEPS:
        save(run / "ema" / f"net_{step}_6.94.safetensors", step)
    save(run / "net_100_16.97.safetensors", 1)
    done = posthoc_here("inspect", "run", "--only", "ema/*", "--json")
    assert [each["step"] for each in done.json["snapshots"]] == [*STEPS]
    assert files(done)[0] == "ema/net_100_6.94.safetensors"


@pytest.mark.parametrize("command", ["inspect", "solve", "synthesize"])
def test_files_by_shell_glob(posthoc_here: Posthoc, run: Path, command: str) -> None:
    for step in STEPS:
        save(run / f"net-{step}.safetensors", step)
    save(run / "other.safetensors", 9)
    target = [] if command == "inspect" else ["--sigma-rel", "0.1"]
    output = ["-o", "x.safetensors"] if command == "synthesize" else []
    given = sorted(str(path.relative_to(run.parent)) for path in run.glob("net-[23]*"))
    done = posthoc_here(command, *given, "--raw", *target, *output, "--json")
    assert done.code == 0, done
    assert done.json["folder"] == "run"
    found = done.json["snapshots"] if command == "inspect" else done.json["targets"][0]["weights"]
    assert [each["file"] for each in found] == ["net-200.safetensors", "net-300.safetensors"]


def test_folders_and_shards_by_shell_glob(posthoc_here: Posthoc, run: Path) -> None:
    save_steps(run, [f"unet/{UNET}", f"unet_ema/{UNET}"], (100, 200))
    save_shards(run / "sharded-300", 3)
    given = [run / f"checkpoint-{step}" / "unet_ema" for step in (100, 200)]
    done = posthoc_here("inspect", *given, "--raw", "--json")
    assert files(done) == ["checkpoint-100/unet_ema", "checkpoint-200/unet_ema"]
    done = posthoc_here("inspect", *(run / "sharded-300").glob("*.safetensors"), "--raw", "--json")
    assert done.code == 3  # nothing in this folder says the step
    assert done.json["problems"][0]["file"] == f"{MODEL}.index.json"
    (run / "notes.txt").write_text("")
    refused(posthoc_here("inspect", run / "notes.txt"), "notes.txt: no .safetensors file, nor")
    done = posthoc_here("solve", *given, "run/nowhere", "--raw", "--sigma-rel", "0.1")
    refused(done, "run/nowhere: there is no such file or folder; check the path", code=2)


def test_the_library_takes_a_list(run: Path) -> None:
    for step in STEPS:
        save(run / f"net-{step}.safetensors", step)
    opened = posthoc_cli.open_snapshots(sorted(run.glob("net-[12]*")), raw=True)
    assert [each.step for each in opened.snapshots] == [100, 200]
    assert opened.folder == run


def test_a_misspelt_command(posthoc_here: Posthoc) -> None:
    for word, meant in (("synthesise", "synthesize"), ("verfy", "verify"), ("Solve", "solve")):
        done = posthoc_here(word, "run")
        refused(done, f"{word}: no such command; did you mean {meant}?", code=2)
