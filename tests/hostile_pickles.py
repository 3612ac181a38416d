"""A corpus of hostile and broken checkpoints: `CORPUS` maps a name to what makes the file's bytes.

None may be read as tensors. Where a file would run something if it were unpickled, that leaves a
file `SENTINEL` in the working folder; `RUNS` names those that really do, as a check on the corpus.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

SENTINEL = "posthoc-was-here"
SHELL = f"echo > {SENTINEL}"
SOURCE = f"open({SENTINEL!r}, 'w').close()"

PROTO = b"\x80\x02"
MAGIC = 0x1950A86A20F9469CFC6C
MILLION = 1_000_000


# The pickle machine's language.


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    """A class or function, by its name."""
    return b"c" + f"{module}\n{attribute}\n".encode()


def name_from_stack(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def group(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def mapping(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def call(function: bytes, *args: bytes) -> bytes:
    return function + group(*args) + b"R"


def whole(value: bytes) -> bytes:
    return PROTO + value + b"."


def system() -> bytes:
    return call(name("os", "system"), text(SHELL))


# Files of torch.


def storage_id(
    key: str = "0", elements: int = 4, kind: str = "FloatStorage", legacy: bool = False
) -> bytes:
    view = [b"N"] if legacy else []
    parts = text("storage"), name("torch", kind), text(key), text("cpu"), number(elements)
    return group(*parts, *view) + b"Q"


def tensor(
    storage: bytes, offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,)
) -> bytes:
    sizes = group(*map(number, shape)), group(*map(number, strides))
    hooks = call(name("collections", "OrderedDict"))
    args = storage, number(offset), *sizes, b"\x89", hooks
    return call(name("torch._utils", "_rebuild_tensor_v2"), *args)


def zipped(
    data_pkl: bytes,
    storages: dict[str, bytes] | None = None,
    folder: str = "archive",
    **more: bytes,
) -> bytes:
    """A file of `torch.save`; `more` are further entries."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", data_pkl)
        for key, data in (storages or {"0": bytes(16)}).items():
            archive.writestr(f"{folder}/data/{key}", data)
        for entry, data in more.items():
            archive.writestr(f"{folder}/{entry}", data)
    return stream.getvalue()


def legacy(
    value: bytes,
    keys: Any = ("0",),
    storages: bytes | None = None,
    magic: int = MAGIC,
    **system: Any,
) -> bytes:
    """A file of torch before 1.6."""
    about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}} | system
    head = b"".join(pickle.dumps(part, 2) for part in (magic, 1001, about))
    data = struct.pack("<q", 4) + bytes(16) if storages is None else storages
    return head + whole(value) + pickle.dumps(list(keys), 2) + data


def one_tensor(**parts: Any) -> bytes:
    return whole(mapping(text("w"), tensor(storage_id(), **parts)))


def in_pickle(file: bytes) -> bytes:
    """A storage as a plain pickle has it: a file of its own."""
    data = b"B" + struct.pack("<I", len(file)) + file
    return call(name("torch.storage", "_load_from_bytes"), data)


def plain_tensor(**parts: Any) -> bytes:
    """A tensor as a plain pickle has it."""
    return tensor(in_pickle(legacy(storage_id(legacy=True))), **parts)


# EDM2's pickles.


def module(
    parameters: bytes = b"}",
    modules: bytes = b"}",
    buffers: bytes = b"}",
    version: int = 6,
    source: str = SOURCE,
) -> bytes:
    state = mapping(
        text("_parameters"), parameters, text("_buffers"), buffers, text("_modules"), modules
    )
    meta = mapping(
        text("type"), text("class"), text("version"), number(version),
        text("module_src"), text(source), text("class_name"), text("Net"), text("state"), state,
    )  # fmt: skip
    return call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def snapshot(network: bytes) -> bytes:
    """A pickle of EDM2's training loop: a dict of its own kind, with the network as `ema`."""
    made = name("dnnlib.util", "EasyDict") + b")\x81"
    return whole(made + b"(" + text("ema") + network + b"u")


