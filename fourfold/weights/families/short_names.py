"""Tensor names of V4 and V4.1, which are short and the same for both."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fourfold.config import ModelConfig
from fourfold.weights.families.entries import Entry, Part, Plan, Stack, Zeros
from fourfold.weights.families.hugging_names import gate_up

POOLING = {
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "position_bias": "ape",
    "norm.weight": "norm.weight",
}
BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{
        f"{ours}_residual.{part}": f"hc_{disk}_{part}"
        for ours, disk in (("attn", "attn"), ("mlp", "ffn"))
        for part in ("fn", "base", "scale")
    },
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_layernorm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_layernorm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    **{
        f"self_attn.{module}.{ours}": f"attn.{module}.{disk}"
        for module in ("compressor", "indexer.compressor")
        for ours, disk in POOLING.items()
    },
    **{
        f"self_attn.indexer.{name}.weight": f"attn.indexer.{name}.weight"
        for name in ("wq_b", "weights_proj", "wk", "k_norm")
    },
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
}
TOP = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "norm.weight": "norm.weight",
    **{f"collapse.{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")},
}
PREFIXES = ((r"layers\.(\d+)\.", "layers.{}."), (r"mtp\.block\.", "mtp.0."), (r"drafter\.blocks\.(\d+)\.", "mtp.{}."))

# Dense weights that are fp8 in released files, by the last two parts of their names
DENSE = re.compile(r"\.(wq_a|wq_b|wkv|wo_a|wo_b|e_proj|h_proj|main_proj|shared_experts\.w[123])\.weight$")
POOLED = re.compile(r"\.compressor\.")
EXPERTS = re.compile(r"\.experts\.\d+\.w[123]\.weight$")


def plan(cfg: ModelConfig, names: Iterable[str], top: dict[str, Entry]) -> Plan:
    """Where our ``names`` lie; ``top``: those outside of blocks that :data:`TOP` lacks. Others are left out."""
    found: Plan = {}
    for name in names:
        entry = _in_block(cfg, name)
        if entry is None:
            entry = top.get(name) or (Part(TOP[name]) if name in TOP else None)
        if entry is not None:
            found[name] = entry
    return found


def _in_block(cfg: ModelConfig, name: str) -> Entry | None:
    for pattern, prefix in PREFIXES:
        if match := re.match(pattern, name):
            disk, own = prefix.format(*match.groups()), name[match.end() :]
            drafts = name.startswith("drafter.")
            experts = range((cfg.drafter if drafts else cfg.moe).n_routed_experts)
            if own == "mlp.gate_up_proj":
                return gate_up(f"{disk}ffn.experts.", experts, "w1", "w3")
            if own == "mlp.down_proj":
                return Stack(tuple(Part(f"{disk}ffn.experts.{e}.w2.weight") for e in experts))
            if own == "mlp.gate.media_bias":  # images have one on disk, video and audio are of our own models
                return Stack((Part(f"{disk}ffn.gate.bias_vl"), Zeros(), Zeros()))
            return Part(disk + BLOCK[own]) if own in BLOCK else None
    return None


def tensor_format(name: str, storage: str, dense: str) -> str:
    """The number format of a weight under ``fp8`` or ``fp8+fp4``; ``dense``: that of the family's dense weights."""
    if EXPERTS.search(name):
        return "mxfp4" if storage == "fp8+fp4" else dense
    return dense if DENSE.search(name) and not POOLED.search(name) else "bf16"
