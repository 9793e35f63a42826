"""What V2, V3 and V3.2 have in common in their config.json: latent attention and experts behind dense layers."""

from __future__ import annotations

from typing import Any

from fourfold.config import ModelConfig
from fourfold.weights.families.fields import REQUIRED, Fields
from fourfold.weights.families.llama import common_fields
from fourfold.weights.families.rope import read_rope, write_rope

EPS = 1e-6  # the latents are normalised with it, whatever rms_norm_eps says


def read(fields: Fields, scoring_func: str, moe: dict[str, Any]) -> dict[str, Any]:
    """``moe``: the router's fields that the families have in different ways."""
    heads, positions = fields.take("num_attention_heads", int), fields.take("max_position_embeddings", int)
    nope, rope_dim = fields.take("qk_nope_head_dim", int), fields.take("qk_rope_head_dim", int)
    layers = fields.layers()
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("attention_dropout", 0.0)
    fields.expect("rope_interleave", True)
    fields.expect("moe_layer_freq", 1)
    fields.expect("ep_size", 1)
    fields.expect("scoring_func", scoring_func)
    fields.agree("num_key_value_heads", heads, "num_attention_heads")
    fields.agree("qk_head_dim", nope + rope_dim, "qk_nope_head_dim + qk_rope_head_dim")
    fields.agree("head_dim", rope_dim, "qk_rope_head_dim")
    if (eps := fields.take("rms_norm_eps", float, EPS)) != EPS:
        fields.fault("rms_norm_eps", f"is {eps}, only {EPS} is supported: the latents' norms have it built in")
    routed = fields.take("n_routed_experts", int, 0)
    dense = fields.take("first_k_dense_replace", int, 0)
    needed: Any = REQUIRED if routed else 0
    experts = {
        "n_routed_experts": routed,
        "n_shared_experts": fields.take("n_shared_experts", int, 0),
        "num_experts_per_tok": fields.take("num_experts_per_tok", int, needed),
        "moe_intermediate_size": fields.take("moe_intermediate_size", int, needed),
        "first_k_dense_replace": dense,
        "scoring_func": scoring_func,
        "routed_scaling_factor": fields.take("routed_scaling_factor", float, 1.0),
        **moe,
    }
    return {
        "vocab_size": fields.take("vocab_size", int),
        "hidden_size": fields.take("hidden_size", int),
        "num_hidden_layers": layers,
        "intermediate_size": fields.take("intermediate_size", int),
        "max_position_embeddings": positions,
        "rms_norm_eps": EPS,
        "initializer_range": fields.take("initializer_range", float, 0.02),
        "tie_word_embeddings": fields.take("tie_word_embeddings", bool, False),
        "attention": {
            "kind": "mla",
            "num_attention_heads": heads,
            "q_lora_rank": fields.take("q_lora_rank", int, 0),
            "kv_lora_rank": fields.take("kv_lora_rank", int),
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope_dim,
            "v_head_dim": fields.take("v_head_dim", int),
        },
        "rope": read_rope(fields, positions, scaled_softmax=True),
        "moe": experts if routed else {},
    }


def read_groups(fields: Fields) -> dict[str, Any]:
    """The router of V3: groups, and a bias that chooses."""
    fields.expect("topk_method", "noaux_tc")
    return {
        "topk_method": "noaux_tc",
        "n_group": fields.take("n_group", int, 1),
        "topk_group": fields.take("topk_group", int, 1),
        "norm_topk_prob": fields.take("norm_topk_prob", bool, True),
    }


def read_mtp(fields: Fields) -> dict[str, Any]:
    layers = fields.take("num_nextn_predict_layers", int, 0)
    if layers not in (0, 1):
        fields.fault("num_nextn_predict_layers", f"is {layers}, only 0 or 1 is supported")
    return {"num_layers": layers, "normed_input": True}


def write(cfg: ModelConfig, dialect: str) -> dict[str, Any]:
    a, moe = cfg.attention, cfg.moe
    return {
        **common_fields(cfg),
        **write_rope(cfg.rope, dialect),
        "intermediate_size": cfg.intermediate_size,
        "num_key_value_heads": a.num_attention_heads,
        "q_lora_rank": a.q_lora_rank or None,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "attention_bias": False,
        "n_routed_experts": moe.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "moe_layer_freq": 1,
        "first_k_dense_replace": moe.first_k_dense_replace,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "scoring_func": moe.scoring_func,
        "topk_method": moe.topk_method,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "norm_topk_prob": moe.norm_topk_prob,
    }
