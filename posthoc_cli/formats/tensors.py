"""Tensors as they lie in a file, and what of a pickle becomes one.

`NAMES` is all that a checkpoint's pickle may name, and for each what stands for a call of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from posthoc_cli.errors import SnapshotError
from posthoc_cli.formats.pickles import Global, Make, corrupt, refused, shown
from posthoc_cli.storage.deflated import Deflated
from posthoc_cli.storage.dtypes import BY_NAME, DTYPES

_MAX_DIMENSIONS = 64
_MAX_BYTES = 1 << 62
_MAX_REPEATED = 256 << 20


@dataclass(slots=True, eq=False)
class Storage:
    """`size` bytes of a file, from byte `offset`; `dtype` is torch's name.

    Where `content` gives them, that knows where they lie. With `swapped` they are big-endian.
    """

    dtype: str
    size: int
    offset: int = 0
    swapped: bool = False
    content: Deflated | None = None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a checkpoint: from byte `start` of its storage.

    `dtype` is safetensors' name for it, and `strides` count elements. Strides may be zero or
    overlap, as views have them; everything that they reach lies in the storage.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: Storage
    start: int = 0

    @property
    def offset(self) -> int:
        """The byte of the file at which the first element lies."""
        return self.storage.offset + self.start

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


# Storages.

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
    "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32",
}  # fmt: skip
_SIZES = {"complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4}


def claim_storage(storages: dict[str, Storage], identity: Any, *, legacy: bool = False) -> Any:
    """The storage of a persistent id, which becomes one of `storages`; where it lies, is not said.

    A legacy file also has them for classes of modules, with their source: they stay names.

    Raises SnapshotError where it can be none.
    """
    length = 6 if legacy else 5
    if (
        legacy
        and isinstance(identity, tuple)
        and len(identity) == 4
        and identity[0] == "module"
        and isinstance(identity[1], Global)
    ):
        return identity[1]
    if not isinstance(identity, tuple) or len(identity) != length or identity[0] != "storage":
        raise corrupt("a persistent id that isn't a storage's")
    kind, key, _, elements = identity[1:5]
    if not isinstance(kind, Global) or kind.name not in _STORAGES or not isinstance(key, str):
        raise corrupt("a storage of no known type")
    if legacy and identity[5] is not None:
        raise unsupported("a checkpoint with views of storages, as torch 0.1 wrote them")
    if not _is_size(elements):
        raise corrupt(f"storage {shown(key)} has an impossible length")
    dtype = _STORAGES[kind.name]
    size = elements * itemsize(dtype)
    storage = storages.get(key)
    if storage is None:
        storage = storages[key] = Storage(dtype, size)
    elif (storage.dtype, storage.size) != (dtype, size):
        raise corrupt(f"storage {shown(key)} is described in two ways")
    return storage


def itemsize(dtype: str) -> int:
    """Bytes of an element, by torch's name of the dtype."""
    return _SIZES[dtype] if dtype in _SIZES else DTYPES[BY_NAME[dtype]].bits // 8


def unsupported(what: str) -> SnapshotError:
    """The error for a checkpoint that is whole, but of a kind that isn't read."""
    return refused(
        f"is {what}, which is not read", "save it again with torch.save(state_dict, ...)"
    )


# What the pickle would call. Each function takes the arguments of the call.


