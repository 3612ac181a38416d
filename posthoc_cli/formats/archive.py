"""Zip archives: where their entries lie, of thousands in a few milliseconds."""

from __future__ import annotations

import struct
from typing import BinaryIO

from posthoc_cli.formats.pickles import corrupt, cut_short, shown
from posthoc_cli.formats.tensors import unsupported

STORED, DEFLATED = 0, 8

_MAX_DIRECTORY = 8 << 20
_END, _LOCATOR, _END_64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_ENTRY = struct.Struct("<4s4x2H4x3L3H8xL")
_WIDE = 0xFFFFFFFF


Entry = tuple[int, int, int, int, int, int]
"""The byte at which an entry's header begins, the bytes it takes and those that it is, the method
by which it is packed, its CRC-32, and 1 for one that is encrypted: thousands of a class would take
longer."""


def read_directory(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The entries of an archive by name, as its central directory has them.

    Raises SnapshotError for a directory that is missing, broken, or too large to be one.
    """
    try:
        data = _directory(file, size)
        entries: dict[str, Entry] = {}
        at, end, size_of, unpack = 0, len(data), _ENTRY.size, _ENTRY.unpack_from
        while at < end:
            magic, flags, method, crc, packed, length, *sizes, header = unpack(data, at)
            names, extras, comments = sizes
            begin = at + size_of
            at = begin + names + extras + comments
            if magic != b"PK\x01\x02" or at > end:
                raise ValueError
            if packed == _WIDE or length == _WIDE or header == _WIDE:
                extra = data[begin + names : begin + names + extras]
                length, packed, header = _wide(extra, length, packed, header)
            name = data[begin : begin + names].decode("utf-8" if flags & 0x800 else "cp437")
            if name in entries:
                raise corrupt(f"two entries are named {shown(name)}")
            entries[name] = header, packed, length, method, crc, flags & 1
    except EOFError:
        raise cut_short("its end is missing") from None
    except (struct.error, ValueError):
        raise corrupt("its directory is broken") from None
    return entries


def _directory(file: BinaryIO, size: int) -> bytes:
    """The bytes of the central directory.

    Raises EOFError where there is none, and ValueError or struct.error where it is broken.
    """
    first = max(size - (1 << 16) - 22, 0)
    file.seek(first)
    tail = file.read(size - first)
    at = tail.rfind(_END)
    if at < 0 or at + 22 > len(tail):
        raise EOFError
    length, start = struct.unpack_from("<2L", tail, at + 12)
    end = first + at
    if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR:
        (place,) = struct.unpack_from("<Q", tail, at - 12)
        file.seek(min(place, size))
        magic, length, start = struct.unpack("<4s36x2Q", file.read(56))
        if magic != _END_64:
            raise ValueError
        end = place
    if start + length > end:
        raise ValueError
    if length > _MAX_DIRECTORY:
        raise corrupt("its directory is too large")
    file.seek(start)
    data = file.read(length)
    if len(data) < length:
        raise ValueError
    return data


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Those of length, packed length and place that 32 bits can't hold, in their order."""
    at = 0
    while at + 4 <= len(extra):
        kind, count = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{count // 8}Q", extra, at + 4))
            return [next(wide, field) if field == _WIDE else field for field in fields]
        at += 4 + count
    return list(fields)


def entry_start(file: BinaryIO, size: int, entry: Entry, what: str) -> int:
    """The byte of the file, which has `size`, at which an entry's bytes begin.

    Raises SnapshotError for an entry that isn't there, or that is kept in an unknown way.
    """
    header, packed, length, method, _, encrypted = entry
    if encrypted or method not in (STORED, DEFLATED) or (method == STORED and packed != length):
        raise unsupported(
            f"a zip archive whose {shown(what)} is compressed or encrypted, and not deflated"
        )
    if not 0 <= header < size:
        raise corrupt(f"{shown(what)} lies outside of it")
    file.seek(header)
    data = file.read(30)
    if len(data) < 30 or data[:4] != b"PK\x03\x04":
        raise corrupt(f"{shown(what)} is not where its directory says")
    start: int = header + 30 + (data[26] | data[27] << 8) + (data[28] | data[29] << 8)
    if start + packed > size:
        raise corrupt(f"{shown(what)} ends outside of it")
    return start
