"""What the JSON of a safetensors header says: parsed, and checked as the safetensors library does.

The library itself maps a file into memory to check it, which some network file systems refuse; so
all that it asks of a header is asked here, of bytes that were read. The tests compare the two.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from posthoc_cli.errors import brief
from posthoc_cli.storage.dtypes import DTYPES

_LIMIT = 1 << 64
"""Lengths and offsets are below it, and so is every product of lengths."""

_DEPTH = 127
"""The most objects and lists inside each other."""

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_SPACE = " \t\r\n"
_BITS = {code: dtype.bits for code, dtype in DTYPES.items()}


class Malformed(ValueError):
    """A header that no safetensors file has; it says what is wrong, on one line."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are byte offsets within the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def fits_any(name: str, globs: Sequence[str]) -> bool:
    """Whether one of `globs` fits a tensor's name, in the same case."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def split_metadata(header: bytes) -> tuple[dict[str, str], bytes]:
    """The `__metadata__` of a header, and the rest of the header as bytes that ignore it.

    Snapshots of one run differ in their metadata only; every writer puts it first, so what follows
    it can be compared between files without being parsed. Raises Malformed.
    """
    text = _decoded(header)
    opening = re.match(rf'[{_SPACE}]*\{{[{_SPACE}]*"{_METADATA}"[{_SPACE}]*:[{_SPACE}]*', text)
    if opening:
        found, end = _parsed(text, opening.end())
        rest = text[end:].strip(_SPACE)
        following = rest[1:].lstrip(_SPACE)
        if rest[:1] == "," and following[:1] == '"':
            rest = "{" + following
        elif rest == "}":
            rest = "{}"
        else:
            raise Malformed("no JSON: the metadata is followed by neither a comma nor a brace")
    elif _METADATA not in text and "\\u" not in text:
        return {}, header.strip(_SPACE.encode())
    else:
        document, _ = _parsed(text)
        if not isinstance(document, dict):
            raise Malformed("its header is no JSON object")
        _check_doubled(document)
        found = document.pop(_METADATA, None)
        entries = {name: dict(entry) for name, entry in _check_entries(document).items()}
        rest = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    return _metadata(found), rest.encode()


def parse_tensors(rest: bytes) -> dict[str, TensorInfo]:
    """The tensors of a header without its metadata: they fill the data section without a gap.

    Raises Malformed, for the same tensor in every run.
    """
    text = _decoded(rest)
    document = _plain(text)
    if document is None:
        document, _ = _parsed(text)
        if not isinstance(document, dict):
            raise Malformed("its header is no JSON object")
        _check_doubled(document)
        if _METADATA in document:
            raise Malformed(f"{_METADATA} is there twice")
        document = _check_entries(document)
    tensors: dict[str, TensorInfo] = {}
    position, in_order = 0, True
    for name, entry in document.items():
        info, size = _info(name, entry)
        if info.start != position or info.end - position != size:
            in_order = False
        position = info.end
        tensors[name] = info
    if not in_order:
        _check_places(tensors)
    return tensors


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Malformed(f"{_METADATA} is no JSON object")
    for key, value in _pairs(found):
        if not isinstance(value, str):
            raise Malformed(f"the metadata's '{brief(key)}' is no text")
    return dict(found)


def _info(name: str, entry: Any) -> tuple[TensorInfo, int]:
    """What an entry says, and how many bytes such a tensor takes."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError, IndexError):
        raise Malformed(f"tensor '{brief(name)}' lacks its dtype, shape or data_offsets") from None
    if type(shape) is not list or type(dtype) is not str or type(entry["data_offsets"]) is not list:
        raise Malformed(f"tensor '{brief(name)}' has no dtype, shape or data_offsets")
    if dtype not in _BITS:
        raise Malformed(f"tensor '{brief(name)}' has an unknown dtype, '{brief(dtype)}'")
    elements = 1
    for length in shape:
        if type(length) is not int or not 0 <= length < _LIMIT:
            raise _no_length(name, length)
        elements *= length
        if elements >= _LIMIT:
            raise _too_large(name, dtype, shape)
    for place in (start, end):
        if type(place) is not int or not 0 <= place < _LIMIT:
            raise _no_length(name, place)
    bits = elements * _BITS[dtype]
    if bits >= _LIMIT:
        raise _too_large(name, dtype, shape)
    return TensorInfo(dtype, tuple(shape), start, end), bits // 8 if bits % 8 == 0 else -1


