"""Grouped-query attention: the plain transformer's (arXiv 2305.13245)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.context import Context, join
from fourfold.model.linear import Linear


class GQA(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        a = cfg.attention
        self.cfg, self.scale = a, a.head_dim**-0.5 * ops.yarn_mscale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2
        self.slot = f"layers.{layer}.kv"
        self.q_proj = Linear(cfg.hidden_size, a.num_attention_heads * a.head_dim, bias=a.qkv_bias)
        self.k_proj = Linear(cfg.hidden_size, a.num_key_value_heads * a.head_dim, bias=a.qkv_bias)
        self.v_proj = Linear(cfg.hidden_size, a.num_key_value_heads * a.head_dim, bias=a.qkv_bias)
        self.o_proj = Linear(a.num_attention_heads * a.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x: [T, d], normalised. Returns [T, d]."""
        dim = self.cfg.head_dim
        q = ops.apply_rope(self.q_proj(x).unflatten(-1, (-1, dim)), ctx.rotary.cos, ctx.rotary.sin, interleaved=False)
        k = ops.apply_rope(self.k_proj(x).unflatten(-1, (-1, dim)), ctx.rotary.cos, ctx.rotary.sin, interleaved=False)
        entries = torch.cat([k, self.v_proj(x).unflatten(-1, (-1, dim))], dim=1).flatten(1)
        if ctx.cache is not None:
            ctx.cache.write(self.slot, entries)
        parts = []
        for window in ctx.windows:
            kv = window.take(entries)
            if ctx.cache is not None and window.sequences is not None:
                kv = ctx.cache.read(self.slot, window.sequences, window.length)
                kv = kv.to(entries.dtype)
            keys, values = kv.unflatten(-1, (-1, dim)).chunk(2, dim=2)
            parts.append(ops.attention(window.take(q), keys, values, window.visible, self.scale))
        return self.o_proj(join(ctx.windows, parts).flatten(1))
