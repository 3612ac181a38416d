from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posthoc_cli.errors import SnapshotError
from posthoc_cli.snapshots.identity import Identity, identify
from posthoc_cli.snapshots.names import compile_pattern
from posthoc_cli.snapshots.raw import agree_on_unit, step_counts
from posthoc_cli.solver.profiles import gamma_to_sigma_rel, sigma_rel_to_gamma

END = ".safetensors"


def refusal(name: str, metadata: dict[str, str], pattern: str | None = None) -> str:
    with pytest.raises(SnapshotError) as caught:
        identify(name, metadata, compile_pattern(pattern) if pattern else None, (0.05, 0.1))
    return str(caught.value)


@given(st.integers(1, 2**53), st.floats(1e-6, 1e6))
def test_metadata_as_a_training_loop_writes_it(step: int, gamma: float) -> None:
    identity, warnings = identify(f"x{END}", {"step": str(step), "gamma": str(gamma)})
    assert (identity.step, identity.gamma, identity.source) == (step, gamma, "metadata")
    assert identity.sigma_rel == gamma_to_sigma_rel(gamma)
    assert not warnings
    width = float(gamma_to_sigma_rel(gamma))
    if width < 0.288:
        other, _ = identify(f"x{END}", {"step": str(step), "sigma_rel": str(width)})
        assert (other.step, other.sigma_rel) == (step, pytest.approx(width, rel=1e-12))
        assert other.gamma == pytest.approx(gamma, rel=1e-6, abs=1e-6)
        both = {"step": str(step), "sigma_rel": str(width), "gamma": str(gamma)}
        assert identify(f"x{END}", both) == (identity, [])


@pytest.mark.parametrize(
    ("gamma", "sigma_rel"),
    [("6.94", "0.1"), ("6.94", "0.100"), ("6.9", "0.1"), ("7", "0.1"), ("6.9372039376", "0.1")],
)
def test_gamma_and_sigma_rel_agree_within_rounding(gamma: str, sigma_rel: str) -> None:
    identity, _ = identify(f"x{END}", {"step": "9", "gamma": gamma, "sigma_rel": sigma_rel})
    assert identity.gamma == float(gamma)


@pytest.mark.parametrize(("gamma", "sigma_rel"), [("6.94", "0.05"), ("16.97", "0.1")])
def test_gamma_and_sigma_rel_that_contradict_are_a_problem(gamma: str, sigma_rel: str) -> None:
    message = refusal(f"x{END}", {"step": "9", "gamma": gamma, "sigma_rel": sigma_rel})
    assert f"gamma {gamma} is sigma_rel {gamma_to_sigma_rel(float(gamma)):.4g}" in message
    assert f"but its sigma_rel is {sigma_rel}" in message


BAD = ["nan", "inf", "-inf", "-1", "0", "0.0", "1e400", "", "abc", "1_000", " 5", "٣", "9" * 5000]


@pytest.mark.parametrize("value", [*BAD, "1.5", "1e-3", str(2**53 + 1)])
def test_metadata_step_that_is_none(value: str) -> None:
    # The name could be read; a broken promise of the metadata is said all the same.
    message = refusal(f"a_1000_6.94{END}", {"step": value, "gamma": "6.94"})
    assert "metadata" in message
    assert "step" in message
    assert len(message) < 200


@pytest.mark.parametrize("value", [*(bad for bad in BAD if bad not in ("0", "0.0")), "1e13"])
def test_metadata_gamma_that_is_none(value: str) -> None:
    message = refusal(f"a_1000_6.94{END}", {"step": "1000", "gamma": value})
    assert "metadata" in message
    assert "gamma" in message
    assert len(message) < 200


