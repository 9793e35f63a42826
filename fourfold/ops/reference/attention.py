"""Softmax attention over visible keys, and the absorbed latent form over gathered ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops.reference.norm import at_least_float32


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


def sparse_mla(
    q_latent: Tensor, q_rope: Tensor, entries: Tensor, indices: Tensor, valid: Tensor, scale: float
) -> Tensor:
    """Absorbed multi-head latent attention over the selected entries alone (arXiv 2405.04434, section 2.1).

    q_latent: [B, L, H, R], queries in latent space; q_rope: [B, L, H, dr]; entries: [B, S, R + dr],
    latent and rotary key of each cached position; indices: int64 [B, L, K]; valid: bool [B, L, K].
    Returns the attended latents [B, L, H, R].
    """
    batch = torch.arange(len(entries), device=entries.device)[:, None, None]
    gathered = entries[batch, indices]  # [B, L, K, R + dr]
    q = torch.cat([q_latent, q_rope], dim=-1)
    scores = at_least_float32(torch.einsum("blhe,blke->blhk", q, gathered)) * scale
    probs = scores.masked_fill(~valid[:, :, None], -torch.inf).softmax(-1)
    latents = gathered[..., : q_latent.shape[-1]]
    return torch.einsum("blhk,blkr->blhr", probs.to(latents.dtype), latents)