def module_within_itself() -> bytes:
    inner = module(modules=b"}q\x01")
    cycle = b"h\x01" + text("again") + b"h\x02" + b"s0"
    return snapshot(inner + b"q\x02" + cycle)


def modules_doubled(levels: int = 64) -> bytes:
    """Each holds the one before twice: few modules of very many names."""
    made = module(parameters=mapping(text("w"), plain_tensor())) + b"q\x010"
    for _ in range(levels):
        both = mapping(text("a"), b"h\x01", text("b"), b"h\x01")
        made += module(modules=both) + b"q\x010"
    return snapshot(made + b"h\x01")


# What goes wrong.


def doubled(wrap: bytes, levels: int = 100) -> bytes:
    """A value that would be of 2 ** levels parts if anyone looked at them all."""
    return whole(text("lol") + (b"q\x01" + wrap) * levels)


def replaced(file: bytes, old: bytes, new: bytes) -> bytes:
    assert file.count(old) >= 1
    assert len(old) == len(new)
    return file.replace(old, new)


def directory_field(
    offset: int, form: str, *values: int, entry: bytes = b"archive/data/0"
) -> bytes:
    """An archive whose directory says `values` at byte `offset` of what it says of `entry`."""
    file = bytearray(zipped(one_tensor()))
    at = file.rindex(entry) - 46
    assert file[at : at + 4] == b"PK\x01\x02"
    struct.pack_into(form, file, at + offset, *values)
    return bytes(file)


def end_field(offset: int, form: str, value: int) -> bytes:
    file = bytearray(zipped(one_tensor()))
    struct.pack_into(form, file, file.rindex(b"PK\x05\x06") + offset, value)
    return bytes(file)


def duplicate_entries() -> bytes:
    return replaced(zipped(one_tensor(), {"0": bytes(16), "1": bytes(16)}), b"data/1", b"data/0")


def overlapping() -> bytes:
    """Storages at one place, which together are more than the file."""
    both = group(storage_id("0", 1000), storage_id("1", 1000))
    file = bytearray(zipped(whole(both), {"0": bytes(4000), "1": b""}))
    first, second = (file.rindex(b"archive/data/" + key) - 46 for key in (b"0", b"1"))
    file[second + 16 : second + 28] = file[first + 16 : first + 28]
    file[second + 42 : second + 46] = file[first + 42 : first + 46]
    return bytes(file)


def compressed(level: int = 9) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive:
        archive.writestr("archive/data.pkl", bytes(8 * MILLION))
    return stream.getvalue()


def numpy_archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY")
    return stream.getvalue()


def zip64_directory(size: int) -> bytes:
    """An archive whose directory is as long as `size` says, by its 64-bit fields."""
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, size, size, size, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4, 1)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    return b"PK\x03\x04" + end + locator + last


RUNS = (
    "os.system", "posix.system", "eval", "exec", "nested reduce",
    "reduce in a list", "reduce in a state",
)  # fmt: skip