def _rebuilt(args: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, strides = _expected(args, Storage, int, tuple, tuple)
    return _view(storage, storage.dtype, offset, shape, strides, args[6:])


def _rebuilt_with_dtype(args: tuple[Any, ...]) -> StoredTensor:
    kinds = Storage, int, tuple, tuple, object, object, Global
    storage, offset, shape, strides, _, _, dtype = _expected(args, *kinds)
    return _view(storage, dtype.name, offset, shape, strides, args[7:])


def _view(
    storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, metadata: tuple[Any, ...]
) -> StoredTensor:
    """A view of `storage`, with everything checked that torch would check."""
    if metadata and metadata[0]:
        raise refused(
            "holds a tensor that is a conjugate or negative view",
            "save it after .resolve_conj().resolve_neg()",
        )
    if dtype not in BY_NAME:
        raise refused(
            f"holds a tensor of dtype {dtype}, which safetensors has no place for",
            "save it with another dtype, or without that tensor",
        )
    if not (_are_sizes(shape) and _are_sizes(strides) and _is_size(offset)):
        raise corrupt("a tensor's shape or strides are impossible")
    if len(shape) != len(strides):
        raise corrupt("a tensor has not a stride for each dimension")
    size = itemsize(dtype)
    elements = math.prod(shape)
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    end = (offset + (reach if elements else 0)) * size
    if end > storage.size or elements * size >= _MAX_BYTES:
        raise corrupt("a tensor reaches beyond its storage")
    if elements * size > max(storage.size, _MAX_REPEATED):
        raise refused(
            "holds a tensor that repeats a few values many times over",
            "save it without that tensor",
        )
    return StoredTensor(BY_NAME[dtype], shape, strides, storage, offset * size)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_BYTES


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= _MAX_DIMENSIONS and all(map(_is_size, value))


def _parameter(args: tuple[Any, ...]) -> Any:
    return _expected(args, StoredTensor)[0]


def _tensor_of_class(args: tuple[Any, ...]) -> Any:
    function, kind, parts = _expected(args, Global, Global, tuple)
    if function.make is _tensor_of_class:  # no writer nests them, and a hostile one without end
        raise corrupt("a tensor's parts are not what they should be")
    if (kind.module, kind.name) not in _PLAIN_CLASSES:
        raise refused(f"holds a tensor of class {kind}", "save it as a plain tensor")
    return _parameter((function.call(parts),))


def _refuse(kind: str, args: tuple[Any, ...]) -> Any:
    raise refused(f"holds {kind}", "save it as a plain dense tensor")


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else ()


def _mapping(args: tuple[Any, ...]) -> Any:
    return _expected(args, dict)[0] if args else {}


def _empty_mapping(args: tuple[Any, ...]) -> Any:
    return {}


def _expected(args: tuple[Any, ...], *kinds: type) -> tuple[Any, ...]:
    """The first arguments, if they are of these kinds; there may be more."""
    if len(args) < len(kinds) or not all(map(isinstance, args, kinds)):
        raise corrupt("a tensor's parts are not what they should be")
    return args[: len(kinds)]


_PLAIN_CLASSES = {
    ("torch", "Tensor"),
    ("torch._tensor", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
}
_REBUILT: dict[str, Make] = {
    "_rebuild_tensor": _rebuilt,
    "_rebuild_tensor_v2": _rebuilt,
    "_rebuild_tensor_v3": _rebuilt_with_dtype,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
    "_rebuild_qtensor": partial(_refuse, "a quantized tensor"),
    "_rebuild_sparse_tensor": partial(_refuse, "a sparse tensor"),
    "_rebuild_sparse_csr_tensor": partial(_refuse, "a sparse tensor"),
    "_rebuild_nested_tensor": partial(_refuse, "a nested tensor"),
    "_rebuild_meta_tensor_no_storage": partial(
        _refuse, "a tensor on the meta device, which has no values"
    ),
    "_rebuild_wrapper_subclass": partial(_refuse, "a tensor of a class of its own"),
    "_rebuild_device_tensor_from_numpy": partial(_refuse, "a tensor of an XLA device"),
    "_rebuild_device_tensor_from_cpu_tensor": partial(_refuse, "a tensor of an XLA device"),
    "_rebuild_xla_tensor": partial(_refuse, "a tensor of an XLA device"),
}
_UNREAD = {
    "torch": [*_STORAGES, *BY_NAME, *_SIZES, "complex32", "device", "Tensor", "per_tensor_affine",
              "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
              "per_channel_affine_float_qparams"],
    "torch.cuda": _STORAGES,
    "torch.storage": ["UntypedStorage", "TypedStorage"],
    "torch.serialization": ["_get_layout"],
    "torch._tensor": ["Tensor"],
    "torch.nn.modules.container":
        ["ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"],
    "numpy": ["ndarray", "dtype"],
    "numpy.core.multiarray": ["_reconstruct", "scalar"],
    "numpy.core.numeric": ["_frombuffer"],
    "numpy._core.multiarray": ["_reconstruct", "scalar"],
    "numpy._core.numeric": ["_frombuffer"],
    "builtins": ["bytearray", "complex", "dict", "float", "int", "list", "long", "str", "tuple"],
    "_codecs": ["encode"],
    "torch_utils.persistence": ["_reconstruct_persistent_obj"],
}  # fmt: skip
"""Names that stay names, or calls of them."""

NAMES: dict[tuple[str, str], Make | None] = {
    **{(module, name): None for module, names in _UNREAD.items() for name in names},
    **{("torch._utils", name): make for name, make in _REBUILT.items()},
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch.nn.parameter", "Buffer"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_class,
    ("torch", "Size"): _first,
    ("builtins", "set"): _first,
    ("builtins", "frozenset"): _first,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "Counter"): _mapping,
    ("collections", "defaultdict"): _empty_mapping,
    ("dnnlib.util", "EasyDict"): _mapping,
}
"""What `torch.load(weights_only=True)` allows, numpy's arrays and numbers, and EDM2's modules."""
