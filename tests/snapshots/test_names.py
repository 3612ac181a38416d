from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.counts import read_counts
from posthoc_cli.snapshots.names import (
    _CONVENTIONS,
    Reading,
    compile_pattern,
    read_name,
    read_number,
)

END = ".safetensors"
anything = st.text(st.characters(exclude_characters="/\0"), max_size=30)
widths = st.integers(1, 288).map(lambda thousandths: f"0.{thousandths:03d}")


def by(pattern: str, name: str, profiles: tuple[float, ...] = ()) -> Reading | None:
    return read_name(name, compile_pattern(pattern), profiles)


def said(reading: Reading | None) -> tuple[int, float | None, float | None, int | None]:
    assert reading is not None
    return reading.step, reading.gamma, reading.sigma_rel, reading.index


# The conventions


@given(anything, st.integers(0, 10**12), st.floats(0, 400))
def test_sd_scripts_name_gives_back_what_was_written(prefix: str, step: int, gamma: float) -> None:
    reading = read_name(f"{prefix}_{step}_{gamma}{END}")
    assert reading is not None
    assert reading.convention == "sd-scripts"
    assert said(reading) == (step, gamma, None, None)


@given(anything, st.integers(0, 9_999_999_999), widths)
def test_edm2_name_gives_back_what_was_written(prefix: str, images: int, width: str) -> None:
    reading = read_name(f"{prefix}-{images // 1000:07d}-{width}{END}")
    assert reading is not None
    assert reading.convention == "edm2"
    assert reading.sigma_rel == float(width)
    assert images in reading.steps
    assert reading.step in reading.steps
    if images % 1024 == 0:
        assert reading.step == images
    assert reading.step % 1024 == 0 or not any(step % 1024 == 0 for step in reading.steps)


@pytest.mark.parametrize(
    ("kimg", "step"),
    [("0000134", 134144), ("2147483", 2147483648), ("0000001", 1024), ("0000042", 42000)],
)
def test_edm2_step_is_the_multiple_of_1024_where_there_is_one(kimg: str, step: int) -> None:
    reading = read_name(f"run-{kimg}-0.050{END}")
    assert reading is not None
    assert reading.step == step


@given(st.integers(0, 99), st.integers(0, 10**12))
def test_ema_pytorch_name_gives_back_what_was_written(index: int, step: int) -> None:
    reading = read_name(f"{index}.{step}{END}")
    assert reading is not None
    assert reading.convention == "ema-pytorch"
    assert said(reading) == (step, None, None, index)


def test_ema_pytorch_width_comes_from_the_profiles() -> None:
    assert said(read_name(f"1.200{END}", profiles=(0.05, 0.1))) == (200, None, 0.1, 1)
    assert said(read_name(f"2.200{END}", profiles=(0.05, 0.1))) == (200, None, None, 2)


@given(anything, st.sampled_from(["_1000_6.94", "-0001000-0.100", "0.1000", "_1_1e-3", "_7_0"]))
def test_no_name_fits_two_conventions(prefix: str, rest: str) -> None:
    fits = [regex.fullmatch(prefix + rest + END) is not None for regex in _CONVENTIONS.values()]
    assert sum(fits) <= 1


@pytest.mark.parametrize(
    ("name", "step", "gamma"),
    [
        (f"model_v2_1000_6.94{END}", 1000, 6.94),
        (f"_001000_6.94{END}", 1000, 6.94),
        (f"a_1000_1e-3{END}", 1000, 0.001),
        (f"a_1000_1.5E+2{END}", 1000, 150.0),
        (f"a_0001000-0.050_1000_7{END}", 1000, 7.0),
        ("a_1000_6.94.SafeTensors", 1000, 6.94),
        (f"a\nb\udcff _1000_6.94{END}", 1000, 6.94),
    ],
)
def test_unusual_names_that_fit(name: str, step: int, gamma: float) -> None:
    assert said(read_name(name)) == (step, gamma, None, None)


