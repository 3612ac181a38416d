"""Tensors of an archive's pickle taken at once, where they are written as torch.save writes them.

A tensor takes some thirty opcodes, and a run has hundreds of thousands of tensors. What the opcodes
would do is done here in one step, to the same effect; and where the file before has the very same
bytes at this point, and what they refer to is the same, its tensor is taken for this one's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

from posthoc_cli.formats.pickles import Global, Make, Unpickler
from posthoc_cli.formats.tensors import Storage, StoredTensor

_GET, _PUT, _INT = rb"(h.|j.{4})", rb"(q.|r.{4})", rb"(?:K.|M..|J.{4})"
_SIZES = rb"(?:\)|(\(?)((?:" + _INT + rb"){1,8})([\x85\x86\x87t])" + _PUT + rb")"
_TENSOR = re.compile(
    rb"\(\(" + _GET + _GET + rb"X(.)\0\0\0([0-9]{1,9})" + _PUT + _GET
    + rb"(" + _INT + rb")t" + _PUT + rb"Q(" + _INT + rb")" + _SIZES + _SIZES
    + rb"\x89" + _GET + rb"\)R" + _PUT + rb"t" + _PUT + rb"R" + _PUT,
    re.DOTALL,
)  # fmt: skip
"""What follows the function that rebuilds a tensor: its storage, place, shape and strides."""

_INTEGERS = re.compile(_INT, re.DOTALL)
_ENDS = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_UNITS = 40
"""What the opcodes take of the allowance, but for those of shape and strides."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A tensor's bytes, what they refer to and what they put into the memo."""

    data: bytes
    refers: tuple[tuple[int, Any], ...]
    puts: dict[int, Any]
    hooks: int
    key: str
    tensor: StoredTensor
    units: int


@dataclass(slots=True)
class Quick:
    """Takes the tensors of the pickle `data`; `before` is that of the file before.

    `rebuild` is what is done in place of torch's function that rebuilds a tensor, `storages` those
    of the pickle. Names are the same object in both files.
    """

    data: bytes
    rebuild: Make
    storages: dict[str, Storage]
    before: list[_Known]
    names: dict[tuple[str, str], Global]
    known: list[_Known] = field(default_factory=list)

    def take(self, machine: Unpickler) -> None:
        """Put the tensor whose parts come next in the place of the function on the stack, if they
        are written as usual; else do nothing."""
        at = machine.file.tell()
        known = self._again(machine.memo, at) or self._parsed(machine, at)
        if known is None:
            return
        machine.allowance.take(known.units)
        self.known.append(known)
        self.storages[known.key] = known.tensor.storage
        machine.memo.update(known.puts)
        machine.memo[known.hooks] = {}
        machine.file.seek(at + len(known.data))
        machine.stack[-1] = known.tensor

    def _again(self, memo: dict[int, Any], at: int) -> _Known | None:
        """What the file before has, if this one has the same."""
        if len(self.known) >= len(self.before):
            return None
        known = self.before[len(self.known)]
        storage = known.tensor.storage
        if not self.data.startswith(known.data, at):
            return None
        if self.storages.get(known.key, storage) is not storage:
            return None
        for index, value in known.refers:
            found = memo.get(index)
            if found is not value and not (isinstance(value, str) and found == value):
                return None
        return known

    def _parsed(self, machine: Unpickler, at: int) -> _Known | None:
        match = _TENSOR.match(self.data, at)
        if match is None:
            return None
        text, kind, length, name, put_name, device, count, put_identity, start = match.groups()[:9]
        mapping, put_mapping, put_args, put_tensor = match.groups()[17:]
        shape, strides = _sizes(*match.groups()[9:13]), _sizes(*match.groups()[13:17])
        memo, places = machine.memo, [_number(each) for each in (text, kind, device, mapping)]
        if length[0] != len(name) or shape is None or strides is None:
            return None
        label, storage_of, where, ordered = values = [memo.get(place) for place in places]
        plain = isinstance(label, str) and isinstance(where, str)
        if not (plain and isinstance(storage_of, Global) and isinstance(ordered, Global)):
            return None
        if (ordered.module, ordered.name) != ("collections", "OrderedDict"):
            return None
        assert machine.persistent is not None
        key = name.decode()
        identity = label, storage_of, key, where, _number(count)
        storage = machine.persistent(identity)
        args: tuple[Any, ...] = storage, _number(start), shape[0], strides[0], False, {}
        tensor = cast(StoredTensor, self.rebuild(args))
        puts = {_number(put_name): key, _number(put_identity): identity}
        puts |= {place: sizes for sizes, place in (shape, strides) if place >= 0}
        hooks = _number(put_mapping)
        puts |= {hooks: {}, _number(put_args): args, _number(put_tensor): tensor}
        if len(puts) != 5 + sum(place >= 0 for _, place in (shape, strides)):
            return None  # one place for two values
        refers = tuple(zip(places, values, strict=True))
        units = _UNITS + 7 * (len(shape[0]) + len(strides[0]))
        return _Known(match[0], refers, puts, hooks, key, tensor, units)


def _number(written: bytes) -> int:
    return int.from_bytes(written[1:], "little", signed=written[:1] == b"J")


def _sizes(
    mark: bytes | None, written: bytes | None, end: bytes | None, put: bytes | None
) -> tuple[tuple[int, ...], int] | None:
    """A tuple and its place in the memo, -1 for none; None for one that no pickler writes so."""
    if written is None or end is None or put is None:
        return (), -1
    sizes = tuple(map(_number, _INTEGERS.findall(written)))
    if (mark == b"(") != (end == b"t") or _ENDS.get(end, len(sizes)) != len(sizes):
        return None
    return sizes, _number(put)
