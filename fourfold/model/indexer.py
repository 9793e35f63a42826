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

# What an indexer of two levels learns by, found by trial: of the attention, keys with less than this share of it are
# nobody's need; the price of a score that nobody needs; and how much of a head that is closed to a key leaks through
# while it learns, so that it can open.
PEAK, IDLE_PRICE, LEAK = 1 / 32, 1.0, 0.1


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
        if index.candidate_blocks:  # blocks are asked for by queries of their own
            self.block_wq_b = nn.Linear(query_width, index.n_heads * index.head_dim, bias=False)
            self.block_weights_proj = nn.Linear(cfg.hidden_size, index.n_heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Selection:
        """x: [T, d]; q_latent: [T, q_lora_rank], the normalised query latent. Float32 from the projections on."""
        with ops.float32_island(x):
            return self._select(x.detach(), q_latent.detach(), ctx)

    def _select(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Selection:
        q, weights = index_queries(x, q_latent, self.wq_b, self.weights_proj, self.cfg)
        q = self._rotate(q, ctx)
        if self.cfg.candidate_blocks:
            block_q, block_weights = index_queries(x, q_latent, self.block_wq_b, self.block_weights_proj, self.cfg)
            block_q = self._rotate(block_q, ctx)
        norm = self.k_norm
        k = ops.wide_linear(x, self.wk.weight)
        k = F.layer_norm(k, norm.normalized_shape, norm.weight.to(k.dtype), norm.bias.to(k.dtype), norm.eps)
        k = self._rotate(k, ctx)
        if ctx.cache is not None:
            ctx.cache.write(self.slot, k)
        selection = Selection([], [])
        for window in ctx.windows:
            if ctx.cache is not None and window.sequences is not None:
                level = (block_q[window.rows], block_weights[window.rows]) if self.cfg.candidate_blocks else ()
                given = q[window.rows], weights[window.rows], *level
                selection.positions.append(self._select_cached(given, window, window.sequences, ctx))
                continue
            keys, visible = k[window.rows], window.visible
            scores = ops.index_scores(q[window.rows], keys, weights[window.rows])
            best = scores.detach().clamp_min(self.cfg.floor)
            if self.cfg.candidate_blocks:
                size, blocks = self.cfg.block_size, self.cfg.candidate_blocks
                asked, worth = block_q[window.rows], block_weights[window.rows]
                summaries = ops.block_summaries(keys, size)
                if window.ids is None and window.length > blocks * size:  # a packed row is never that long
                    with torch.no_grad():
                        bounds = window.positions, size, blocks, window.length, self.cfg.topk
                        visible = visible & ops.candidate_keys(asked, summaries, worth, *bounds)
                if self.training:
                    scores = leaky(scores, q[window.rows], keys, weights[window.rows])
                    block_scores = ops.index_scores(asked, summaries, worth)
                    selection.block_scores.append(leaky(block_scores, asked, summaries, worth))
            selection.scores.append(scores)
            selection.chosen.append(ops.select_topk(best, visible, self.cfg.topk))
        return selection

    def _select_cached(self, given: tuple[Tensor, ...], window: Window, sequences: Tensor, ctx: Context) -> Tensor:
        """Positions among the cached keys, after the blocks that these queries have filled got their summaries.

        given: queries and weights for keys and, in two levels, for blocks.
        """
        cache = ctx.cache
        assert cache is not None
        q, weights, *level = given
        asked = q, weights, *cache.lie(self.slot, sequences), window.past, self.cfg.topk
        if not level:
            return ops.select_positions(*asked)
        size, queries, floor = self.cfg.block_size, window.rows.shape[1], self.cfg.floor
        number = window.past[:, None] // size + torch.arange(-(-queries // size) + 1, device=q.device)
        row, column = ((number + 1) * size <= window.past[:, None] + queries).nonzero(as_tuple=True)
        filled = sequences[row], number[row, column]
        keys = cache.read_blocks(self.slot, *filled, size).float()
        cache.write_entries(self.summaries, ops.block_summaries(keys, size)[:, 0], *filled)
        summaries, _ = cache.lie(self.summaries, sequences)
        found = ops.select_positions(*asked, summaries, *level, self.cfg.candidate_blocks, floor=floor)
        if ctx.probe is not None:
            flat = ops.select_positions(*asked, floor=floor)
            ctx.probe.kept.setdefault(self.layer, []).append(shared_positions(found, flat))
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


def leaky(scores: Tensor, q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Scores by :func:`fourfold.ops.index_scores` as with a relu that leaks: to learn by, not to choose by."""
    through = (q * weights[..., None]).sum(-2) @ keys.transpose(-1, -2)
    return (1 - LEAK) * scores + LEAK * through


def index_target(probs: Tensor) -> Tensor:
    """What the indexer should predict: attention summed over heads, [B, H, L, S] -> [B, L, S], without gradient."""
    return probs.detach().sum(1)


def index_loss(target: Tensor, scores: Tensor, keys: Tensor, crowd: Tensor | None = None) -> Tensor:
    """KL(target || softmax of scores), both over ``keys`` alone, summed over queries (DeepSeek-V3.2, section 2.1).

    Where positions were skipped, a key with less attention than the mean counts as often as there are positions to a
    key, so that a few hundred keys ask for the margin that all would.

    target, scores: [B, L, S]; keys: bool [B, L, S], all visible ones in the warm-up, the selected ones after; crowd:
    [B, L], positions before and at a query over the keys that it sees; None: nothing was skipped.
    """
    target = shares(target, keys)
    if crowd is not None:
        scores = stand_for_skipped(scores, target, keys, crowd)
    return divergence(target, scores, keys).sum()


def two_level_loss(
    target: Tensor, scores: Tensor, blocks: Tensor, visible: Tensor, crowd: Tensor, learnt: Tensor
) -> Tensor:
    """The same for an indexer of two levels, summed over queries: what nobody needs shall score nothing, for then it
    takes no place among the few, and the newest keys win, which both levels agree on.

    The divergence is from the peaks of the attention alone, of keys and of whole blocks, and each positive score of
    a key that gets less than the mean has a price (which does not grow with the crowd: a short sequence stretched far
    would silence all scores). Blocks have none: only their order counts, and a price would teach to score nothing at
    all. A query whose next token is not learnt needs nothing. The few that are learnt count as much as all together, in
    their price too: the longer the sequence, the more keys there are that they could score needlessly.

    target, scores: [B, L, S]; blocks: [B, L, S // size], scores of summaries; visible: bool [B, L, S]; crowd: as of
    :func:`index_loss`; learnt: bool [B, L].
    """
    target = shares(target, visible)
    target = shares(target.masked_fill((target < PEAK) | ~learnt[..., None], 0), visible)
    weight = 1 / learnt.float().mean().clamp_min(1e-12)
    minor = is_minor(target, visible)
    scores = torch.where(minor, scores.relu(), scores)  # as they count in the choice; the others shall rise above
    idle = scores.masked_fill(~(visible & minor), 0).sum(-1)
    wrong = target.sum(-1) * divergence(target, stand_for_skipped(scores, target, visible, crowd), visible)
    if count := blocks.shape[-1]:
        size = scores.shape[-1] // count
        mass, seen = (t[..., : count * size].unflatten(-1, (count, size)) for t in (target, visible))
        whole = seen.all(-1)
        mass = mass.sum(-1).masked_fill(~whole, 0)
        share = shares(mass, whole)
        wrong = wrong + mass.sum(-1) * divergence(share, stand_for_skipped(blocks, share, whole, crowd), whole)
    return (weight * wrong + IDLE_PRICE * idle * torch.where(learnt, weight, 1.0)).sum()


def shares(target: Tensor, keys: Tensor) -> Tensor:
    """Attention to ``keys`` alone, as shares of it; 0 where they get none."""
    target = target.masked_fill(~keys, 0)
    return target / target.sum(-1, keepdim=True).clamp_min(1e-12)


def divergence(target: Tensor, scores: Tensor, keys: Tensor) -> Tensor:
    """KL(target || softmax of scores over ``keys``) of each query; target: :func:`shares`."""
    predicted = scores.masked_fill(~keys, -1e30).log_softmax(-1)
    return (target * (target.clamp_min(1e-12).log() - predicted)).sum(-1)


def is_minor(share: Tensor, keys: Tensor) -> Tensor:
    """bool [B, L, S]: keys with less of the attention than the mean of ``keys``."""
    return share * keys.sum(-1, keepdim=True) < 1


def stand_for_skipped(scores: Tensor, share: Tensor, keys: Tensor, crowd: Tensor) -> Tensor:
    """Scores as they count in a divergence: a minor key as often as there are positions to a key."""
    return scores + torch.where(is_minor(share, keys), crowd.log()[..., None], 0.0)


def index_recall(target: Tensor, chosen: Tensor) -> Tensor:
    """The share of the attention's mass that falls on the chosen keys, summed over queries."""
    return (target.masked_fill(~chosen, 0).sum(-1) / target.sum(-1).clamp_min(1e-12)).sum()
