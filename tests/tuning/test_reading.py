"""What scripts print, and the metric in it."""

from __future__ import annotations

import math

import pytest

from posthoc_cli.errors import UsageError
from posthoc_cli.tuning.reading import (
    NoMetric,
    by_key,
    by_regex,
    finite,
    last_number,
    read_pattern,
)

PLAIN = {
    "FID: 3.14": 3.14,
    "3.14e-1": 0.314,
    "fid=2.1%": 2.1,
    "loss -.5": -0.5,
    "−3.2": -3.2,
    "\x1b[1;32mFID\x1b[0m \x1b[32m3.2\x1b[0m": 3.2,
    "\x1b]0;a title 7\x073.2": 3.2,
    " 10%|#   | 1/10\r100%|####| 10/10\rFID 3.2\n\n \n": 3.2,
    "one 1\r\ntwo 2\r\n": 2,
    "3.5\r": 3.5,
    "FID-50k 3.21": 3.21,
    "fid50k_full: 3.": 3,
    "1,234.5": 1234.5,
    "1,234,567": 1234567,
    "tensor(3.21)": 3.21,
    "{'fid': 3.2}": 3.2,
    "| fid | 3.2 |": 3.2,
    "it is 3.2.": 3.2,
    "v1.2.3 on host7: 4": 4,
    "FID 3.14e+2": 314,
}


@pytest.mark.parametrize("text", PLAIN, ids=repr)
def test_the_last_number(text: str) -> None:
    assert last_number(text) == (PLAIN[text], "")


@pytest.mark.parametrize(
    ("text", "value"),
    [("fid 3.2 (10 s)", 10), ("3.2,4.1", 4.1), ("0,3.21", 3.21), ("3 / 4", 4), ("1,2,3", 3)],
)
def test_of_several_numbers_it_is_told(text: str, value: float) -> None:
    found, doubt = last_number(f"first 1\n{text}")
    assert found == value
    assert text in doubt
    assert doubt.endswith(f"the last, {value:g}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it printed nothing"),
        ("\n \r\n", "it printed nothing"),
        ("3.2\ndone", "no number stands on its last line, 'done'"),
        ("28.4dB", "no number .*"),
        ("v1.2", "no number .*"),
        ("3,21", r"'3,21' may be 3\.21 or 321"),
        ("fid: 1,234", r"'1,234' may be 1\.234 or 1234"),
        ("3,21 ema.safetensors", r"'3,21' may be 3\.21 or 321"),
        ("IS 9.5, FID 3,21 (best)", r"'3,21' may be 3\.21 or 321"),
        ("x" * 10_000, "no number .{0,250}"),
    ],
)
def test_no_number(text: str, why: str) -> None:
    with pytest.raises(NoMetric, match=f"^{why}$"):
        last_number(text)


@pytest.mark.parametrize("text", ["FID: nan", "fid=-inf", "NaN", "Infinity", "1e400"])
def test_what_is_not_finite_is_no_metric(text: str) -> None:
    value, doubt = last_number(text)
    assert not math.isfinite(value)
    assert doubt == ""
    with pytest.raises(NoMetric, match="the metric is"):
        finite(value)


def test_regex() -> None:
    text = "FID: 1.5 of 10\nFID: \x1b[1m2.5%\x1b[0m of 20\nbye"
    assert by_regex(text, read_pattern(r"FID: ([0-9.]+%?)")) == 2.5
    assert by_regex(text, read_pattern(r"\d+$")) == 20
    with pytest.raises(NoMetric, match="nothing in what it printed fits"):
        by_regex(text, read_pattern("IS: (.*)"))
    with pytest.raises(NoMetric, match="finds 'of 10', which is no number"):
        by_regex("x of 10", read_pattern("of .*"))
    with pytest.raises(UsageError, match="is no regular expression"):
        read_pattern("(")


JSON = 'loading {\n{"fid": 9}\n{\n  "a.b": 1, "metrics": {"fid": "3.5", "is": [7, {"x": 8}]},\n'
JSON += '  "bad": null, "yes": true, "nan": NaN\n}\n[done]\n'


@pytest.mark.parametrize(
    ("key", "value"),
    [("metrics.fid", 3.5), ("metrics.is.0", 7), ("metrics.is.1.x", 8), ("a.b", 1), ("fid", 9)],
)
def test_json(key: str, value: float) -> None:
    assert by_key(JSON, key) == value


@pytest.mark.parametrize("key", ["bad", "yes", "metrics", "metrics.is.9", "a", "metrics.fid.x"])
def test_json_without_a_number_there(key: str) -> None:
    with pytest.raises(NoMetric, match=key.replace(".", r"\.")):
        by_key(JSON, key)


def test_json_nan() -> None:
    assert math.isnan(by_key(JSON, "nan"))


def test_what_is_long_is_read_in_time() -> None:
    assert last_number("1," * 2_000_000 + "2x")[0] == 1
    with pytest.raises(NoMetric):
        by_key("[\n" * 1_000_000, "a")
    assert last_number("1, " * 1_000_000 + "7")[0] == 7
