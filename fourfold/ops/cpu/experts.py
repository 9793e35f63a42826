"""Experts as one grouped matrix product over tokens sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.ops import reference

FEW = 64  # below this many (token, expert) pairs the sort costs more than it saves


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float = 0.0) -> Tensor:
    """See :func:`fourfold.ops.reference.experts`."""
    if indices.numel() < FEW:
        w1, w2 = gate_up[indices], down[indices]  # [T, K, 2 I, d], [T, K, d, I]
        gate, up = torch.einsum("tkid,td->tki", w1, x).chunk(2, dim=-1)
        return torch.einsum("tkdi,tki->td", w2, reference.swiglu(gate, up, limit) * weights[..., None].to(x.dtype))
    aligned = all(width * x.element_size() % 16 == 0 for width in down.shape[1:])
    if x.dtype == torch.float64 or not aligned:  # grouped_mm has no float64 and wants rows of whole 16 bytes
        return reference.experts(x, indices, weights, gate_up, down, limit)
    per_token = indices.shape[1]
    order = indices.flatten().argsort(stable=True)
    token = order // per_token
    ends = torch.bincount(indices.flatten(), minlength=len(gate_up)).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[token], gate_up.contiguous().transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(reference.swiglu(gate, up, limit), down.contiguous().transpose(1, 2), offs=ends)
    y = y * weights.flatten()[order, None].to(y.dtype)
    return torch.empty_like(y).index_copy(0, order, y).unflatten(0, (-1, per_token)).sum(1)