CORPUS: dict[str, Callable[[], bytes]] = {
    # What would be run.
    "os.system": lambda: whole(system()),
    "posix.system": lambda: whole(call(name_from_stack("posix", "system"), text(SHELL))),
    "nt.system": lambda: whole(call(name("nt", "system"), text(SHELL))),
    "subprocess": lambda: whole(call(name("subprocess", "getoutput"), text(SHELL))),
    "eval": lambda: whole(call(name("builtins", "eval"), text(SOURCE))),
    "exec": lambda: whole(call(name("builtins", "exec"), text(SOURCE))),
    "exec of Python 2": lambda: whole(call(name("__builtin__", "exec"), text(SOURCE))),
    "getattr": lambda: whole(
        call(
            call(
                name("builtins", "getattr"),
                call(name("builtins", "__import__"), text("os")),
                text("system"),
            ),
            text(SHELL),
        )
    ),
    "nested reduce": lambda: whole(
        mapping(text("w"), call(name("builtins", "bytearray"), system()))
    ),
    "reduce in a list": lambda: whole(b"](" + system() + b"e"),
    "reduce in a state": lambda: whole(
        call(name("collections", "OrderedDict")) + mapping(text("x"), system()) + b"b"
    ),
    "reduce in a persistent id": lambda: zipped(whole(group(text("storage"), system()) + b"Q")),
    "reduce in a storage": lambda: whole(tensor(in_pickle(whole(system())))),
    "reduce in the magic number": lambda: whole(system()) + legacy(b"}"),
    "reduce in data.pkl": lambda: zipped(whole(system())),
    "reduce in a legacy file": lambda: legacy(system()),
    "reduce in the storage keys": lambda: legacy(storage_id(legacy=True))[:-60] + whole(system()),
    "a storage in a storage": lambda: whole(in_pickle(legacy(in_pickle(whole(system()))))),
    "a call of the result of a call": lambda: whole(call(call(name("torch", "Size")), text(SHELL))),
    "module_src only": lambda: snapshot(module()),
    "module_src of another version": lambda: snapshot(module(version=7)),
    "an import hook": lambda: whole(
        call(name("torch_utils.persistence", "import_hook"), name("os", "system"))
    ),
    "torch.load": lambda: whole(call(name("torch", "load"), text("x"))),
    "torch.hub": lambda: whole(call(name("torch.hub", "load"), text("x"))),
    "a whole module": lambda: whole(name("torch.nn.modules.linear", "Linear") + b")\x81}b"),
    "a dotted name": lambda: whole(call(name_from_stack("torch", "_utils.os.system"), text(SHELL))),
    "a name of a module": lambda: whole(name("torch", "os")),
    "a state for a class": lambda: whole(
        name("collections", "OrderedDict") + mapping(text("__reduce__"), text("x")) + b"b"
    ),
    "a state for a list": lambda: whole(b"]" + mapping(text("__class__"), text("x")) + b"b"),
    "a state for a number": lambda: whole(b"K\x01}b"),
    "a state that sets the state": lambda: whole(
        call(name("torch", "device"), text("cpu"))
        + mapping(text("__setstate__"), name("os", "system"), text("__dict__"), b"}")
        + b"b"
    ),
    "a state of slots": lambda: whole(
        call(name("torch", "device"), text("cpu"))
        + group(b"N", mapping(text("function"), name("torch", "device"), text("__class__"), b"N"))
        + b"b"
    ),
    "a state for a name": lambda: whole(
        name("torch", "device") + mapping(text("make"), b"N") + b"b"
    ),
    "a state for a tuple": lambda: whole(b")}b"),
    "a state for a text": lambda: whole(text("x") + mapping(text("__dict__"), b"}") + b"b"),
    "a state for a tensor": lambda: zipped(
        whole(tensor(storage_id()) + mapping(text("start"), number(1 << 40)) + b"b")
    ),
    "a call of a call": lambda: whole(
        call(call(name("torch", "device"), text("os")), text("system"), text(SHELL))
    ),
    "a call of a text": lambda: whole(call(text("system"), text(SHELL))),
    "a call of a dict's method": lambda: whole(b"}" + name("builtins", "dict") + b"\x86R"),
    "a call with a list": lambda: whole(name("torch", "device") + b"]R"),
    "a call with a call": lambda: whole(name("torch", "device") * 2 + b")RR"),
    "a new object of a call": lambda: whole(call(name("torch", "device")) + b")\x81"),
    "a class of a class": lambda: zipped(
        whole(
            call(
                name("torch._tensor", "_rebuild_from_type_v2"),
                name("torch._tensor", "_rebuild_from_type_v2"),
                name("torch", "Tensor"),
                group(name("os", "system"), name("torch", "Tensor"), group(text(SHELL))),
            )
        )
    ),
    "a persistent id in a persistent id": lambda: zipped(whole(storage_id() + b"Q")),
    # Names that are themselves the attack.
    "terminal escapes": lambda: whole(name("\x1b]0;x\x07\x1b[2J", "\x1b[31m\r")),
    "a newline in a name": lambda: whole(name_from_stack("os\nposthoc: ok", "a\u202eb")),
    "a surrogate in a name": lambda: whole(name_from_stack("\ud800", "x")),
    "a name of a megabyte": lambda: whole(name_from_stack("m" * MILLION, "n" * MILLION)),
    "a name of 2 megabytes": lambda: whole(name_from_stack("m" * 2 * MILLION, "n")),
    "a name without an end": lambda: PROTO + b"c" + b"m" * MILLION,
    "a name that isn't text": lambda: whole(b"K\x01K\x02\x93"),
    "a name that isn't UTF-8": lambda: PROTO + b"c\xff\n\xff\n.",
    "a key with escapes": lambda: whole(mapping(text("\x1b[2J"), b"}", text("\n"), b"}")),
    # Bombs.
    "LONG_BINPUT of 2 ** 32 - 1": lambda: whole(b"Nr\xff\xff\xff\xff"),
    "LONG_BINGET of nothing": lambda: whole(b"j\xff\xff\xff\xff"),
    "BINGET of nothing": lambda: whole(b"h\x01"),
    "doubled tuples": lambda: doubled(b"h\x01h\x01\x86"),
    "doubled lists": lambda: doubled(b"0](h\x01h\x01e"),
    "doubled dicts": lambda: doubled(b"0}(K\x01h\x01K\x02h\x01u"),
    "doubled keys": lambda: doubled(b"h\x01\x86q\x020}h\x02Ns"),
    "doubled arguments": lambda: doubled(b"0" + name("torch", "device") + b"h\x01h\x01\x86R"),
    "a doubled key": lambda: whole(
        b")" + b"2\x86" * 100 + b"q\x010" + mapping(*(b"h\x01N" for _ in range(100)))
    ),
    "doubled modules": modules_doubled,
    "deep tuples": lambda: whole(b")" + b"\x85" * MILLION),
    "deep lists": lambda: whole(b"]" * 50_000 + b"a" * 49_999),
    "deep dicts": lambda: whole(b"N" + (b"q\x010}Nh\x01s") * 30_000),
    "deep marks": lambda: PROTO + b"(" * 50_000,
    "deep calls": lambda: whole(
        b"Nq\x01" + (name("torch", "device") + b"h\x01\x85Rq\x010") * 50_000 + b"h\x01"
    ),
    "deep keys": lambda: whole(b")" + b"\x85" * 50_000 + b"q\x010}h\x01Ns"),
    "one dict of many names": lambda: zipped(
        whole(
            mapping(text("w"), tensor(storage_id()), *(number(i) + b"N" for i in range(30_000)))
            + b"q\x010"
            + mapping(*(number(i) + b"h\x01" for i in range(30_000)))
        )
    ),
    "a list within itself": lambda: whole(b"]q\x01h\x01a"),
    "a dict within itself": lambda: whole(b"}q\x01" + text("x") + b"h\x01s"),
    "a module within itself": module_within_itself,
    "many marks and pops": lambda: whole(b"(1" * 50_000 + b"N"),
    "deep lists of 100,000": lambda: whole(b"](" * 100_000 + b"e" * 100_000),
    "deep classes": lambda: whole(
        name("torch._tensor", "_rebuild_from_type_v2")
        + b"q\x01"
        + name("torch", "Tensor")
        + b"q\x020)q\x03"
        + b"0h\x01h\x02h\x03\x87q\x03" * 20_000
        + b"0h\x01h\x03R"
    ),
    "deep states": lambda: whole(
        name("torch", "device") + b"q\x01N" + b"q\x020h\x01)Rh\x02b" * 50_000
    ),
    "memos far apart": lambda: (
        PROTO + b"N" + b"".join(b"r" + struct.pack("<I", i * 65_537) for i in range(60_000)) + b"."
    ),
    "a million tuples": lambda: PROTO + b")\x85" * 2 * MILLION + b".",
    "a million entries of a dict": lambda: whole(
        mapping(*(number(i) + b"N" for i in range(MILLION)))
    ),
    "a directory of a million entries": lambda: (
        b"PK\x03\x04"
        + bytes(26)
        + (b"PK\x01\x02" + bytes(42)) * MILLION
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 46 * MILLION, 30, 0)
    ),
    "a directory of as many as may be": lambda: (
        b"PK\x03\x04"
        + bytes(26)
        + (b"PK\x01\x02" + bytes(42)) * 182_000
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 46 * 182_000, 30, 0)
    ),
    "a million dicts": lambda: PROTO + b"}" * 2 * MILLION + b".",
    "many memos": lambda: PROTO + b"N" + b"\x94" * 50_000 + b".",
    "a hundred texts of a megabyte": lambda: (
        PROTO + b"(" + (text("\U0001f600" + "x" * 900_000)) * 100 + b"t."
    ),
    "keys with one hash": lambda: whole(
        mapping(*(number(k * (2**61 - 1)) + b"N" for k in range(1, 10_000)))
    ),
    # Lengths that are lies.
    "BINBYTES8 of 10 GB": lambda: PROTO + b"\x8e" + struct.pack("<Q", 10 << 30) + b"x.",
    "BINBYTES8 of 2 ** 64 - 1": lambda: PROTO + b"\x8e" + b"\xff" * 8 + b"x.",
    "BINBYTES of 4 GB": lambda: PROTO + b"B" + b"\xff" * 4 + b"x.",
    "BYTEARRAY8 of 10 GB": lambda: PROTO + b"\x96" + struct.pack("<Q", 10 << 30) + b"x.",
    "BINUNICODE8 of 10 GB": lambda: PROTO + b"\x8d" + struct.pack("<Q", 10 << 30) + b"x.",
    "BINUNICODE of 4 GB": lambda: PROTO + b"X" + b"\xff" * 4 + b"x.",
    "BINSTRING of 4 GB": lambda: PROTO + b"T" + b"\xff" * 4 + b"x.",
    "LONG4 of 2 GB": lambda: PROTO + b"\x8b" + struct.pack("<I", 2**31 - 1) + b"x.",
    "LONG4 of a megabyte": lambda: whole(b"\x8b" + struct.pack("<I", MILLION) + b"\x7f" * MILLION),
    "FRAME of 10 GB": lambda: b"\x80\x04\x95" + struct.pack("<Q", 10 << 30) + b"N.",
    "a FRAME of a byte too many": lambda: b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N.",
    "a text that ends behind its entry": lambda: zipped(
        PROTO + b"X" + struct.pack("<I", 64) + b"x"
    ),
    "a data.pkl without an end": lambda: zipped(PROTO + b"}" * 8),
    "bytes that end behind their storage": lambda: whole(
        in_pickle(legacy(b"B" + struct.pack("<I", 200) + b"x"))
    ),
    "a number that is cut": lambda: PROTO + b"\x8e\x00",
    "bytearray(10 GB)": lambda: whole(call(name("builtins", "bytearray"), number(10 << 30))),
    "a storage of 10 GB": lambda: zipped(whole(mapping(text("w"), storage_id(elements=10 << 30)))),
    "a legacy storage of 10 GB": lambda: legacy(
        storage_id(elements=10 << 30, legacy=True), storages=struct.pack("<q", 10 << 30)
    ),
    "a storage of -1": lambda: zipped(whole(mapping(text("w"), storage_id(elements=-1)))),
    "a storage of 2 ** 100": lambda: zipped(whole(mapping(text("w"), storage_id(elements=2**100)))),
    # Tensors that aren't where they should be.
    "a missing storage": lambda: zipped(whole(mapping(text("w"), storage_id("1")))),
    "a storage outside the folder": lambda: zipped(whole(tensor(storage_id("../data.pkl")))),
    "a storage of no known type": lambda: zipped(whole(storage_id(kind="Tensor"))),
    "a storage of two types": lambda: zipped(
        whole(group(storage_id(), storage_id(kind="IntStorage")))
    ),
    "a persistent id that is text": lambda: zipped(whole(text("0") + b"Q")),
    "a persistent id of a module": lambda: legacy(group(text("module"), b"NNN") + b"Q"),
    "a persistent id in a plain pickle": lambda: one_tensor(),
    "an offset beyond": lambda: zipped(one_tensor(offset=1)),
    "an offset below": lambda: zipped(one_tensor(offset=-1)),
    "an offset of 2 ** 62": lambda: zipped(one_tensor(offset=2**62, shape=(0,))),
    "a shape beyond": lambda: zipped(one_tensor(shape=(5,))),
    "a shape below": lambda: zipped(one_tensor(shape=(-4,))),
    "a shape that overflows": lambda: zipped(one_tensor(shape=(2**32, 2**32), strides=(0, 0))),
    "a shape that repeats": lambda: zipped(one_tensor(shape=(10 << 30,), strides=(0,))),
    "a shape of 1000 dimensions": lambda: zipped(
        one_tensor(shape=(1,) * 1000, strides=(1,) * 1000)
    ),
    "strides that leave": lambda: zipped(one_tensor(strides=(2,))),
    "negative strides": lambda: zipped(one_tensor(offset=3, strides=(-1,))),
    "too few strides": lambda: zipped(one_tensor(shape=(2, 2))),
    "a shape that isn't a tuple": lambda: zipped(
        whole(call(name("torch._utils", "_rebuild_tensor_v2"), storage_id(), b"K\x00]])"))
    ),
    "a tensor without parts": lambda: zipped(
        whole(call(name("torch._utils", "_rebuild_tensor_v2")))
    ),
    "a tensor of no storage": lambda: whole(tensor(text("x"))),
    "a parameter of no tensor": lambda: whole(
        call(name("torch._utils", "_rebuild_parameter"), text("x"))
    ),
    "a tensor of a class": lambda: zipped(
        whole(
            call(
                name("torch._tensor", "_rebuild_from_type_v2"),
                name("torch._utils", "_rebuild_tensor_v2"),
                name("torch", "Size"),
                b")}",
            )
        )
    ),
    "a plain tensor that leaves its storage": lambda: whole(
        mapping(text("w"), plain_tensor(offset=1))
    ),
    # Archives that lie.
    "an entry beyond the file": lambda: directory_field(42, "<L", 2**31),
    "an entry of 4 GB": lambda: directory_field(20, "<2L", 2**32 - 2, 2**32 - 2),
    "an entry that is shorter": lambda: directory_field(20, "<2L", 8, 8),
    "an entry that is another": lambda: directory_field(42, "<L", 5),
    "an entry that is encrypted": lambda: directory_field(8, "<H", 1),
    "an entry that is compressed": lambda: directory_field(10, "<H", 8),
    "a compressed data.pkl": compressed,
    "data.pkl beyond the file": lambda: directory_field(42, "<L", 2**31, entry=b"archive/data.pkl"),
    "entries of one name": duplicate_entries,
    "a directory of 4 GB": lambda: end_field(12, "<L", 2**32 - 1),
    "a directory beyond the file": lambda: end_field(16, "<L", 2**32 - 1),
    "a directory of 10 GB": lambda: zip64_directory(10 << 30),
    "a directory of 2 ** 64 - 1": lambda: zip64_directory(2**64 - 1),
    "storages that overlap": overlapping,
    "an archive without an end": lambda: zipped(one_tensor())[:-30],
    "an archive of nothing": lambda: b"PK\x05\x06" + bytes(18),
    "an archive without a pickle": lambda: replaced(zipped(one_tensor()), b".pkl", b".pqr"),
    "an archive of TorchScript": lambda: zipped(one_tensor(), **{"constants.pkl": b"x"}),
    "an archive of numpy": numpy_archive,
    # Legacy files that lie.
    "a wrong magic number": lambda: legacy(b"}", (), b"", magic=1),
    "a wrong version": lambda: replaced(legacy(b"}", (), b""), b"M\xe9\x03", b"M\xea\x03"),
    "a legacy file of a big-endian machine": lambda: legacy(b"}", (), b"", little_endian=False),
    "a legacy storage without keys": lambda: legacy(storage_id(legacy=True), ()),
    "a legacy storage twice": lambda: legacy(storage_id(legacy=True), ("0", "0")),
    "a legacy storage of nobody": lambda: legacy(b"}"),
    "a legacy key that isn't text": lambda: legacy(storage_id(legacy=True), (0,)),
    "a legacy key that is a list": lambda: legacy(storage_id(legacy=True), ([],)),
    "a legacy storage of another length": lambda: legacy(
        storage_id(legacy=True), storages=struct.pack("<q", 3) + bytes(16)
    ),
    "a legacy storage of -1": lambda: legacy(
        storage_id(legacy=True), storages=struct.pack("<q", -1) + bytes(16)
    ),
    "a tar archive": lambda: bytes(257) + b"ustar" + bytes(762),
    # Not even pickles.
    "an empty file": lambda: b"",
    "two bytes": lambda: b"\x80\x02",
    "text": lambda: b"hello, world\n" * 100,
    "zeros": lambda: bytes(4096),
    "protocol 0": lambda: b"(dp0\n.",
    "protocol 0 by another name": lambda: PROTO + b"(dp0\nS'x'\np1\nNs.",
    "an instance of what may be named": lambda: PROTO + b"(icollections\nOrderedDict\n.",
    "an object of what may be named": lambda: PROTO + b"(" + name("torch", "device") + b"o.",
    "extensions": lambda: whole(b"\x83\x01\x00\x84\x01\x00\x00\x00"),
    "a read-only buffer": lambda: b"\x80\x05N\x98.",
    "protocol 9": lambda: b"\x80\x09N.",
    "a protocol in the middle": lambda: whole(b"\x80\x09N"),
    "a safetensors file": lambda: struct.pack("<Q", 2) + b"{}",
    "nothing but None": lambda: whole(b"N"),
    "no pickle's opcode": lambda: whole(b"\xff"),
    "an extension": lambda: whole(b"\x82\x01"),
    "an instance": lambda: PROTO + b"(ios\nsystem\n.",
    "an object": lambda: PROTO + b"(" + name("os", "system") + b"o.",
    "a persistent id in text": lambda: PROTO + b"Px\n.",
    "a number in text": lambda: PROTO + b"I1\n.",
    "a buffer": lambda: b"\x80\x05\x97.",
    "a new object with keywords": lambda: whole(name("torch", "device") + b")}\x92"),
    "a value without a key": lambda: whole(b"}(Nu"),
    "items for a list": lambda: whole(b"](NNu"),
    "items for a tuple": lambda: whole(b")(NNu"),
    "items for a call": lambda: whole(call(name("torch", "device")) + b"(NNu"),
    "an item for a text": lambda: whole(text("x") + b"NNs"),
    "a dict of odd items": lambda: whole(b"(NNNd"),
    "appended to a text": lambda: whole(text("x") + b"(Ne"),
    "appended to a tuple": lambda: whole(b")Na"),
    "appended to a name": lambda: whole(name("torch", "device") + b"(Ne"),
    "added to a dict": lambda: whole(b"}(N\x90"),
    "appended to a dict": lambda: whole(b"}Na"),
    "a text that isn't UTF-8": lambda: whole(b"X\x01\x00\x00\x00\xff"),
}

