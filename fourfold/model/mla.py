"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), dense or sparse.

Two forms of one function: ``naive`` expands keys and values for every head (training, prefill), ``absorbed``
folds the expansions into the query and the output and attends in latent space (decode). Both read and write
the same cache entry: the normalised latent and one rotary key for all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.cache import attention_width
from fourfold.model.context import Context, Window, join, nearest
from fourfold.model.indexer import Indexer, index_loss, index_recall, two_level_loss
from fourfold.model.linear import Linear
from fourfold.model.norm import RMSNorm
from fourfold.model.sequence import IGNORE

ABSORB_BELOW = 8  # queries per sequence; expanding all cached keys for fewer costs more than it saves


def gather_above(cfg: ModelConfig) -> float:
    """Cached keys from which attending to the selected latents alone costs less than to all expanded keys, masked."""
    a = cfg.attention
    gathered = cfg.indexer.topk * (2 * a.kv_lora_rank + a.qk_rope_head_dim)
    return gathered / (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)


class MLA(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int, indexer: Indexer | None) -> None:
        super().__init__()
        a = cfg.attention
        self.cfg, self.mode, self.topk = a, cfg.indexer.mode, cfg.indexer.topk
        self.layer, self.slot, self.gather_above = layer, f"layers.{layer}.kv", gather_above(cfg)
        self.keeps_near = cfg.indexer.keeps_near(layer)
        self.heads, self.query_dim = a.num_attention_heads, a.qk_nope_head_dim + a.qk_rope_head_dim
        self.scale = self.query_dim**-0.5 * ops.yarn_mscale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2
        if a.q_lora_rank:
            self.q_a_proj = Linear(cfg.hidden_size, a.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, cfg.rms_norm_eps)
            self.q_b_proj = Linear(a.q_lora_rank, self.heads * self.query_dim, bias=False)
        else:
            self.q_proj = Linear(cfg.hidden_size, self.heads * self.query_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(cfg.hidden_size, attention_width(cfg), bias=False)
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank, cfg.rms_norm_eps)
        self.kv_b_proj = Linear(a.kv_lora_rank, self.heads * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        self.o_proj = Linear(self.heads * a.v_head_dim, cfg.hidden_size, bias=False)
        self.indexer = indexer

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x: [T, d], normalised. Returns [T, d]."""
        a = self.cfg
        q_latent = self.q_a_layernorm(self.q_a_proj(x)) if a.q_lora_rank else x
        q = (self.q_b_proj if a.q_lora_rank else self.q_proj)(q_latent).unflatten(-1, (self.heads, self.query_dim))
        q_nope, q_rope = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        q_rope = ops.apply_rope(q_rope, ctx.rotary.cos, ctx.rotary.sin)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        entries = torch.cat(
            [self.kv_a_layernorm(latent), ops.apply_rope(k_rope, ctx.rotary.cos, ctx.rotary.sin)], dim=-1
        )

        if self.keeps_near:
            ctx.selection = nearest(ctx, self.topk)
        elif self.indexer is not None and self.mode != "dense":
            ctx.selection = self.indexer(x, q_latent, ctx)
        if ctx.cache is not None:
            ctx.cache.write(self.slot, entries)

        parts = []
        for number, window in enumerate(ctx.windows):
            queries = window.take(q_nope), window.take(q_rope)
            if window.sequences is None or ctx.cache is None:
                parts.append(self.naive(*queries, window.take(entries), window, number, ctx))
            elif window.rows.shape[1] < ABSORB_BELOW or self._gathers(window, ctx):
                parts.append(self.absorbed(*queries, *ctx.cache.lie(self.slot, window.sequences), window, number, ctx))
            else:
                keys = ctx.cache.read(self.slot, window.sequences, window.length).to(entries.dtype)
                parts.append(self.naive(*queries, keys, window, number, ctx))
        return self.o_proj(join(ctx.windows, parts).flatten(1))

    def _selects(self, ctx: Context) -> bool:
        return (self.mode == "sparse" or self.keeps_near) and ctx.selection is not None

    def _chosen(self, window: Window, number: int, ctx: Context) -> Tensor:
        if not self._selects(ctx):
            return window.visible
        assert ctx.selection is not None
        return ctx.selection.mask(number, window)

    def _gathers(self, window: Window, ctx: Context) -> bool:
        return self._selects(ctx) and window.length > self.gather_above

    def naive(self, q_nope: Tensor, q_rope: Tensor, keys: Tensor, window: Window, number: int, ctx: Context) -> Tensor:
        """Keys and values expanded per head. q_*: [B, L, H, *]; keys: [B, S, R + dr]. Returns [B, L, H, dv]."""
        a = self.cfg
        latent, k_rope = keys.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        k_nope, v = (
            self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)
        )
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, self.heads, -1)], dim=-1)
        chosen = self._chosen(window, number, ctx)
        if ctx.probe is not None:
            ctx.probe.selected.setdefault(self.layer, []).append(chosen.detach())
        if self.training and self.mode in ("warmup", "sparse") and ctx.selection is not None and ctx.selection.scores:
            target = ops.attention_mass(q, k, chosen, self.scale)
            crowd = (window.take(ctx.packed.positions) + 1) / window.visible.sum(-1)
            scores = ctx.selection.scores[number]
            if not ctx.selection.block_scores:
                ctx.index_losses.append(index_loss(target, scores, chosen, crowd))
            elif self.indexer is not None:  # the layer that looks up; those that share its choice make do with it
                blocks, learnt = ctx.selection.block_scores[number], window.take(ctx.packed.targets) != IGNORE
                ctx.index_losses.append(two_level_loss(target, scores, blocks, window.visible, crowd, learnt))
            if self.mode == "warmup":  # later the attention itself sees nothing but the selection
                ctx.index_recalls.append(index_recall(target, ctx.selection.chosen[number]))
        return ops.attention(q, k, v, chosen, self.scale)

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, pages: Tensor, window: Window, number: int, ctx: Context
    ) -> Tensor:
        """The same in latent space: ``W_UK`` goes into the query, ``W_UV`` into the output; reads chosen keys alone.

        entries: [P, page_size, R + dr]; pages: int64 [B, m].
        """
        if ctx.probe is not None:
            ctx.probe.selected.setdefault(self.layer, []).append(self._chosen(window, number, ctx))
        if self._selects(ctx) and self.topk < window.length:
            assert ctx.selection is not None
            positions = ctx.selection.kept(number, self.topk).flatten(0, 1)
            valid, indices = positions >= 0, positions.clamp_min(0)
        else:
            valid, indices = self._chosen(window, number, ctx).flatten(0, 1), None
        batch, length = window.rows.shape
        expansions = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        pages = pages[:, None].expand(-1, length, -1).flatten(0, 1)
        if ctx.cache is not None:
            ctx.cache.expect(self.slot, pages, valid, indices)
        out = ops.latent_attention(
            q_nope.flatten(0, 1), q_rope.flatten(0, 1), expansions, entries, pages, valid, self.scale, indices
        )
        return out.unflatten(0, (batch, length))