@pytest.mark.parametrize("value", [*BAD, "0.28867513459481287", "0.3", "1e-300", "5e-324"])
def test_metadata_sigma_rel_that_is_none(value: str) -> None:
    message = refusal(f"a_1000_6.94{END}", {"step": "1000", "sigma_rel": value})
    assert "metadata" in message
    assert "sigma_rel" in message
    both = refusal(f"x{END}", {"step": "1000", "gamma": "6.94", "sigma_rel": value})
    assert "sigma_rel" in both


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a_0_6.94", "step 0"),
        ("a_1000_-1", "gamma -1"),
        ("a-0000000-0.050", "step 0"),
        ("a-0000134-0.000", "sigma_rel 0"),
        ("a-0000134-0.289", "sigma_rel 0.289"),
        ("2.1000", "index 2"),
        ("a_" + "9" * 200 + "_6.94", "step 1e+200"),
    ],
)
def test_name_that_says_what_cannot_be(name: str, says: str) -> None:
    assert f"its name says {says}," in refusal(name + END, {})


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, "neither its name nor its metadata says its step and profile"),
        ({"format": "pt"}, "neither its name nor its metadata"),
        ({"step": "5"}, "its metadata has only step"),
        ({"gamma": "5"}, "its metadata has only gamma"),
        ({"gamma": "6.94", "sigma_rel": "0.1"}, "its metadata has only gamma and sigma_rel"),
    ],
)
def test_file_that_nothing_can_be_read_from(metadata: dict[str, str], problem: str) -> None:
    message = refusal(f"model{END}", metadata)
    assert message.startswith(f"model{END}: {problem}")
    assert "pattern=" in message


@given(st.integers(1, 2**53), st.floats(-0.999, 0))
def test_gamma_down_to_minus_one(step: int, gamma: float) -> None:
    width = float(gamma_to_sigma_rel(gamma))  # may be above 12^-0.5, or that of another gamma
    both = {"step": str(step), "gamma": str(gamma), "sigma_rel": str(width)}
    identity, warnings = identify(f"x{END}", both)
    assert (identity.step, identity.gamma, identity.sigma_rel) == (step, gamma, width)
    assert not warnings


def test_gamma_below_zero_that_contradicts_its_width() -> None:
    message = refusal(f"x{END}", {"step": "9", "gamma": "-0.3", "sigma_rel": "0.1"})
    assert "gamma -0.3 is sigma_rel 0.2995" in message


@pytest.mark.parametrize(
    ("name", "pattern", "gamma"),
    [
        ("x1000_-0.3", "x{step}_{gamma}.safetensors", -0.3),
        ("x1000--0.3", "x{step}-{gamma}.safetensors", -0.3),
        ("x1000-0.3", "x{step}-{gamma}.safetensors", 0.3),
        ("x1000-0.3", "x{step}*{gamma}.safetensors", 0.3),
        ("x_1000_-0.3", None, -0.3),
    ],
)
def test_minus_signs_and_hyphens(name: str, pattern: str | None, gamma: float) -> None:
    identity, _ = identify(name + END, {}, compile_pattern(pattern) if pattern else None)
    assert (identity.step, identity.gamma) == (1000, gamma)


def test_index_takes_its_width_from_the_profiles() -> None:
    identity, _ = identify(f"1.200{END}", {}, None, (0.05, 0.1))
    assert (identity.step, identity.sigma_rel, identity.source) == (200, 0.1, "name")
    assert identity.gamma == sigma_rel_to_gamma(0.1)


def test_index_past_the_profiles_matters_only_where_the_name_decides() -> None:
    assert "index 2" in refusal(f"2.200{END}", {})
    assert "index 2" in refusal(f"2.200{END}", {}, "{index}.{step}.*")
    identity, warnings = identify(f"2.200{END}", {"step": "200", "gamma": "7"}, None, (0.05, 0.1))
    assert (identity.source, warnings) == ("metadata", [])
    assert "index 2" in refusal(f"2.200{END}", {"step": "200", "gamma": "7"}, "{index}.{step}.*")


@pytest.mark.parametrize(
    ("name", "metadata", "warned"),
    [
        ("a_1000_6.94", {"step": "1000", "sigma_rel": "0.1"}, False),
        ("a_1000_6.94", {"step": "1001", "sigma_rel": "0.1"}, True),
        ("a_1000_6.94", {"step": "1000", "sigma_rel": "0.05"}, True),
        ("a-0000134-0.100", {"step": "134500", "gamma": "6.94"}, False),
        ("a-0000134-0.100", {"step": "135000", "gamma": "6.94"}, True),
        ("1.1000", {"step": "1000", "gamma": "6.94"}, False),
        ("0.1000", {"step": "1000", "gamma": "6.94"}, True),
        ("model", {"step": "1000", "gamma": "6.94"}, False),
        ("a_0_0", {"step": "1000", "gamma": "6.94"}, True),
        ("a_1000_-0.3", {"step": "1000", "gamma": "-0.3"}, False),
        ("a_1000_-0.3", {"step": "1000", "gamma": "-0.6"}, True),
    ],
)
def test_metadata_wins_over_the_name(name: str, metadata: dict[str, str], warned: bool) -> None:
    identity, warnings = identify(name + END, metadata, None, (0.05, 0.1))
    assert identity.step == int(metadata["step"])
    assert identity.source == "metadata"
    assert len(warnings) == warned
    if warned:
        assert "its name says step" in warnings[0]
        assert f"its metadata step {metadata['step']}, " in warnings[0]
        assert "the metadata is used" in warnings[0]


