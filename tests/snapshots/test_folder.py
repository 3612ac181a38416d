from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc_cli.errors import MachineError, SnapshotError, UsageError
from posthoc_cli.snapshots import consistency
from posthoc_cli.snapshots import folder as module
from posthoc_cli.snapshots.folder import FolderContents, Snapshot, read_folder, select
from posthoc_cli.solver.profiles import Profile
from posthoc_cli.storage.header import read_header
from posthoc_cli.storage.metadata import read_recipe

END = ".safetensors"
OTHER = {"count": np.ones((), np.int64), "layer.bias": np.ones(3, np.float16)}
NETWORK = {
    "count": np.zeros((), np.int64),
    "layer.bias": np.zeros(3, np.float16),
    "layer.weight": np.zeros((3, 4), np.float16),
}
RECIPE = {"posthoc": json.dumps({"version": "1", "method": "edm2", "target": {}, "sources": []})}

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file names and permissions")


def save(
    path: Path,
    metadata: dict[str, str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    save_file(NETWORK if tensors is None else tensors, path, metadata)
    return path


def save_run(folder: Path, steps: int = 3) -> None:
    """`steps` snapshots of each of two profiles."""
    for step in range(1, steps + 1):
        for gamma in ("6.94", "16.97"):
            save(folder / f"run_{step}00_{gamma}{END}")


def files(inventory: FolderContents) -> list[str]:
    return [snapshot.file for snapshot in inventory.snapshots]


def only_problem(inventory: FolderContents) -> tuple[str, str]:
    (problem,) = inventory.problems
    return problem


# What a folder of snapshots gives


def test_snapshots_come_in_order_with_their_figures(tmp_path: Path) -> None:
    save(tmp_path / f"a_1000_6.94{END}")
    save(tmp_path / f"b_200_6.94{END}")
    save(tmp_path / f"c_200_16.97{END}")
    save(tmp_path / f"0{END}", {"step": "300", "sigma_rel": "0.1"})
    inventory = read_folder(tmp_path)
    assert files(inventory) == [
        f"c_200_16.97{END}", f"b_200_6.94{END}", f"0{END}", f"a_1000_6.94{END}"
    ]  # fmt: skip
    assert (inventory.problems, inventory.skipped, inventory.warnings) == ([], [], [])
    assert inventory.usable() is inventory.snapshots
    third, last = inventory.snapshots[2:]
    assert (third.step, third.sigma_rel, third.source) == (300, 0.1, "metadata")
    assert (last.step, last.gamma, last.source) == (1000, 6.94, "name")
    assert last.profile.step == 1000
    assert last.profile.gamma == 6.94
    assert last.dtypes == {"F16": 2, "I64": 1}
    assert (last.tensors, last.parameters) == (3, 16)
    assert last.bytes == os.path.getsize(tmp_path / last.file)
    assert inventory.folder == tmp_path


def test_snapshots_of_one_network_share_what_is_known_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path, steps=5)
    counted = []
    monkeypatch.setattr(
        module.Contents,
        "of",
        lambda tensors, of=module.Contents.of: counted.append(tensors) or of(tensors),
    )
    compared = []
    monkeypatch.setattr(consistency, "_difference", lambda *tensors: compared.append(tensors))
    found = read_folder(tmp_path).usable()
    assert len(found) == 10
    assert len({id(snapshot.index.tensors) for snapshot in found}) == 1
    assert len(counted) == 1
    assert {snapshot.parameters for snapshot in found} == {16}
    assert not compared


def test_a_snapshot_made_by_hand_has_its_figures_too(tmp_path: Path) -> None:
    layout = read_header(save(tmp_path / f"a{END}"))
    snapshot = Snapshot(layout, Profile(5, 6.94), "name")
    assert (snapshot.dtypes, snapshot.parameters) == ({"F16": 2, "I64": 1}, 16)


def test_pattern_and_profiles(tmp_path: Path) -> None:
    save(tmp_path / f"r1 at 500{END}", {"step": "500", "gamma": "16.97"})
    save(tmp_path / f"r0 at 500{END}")
    inventory = read_folder(tmp_path, pattern="r{index} at {step}.*", profiles=[0.05, 0.1])
    assert [(each.step, each.sigma_rel, each.source) for each in inventory.usable()] == [
        (500, 0.05, "pattern"),
        (500, 0.1, "pattern"),
    ]
    ((file, warning),) = inventory.warnings
    assert file == f"r1 at 500{END}"
    assert warning.startswith("its name says step 500, sigma_rel 0.1, ")


def test_ema_pytorch_files_with_profiles(tmp_path: Path) -> None:
    for name in ("0.100", "1.100", "0.200", "1.200"):
        save(tmp_path / (name + END))
    inventory = read_folder(tmp_path, profiles=[0.05, 0.28])
    assert [each.sigma_rel for each in inventory.usable()] == [0.05, 0.28, 0.05, 0.28]
    assert not inventory.warnings
    without = read_folder(tmp_path)
    assert [file for file, _ in without.problems] == sorted(os.listdir(tmp_path))
    assert "profiles=" in without.problems[0][1]


def test_profiles_that_no_name_calls_for_are_noticed(tmp_path: Path) -> None:
    save_run(tmp_path, steps=1)
    assert read_folder(tmp_path, profiles=[0.05]).warnings == [
        ("", "profiles= isn't used: no file name has an index")
    ]


def test_only_opens_nothing_else(tmp_path: Path) -> None:
    save_run(tmp_path)
    (tmp_path / f"broken{END}").write_bytes(b"")
    inventory = read_folder(tmp_path, only=["run_100_*", f"*_6.94{END}"])
    assert files(inventory) == [
        f"run_100_16.97{END}", f"run_100_6.94{END}", f"run_200_6.94{END}", f"run_300_6.94{END}"
    ]  # fmt: skip
    assert not inventory.problems


# What doesn't count


def test_files_that_are_no_snapshots(tmp_path: Path) -> None:
    save_run(tmp_path, steps=1)
    save(tmp_path / f"out_100_6.94{END}", RECIPE)
    (tmp_path / f".out{END}.0a1b.posthoc-tmp").write_bytes(b"half")
    (tmp_path / f"._run_100_6.94{END}").write_bytes(b"macOS writes such")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / f"run_1_1{END}.bak").write_text("")
    (tmp_path / "deeper").mkdir()
    save(tmp_path / "deeper" / f"run_200_6.94{END}")
    (tmp_path / f"folder_300_6.94{END}").mkdir()
    inventory = read_folder(tmp_path)
    assert files(inventory) == [f"run_100_16.97{END}", f"run_100_6.94{END}"]
    assert not inventory.problems
    assert sorted(inventory.skipped) == [
        ("deeper", "a folder, and neither its name nor its metadata says its step and profile"),
        (f"folder_300_6.94{END}", "a folder, not a file"),
        (f"out_100_6.94{END}", "made by posthoc: it carries a recipe"),
    ]


