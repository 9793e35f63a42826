"""Hyper-connections: a token's maps with all of Sinkhorn in registers, and streams read and mixed in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.triton.common import fits, power

BLOCK = 256  # features of a program


@triton.jit
def _maps(hidden, pre, post, comb, eps, ITERATIONS: tl.constexpr, N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, N)
    square = one[:, None] * N + one[None, :]
    hidden += token * N * (N + 2)
    tl.store(pre + token * N + one, tl.sigmoid(tl.load(hidden + one)) + eps)
    tl.store(post + token * N + one, 2 * tl.sigmoid(tl.load(hidden + N + one)))
    x = tl.load(hidden + 2 * N + square)
    x = tl.exp(x - tl.max(x, 1)[:, None])
    x = x / tl.sum(x, 1)[:, None] + eps
    x = x / (tl.sum(x, 0)[None, :] + eps)
    for _ in range(ITERATIONS - 1):
        x = x / (tl.sum(x, 1)[:, None] + eps)
        x = x / (tl.sum(x, 0)[None, :] + eps)
    tl.store(comb + token * N * N + square, x)


@triton.jit
def _read(x, pre, out, width, N: tl.constexpr, SIZE: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    total = tl.zeros([SIZE], tl.float32)
    for i in tl.static_range(N):
        total += tl.load(pre + token * N + i).to(tl.float32) * tl.load(x + (token * N + i) * width + at, inside, 0.0)
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), inside)


@triton.jit
def _mix(x, y, post, comb, out, width, N: tl.constexpr, SIZE: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    written = tl.load(y + token * width + at, inside, 0.0).to(tl.float32)
    for k in tl.static_range(N):
        total = tl.load(post + token * N + k).to(tl.float32) * written
        for j in tl.static_range(N):
            share = tl.load(comb + (token * N + j) * N + k).to(tl.float32)
            total += share * tl.load(x + (token * N + j) * width + at, inside, 0.0)
        tl.store(out + (token * N + k) * width + at, total.to(out.dtype.element_ty), inside)


def hyper_maps(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    doubly_stochastic: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fourfold.ops.reference.hyper_maps`; the product with ``fn`` is torch's."""
    n = x.shape[1]
    if not fits(x, fn, base, scale) or not doubly_stochastic or power(n, 1) != n:
        return reference.hyper_maps(x, fn, base, scale, doubly_stochastic, iterations, eps, norm_eps)
    flat = x.float().flatten(1)
    hidden = (flat @ fn.T.float()) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    hidden = hidden * scale.repeat_interleave(torch.tensor([n, n, n * n], device=x.device)) + base
    pre, post, comb = hidden.new_empty(len(x), n), hidden.new_empty(len(x), n), hidden.new_empty(len(x), n, n)
    _maps[(len(x),)](hidden.contiguous(), pre, post, comb, eps, ITERATIONS=iterations, N=n)
    return pre, post, comb


def read_streams(x: Tensor, pre: Tensor) -> Tensor:
    """See :func:`fourfold.ops.reference.read_streams`."""
    if not fits(x, pre):
        return reference.read_streams(x, pre)
    x, pre = x.contiguous(), pre.contiguous()
    tokens, n, width = x.shape
    out = x.new_empty(tokens, width)
    _read[(tokens, triton.cdiv(width, BLOCK))](x, pre, out, width, N=n, SIZE=BLOCK)
    return out


def mix_streams(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See :func:`fourfold.ops.reference.mix_streams`."""
    if not fits(x, y, post, comb):
        return reference.mix_streams(x, y, post, comb)
    x, y, post, comb = (t.contiguous() for t in (x, y, post, comb))
    tokens, n, width = x.shape
    out = torch.empty_like(x)
    _mix[(tokens, triton.cdiv(width, BLOCK))](x, y, post, comb, out, width, N=n, SIZE=BLOCK)
    return out