@pytest.mark.parametrize(
    ("metadata", "warning"),
    [
        ({}, None),
        ({"step": "1000", "gamma": "6.94"}, None),
        ({"step": "2000", "gamma": "6.94"}, "its metadata step 2000, gamma 6.94"),
        ({"step": "1000", "sigma_rel": "0.05"}, "its metadata step 1000, sigma_rel 0.05"),
        ({"step": "1000", "gamma": "nan"}, "its metadata's gamma is 'nan'"),
        ({"step": "1000", "gamma": "-1"}, "its metadata says gamma -1"),
        ({"step": "1000"}, None),
        ({"step": "2000"}, "its metadata step 2000 and no profile"),
        ({"step": "epoch 3"}, None),
        ({"gamma": "5.0"}, None),  # half a statement, of whatever gamma
    ],
)
def test_pattern_wins_over_the_metadata(metadata: dict[str, str], warning: str | None) -> None:
    pattern = compile_pattern("x{step}-{sigma_rel}.safetensors")
    identity, warnings = identify(f"x1000-0.100{END}", metadata, pattern)
    assert (identity.step, identity.sigma_rel, identity.source) == (1000, 0.1, "pattern")
    assert len(warnings) == (warning is not None)
    if warning is not None:
        assert warning in warnings[0]
        assert "the pattern is used" in warnings[0]
        assert "step 1000, sigma_rel 0.1" in warnings[0]


def test_metadata_without_a_profile_leaves_it_to_the_name() -> None:
    identity, warnings = identify(f"a_1000_6.94{END}", {"step": "2000"})
    assert (identity.step, identity.source) == (1000, "name")
    assert warnings == [
        "its name says step 1000, gamma 6.94, its metadata step 2000 and no profile; "
        "the name is used"
    ]


def test_pattern_keeps_the_conventions_out() -> None:
    message = refusal(f"a_1000_6.94{END}", {"step": "1", "gamma": "1"}, "x{step}-{gamma}*")
    assert "its name doesn't fit pattern='x{step}-{gamma}*'" in message


# Raw checkpoints


def settled(
    files: dict[str, dict[str, str]], pattern: str | None = None
) -> tuple[dict[str, tuple[int, str]], dict[str, str], list[str]]:
    """Steps and sources, problems, and warnings, by stem."""
    compiled = compile_pattern(pattern, raw=True) if pattern else None
    said = {stem: step_counts(stem + END, metadata, compiled) for stem, metadata in files.items()}
    steps, problems = {}, {}
    for stem, outcome in agree_on_unit(said).items():
        if isinstance(outcome, Identity):
            assert (outcome.gamma, outcome.sigma_rel) == (float("inf"), 0.0)
            steps[stem] = outcome.step, outcome.source
        else:
            problems[stem] = str(outcome)
    return steps, problems, [text for each in said.values() for text in each.warnings]


def kohya(steps: int, epoch: int) -> dict[str, str]:
    return {"ss_steps": str(steps), "ss_epoch": str(epoch), "ss_network_alpha": "8"}


def test_a_folder_of_kohyas() -> None:
    files = {
        "x-000001": kohya(150, 1),
        "x-000002": kohya(300, 2),
        "x-step00000200": kohya(200, 2),
        "x": kohya(450, 3),
    }
    steps, problems, warnings = settled(files)
    assert not problems
    assert not warnings  # an epoch in the name doesn't contradict the steps
    assert steps == {
        "x-000001": (150, "metadata"),
        "x-000002": (300, "metadata"),
        "x-step00000200": (200, "metadata"),
        "x": (450, "metadata"),
    }


def test_our_own_key_comes_first() -> None:
    assert settled({"x-7": {"step": "5", "ss_steps": "6"}})[0] == {"x-7": (5, "metadata")}


def test_what_kohya_doesnt_know_says_nothing() -> None:
    files = {"x-3": {"ss_steps": "None", "ss_epoch": "0"}, "x-4": {}}
    assert settled(files)[0] == {"x-3": (3, "name"), "x-4": (4, "name")}


