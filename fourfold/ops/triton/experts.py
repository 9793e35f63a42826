"""Routed SwiGLU experts as two grouped matrix products: pairs of token and expert lie sorted by expert, each expert's
filled up to whole tiles, so that a program reads one expert's weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.triton.common import LEAST, dot, fits

ROWS, COLUMNS, DEPTH = LEAST, 64, 32  # pairs and outputs of a program; inputs of a step


@triton.jit
def _product(
    x, row_of, expert_of, w, out, width, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    pair, column = tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row, expert = tl.load(row_of + pair), tl.load(expert_of + tile)
    some, there = row >= 0, column < outputs
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = at < width
        a = tl.load(x + row[:, None] * width + at[None, :], some[:, None] & inside[None, :], 0.0)
        lines = w + (expert * outputs + column[None, :]) * width + at[:, None]
        b = tl.load(lines, inside[:, None] & there[None, :], 0.0)
        total += dot(a, b)
    place = out + pair[:, None] * outputs + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), there[None, :])


def _grouped(x: Tensor, rows: Tensor, experts: Tensor, w: Tensor) -> Tensor:
    """Row ``rows[p]`` of x (-1: nothing) times the transposed matrix of its tile's expert: [P, outputs]."""
    outputs, width = w.shape[1:]
    out = x.new_empty(len(rows), outputs)
    _product[(len(experts), triton.cdiv(outputs, COLUMNS))](
        x, rows, experts, w, out, width, outputs, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH
    )
    return out


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float = 0.0) -> Tensor:
    """See :func:`fourfold.ops.reference.experts`."""
    if not fits(x, indices, weights, gate_up, down) or not x.dtype == gate_up.dtype == down.dtype:
        return reference.experts(x, indices, weights, gate_up, down, limit)
    x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
    chosen, order = indices.flatten().sort(stable=True)
    counts = torch.bincount(chosen, minlength=len(gate_up))
    tiles = (counts + ROWS - 1) // ROWS
    begins = (tiles.cumsum(0) - tiles) * ROWS  # where each expert's pairs lie among the filled-up ones
    places = begins[chosen] + torch.arange(len(chosen), device=x.device) - (counts.cumsum(0) - counts)[chosen]
    of_tile = torch.repeat_interleave(torch.arange(len(gate_up), device=x.device), tiles)
    rows = torch.full((len(of_tile) * ROWS,), -1, dtype=torch.int64, device=x.device)
    rows[places] = order // indices.shape[1]
    gate, up = _grouped(x, rows, of_tile, gate_up).chunk(2, dim=-1)
    hidden = reference.swiglu(gate, up, limit).contiguous()
    pairs = torch.arange(len(rows), device=x.device).where(rows >= 0, -1)
    y = _grouped(hidden, pairs, of_tile, down)[places].float() * weights.flatten()[order, None].float()
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, order // indices.shape[1], y).to(x.dtype)
