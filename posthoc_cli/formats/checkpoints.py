"""Other tools' checkpoints: where their tensors lie, read without running anything in them.

Three containers are read: the zip archives that `torch.save` writes, the files that it wrote
before version 1.6, and plain pickles with torch's storages inside. Each ends in a pickle, read as
data (see `unpickling`); what is known to rebuild a tensor becomes a `StoredTensor`, which says
where the tensor's bytes lie in the file. The bytes themselves are never read here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats.pickles import (
    Allowance,
    Call,
    Global,
    Source,
    Span,
    corrupt,
    shown,
    unpickle,
)
from posthoc_cli.storage.disk import open_file
from posthoc_cli.storage.dtypes import BY_NAME, DTYPES

_MAX_DIMENSIONS = 64
_MAX_BYTES = 1 << 62
_MAX_REPEATED = 256 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a checkpoint.

    `dtype` is safetensors' name for it, `strides` count elements, and `offset` is the byte of the
    first element in the file. Strides may be zero or overlap, as views have them; everything that
    they reach lies in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of the tensor, not of what it takes in the file."""
        return self.elements * DTYPES[self.dtype].bits // 8

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in the file in their order, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return self.elements == 0
            expected *= size
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint holds.

    `root` is made of dicts, lists, tuples, text, numbers, None and StoredTensors, with `Span` for
    bytes (and for texts above 1 MiB) and `Call` or `Global` for what is neither, such as a numpy
    array or a device. Values may be shared, or contain themselves. `size` is the file's length
    and `modified` the time of its last change in nanoseconds.
    """

    path: Path
    root: Any
    size: int
    modified: int


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """`size` bytes from byte `offset`; `dtype` is torch's name."""

    dtype: str
    offset: int
    size: int


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what the checkpoint at `path` holds, and where its tensors lie; none of their data.

    Reads `torch.save`'s files, of any version but the tar archives of 2016, and plain pickles.
    Raises SnapshotError for a file that is none of them, that is corrupt, or that names anything
    that is not data; MachineError for one that cannot be read.
    """
    with open_file(path, "leave it out") as (file, status):
        root = _read(Source(path, file, 0, status.st_size))
    return Checkpoint(path, root, status.st_size, status.st_mtime_ns)


def state_dict(checkpoint: Checkpoint, key: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of one dict of the checkpoint, by name, in its order.

    `key` says which: a key of the root, or several with dots between (`optimizer.ema`, `emas.0`
    for a list's first); `.` is the root itself. Without it, that is the only dict of tensors among
    the root and its entries. What isn't a tensor is left out. Names are taken as they are.

    Raises SnapshotError where there is no such dict, or more than one to choose from.
    """
    if key is not None:
        tensors = _tensors(_descend(checkpoint, key))
        if not tensors:
            raise SnapshotError(
                str(checkpoint.path), f"no dict of tensors at key='{key}'", _choice(checkpoint.root)
            )
        return tensors
    found = _dicts_of_tensors(checkpoint.root)
    if not found:
        raise SnapshotError(
            str(checkpoint.path),
            "holds no dict of tensors",
            f"leave it out, or name one inside with key=: {_choice(checkpoint.root)}",
        )
    if len(found) > 1:
        raise SnapshotError(
            str(checkpoint.path),
            f"holds several dicts of tensors ({_listed(list(found))})",
            "choose one with key=",
        )
    (tensors,) = found.values()
    return tensors


def _tensors(value: Any) -> dict[str, StoredTensor]:
    if not isinstance(value, dict):
        return {}
    return {
        name: tensor
        for name, tensor in value.items()
        if isinstance(name, str) and isinstance(tensor, StoredTensor)
    }


def _dicts_of_tensors(root: Any) -> dict[str, dict[str, StoredTensor]]:
    """The dicts of tensors among the root, called `.`, and its entries."""
    if not isinstance(root, dict):
        return {}
    candidates = {".": root} | {str(key): value for key, value in root.items() if _simple(key)}
    # A hostile file has one large dict under very many names.
    distinct = {id(value): value for value in candidates.values()}
    tensors = {place: _tensors(value) for place, value in distinct.items()}
    found = {name: tensors[id(value)] for name, value in candidates.items()}
    return {name: entries for name, entries in found.items() if entries}


def _simple(key: Any) -> bool:
    return isinstance(key, str | int | float)


