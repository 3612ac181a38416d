"""Hostile safetensors files: valid ones, changed by someone who knows the format.

Each is made from a number of its own, so that one that does harm can be made again by itself:
`Case(seed, number)` is the same case on every machine and every Python.

    header      the length in front of it, its encoding, nesting, duplicate keys, what follows it
    tensors     offsets, shapes, dtypes, names, missing fields
    metadata    not strings, not an object; steps and profiles that no snapshot can have; recipes
    data        cut short, too long, bits flipped, NaN and infinity
    names       of the file and of its folder: escapes, spaces, newlines, bytes that are no UTF-8
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

ESCAPES = (
    "\x1b[2J", "\x1b]52;c;cHduZWQ=\x07", "\x1b]8;;http://example.com\x1b\\x", "\x1b[31mred\x1b[0m",
    "\x9b2J", "\x90q\x9c", "\x85", "\x00", "\x07\x08\x7f", "\r\n", "\n", "\t", "\u2028\u2029",
    "\u202egnp.x", "\u2066a\u2069", "\u200b", "\ufeff", "\U000e0041", "\x1bc", "[red]rich[/red]",
    "%s%n{0}", "\u0301" * 50, "\U0001f4a9", "\uffff", "ﷺ",
)  # fmt: skip
"""What could steer a terminal, break a line, or hide what a name really is."""

TENSOR_NAMES = (
    "", " ", "../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b", "__metadata__ ",
    "__METADATA__", "data_offsets", "'; rm -rf *", '"', "\\", "{}", "*", "?", "[a]", "x" * 10_000,
    "é" * 5_000, "-o", "--force", "NaN", *ESCAPES,
)  # fmt: skip

NUMBERS = (
    "0", "-1", "-0", "1", "nan", "NaN", "inf", "-inf", "Infinity", "1e400", "-1e400", "1e-400",
    "1e308", "0.0", "0.28867513459481287", "0.2887", "-0.5", "-1", "-0.9999999999", "1e12", "1e13",
    "9007199254740992", "9007199254740993", "18446744073709551616", "１２", "٣", "1_000", " 12",
    "12 ", "1 2", "+12", "0x10", "1e3", "12.0", "", " ", "None", "true", "[]", "12\n", "12\x00",
    "\x1b[2J", "9" * 100, "9" * 101, "9" * 5_000, "1" + "0" * 100_000, "0." + "0" * 99_998 + "1",
    "0" * 99 + "7", "1e99999999999", "5e-324", "1" * 40 + "\x1b[2J",
)  # fmt: skip
"""Steps, gammas and widths of sigma_rel that no snapshot has, and a few that one could have."""

OFFSETS = (
    -1, 0, 1, 3, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.0, 0.5,
    1e300, "0", "", None, True, False, [], [0], -(2**63),
)  # fmt: skip

SIZES = (0, 1, -1, 2, 3, 2**16, 2**31, 2**32, 2**33, 2**62, 2**63, 2**64 - 1, 2**64, 10**25)

DTYPES = (
    "F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
    "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3",
    "F6_E3M2", "f32", "F128", "C128", "F0", "", "\x1b[2J", "object", "O", "pickle", None, 32, [],
    ["F32"], "F32 ", "Ｆ32",
)  # fmt: skip

LITERALS = (
    b"NaN", b"Infinity", b"-Infinity", b"-0", b"01", b"+1", b"0x10", b"1e999", b"-1e999", b"1.",
    b".5", b"true", b"false", b"null", b'"1"', b"1" + b"0" * 5_000, b"9" * 20, b"{}", b"[]", b"",
    b"'1'", b"1,", b"1}", b"/* */1", b"undefined", b"1e", b'"\\ud800"', b'"\\udc00\\ud800"',
    b'"\\u0000"', b'"\\x41"', b'"\\ud83d\\ude00"', b'"\\u202e"', b'"\\u001b[2J"',
)  # fmt: skip

BAD_UTF8 = (
    b"\xff",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\x80",
    b"\xe2\x82",
    b"\x00",
)

LENGTHS = (
    0,
    1,
    2,
    7,
    2**16,
    2**31,
    2**32,
    100_000_001,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
)

FILE_NAMES = (
    b"run_{step}_6.94", b"run-{kimg}-0.100", b"1.{step}", b"a b c", b" leading", b"trailing ",
    b"line\nbreak", b"cr\rlf\n", b"it's", b'"quoted"', b"-o", b"--force", b"--", b"$(reboot)",
    b"`id`", b"a;b|c&d", b"*", b"[a-z]", b"{sigma_rel}", b"\xff\xfe", b"caf\xe9", b"\xc3\xa9",
    b"\xed\xa0\x80", b"\x1b[2J\x1b[H", b"\x1b]0;title\x07", b"\xc2\x9b31m", b"\xe2\x80\xaegnp",
    b"\xef\xbc\x91", b"%s", b"\\", b"\t", b"a" * 243, b"x_99999999999999999999_1e400",
    b"x_0_6.94", b"x_12_-1", b"x_12_0", b"x_12_1e9999", b"x_" + b"9" * 200 + b"_1",
    b"1." + b"8" * 200, b"x_1000_" + b"9" * 200, b"x-9999999-0.999", b"x-0000000-0.100",
    b"x_12_0." + b"1" * 200, b"[red]x", b"ema_1000_nan", b"ema_\xd9\xa3_6.94", b"CON", b"a:b",
    b"_".join([b"1"] * 100),
)  # fmt: skip
"""Without their ending. `{step}` and `{kimg}` are filled in."""

FOLDER_NAMES = (
    b"snapshots", b"two words", b"new\nline", b"\x1b[2J", b"\xff\xfe", b"-o", b"{step}", b"it's",
    b"\xe2\x80\xaegnp", b"[red]",
)  # fmt: skip


class Raw(bytes):
    """A piece of a header that is written as it is."""


class Object(list[tuple[Any, Any]]):
    """A JSON object as pairs, in which a key may come twice."""

    def put(self, key: str, value: Any) -> None:
        """Set the first `key`, or add it."""
        for at, (name, _) in enumerate(self):
            if name == key:
                self[at] = (key, value)
                return
        self.append((key, value))


def encode(value: Any) -> bytes:
    """`value` as JSON, valid or not: lone surrogates come out as the bytes UTF-8 forbids."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Object):
        pairs = (encode(key) + b":" + encode(entry) for key, entry in value)
        return b"{" + b",".join(pairs) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(encode, value)) + b"]"
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@dataclass
class Draft:
    """A file while it is being spoilt."""

    header: Object
    data: bytearray
    text: bytes | None = None
    """The header as bytes, once it is beyond JSON."""
    claimed: int | None = None
    """What the first eight bytes say, where that is not the header's length."""
    name: bytes = b"ema-3000-0.05"
    changes: list[Callable[[bytearray], None]] = field(default_factory=list)
    """What happens to the finished bytes."""
    index: bytes | None = None
    """The index of the shards that this file is one of."""

    @property
    def metadata(self) -> Object:
        for key, value in self.header:
            if key == "__metadata__" and isinstance(value, Object):
                return value
        fresh = Object()
        self.header.insert(0, ("__metadata__", fresh))
        return fresh

    def entries(self) -> list[Object]:
        """Those tensors whose entries are still objects."""
        return [
            entry for name, entry in self.header if name != "__metadata__" and type(entry) is Object
        ]

    def written(self) -> bytes:
        text = encode(self.header) if self.text is None else self.text
        length = len(text) if self.claimed is None else self.claimed
        whole = bytearray(struct.pack("<Q", length % 2**64) + text + self.data)
        for change in self.changes:
            change(whole)
        return bytes(whole)


BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U8": 8, "BOOL": 8, "C64": 64}


def draft(rng: random.Random, step: int = 3000, dtypes: Sequence[str] = ()) -> Draft:
    """A valid snapshot of some small network."""
    header = Object()
    if dtypes or rng.random() < 0.9:
        metadata = Object([("step", str(step)), ("sigma_rel", "0.05")])
        if not dtypes and rng.random() < 0.2:
            metadata[1] = ("gamma", "16.97")
        header.append(("__metadata__", metadata))
    data = bytearray()
    wanted = dtypes or rng.choices(
        list(BITS), weights=[2, 5, 4, 4, 2, 1, 1, 1], k=rng.randint(1, 5)
    )
    for number, dtype in enumerate(wanted):
        shape = list(rng.choice(((), (1,), (4,), (3, 4), (2, 0), (1, 1, 5), (64,))))
        if dtypes:
            shape = [3, 4]
        elements = 1
        for length in shape:
            elements *= length
        size = elements * BITS[dtype] // 8
        entry = Object(
            [("dtype", dtype), ("shape", shape), ("data_offsets", [len(data), len(data) + size])]
        )
        header.append((f"layer{number}.weight", entry))
        data += bytes(size) if rng.random() < 0.3 else rng.randbytes(size)
    return Draft(header, data)


