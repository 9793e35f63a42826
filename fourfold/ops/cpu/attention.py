"""Attention by torch's fused kernel, which never holds the [L, S] probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """See :func:`fourfold.ops.reference.attention`."""
    narrow = v.shape[-1]
    if sinks is not None:
        q, k, v, visible = with_sink_key(q, k, v, visible, sinks / scale)
    if v.shape[-1] < q.shape[-1]:  # the fused kernel wants one head dimension
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=True,
    )
    return o.transpose(1, 2)[..., :narrow]


def with_sink_key(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same attention without sinks: one more key, which only one more dimension reads, and whose value is zero.

    There each head's query holds its sink [H], divided by the scale, and the new key one; all other keys hold zero.
    """
    q = torch.cat([q, sinks.to(q.dtype)[:, None].expand(*q.shape[:-1], 1)], dim=-1)
    k = F.pad(k, (0, 1))
    one = F.pad(torch.zeros_like(k[:, :1, :, 1:]), (0, 1), value=1)
    return q, torch.cat([k, one], dim=1), F.pad(v, (0, 0, 0, 0, 0, 1)), F.pad(visible, (0, 1), value=True)
