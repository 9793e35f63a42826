"""Softmax attention over visible keys, and the absorbed latent form over gathered ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops.reference.norm import at_least_float32
from fourfold.ops.reference.rows import decode_rows


def attention_probs(q: Tensor, k: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """``softmax(scale * q k^T)`` in float32 over the keys that each query may see, of which there must be one.

    q: [B, L, H, D]; k: [B, S, Hk, D], Hk dividing H; visible: bool [B, L, S]; sinks: [H], a logit per head that
    takes its share of the softmax and gives nothing. Returns [B, H, L, S].
    """
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = at_least_float32(torch.einsum("blhd,bshd->bhls", q, k)) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """Values averaged by :func:`attention_probs`. v: [B, S, Hk, Dv]. Returns [B, L, H, Dv]."""
    probs = attention_probs(q, k, visible, scale, sinks)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhls,bshd->blhd", probs.to(v.dtype), v)


def attention_mass(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """:func:`attention_probs` summed over the heads, without a gradient; 0 for a query that sees nothing: [B, L, S]."""
    with torch.no_grad():
        alone = visible | ~visible.any(-1, keepdim=True)
        return attention_probs(q, k, alone, scale).sum(1).masked_fill(~visible, 0)


def latent_attention(
    q: Tensor,
    q_rope: Tensor,
    expansions: Tensor,
    entries: Tensor,
    pages: Tensor,
    valid: Tensor,
    scale: float,
    indices: Tensor | None = None,
) -> Tensor:
    """Multi-head latent attention of one query a sequence over cached pages, ``W_UK`` folded into the query and
    ``W_UV`` into the output (arXiv 2405.04434, section 2.1).

    q: [B, H, n]; q_rope: [B, H, dr]; expansions: [H, n + v, R], rows of ``W_UK`` before those of ``W_UV``; entries:
    [P, page_size, row_width of (R, dr)], latent and rotary key of each position of a page, rows of any format; pages:
    int64 [B, m], those of each sequence; valid: bool [B, K], which of the positions with these ``indices`` (int64
    [B, K]; None: the first K) count, of which there must be one. Returns [B, H, v].
    """
    if indices is None:
        indices = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    size = entries.shape[1]
    rows = entries[pages.gather(1, indices // size), indices % size]
    seen = decode_rows(rows, [expansions.shape[-1], q_rope.shape[-1]]).to(q.dtype)  # [B, K, R + dr]
    w_uk, w_uv = expansions.to(q.dtype).split([q.shape[-1], expansions.shape[1] - q.shape[-1]], dim=1)
    folded = torch.cat([torch.einsum("bhn,hnr->bhr", q, w_uk), q_rope], dim=-1)
    scores = at_least_float32(torch.einsum("bhe,bke->bhk", folded, seen)) * scale
    probs = scores.masked_fill(~valid[:, None], -torch.inf).softmax(-1).to(q.dtype)
    latents = torch.einsum("bhk,bkr->bhr", probs, seen[..., : expansions.shape[-1]])
    return torch.einsum("bhr,hvr->bhv", latents, w_uv)
