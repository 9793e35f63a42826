"""Lightning indexer: which earlier positions a query should attend to (DeepSeek-V3.2, section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import IndexerConfig, ModelConfig
from fourfold.model.cache import Cache
from fourfold.model.compressor import Compressor, gather_entries, store_entries
from fourfold.model.context import Context, Selection, Window, chosen_mask


class Indexer(nn.Module):
    """Scores every visible key with a few small heads and keeps the ``topk`` best.

    It learns from its own KL loss alone: its inputs are detached from the trunk.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        index, attention = cfg.indexer, cfg.attention
        query_width = attention.q_lora_rank or cfg.hidden_size
        self.cfg, self.layer, self.rope_dim = index, layer, attention.qk_rope_head_dim
        self.slot, self.summaries = f"layers.{layer}.index", f"layers.{layer}.summary"
        self.wq_b = nn.Linear(query_width, index.n_heads * index.head_dim, bias=False)
        self.wk = nn.Linear(cfg.hidden_size, index.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(index.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(cfg.hidden_size, index.n_heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Selection:
        """x: [T, d]; q_latent: [T, q_lora_rank], the normalised query latent. Float32 from the projections on."""
        with ops.float32_island(x):
            return self._select(x.detach(), q_latent.detach(), ctx)

    def _select(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Selection:
        q, weights = index_queries(x, q_latent, self.wq_b, self.weights_proj, self.cfg)
        q = self._rotate(q, ctx)
        norm = self.k_norm
        k = ops.wide_linear(x, self.wk.weight)
        k = F.layer_norm(k, norm.normalized_shape, norm.weight.to(k.dtype), norm.bias.to(k.dtype), norm.eps)
        k = self._rotate(k, ctx)
        if ctx.cache is not None:
            ctx.cache.write(self.slot, k)
        selection = Selection([], [])
        for window in ctx.windows:
            if ctx.cache is not None and window.sequences is not None:
                found = self._select_cached(q[window.rows], weights[window.rows], window, window.sequences, ctx)
                selection.positions.append(found)
                continue
            keys, visible = k[window.rows], window.visible
            scores = ops.index_scores(q[window.rows], keys, weights[window.rows])
            size, blocks = self.cfg.block_size, self.cfg.candidate_blocks
            if blocks and self.training:
                means = ops.block_means(keys, size)
                selection.block_scores.append(ops.index_scores(q[window.rows], means, weights[window.rows]))
            if blocks and window.ids is None and window.length > blocks * size:  # a packed row is never that long
                means = ops.block_means(keys.detach(), size)
                visible = visible & ops.candidate_keys(
                    q[window.rows], means, weights[window.rows], window.positions, size, blocks, window.length
                )
            selection.scores.append(scores)
            selection.chosen.append(ops.select_topk(scores.detach(), visible, self.cfg.topk))
        return selection

    def _select_cached(self, q: Tensor, weights: Tensor, window: Window, sequences: Tensor, ctx: Context) -> Tensor:
        """Positions among the cached keys, after the blocks that these queries have filled got their summaries."""
        cache = ctx.cache
        assert cache is not None
        keys, pages = cache.lie(self.slot, sequences)
        given = q, weights, keys, pages, window.past, self.cfg.topk
        if not self.cfg.candidate_blocks:
            return ops.select_positions(*given)
        size, queries = self.cfg.block_size, window.rows.shape[1]
        number = window.past[:, None] // size + torch.arange(-(-queries // size) + 1, device=q.device)
        row, column = ((number + 1) * size <= window.past[:, None] + queries).nonzero(as_tuple=True)
        filled = sequences[row], number[row, column]
        means = ops.block_means(cache.read_blocks(self.slot, *filled, size).float(), size)[:, 0]
        cache.write_entries(self.summaries, means, *filled)
        summaries, _ = cache.lie(self.summaries, sequences)
        found = ops.select_positions(*given, summaries, self.cfg.candidate_blocks)
        if ctx.probe is not None:
            ctx.probe.kept.setdefault(self.layer, []).append(shared_positions(found, ops.select_positions(*given)))
        return found

    def _rotate(self, x: Tensor, ctx: Context) -> Tensor:
        """Rotary positions on the first ``qk_rope_head_dim`` dimensions, half-split."""
        turned, rest = x.split([self.rope_dim, self.cfg.head_dim - self.rope_dim], dim=-1)
        return torch.cat([ops.apply_rope(turned, ctx.rotary.cos, ctx.rotary.sin, interleaved=False), rest], dim=-1)


class EntryIndexer(nn.Module):
    """The indexer over compressed entries, with a compressor of its own for its keys (DeepSeek-V4, section 2.3)."""

    def __init__(self, cfg: ModelConfig, layer: int, ratio: int) -> None:
        super().__init__()
        index = cfg.indexer
        self.cfg, self.ratio, self.slot = index, ratio, f"layers.{layer}.index"
        self.wq_b = nn.Linear(cfg.attention.q_lora_rank, index.n_heads * index.head_dim, bias=False)
        self.weights_proj = nn.Linear(cfg.hidden_size, index.n_heads, bias=False)
        self.compressor = Compressor(cfg, f"layers.{layer}.index_pool", ratio, index.head_dim, overlaps=True)

    def forward(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Selection:
        """x: [T, d]; q_latent: [T, q_lora_rank], the normalised query latent. Chooses among entries."""
        with ops.float32_island(x):
            x, q_latent = x.detach(), q_latent.detach()
            q, weights = index_queries(x, q_latent, self.wq_b, self.weights_proj, self.cfg)
            q = ctx.compress_rotary.turn(q)
            projected = self.compressor.project(x, ctx.packed.positions)
            selection = Selection([], [])
            for window in ctx.windows:
                entries = self.compressor(projected, window, ctx)
                values = ctx.compress_rotary.turn_at(entries.values, entries.numbers * self.ratio)
                if ctx.cache is not None and window.sequences is not None and not self.training:
                    store_entries(entries, values, self.slot, window.sequences, ctx.cache)
                    selection.chosen.append(self._select_cached(q, weights, window, window.sequences, ctx.cache))
                    continue
                keys = gather_entries(entries, values, self.slot, window, self.ratio, ctx)
                scores = ops.index_scores(window.take(q), keys, window.take(weights))
                selection.scores.append(scores)
                seen = window.entries(self.ratio)
                selection.chosen.append(ops.select_topk(scores.detach(), seen, self.cfg.topk))
            return selection

    def _select_cached(self, q: Tensor, weights: Tensor, window: Window, sequences: Tensor, cache: Cache) -> Tensor:
        """bool [B, L, n], chosen among the entries where they lie."""
        seen = window.entries(self.ratio)
        if seen.shape[-1] <= self.cfg.topk:
            return seen
        lying = cache.lie(self.slot, sequences)
        given = window.take(q), window.take(weights), *lying, window.past, self.cfg.topk
        return chosen_mask(ops.select_positions(*given, ratio=self.ratio), seen.shape[-1])


def shared_positions(found: Tensor, wanted: Tensor) -> Tensor:
    """float32 [B, L]: the share of the ``wanted`` positions that were ``found``. Both int64 [B, L, k], -1 is none."""
    shared = (found[..., None] == wanted[..., None, :]) & (wanted >= 0)[..., None, :]
    return shared.sum((-2, -1)) / (wanted >= 0).sum(-1)


def index_queries(
    x: Tensor, q_latent: Tensor, wq_b: nn.Linear, weights_proj: nn.Linear, cfg: IndexerConfig
) -> tuple[Tensor, Tensor]:
    """Queries [T, H, D] before their positions, and the weights [T, H] of the heads, in float32."""
    q = ops.wide_linear(q_latent, wq_b.weight).unflatten(-1, (cfg.n_heads, -1))
    weights = ops.wide_linear(x, weights_proj.weight) * (cfg.n_heads * cfg.head_dim) ** -0.5
    return q, weights


def index_target(probs: Tensor) -> Tensor:
    """What the indexer should predict: attention summed over heads, [B, H, L, S] -> [B, L, S], without gradient."""
    return probs.detach().sum(1)


def index_loss(target: Tensor, scores: Tensor, keys: Tensor, crowd: Tensor | None = None) -> Tensor:
    """KL(target || softmax of scores), both over ``keys`` alone, summed over queries (DeepSeek-V3.2, section 2.1).

    target, scores: [B, L, S]; keys: bool [B, L, S], all visible ones in the warm-up, the selected ones after; crowd:
    see :func:`stand_for_skipped`.
    """
    target = target.masked_fill(~keys, 0)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-12)
    predicted = stand_for_skipped(scores, target, keys, crowd).masked_fill(~keys, -1e30).log_softmax(-1)
    return (target * (target.clamp_min(1e-12).log() - predicted)).sum()


def block_loss(target: Tensor, scores: Tensor, visible: Tensor, size: int, crowd: Tensor | None = None) -> Tensor:
    """What makes summaries worth asking: the same divergence between attention and scores of whole blocks, both over
    the blocks that a query sees wholly, each query with the weight of the attention that falls on them.

    target: [B, L, S], attention summed over heads; scores: [B, L, S // size], of summaries; visible: bool [B, L, S].
    """
    blocks = scores.shape[-1]
    if not blocks:
        return scores.sum()
    mass, seen = (t[..., : blocks * size].unflatten(-1, (blocks, size)) for t in (target, visible))
    whole = seen.all(-1)
    mass = mass.sum(-1).masked_fill(~whole, 0) / target.sum(-1, keepdim=True).clamp_min(1e-12)
    share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)
    predicted = stand_for_skipped(scores, share, whole, crowd).masked_fill(~whole, -1e30).log_softmax(-1)
    return (mass * (share.clamp_min(1e-12).log() - predicted)).sum()


def stand_for_skipped(scores: Tensor, target: Tensor, keys: Tensor, crowd: Tensor | None) -> Tensor:
    """Scores as they count in the losses: where positions were skipped, each key with less attention than the mean
    counts as often as there are positions to a key, so that a few hundred keys ask for the margin that all would.

    crowd: [B, L], positions before and at a query over the keys that it sees; None: nothing was skipped.
    """
    if crowd is None:
        return scores
    minor = target * keys.sum(-1, keepdim=True) < 1
    return scores + torch.where(minor, crowd.log()[..., None], 0.0)


def index_recall(target: Tensor, chosen: Tensor) -> Tensor:
    """The share of the attention's mass that falls on the chosen keys, summed over queries."""
    return (target.masked_fill(~chosen, 0).sum(-1) / target.sum(-1).clamp_min(1e-12)).sum()
