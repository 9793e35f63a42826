"""Compressed attention with entries and selections shared by layers (DeepSeek-V4.1).

Full layers pool entries and index keys and select among them; reindexing layers select anew among the same entries;
the others attend to what the latest selected. One layer may also name the blocks of entries, by their best scores,
that the selections after it are confined to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.compressed_attention import SharedKVAttention
from fourfold.model.compressor import Compressor, gather_entries
from fourfold.model.context import Context, Selection, SharedEntries, join
from fourfold.model.indexer import index_queries
from fourfold.model.linear import Linear
from fourfold.model.norm import RMSNorm


class SharedIndexer(nn.Module):
    """Selects among shared entries. A source of entries also makes the index keys, of the entries as pooled."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        a, index = cfg.attention, cfg.indexer
        self.cfg, self.attention, self.layer = index, a, layer
        self.wq_b = Linear(a.q_lora_rank, index.n_heads * index.head_dim, bias=False)
        self.weights_proj = Linear(cfg.hidden_size, index.n_heads, bias=False)
        if layer in a.kv_source_layer_ids:
            self.wk = Linear(a.head_dim, index.head_dim, bias=False)
            self.k_norm = RMSNorm(index.head_dim, cfg.rms_norm_eps)

    def keys(self, latents: Tensor, positions: Tensor, ctx: Context) -> Tensor:
        """Index keys float32 [..., D] of ``latents`` [..., head_dim], turned by ``positions`` [...]."""
        with ops.float32_island(latents):
            wide = ops.at_least_float32(latents.detach())
            return ctx.compress_rotary.turn_at(self.k_norm(F.linear(wide, self.wk.weight.to(wide.dtype))), positions)

    def forward(self, x: Tensor, q_latent: Tensor, shared: SharedEntries, ctx: Context) -> Selection:
        """x: [T, d]; q_latent: [T, q_lora_rank], the normalised query latent. May name candidates in ``shared``."""
        a, selection = self.attention, Selection([], [])
        candidates: list[Tensor] = []
        with ops.float32_island(x):
            q, weights = index_queries(x.detach(), q_latent.detach(), self.wq_b, self.weights_proj, self.cfg)
            q = ctx.compress_rotary.turn(q)
            for number, window in enumerate(ctx.windows):
                scores = ops.index_scores(window.take(q), shared.keys[number], window.take(weights))
                seen = window.entries(a.compress_ratios[self.layer])
                selection.scores.append(scores)
                allowed = seen & shared.candidates[number] if shared.candidates else seen
                selection.chosen.append(ops.select_topk(scores.detach(), allowed, self.cfg.topk))
                if self.layer == a.candidate_source_layer_id:
                    blocks = a.candidate_topk_blocks, a.candidate_block_size
                    candidates.append(candidate_entries(scores.detach(), seen, *blocks))
        shared.candidates = candidates or shared.candidates
        return selection


def candidate_entries(scores: Tensor, visible: Tensor, blocks: int, size: int) -> Tensor:
    """The entries of the ``blocks`` best blocks of ``size`` neighbours, each as good as its best visible entry.

    The block of the newest visible entry is always among them; of equal ones the most recent wins.
    scores: [B, L, n]; visible: bool [B, L, n]. Returns bool [B, L, n].
    """
    n = scores.shape[-1]
    count = -(-n // size)
    shape = (*scores.shape[:-1], count, size)
    best = F.pad(scores.masked_fill(~visible, -torch.inf), (0, count * size - n), value=-torch.inf).view(shape).amax(-1)
    inside = F.pad(visible, (0, count * size - n)).view(shape).any(-1)
    newest = (visible.sum(-1, keepdim=True) - 1).div(size, rounding_mode="floor")
    best = best.masked_fill(torch.arange(count, device=scores.device) == newest, torch.inf)
    return ops.select_topk(best, inside, blocks).repeat_interleave(size, dim=-1)[..., :n] & visible


class CSA2(SharedKVAttention):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        a = cfg.attention
        self.compressor = self.indexer = None
        if layer in a.kv_source_layer_ids:
            self.compressor = Compressor(cfg, f"layers.{layer}.pool", self.ratio, a.head_dim, biased=False)
        if layer in a.index_source_layer_ids and self.mode != "off":
            self.indexer = SharedIndexer(cfg, layer)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x: [T, d], normalised. Returns [T, d]."""
        rotary = ctx.compress_rotary if self.ratio else ctx.rotary
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = rotary.turn(self.q_b_proj(q_latent).unflatten(-1, (self.heads, -1)))
        kv = rotary.turn(self.kv_layernorm(self.kv_proj(x)))
        if self.compressor is not None:
            ctx.shared = self._pool(x, ctx)
        if self.indexer is not None and self.mode != "dense":
            assert ctx.shared is not None
            ctx.selection = self.indexer(x, q_latent, ctx.shared, ctx)
        parts = []
        for number, window in enumerate(ctx.windows):
            q_rows = window.take(q)
            keys, visible = self.window_keys(kv, window, ctx)
            if self.ratio and ctx.shared is not None:
                older, seen = ctx.shared.values[number], window.entries(self.ratio)
                if ctx.selection is not None:
                    seen = self.selected(q_rows, older, seen, ctx.selection, number, ctx)
                keys, visible = torch.cat([keys, older], dim=1), torch.cat([visible, seen], dim=-1)
            parts.append(self.attend(q_rows, keys, visible))
        return self.grouped_output(rotary.turn(join(ctx.windows, parts), back=True))

    def _pool(self, x: Tensor, ctx: Context) -> SharedEntries:
        """Entries and index keys for this layer and those after it."""
        assert self.compressor is not None
        shared, at = SharedEntries([], []), f"layers.{self.layer}"
        projected = self.compressor.project(x, ctx.packed.positions)
        for window in ctx.windows:
            entries = self.compressor(projected, window, ctx)
            positions = entries.numbers * self.ratio
            values = ctx.compress_rotary.turn_at(entries.values, positions).to(x.dtype)
            shared.values.append(gather_entries(entries, values, f"{at}.kv", window, self.ratio, ctx))
            if self.indexer is not None:
                keys = self.indexer.keys(entries.values, positions, ctx)
                shared.keys.append(gather_entries(entries, keys, f"{at}.index", window, self.ratio, ctx))
        return shared
