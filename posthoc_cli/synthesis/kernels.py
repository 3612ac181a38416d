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
import re
import threading
from collections.abc import Callable
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
}

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

    `rows` [snapshots] holds the address of each snapshot's elements, of `dtype` F16, BF16, F32 or
    F64; `weights` is [snapshots, targets], C-contiguous; `sums` [targets, capacity] are those of
    the snapshots before, None when there are none. `out` [targets, bytes] gets elements of one of
    the same dtypes, rounded to nearest, ties to even; as F64 they are sums to go on from, and
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
            f"  %w_in{t} = insertelement <V x double> poison, double %w_one{t}, i64 0",
            f"  %w{t} = shufflevector <V x double> %w_in{t}, <V x double> poison,"
            " <V x i32> zeroinitializer",
            f"  %s{t} = call <V x double> @llvm.fma.vVf64("
            f"<V x double> %d, <V x double> %w{t}, <V x double> %a{t})",
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
    return _compile("\n".join(lines), lanes, *arguments)


_compiling = threading.Lock()
_engines: list[Any] = []  # the machine code lives as long as its engine


def _compile(ir: str, lanes: int, *arguments: Any) -> Callable[..., int]:
    """Compile `ir`, whose vectors have V lanes, for this processor.

    The function is called without the interpreter lock, as ctypes does with every CFUNCTYPE.
    """
    for written, actual in (
        ("<V x", f"<{lanes} x"),
        (".vVf64", f".v{lanes}f64"),
        (".vVi1", f".v{lanes}i1"),
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
    return ctypes.CFUNCTYPE(ctypes.c_int32, *arguments)(address)


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