# What can be done to a file. Each changes it in one way.


def _length(rng: random.Random, file: Draft) -> None:
    actual = len(encode(file.header))
    past = (actual - 1, actual + 1, actual + len(file.data), actual + len(file.data) + 1, -actual)
    file.claimed = rng.choice((*LENGTHS, *past))


def _bad_utf8(rng: random.Random, file: Draft) -> None:
    text = bytearray(file.text or encode(file.header))
    at = rng.choice((rng.randrange(len(text) + 1), text.find(b"layer") + 2, 2))
    text[at:at] = rng.choice(BAD_UTF8)
    file.text = bytes(text)


def _duplicates(rng: random.Random, file: Draft) -> None:
    kind = rng.randrange(5)
    if kind == 0 or not file.entries():
        name, value = rng.choice(file.header or [("__metadata__", Object())])
        file.header.insert(rng.randrange(len(file.header) + 1), (name, value))
    elif kind == 1:
        again = Object([("step", "1"), ("sigma_rel", "0.10")])
        file.header.insert(rng.randrange(len(file.header) + 1), ("__metadata__", again))
    elif kind == 2:
        name = next(name for name, entry in file.header if entry is file.entries()[0])
        other = Object([("dtype", "U8"), ("shape", [1]), ("data_offsets", [0, 1])])
        file.header.insert(rng.randrange(len(file.header) + 1), (name, other))
    elif kind == 3:
        entry = rng.choice(file.entries())
        key, value = rng.choice(entry or [("dtype", "F32")])
        value = rng.choice((value, "F64", [0, 4], [1]))
        entry.insert(rng.randrange(len(entry) + 1), (key, value))
    else:
        file.metadata.append(("step", rng.choice(("1", "3000", "x"))))


