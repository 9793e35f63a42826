"""Attention over a window and over compressed entries of everything older (DeepSeek-V4, arXiv 2606.19348, section 2.3).

One vector per position is key and value of all heads. A layer of ratio 0 sees the window alone; CSA (a small ratio,
overlapping groups) also the entries that its indexer selects; HCA (a large ratio) also all entries. Each head has a
sink, and the output is turned back by the query's position, so that only distances remain.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.compressor import Compressor, gather_entries
from fourfold.model.context import Context, Selection, Window, join
from fourfold.model.indexer import EntryIndexer, index_loss, index_recall
from fourfold.model.linear import Linear
from fourfold.model.norm import RMSNorm


class SharedKVAttention(nn.Module):
    """What compressed attention of every kind is made of: queries, window, sinks, grouped output."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        a = cfg.attention
        self.cfg, self.layer, self.eps, self.mode = a, layer, cfg.rms_norm_eps, cfg.indexer.mode
        self.ratio = a.compress_ratios[layer] if layer < len(a.compress_ratios) else 0
        self.heads, self.scale = a.num_attention_heads, a.head_dim**-0.5
        per_group = self.heads * a.head_dim // a.o_groups
        self.q_a_proj = Linear(cfg.hidden_size, a.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(a.q_lora_rank, cfg.rms_norm_eps)
        self.q_b_proj = Linear(a.q_lora_rank, self.heads * a.head_dim, bias=False)
        self.kv_proj = Linear(cfg.hidden_size, a.head_dim, bias=False)
        self.kv_layernorm = RMSNorm(a.head_dim, cfg.rms_norm_eps)
        self.o_a_proj = Linear(per_group, a.o_groups * a.o_lora_rank, bias=False)
        self.o_b_proj = Linear(a.o_groups * a.o_lora_rank, cfg.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.zeros(self.heads))

    def window_keys(self, kv: Tensor, window: Window, ctx: Context) -> tuple[Tensor, Tensor]:
        """The last ``sliding_window`` positions of each query: keys [B, W + L, D], visible bool [B, L, W + L].

        kv: [T, D]. W is 0 without a cache, else as much of the tail as the longest past fills.
        """
        keys, kept = window.take(kv), 0
        if ctx.cache is not None and window.sequences is not None:
            name = f"layers.{self.layer}.window"
            before = ctx.cache.tail(name, window.sequences).to(keys.dtype)
            rows = before.shape[1]
            kept = min(rows, window.length - keys.shape[1])
            both = torch.cat([before, keys], dim=1)
            ctx.cache.keep(name, window.sequences, both[:, both.shape[1] - rows :])
            keys = both[:, rows - kept :]
        return keys, window.recent(kept, self.cfg.sliding_window)

    def attend(self, q: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """q: [B, L, H, D]; keys: [B, S, D], values too. Returns [B, L, H, D]."""
        shared = keys[:, :, None]
        out: Tensor = ops.attention(q, shared, shared, visible, self.scale, self.sinks)
        return out

    def selected(
        self, q: Tensor, entries: Tensor, seen: Tensor, selection: Selection, number: int, ctx: Context
    ) -> Tensor:
        """bool [B, L, n]: which of the ``seen`` entries are attended. While training, teaches the indexer.

        q: [B, L, H, D]; entries: [B, n, D].
        """
        chosen, sparse = selection.chosen[number], self.mode == "sparse"
        if ctx.probe is not None:
            ctx.probe.selected.setdefault(self.layer, []).append(chosen.detach())
        keys = chosen if sparse else seen
        if self.training and keys.shape[-1]:
            target = ops.attention_mass(q, entries[:, :, None], keys, self.scale)
            ctx.index_losses.append(index_loss(target, selection.scores[number], keys))
            if not sparse:
                ctx.index_recalls.append(index_recall(target, chosen))
        return keys

    def grouped_output(self, o: Tensor) -> Tensor:
        """o: [T, H, D], turned back. Each group of heads has a projection of its own. Returns [T, d]."""
        groups = o.flatten(1).unflatten(-1, (self.cfg.o_groups, -1))
        weight = self.o_a_proj.weight.unflatten(0, (self.cfg.o_groups, -1))
        return self.o_b_proj(torch.einsum("tgi,goi->tgo", groups, weight).flatten(1))


class CompressedAttention(SharedKVAttention):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        a = cfg.attention
        self.compressor = self.indexer = None
        if self.ratio:
            overlaps = self.ratio == a.csa_ratio
            self.compressor = Compressor(cfg, f"layers.{layer}.pool", self.ratio, a.head_dim, overlaps)
            if overlaps and self.mode != "off":
                self.indexer = EntryIndexer(cfg, layer, self.ratio)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x: [T, d], normalised. Returns [T, d]."""
        rotary = ctx.compress_rotary if self.ratio else ctx.rotary
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, -1))
        q = rotary.turn(ops.rms_norm(q, None, self.eps))
        kv = rotary.turn(self.kv_layernorm(self.kv_proj(x)))
        projected = self.compressor.project(x, ctx.packed.positions) if self.compressor is not None else None
        selection = self.indexer(x, q_latent, ctx) if self.indexer is not None and self.mode != "dense" else None
        parts = []
        for number, window in enumerate(ctx.windows):
            q_rows = window.take(q)
            keys, visible = self.window_keys(kv, window, ctx)
            if self.compressor is not None and projected is not None:
                entries = self.compressor(projected, window, ctx)
                values = rotary.turn_at(entries.values, entries.numbers * self.ratio).to(kv.dtype)
                older = gather_entries(entries, values, f"layers.{self.layer}.kv", window, self.ratio, ctx)
                seen = window.entries(self.ratio)
                if selection is not None:
                    seen = self.selected(q_rows, older, seen, selection, number, ctx)
                keys, visible = torch.cat([keys, older], dim=1), torch.cat([visible, seen], dim=-1)
            parts.append(self.attend(q_rows, keys, visible))
        return self.grouped_output(rotary.turn(join(ctx.windows, parts), back=True))
