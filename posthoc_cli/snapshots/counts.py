"""The numbers in a file's name that count training: `name-000012`, `epoch=3-step=1200`, `step5k`.

A word by a number says what it counts: steps or epochs. Decimals (v1.5, -0.05), parts of words (v2,
sd15, 512px), dates and times, and what a word calls something else (seed, loss) are no counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from posthoc_cli.snapshots.names import images_of

STEP, EPOCH, NUMBER = "step", "epoch", "number"

SCALED = "scaled"
"""The unit of a bare 5k or 1.5M: a count only where the numbers of other names there are, too."""

_STEP_WORDS = (
    *("step", "steps", "iter", "iters", "iteration", "iterations", "update", "updates"),
    "kimg",
)
_EPOCH_WORDS = ("epoch", "epochs")
_IN_SHORT = {"it": STEP, "its": STEP, "s": STEP, "ep": EPOCH, "e": EPOCH}
_NO_WORDS = ("", "ckpt", "checkpoint", "model", "save")
"""What may stand right before a number that counts; else it is a part of a word."""

_OTHER_WORDS = (
    *("acc", "accuracy", "alpha", "batch", "bs", "dim", "fid", "loss", "lr", "psnr"),
    *("rank", "res", "score", "seed", "size", "ssim"),
)
_SCALES = {"k": 1000, "m": 1_000_000}

_NUMBER = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+(?:\.[0-9]+)*")
_THOUSANDS = re.compile("[1-9][0-9]{0,2}_[0-9]{3}")
_EPOCH_BESIDE = re.compile(r"(?ai:(?<![A-Za-z])e(?:p|poch)?[-_=]?[0-9])")
_AGAIN = re.compile(r"[ _]?\([1-9]\)\Z")
"""What a browser appends to the name of a file that is there already."""

_EXPONENT = re.compile(r"[0-9](?:\.[0-9]+)?[eE]-[0-9]+")
_PART_OF = re.compile(r"(?<![0-9])[0-9]{5}-of-[0-9]{5}")
_DATE = re.compile(
    r"(?<![0-9])20[0-9]{2}([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])(?![0-9])"
)
_TIME = re.compile(r"[-_ T]+([01][0-9]|2[0-3])([-_.:]?)[0-5][0-9]\2[0-5][0-9](?![0-9])")

ENDINGS = re.compile(
    r"(?ai:\.safetensors|\.pth\.tar|\.pth?|\.pkl|\.ckpt|\.bin)(?:\.index\.json)?\Z"
)


@dataclass(frozen=True, slots=True)
class Count:
    """A number in a name, at `start` to `end` of the stem, and what it counts: its `unit`."""

    start: int
    end: int
    value: int
    unit: str


def stem_of(name: str) -> str:
    """A file's name without the endings of files; a folder's name as it is."""
    return ENDINGS.sub("", name)


def read_counts(name: str) -> dict[str, int]:
    """What the file name of a raw checkpoint counts: {"step": 1200}, {"epoch": 12} or neither.

    "number" is the last of the name if no word for steps or epochs stands by it.
    """
    counts: dict[str, int] = {}
    for count in find_counts(stem_of(name)):
        if count.unit != SCALED:
            counts.pop(NUMBER, None)  # it isn't the last
            counts[count.unit] = count.value
    return counts


def find_counts(stem: str) -> list[Count]:
    """All numbers of a name that may count something, in their order."""
    taken = [match.span() for regex in (_EXPONENT, _PART_OF) for match in regex.finditer(stem)]
    found = []
    for match in _NUMBER.finditer(stem):
        if not _within(match.start(), taken) and (count := _count(stem, match)):
            found.append(count)
    dates = [match.span() for match in _DATE.finditer(stem)]
    times = [time.span() for _, end in dates if (time := _TIME.match(stem, end))]
    for spans in (dates, times):
        # 20240115-000012 may be the twelfth epoch as well as twelve seconds after midnight.
        others = [count for count in found if not _within(count.start, spans)]
        written_out = any(
            re.search("[-_.:]", stem[start:end].strip("-_ T")) for start, end in spans
        )
        found = others if others or written_out else found
    if (again := _AGAIN.search(stem)) and found and found[0].end <= again.start():
        found = [count for count in found if count.end <= again.start()]
    return found


def in_thousands(
    names: Sequence[tuple[str, tuple[Count, ...]]],
) -> list[tuple[Count, ...]]:
    """The counts of stems of one form, where 1_000, 1_500 and 2_000 are one number each."""
    found = [counts for _, counts in names]
    for stem, counts in names:
        if len(counts) != 2 or not _THOUSANDS.fullmatch(stem[counts[0].start : counts[1].end]):
            return found
    if all(two.value >= 100 for _, two in found):  # as an epoch and a step have it
        return found
    return [
        (Count(one.start, two.end, 1000 * one.value + two.value, one.unit),) for one, two in found
    ]


def _within(place: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= place < end for start, end in spans)


def _count(stem: str, match: re.Match[str]) -> Count | None:
    text, end = match[0].replace(",", ""), match.end()
    if len(text) > 100:
        return None
    before = _word(r"(?a:([A-Za-z]*))\Z", stem[: match.start()])
    after = _word(r"(?a:([A-Za-z]*))", stem[end:])
    apart = _word(r"(?a:([A-Za-z]+)[-_= ]+)\Z", stem[: match.start()])
    alone = after[1:] in ("", *_STEP_WORDS, *_EPOCH_WORDS) and not stem[end + 1 :][:1].isdigit()
    scale = _SCALES.get(after[:1], 1) if alone else 1
    if before in _IN_SHORT and after and scale == 1 and not _unit(after):  # e4m3
        return None
    if before == "s" and not _EPOCH_BESIDE.search(stem):  # alone it may be a stage or a seed
        return None
    behind = "" if after == "s" else after[1:] if scale > 1 else after
    if not behind:  # 1200_steps, but the word may as well be the next number's: 3_step_1200
        place = end + (scale > 1)
        behind = _word(r"(?a:[-_ ]+([A-Za-z]{2,})(?![A-Za-z]|[-_= ]*[0-9]))", stem[place:])
        behind = behind if _unit(behind) else ""
    # A word that is glued to the number goes first, then the one before it.
    near = before or (after if scale == 1 and after != "s" else "")  # 10s are seconds
    word = near or apart
    unit = _unit(word) or (_unit(behind) if not near or before in _NO_WORDS else None)
    if unit is None:
        if before not in _NO_WORDS or (after and scale == 1) or word in _OTHER_WORDS:
            return None
        if scale > 1 and stem[end] == "m":  # metres, minutes
            return None
        unit = NUMBER if scale == 1 else SCALED
    if scale == 1:
        if "." in text:
            return None
        value = int(text)
    elif text.count(".") <= 1 and (scaled := Fraction(text) * scale).denominator == 1:
        value, end = int(scaled), end + 1
    else:
        return None
    if "kimg" in (word, behind):
        value = images_of(value)[0]
    return Count(match.start(), end, value, unit)


def _word(regex: str, text: str) -> str:
    match = re.search(regex, text) if regex.endswith(r"\Z") else re.match(regex, text)
    return match[1].lower() if match else ""


def _unit(word: str) -> str | None:
    if word.endswith(_STEP_WORDS):
        return STEP
    if word.endswith(_EPOCH_WORDS):
        return EPOCH
    return _IN_SHORT.get(word)
