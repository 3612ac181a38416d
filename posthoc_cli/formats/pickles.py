"""Pickles read as data: the standard library's unpickler, which here calls and imports nothing.

A pickle is a program for a stack machine. What it names is looked up in the caller's table and
becomes a `Global`; what it would call goes to the function that the table has for the name, or is
kept as a `Call`. Only opcodes that move plain values on the stack are the standard library's own;
all that touch a value (call it, set its state, append to it) are written here, for the few types
that a checkpoint is made of. Bytes are not read but kept as a `Span` of the file.

Every length that the pickle claims is checked against the file before anything is allocated, and
an `Allowance` bounds the work and the memory of one file.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from posthoc_cli.errors import IncompleteError, SnapshotError

if TYPE_CHECKING:
    from posthoc_cli.formats.quick import Quick

MAX_UNITS = 4_000_000
"""Of one file: an opcode takes one for each 64 bytes of memory; a tensor about a hundred."""
MAX_TEXT = 1 << 20
"""Bytes of the longest text that is decoded; a longer one is kept as a `Span`, as bytes are."""

_MAX_NAME = 512
_MAX_INTEGER = 255
_SHOWN = 100

Make = Callable[[tuple[Any, ...]], Any]
Names = Mapping[tuple[str, str], Make | None]
Others = Callable[[str, str], Make | None]
Persistent = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The name of a class or function, never the thing itself; `make` is what we do instead."""

    module: str
    name: str
    make: Make | None = None

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")

    def call(self, args: tuple[Any, ...]) -> Any:
        return self.make(args) if self.make else Call(self, args)


