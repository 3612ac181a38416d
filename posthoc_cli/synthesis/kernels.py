"""The CPU's inner loop, compiled when first used: sums of snapshots in float64, rounded once.

A sum over snapshots wants one pass: load an element of each snapshot, widen it, multiply and add in
a register, go on. Array libraries cannot say that; they write each step to memory, and take the
interpreter lock between steps, which two threads then fight over. So the loops are written in
LLVM's assembly language and compiled by llvmlite for the processor at hand, in a few milliseconds.

Each output element is `fma(x[n-1], w[n-1], ... fma(x[1], w[1], fma(x[0], w[0], 0)))` in float64,
whatever its position and however many targets are summed with it: its value depends on nothing
else.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

STRIDE = 64
"""Loops take this many elements at a time: every buffer must hold a multiple of it."""

MAX_TARGETS = 8
"""Targets summed in one pass over the data; their sums have to stay in registers."""

# How a vector of stored elements, %x, becomes doubles, %d. Half precision goes by way of float, as
# no processor widens it in one instruction; bfloat16 is the upper half of a float.
_WIDEN = {
    "F16": (
        "half",
        """
  %f = fpext <V x half> %x to <V x float>
  %d = fpext <V x float> %f to <V x double>""",
    ),
    "BF16": (
        "i16",
        """
  %u = zext <V x i16> %x to <V x i32>
  %b = shl <V x i32> %u, splat (i32 16)
  %f = bitcast <V x i32> %b to <V x float>
  %d = fpext <V x float> %f to <V x double>""",
    ),
    "F32": ("float", "\n  %d = fpext <V x float> %x to <V x double>"),
    "F64": ("double", "\n  %d = fadd <V x double> %x, splat (double -0.0)"),
    "F8_E4M3": (  # the upper bits of a half, but for the bias; NaN is a number there
        "i8",
        """
  %u = zext <V x i8> %x to <V x i16>
  %sign = and <V x i16> %u, splat (i16 128)
  %size = and <V x i16> %u, splat (i16 127)
  %top = shl <V x i16> %sign, splat (i16 8)
  %low = shl <V x i16> %size, splat (i16 7)
  %b = or <V x i16> %top, %low
  %h = bitcast <V x i16> %b to <V x half>
  %f = fpext <V x half> %h to <V x float>
  %w = fpext <V x float> %f to <V x double>
  %nan = icmp eq <V x i16> %size, splat (i16 127)
  %no = select <V x i1> %nan, <V x double> splat (double 0x7FF8000000000000), <V x double> %w
  %d = fmul <V x double> %no, splat (double 256.0)""",
    ),
}

WIDENED = frozenset(_WIDEN)
"""The dtypes of rows that `accumulate` takes."""

# How target T's sums, %sT, become stored elements, %yT, correctly rounded. Half precision and
# bfloat16 go by way of a float "rounded to odd" (%oT): towards zero, with the last bit set if
# anything was lost, so that the second rounding sees on which side of a tie the double was.
_ROUND_TO_ODD = """
  %fT = fptrunc <V x double> %sT to <V x float>
  %rT = fpext <V x float> %fT to <V x double>
  %iT = bitcast <V x float> %fT to <V x i32>
  %absT = call <V x double> @llvm.fabs.vVf64(<V x double> %sT)
  %abs_rT = call <V x double> @llvm.fabs.vVf64(<V x double> %rT)
  %awayT = fcmp ogt <V x double> %abs_rT, %absT
  %lostT = fcmp one <V x double> %rT, %sT
  %away_bitT = zext <V x i1> %awayT to <V x i32>
  %lost_bitT = zext <V x i1> %lostT to <V x i32>
  %truncatedT = sub <V x i32> %iT, %away_bitT
  %oT = or <V x i32> %truncatedT, %lost_bitT"""

_NARROW = {
    "F64": ("double", "\n  %yT = fadd <V x double> %sT, splat (double -0.0)"),
    "F32": ("float", "\n  %yT = fptrunc <V x double> %sT to <V x float>"),
    "F16": (
        "half",
        _ROUND_TO_ODD
        + """
  %gT = bitcast <V x i32> %oT to <V x float>
  %yT = fptrunc <V x float> %gT to <V x half>""",
    ),
    "BF16": (
        "i16",
        _ROUND_TO_ODD
        + """
  %highT = lshr <V x i32> %oT, splat (i32 16)
  %evenT = and <V x i32> %highT, splat (i32 1)
  %biasT = add <V x i32> %evenT, splat (i32 32767)
  %upT = add <V x i32> %oT, %biasT
  %cutT = lshr <V x i32> %upT, splat (i32 16)
  %quietT = or <V x i32> %highT, splat (i32 64)
  %nanT = fcmp uno <V x double> %sT, %sT
  %zT = select <V x i1> %nanT, <V x i32> %quietT, <V x i32> %cutT
  %yT = trunc <V x i32> %zT to <V x i16>""",
    ),
    # By way of float, as ml_dtypes does. A number is added so large that of the sum three bits are
    # left after the first.
    "F8_E4M3": (
        "i8",
        f"""
  %vT = fptrunc <V x double> %sT to <V x float>
  %iT = bitcast <V x float> %vT to <V x i32>
  %exponentT = and <V x i32> %iT, splat (i32 {0xFF << 23})
  %unitT = call <V x i32> @llvm.umax.vVi32(<V x i32> %exponentT, <V x i32> splat (i32 {121 << 23}))
  %largeT = add <V x i32> %unitT, splat (i32 {(20 << 23) + (1 << 22)})
  %cT = bitcast <V x i32> %largeT to <V x float>
  %upT = fadd <V x float> %vT, %cT
  %downT = fsub <V x float> %upT, %cT
  %signedT = call <V x float> @llvm.copysign.vVf32(<V x float> %downT, <V x float> %vT)
  %fT = fmul <V x float> %signedT, splat (float 0.00390625)
  %hT = fptrunc <V x float> %fT to <V x half>
  %bT = bitcast <V x half> %hT to <V x i16>
  %topT = lshr <V x i16> %bT, splat (i16 8)
  %signT = and <V x i16> %topT, splat (i16 128)
  %lowT = lshr <V x i16> %bT, splat (i16 7)
  %sizeT = and <V x i16> %lowT, splat (i16 127)
  %zT = or <V x i16> %signT, %sizeT
  %yT = trunc <V x i16> %zT to <V x i8>""",
    ),
}

_EXPONENT = {
    "F64": ("i64", 0x7FF0000000000000),
    "F32": ("i32", 0x7F800000),
    "F16": ("i16", 0x7C00),
    "BF16": ("i16", 0x7F80),
}
"""The exponent bits of each dtype."""


def accumulate(
    dtype: str,
    rows: npt.NDArray[np.uintp],
    weights: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64] | None,
    out: npt.NDArray[np.uint8],
    out_dtype: str,
    count: int,
) -> bool:
    """Round `sums[t, :count] + weights[:, t] @ snapshots` to `out_dtype`, into `out[t]`.

    `rows` [snapshots] holds the address of each snapshot's elements, of a `dtype` in WIDENED;
    `weights` is [snapshots, targets], C-contiguous; `sums` [targets, capacity] are those of
    the snapshots before, None when there are none. `out` [targets, bytes] gets elements of F16,
    BF16, F32 or F64, rounded to nearest, ties to even; as F64 they are sums to go on from, and
    `out` may lie where `sums` does. Every row holds a multiple of STRIDE elements, at least
    `count`, which is at least 1; those between `count` and the next multiple are overwritten.

    Returns whether any result is infinite or not a number: false says that none is, true that one
    may be, as what lies beyond `count` counts too.
    """
    snapshots, targets = weights.shape
    suspicious = 0
    for first in range(0, targets, MAX_TARGETS):
        width = min(MAX_TARGETS, targets - first)
        suspicious |= _kernel(dtype, out_dtype, width, sums is not None)(
            rows.ctypes.data,
            weights.ctypes.data + 8 * first,
            targets,
            snapshots,
            0 if sums is None else sums.ctypes.data + first * sums.strides[0],
            0 if sums is None else sums.strides[0],
            out.ctypes.data + first * out.strides[0],
            out.strides[0],
            count,
        )
    return suspicious != 0


@functools.cache
def _kernel(dtype: str, out_dtype: str, targets: int, goes_on: bool) -> Callable[..., int]:
    # Registers hold `targets` sums of `lanes` doubles; 64 doubles fill half of the largest set
    # there is, and are enough in flight to hide the latency of the multiply-add.
    lanes = STRIDE // max(targets, 2) // 8 * 8 or 8
    stored, widen = _WIDEN[dtype]
    out_stored, narrow = _NARROW[out_dtype]
    each = range(targets)
    lines = [
        "define i32 @kernel(ptr %rows, ptr %weights, i64 %weight_stride, i64 %snapshots,"
        " ptr %sums, i64 %sum_stride, ptr %out, i64 %out_stride, i64 %count) {",
        "entry:",
        "  br label %block",
        "block:",
        "  %j = phi i64 [0, %entry], [%next_j, %finish]",
        f"  %odd = phi <V x i1> [zeroinitializer, %entry], [%odd{targets}, %finish]",
    ]
    start = ["zeroinitializer" for _ in each]
    if goes_on:
        for t in each:
            lines += [
                f"  %sum_offset{t} = mul i64 %sum_stride, {t}",
                f"  %sum_row{t} = getelementptr i8, ptr %sums, i64 %sum_offset{t}",
                f"  %sum_p{t} = getelementptr double, ptr %sum_row{t}, i64 %j",
                f"  %before{t} = load <V x double>, ptr %sum_p{t}, align 8",
            ]
        start = [f"%before{t}" for t in each]
    lines += [
        "  br label %snapshot",
        "snapshot:",
        "  %i = phi i64 [0, %block], [%next_i, %snapshot]",
        *(f"  %a{t} = phi <V x double> [{start[t]}, %block], [%s{t}, %snapshot]" for t in each),
        "  %row_p = getelementptr ptr, ptr %rows, i64 %i",
        "  %row = load ptr, ptr %row_p, align 8",
        f"  %x_p = getelementptr {stored}, ptr %row, i64 %j",
        f"  %x = load <V x {stored}>, ptr %x_p, align 1",
        widen,
        "  %w_offset = mul i64 %i, %weight_stride",
        "  %w_p = getelementptr double, ptr %weights, i64 %w_offset",
    ]
    for t in each:
        lines += [
            f"  %w_p{t} = getelementptr double, ptr %w_p, i64 {t}",
            f"  %w_one{t} = load double, ptr %w_p{t}, align 8",
            *splat(f"w_one{t}", "double"),
            f"  %s{t} = call <V x double> @llvm.fma.vVf64("
            f"<V x double> %d, <V x double> %w_one{t}_v, <V x double> %a{t})",
        ]
    lines += [
        "  %next_i = add i64 %i, 1",
        "  %more = icmp ult i64 %next_i, %snapshots",
        "  br i1 %more, label %snapshot, label %finish",
        "finish:",
        "  %odd0 = or <V x i1> %odd, zeroinitializer",
    ]
    bits, exponent = _EXPONENT[out_dtype]
    for t in each:
        lines += [
            re.sub(r"(%\w+)T\b", rf"\g<1>{t}", narrow),
            f"  %out_offset{t} = mul i64 %out_stride, {t}",
            f"  %out_row{t} = getelementptr i8, ptr %out, i64 %out_offset{t}",
            f"  %out_p{t} = getelementptr {out_stored}, ptr %out_row{t}, i64 %j",
            f"  store <V x {out_stored}> %y{t}, ptr %out_p{t}, align 1",
            # All exponent bits set: infinite or not a number.
            f"  %bits{t} = bitcast <V x {out_stored}> %y{t} to <V x {bits}>",
            f"  %exponent{t} = and <V x {bits}> %bits{t}, splat ({bits} {exponent})",
            f"  %full{t} = icmp eq <V x {bits}> %exponent{t}, splat ({bits} {exponent})",
            f"  %odd{t + 1} = or <V x i1> %odd{t}, %full{t}",
        ]
    lines += [
        "  %next_j = add i64 %j, V",
        "  %again = icmp ult i64 %next_j, %count",
        "  br i1 %again, label %block, label %done",
        "done:",
        f"  %any = call i1 @llvm.vector.reduce.or.vVi1(<V x i1> %odd{targets})",
        "  %result = zext i1 %any to i32",
        "  ret i32 %result",
        "}",
        "declare i1 @llvm.vector.reduce.or.vVi1(<V x i1>)",
        "declare <V x double> @llvm.fma.vVf64(<V x double>, <V x double>, <V x double>)",
        "declare <V x double> @llvm.fabs.vVf64(<V x double>)",
    ]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, integer, integer, pointer, integer, pointer, integer, integer)
    return compiled("\n".join(lines), lanes, ctypes.c_int32, *arguments)


def quantize(
    dtype: str,
    data: npt.NDArray[np.uint8],
    bases: Sequence[tuple[float, npt.NDArray[np.float64]]],
    exponent: int | None,
    out_dtype: str,
    out: npt.NDArray[np.uint8],
    sums: npt.NDArray[np.float64],
) -> float:
    """Round `data + minus` to multiples of 2^exponent, as `out_dtype` has them, and take `out` from
    `minus`, into `sums`; without an exponent neither. `minus` is the sum of the arrays in `bases`
    times their coefficients; each product is rounded, and each sum.

    Returns the largest absolute value of `data + minus`, infinite or NaN if one is: where it is too
    large for `out_dtype`, what is in `out` means nothing. `dtype` is in WIDENED, `out_dtype` F16,
    BF16 or F8_E4M3. All have as many elements as those of `bases`, and room for a
    multiple of STRIDE.
    """
    rows = np.array([row.ctypes.data for _, row in bases], np.uintp)
    weights = np.array([weight for weight, _ in bases])
    products = len(bases) if len(bases) > 1 or weights[0] != 1.0 else 0
    bits = _quantizer(dtype, None if exponent is None else out_dtype, products)(
        data.ctypes.data,
        rows.ctypes.data,
        weights.ctypes.data,
        math.ldexp(1.0, -(exponent or 0)),
        -math.ldexp(1.0, exponent or 0),
        out.ctypes.data,
        sums.ctypes.data,
        bases[0][1].size,
    )
    return float(np.int64(bits).view(np.float64))


@functools.cache
def _quantizer(dtype: str, out_dtype: str | None, products: int) -> Callable[..., int]:
    """Of so many `products`; of none there is one row, as it is."""
    lanes = 32
    places = ", ".join(f"i64 {at}" for at in range(lanes))
    stored, widen = _WIDEN[dtype]
    lines = [
        "define i64 @kernel(ptr %data, ptr %rows, ptr %weights, double %down, double %up, ptr %out,"
        " ptr %sums, i64 %count) {",
        "entry:",
        *splat("down", "double"),
        *splat("up", "double"),
    ]
    for at in range(products or 1):
        lines += [
            f"  %row_p{at} = getelementptr ptr, ptr %rows, i64 {at}",
            f"  %row{at} = load ptr, ptr %row_p{at}, align 8",
            f"  %w_p{at} = getelementptr double, ptr %weights, i64 {at}",
            f"  %w{at} = load double, ptr %w_p{at}, align 8",
            *splat(f"w{at}", "double"),
        ]
    lines += [
        "  br label %block",
        "block:",
        "  %j = phi i64 [0, %entry], [%next_j, %block]",
        "  %peak = phi <V x i64> [zeroinitializer, %entry], [%larger, %block]",
        f"  %x_p = getelementptr {stored}, ptr %data, i64 %j",
        f"  %x = load <V x {stored}>, ptr %x_p, align 1",
        widen,
    ]
    minus = "splat (double -0.0)"
    for at in range(products or 1):
        lines += [
            f"  %b_p{at} = getelementptr double, ptr %row{at}, i64 %j",
            f"  %b{at} = load <V x double>, ptr %b_p{at}, align 8",
            f"  %p{at} = fmul <V x double> %b{at}, %w{at}_v",
            f"  %m{at} = fadd <V x double> {minus}, %{'p' if products else 'b'}{at}",
        ]
        minus = f"%m{at}"
    lines += [
        f"  %m = fadd <V x double> {minus}, splat (double -0.0)",
        "  %rest = fadd <V x double> %d, %m",
        "  %size = call <V x double> @llvm.fabs.vVf64(<V x double> %rest)",
        "  %all_bits = bitcast <V x double> %size to <V x i64>",
        # Not of what lies beyond the end. NaN has more bits than infinity.
        "  %left = sub i64 %count, %j",
        *splat("left", "i64"),
        f"  %inside = icmp ult <V x i64> <{places}>, %left_v",
        "  %bits = select <V x i1> %inside, <V x i64> %all_bits, <V x i64> zeroinitializer",
        "  %more = icmp sgt <V x i64> %bits, %peak",
        "  %larger = select <V x i1> %more, <V x i64> %bits, <V x i64> %peak",
    ]
    if out_dtype is not None:
        out_stored, narrow = _NARROW[out_dtype]
        lines += [
            "  %s0 = fmul <V x double> %rest, %down_v",
            re.sub(r"(%\w+)T\b", r"\g<1>0", narrow).replace("%", "%n_").replace("%n_s0", "%s0"),
            f"  %out_p = getelementptr {out_stored}, ptr %out, i64 %j",
            f"  store <V x {out_stored}> %n_y0, ptr %out_p, align 1",
            f"  %w_x = bitcast <V x {out_stored}> %n_y0 to <V x {out_stored}>",
            _WIDEN[out_dtype][1].replace("%", "%w_")
            if out_dtype != "F8_E4M3"  # its value is at hand
            else "  %w_d = fpext <V x float> %n_signed0 to <V x double>",
            "  %sum = call <V x double> @llvm.fma.vVf64("
            "<V x double> %w_d, <V x double> %up_v, <V x double> %m)",
            "  %sum_p = getelementptr double, ptr %sums, i64 %j",
            "  store <V x double> %sum, ptr %sum_p, align 8",
        ]
    lines += [
        "  %next_j = add i64 %j, V",
        "  %again = icmp ult i64 %next_j, %count",
        "  br i1 %again, label %block, label %done",
        "done:",
        "  %result = call i64 @llvm.vector.reduce.smax.vVi64(<V x i64> %larger)",
        "  ret i64 %result",
        "}",
        "declare i64 @llvm.vector.reduce.smax.vVi64(<V x i64>)",
        "declare <V x double> @llvm.fma.vVf64(<V x double>, <V x double>, <V x double>)",
        "declare <V x float> @llvm.copysign.vVf32(<V x float>, <V x float>)",
        "declare <V x i32> @llvm.umax.vVi32(<V x i32>, <V x i32>)",
        "declare <V x double> @llvm.fabs.vVf64(<V x double>)",
    ]
    pointer, real, integer = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64
    arguments = (pointer, pointer, pointer, real, real, pointer, pointer, integer)
    return compiled("\n".join(lines), lanes, integer, *arguments)


def splat(name: str, kind: str) -> list[str]:
    """The lines by which the scalar %name becomes a vector, %name_v."""
    return [
        f"  %{name}_in = insertelement <V x {kind}> poison, {kind} %{name}, i64 0",
        f"  %{name}_v = shufflevector <V x {kind}> %{name}_in, <V x {kind}> poison,"
        " <V x i32> zeroinitializer",
    ]


_compiling = threading.Lock()
_engines: list[Any] = []  # the machine code lives as long as its engine


def compiled(ir: str, lanes: int, result: Any, *arguments: Any) -> Callable[..., int]:
    """Compile `ir`, whose vectors have V lanes, for this processor.

    The function is called without the interpreter lock, as ctypes does with every CFUNCTYPE.
    """
    for written, actual in (
        ("<V x", f"<{lanes} x"),
        (".vVf64", f".v{lanes}f64"),
        (".vVf32", f".v{lanes}f32"),
        (".vVi", f".v{lanes}i"),
        (" V\n", f" {lanes}\n"),
    ):
        ir = ir.replace(written, actual)
    with _compiling:
        machine = _target_machine()
        module = llvm.parse_assembly(ir)
        module.verify()
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _engines.append(engine)
        address = engine.get_function_address("kernel")
    return ctypes.CFUNCTYPE(result, *arguments)(address)


def _target_machine() -> Any:
    if not _engines:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell on every system
        features = ""
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)