def test_all_count_in_the_unit_that_all_have() -> None:
    # Two were stripped of their metadata: only the names say something of all.
    steps, problems, _ = settled({"x-000001": kohya(150, 1), "x-000002": {}, "x-000003": {}})
    assert not problems
    assert steps == {
        "x-000001": (1, "name"), "x-000002": (2, "name"), "x-000003": (3, "name")
    }  # fmt: skip
    steps, _, _ = settled({"a": {"ss_epoch": "1"}, "b": {"ss_epoch": "2", "ss_steps": "300"}})
    assert steps == {"a": (1, "metadata"), "b": (2, "metadata")}
    steps, _, _ = settled({"a-step100": {"ss_epoch": "1"}, "b": {"ss_epoch": "2", "step": "200"}})
    assert steps == {"a-step100": (100, "name"), "b": (200, "metadata")}


def test_who_counts_otherwise_is_a_problem() -> None:
    files = {"x-000001": kohya(150, 1), "x-step00000300": {}, "x-000003": {}, "final_v2": {}}
    steps, problems, _ = settled(files)
    assert steps == {"x-000001": (150, "metadata"), "x-step00000300": (300, "name")}
    assert problems == {
        "x-000003": "x-000003: its name says 3, but not in steps, as 2 others do; give pattern=, "
        "or leave it out with only=",
        "final_v2": "final_v2: neither its name nor its metadata says its step; put its step at "
        "the end of its name, or leave it out with only=",
    }


def test_nothing_says_any_step() -> None:
    steps, problems, _ = settled({"a": {}, "b": {"format": "pt"}})
    assert not steps
    assert all("neither its name nor its metadata says its step" in p for p in problems.values())
    assert agree_on_unit({}) == {}


@pytest.mark.parametrize("step", ["0", str(2**53 + 1)])
def test_raw_step_out_of_bounds(step: str) -> None:
    _, problems, _ = settled({"x": {"step": step}})
    assert "its metadata's step says step" in problems["x"]
    assert "not one from 1 to 2^53" in problems["x"]


def test_raw_metadata_step_that_is_none() -> None:
    with pytest.raises(SnapshotError, match=r"metadata's step is '1\.5', not a whole number"):
        step_counts(f"x-1{END}", {"step": "1.5"})


def test_a_name_that_says_another_step_is_doubted() -> None:
    assert settled({"x-step1300": {"step": "1200"}})[2] == [
        "its name says step 1300, its metadata's step 1200; the metadata is used"
    ]
    assert settled({"x-epoch3": {"ss_epoch": "4"}})[2] == [
        "its name says epoch 3, its metadata's ss_epoch 4; the metadata is used"
    ]
    assert settled({"x-1300": {"step": "1200"}})[2] == []  # it may count anything


def test_a_whole_number_is_no_gamma_of_a_raw_checkpoint() -> None:
    assert settled({"lora_64_1000": {}}) == ({"lora_64_1000": (1000, "name")}, {}, [])


def test_the_pattern_rules_raw_checkpoints_too() -> None:
    files = {"run7-1200-ep3": kohya(5, 1), "run7-1300-ep4": {"step": "1400"}}
    steps, problems, warnings = settled(files, "run7-{step}-ep*.safetensors")
    assert steps == {"run7-1200-ep3": (1200, "pattern"), "run7-1300-ep4": (1300, "pattern")}
    assert not problems
    assert warnings == ["its name says step 1300, its metadata step 1400; the pattern is used"]
    with pytest.raises(SnapshotError, match="doesn't fit pattern="):
        settled({"x": {}}, "run7-{step}*.safetensors")


@pytest.mark.parametrize(
    ("stem", "metadata", "problem"),
    [
        ("x", {"ss_steps": "1200"}, "its metadata's ss_steps says 1200, but nothing says its"),
        ("x-000012", {}, "its name says 12, but nothing says its profile"),
        ("x", {"step": "5"}, "its metadata has only step, and its name says nothing"),
    ],
)
def test_what_may_be_raw_is_told_of_it(stem: str, metadata: dict[str, str], problem: str) -> None:
    message = refusal(stem + END, metadata)
    assert problem in message
    assert "add raw=True if it is a plain checkpoint and no EMA, else give pattern=" in message


@pytest.mark.parametrize(("stem", "metadata"), [("x", {}), ("x-0", {}), ("x-5", {"gamma": "3"})])
def test_what_says_no_step_or_is_an_ema_is_not(stem: str, metadata: dict[str, str]) -> None:
    assert "raw=True" not in refusal(stem + END, metadata)