_OPCODES = (
    b"0", b"1", b"2", b"\x85", b"\x86", b"\x87", b"t", b"l", b"d", b"a", b"e", b"s", b"u",
    b"\x90", b"\x91", b"\x93", b"R", b"\x81", b"b", b"Q", b"q\x01", b"r\x01\x00\x00\x00",
    b"\x94", b"", b"NR", b"N\x93", b"Nb", b"NNR", b"(R", b"Ns", b"NNs",
)  # fmt: skip
CORPUS |= {f"{opcode!r} on an empty stack": partial(whole, opcode) for opcode in _OPCODES}


def _truncated() -> Iterator[tuple[str, bytes]]:
    """Good files cut in every kind of place."""
    yield "plain pickle", whole(mapping(text("w"), plain_tensor()))
    yield "archive", zipped(one_tensor())
    yield "legacy file", legacy(mapping(text("w"), tensor(storage_id(legacy=True))))
    yield "snapshot", snapshot(module(parameters=mapping(text("w"), plain_tensor())))


def _cut(file: bytes, part: int) -> bytes:
    return file[: len(file) * part // 16]


CORPUS |= {
    f"{kind} cut at {part} of 16": partial(_cut, file, part)
    for kind, file in _truncated()
    for part in range(16)
}

GOOD: dict[str, bytes] = dict(_truncated()) | {
    "an archive of a big-endian machine": zipped(one_tensor(), byteorder=b"big")
}
"""Files that do hold a tensor, some with source code that must not run."""
