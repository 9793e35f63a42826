"""Llama-type decoders: DeepSeek-LLM and R1 distillations (``llama``, ``qwen2``), DeepSeekMoE-16B (``deepseek``)."""

from __future__ import annotations

from typing import Any

from fourfold.config import ModelConfig
from fourfold.weights.families import hugging_names
from fourfold.weights.families.base import Family
from fourfold.weights.families.fields import Fields
from fourfold.weights.families.rope import read_rope, write_rope


def _read(fields: Fields) -> dict[str, Any]:
    kind = fields.values.get("model_type")
    heads, hidden = fields.take("num_attention_heads", int), fields.take("hidden_size", int)
    positions = fields.take("max_position_embeddings", int)
    layers = fields.layers()
    if "head_dim" not in fields and hidden % max(heads, 1):
        fields.fault("num_attention_heads", f"is {heads}, which does not divide hidden_size ({hidden})")
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("attention_dropout", 0.0)
    if kind == "qwen2":
        fields.expect("use_sliding_window", False)
        fields.expect("use_mrope", False)
        fields.agree("layer_types", ["full_attention"] * layers, "num_hidden_layers")
        fields.ignore(["sliding_window", "max_window_layers"])  # in force with use_sliding_window alone
    return {
        "vocab_size": fields.take("vocab_size", int),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": fields.take("intermediate_size", int),
        "max_position_embeddings": positions,
        "rms_norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "initializer_range": fields.take("initializer_range", float, 0.02),
        "tie_word_embeddings": fields.take("tie_word_embeddings", bool, False),
        "attention": {
            "kind": "gqa",
            "num_attention_heads": heads,
            "num_key_value_heads": fields.take("num_key_value_heads", int, heads),
            "head_dim": fields.take("head_dim", int, hidden // max(heads, 1)),
            "qkv_bias": kind == "qwen2",
        },
        "rope": read_rope(fields, positions, scaled_softmax=False),
        "moe": _read_moe(fields) if kind == "deepseek" else {},
    }


def _read_moe(fields: Fields) -> dict[str, Any]:
    fields.expect("scoring_func", "softmax")
    fields.expect("norm_topk_prob", False)
    fields.expect("moe_layer_freq", 1)
    fields.expect("ep_size", 1)
    return {
        "n_routed_experts": fields.take("n_routed_experts", int),
        "n_shared_experts": fields.take("n_shared_experts", int, 0),
        "num_experts_per_tok": fields.take("num_experts_per_tok", int),
        "moe_intermediate_size": fields.take("moe_intermediate_size", int),
        "first_k_dense_replace": fields.take("first_k_dense_replace", int, 0),
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    }


def common_fields(cfg: ModelConfig) -> dict[str, Any]:
    """What every config.json of a text model has."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.attention.num_attention_heads,
        "max_position_embeddings": cfg.max_position_embeddings,
        "rms_norm_eps": cfg.rms_norm_eps,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _write(model_type: str) -> Any:
    def write(cfg: ModelConfig, dialect: str) -> dict[str, Any]:
        a, moe = cfg.attention, cfg.moe
        values = common_fields(cfg) | write_rope(cfg.rope, dialect)
        values |= {
            "intermediate_size": cfg.intermediate_size,
            "num_key_value_heads": a.num_key_value_heads,
            "head_dim": a.head_dim,
        }
        if model_type == "qwen2":
            return values | {"use_sliding_window": False}
        values |= {"attention_bias": False}
        if model_type == "llama":
            return values | {"mlp_bias": False}
        return values | {
            "n_routed_experts": moe.n_routed_experts,
            "n_shared_experts": moe.n_shared_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "moe_intermediate_size": moe.moe_intermediate_size,
            "first_k_dense_replace": moe.first_k_dense_replace,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
        }

    return write


def _family(model_type: str, architecture: str) -> Family:
    return Family(
        model_type,
        architecture,
        read=_read,
        write=_write(model_type),
        plan=lambda cfg, dialect: hugging_names.plan(cfg, router_bias=False),
        ignored=hugging_names.ignored,
    )


LLAMA = _family("llama", "LlamaForCausalLM")
QWEN2 = _family("qwen2", "Qwen2ForCausalLM")
DEEPSEEK = _family("deepseek", "DeepseekForCausalLM")