@dataclass(slots=True, eq=False)
class Call:
    """What would be `function(*args)`, given `state` afterwards, if anything were run.

    `items` are those of a dict, or of a list, that is of a class of its own.
    """

    function: Global
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] | list[Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Bytes, or a very long text, left where they are: `length` bytes from byte `offset`."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """A dict's key that is neither text nor a number.

    It stands for itself only: to hash what a hostile file nests would take for ever.
    """

    value: Any


class Allowance:
    """What is left of the units that one file may take."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_UNITS

    def take(self, units: int) -> None:
        """Raises SnapshotError when there are not so many left."""
        self.left -= units
        if self.left < 0:
            raise refused(
                "holds too many values besides its tensors to be read safely",
                "save the weights alone, with torch.save(model.state_dict(), ...)",
            )


def unpickle(
    file: BinaryIO,
    end: int,
    names: Names,
    persistent: Persistent | None = None,
    allowance: Allowance | None = None,
    others: Others | None = None,
    base: int = 0,
    quick: Quick | None = None,
) -> Any:
    """The value of the pickle at the position of `file`, which is left after its end.

    `names` has the (module, name) pairs that the pickle may name, and for each what makes the value
    of a call from its arguments, or None. `others(module, name)` says the same of any other name,
    or raises; without it, no other may be named. `persistent(identity)` is the value of a
    persistent id. All must be quick, whatever they are given. The pickle lies before byte `end`.
    `base` is added to the places of what is left unread, and `quick` takes tensors at once.
    Values may be shared and may contain themselves: who walks them must count. Sets come as lists
    and frozensets as tuples.

    Raises SnapshotError, without the file's name, for a pickle that is broken, too large for its
    `allowance`, or that names anything else; OSError when the file can't be read.
    """
    machine = Unpickler(file, end, names, persistent, allowance or Allowance(), others)
    machine.base, machine.quick = base, quick
    return machine.load()


def refused(problem: str, remedy: str) -> SnapshotError:
    """The error for a checkpoint; `naming` adds the file's name."""
    return SnapshotError("", problem, remedy)


def needed(name: object) -> SnapshotError:
    """The error for what would have to be run to be had."""
    return refused(
        f"needs '{name}', which isn't data",
        "nothing in a file is run: save the weights alone, as a state dict of tensors",
    )


def corrupt(detail: str) -> SnapshotError:
    """The error for a checkpoint that no writer can have meant; `naming` adds the file's name."""
    return refused(f"not a whole checkpoint ({detail})", "copy it again or leave it out")


def cut_short(detail: str = "it ends too early") -> IncompleteError:
    """The same for one whose end is missing, as that of one that is being written."""
    remedy = "wait until it is written, copy it again, or leave it out"
    return IncompleteError("", f"not a whole checkpoint ({detail})", remedy)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the errors of `refused` and `corrupt` the file's name; others have one."""
    try:
        yield
    except SnapshotError as error:
        if error.subject:
            raise
        raise type(error)(str(path), error.problem, error.remedy) from None


def shown(text: str, most: int = _SHOWN) -> str:
    """`text` short enough for a message."""
    return text if len(text) <= most else f"{text[:most]}…"


class Unpickler(pickle._Unpickler):
    """`stack` holds the values since the last mark, `metastack` the stacks below each mark."""

    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    base: int
    quick: Quick | None
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: BinaryIO,
        end: int,
        names: Names,
        persistent: Persistent | None,
        allowance: Allowance,
        others: Others | None,
    ) -> None:
        super().__init__(file)
        self.file = file
        self.end = end
        self.names = names
        self.persistent = persistent
        self.allowance = allowance
        self.others = others
        self.read = file.read
        self.readline = self.line

    def load(self) -> Any:
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        read, allowance = self.read, self.allowance
        try:
            while (code := read(1)[0]) != _STOP:
                allowance.left -= _UNITS[code]
                if allowance.left < 0:
                    allowance.take(0)
                _ACTIONS[code](self)
            value = self.stack.pop()
            self.claim(0)
        except (IndexError, struct.error):
            self.claim(1)
            raise corrupt("its stack is empty") from None
        except UnicodeDecodeError:
            self.claim(0)
            raise corrupt("a text that isn't UTF-8") from None
        except (pickle.UnpicklingError, ValueError) as error:
            self.claim(0)
            raise corrupt(str(error)) from None
        except SnapshotError:
            self.claim(0)  # what lies behind the pickle is none of its mistakes
            raise
        return value

    def claim(self, length: int) -> int:
        """The position. Raises SnapshotError unless there are `length` more bytes."""
        position = self.file.tell()
        if position + length > self.end:
            raise cut_short()
        return position

    def number(self, length: int) -> int:
        return int.from_bytes(self.read(length), "little")

    def line(self) -> bytes:
        line = self.file.readline(_MAX_NAME)
        if not line.endswith(b"\n"):
            raise corrupt("a name without an end") if len(line) >= _MAX_NAME else cut_short()
        return line

    def find_class(self, module: str, name: str) -> Global:
        module = _RENAMED.get(module, module)
        if (module, name) in self.names:
            found = Global(module, name, self.names[module, name])
            return (
                found if self.quick is None else self.quick.names.setdefault((module, name), found)
            )
        if self.others is None:
            raise needed(Global(module, name))
        return Global(module, name, self.others(module, name))

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise corrupt("a persistent id outside of torch.save's files")
        return self.persistent(pid)

    # Opcodes that are not the standard library's.

    def get(self, length: int) -> None:
        place = self.number(length)
        if place not in self.memo:
            raise corrupt(f"nothing is kept at place {place}")
        value = self.memo[place]
        self.append(value)
        quick = self.quick
        if quick is not None and isinstance(value, Global) and value.make is quick.rebuild:
            quick.take(self)

    def frame(self) -> None:
        self.claim(self.number(8))  # a hint for buffering: what it frames simply follows

    def leave(self, length: int) -> None:
        """Go past bytes without reading them."""
        position = self.claim(length)
        self.file.seek(position + length)
        self.append(Span(self.base + position, length))

    def text(self, length: int) -> None:
        if length > MAX_TEXT:
            self.leave(length)
            return
        data = self.read(length)
        if len(data) != length:
            raise cut_short()
        text = data.decode("utf-8", "surrogatepass")
        self.allowance.take(sys.getsizeof(text) >> 6)
        self.append(text)

    def integer(self, length: int) -> None:
        if length > _MAX_INTEGER:
            raise corrupt("an integer of more than 255 bytes")
        self.append(int.from_bytes(self.read(length), "little", signed=True))

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call) and not isinstance(target.items, dict):
            target.items = target.items or []
            target = target.items
        if not isinstance(target, list):
            raise corrupt("it appends to what isn't a list")
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call) and not isinstance(target.items, list):
            target.items = target.items or {}
            target = target.items
        if not isinstance(target, dict):
            raise corrupt("it sets items of what isn't a dict")
        if len(values) % 2:
            raise corrupt("a dict's key without a value")
        self.allowance.take(len(values))
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_hashable(key)] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def make_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self.update(values)

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise corrupt("it calls what isn't a function")
        self.append(function.call(args))

    def call_with_keywords(self) -> None:
        keywords = self.stack.pop()
        function = self.stack[-2]
        if keywords and (not isinstance(function, Global) or function.make):
            raise corrupt("it calls with keywords what takes none")
        self.call()

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif target is None or isinstance(target, _STATELESS):
            raise corrupt("it gives a state to what has none")


def _hashable(key: Any) -> Any:
    # Integers of any length with one hash are easily made, those of 64 bits are not.
    if key is None or isinstance(key, str | float):
        return key
    return key if isinstance(key, int) and key.bit_length() < 64 else Key(key)


