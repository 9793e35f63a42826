"""Grouped matrix products with plain or quantised weights, which are decoded tile by tile as they are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.reference import FP8_BLOCK, Quantized
from fourfold.ops.triton.common import LEAST, dot, fits

ROWS, COLUMNS, DEPTH = LEAST, 64, 32  # rows and outputs of a program; inputs of a step


@triton.jit
def _product(
    x, row_of, matrix_of, w, scales, out, width, outputs, line, scale_rows, scale_columns,
    KIND: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    place, column = tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row, matrix = tl.load(row_of + place), tl.load(matrix_of + tile)
    some, there = row >= 0, column < outputs
    lines = w + (matrix * outputs + column) * line
    levels = scales + (matrix * scale_rows + column // HIGH) * scale_columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = at < width
        mask = inside[:, None] & there[None, :]
        a = tl.load(x + row[:, None] * width + at[None, :], some[:, None] & inside[None, :], 0.0)
        if KIND == "int4":
            b = tl.load(lines[None, :] + at[:, None] // 2, mask, 0).to(tl.int32)
            b = ((b >> (4 * (at % 2))[:, None]) & 15) - 8
        else:
            b = tl.load(lines[None, :] + at[:, None], mask, 0.0)
        if KIND != "plain":
            b = b.to(tl.float32) * tl.load(levels[None, :] + at[:, None] // WIDE, mask, 0.0).to(tl.float32)
        total += dot(a, b.to(a.dtype))
    tl.store(out + place[:, None] * outputs + column[None, :], total.to(out.dtype.element_ty), there[None, :])


def grouped(x: Tensor, rows: Tensor, matrices: Tensor, w: Tensor | Quantized) -> Tensor:
    """Row ``rows[p]`` of x (-1: nothing) times the transposed matrix of its tile of 16 rows: [P, outputs].

    x: [T, K], contiguous; rows: int64 [P], P a multiple of 16; matrices: int64 [P / 16], each one of w [E, N, K].
    """
    outputs, width = w.shape[1:]
    out = x.new_empty(len(rows), outputs)
    if isinstance(w, Quantized):
        codes, scales = w.codes.contiguous(), w.scales.contiguous()
        kind, (high, wide) = w.kind, {"int8": (1, width), "int4": (1, w.group), "fp8": FP8_BLOCK}[w.kind]
    else:
        codes, scales, kind, high, wide = w.contiguous(), w, "plain", 1, width
    per_row, scale_rows = triton.cdiv(width, wide), triton.cdiv(outputs, high)
    _product[(len(matrices), triton.cdiv(outputs, COLUMNS))](
        x, rows, matrices, codes, scales, out, width, outputs, codes.shape[-1], scale_rows, per_row,
        KIND=kind, HIGH=high, WIDE=wide, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
    )  # fmt: skip
    return out


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """See :func:`fourfold.ops.reference.quantized_linear`."""
    if weight.packed or not fits(x, weight.scales, bias):
        return reference.quantized_linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tiles = triton.cdiv(len(flat), ROWS)
    rows = torch.arange(tiles * ROWS, device=x.device)
    one = Quantized(weight.codes[None], weight.scales[None], (1, *weight.shape), weight.kind, weight.group)
    y = grouped(flat, rows.where(rows < len(flat), -1), rows.new_zeros(tiles), one)[: len(flat)]
    return (y if bias is None else y + bias.to(x.dtype)).view(*x.shape[:-1], -1)
