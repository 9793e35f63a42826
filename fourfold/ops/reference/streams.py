"""Hyper-connections: how n residual streams are read, mixed and written (arXiv 2512.24880)."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops.reference.norm import at_least_float32
from fourfold.ops.reference.sinkhorn import sinkhorn


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
    """The three maps of one site, computed from the streams in float32.

    x: [T, n, d]; fn: [n(n+2), n d]; base: [n(n+2)]; scale: [3], in the order pre [n], post [n],
    comb [n, n] row-major. Returns pre [T, n], post [T, n], comb [T, n, n]; comb sends stream j to
    stream k by ``comb[j, k]``. Free hyper-connections add a bounded change to static maps instead.
    """
    n = x.shape[1]
    flat = at_least_float32(x).flatten(1)
    mixed = (flat @ fn.T.to(flat.dtype)) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    pre, post, comb = mixed.split([n, n, n * n], dim=-1)
    base_pre, base_post, base_comb = base.split([n, n, n * n])
    if not doubly_stochastic:
        pre, post = pre.tanh() * scale[0] + base_pre, post.tanh() * scale[1] + base_post
        return pre, post, (comb.tanh() * scale[2] + base_comb).unflatten(-1, (n, n))
    pre = (pre * scale[0] + base_pre).sigmoid() + eps
    post = 2 * (post * scale[1] + base_post).sigmoid()
    return pre, post, sinkhorn((comb * scale[2] + base_comb).unflatten(-1, (n, n)), iterations, eps)


def read_streams(x: Tensor, pre: Tensor) -> Tensor:
    """What the sub-layer sees: ``sum_i pre_i x_i``. x: [T, n, d]; pre: [T, n]. Returns [T, d]."""
    return (pre[..., None] * x).sum(1).to(x.dtype)


def mix_streams(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """``x'_k = post_k y + sum_j comb[j, k] x_j``. x: [T, n, d]; y: [T, d]; post: [T, n]; comb: [T, n, n]."""
    mixed = (comb[..., None] * x[:, :, None]).sum(1)
    return (post[..., None] * y[:, None] + mixed).to(x.dtype)


def collapse_streams(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """The gated sum of all streams before the final norm. x: [T, n, d]; fn: [n, n d]; base: [n]; scale: [1].
    Returns [T, d]."""
    flat = at_least_float32(x).flatten(1)
    mixed = (flat @ fn.T.to(flat.dtype)) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return read_streams(x, (mixed * scale + base).sigmoid() + eps)