@pytest.mark.parametrize(
    "name",
    [
        f"model{END}",
        f"model_1000{END}",
        f"1000_6.94{END}",
        f"a_1000_{END}",
        f"a_1000_nan{END}",
        f"a_1000_inf{END}",
        f"a_1000_--1{END}",
        f"a_-1000_6.94{END}",
        f"a_1_000_.5{END}",
        f"a_1000_6.{END}",
        f"a_1000_6_{END}",
        f"a_١٠٠٠_6.94{END}",
        f"a_1000_٦.94{END}",
        f"a_1000_6.94{END}.bak",
        f"a_1000_6.94{END}\n",
        "a_1000_6.94.ſafetensors",
        f"a-000134-0.050{END}",
        f"a-00000134-0.050{END}",
        f"a-0000134-0.05{END}",
        f"a-0000134-0.0500{END}",
        f"a_1000_1e400{END}",
        f"a_1000_400.5{END}",
        f"checkpoint_3_1500{END}",
        f"0.1000.1{END}",
        f".1000{END}",
        "",
    ],
)
def test_names_that_fit_no_convention(name: str) -> None:
    assert read_name(name) is None


@given(st.text(st.sampled_from("_-.0123e٣safetensors\n"), max_size=40))
def test_any_name_is_read_or_refused(name: str) -> None:
    reading = read_name(name + END)
    assert reading is None or reading.step in reading.steps


# pattern=


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("run7_{step}_{sigma_rel}.safetensors", "run7_12000_0.05", (12000, None, 0.05, None)),
        ("run7{step}x{gamma}.safetensors", "run71000x6.94", (1000, 6.94, None, None)),
        ("{gamma} at {step}.safetensors", "1e-3 at 0500", (500, 0.001, None, None)),
        ("{kimg}k({sigma_rel}).safetensors", "134k(0.050)", (134144, None, 0.05, None)),
        ("*{step}_{gamma}.safetensors", "run12000_6.94", (12000, 6.94, None, None)),
        ("{gamma}_{step}*", "6.94_12000-final", (12000, 6.94, None, None)),
        ("*{step}-{sigma_rel}*", "a12-0.050-b", (12, None, 0.05, None)),
        ("{step}-*{sigma_rel}.safetensors", "12-s0.050", (12, None, 0.05, None)),
        ("{step}-*{gamma}*.safetensors", "12-g16.97e1-b", (12, 169.7, None, None)),
        ("{step}.{sigma_rel}.safetensors", "12.0.050", (12, None, 0.05, None)),
        ("**_{step}_{gamma}.*", "a_b_12_7", (12, 7.0, None, None)),
        ("[a].{step}+{gamma}.safetensors", "[a].12+7", (12, 7.0, None, None)),
        ("{{step}}_{gamma}.safetensors", "{12}_7", (12, 7.0, None, None)),
        ("{step}{_{gamma}.safetensors", "12{_7", (12, 7.0, None, None)),
        ("{index}/{step}.safetensors", "1/9", (9, None, 0.1, 1)),
    ],
)
def test_pattern_reads(
    pattern: str, name: str, expected: tuple[int, float | None, float | None, int | None]
) -> None:
    reading = by(pattern, name + END, (0.05, 0.1))
    assert said(reading) == expected
    assert reading is not None
    assert reading.convention == "pattern"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{step}_{gamma}.safetensors", f"12_7{END}x"),
        ("{step}_{gamma}.safetensors", f"x12_7{END}"),
        ("{step}_{gamma}.safetensors", f"12_--7{END}"),
        ("{step}_{gamma}.safetensors", "12_7xsafetensors"),
        ("{step}_{gamma}.safetensors", f"12_7{END}\n"),
        ("{step}_{gamma}.safetensors", "12_7.SAFETENSORS"),
        ("{step}_{gamma}", f"12_7{END}"),
        ("Run{step}_{gamma}*", f"run12_7{END}"),
        ("*_{step}_{gamma}.safetensors", f"model-0000134-0.050{END}"),
        ("{step}*7_{gamma}.safetensors", f"12007_5{END}"),
        ("{step}_{gamma}*0.safetensors", f"12_0.050{END}"),
    ],
)
def test_pattern_has_to_fit_the_whole_name(pattern: str, name: str) -> None:
    assert by(pattern, name) is None


@given(anything, st.integers(0, 10**12), widths, anything)
def test_pattern_with_stars_reads_right_or_refuses(
    before: str, step: int, width: str, after: str
) -> None:
    name = f"{before}_{step}_{width}_{after}{END}"
    try:
        reading = by(f"*_{{step}}_{{sigma_rel}}_*{END}", name)
    except SnapshotError:
        assert any(char in "0123456789" for char in before + after)
    else:
        assert said(reading) == (step, None, float(width), None)


