"""Pickles read as data: a small interpreter of pickle's opcodes that never calls anything.

A pickle is a program for a stack machine. Here the machine only holds data: a name of a class or
function is a `Global`, and must be on the caller's list; what the pickle would call is handed to
the caller's `build`, which answers with data, or is kept as a `Call`. Nothing is imported. Bytes
are not read but kept as a `Span` of the file, so that weights inside a pickle cost no memory.

Every length that the pickle claims is checked against the file before anything is allocated, and
an `Allowance` bounds the number of opcodes and the memory of all values together.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from posthoc_cli.errors import SnapshotError

MAX_OPCODES = 4_000_000
"""Of one file: a state dict takes about sixty a tensor."""
MAX_HELD = 256 << 20
"""Bytes that the values of one file may take in memory, by an estimate on the high side."""
MAX_TEXT = 1 << 20
"""Bytes of the longest text that is decoded; a longer one is kept as a `Span`, as bytes are."""

_WINDOW = 1 << 16
_MAX_NAME = 512
_MAX_INTEGER = 255
_SHOWN = 100

# What a value of each kind takes in memory, its place in a container that grows included.
_SLOT, _NUMBER, _NODE, _LIST, _DICT, _ENTRY = 16, 48, 128, 104, 280, 120

Build = Callable[["Global", tuple[Any, ...]], Any]
Persistent = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The name of a class or function; never the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclass(slots=True, eq=False)
class Call:
    """What would be `function(*args)`, given `state` afterwards, if anything were run."""

    function: Global
    args: tuple[Any, ...]
    state: Any = None


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
    """What is left of the opcodes and the memory that one file may take."""

    __slots__ = ("held", "opcodes")

    def __init__(self) -> None:
        self.opcodes = MAX_OPCODES
        self.held = MAX_HELD


class Source:
    """Bytes `start` to `end` of an open file, read in order through a small window."""

    def __init__(self, path: Path, file: BinaryIO, start: int, end: int) -> None:
        self.path = path
        self.file = file
        self.end = end
        self._window = b""
        self._base = start  # of the window, in the file
        self._at = 0  # in the window, or beyond it

    @property
    def position(self) -> int:
        """The byte of the file that comes next; to be set only to where it has been."""
        return self._base + self._at

    @position.setter
    def position(self, position: int) -> None:
        self._window, self._base, self._at = b"", position, 0

    def byte(self) -> int:
        """The next byte. Raises SnapshotError when the source has ended."""
        at = self._at
        if at >= len(self._window):
            self._refill(1)
            at = 0
        self._at = at + 1
        return self._window[at]

    def take(self, length: int) -> bytes:
        """The next `length` bytes. Raises SnapshotError when the source ends before them."""
        at = self._at
        end = at + length
        if end > len(self._window):
            self._refill(length)
            at, end = 0, length
        self._at = end
        return self._window[at:end]

    def peek(self, length: int) -> bytes:
        """At most the next `length` bytes, which stay the next."""
        piece = self.take(min(length, self.end - self.position))
        self._at -= len(piece)
        return piece

    def skip(self, length: int) -> Span:
        """Go past the next `length` bytes without reading them. Raises SnapshotError as `take`."""
        self.check(length)
        span = Span(self.position, length)
        self._at += length
        return span

    def line(self) -> bytes:
        """The next bytes up to a newline, which is left out. Raises SnapshotError as `take`."""
        text, newline, _ = self.peek(_MAX_NAME).partition(b"\n")
        if not newline:
            self.check(_MAX_NAME)
            raise corrupt(self.path, "a name without an end")
        self._at += len(text) + 1
        return text

    def check(self, length: int) -> None:
        """Raises SnapshotError when fewer than `length` bytes are left."""
        if length > self.end - self.position:
            raise corrupt(self.path, "it ends too early")

    def _refill(self, length: int) -> None:
        """Move the window to the next byte, and make it hold at least `length`."""
        self.check(length)
        self._base, self._at = self.position, 0
        wanted = min(max(length, _WINDOW), self.end - self._base)
        self.file.seek(self._base)
        self._window = self.file.read(wanted)
        if len(self._window) != wanted:
            raise corrupt(self.path, "its length changed while it was read")


def unpickle(
    source: Source,
    allowed: Container[tuple[str, str]],
    build: Build = Call,
    persistent: Persistent | None = None,
    allowance: Allowance | None = None,
) -> Any:
    """The value of the pickle that starts at `source.position`, which is left after its end.

    `allowed` holds the (module, name) pairs that the pickle may name. `build(function, args)` gives
    the value of a call, `persistent(identity)` that of a persistent id; both must be quick and
    hold on to nothing large, whatever they are given. Values may be shared and may contain
    themselves: who walks them must count. Sets come as lists and frozensets as tuples.

    Raises SnapshotError for a pickle that is broken, too large for its `allowance`, or that names
    anything else than what is allowed; MachineError never, OSError when the file can't be read.
    """
    return _Machine(source, allowed, build, persistent, allowance or Allowance()).run()


def corrupt(path: Path, detail: str) -> SnapshotError:
    """The error for a checkpoint that no writer can have meant."""
    return SnapshotError(
        str(path), f"not a whole checkpoint ({detail})", "copy it again or leave it out"
    )


def shown(text: str) -> str:
    """`text` short enough for a message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class _Machine:
    """The stack machine. `marked` holds the stacks below each mark, innermost last."""

    def __init__(
        self,
        source: Source,
        allowed: Container[tuple[str, str]],
        build: Build,
        persistent: Persistent | None,
        allowance: Allowance,
    ) -> None:
        self.source = source
        self.allowed = allowed
        self.build = build
        self.persistent = persistent
        self.allowance = allowance
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        byte, allowance = self.source.byte, self.allowance
        while True:
            code = byte()
            if code == _STOP:
                return self.pop()
            allowance.opcodes -= 1
            if allowance.opcodes < 0 or allowance.held < 0:
                raise self.too_large()
            action = _ACTIONS.get(code)
            if action is None:
                raise self.refused(code)
            action(self)

    # Errors.

    def broken(self, detail: str) -> SnapshotError:
        return corrupt(self.source.path, detail)

    def too_large(self) -> SnapshotError:
        return SnapshotError(
            str(self.source.path),
            "holds too many values besides its tensors to be read safely",
            "save the weights alone, with torch.save(model.state_dict(), ...)",
        )

    def refused(self, code: int) -> SnapshotError:
        name = _REFUSED.get(code)
        if name is None:
            return self.broken(f"no pickle has the opcode {code:#04x}")
        return SnapshotError(
            str(self.source.path),
            f"a pickle with the opcode {name}, which no checkpoint needs",
            "save it again with pickle protocol 2 or newer",
        )

    # The stack. What is pushed is paid for by who makes it.

    def push(self, value: Any, cost: int) -> None:
        self.allowance.held -= cost
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.broken("its stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise self.broken("its stack is empty")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marked:
            raise self.broken("a mark is missing")
        values, self.stack = self.stack, self.marked.pop()
        return values

    def number(self, length: int) -> int:
        return int.from_bytes(self.source.take(length), "little")

    # Opcodes, one method each.

    def proto(self) -> None:
        version = self.source.byte()
        if version > 5:
            raise self.broken(f"pickle protocol {version} is not known")

    def frame(self) -> None:
        self.source.check(self.number(8))  # a hint for buffering: what it frames simply follows

    def mark(self) -> None:
        self.allowance.held -= _LIST
        self.marked.append(self.stack)
        self.stack = []

    def discard(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def discard_to_mark(self) -> None:
        self.pop_to_mark()

    def duplicate(self) -> None:
        self.push(self.top(), _SLOT)

    def none(self) -> None:
        self.push(None, _SLOT)

    def true(self) -> None:
        self.push(True, _SLOT)

    def false(self) -> None:
        self.push(False, _SLOT)

    def integer1(self) -> None:
        self.push(self.source.byte(), _SLOT)

    def integer2(self) -> None:
        self.push(self.number(2), _NUMBER)

    def integer4(self) -> None:
        self.push(int.from_bytes(self.source.take(4), "little", signed=True), _NUMBER)

    def long1(self) -> None:
        self._long(self.source.byte())

    def long4(self) -> None:
        self._long(self.number(4))

    def _long(self, length: int) -> None:
        if length > _MAX_INTEGER:
            raise self.broken("an integer of more than 255 bytes")
        data = self.source.take(length)
        self.push(int.from_bytes(data, "little", signed=True), _NUMBER + length * 2)

    def floating(self) -> None:
        self.push(struct.unpack(">d", self.source.take(8))[0], _NUMBER)

    def text1(self) -> None:
        self._text(self.source.byte())

    def text4(self) -> None:
        self._text(self.number(4))

    def text8(self) -> None:
        self._text(self.number(8))

    def _text(self, length: int) -> None:
        if length > MAX_TEXT:
            self.push(self.source.skip(length), _NODE)
            return
        try:
            text = self.source.take(length).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.broken("a text that isn't UTF-8") from None
        self.push(text, sys.getsizeof(text) + _SLOT)

    def bytes1(self) -> None:
        self.push(self.source.skip(self.source.byte()), _NODE)

    def bytes4(self) -> None:
        self.push(self.source.skip(self.number(4)), _NODE)

    def bytes8(self) -> None:
        self.push(self.source.skip(self.number(8)), _NODE)

    def empty_tuple(self) -> None:
        self.push((), _SLOT)

    def tuple1(self) -> None:
        self._tuple(1)

    def tuple2(self) -> None:
        self._tuple(2)

    def tuple3(self) -> None:
        self._tuple(3)

    def _tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise self.broken("its stack is empty")
        value = tuple(self.stack[-length:])
        del self.stack[-length:]
        self.push(value, _LIST)

    def tuple_(self) -> None:
        values = self.pop_to_mark()
        self.push(tuple(values), _LIST + _SLOT * len(values))

    def empty_list(self) -> None:
        self.push([], _LIST)

    def list_(self) -> None:
        values = self.pop_to_mark()
        self.push(values, _LIST)

    def append(self) -> None:
        value = self.pop()
        self._extend([value])

    def appends(self) -> None:
        values = self.pop_to_mark()
        self._extend(values)

    def _extend(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise self.broken("it appends to what isn't a list")
        self.allowance.held -= _SLOT * len(values)
        target.extend(values)

    def frozenset_(self) -> None:
        self.tuple_()

    def empty_dict(self) -> None:
        self.push({}, _DICT)

    def dict_(self) -> None:
        values = self.pop_to_mark()
        self.push({}, _DICT)
        self._set(values)

    def set_item(self) -> None:
        value = self.pop()
        key = self.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self.pop_to_mark())

    def _set(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict):
            raise self.broken("it sets items of what isn't a dict")
        if len(values) % 2:
            raise self.broken("a dict's key without a value")
        self.allowance.held -= _ENTRY * (len(values) // 2)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_hashable(key)] = value

    def global_(self) -> None:
        try:
            module, name = (self.source.line().decode() for _ in range(2))
        except UnicodeDecodeError:
            raise self.broken("a name that isn't UTF-8") from None
        self._global(module, name)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.broken("a name that isn't text")
        self._global(module, name)

    def _global(self, module: str, name: str) -> None:
        module = _RENAMED.get(module, module)
        value = Global(module, name)
        if (module, name) not in self.allowed:
            raise SnapshotError(
                str(self.source.path),
                f"needs '{value}', which isn't data",
                "nothing in a file is run: save the weights alone, as a state dict of tensors",
            )
        self.push(value, _NODE + _LIST)

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self.broken("it calls what isn't a function")
        self.push(self.build(function, args), _NODE + _DICT)

    def set_state(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Call):
            target.state = state
        elif target is None or isinstance(target, _STATELESS):
            raise self.broken("it gives a state to what has none")

    def persistent_id(self) -> None:
        identity = self.pop()
        if self.persistent is None:
            raise self.broken("a persistent id outside of torch.save's files")
        self.push(self.persistent(identity), _NODE)

    def put1(self) -> None:
        self._put(self.source.byte())

    def put4(self) -> None:
        self._put(self.number(4))

    def memoize(self) -> None:
        self._put(len(self.memo))

    def _put(self, index: int) -> None:
        self.allowance.held -= _ENTRY
        self.memo[index] = self.top()

    def get1(self) -> None:
        self._get(self.source.byte())

    def get4(self) -> None:
        self._get(self.number(4))

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise self.broken("it refers to a value that isn't there")
        self.push(self.memo[index], _SLOT)


def _hashable(key: Any) -> Any:
    # Integers of any length with one hash are easily made, those of 64 bits are not.
    if key is None or isinstance(key, str | float):
        return key
    return key if isinstance(key, int) and key.bit_length() < 64 else Key(key)


_STATELESS = (list, tuple, str, int, float, Span, Global)
_STOP = ord(".")
_RENAMED = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}
"""Modules as Python 2, protocol 2 and older versions of torch call them."""
_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.proto,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("0"): _Machine.discard,
    ord("1"): _Machine.discard_to_mark,
    ord("2"): _Machine.duplicate,
    ord("N"): _Machine.none,
    0x88: _Machine.true,
    0x89: _Machine.false,
    ord("K"): _Machine.integer1,
    ord("M"): _Machine.integer2,
    ord("J"): _Machine.integer4,
    0x8A: _Machine.long1,
    0x8B: _Machine.long4,
    ord("G"): _Machine.floating,
    0x8C: _Machine.text1,
    ord("X"): _Machine.text4,
    0x8D: _Machine.text8,
    ord("U"): _Machine.text1,  # Python 2's strings, which are names in a checkpoint
    ord("T"): _Machine.text4,
    ord("C"): _Machine.bytes1,
    ord("B"): _Machine.bytes4,
    0x8E: _Machine.bytes8,
    0x96: _Machine.bytes8,  # a bytearray
    ord(")"): _Machine.empty_tuple,
    0x85: _Machine.tuple1,
    0x86: _Machine.tuple2,
    0x87: _Machine.tuple3,
    ord("t"): _Machine.tuple_,
    ord("]"): _Machine.empty_list,
    ord("l"): _Machine.list_,
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    0x8F: _Machine.empty_list,  # a set
    0x90: _Machine.appends,
    0x91: _Machine.frozenset_,
    ord("}"): _Machine.empty_dict,
    ord("d"): _Machine.dict_,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("c"): _Machine.global_,
    0x93: _Machine.stack_global,
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # a class and its arguments, rather than a function and its
    ord("b"): _Machine.set_state,
    ord("Q"): _Machine.persistent_id,
    ord("q"): _Machine.put1,
    ord("r"): _Machine.put4,
    0x94: _Machine.memoize,
    ord("h"): _Machine.get1,
    ord("j"): _Machine.get4,
}
_REFUSED = {
    ord("F"): "FLOAT", ord("I"): "INT", ord("L"): "LONG", ord("S"): "STRING",
    ord("V"): "UNICODE", ord("P"): "PERSID", ord("g"): "GET", ord("p"): "PUT",
    ord("i"): "INST", ord("o"): "OBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
    0x92: "NEWOBJ_EX", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