def _refuse(code: int, machine: Unpickler) -> None:
    name = _REFUSED.get(bytes([code]))
    if name is None:
        raise corrupt(f"no pickle has the opcode {code:#04x}")
    raise refused(
        f"a pickle with the opcode {name}, which no checkpoint needs",
        "save it again with pickle protocol 2 or newer",
    )


_STATELESS = (list, tuple, str, int, float, Span, Global)
_RENAMED = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}
"""Modules as Python 2, protocol 2 and older versions of torch call them."""

_STANDARD: dict[bytes, Callable[[Any], None]] = {
    opcode: pickle._Unpickler.dispatch[opcode[0]]
    for opcode in (
        *(pickle.PROTO, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE),
        *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
        *(pickle.BINFLOAT, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.TUPLE, pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT, pickle.GLOBAL),
        *(pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    )
}
"""Opcodes that are the standard library's: they move plain values, or call what is overridden."""
_OWN: dict[bytes, Callable[[Unpickler], None]] = {
    pickle.FRAME: Unpickler.frame,
    pickle.BINGET: lambda machine: machine.get(1),
    pickle.LONG_BINGET: lambda machine: machine.get(4),
    pickle.SHORT_BINUNICODE: lambda machine: machine.text(machine.number(1)),
    pickle.BINUNICODE: lambda machine: machine.text(machine.number(4)),
    pickle.BINUNICODE8: lambda machine: machine.text(machine.number(8)),
    pickle.SHORT_BINSTRING: lambda machine: machine.text(machine.number(1)),  # of Python 2: names
    pickle.BINSTRING: lambda machine: machine.text(machine.number(4)),
    pickle.SHORT_BINBYTES: lambda machine: machine.leave(machine.number(1)),
    pickle.BINBYTES: lambda machine: machine.leave(machine.number(4)),
    pickle.BINBYTES8: lambda machine: machine.leave(machine.number(8)),
    pickle.BYTEARRAY8: lambda machine: machine.leave(machine.number(8)),
    pickle.LONG1: lambda machine: machine.integer(machine.number(1)),
    pickle.LONG4: lambda machine: machine.integer(machine.number(4)),
    pickle.APPEND: lambda machine: machine.extend([machine.stack.pop()]),
    pickle.APPENDS: lambda machine: machine.extend(machine.pop_mark()),
    pickle.EMPTY_SET: _STANDARD[pickle.EMPTY_LIST],
    pickle.ADDITEMS: lambda machine: machine.extend(machine.pop_mark()),
    pickle.FROZENSET: _STANDARD[pickle.TUPLE],
    pickle.SETITEM: Unpickler.set_item,
    pickle.SETITEMS: lambda machine: machine.update(machine.pop_mark()),
    pickle.DICT: Unpickler.make_dict,
    pickle.REDUCE: Unpickler.call,
    pickle.NEWOBJ: Unpickler.call,  # a class and its arguments, rather than a function and its
    pickle.NEWOBJ_EX: Unpickler.call_with_keywords,
    pickle.BUILD: Unpickler.set_state,
}
_REFUSED = {
    pickle.FLOAT: "FLOAT", pickle.INT: "INT", pickle.LONG: "LONG", pickle.STRING: "STRING",
    pickle.UNICODE: "UNICODE", pickle.PERSID: "PERSID", pickle.GET: "GET", pickle.PUT: "PUT",
    pickle.INST: "INST", pickle.OBJ: "OBJ", pickle.EXT1: "EXT1", pickle.EXT2: "EXT2",
    pickle.EXT4: "EXT4", pickle.NEXT_BUFFER: "NEXT_BUFFER",
    pickle.READONLY_BUFFER: "READONLY_BUFFER",
}  # fmt: skip
_COSTLY = {
    2: (pickle.MARK, pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_SET, pickle.TUPLE1,
        pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE, pickle.FROZENSET, pickle.BINPUT,
        pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.SHORT_BINBYTES, pickle.BINBYTES,
        pickle.BINBYTES8, pickle.BYTEARRAY8),
    3: (pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
    4: (pickle.EMPTY_DICT, pickle.DICT, pickle.REDUCE, pickle.NEWOBJ,
        pickle.NEWOBJ_EX),
    6: (pickle.LONG1, pickle.LONG4),
}  # fmt: skip
"""Opcodes that take more than one unit: what they make, or its place in a container, is larger."""

_STOP = pickle.STOP[0]
_ACTIONS: list[Callable[[Any], None]] = [partial(_refuse, code) for code in range(256)]
for _opcode, _action in (_STANDARD | _OWN).items():
    _ACTIONS[_opcode[0]] = _action
_UNITS = bytearray([1] * 256)
for _units, _opcodes in _COSTLY.items():
    for _opcode in _opcodes:
        _UNITS[_opcode[0]] = _units