@pytest.mark.parametrize("name", ["a_1_2_3", "1_2_3", "_1_2_3_"])
def test_pattern_that_fits_in_two_ways_is_refused(name: str) -> None:
    with pytest.raises(SnapshotError, match="in two ways"):
        by("*{step}_{gamma}*.safetensors", name + END)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("{step}_{sigma}.safetensors", "unknown field {sigma}"),
        ("{step}_{}_{gamma}", "unknown field {}"),
        ("{step:d}_{gamma}", "unknown field {step:d}"),
        ("{ step}_{gamma}", "unknown field { step}"),
        ("{Step}_{gamma}", "unknown field {Step}"),
        ("{step}_{step}_{gamma}", "{step} twice"),
        ("{gamma}.safetensors", "neither {step} nor {kimg}"),
        ("{step}.safetensors", "neither {sigma_rel} nor {gamma} nor {decay} nor {index}"),
        ("", "neither {step} nor {kimg}"),
        ("{step_{gamma}", "neither {step} nor {kimg}"),
        ("{step}_{kimg}_{gamma}", "both {step} and {kimg}"),
        ("{step}_{sigma_rel}_{gamma}", "both {sigma_rel} and {gamma}"),
        ("{step}{gamma}", "nothing between {step} and {gamma}"),
    ],
)
def test_wrong_pattern_says_what_fields_there_are(pattern: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        compile_pattern(pattern)
    message = str(caught.value)
    assert message.startswith(f"pattern=: {problem} in '{pattern}'; ")
    assert all(f"{{{field}}}" in message for field in ("step", "kimg", "sigma_rel", "gamma"))
    assert "{index}" in message


@given(st.text(st.sampled_from("{}*stepgamma_ \\([.?\n")))
@example("[{step}](.?\\{gamma}\n*{")
def test_any_pattern_compiles_or_is_refused(text: str) -> None:
    try:
        pattern = compile_pattern(text)
    except UsageError:
        return
    filled = re.sub(r"\{[a-z]+\}", "7", text).replace("*", "")
    assert said(read_name(filled, pattern))[0] == 7


@given(anything, anything)
def test_all_but_fields_and_stars_is_literal(before: str, after: str) -> None:
    before, after = (text.translate({ord(char): "" for char in "{}*"}) for text in (before, after))
    pattern = f"{before}{{step}}_{{gamma}}{after}"
    assert by(pattern, f"{before}12_7.5{after}") is not None
    assert by(pattern, f"{before}12_7.5{after}x") is None


# Agreement with metadata


@pytest.mark.parametrize(
    ("name", "step", "sigma_rel", "agrees"),
    [
        ("a_1000_6.94", 1000, 0.1, True),  # the gamma of 0.1 is 6.9372
        ("a_1000_6.9", 1000, 0.1, True),
        ("a_1000_7", 1000, 0.1, True),
        ("a_1000_7.0", 1000, 0.1, False),
        ("a_1000_6.94", 1000, 0.101, False),
        ("a_1000_6.94", 1001, 0.1, False),
        ("a_1000_6.937203937601808", 1000, 0.1, True),
        ("a_1000_6.9100", 1000, 0.1, False),
        ("a_1000_0", 1000, 12**-0.5, True),
        ("a-0000134-0.100", 134000, 0.1, True),
        ("a-0000134-0.100", 134999, 0.09996, True),
        ("a-0000134-0.100", 135000, 0.1, False),
        ("a-0000134-0.100", 133999, 0.1, False),
        ("a-0000134-0.100", 134144, 0.101, False),
        ("0.1000", 1000, 0.1, True),
        ("0.1000", 1000, 0.05, False),
        ("7.1000", 1000, 0.05, True),  # no profile is known for index 7
        ("7.1000", 1001, 0.05, False),
    ],
)
def test_agreement_within_the_rounding_of_the_name(
    name: str, step: int, sigma_rel: float, agrees: bool
) -> None:
    reading = read_name(name + END, profiles=(0.1,))
    assert reading is not None
    assert reading.agrees_with(step, sigma_rel) is agrees


@pytest.mark.parametrize(("sigma_rel", "agrees"), [(0.1, True), (0.1004, True), (0.101, False)])
def test_sigma_rel_without_its_zeros_is_still_exact_to_three_decimals(
    sigma_rel: float, agrees: bool
) -> None:
    reading = by("{step}_{sigma_rel}.safetensors", f"5_0.1{END}")
    assert reading is not None
    assert reading.agrees_with(5, sigma_rel) is agrees


@given(st.integers(1, 287))
def test_neighbours_of_three_decimals_never_agree(thousandths: int) -> None:
    reading = read_name(f"a-0000001-0.{thousandths:03d}{END}")
    assert reading is not None
    assert reading.agrees_with(1024, thousandths / 1000)
    assert not reading.agrees_with(1024, (thousandths + 1) / 1000)
    assert not reading.agrees_with(1024, (thousandths - 1) / 1000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.94", (6.94, 0.005)),
        ("7", (7.0, 0.5)),
        ("1.5e-05", (1.5e-05, 5e-7)),
        ("2E3", (2000.0, 500.0)),
        ("1e400", (math.inf, math.inf)),
        ("1e99999", None),
        ("nan", None),
        ("inf", None),
        ("-1", (-1.0, 0.5)),
        ("+1", None),
        (" 1", None),
        ("1_0", None),
        ("٣", None),
        ("tensor(1.)", None),
        ("", None),
        ("1" * 101, None),
    ],
)
def test_numbers(text: str, expected: tuple[float, float] | None) -> None:
    assert read_number(text, "gamma") == (expected and pytest.approx(expected))