def _check_places(tensors: Mapping[str, TensorInfo]) -> None:
    """The tensors lie end to end, in whatever order they are named."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position or info.end < info.start:
            raise Malformed(
                f"tensor '{brief(name)}' is at bytes {info.start} to {info.end}, where one that "
                f"begins at {position} is due"
            )
        if 8 * (info.end - info.start) != info.elements * _BITS[info.dtype]:
            raise Malformed(
                f"tensor '{brief(name)}' has {info.end - info.start} bytes, not those of "
                f"{info.dtype} {_shown(info.shape)}"
            )
        position = info.end


def _no_length(name: str, length: object) -> Malformed:
    return Malformed(f"tensor '{brief(name)}' has {_shown(length)} for a length")


def _too_large(name: str, dtype: str, shape: object) -> Malformed:
    return Malformed(f"tensor '{brief(name)}' is too large: {dtype} {_shown(shape)}")


def _shown(value: object) -> str:
    """A number or a shape, as short as a message can have it."""
    if isinstance(value, (list, tuple)):
        shown = [str(each) if isinstance(each, int) else "?" for each in value[:20]]
        return f"[{', '.join(shown)}{', ...' if len(value) > 20 else ''}]"
    return brief(str(value)) if isinstance(value, (int, float, str)) else type(value).__name__


# JSON, as strictly as the library reads it


class _Doubled(dict[str, Any]):
    """An object in which a key stands twice: the last counts, but all have to make sense."""

    pairs: list[tuple[str, Any]]


def _pairs(found: Mapping[str, Any]) -> Collection[tuple[str, Any]]:
    return found.pairs if isinstance(found, _Doubled) else found.items()


def _check_doubled(document: Mapping[str, Any]) -> None:
    if [name for name, _ in _pairs(document)].count(_METADATA) > 1:
        raise Malformed(f"{_METADATA} is there twice")


def _check_entries(document: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that count; those that they stand in place of are checked here as well."""
    for name, entry in _pairs(document):
        if name == _METADATA:
            continue
        if not isinstance(entry, dict):
            raise Malformed(f"tensor '{brief(name)}' lacks its dtype, shape or data_offsets")
        if isinstance(entry, _Doubled):
            keys = [key for key, _ in entry.pairs]
            if twice := [key for key in _FIELDS if keys.count(key) > 1]:
                raise Malformed(f"tensor '{brief(name)}' has its {twice[0]} twice")
        if len(entry) > len(_FIELDS):
            _check_others(name, entry)
        if isinstance(document, _Doubled):
            _info(name, entry)
    return dict(document)


def _check_others(name: str, entry: Mapping[str, Any]) -> None:
    """Fields that mean nothing may still hold nothing that strict readers of JSON refuse."""
    below: list[tuple[Any, int]] = [(entry, 2)]
    while below:
        value, depth = below.pop()
        if isinstance(value, (dict, list)):
            if depth > _DEPTH:
                raise Malformed("its header is nested too deeply")
            inside = [each for _, each in _pairs(value)] if isinstance(value, dict) else value
            below += [(each, depth + 1) for each in inside]
        elif isinstance(value, (int, float)):
            try:
                finite = math.isfinite(float(value))
            except OverflowError:
                finite = False
            if not finite:
                raise Malformed(f"tensor '{brief(name)}' has a number out of range")


def _pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    doubled = _Doubled(made)
    doubled.pairs = pairs
    return doubled


def _refuse(constant: str) -> NoReturn:
    raise Malformed(f"no JSON: {constant}")


def _whole(text: str) -> int:
    return int(text) if text != "-0" else -1  # a fraction to the library, which has no minus zero


_STRICT = json.JSONDecoder(object_pairs_hook=_pairs_hook, parse_constant=_refuse, parse_int=_whole)
_QUICK = json.JSONDecoder(parse_constant=_refuse)


def _plain(text: str) -> dict[str, Any] | None:
    """A header in which every entry has its three fields and nothing stands twice, else None.

    That is every header that is no attack. Without escapes, keys are what stands before `":`.
    """
    if "\\" in text or any(f"{before}-0" in text for before in f"[,:{_SPACE}"):
        return None
    try:
        document = _QUICK.decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or _METADATA in document:
        return None
    count = len(document)
    every = all(text.count(f'"{field}":') == count for field in _FIELDS)
    return document if every and text.count('":') == 4 * count else None


def _decoded(header: bytes) -> str:
    try:
        return header.decode()
    except UnicodeError:
        raise Malformed("its header is not UTF-8") from None


def _parsed(text: str, start: int | None = None) -> tuple[Any, int]:
    """The JSON value at `start` and where it ends; without it, all of `text`."""
    try:
        if start is None:
            document, end = _STRICT.decode(text), len(text)
        else:
            document, end = _STRICT.raw_decode(text, start)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # maybe half a pair, which can't be encoded
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError:
        raise Malformed("its header has half a surrogate pair") from None
    except RecursionError:
        raise Malformed("its header is nested too deeply") from None
    except json.JSONDecodeError as error:
        problem = error.msg[:1].lower() + error.msg[1:]
        raise Malformed(f"no JSON: {problem} at character {error.pos}") from None
    except ValueError as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed("a number in its header has too many digits") from None
    return document, end
