"""Top-k selection without sorting all keys."""

from __future__ import annotations

import torch
from torch import Tensor


def select_topk(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """See :func:`fourfold.ops.reference.select_topk`: everything above the k-th score, then the newest of its ties."""
    if scores.shape[-1] <= k:
        return visible
    scores = scores.masked_fill(~visible, -torch.inf)
    threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > threshold, scores == threshold
    newer_ties = tied.flip(-1).cumsum(-1).flip(-1)
    return (above | (tied & (newer_ties <= k - above.sum(-1, keepdim=True)))) & visible