def test_only_our_outputs_is_no_snapshots(tmp_path: Path) -> None:
    save(tmp_path / f"out{END}", RECIPE)
    inventory = read_folder(tmp_path)
    assert len(inventory.skipped) == 1
    with pytest.raises(SnapshotError, match="holds no snapshots: all 1 files are left out"):
        inventory.usable()


def test_the_recipe_of_a_file(tmp_path: Path) -> None:
    made = read_recipe(read_header(save(tmp_path / f"a{END}", RECIPE)).metadata)
    assert made == {"version": "1", "method": "edm2", "target": {}, "sources": []}
    assert read_recipe(read_header(save(tmp_path / f"b{END}")).metadata) is None


def test_ending_in_capitals_counts(tmp_path: Path) -> None:
    save(tmp_path / "A_100_6.94.SAFETENSORS")
    assert files(read_folder(tmp_path)) == ["A_100_6.94.SAFETENSORS"]


# What is wrong with single files


def test_a_broken_file_leaves_the_others_to_be_seen(tmp_path: Path) -> None:
    save_run(tmp_path)
    broken = tmp_path / f"run_400_6.94{END}"
    broken.write_bytes(save(broken).read_bytes()[:-1])
    save(tmp_path / f"final{END}", tensors=NETWORK | OTHER)
    save(tmp_path / f"zero_0_6.94{END}")
    (tmp_path / f"empty_500_6.94{END}").write_bytes(b"")
    inventory = read_folder(tmp_path)
    assert len(inventory.snapshots) == 6
    assert {file: message.split(" ")[0] for file, message in inventory.problems} == {
        f"empty_500_6.94{END}": "not",
        f"final{END}": "neither",
        f"run_400_6.94{END}": "not",
        f"zero_0_6.94{END}": "its",
    }
    with pytest.raises(SnapshotError) as caught:
        inventory.usable()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / f'empty_500_6.94{END}'}: {inventory.problems[0][1]}")
    assert message.endswith("(and 3 more problems: posthoc inspect lists them)")


