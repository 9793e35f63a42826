"""Routed SwiGLU experts (DeepSeekMoE, arXiv 2401.06066)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float = 0.0) -> Tensor:
    """``silu(gate) * up``; a ``limit`` > 0 first bounds the gate from above and ``up`` on both sides."""
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float = 0.0) -> Tensor:
    """``sum_k w_k E_k(x)`` with ``E(x) = down swiglu(gate x, up x)``.

    x: [T, d]; indices: int64 [T, K], the chosen experts; weights: [T, K]; gate_up: [E, 2 I, d], gate rows
    first; down: [E, d, I]; limit: as of :func:`swiglu`. Returns [T, d].
    """
    out = x.new_zeros(x.shape)
    for expert in range(len(gate_up)):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        y = swiglu(gate, up, limit) @ down[expert].T
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out
