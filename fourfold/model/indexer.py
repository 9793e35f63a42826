"""Lightning indexer: which earlier positions a query should attend to (DeepSeek-V3.2, section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.context import Context, Selection


class Indexer(nn.Module):
    """Scores every visible key with a few small heads and keeps the ``topk`` best.

    It learns from its own KL loss alone: its inputs are detached from the trunk.
    """

    def __init__(self, cfg: ModelConfig, cache_offset: int) -> None:
        super().__init__()
        index, attention = cfg.indexer, cfg.attention
        query_width = attention.q_lora_rank or cfg.hidden_size
        self.cfg, self.rope_dim, self.cache_offset = index, attention.qk_rope_head_dim, cache_offset
        self.wq_b = nn.Linear(query_width, index.n_heads * index.head_dim, bias=False)
        self.wk = nn.Linear(cfg.hidden_size, index.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(index.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(cfg.hidden_size, index.n_heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Selection:
        """x: [T, d]; q_latent: [T, q_lora_rank], the normalised query latent. Float32 from the projections on."""
        with ops.float32_island(x):
            return self._select(x.detach(), q_latent.detach(), ctx)

    def _select(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Selection:
        wide = ops.at_least_float32(x)
        q = F.linear(ops.at_least_float32(q_latent), self.wq_b.weight.to(wide.dtype))
        q = self._rotate(q.unflatten(-1, (self.cfg.n_heads, -1)), ctx)
        norm = self.k_norm
        k = F.linear(wide, self.wk.weight.to(wide.dtype))
        k = F.layer_norm(k, norm.normalized_shape, norm.weight.to(k.dtype), norm.bias.to(k.dtype), norm.eps)
        k = self._rotate(k, ctx)
        scale = (self.cfg.n_heads * self.cfg.head_dim) ** -0.5
        weights = F.linear(wide, self.weights_proj.weight.to(wide.dtype)) * scale
        if ctx.cache is not None:
            ctx.cache.write(self.cache_offset, k)
        selection = Selection([], [])
        for window in ctx.windows:
            keys = k[window.rows]
            if ctx.cache is not None and window.sequences is not None:
                keys = ctx.cache.read(window.sequences, window.visible.shape[-1], self.cache_offset, self.cfg.head_dim)
            scores = ops.index_scores(q[window.rows], keys, weights[window.rows])
            selection.scores.append(scores)
            selection.chosen.append(ops.select_topk(scores.detach(), window.visible, self.cfg.topk))
        return selection

    def _rotate(self, x: Tensor, ctx: Context) -> Tensor:
        """Rotary positions on the first ``qk_rope_head_dim`` dimensions, half-split."""
        turned, rest = x.split([self.rope_dim, self.cfg.head_dim - self.rope_dim], dim=-1)
        return torch.cat([ops.apply_rope(turned, ctx.cos, ctx.sin, interleaved=False), rest], dim=-1)


def index_target(probs: Tensor) -> Tensor:
    """What the indexer should predict: attention summed over heads, [B, H, L, S] -> [B, L, S], without gradient."""
    return probs.detach().sum(1)


def index_loss(target: Tensor, scores: Tensor, keys: Tensor) -> Tensor:
    """KL(target || softmax of scores), both over ``keys`` alone, mean per query (DeepSeek-V3.2, section 2.1).

    target, scores: [B, L, S]; keys: bool [B, L, S], all visible ones in the warm-up, the selected ones after.
    """
    target = target.masked_fill(~keys, 0)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-12)
    predicted = scores.masked_fill(~keys, -1e30).log_softmax(-1)
    return (target * (target.clamp_min(1e-12).log() - predicted)).sum(-1).mean()


def index_recall(target: Tensor, chosen: Tensor) -> Tensor:
    """The share of the attention's mass that falls on the chosen keys, mean per query."""
    return (target.masked_fill(~chosen, 0).sum(-1) / target.sum(-1).clamp_min(1e-12)).mean()