def test_one_problem_is_said_alone(tmp_path: Path) -> None:
    save(tmp_path / f"final{END}")
    with pytest.raises(SnapshotError) as caught:
        read_folder(tmp_path).usable()
    assert str(caught.value) == (
        f"{tmp_path / f'final{END}'}: neither its name nor its metadata says its step and profile; "
        "give pattern=, or leave it out with only="
    )


def test_a_file_without_tensors_is_a_problem(tmp_path: Path) -> None:
    save(tmp_path / f"a_100_6.94{END}", tensors={})
    assert only_problem(read_folder(tmp_path))[1].startswith("holds no tensors; ")


def test_a_name_that_does_not_fit_the_pattern_is_a_problem(tmp_path: Path) -> None:
    save_run(tmp_path, steps=1)
    save(tmp_path / f"other{END}", {"step": "5", "gamma": "7"})
    file, message = only_problem(read_folder(tmp_path, pattern="run_{step}_{gamma}.safetensors"))
    assert file == f"other{END}"
    assert message.startswith("its name doesn't fit pattern=")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    save_run(tmp_path, steps=1)
    os.mkfifo(tmp_path / f"fifo_200_6.94{END}")
    file, message = only_problem(read_folder(tmp_path))
    assert file == f"fifo_200_6.94{END}"
    assert "not a regular file" in message


@posix
def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    blob = save(tmp_path / "blob")
    (folder / f"good_100_6.94{END}").symlink_to(blob)
    (folder / f"dead_200_6.94{END}").symlink_to(tmp_path / "gone")
    (folder / f"loop_300_6.94{END}").symlink_to(folder / f"loop_300_6.94{END}")
    inventory = read_folder(folder)
    assert files(inventory) == [f"good_100_6.94{END}"]
    assert [file[:4] for file, _ in inventory.problems] == ["dead", "loop"]
    assert all("leads nowhere" in message for _, message in inventory.problems)


@pytest.mark.parametrize(
    "name",
    [
        "with space_100_6.94",
        "ünï_100_6.94",
        pytest.param("new\nline\x1b[31m_100_6.94", marks=posix),
        pytest.param(
            "bytes\udcff_100_6.94",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode here"),
        ),
    ],
)
def test_unusual_file_names(tmp_path: Path, name: str) -> None:
    content = save(tmp_path / f"plain_200_6.94{END}").read_bytes()
    other = {key: np.ones_like(value) for key, value in NETWORK.items()}
    save(tmp_path / f"plain_200_6.94{END}", tensors=other)
    for step in ("100", "200"):
        path = tmp_path / (name.replace("100", step) + END)
        path.write_bytes(content)
    (tmp_path / (name.replace("_", "-") + END)).write_bytes(content)
    save(tmp_path / (name.replace("100", "300").encode("ascii", "ignore").decode() + END))
    inventory = read_folder(tmp_path)
    assert name + END in files(inventory)
    assert len(inventory.problems) == 2  # the name with hyphens, and step 200 twice
    for _, message in inventory.problems:
        assert message.isprintable()
    with pytest.raises(SnapshotError) as caught:
        inventory.usable()
    assert str(caught.value).isprintable()


def test_what_files_say_of_themselves_is_made_printable(tmp_path: Path) -> None:
    evil = "\x1b]0;evil\x07\n"
    save(tmp_path / f"a{END}", {"step": evil, "gamma": evil})
    save(tmp_path / f"b_100_6.94{END}", tensors={evil: np.zeros(1)})
    save(tmp_path / f"c_200_6.94{END}")
    inventory = read_folder(tmp_path)
    assert len(inventory.problems) == 2
    assert all(message.isprintable() for _, message in inventory.problems)
    assert all("\\x1b]0;evil" in message for _, message in inventory.problems)


