"""One layer of the decoder."""

from __future__ import annotations

from torch import Tensor, nn

from fourfold.config import ModelConfig
from fourfold.model.context import Context
from fourfold.model.gqa import GQA
from fourfold.model.indexer import Indexer
from fourfold.model.mla import MLA
from fourfold.model.moe import MLP, MoE
from fourfold.model.norm import RMSNorm
from fourfold.model.residual import residual_site


class Block(nn.Module):
    """Attention, then feed-forward, each behind a norm and inside a residual site."""

    def __init__(self, cfg: ModelConfig, layer: int, cache_offset: int, indexer: Indexer | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg, cache_offset, indexer) if cfg.attention.kind == "mla" else GQA(cfg, cache_offset)
        self.attn_residual = residual_site(cfg, 2 * layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        routed = cfg.moe.n_routed_experts > 0 and layer >= cfg.moe.first_k_dense_replace
        self.mlp = MoE(cfg, layer) if routed else MLP(cfg.hidden_size, cfg.intermediate_size)
        self.mlp_residual = residual_site(cfg, 2 * layer + 1)

    def forward(self, streams: Tensor, ctx: Context) -> Tensor:
        """streams: [T, n, d]."""
        streams = self.attn_residual(streams, lambda x: self.self_attn(self.input_layernorm(x), ctx), ctx)
        return self.mlp_residual(streams, lambda x: self.mlp(self.post_attention_layernorm(x), ctx), ctx)
