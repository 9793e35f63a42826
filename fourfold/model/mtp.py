"""Multi-token prediction: a block that sees the next token guesses the one after (arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from fourfold.config import ModelConfig
from fourfold.model.block import Block
from fourfold.model.context import Context
from fourfold.model.norm import RMSNorm
from fourfold.model.residual import collapse


class MTP(nn.Module):
    """``e_proj(norm(emb[t+1])) + h_proj(norm(X_i[t]))`` for every stream, one routed block, its own collapse and norm.

    Embedding and head are the trunk's.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        d = cfg.hidden_size
        self.enorm, self.hnorm = RMSNorm(d, cfg.rms_norm_eps), RMSNorm(d, cfg.rms_norm_eps)
        self.e_proj, self.h_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.block = Block(cfg, cfg.num_hidden_layers)
        self.collapse = collapse(cfg)
        self.norm = RMSNorm(d, cfg.rms_norm_eps)

    def forward(self, streams: Tensor, following: Tensor, ctx: Context, cached: bool = False) -> Tensor:
        """streams: [T, n, d], out of the trunk; following: [T, d], embedding of the next token. Returns [T, d].

        cached: the block sees and extends its own part of ``ctx.cache``, which must have been laid out with one.
        """
        z = self.e_proj(self.enorm(following))[:, None] + self.h_proj(self.hnorm(streams))
        cache = ctx.cache if cached else None
        own = dataclasses.replace(ctx, cache=cache, probe=None, selection=None, read_weights=None)
        out: Tensor = self.norm(self.collapse(self.block(z, own), own))
        return out