@posix
def test_warnings_are_made_printable(tmp_path: Path) -> None:
    save(tmp_path / f"plain{END}").rename(tmp_path / f"\x1b[31m\n_100_6.94{END}")
    assert read_folder(tmp_path).warnings == []
    save(tmp_path / f"plain{END}", {"step": "200"}).rename(tmp_path / f"\x1b[31m\n_100_6.94{END}")
    ((_, warning),) = read_folder(tmp_path).warnings
    assert warning.startswith("its name says step 100, gamma 6.94, ")
    assert warning.isprintable()


# A consistent set


def test_two_of_one_step_and_profile_are_a_problem(tmp_path: Path) -> None:
    save_run(tmp_path)
    save(
        tmp_path / f"same{END}", {"step": "100", "sigma_rel": "0.1"}, NETWORK | OTHER
    )  # gamma 6.94
    inventory = read_folder(tmp_path)
    file, message = only_problem(inventory)
    assert {file, message.split("'")[1]} == {f"run_100_6.94{END}", f"same{END}"}
    assert "step (100)" in message
    assert len(inventory.snapshots) == 7
    with pytest.raises(SnapshotError):
        inventory.usable()


def test_close_widths_are_still_two_profiles(tmp_path: Path) -> None:
    for width in ("0.010", "0.011", "0.287", "0.288"):
        save(tmp_path / f"a-0000100-{width}{END}")
    assert len(read_folder(tmp_path).usable()) == 4


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"layer.weight": np.zeros((4, 3), np.float16)}, "'layer.weight' is F16 [4, 3] here and F"),
        ({"layer.bias": np.zeros(3, np.int32)}, "'layer.bias' is I32 [3] here and F16 [3] in"),
        ({"count": None}, "'count' is missing here and I64 [] in the newest"),
        ({"extra": np.zeros(1)}, "'extra' is F64 [1] here and missing in the newest"),
        ({"z": np.zeros(1), "a": np.zeros(1)}, "'a' is F64 [1] here and missing in"),
    ],
)
def test_another_network_is_a_problem(
    tmp_path: Path, change: dict[str, np.ndarray | None], difference: str
) -> None:
    save_run(tmp_path)
    other = {name: array for name, array in (NETWORK | change).items() if array is not None}
    save(tmp_path / f"odd_250_6.94{END}", tensors=other)
    inventory = read_folder(tmp_path)
    file, message = only_problem(inventory)
    assert file == f"odd_250_6.94{END}"
    assert message.startswith(f"tensor {difference}")
    assert f"the newest snapshot, 'run_300_6.94{END}'; " in message


def test_where_many_agree_the_few_are_named(tmp_path: Path) -> None:
    save_run(tmp_path)
    save(tmp_path / f"odd_400_6.94{END}", tensors={"w": np.zeros(1)})
    file, message = only_problem(read_folder(tmp_path))
    assert file == f"odd_400_6.94{END}"
    assert "and I64 [] in 6 others, such as 'run_300_6.94.safetensors'; " in message


def test_where_as_many_agree_the_newest_is_right(tmp_path: Path) -> None:
    save_run(tmp_path, steps=1)
    for name in ("even_400_6.94", "even_500_6.94"):
        save(tmp_path / (name + END), tensors={"w": np.zeros(1)})
    problems = read_folder(tmp_path).problems
    assert [file for file, _ in problems] == [f"run_100_16.97{END}", f"run_100_6.94{END}"]
    assert all("the newest snapshot, 'even_500_6.94" in message for _, message in problems)


def test_tensors_that_are_settled_may_differ(tmp_path: Path) -> None:
    save_run(tmp_path, steps=2)
    for name, extra in (("a_300_6.94", np.zeros(2)), ("a_400_6.94", np.zeros(3))):
        save(tmp_path / (name + END), tensors=NETWORK | {"cache.extra": extra})
    assert len(read_folder(tmp_path).problems) == 2
    for argument in ("copy", "drop"):
        assert not read_folder(tmp_path, **{argument: ["cache.*"]}).problems
        assert len(read_folder(tmp_path, **{argument: ["layer.*"]}).problems) == 2


