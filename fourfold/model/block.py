"""One layer of the decoder."""

from __future__ import annotations

from torch import Tensor, nn

from fourfold.config import ModelConfig
from fourfold.model.compressed_attention import CompressedAttention
from fourfold.model.context import Context
from fourfold.model.csa2 import CSA2
from fourfold.model.gqa import GQA
from fourfold.model.indexer import Indexer
from fourfold.model.mla import MLA
from fourfold.model.moe import MLP, MoE
from fourfold.model.norm import RMSNorm
from fourfold.model.residual import residual_site


class Block(nn.Module):
    """Attention, then feed-forward, each behind a norm and inside a residual site."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = attention(cfg, layer)
        self.attn_residual = residual_site(cfg, 2 * layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        routed = cfg.moe.n_routed_experts > 0 and layer >= cfg.moe.first_k_dense_replace
        self.mlp = MoE(cfg, layer) if routed else MLP(cfg, cfg.intermediate_size)
        self.mlp_residual = residual_site(cfg, 2 * layer + 1)

    def forward(self, streams: Tensor, ctx: Context) -> Tensor:
        """streams: [T, n, d]."""
        streams = self.attn_residual(streams, lambda x: self.self_attn(self.input_layernorm(x), ctx), ctx)
        return self.mlp_residual(streams, lambda x: self.mlp(self.post_attention_layernorm(x), ctx), ctx)


def attention(cfg: ModelConfig, layer: int) -> nn.Module:
    """The attention of one layer; the last may be one past the trunk (MTP), which has no sources to share."""
    if cfg.attention.kind == "gqa":
        return GQA(cfg, layer)
    if cfg.attention.kind == "mla":
        past_trunk = cfg.indexer.mode != "off" and layer == cfg.num_hidden_layers
        owns = past_trunk or cfg.indexer.owned_by(layer)
        return MLA(cfg, layer, Indexer(cfg, layer) if owns else None)
    return CSA2(cfg, layer) if cfg.attention.kind == "csa2" else CompressedAttention(cfg, layer)
