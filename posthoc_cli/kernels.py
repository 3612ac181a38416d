"""The CPU's inner loops, compiled when first used: sums of snapshots in float64, rounded once.

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

# How a vector of stored elements, %x, becomes doubles. Half precision goes by way of float, as no
# processor widens it in one instruction; bfloat16 is the upper half of a float.
_WIDEN = {
    "F16": (
        "half",
        """
  %f{k} = fpext <V x half> %x{k} to <V x float>
  %d{k} = fpext <V x float> %f{k} to <V x double>""",
    ),
    "BF16": (
        "i16",
        """
  %u{k} = zext <V x i16> %x{k} to <V x i32>
  %b{k} = shl <V x i32> %u{k}, splat (i32 16)
  %f{k} = bitcast <V x i32> %b{k} to <V x float>
  %d{k} = fpext <V x float> %f{k} to <V x double>""",
    ),
    "F32": ("float", "\n  %d{k} = fpext <V x float> %x{k} to <V x double>"),
    "F64": ("double", "\n  %d{k} = fadd <V x double> %x{k}, splat (double -0.0)"),
}

# How doubles, %x, become stored elements, %y, correctly rounded. Half precision and bfloat16 go by
# way of a float "rounded to odd" (%o): towards zero, with the last bit set if anything was lost, so
# that the second rounding sees on which side of a tie the double was.
_ROUND_TO_ODD = """
  %f = fptrunc <V x double> %x to <V x float>
  %r = fpext <V x float> %f to <V x double>
  %i = bitcast <V x float> %f to <V x i32>
  %ax = call <V x double> @llvm.fabs.vVf64(<V x double> %x)
  %ar = call <V x double> @llvm.fabs.vVf64(<V x double> %r)
  %away = fcmp ogt <V x double> %ar, %ax
  %lost = fcmp one <V x double> %r, %x
  %sub = zext <V x i1> %away to <V x i32>
  %odd = zext <V x i1> %lost to <V x i32>
  %tz = sub <V x i32> %i, %sub
  %o = or <V x i32> %tz, %odd"""

_NARROW = {
    "F32": ("float", "\n  %y = fptrunc <V x double> %x to <V x float>"),
    "F16": (
        "half",
        _ROUND_TO_ODD
        + """
  %g = bitcast <V x i32> %o to <V x float>
  %y = fptrunc <V x float> %g to <V x half>""",
    ),
    "BF16": (
        "i16",
        _ROUND_TO_ODD
        + """
  %hi = lshr <V x i32> %o, splat (i32 16)
  %even = and <V x i32> %hi, splat (i32 1)
  %bias = add <V x i32> %even, splat (i32 32767)
  %up = add <V x i32> %o, %bias
  %cut = lshr <V x i32> %up, splat (i32 16)
  %quiet = or <V x i32> %hi, splat (i32 64)
  %nan = fcmp uno <V x double> %x, %x
  %z = select <V x i1> %nan, <V x i32> %quiet, <V x i32> %cut
  %y = trunc <V x i32> %z to <V x i16>""",
    ),
}


def accumulate(
    dtype: str,
    rows: npt.NDArray[np.uintp],
    weights: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    count: int,
) -> None:
    """Add weighted snapshots to running sums: `sums[t, :count] += weights[:, t] @ snapshots`.

    `rows` [snapshots] holds the address of each snapshot's elements, of `dtype` F16, BF16, F32 or
    F64; `weights` is [snapshots, targets], C-contiguous; `sums` [targets, capacity], where
    capacity, as each row's, is a multiple of STRIDE and at least `count`. Elements between
    `count` and the next multiple of STRIDE are overwritten.
    """
    snapshots, targets = weights.shape
    for first in range(0, targets, MAX_TARGETS):
        width = min(MAX_TARGETS, targets - first)
        _accumulate_kernel(dtype, width)(
            rows.ctypes.data,
            weights.ctypes.data + 8 * first,
            targets,
            snapshots,
            sums.ctypes.data + first * sums.strides[0],
            sums.strides[0] // 8,
            count,
        )


def narrow(
    dtype: str, values: npt.NDArray[np.float64], out: npt.NDArray[np.uint8], count: int
) -> None:
    """Round `values[:count]` to `dtype` (F16, BF16 or F32), to nearest, ties to even, into `out`.

    `values` and `out` (bytes) hold a multiple of STRIDE elements, at least `count`.
    """
    _narrow_kernel(dtype)(values.ctypes.data, out.ctypes.data, count)


@functools.cache
def _accumulate_kernel(dtype: str, targets: int) -> Callable[..., None]:
    # Registers hold `targets` sums of `lanes` doubles; 64 doubles fill half of the largest set
    # there is, and are enough in flight to hide the latency of the multiply-add.
    lanes = STRIDE // max(targets, 2) // 8 * 8 or 8
    element, widen = _WIDEN[dtype]
    each = range(targets)
    lines = [
        "define void @kernel(ptr %rows, ptr %weights, i64 %weight_stride, i64 %snapshots,"
        " ptr %sums, i64 %sum_stride, i64 %count) {",
        "entry:",
        "  br label %block",
        "block:",
        "  %j = phi i64 [0, %entry], [%next_j, %store]",
    ]
    for t in each:
        lines += [
            f"  %so{t} = mul i64 %sum_stride, {t}",
            f"  %sj{t} = add i64 %so{t}, %j",
            f"  %sp{t} = getelementptr double, ptr %sums, i64 %sj{t}",
            f"  %first{t} = load <V x double>, ptr %sp{t}, align 8",
        ]
    lines += [
        "  br label %snapshot",
        "snapshot:",
        "  %i = phi i64 [0, %block], [%next_i, %snapshot]",
        *(f"  %a{t} = phi <V x double> [%first{t}, %block], [%b{t}, %snapshot]" for t in each),
        "  %row_p = getelementptr ptr, ptr %rows, i64 %i",
        "  %row = load ptr, ptr %row_p, align 8",
        f"  %x_p = getelementptr {element}, ptr %row, i64 %j",
        f"  %x = load <V x {element}>, ptr %x_p, align 1",
        widen.replace("{k}", ""),
        "  %wo = mul i64 %i, %weight_stride",
        "  %w_p = getelementptr double, ptr %weights, i64 %wo",
    ]
    for t in each:
        lines += [
            f"  %wp{t} = getelementptr double, ptr %w_p, i64 {t}",
            f"  %ws{t} = load double, ptr %wp{t}, align 8",
            f"  %wi{t} = insertelement <V x double> poison, double %ws{t}, i64 0",
            f"  %w{t} = shufflevector <V x double> %wi{t}, <V x double> poison,"
            " <V x i32> zeroinitializer",
            f"  %b{t} = call <V x double> @llvm.fma.vVf64("
            f"<V x double> %d, <V x double> %w{t}, <V x double> %a{t})",
        ]
    lines += [
        "  %next_i = add i64 %i, 1",
        "  %more = icmp ult i64 %next_i, %snapshots",
        "  br i1 %more, label %snapshot, label %store",
        "store:",
        *(f"  store <V x double> %b{t}, ptr %sp{t}, align 8" for t in each),
        "  %next_j = add i64 %j, V",
        "  %again = icmp ult i64 %next_j, %count",
        "  br i1 %again, label %block, label %done",
        "done:",
        "  ret void",
        "}",
        "declare <V x double> @llvm.fma.vVf64(<V x double>, <V x double>, <V x double>)",
    ]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    return _compile(
        "\n".join(lines), lanes, pointer, pointer, integer, integer, pointer, integer, integer
    )


@functools.cache
def _narrow_kernel(dtype: str) -> Callable[..., None]:
    element, narrowing = _NARROW[dtype]
    ir = f"""
define void @kernel(ptr %values, ptr %out, i64 %count) {{
entry:
  br label %block
block:
  %j = phi i64 [0, %entry], [%next, %block]
  %p = getelementptr double, ptr %values, i64 %j
  %x = load <V x double>, ptr %p, align 8
{narrowing}
  %q = getelementptr {element}, ptr %out, i64 %j
  store <V x {element}> %y, ptr %q, align 1
  %next = add i64 %j, V
  %again = icmp ult i64 %next, %count
  br i1 %again, label %block, label %done
done:
  ret void
}}
declare <V x double> @llvm.fabs.vVf64(<V x double>)
"""
    return _compile(ir, 16, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


_compiling = threading.Lock()
_engines: list[Any] = []  # the machine code lives as long as its engine


def _compile(ir: str, lanes: int, *arguments: Any) -> Callable[..., None]:
    """Compile `ir`, whose vectors have V lanes, for this processor.

    The function is called without the interpreter lock, as ctypes does with every CFUNCTYPE.
    """
    for written, actual in (
        ("<V x", f"<{lanes} x"),
        (".vVf64", f".v{lanes}f64"),
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
    return ctypes.CFUNCTYPE(None, *arguments)(address)


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
