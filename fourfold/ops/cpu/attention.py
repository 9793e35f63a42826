"""Attention by torch's fused kernel, which never holds the [L, S] probabilities."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fourfold.ops import reference


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """See :func:`fourfold.ops.reference.attention`."""
    if sinks is not None:  # the fused kernel knows no sink
        return reference.attention(q, k, v, visible, scale, sinks)
    narrow, width = v.shape[-1], q.shape[-1]
    if narrow < width:  # the fused kernel wants one head dimension
        v = F.pad(v, (0, width - narrow))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=True,
    )
    return o.transpose(1, 2)[..., :narrow]
