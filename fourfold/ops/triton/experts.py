"""Routed SwiGLU experts as two grouped matrix products: pairs of token and expert lie sorted by expert, each expert's
filled up to whole tiles, so that a program reads one expert's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.reference import Quantized
from fourfold.ops.triton.common import fits
from fourfold.ops.triton.matmul import ROWS, grouped, quantized_linear


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float = 0.0) -> Tensor:
    """See :func:`fourfold.ops.reference.experts`."""
    if not fits(x, indices, weights, gate_up, down) or not x.dtype == gate_up.dtype == down.dtype:
        return reference.experts(x, indices, weights, gate_up, down, limit)
    return _routed(x, indices, weights, gate_up, down, limit)


def quantized_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Quantized,
    down: Quantized,
    limit: float = 0.0,
    shared: tuple[Quantized, Quantized, Quantized] | None = None,
) -> Tensor:
    """See :func:`fourfold.ops.reference.quantized_experts`."""
    if gate_up.packed or down.packed or not fits(x, indices, weights, gate_up.scales, down.scales):
        return reference.quantized_experts(x, indices, weights, gate_up, down, limit, shared)
    out = _routed(x, indices, weights, gate_up, down, limit)
    if shared is not None:
        gate, up = (quantized_linear(x, weight) for weight in shared[:2])
        out = out + quantized_linear(reference.swiglu(gate, up, limit), shared[2])
    return out


def _routed(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor | Quantized,
    down: Tensor | Quantized,
    limit: float,
) -> Tensor:
    x, count, each = x.contiguous(), gate_up.shape[0], indices.shape[1]
    chosen, order = indices.flatten().sort(stable=True)
    counts = torch.bincount(chosen, minlength=count)
    tiles = (counts + ROWS - 1) // ROWS
    begins = (tiles.cumsum(0) - tiles) * ROWS  # where each expert's pairs lie among the filled-up ones
    places = begins[chosen] + torch.arange(len(chosen), device=x.device) - (counts.cumsum(0) - counts)[chosen]
    of_tile = torch.repeat_interleave(torch.arange(count, device=x.device), tiles)
    rows = torch.full((len(of_tile) * ROWS,), -1, dtype=torch.int64, device=x.device)
    rows[places] = order // each
    gate, up = grouped(x, rows, of_tile, gate_up).chunk(2, dim=-1)
    hidden = reference.swiglu(gate, up, limit).contiguous()
    pairs = torch.arange(len(rows), device=x.device).where(rows >= 0, -1)
    y = grouped(hidden, pairs, of_tile, down)[places].float() * weights.flatten()[order, None].float()
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, order // each, y).to(x.dtype)