def _nesting(rng: random.Random, file: Draft) -> None:
    depth = rng.choice((100, 127, 128, 129, 900, 1_000, 5_000, 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    deep = Raw(opening * depth + b"1" + closing * depth * rng.choice((1, 1, 0)))
    place = rng.randrange(4)
    if place == 0:
        file.header.append(("deep", deep))
    elif place == 1:
        file.metadata.append(("deep", deep))
    elif place == 2 and file.entries():
        rng.choice(file.entries()).put(rng.choice(("shape", "data_offsets", "dtype", "more")), deep)
    else:
        file.metadata.put("posthoc", deep.decode())


def _offsets(rng: random.Random, file: Draft) -> None:
    for entry in file.entries():
        for key, value in entry:
            if key != "data_offsets" or not isinstance(value, list) or rng.random() < 0.5:
                continue
            kind = rng.randrange(6)
            if kind == 0 and len(value) == 2:
                value[rng.randrange(2)] = rng.choice(OFFSETS)
            elif kind == 1 and len(value) == 2 and all(type(one) is int for one in value):
                shift = rng.choice((-8, -1, 1, 8, 2**64))
                value[:] = [one + shift for one in value]
            elif kind == 2:
                value.reverse()
            elif kind == 3:
                value.append(rng.choice(OFFSETS))
            elif kind == 4:
                del value[-1:]
            else:
                value[:] = [rng.choice(OFFSETS), rng.choice(OFFSETS)]
    if rng.random() < 0.3:
        _hole(rng, file)


def _hole(rng: random.Random, file: Draft) -> None:
    """Bytes that belong to no tensor."""
    at = rng.randrange(len(file.data) + 1)
    file.data[at:at] = bytes(rng.choice((1, 8, 100)))


def _shapes(rng: random.Random, file: Draft) -> None:
    for entry in file.entries():
        for key, value in entry:
            if key != "shape" or not isinstance(value, list) or rng.random() < 0.5:
                continue
            kind = rng.randrange(5)
            if kind == 0:
                value[:] = [rng.choice(SIZES) for _ in range(rng.randint(1, 6))]
            elif kind == 1:
                value.insert(rng.randrange(len(value) + 1), rng.choice((1, 0, -1, 1.0, True, "1")))
            elif kind == 2:
                value.extend([1] * rng.choice((1, 33, 65, 2_000)))
            elif kind == 3:
                value.reverse()
            else:
                value[:] = [rng.choice((4.0, "4", None, [4], True, 2**70, 4))]


def _dtypes(rng: random.Random, file: Draft) -> None:
    for entry in file.entries():
        if rng.random() < 0.6:
            entry.put("dtype", rng.choice(DTYPES))


def _fields(rng: random.Random, file: Draft) -> None:
    """Entries without what they need, or with more, or that are no objects."""
    kind = rng.randrange(4)
    if kind == 0 and file.entries():
        entry = rng.choice(file.entries())
        del entry[rng.randrange(len(entry) + 1) :]
    elif kind == 1 and file.entries():
        rng.choice(file.entries()).append((rng.choice(TENSOR_NAMES), rng.choice(OFFSETS)))
    elif kind == 2:
        wrong = rng.choice(([], "F32", None, 1, Object(), [1, 2], True))
        file.header.append((rng.choice(("x", "layer0.weight", "__metadata__")), wrong))
    else:
        file.header[:] = rng.choice(([], file.header[:1]))


def _names(rng: random.Random, file: Draft) -> None:
    for at, (name, value) in enumerate(file.header):
        if name != "__metadata__" and rng.random() < 0.6:
            new = rng.choice(TENSOR_NAMES)
            file.header[at] = (rng.choice((new, f"{name}{new}", f"{new}.{name}")), value)


def _surrogates(rng: random.Random, file: Draft) -> None:
    """Halves of pairs, escaped as JSON lets one write them."""
    lone = Raw(rng.choice((b'"\\ud800"', b'"x\\udfff"', b'"\\udc80\\ud800"', b'"\\ud83d\\ude00"')))
    if rng.random() < 0.5:
        file.metadata.append(rng.choice(((lone, "x"), ("x", lone), ("step", lone))))
    else:
        entry = Object([("dtype", "U8"), ("shape", [0]), ("data_offsets", [0, 0])])
        file.header.append((lone, entry))


def _metadata(rng: random.Random, file: Draft) -> None:
    kind = rng.randrange(4)
    odd = rng.choice((1, 3000, 1.5, None, True, [], ["3000"], Object(), Object([("a", "b")])))
    if kind == 0:
        file.metadata.put(rng.choice(("step", "sigma_rel", "gamma", "note", "posthoc")), odd)
    elif kind == 1:
        file.header.put("__metadata__", rng.choice((None, [], "", 1, True, [["step", "1"]], odd)))
    elif kind == 2:
        file.metadata.append((rng.choice(TENSOR_NAMES), rng.choice(TENSOR_NAMES)))
    else:
        file.metadata.append(("note", "x" * rng.choice((10_000, 1_000_000))))


def _metadata_place(rng: random.Random, file: Draft) -> None:
    """The metadata somewhere else than first."""
    pair = ("__metadata__", file.metadata)
    file.header.remove(pair)
    file.header.insert(rng.randrange(len(file.header) + 1), pair)


def _literals(rng: random.Random, file: Draft) -> None:
    literal = Raw(rng.choice(LITERALS))
    place = rng.randrange(4)
    if place == 0 or not file.entries():
        file.metadata.put(rng.choice(("step", "sigma_rel", "x")), literal)
    elif place == 1:
        rng.choice(file.entries()).put(rng.choice(("shape", "data_offsets", "dtype", "x")), literal)
    elif place == 2:
        key = rng.choice(("shape", "data_offsets"))
        rng.choice(file.entries()).put(key, [literal, rng.choice((literal, 4))])
    else:
        file.header.append((rng.choice(("x", literal)), literal))


def _space(rng: random.Random, file: Draft) -> None:
    text = file.text or encode(file.header)
    space = rng.choice(
        (b" ", b"\n", b"\t\r\n ", b" " * 1_000, b"\x00" * 8, b"\xef\xbb\xbf", b"\x0c")
    )
    kind = rng.randrange(6)
    if kind == 0:
        text = space + text
    elif kind == 1:
        text = text + space
    elif kind == 2:
        text = text.replace(b":", space + b":" + space).replace(b",", space + b"," + space)
    elif kind == 3:
        text = text + rng.choice((b"{}", b"x", b",", b"}", b"]", b"//", b"\x1b[2J", text))
    elif kind == 4:
        text = text.replace(b"}}", b"},}").replace(b"{", b"{,", 1)
    else:
        text = rng.choice((b"", b"[]", b"null", b"1", b'"x"', b"{", b"{}", b'{"', b" ", b"{}{}"))
    file.text = text


def _cut(rng: random.Random, file: Draft) -> None:
    file.changes.append(lambda whole: whole.__delitem__(slice(rng.randrange(len(whole) + 1), None)))


def _grow(rng: random.Random, file: Draft) -> None:
    file.changes.append(lambda whole: whole.extend(bytes(rng.choice((1, 8, 4096)))))


def _flip(rng: random.Random, file: Draft) -> None:
    def change(whole: bytearray) -> None:
        reach = rng.choice((8, 100, len(whole)))
        for _ in range(rng.choice((1, 2, 20)) if whole else 0):
            whole[rng.randrange(min(len(whole), reach))] ^= 1 << rng.randrange(8)

    file.changes.append(change)


def _identity(rng: random.Random, file: Draft) -> None:
    for key in rng.sample(("step", "sigma_rel", "gamma"), rng.randint(1, 3)):
        file.metadata.put(key, rng.choice(NUMBERS))


def _values(rng: random.Random, file: Draft) -> None:
    """NaN, infinities, the largest and the least, in whatever dtype they fall."""
    patterns = (b"\xff", b"\x00\x7c", b"\x80\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\xff",
                b"\x00\x00\x00\x00\x00\x00\xf0\x7f", b"\xff\xff\x7f\x7f", b"\x01\x00")  # fmt: skip
    pattern = rng.choice(patterns)
    if rng.random() < 0.5:
        file.data[:] = (pattern * (len(file.data) // len(pattern) + 1))[: len(file.data)]
    elif file.data:
        at = rng.randrange(len(file.data)) // 8 * 8
        file.data[at : at + len(pattern)] = pattern[: len(file.data) - at]


def _recipe(rng: random.Random, file: Draft) -> None:
    """What posthoc writes into its own outputs, made up by someone else."""
    odd: tuple[Any, ...] = (
        *(None, "", "nan", "inf", "1e400", -1, 0, True, [], [1], {}, {"file": 1}, "\x1b[2J\n"),
        *(10**30, 10**400, 1.7e308, 5e-324, float("nan"), float("inf"), -0.0, "x" * 10_000),
        *("\ud800", -1.7e308),
    )
    own = os.fsdecode(file.name + b".safetensors")
    files = (own, own, "before_1500_16.97.safetensors", "good-1000.safetensors", "a\x1b[2J", "gone")
    paths = ("../x.safetensors", "/etc/passwd", "..", "", "\x00", "\ud800", "a/b", "x" * 5_000)
    source: Any = {"file": own, "step": 1, "sigma_rel": 0.1, "gamma": 6.94, "weight": 1.0}
    recipe: Any = {
        "version": "1",
        "method": "edm2",
        "target": {"step": 1, "sigma_rel": 0.1, "gamma": 6.94},
        "sources": [{**source, "file": rng.choice(files)} for _ in range(rng.choice((0, 1, 1, 3)))],
    }
    for one in recipe["sources"]:
        if rng.random() < 0.3:
            one[rng.choice(("bytes", "fingerprint"))] = rng.choice((*odd, 100, "0" * 32))
        if rng.random() < 0.2:
            one["file"] = rng.choice(paths)
    if rng.random() < 0.3:
        recipe[rng.choice(("copied", "dropped"))] = rng.choice((["*"], ["[", "*a" * 50], *odd))
    for _ in range(rng.randint(0, 3)):
        places = [recipe, recipe["target"], *(recipe["sources"] or ())]
        place = rng.choice([one for one in places if isinstance(one, dict) and one] or [recipe])
        key = rng.choice(list(place))
        if rng.random() < 0.2:
            recipe[rng.choice(("more", "\x1b[2J"))] = rng.choice(odd)
        elif place is recipe and key in ("target", "sources"):
            break
        else:
            place[key] = rng.choice(odd)
    else:
        if rng.random() < 0.3:
            recipe[rng.choice(("target", "sources"))] = rng.choice(odd)
    text = json.dumps(recipe)
    if rng.random() < 0.1:
        text = rng.choice(
            ("", "{", "[]", "null", "1", "[" * 100_000, text[:-5], '{"sources":' * 990)
        )
    file.metadata.put("posthoc", text)


SHARD_NAMES = (
    "", ".", "..", "../x.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "a.bin",
    "\x00.safetensors", "\x1b[2J.safetensors", "\ud800.safetensors", "x" * 10_000 + ".safetensors",
    "missing.safetensors", "a\\b.safetensors", "\u202e.safetensors", "\udcff.safetensors",
    "-.safetensors", "C:x.safetensors", "model.safetensors.index.json", ".safetensors",
)  # fmt: skip


def _index(rng: random.Random, file: Draft) -> None:
    """The file becomes the first of two shards, with an index that may not be right about them."""
    first, second = (f"model-0000{at}-of-00002.safetensors" for at in (1, 2))
    names = [name for name, _ in file.header if isinstance(name, str) and name != "__metadata__"]
    weight_map = Object([*((name, first) for name in names), ("other", second)])
    document = Object([("metadata", Object([("total_size", 100)])), ("weight_map", weight_map)])
    odd: Any = rng.choice((None, 1, [], Object(), True, "x", Raw(rng.choice(LITERALS)), 1.5))
    kind = rng.randrange(10)
    if kind == 0:
        weight_map[rng.randrange(len(weight_map))] = ("other", rng.choice(SHARD_NAMES))
    elif kind == 1:
        weight_map.append((rng.choice(TENSOR_NAMES), rng.choice((first, second, odd))))
    elif kind == 2:
        del weight_map[rng.randrange(len(weight_map))]
    elif kind == 3:
        document.put(rng.choice(("weight_map", "metadata", "x")), odd)
    elif kind == 4:
        stated = Object([("step", rng.choice(NUMBERS)), ("sigma_rel", rng.choice(("0.05", odd)))])
        document.put("metadata", stated)
    elif kind == 5:
        lone = rng.choice(("\ud800", "\udc80\ud800", "x\udfff"))
        document.put("metadata", Object([rng.choice(((lone, "x"), ("x", lone)))]))
    elif kind == 6:
        depth = rng.choice((900, 5_000, 100_000))
        document.append(("deep", Raw(b"[" * depth + b"]" * depth)))
    file.index = encode(document)
    if kind == 5 and rng.random() < 0.8:
        file.index = file.index.replace(b"\xed\xa0\x80", rb"\ud800").replace(b"\xed", rb"\udc80")
    if kind == 7:
        file.index = file.index[: rng.randrange(len(file.index))]
    elif kind == 8:
        at = rng.randrange(len(file.index))
        file.index = file.index[:at] + rng.choice(BAD_UTF8) + file.index[at:]


def _file_name(rng: random.Random, file: Draft) -> None:
    name = rng.choice(FILE_NAMES)
    file.name = name.replace(b"{step}", b"3000").replace(b"{kimg}", b"0003000")
    if rng.random() < 0.5:
        file.header[:] = [pair for pair in file.header if pair[0] != "__metadata__"]


def _nothing(rng: random.Random, file: Draft) -> None:
    """A few whole files among the others: these have to be read."""


MUTATIONS: dict[str, Callable[[random.Random, Draft], None]] = {
    "header length": _length,
    "bad UTF-8": _bad_utf8,
    "duplicate keys": _duplicates,
    "deep nesting": _nesting,
    "offsets": _offsets,
    "holes": _hole,
    "shapes": _shapes,
    "dtypes": _dtypes,
    "fields": _fields,
    "tensor names": _names,
    "lone surrogates": _surrogates,
    "metadata": _metadata,
    "metadata elsewhere": _metadata_place,
    "JSON literals": _literals,
    "white space": _space,
    "cut short": _cut,
    "too long": _grow,
    "flipped bits": _flip,
    "steps and profiles": _identity,
    "NaN and infinity": _values,
    "recipes": _recipe,
    "shards": _index,
    "file names": _file_name,
    "whole": _nothing,
}

_LAST = ("bad UTF-8", "white space")
"""They work on the header as bytes, so after all that work on what it says."""


@dataclass(frozen=True, slots=True)
class Case:
    """A folder that holds a hostile file, alone or among others."""

    seed: int
    number: int
    mutations: tuple[str, ...]
    folder: bytes
    name: bytes
    """Of the hostile file."""
    files: dict[bytes, bytes]
    """All files of the folder, by name."""

    def __str__(self) -> str:
        return f"case {self.number} of seed {self.seed} ({', '.join(self.mutations)})"


def make_case(seed: int, number: int) -> Case:
    """The case `number`: every mutation comes about as often as any other."""
    rng = random.Random(f"posthoc/{seed}/{number}")
    names = list(MUTATIONS)
    chosen = {names[number % len(names)], *rng.sample(names, rng.choice((0, 0, 1, 2)))}
    ordered = sorted(chosen, key=lambda name: (name in _LAST, names.index(name)))
    company = rng.choice(("alone", "alone", "twin", "good"))
    dtypes = ("F32", "F16", "I64") if company == "good" else ()
    begin = rng.getstate()
    file = _spoilt(rng, ordered, draft(rng, dtypes=dtypes))
    end = rng.getstate()
    name, files = _files(rng, file)
    if company == "twin":
        # The same file of an earlier step: what is odd about it is then odd in both.
        rng.setstate(begin)
        twin = _spoilt(rng, ordered, draft(rng, step=1500, dtypes=dtypes))
        files[b"before_1500_16.97.safetensors"] = twin.written()
    elif company == "good":
        for step in (1000, 2000):
            whole = draft(random.Random(f"{seed}/{step}"), step=step, dtypes=dtypes)
            files[b"good-%d.safetensors" % step] = whole.written()
    rng.setstate(end)
    folder = rng.choice(FOLDER_NAMES) if rng.random() < 0.2 else FOLDER_NAMES[0]
    return Case(seed, number, tuple(ordered), folder, name, files)


def _files(rng: random.Random, file: Draft) -> tuple[bytes, dict[bytes, bytes]]:
    """The name by which the snapshot goes, and its files."""
    content = file.written()
    if file.index is None:
        return file.name + b".safetensors", {file.name + b".safetensors": content}
    name = file.name[:200] + b".safetensors.index.json"
    entry = Object([("dtype", "F16"), ("shape", [8]), ("data_offsets", [0, 16])])
    other = Draft(Object([("other", entry)]), bytearray(rng.randbytes(16)))
    shards = {b"model-00001-of-00002.safetensors": content}
    if rng.random() < 0.95:
        shards[b"model-00002-of-00002.safetensors"] = other.written()
    return name, {name: file.index, **shards}


def _spoilt(rng: random.Random, mutations: Sequence[str], file: Draft) -> Draft:
    for name in mutations:
        MUTATIONS[name](rng, file)
    return file