def test_a_reading_says_itself() -> None:
    assert str(read_name(f"a_1000_6.94{END}")) == "step 1000, gamma 6.94"
    assert str(read_name(f"a-0000134-0.050{END}")) == "step 134144, sigma_rel 0.05"
    assert str(read_name(f"3.1000{END}")) == "step 1000"


# Raw checkpoints


@pytest.mark.parametrize(
    ("stem", "counts"),
    [
        ("name-000012", {"number": 12}),
        ("name-step00001200", {"step": 1200}),
        ("name-step00001200-state", {"step": 1200}),
        ("name_000001200", {"number": 1200}),
        ("mylora_v2-000003", {"number": 3}),
        ("lora_64_1000", {"number": 1000}),
        ("lora-1200-fp16", {"number": 1200}),
        ("checkpoint-500", {"number": 500}),
        ("ckpt500", {"number": 500}),
        ("12", {"number": 12}),
        ("x.1200", {"number": 1200}),
        ("epoch=3-step=1200", {"epoch": 3, "step": 1200}),
        ("Step_1200_Epoch_3", {"epoch": 3, "step": 1200}),
        ("globalstep500", {"step": 500}),
        ("1200steps", {"step": 1200}),
        ("iter_7", {"step": 7}),
        ("a-12ep", {"epoch": 12}),
        ("name-e12", {"epoch": 12}),
        ("ema-1000-0.05", {"number": 1000}),
        ("x_1000_6.94", {"number": 1000}),
        ("step5-64", {"step": 5, "number": 64}),
        ("64-step5", {"step": 5}),
    ],
)
def test_what_names_of_raw_checkpoints_count(stem: str, counts: dict[str, int]) -> None:
    assert read_counts(stem + END) == read_counts(stem + END.upper()) == counts


@pytest.mark.parametrize(
    "stem",
    ["v1.5-final", "mylora_v2", "sd15-lora-final", "sdxl1", "x-512px", "fp16", "0.1000", "", "x"],
)
def test_decimals_and_parts_of_words_count_nothing(stem: str) -> None:
    assert read_counts(stem + END) == {}


@given(st.text())
def test_any_name_counts_something_or_nothing(name: str) -> None:
    assert all(number >= 0 for number in read_counts(name).values())


def test_a_number_too_long_for_any_step_is_none() -> None:
    assert read_counts("9" * 5000 + END) == {}


def test_a_pattern_for_raw_checkpoints_needs_a_step_only() -> None:
    reading = read_name("a-12-0.5.safetensors", compile_pattern("a-{step}-*.safetensors", raw=True))
    assert reading is not None
    assert (reading.step, reading.gamma, reading.sigma_rel, reading.index) == (12, None, None, None)
    reading = read_name("a-12", compile_pattern("a-{kimg}", raw=True))
    assert reading is not None
    assert reading.step == 12288


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("a-*.safetensors", r"neither {step} nor {kimg} in "),
        ("{step}-{kimg}", "both {step} and {kimg} in "),
        ("{step}-{gamma}", "a field for a profile, {gamma}, in "),
        ("{step}-{index}", "a field for a profile, {index}, in "),
        ("{step}-{epoch}", "unknown field {epoch} in "),
    ],
)
def test_wrong_patterns_for_raw_checkpoints(pattern: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        compile_pattern(pattern, raw=True)
    assert problem in caught.value.problem
    assert caught.value.remedy.startswith("with raw=True the only field is {step} or {kimg}")
