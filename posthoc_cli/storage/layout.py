"""What the JSON of a safetensors header says: parsed, and checked as the safetensors library does.

The library itself maps a file into memory to check it, which some network file systems refuse; so
all it asks of a header is asked here, of bytes that were read. Beyond it, a name may stand once
only: of a tensor or a key that is there twice, nobody could say which one is meant.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from posthoc_cli.errors import brief
from posthoc_cli.storage.dtypes import DTYPES

_LIMIT = 1 << 64
"""Lengths and offsets are below it, and so is every product of lengths."""

_DEPTH = 127
"""The most objects and lists inside each other."""

_METADATA = "__metadata__"
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


def split_metadata(header: bytes) -> tuple[dict[str, str], bytes]:
    """The `__metadata__` of a header, and the rest of the header as bytes that ignore it.

    Snapshots of one run differ in their metadata only; every writer puts it first, so what follows
    it can be compared between files without being parsed. Raises Malformed.
    """
    try:
        text = header.decode()
        if opening := re.match(rf'[{_SPACE}]*\{{[{_SPACE}]*"{_METADATA}"[{_SPACE}]*:[{_SPACE}]*', text):
            found, end = _decoder(text).raw_decode(text, opening.end())
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
            document = _decoder(text).decode(text)
            if not isinstance(document, dict):
                raise Malformed("its header is no JSON object")
            found = document.pop(_METADATA, None)
            rest = json.dumps(document, separators=(",", ":"))
        _check_metadata(found)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # halves of pairs can't be encoded
    except UnicodeError:
        raise Malformed("its header is not UTF-8") from None
    except RecursionError:
        raise Malformed("its header is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _no_json(error) from None
    except ValueError as error:
        raise error if isinstance(error, Malformed) else Malformed(_number_problem()) from None
    return found or {}, rest.encode()


def parse_tensors(rest: bytes) -> dict[str, TensorInfo]:
    """The tensors of a header without its metadata: they fill the data section without a gap.

    Raises Malformed, for the same tensor in every run.
    """
    try:
        text = rest.decode()
        document = _decoder(text).decode(text)
        if not isinstance(document, dict):
            raise Malformed("its header is no JSON object")
        if _METADATA in document:
            raise Malformed(f"{_METADATA} is there twice")
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError:
        raise Malformed("its header is not UTF-8") from None
    except RecursionError:
        raise Malformed("its header is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _no_json(error) from None
    except ValueError as error:
        raise error if isinstance(error, Malformed) else Malformed(_number_problem()) from None
    return _check_tensors(document)


def _check_metadata(found: Any) -> None:
    if found is None:
        return
    if not isinstance(found, dict):
        raise Malformed(f"{_METADATA} is no JSON object")
    for key, value in found.items():
        if not isinstance(value, str):
            raise Malformed(f"the metadata's '{brief(key)}' is no text")


def _check_tensors(document: Mapping[str, Any]) -> dict[str, TensorInfo]:
    tensors = {name: _info(name, entry) for name, entry in document.items()}
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position or info.end < info.start:
            raise Malformed(
                f"tensor '{brief(name)}' is at bytes {info.start} to {info.end}, where one that "
                f"begins at {position} is due"
            )
        bits = _size(name, info)
        if bits != 8 * (info.end - info.start):
            raise Malformed(
                f"tensor '{brief(name)}' has {info.end - info.start} bytes, not those of "
                f"{info.dtype} {_shown(info.shape)}"
            )
        position = info.end
    return tensors


def _info(name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, IndexError):
        raise Malformed(f"tensor '{brief(name)}' lacks its dtype, shape or data_offsets") from None
    if type(dtype) is not str or dtype not in _BITS:
        raise Malformed(f"tensor '{brief(name)}' has an unknown dtype, {brief(repr(dtype))}")
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise Malformed(f"tensor '{brief(name)}' has no shape or no data_offsets")
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number < _LIMIT:
            raise Malformed(f"tensor '{brief(name)}' has {brief(repr(number))} for a length")
    if len(entry) > 3:
        _check_others(name, entry)
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _size(name: str, info: TensorInfo) -> int:
    """Bits of a tensor; every product on the way to it is below the limit."""
    elements = 1
    for length in info.shape:
        elements *= length
        if elements >= _LIMIT:
            break
    bits = elements * _BITS[info.dtype]
    if bits >= _LIMIT:
        raise Malformed(f"tensor '{brief(name)}' is too large: {info.dtype} {_shown(info.shape)}")
    return bits


def _shown(shape: tuple[int, ...]) -> str:
    return brief(str(list(shape[:100])))


def _check_others(name: str, entry: Mapping[str, Any]) -> None:
    """Fields that mean nothing may still hold nothing that JSON's strict readers refuse."""
    below: list[tuple[Any, int]] = [(entry, 2)]
    while below:
        value, depth = below.pop()
        if isinstance(value, (dict, list)):
            if depth > _DEPTH:
                raise Malformed("its header is nested too deeply")
            inside = value.values() if isinstance(value, dict) else value
            below += [(each, depth + 1) for each in inside]
        elif isinstance(value, (int, float)):
            try:
                finite = math.isfinite(float(value))
            except OverflowError:
                finite = False
            if not finite:
                raise Malformed(f"tensor '{brief(name)}' has a number out of range")


# JSON, strictly


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Malformed(f"'{brief(key)}' is there twice")
            seen.add(key)
    return made


def _refuse(constant: str) -> NoReturn:
    raise Malformed(f"no JSON: {constant}")


def _whole(text: str) -> int:
    return int(text) if text != "-0" else -1  # a fraction to the library, which has no minus zero


_PLAIN = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
_CAREFUL = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_whole)


def _decoder(text: str) -> json.JSONDecoder:
    return _CAREFUL if "-0" in text else _PLAIN


def _no_json(error: json.JSONDecodeError) -> Malformed:
    return Malformed(f"no JSON: {error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}")


def _number_problem() -> str:
    return "a number in its header has too many digits"
