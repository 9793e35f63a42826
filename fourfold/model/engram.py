"""Engram: a memory of n-grams, looked up by hash and admitted by a gate (arXiv 2601.07372)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import EngramConfig, ModelConfig
from fourfold.counts import engram_primes
from fourfold.model.context import Context
from fourfold.model.linear import Linear
from fourfold.model.norm import RMSNorm
from fourfold.model.sequence import TEXT

GATE_EPS = 1e-6


def engram_multipliers(cfg: EngramConfig, layer: int, compressed_vocab_size: int) -> list[int]:
    """The odd hash multipliers of a layer; a compressed id times one never overflows int64."""
    bound = max(1, (int(np.iinfo(np.int64).max) // compressed_vocab_size) // 2)
    draws = np.random.default_rng(10007 * layer + cfg.seed).integers(0, bound, size=cfg.max_ngram, dtype=np.int64)
    return [2 * int(r) + 1 for r in draws]


class TokenCompression(nn.Module):
    """Token id -> compressed id, so that variants of one word share their n-grams (arXiv 2601.07372, section 2).

    Without a tokenizer's map, ids are folded modulo the compressed size; a checkpoint carries its map.
    """

    def __init__(self, vocab_size: int, compressed_vocab_size: int, pad_token_id: int, max_ngram: int) -> None:
        super().__init__()
        self.max_ngram, self.pad_token_id = max_ngram, pad_token_id
        self.register_buffer("ids", torch.arange(vocab_size) % compressed_vocab_size)
        self.ids: Tensor

    def forward(self, ctx: Context) -> Tensor:
        """Compressed ids int64 [T, N]: column k holds the token k back, padding before a start or across media."""
        packed = ctx.packed
        text = packed.modality == TEXT
        tokens = torch.where(text, packed.tokens, -1)
        columns, alive = [torch.where(text, self.ids[packed.tokens], self.ids[self.pad_token_id])], text
        first = packed.cu_seqlens[:-1][packed.sequence_ids]
        offset = torch.arange(len(tokens), device=tokens.device) - first
        history = self._history(ctx)
        for back in range(1, self.max_ngram):
            earlier = torch.where(offset >= back, tokens.roll(back), -1)
            if history is not None:
                reach = (back - offset).clamp_min(1) - 1  # 0: the last cached token
                earlier = torch.where(offset >= back, earlier, history[packed.sequence_ids, reach])
            alive = alive & (earlier >= 0)
            columns.append(torch.where(alive, self.ids[earlier.clamp_min(0)], self.ids[self.pad_token_id]))
        return torch.stack(columns, dim=-1)

    def _history(self, ctx: Context) -> Tensor | None:
        """int64 [N, max_ngram - 1]: the cached tokens before each sequence's new ones, latest first, -1 where none."""
        if ctx.cache is None:
            return None
        reach = self.max_ngram - 1
        rows = []
        for sequence in range(len(ctx.cache.states)):
            latest_first = ctx.cache.history(sequence, reach)[::-1]
            rows.append(latest_first + [-1] * (reach - len(latest_first)))
        return torch.tensor(rows, device=ctx.packed.tokens.device)


class Engram(nn.Module):
    """The memory of one layer: (N - 1) x J table rows per position, one value, one key and gate per stream."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        e, d, n = cfg.engram, cfg.hidden_size, cfg.residual.streams
        self.layer, self.streams, self.eps = layer, n, cfg.rms_norm_eps
        primes = engram_primes(e)[e.layer_ids.index(layer)]
        flat = [p for order in primes for p in order]
        offsets = np.concatenate([[0], np.cumsum(flat)[:-1]]).astype(np.int64).reshape(len(primes), e.n_heads)
        multipliers = engram_multipliers(e, layer, e.compressed_vocab_size or cfg.vocab_size)
        # plain attributes: small, derived from the config, never part of a checkpoint
        self.multipliers, self.primes, self.offsets = multipliers, primes, offsets.tolist()
        width = (e.max_ngram - 1) * e.n_heads * e.head_dim
        self.embed = nn.Embedding(sum(flat), e.head_dim)
        self.key_proj = Linear(width, n * d, bias=False)
        self.value_proj = Linear(width, d, bias=False)
        self.q_weight = nn.Parameter(torch.ones(n, d))
        self.k_weight = nn.Parameter(torch.ones(n, d))
        self.conv = ShortConv(n, d, e.max_ngram, self.eps) if e.short_conv else None

    def forward(self, streams: Tensor, grams: Tensor, ctx: Context) -> Tensor:
        """streams: [T, n, d]; grams: int64 [T, N] from :class:`TokenCompression`. Returns the new streams."""
        constants = (torch.tensor(c, device=grams.device) for c in (self.multipliers, self.primes, self.offsets))
        rows = ops.ngram_rows(grams, *constants)
        e = self.embed(rows).flatten(1)
        value = ops.at_least_float32(self.value_proj(e))
        key = ops.at_least_float32(self.key_proj(e)).unflatten(-1, (self.streams, -1))
        wide = ops.at_least_float32(streams)
        gate = engram_gate(ops.rms_norm(wide, self.q_weight, self.eps), ops.rms_norm(key, self.k_weight, self.eps))
        text = (ctx.packed.modality == TEXT)[:, None]
        gate = gate * text
        if ctx.probe is not None:
            ctx.probe.engram_gates[self.layer] = gate.detach()
        u = gate[..., None] * value[:, None]
        if self.conv is not None:
            u = u + self.conv(u, ctx) * text[..., None]
        return (wide + u).to(streams.dtype)


def engram_gate(query: Tensor, key: Tensor) -> Tensor:
    """``sigmoid(sign(d) sqrt(|d|))`` with ``d = <query, key> / sqrt(dim)``. [..., dim] -> [...]."""
    d = (query * key).sum(-1) / math.sqrt(query.shape[-1])
    return (d.sign() * d.abs().clamp_min(GATE_EPS).sqrt()).sigmoid()


class ShortConv(nn.Module):
    """``SiLU(depthwise causal conv(RMSNorm(u)))``, kernel 4, dilation N, zero at the start of training."""

    kernel = 4

    def __init__(self, streams: int, dim: int, dilation: int, eps: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = RMSNorm(dim, eps)
        self.weight = nn.Parameter(torch.zeros(streams, dim, self.kernel))

    def forward(self, u: Tensor, ctx: Context) -> Tensor:
        """u: [T, n, d]. The window does not reach into another sequence."""
        if ctx.cache is not None:
            raise ValueError("engram.short_conv: cannot decode with a cache; its state is not cached")
        x = self.norm(u)
        first = ctx.packed.cu_seqlens[:-1][ctx.packed.sequence_ids]
        offset = torch.arange(len(u), device=u.device) - first
        out = torch.zeros_like(x)
        for tap in range(self.kernel):
            back = tap * self.dilation
            inside = (offset >= back)[:, None, None]
            out = out + torch.where(inside, x.roll(back, dims=0), 0.0) * self.weight[..., self.kernel - 1 - tap]
        return F.silu(out)
