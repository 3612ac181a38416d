from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from posthoc_cli.errors import AmbiguousError
from posthoc_cli.snapshots.columns import doubted_profiles, file_times, from_zero, read_together
from posthoc_cli.snapshots.counts import find_counts, read_counts, stem_of

END = ".safetensors"
stems = st.lists(
    st.text(st.sampled_from("0123456789-_.=kMestpoch {}*'"), max_size=25),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(stems)
def test_any_names_are_read_or_refused(names: list[str]) -> None:
    files = [name + END for name in names]
    times = {file: float(at) for at, file in enumerate(files)}
    said, unclear, _ = read_together(files, (), times.get)
    assert said.keys() == set(files)
    for error in unclear:
        assert {file for file, _ in error.rows} <= set(files)
        assert len({len(steps) for _, steps in error.rows} | {len(error.patterns)}) == 1
    doubted_profiles(files)


@given(st.text(max_size=40))
def test_counts_lie_in_the_name(name: str) -> None:
    stem = stem_of(name)
    found = find_counts(stem)
    assert all(stem[count.start].isdigit() and count.end <= len(stem) for count in found)
    assert all(one.end <= other.start for one, other in pairwise(found))


@given(
    st.sets(st.integers(1, 10**9), min_size=2, max_size=8), st.sampled_from(["x-{}", "x-step{}"])
)
def test_one_number_is_read_as_it_stands(steps: set[int], form: str) -> None:
    names = [form.format(step) + END for step in steps]
    said, unclear, warnings = read_together(names)
    assert not unclear
    assert not warnings
    assert said == {name: read_counts(name) for name in names}


def test_a_file_alone_is_read_by_itself() -> None:
    said, unclear, _ = read_together([f"lora_64_1000{END}"])
    assert said == {f"lora_64_1000{END}": {"number": 1000}}
    assert not unclear


def test_the_error_has_both_readings() -> None:
    _, (error,), _ = read_together([f"a_9_100{END}", f"a_8_200{END}"])
    assert isinstance(error, AmbiguousError)
    assert error.patterns == [f"a_{{step}}_*{END}", f"a_*_{{step}}{END}"]
    assert error.rows == [(f"a_8_200{END}", (8, 200)), (f"a_9_100{END}", (9, 100))]


def test_folders_and_indexes_have_patterns_too() -> None:
    _, (error,), _ = read_together(["a_9_100", "a_8_200"])
    assert error.patterns == ["a_{step}_*", "a_*_{step}"]
    _, (error,), _ = read_together([f"a_{text}{END}.index.json" for text in ("9_100", "8_200")])
    assert error.patterns == [f"a_{{step}}_*{END}", f"a_*_{{step}}{END}"]


def test_only_numbers_in_a_row_count_from_zero() -> None:
    assert from_zero("number", [0, 1, 2, 4])
    assert from_zero("number", [0])
    assert from_zero("epoch", [0, 10, 20])
    assert not from_zero("number", [0, 500, 1000])
    assert not from_zero("number", [1, 2])
    assert not from_zero("step", [0, 1, 2])
    assert not from_zero("number", [])


def test_times_a_moment_apart_say_nothing() -> None:
    files = ["a", "b", "c"]
    assert file_times(files, {"a": 10.0, "b": 20.0}.get)("b") == 20
    assert file_times(files, {"a": 10.0, "b": 10.1, "c": 10.2}.get)("b") is None
    assert file_times(files, {"a": 10.0}.get)("a") is None


def test_names_of_several_kinds_are_read_apart() -> None:
    files = [f"x-000001{END}", f"x-000002{END}", f"x-step00000150{END}", f"x{END}"]
    said, unclear, _ = read_together(files)
    assert not unclear
    assert list(said.values()) == [{"number": 1}, {"number": 2}, {"step": 150}, {}]


def test_the_profiles_of_other_tools_are_left_alone() -> None:
    assert not doubted_profiles([f"0.500{END}", f"1.500{END}", f"net-0002147-0.050{END}", "x"])
    assert not doubted_profiles([f"mylora_v{v}_{s}_6.94{END}" for v in (2, 3) for s in (10, 20)])
