"""The products of ``native/blocks.h`` without a C++ compiler: LLVM code around vpdpbusd, compiled by Numba.

Same packed weights, same rounding of activations; each row of these meets a block alone, so prefill is
slower. Needs AVX-512 with VNNI.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fourfold.ops.reference.quantized import Quantized

GROUP, ROWS, LINE = 32, 16, 64

function: Any = cgutils.get_or_insert_function  # without types
variable: Any = cgutils.alloca_once_value

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, HALVES, WORDS, FLOATS = (ir.VectorType(t, n) for t, n in ((I8, 64), (I16, 16), (I32, 16), (F32, 16)))


def usable() -> bool:
    """Whether this processor has the instructions."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512bw"))


def _block_kernel(bits: int) -> Any:
    """out[0..15] = a block of 16 packed rows times one row of activations; all arguments are addresses or counts."""
    lines = GROUP * bits // 32

    @intrinsic
    def block(context, line, scales, codes, x_scales, offsets, groups, span, out):  # type: ignore[no-untyped-def]
        signature = types.void(*[types.uintp] * 5, types.intp, types.intp, types.uintp)

        def generate(ctx, b, sig, args):  # type: ignore[no-untyped-def]
            line, scales, codes, x_scales, offsets, groups, span, out = args
            # newer LLVM wants vectors of bytes
            newer = binding.llvm_version_info[0] >= 22
            operand = BYTES if newer else WORDS
            dot_type = ir.FunctionType(WORDS, [WORDS, operand, operand])
            dot = function(b.module, dot_type, "llvm.x86.avx512.vpdpbusd.512")

            def at(base: Any, index: Any, stride: int, kind: Any) -> Any:
                address = b.add(base, b.mul(index, ir.Constant(I64, stride)))
                return b.load(b.inttoptr(address, kind.as_pointer()), align=1)

            def spread(value: Any, kind: Any) -> Any:
                first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
                zeros = ir.Constant(ir.VectorType(I32, 16), [0] * 16)
                return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

            def products(sums: Any, weights: Any, word: Any) -> Any:
                return b.call(dot, [sums, b.bitcast(weights, operand), b.bitcast(spread(word, WORDS), operand)])

            total = variable(b, ir.Constant(FLOATS, [0.0] * 16))
            with cgutils.for_range(b, groups) as loop:
                g = loop.index
                sums = spread(at(offsets, g, 4, I32), WORDS)
                for j in range(lines):
                    weights = at(b.add(line, ir.Constant(I64, j * LINE)), g, lines * LINE, BYTES)
                    step = 8 if bits == 4 else 4
                    word = at(b.add(codes, ir.Constant(I64, j * step)), g, GROUP, I32)
                    if bits == 8:
                        sums = products(sums, weights, word)
                        continue
                    low = b.and_(weights, ir.Constant(BYTES, [15] * 64))
                    high = b.lshr(weights, ir.Constant(BYTES, [4] * 64))
                    later = at(b.add(codes, ir.Constant(I64, j * step + 4)), g, GROUP, I32)
                    sums = products(products(sums, low, word), high, later)
                factor = spread(at(x_scales, g, 4, F32), FLOATS)
                if bits == 4:
                    halves = b.zext(at(scales, b.sdiv(g, span), 2 * ROWS, HALVES), WORDS)
                    factor = b.fmul(factor, b.bitcast(b.shl(halves, ir.Constant(WORDS, [16] * 16)), FLOATS))
                b.store(b.fadd(b.load(total), b.fmul(factor, b.sitofp(sums, FLOATS))), total)
            result = b.load(total)
            if bits == 8:
                result = b.fmul(result, at(scales, ir.Constant(I64, 0), 0, FLOATS))
            b.store(result, b.inttoptr(out, FLOATS.as_pointer())).align = 4
            return ctx.get_dummy_value()

        return signature, generate

    return block


@njit(cache=True, nogil=True)
def _round(x, unsign, codes, scales, offsets):  # type: ignore[no-untyped-def]
    """One activation row to int8 in groups of 32."""
    for g in range(len(scales)):
        first, last = g * GROUP, min(len(x), (g + 1) * GROUP)
        top = np.float32(0)
        for k in range(first, last):
            top = top if abs(x[k]) <= top or top != top else abs(x[k])  # what is not a number stays
        inverse = np.float32(127) / top if top > 0 else np.float32(0)
        total = np.int32(0)
        for k in range(first, last):
            q = np.int32(np.rint(x[k] * inverse))
            codes[k] = q
            total += q
        scales[g] = top / np.float32(127)
        offsets[g] = unsign * total


@cache
def _product(bits: int) -> Any:
    block, unsign = _block_kernel(bits), -8 if bits == 4 else -128
    row_bytes = GROUP * bits // 8 * ROWS  # of a group of columns in a block

    @njit(parallel=True, nogil=True)
    def product(line, scales, scale_bytes, span, groups, x, y):  # type: ignore[no-untyped-def]
        rows, blocks = len(x), y.shape[1] // ROWS
        codes = np.zeros((rows, groups * GROUP), np.int8)
        x_scales, offsets = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.int32)
        for m in prange(rows):
            _round(x[m], unsign, codes[m], x_scales[m], offsets[m])
        for b in prange(blocks):  # a block stays in the nearest cache for all rows
            for m in range(rows):
                block(
                    line + b * groups * row_bytes,
                    scales + b * scale_bytes,
                    codes[m].ctypes.data,
                    x_scales[m].ctypes.data,
                    offsets[m].ctypes.data,
                    groups,
                    span,
                    y[m].ctypes.data + b * ROWS * 4,
                )

    return product


@cache
def compile_for(kind: str) -> None:
    """Takes a few seconds, once."""
    codes = torch.zeros(1, 4 if kind == "int4" else 8, LINE, dtype=torch.uint8)
    scales = torch.ones(1, 1, ROWS).bfloat16() if kind == "int4" else torch.ones(1, ROWS)
    matmul(torch.zeros(1, GROUP), Quantized(codes, scales, (ROWS, GROUP), kind, GROUP, True), torch.empty(1, ROWS))


def matmul(x: Tensor, weight: Quantized, y: Tensor) -> None:
    """y [M, N] = x [M, K] W^T, float32; weight: packed."""
    blocks = weight.codes.shape[0]
    out = torch.empty(len(x), blocks * ROWS)
    _product(4 if weight.kind == "int4" else 8)(
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        weight.scales.stride(0) * weight.scales.element_size(),
        weight.group // GROUP,
        weight.padded // GROUP,
        x.numpy(),
        out.numpy(),
    )
    y.copy_(out[:, : y.shape[1]])