def test_the_order_of_tensors_in_a_file_does_not_matter(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
    }
    turned = {
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
    }
    for step, each in ((100, header), (200, turned)):
        text = json.dumps(each).encode()
        path = tmp_path / f"a_{step}_6.94{END}"
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"123")
    found = read_folder(tmp_path).usable()
    assert found[0].index.tensors != found[1].index.tensors


# Wrong folders and options


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder; check the path"):
        read_folder(tmp_path / "nowhere")


def test_file_as_folder(tmp_path: Path) -> None:
    path = save(tmp_path / f"a_1_1{END}")
    with pytest.raises(UsageError, match="is not a folder; give the folder it lies in"):
        read_folder(path)
    with pytest.raises(UsageError, match="is not a folder"):
        read_folder(path / "below")


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read all")
def test_no_permission(tmp_path: Path) -> None:
    path = save(tmp_path / f"a_100_6.94{END}")
    path.chmod(0)
    with pytest.raises(MachineError, match="permission"):
        read_folder(tmp_path)
    tmp_path.chmod(0)
    try:
        with pytest.raises(MachineError, match="permissions"):
            read_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_errors_of_the_machine_go_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    save_run(tmp_path, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        with pytest.raises(MachineError, match="cannot be listed \\(Permission denied\\)"):
            read_folder(tmp_path)

    def unreadable(path: Path, *_: object) -> None:
        raise MachineError(str(path), "cannot be read", "check it")

    monkeypatch.setattr(module, "open_network", unreadable)
    with pytest.raises(MachineError, match="cannot be read"):
        read_folder(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / f".a_1_1{END}").write_bytes(b"")
    with pytest.raises(
        SnapshotError, match=r"holds no \.safetensors files, nor checkpoints .*; give the folder"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "names", [["0.100.pt", "1.100.pt"], ["network-snapshot-0000134-0.050.pkl"], ["A.CKPT"]]
)
def test_folder_of_empty_pickles(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    found = read_folder(tmp_path)
    assert [file for file, _ in found.problems] == names
    assert {"nor a pickle: it is empty; copy it again" in text for _, text in found.problems} == {
        True
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["run_*", "x*"]}, "only=: 'x*' fits none of 2 .safetensors files, such as 'run"),
        ({"only": ["run/run_*"]}, "only=: 'run/run_*' fits none of 2"),
        ({"only": [""]}, "only=: '' fits none of 2"),
        ({"pattern": "x{step}_{gamma}.*"}, "pattern=: 'x{step}_{gamma}.*' fits none of 2"),
        ({"pattern": "run_{step}_{gamma}"}, "pattern=: 'run_{step}_{gamma}' fits none of 2"),
        (
            {"pattern": "run_{step}_16*{gamma}.safetensors", "only": ["*_6.94*"]},
            "pattern=: 'run_{step}_16*{gamma}.safetensors' fits none of 1",
        ),
        ({"pattern": "run"}, "pattern=: neither"),
        ({"pattern": ""}, "pattern=: neither"),
        ({"pattern": "run_{step}_{index}.*"}, "profiles=: missing, as pattern= has {index}"),
        (
            {"pattern": "run_{step}_{gamma}.*", "profiles": [0.1]},
            "profiles=: not used, as pattern= has no {index}",
        ),
        ({"profiles": []}, "profiles=: lists nothing"),
        ({"profiles": [0.1, 0.3]}, "profiles=: 0.3 is not between 0 and 0.2887"),
        ({"profiles": [0.1, 0.0]}, "profiles=: 0 is not between"),
        ({"profiles": [float("nan")]}, "profiles=: nan is not between"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, object], message: str) -> None:
    save_run(tmp_path, steps=1)
    with pytest.raises(UsageError) as caught:
        read_folder(tmp_path, **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


# The target step


def test_select(tmp_path: Path) -> None:
    save_run(tmp_path)
    found = read_folder(tmp_path).usable()
    assert select(found, None) == (found, 300)
    assert select(found, 300) == (found, 300)
    assert select(found, 299) == (found[:4], 299)
    assert select(found, 100) == (found[:2], 100)
    for step, where in ((301, "after the last"), (99, "before the first"), (0, "before"), (-1, "")):
        with pytest.raises(UsageError, match=f"step=: {step} is {where}.*from 100 to 300"):
            select(found, step)
