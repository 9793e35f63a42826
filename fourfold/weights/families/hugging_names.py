"""Tensor names of the families that began on the hub: llama-type models and DeepSeek up to V3.2."""

from __future__ import annotations

from collections.abc import Iterable

from fourfold.config import ModelConfig
from fourfold.weights.families.entries import Cat, Part, Plan, Stack, Zeros

INDEXER = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
KEPT_WIDE = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "weights_proj", "shared_head")


def plan(cfg: ModelConfig, router_bias: bool) -> Plan:
    """The decoder without MTP. ``router_bias``: the routers of the family have a selection bias."""
    found: Plan = {
        "embed_tokens.weight": Part("model.embed_tokens.weight"),
        "norm.weight": Part("model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        found["lm_head.weight"] = Part("lm_head.weight")
    for layer in range(cfg.num_hidden_layers):
        found |= block(cfg, layer, f"layers.{layer}.", router_bias)
    return found


def block(cfg: ModelConfig, layer: int, ours: str, router_bias: bool) -> Plan:
    """One layer, which is ``ours`` in our model."""
    disk = f"model.layers.{layer}."
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"self_attn.{name}" for name in _attention(cfg)]
    found: Plan = {ours + name: Part(disk + name) for name in names}
    if not cfg.moe.n_routed_experts or layer < cfg.moe.first_k_dense_replace:
        return found | {ours + name: Part(disk + name) for name in _mlp("mlp.")}
    experts = range(cfg.moe.n_routed_experts)
    found |= {
        f"{ours}mlp.gate.weight": Part(f"{disk}mlp.gate.weight"),
        f"{ours}mlp.gate.bias": Part(f"{disk}mlp.gate.e_score_correction_bias") if router_bias else Zeros(),
        f"{ours}mlp.gate_up_proj": gate_up(f"{disk}mlp.experts.", experts, "gate_proj", "up_proj"),
        f"{ours}mlp.down_proj": Stack(tuple(Part(f"{disk}mlp.experts.{e}.down_proj.weight") for e in experts)),
    }
    if cfg.moe.n_shared_experts:
        found |= {ours + name: Part(disk + name) for name in _mlp("mlp.shared_experts.")}
    return found


def mtp(cfg: ModelConfig) -> Plan:
    """The layer after the last (V3): what joins embedding and hidden state is one matrix, the embedding first."""
    if not cfg.mtp.num_layers:
        return {}
    layer, d = cfg.num_hidden_layers, cfg.hidden_size
    disk = f"model.layers.{layer}."
    return {
        "mtp.enorm.weight": Part(f"{disk}enorm.weight"),
        "mtp.hnorm.weight": Part(f"{disk}hnorm.weight"),
        "mtp.e_proj.weight": Part(f"{disk}eh_proj.weight", 1, 0, d),
        "mtp.h_proj.weight": Part(f"{disk}eh_proj.weight", 1, d, 2 * d),
        "mtp.norm.weight": Part(f"{disk}shared_head.norm.weight"),
        **block(cfg, layer, "mtp.block.", router_bias=True),
    }


def ignored(cfg: ModelConfig, name: str) -> bool:
    """Copies of embedding and head in the MTP layer, all of it where the model has none; rotary tables."""
    prefix = f"model.layers.{cfg.num_hidden_layers}."
    if name.startswith(prefix):
        copies = (f"{prefix}embed_tokens.weight", f"{prefix}shared_head.head.weight")
        return not cfg.mtp.num_layers or name in copies
    if name == "lm_head.weight":
        return cfg.tie_word_embeddings  # a copy of the embedding that some writers leave in
    return name.endswith("rotary_emb.inv_freq")


def gate_up(disk: str, experts: Iterable[int], gate: str, up: str) -> Stack:
    """The fused expert matrices: the gate's rows above those of the up projection."""
    halves = (gate, up)
    return Stack(tuple(Cat(tuple(Part(f"{disk}{e}.{half}.weight") for half in halves)) for e in experts))


def tensor_format(name: str, fp8: str) -> str:
    """Dense weights and experts in the format ``fp8``; what steers and what is read row by row in bf16."""
    kept = not name.endswith(".weight") or any(part in name for part in KEPT_WIDE)
    return "bf16" if kept else fp8


def _attention(cfg: ModelConfig) -> list[str]:
    if cfg.attention.kind == "gqa":
        names = [f"{part}_proj.weight" for part in "qkvo"]
        return names + [f"{part}_proj.bias" for part in "qkv" if cfg.attention.qkv_bias]
    queries = ["q_a_proj", "q_a_layernorm", "q_b_proj"] if cfg.attention.q_lora_rank else ["q_proj"]
    names = [f"{part}.weight" for part in (*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")]
    return names + [f"indexer.{name}" for name in INDEXER if cfg.indexer.mode != "off"]


def _mlp(prefix: str) -> list[str]:
    return [f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")]
