"""Pooling of every ``ratio`` positions into one entry (DeepSeek-V4, arXiv 2606.19348, section 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.cache import Cache
from fourfold.model.context import Context, Window
from fourfold.model.linear import Linear
from fourfold.model.norm import RMSNorm


@dataclass
class Entries:
    """The entries that a window completes: float32 ``values`` [B, E, w], their ``numbers`` int64 [B, E] within the
    sequence, and which of them are whole (``done``, bool [B, E]; a longer past may complete one more)."""

    values: Tensor
    numbers: Tensor
    done: Tensor


class Compressor(nn.Module):
    """Pools groups of ``ratio`` positions, each channel by a softmax of its own; float32 throughout.

    With ``overlaps`` the projections are twice as wide: an entry pools the second half of its own group and the
    first half of the group before it. ``biased``: a learned preference for places within the group. Groups of one
    have nothing to weigh and no gate.
    """

    def __init__(
        self, cfg: ModelConfig, tail: str, ratio: int, width: int, overlaps: bool = False, biased: bool = True
    ) -> None:
        super().__init__()
        self.tail, self.ratio, self.width, self.overlaps = tail, ratio, width, overlaps
        out = 2 * width if overlaps else width
        self.kv_proj = Linear(cfg.hidden_size, out, bias=False)
        self.gate_proj = Linear(cfg.hidden_size, out, bias=False) if ratio > 1 else None
        self.position_bias = nn.Parameter(torch.zeros(ratio, out)) if biased else None
        self.norm = RMSNorm(width, cfg.rms_norm_eps)

    def project(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the tail keeps of each position: values and scores, float32 [T, 2 out]. positions: int64 [T]."""
        with ops.float32_island(x):
            values = ops.wide_linear(x, self.kv_proj.weight)
            if self.gate_proj is None:
                return torch.cat([values, torch.zeros_like(values)], dim=-1)
            scores = ops.wide_linear(x, self.gate_proj.weight)
            if self.position_bias is not None:
                scores = scores + self.position_bias[positions % self.ratio]
            return torch.cat([values, scores], dim=-1)

    def forward(self, projected: Tensor, window: Window, ctx: Context) -> Entries:
        """projected: [T, 2 out] of :meth:`project`."""
        raw, ratio = window.take(projected), self.ratio
        kept = 0
        if ctx.cache is not None and window.sequences is not None:
            before = ctx.cache.tail(self.tail, window.sequences)
            kept = before.shape[1]
            raw = torch.cat([before.to(raw.dtype), raw], dim=1)
            ctx.cache.keep(self.tail, window.sequences, raw[:, raw.shape[1] - kept :])
        count = -(-window.rows.shape[1] // ratio)
        numbers = window.past[:, None] // ratio + torch.arange(count, device=raw.device)
        done = (numbers + 1) * ratio <= window.past[:, None] + window.rows.shape[1]
        if ctx.cache is not None and not done.any():  # decoding, inside a group
            return Entries(raw.new_empty(len(raw), 0, self.width), numbers[:, :0], done[:, :0])
        within = torch.arange(ratio, device=raw.device)
        place = numbers[..., None] * ratio + within - window.past[:, None, None] + kept  # [B, E, ratio] in raw
        values, scores = self._rows(raw, place)
        if self.overlaps:
            older_values, older_scores = self._rows(raw, place - ratio)
            older_scores = older_scores.masked_fill((numbers == 0)[..., None, None], -torch.inf)
            values = torch.cat([older_values[..., : self.width], values[..., self.width :]], dim=2)
            scores = torch.cat([older_scores[..., : self.width], scores[..., self.width :]], dim=2)
        return Entries(self.norm(ops.pool(values, scores)), numbers, done)

    @staticmethod
    def _rows(raw: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scores [B, E, ratio, out] at ``place``; what lies outside belongs to no whole entry."""
        batch = torch.arange(len(raw), device=raw.device)[:, None, None]
        values, scores = raw[batch, place.clamp(0, raw.shape[1] - 1)].chunk(2, dim=-1)
        return values, scores


def gather_entries(entries: Entries, values: Tensor, slot: str, window: Window, ratio: int, ctx: Context) -> Tensor:
    """All entries that the window's queries may see, [B, n, w]: from the cache, where these are stored first.

    values: [B, E, w], those of ``entries`` as they are to be read.
    """
    count = window.length // ratio
    if ctx.cache is None or window.sequences is None:
        return values[:, :count]
    store_entries(entries, values, slot, window.sequences, ctx.cache)
    return ctx.cache.read(slot, window.sequences, count).to(values.dtype)


def store_entries(entries: Entries, values: Tensor, slot: str, sequences: Tensor, cache: Cache) -> None:
    """Those of ``values`` [B, E, w] whose entries are whole go where ``sequences`` [B] keep them."""
    if entries.numbers.shape[1]:
        owners = sequences[:, None].expand_as(entries.numbers)[entries.done]
        cache.write_entries(slot, values[entries.done], owners, entries.numbers[entries.done])