def _descend(checkpoint: Checkpoint, key: str) -> Any:
    """What lies at `key`; at each level the longest key that fits is taken."""
    value = checkpoint.root
    parts = key.split(".") if key != "." else []
    while parts:
        entries = _entries(value)
        fits = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in entries)
        length = next(fits, 0)
        if not length:
            raise SnapshotError(
                str(checkpoint.path), f"has nothing at key='{shown(key)}'", _choice(value)
            )
        value = entries[".".join(parts[:length])]
        parts = parts[length:]
    return value


def _entries(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {str(key): entry for key, entry in value.items() if _simple(key)}
    if isinstance(value, list | tuple):
        return {str(index): entry for index, entry in enumerate(value)}
    return {}


def _choice(value: Any) -> str:
    names = [n for n, entry in _entries(value).items() if isinstance(entry, dict | list | tuple)]
    return f"there is {_listed(names)}" if names else "there is nothing to choose from"


def _listed(names: list[str], most: int = 8) -> str:
    listed = ", ".join(shown(name) for name in names[:most])
    return f"{listed}, and {len(names) - most} more" if len(names) > most else listed


# The containers.


def _read(source: Source) -> Any:
    start = source.peek(512)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _read_zip(source, Allowance())
    if start[257:262] == b"ustar":
        raise _unsupported(source.path, "a tar archive of torch before 0.1.10")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < source.end:
        raise SnapshotError(
            str(source.path), "is a safetensors file already", "use it as it is, or rename it"
        )
    if not start.startswith(_PICKLE):
        raise SnapshotError(
            str(source.path), "neither a checkpoint of torch nor a pickle", "leave it out"
        )
    return _read_pickle(source)


_PICKLE = tuple(bytes([0x80, version]) for version in range(2, 6))


def _unsupported(path: Path, what: str) -> SnapshotError:
    return SnapshotError(
        str(path), f"is {what}, which is not read", "save it again with torch.save(state_dict, ...)"
    )


def _read_pickle(source: Source) -> Any:
    start = source.position
    allowance = Allowance()
    rules = _Rules(source.path)

    def load_from_bytes(args: tuple[Any, ...]) -> Any:
        if args and isinstance(args[0], Call):  # text that was bytes, before protocol 3
            raise SnapshotError(
                str(source.path),
                "a pickle of tensors with protocol 2, which can't be read in place",
                "save it again with pickle protocol 3 or newer",
            )
        (span,) = _expect(source.path, args, Span)
        inner = Source(source.path, source.file, span.offset, span.offset + span.length)
        return _read_storage(inner, allowance)

    rules.makers["torch.storage", "_load_from_bytes"] = load_from_bytes
    root = unpickle(source, rules, rules.build, None, allowance)
    if isinstance(root, int) and root == _MAGIC:
        source.position = start
        return _read_legacy(source, Allowance())
    return root


def _read_storage(source: Source, allowance: Allowance) -> Any:
    """A storage as it lies in a plain pickle: as a file of `torch.save` of its own."""
    if source.peek(4) == b"PK\x03\x04":
        return _read_zip(source, allowance)
    return _read_legacy(source, allowance)


_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def _read_legacy(source: Source, allowance: Allowance) -> Any:
    """A file of torch before 1.6: pickles, and the storages one after the other behind them.

    Where the storages lie is known only after the pickle that needs them, so that is read twice.
    """
    path = source.path

    def plain() -> Any:
        return unpickle(source, (), Call, None, allowance)

    if plain() != _MAGIC:
        raise corrupt(path, "its magic number is wrong")
    version, system = plain(), plain()
    if version != _LEGACY_PROTOCOL:
        raise corrupt(path, f"its version is not {_LEGACY_PROTOCOL}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _unsupported(path, "a checkpoint of a big-endian machine")
    start = source.position
    claimed: dict[str, tuple[str, int]] = {}

    def claim(identity: Any) -> _Storage:
        dtype, key, elements = _storage_id(path, identity, legacy=True)
        if claimed.setdefault(key, (dtype, elements)) != (dtype, elements):
            raise corrupt(path, f"storage {shown(key)} is described in two ways")
        return _Storage(dtype, 0, elements * _itemsize(path, dtype))

    rules = _Rules(path)
    before = allowance.opcodes, allowance.held
    unpickle(source, rules, rules.build, claim, allowance)
    allowance.opcodes, allowance.held = before
    keys = plain()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise corrupt(path, "its list of storages is not a list of names")
    end = source.position
    storages: dict[str, _Storage] = {}
    for key in keys:
        if key in storages or key not in claimed:
            raise corrupt(path, f"storage {shown(key)} is not what its pickle says")
        dtype, elements = claimed[key]
        if struct.unpack("<q", source.take(8))[0] != elements:
            raise corrupt(path, f"storage {shown(key)} has not the length its pickle says")
        span = source.skip(elements * _itemsize(path, dtype))
        storages[key] = _Storage(dtype, span.offset, span.length)
    if len(storages) != len(claimed):
        raise corrupt(path, "a storage is missing")

    def locate(identity: Any) -> _Storage:
        return storages[_storage_id(path, identity, legacy=True)[1]]

    source.position = start
    root = unpickle(source, rules, rules.build, locate, allowance)
    source.position = end
    return root


# Zip archives.

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY = 64 << 20


@dataclass(frozen=True, slots=True)
class _Entry:
    """`header` is the byte of its local header in the file."""

    header: int
    size: int
    plain: bool


def _read_zip(source: Source, allowance: Allowance) -> Any:
    path = source.path
    entries = _directory(source, allowance)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if not pickles and any(name.endswith(".npy") for name in entries):
        raise _unsupported(path, "an .npz archive of numpy")
    if len(pickles) != 1:
        raise SnapshotError(str(path), "a zip archive, but not of torch.save", "leave it out")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise SnapshotError(
            str(path),
            "is a TorchScript archive, which is not read",
            "load it with torch.jit.load and save its state_dict() with torch.save",
        )
    order = f"{folder}byteorder"
    if order in entries:
        start, end = _entry_data(source, entries[order], "byteorder")
        if Source(path, source.file, start, end).take(min(end - start, 16)) != b"little":
            raise _unsupported(path, "a checkpoint of a big-endian machine")
    storages: dict[str, tuple[str, int, _Storage]] = {}
    unclaimed = source.end - source.position

    def locate(identity: Any) -> _Storage:
        nonlocal unclaimed
        dtype, key, elements = _storage_id(path, identity)
        if key not in storages:
            name = f"{folder}data/{key}"
            if name not in entries:
                raise corrupt(path, f"storage {shown(key)} is missing")
            start, end = _entry_data(source, entries[name], f"storage {shown(key)}")
            size = elements * _itemsize(path, dtype)
            if size > end - start:
                raise corrupt(path, f"storage {shown(key)} is shorter than its pickle says")
            unclaimed -= size  # of an honest archive every byte has one owner
            if unclaimed < 0:
                raise corrupt(path, "its storages overlap")
            storages[key] = dtype, elements, _Storage(dtype, start, size)
        known = storages[key]
        if known[:2] != (dtype, elements):
            raise corrupt(path, f"storage {shown(key)} is described in two ways")
        return known[2]

    start, end = _entry_data(source, entries[pickles[0]], "data.pkl")
    rules = _Rules(path)
    return unpickle(Source(path, source.file, start, end), rules, rules.build, locate, allowance)


def _directory(source: Source, allowance: Allowance) -> dict[str, _Entry]:
    """The entries of the archive by name, as its central directory has them."""
    path, base = source.path, source.position
    start, size, count = _find_directory(source)
    if size > _MAX_DIRECTORY:
        raise corrupt(path, "its directory is too large")
    reader = Source(path, source.file, start, start + size)
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        allowance.opcodes -= 1
        (mark, _, _, flags, method, _, _, _, packed, length, name_length, extra_length,
         comment, _, _, _, header) = _ENTRY.unpack(reader.take(_ENTRY.size))  # fmt: skip
        if mark != b"PK\x01\x02" or allowance.opcodes < 0:
            raise corrupt(path, "its directory is broken")
        name = reader.take(name_length).decode("utf-8", "replace")
        extra = reader.take(extra_length)
        reader.skip(comment)
        length, packed, header = _wide(path, extra, length, packed, header)
        if name in entries:
            raise corrupt(path, f"two entries are named {shown(name)}")
        plain = method == 0 and not flags & 1 and length == packed
        entries[name] = _Entry(base + header, length, plain)
    return entries


def _find_directory(source: Source) -> tuple[int, int, int]:
    """Start and length of the central directory in the file, and its number of entries."""
    path, base, end = source.path, source.position, source.end
    tail_start = max(base, end - _END.size - 0xFFFF)
    tail = Source(path, source.file, tail_start, end).take(end - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise corrupt(path, "the end of its zip archive is missing")
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    locator = at - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        _, _, position, _ = _END64_LOCATOR.unpack_from(tail, locator)
        reader = Source(path, source.file, min(base + position, end), end)
        mark, _, _, _, _, _, _, count, size, start = _END64.unpack(reader.take(_END64.size))
        if mark != b"PK\x06\x06":
            raise corrupt(path, "the end of its zip archive is broken")
    if start + size > end - base:
        raise corrupt(path, "its directory lies outside of it")
    return base + start, size, count


def _wide(path: Path, extra: bytes, *values: int) -> list[int]:
    """`values` with those that don't fit 32 bits taken from the zip64 field of `extra`."""
    wide = list(values)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            for index, value in enumerate(wide):
                if value == 0xFFFFFFFF:
                    if len(field) < 8:
                        raise corrupt(path, "its directory is broken")
                    wide[index] = int.from_bytes(field[:8], "little")
                    field = field[8:]
            break
        position += 4 + length
    return wide


def _entry_data(source: Source, entry: _Entry, what: str) -> tuple[int, int]:
    """Where the data of an entry start and end in the file."""
    path = source.path
    if not entry.plain:
        raise _unsupported(path, f"a zip archive whose {what} is compressed or encrypted")
    if entry.header + _LOCAL.size > source.end:
        raise corrupt(path, f"{what} lies outside of it")
    local = Source(path, source.file, entry.header, entry.header + _LOCAL.size)
    fields = _LOCAL.unpack(local.take(_LOCAL.size))
    if fields[0] != b"PK\x03\x04":
        raise corrupt(path, f"{what} is not where its directory says")
    start = entry.header + _LOCAL.size + fields[-2] + fields[-1]
    if start + entry.size > source.end:
        raise corrupt(path, f"{what} ends outside of it")
    return start, start + entry.size


# Tensors.

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
    "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32",
}  # fmt: skip
_SIZES = {"complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4}

_REFUSED_TENSORS = {
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of an XLA device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of an XLA device",
    "_rebuild_xla_tensor": "a tensor of an XLA device",
}


def _itemsize(path: Path, dtype: str) -> int:
    return _SIZES[dtype] if dtype in _SIZES else DTYPES[BY_NAME[dtype]].bits // 8


def _storage_id(path: Path, identity: Any, legacy: bool = False) -> tuple[str, str, int]:
    """The dtype, key and number of elements of a storage, from its persistent id."""
    length = 6 if legacy else 5
    if not isinstance(identity, tuple) or len(identity) != length or identity[0] != "storage":
        raise corrupt(path, "a persistent id that isn't a storage's")
    kind, key, _, elements = identity[1:5]
    if not isinstance(kind, Global) or kind.name not in _STORAGES or not isinstance(key, str):
        raise corrupt(path, "a storage of no known type")
    if legacy and identity[5] is not None:
        raise _unsupported(path, "a checkpoint with views of storages, as torch 0.1 wrote them")
    if not _is_size(elements):
        raise corrupt(path, f"storage {shown(key)} has an impossible length")
    return _STORAGES[kind.name], key, elements


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_BYTES


def _expect(path: Path, args: tuple[Any, ...], *kinds: type) -> tuple[Any, ...]:
    """The first arguments, if they are of these kinds; there may be more."""
    if len(args) < len(kinds) or not all(map(isinstance, args, kinds)):
        raise corrupt(path, "a tensor's parts are not what they should be")
    return args[: len(kinds)]


def _tensor(
    path: Path, storage: _Storage, torch_dtype: str, offset: Any, shape: Any, strides: Any
) -> StoredTensor:
    """A view of `storage`, with everything checked that torch would check."""
    if torch_dtype not in BY_NAME:
        raise SnapshotError(
            str(path),
            f"holds a tensor of dtype {torch_dtype}, which safetensors has no place for",
            "save it with another dtype, or without that tensor",
        )
    if not (_are_sizes(shape) and _are_sizes(strides) and _is_size(offset)):
        raise corrupt(path, "a tensor's shape or strides are impossible")
    if len(shape) != len(strides):
        raise corrupt(path, "a tensor has not a stride for each dimension")
    itemsize = _itemsize(path, torch_dtype)
    elements = math.prod(shape)
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    end = (offset + (reach if elements else 0)) * itemsize
    if end > storage.size or elements * itemsize >= _MAX_BYTES:
        raise corrupt(path, "a tensor reaches beyond its storage")
    if elements * itemsize > max(storage.size, _MAX_REPEATED):
        raise SnapshotError(
            str(path),
            "holds a tensor that repeats a few values many times over",
            "save it without that tensor",
        )
    return StoredTensor(BY_NAME[torch_dtype], shape, strides, storage.offset + offset * itemsize)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= _MAX_DIMENSIONS and all(map(_is_size, value))


# What a pickle may name, and what each becomes.


class _Rules:
    """What is allowed in a checkpoint, and what stands for it.

    `makers` make values from the arguments of a call; other allowed names stay what they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.makers: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self.typed_tensor,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self.parameter,
            ("torch.nn.parameter", "Parameter"): self.parameter,
            ("torch.nn.parameter", "Buffer"): self.parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self.tensor_of_class,
            ("torch", "Size"): self.first,
            ("collections", "OrderedDict"): self.mapping,
            ("collections", "Counter"): self.mapping,
            ("collections", "defaultdict"): lambda args: {},
            ("dnnlib.util", "EasyDict"): self.mapping,
            ("builtins", "set"): self.first,
            ("builtins", "frozenset"): self.first,
        }
        for name, kind in _REFUSED_TENSORS.items():
            self.makers["torch._utils", name] = partial(self.refuse_tensor, kind)

    def __contains__(self, name: object) -> bool:
        return name in self.makers or name in _INERT

    def build(self, function: Global, args: tuple[Any, ...]) -> Any:
        maker = self.makers.get((function.module, function.name))
        return maker(args) if maker else Call(function, args)

    def tensor(self, args: tuple[Any, ...]) -> StoredTensor:
        storage, offset, shape, strides = _expect(self.path, args, _Storage, int, tuple, tuple)
        self.no_metadata(args[6:])
        return _tensor(self.path, storage, storage.dtype, offset, shape, strides)

    def typed_tensor(self, args: tuple[Any, ...]) -> StoredTensor:
        kinds = _Storage, int, tuple, tuple, object, object, Global
        storage, offset, shape, strides, _, _, dtype = _expect(self.path, args, *kinds)
        self.no_metadata(args[7:])
        return _tensor(self.path, storage, dtype.name, offset, shape, strides)

    def no_metadata(self, metadata: tuple[Any, ...]) -> None:
        if metadata and metadata[0]:
            raise SnapshotError(
                str(self.path),
                "holds a tensor that is a conjugate or negative view",
                "save it after .resolve_conj().resolve_neg()",
            )

    def parameter(self, args: tuple[Any, ...]) -> StoredTensor:
        (tensor,) = _expect(self.path, args, StoredTensor)
        return tensor  # type: ignore[no-any-return]

    def tensor_of_class(self, args: tuple[Any, ...]) -> StoredTensor:
        function, kind, parts = _expect(self.path, args, Global, Global, tuple)
        if (kind.module, kind.name) not in _PLAIN_CLASSES:
            raise SnapshotError(
                str(self.path), f"holds a tensor of class {kind}", "save it as a plain tensor"
            )
        return self.parameter((self.build(function, parts),))

    def refuse_tensor(self, kind: str, args: tuple[Any, ...]) -> StoredTensor:
        raise SnapshotError(str(self.path), f"holds {kind}", "save it as a plain dense tensor")

    def first(self, args: tuple[Any, ...]) -> Any:
        return args[0] if args else ()

    def mapping(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        if not args:
            return {}
        (value,) = _expect(self.path, args, dict)
        return value  # type: ignore[no-any-return]


_PLAIN_CLASSES = {
    ("torch", "Tensor"),
    ("torch._tensor", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
}

_BUILTINS = ("bytearray", "complex", "dict", "float", "int", "list", "long", "str", "tuple")
_QUANTIZATIONS = (
    "tensor_affine",
    "tensor_symmetric",
    "channel_affine",
    "channel_symmetric",
    "channel_affine_float_qparams",
)
_CONTAINERS = ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential")
_NUMPY = (
    ("core.multiarray", "_reconstruct"),
    ("core.multiarray", "scalar"),
    ("core.numeric", "_frombuffer"),
)

_INERT = frozenset(
    {("torch", name) for name in _STORAGES}
    | {("torch.cuda", name) for name in _STORAGES}
    | {("torch.storage", name) for name in ("UntypedStorage", "TypedStorage")}
    | {("torch", name) for name in (*BY_NAME, *_SIZES, "complex32", "device")}
    | {(module, "Tensor") for module in ("torch", "torch._tensor")}
    | {("torch.nn.modules.container", name) for name in _CONTAINERS}
    | {(f"numpy.{module}", name) for module, name in _NUMPY}
    | {(f"numpy._{module}", name) for module, name in _NUMPY}
    | {("numpy", "ndarray"), ("numpy", "dtype")}
    | {("torch", f"per_{name}") for name in _QUANTIZATIONS}
    | {("builtins", name) for name in _BUILTINS}
    | {
        ("_codecs", "encode"),
        ("torch.serialization", "_get_layout"),
        ("torch_utils.persistence", "_reconstruct_persistent_obj"),
    }
)
"""What may be named besides what `_Rules` makes: kept as a name, or as a call of it.

It is what `torch.load(weights_only=True)` allows, numpy's arrays and numbers, and EDM2's modules.
"""
