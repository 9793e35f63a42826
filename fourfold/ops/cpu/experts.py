"""Experts as matrix products over tokens sorted by expert, with a backward pass of its own.

Where nobody learns they are compiled: those of few tokens, and those in bfloat16 that the matrix unit can take.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.linear import ONEDNN, product
from fourfold.ops.cpu.threads import team

COMPILED = 256  # (token, expert) pairs of decoding: more are worth matrix products
FEW = 64  # below this many (token, expert) pairs the sort costs more than it saves
TILE = 32  # rows and columns of weights that the matrix unit takes at once
STEP = 64  # rows of an expert are filled up to a multiple of it: oneDNN compiles each new shape


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float = 0.0) -> Tensor:
    """See :func:`fourfold.ops.reference.experts`."""
    if _compilable(x, weights, gate_up, down):
        if indices.numel() > COMPILED and _fit_tiles(down) and native.matrix_unit():
            return _compiled(x, indices, weights, gate_up, down, limit, matrix=True)
        if 0 < indices.numel() <= COMPILED:
            return _compiled(x, indices, weights, gate_up, down, limit, matrix=False)
    if indices.numel() < FEW:
        w1, w2 = gate_up[indices], down[indices]  # [T, K, 2 I, d], [T, K, d, I]
        gate, up = torch.einsum("tkid,td->tki", w1, x).chunk(2, dim=-1)
        return torch.einsum("tkdi,tki->td", w2, reference.swiglu(gate, up, limit) * weights[..., None].to(x.dtype))
    out: Tensor = _Experts.apply(x, indices, weights, gate_up, down, limit)  # type: ignore[no-untyped-call]
    return out


def _compiled(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float, matrix: bool
) -> Tensor:
    """By the kernels of few tokens, or those of the matrix unit, which take bfloat16 as it is."""
    rows = (x if matrix else x.float()).contiguous()
    chosen, shares = indices.contiguous(), weights.float().contiguous()
    y = torch.empty(rows.shape)
    known = gate_up.data_ptr(), down.data_ptr(), rows.data_ptr(), *rows.shape, down.shape[-1]
    rest = chosen.data_ptr(), shares.data_ptr(), chosen.shape[1], limit, y.data_ptr(), team()
    library = native.library()
    assert library is not None
    if matrix:
        library.ff_half_experts(*known, len(down), *rest)
    else:
        library.ff_plain_experts(gate_up.dtype == torch.bfloat16, *known, *rest)
    return y.to(x.dtype)


def _fit_tiles(down: Tensor) -> bool:
    """Whether the matrix unit can take the weights as they lie; down: [E, d, I]."""
    return down.dtype == torch.bfloat16 and down.shape[1] % TILE == 0 and down.shape[2] % TILE == 0


def _compilable(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    if gate_up.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not (gate_up.dtype == down.dtype == x.dtype and gate_up.is_contiguous() and down.is_contiguous()):
        return False
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    return not learns and native.library() is not None


def places(indices: Tensor, n_experts: int, step: int) -> tuple[Tensor, list[tuple[int, int, int]], int]:
    """Where each of the pairs ``indices`` [T, K] goes, and which rows each used expert has.

    Returns int64 [T K], (expert, start, stop) of every expert that is used, and how many rows there are.
    """
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=n_experts)
    filled = (counts + step - 1) // step * step
    stops = filled.cumsum(0)
    order = flat.argsort(stable=True)
    moved = stops - filled - (counts.cumsum(0) - counts)  # by how much filling up shifts each expert's rows
    place = torch.empty_like(flat).index_copy_(0, order, torch.arange(len(flat)) + moved[flat[order]])
    rows = [(e, stop - n, stop) for e, (n, stop) in enumerate(zip(filled.tolist(), stops.tolist(), strict=True)) if n]
    return place, rows, int(stops[-1])


class _Experts(torch.autograd.Function):
    """Rows that fill up are zero, and so are their results and gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        (tokens, per_token), d = indices.shape, x.shape[1]
        many = indices.numel() >= 2 * STEP * len(gate_up)  # else the filling would be the larger part
        place, rows, total = places(indices, len(gate_up), STEP if many else 1)
        multiply = partial(product, onednn=ONEDNN and many)
        sorted_x = x.new_zeros(total, d)
        sorted_x[place] = x.repeat_interleave(per_token, dim=0)
        hidden, y = x.new_empty(total, gate_up.shape[1]), x.new_empty(total, d)
        for e, start, stop in rows:
            hidden[start:stop] = multiply(sorted_x[start:stop], gate_up[e])
        activated = _swiglu(hidden, limit)
        for e, start, stop in rows:
            y[start:stop] = multiply(activated[start:stop], down[e])
        ctx.save_for_backward(sorted_x, hidden, y, place, weights, gate_up, down)
        ctx.rows, ctx.limit, ctx.multiply = rows, limit, multiply
        return y[place].mul_(weights.flatten()[:, None]).view(tokens, per_token, d).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sorted_x, hidden, y, place, weights, gate_up, down = ctx.saved_tensors
        per_token, multiply = weights.shape[1], ctx.multiply
        g = grads[0].repeat_interleave(per_token, dim=0)
        dweights = torch.linalg.vecdot(g, y[place]).view_as(weights).to(weights.dtype)
        dy = torch.zeros_like(y)
        dy[place] = g.mul_(weights.flatten()[:, None])
        activated = _swiglu(hidden, ctx.limit)
        dactivated, dx = torch.empty_like(activated), torch.empty_like(sorted_x)
        dgate_up, ddown = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, start, stop in ctx.rows:
            dactivated[start:stop] = multiply(dy[start:stop], down[e].T)
            ddown[e] = multiply(dy[start:stop].T, activated[start:stop].T)
        dhidden = _swiglu_backward(dactivated, hidden, ctx.limit)
        for e, start, stop in ctx.rows:
            dx[start:stop] = multiply(dhidden[start:stop], gate_up[e].T)
            dgate_up[e] = multiply(dhidden[start:stop].T, sorted_x[start:stop].T)
        return dx[place].unflatten(0, (-1, per_token)).sum(1), None, dweights, dgate_up, ddown, None


def _swiglu(hidden: Tensor, limit: float) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return reference.swiglu(gate, up, limit)


def _swiglu_backward(g: Tensor, hidden: Tensor, limit: float) -> Tensor:
    """Gradient of ``swiglu`` of the two halves of hidden with respect to hidden."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(_swiglu(hidden, limit), hidden, g)[0]
