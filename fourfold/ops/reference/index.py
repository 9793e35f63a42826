"""The lightning indexer's score and its selection (DeepSeek-V3.2, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops.reference.norm import at_least_float32


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """``I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])`` in float32.

    q: [B, L, H, D]; k: [B, S, D]; weights: [B, L, H]. Returns [B, L, S].
    """
    q, k, weights = at_least_float32(q), at_least_float32(k), at_least_float32(weights)
    return torch.einsum("blhs,blh->bls", torch.einsum("blhd,bsd->blhs", q, k).relu(), weights)


def select_topk(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k visible keys with the largest scores; of equal scores the most recent key wins.

    The rule makes prefill, chunked prefill and decode choose alike: relu gives many exact zeros.
    scores: [B, L, S]; visible: bool [B, L, S]. Returns bool [B, L, S] with at most k true per query.
    """
    newest_first = scores.masked_fill(~visible, -torch.inf).flip(-1)
    order = newest_first.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = torch.zeros_like(visible).scatter(-1, scores.shape[-1] - 1 - order, True)
    return chosen & visible
