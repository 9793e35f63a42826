"""DeepSeek-V4 (Flash, Pro): compressed attention, hash-routed first layers, hyper-connections."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fourfold.config import ModelConfig
from fourfold.fields import ConfigError
from fourfold.model.transformer import Model
from fourfold.weights.families import short_names
from fourfold.weights.families.base import Family
from fourfold.weights.families.entries import Entry, Part, Plan
from fourfold.weights.families.fields import Fields
from fourfold.weights.families.llama import common_fields
from fourfold.weights.families.rope import read_parameters, write_parameters

log = logging.getLogger(__name__)
CSA_RATIO, HCA_RATIO = 4, 128
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
DSPARK = (
    "block_size",
    "target_layer_ids",
    "markov_rank",
    "noise_token_id",
    "n_routed_experts",
    "num_experts_per_tok",
)


def read_common(fields: Fields) -> dict[str, Any]:
    """What V4 and V4.1 have in common, without the schedule of the layers and the ropes."""
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("attention_dropout", 0.0)
    fields.expect("num_key_value_heads", 1)
    fields.expect("n_shared_experts", 1)
    fields.expect("topk_method", "noaux_tc")
    fields.expect("norm_topk_prob", True)
    fields.expect("n_group", 1)
    fields.expect("topk_group", 1)
    fields.expect("moe_layer_freq", 1)
    fields.expect("first_k_dense_replace", 0)
    fields.expect("expert_dtype", "fp4", "fp8")
    width = fields.take("moe_intermediate_size", int)
    fields.agree("intermediate_size", width, "moe_intermediate_size")
    return {
        "vocab_size": fields.take("vocab_size", int),
        "hidden_size": fields.take("hidden_size", int),
        "num_hidden_layers": fields.layers(),
        "intermediate_size": width,  # of no layer: all are routed
        "max_position_embeddings": fields.take("max_position_embeddings", int),
        "rms_norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "initializer_range": fields.take("initializer_range", float, 0.02),
        "tie_word_embeddings": fields.take("tie_word_embeddings", bool, False),
        "attention": {
            "num_attention_heads": fields.take("num_attention_heads", int),
            "q_lora_rank": fields.take("q_lora_rank", int),
            "head_dim": fields.take("head_dim", int),
            "o_groups": fields.take("o_groups", int),
            "o_lora_rank": fields.take("o_lora_rank", int),
            "sliding_window": fields.take("sliding_window", int),
        },
        "indexer": {
            "mode": "sparse",
            "n_heads": fields.take("index_n_heads", int),
            "head_dim": fields.take("index_head_dim", int),
            "topk": fields.take("index_topk", int),
            "layers_per_indexer": 1,
        },
        "moe": {
            "n_routed_experts": fields.take("n_routed_experts", int),
            "n_shared_experts": 1,
            "num_experts_per_tok": fields.take("num_experts_per_tok", int),
            "moe_intermediate_size": width,
            "first_k_dense_replace": 0,
            "scoring_func": fields.take("scoring_func", str, "sqrtsoftplus"),
            "routed_scaling_factor": fields.take("routed_scaling_factor", float),
            "swiglu_limit": fields.take("swiglu_limit", float, 10.0),
        },
        "residual": {
            "hc_mult": fields.take("hc_mult", int, 4),
            "hc_sinkhorn_iters": fields.take("hc_sinkhorn_iters", int, 20),
            "hc_eps": fields.take("hc_eps", float, 1e-6),
        },
    }


def write_common(cfg: ModelConfig) -> dict[str, Any]:
    a, i, moe, r = cfg.attention, cfg.indexer, cfg.moe, cfg.residual
    return {
        **common_fields(cfg),
        "num_key_value_heads": 1,
        "head_dim": a.head_dim,
        "q_lora_rank": a.q_lora_rank,
        "o_groups": a.o_groups,
        "o_lora_rank": a.o_lora_rank,
        "sliding_window": a.sliding_window,
        "attention_bias": False,
        "index_n_heads": i.n_heads,
        "index_head_dim": i.head_dim,
        "index_topk": i.topk,
        "n_routed_experts": moe.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "scoring_func": moe.scoring_func,
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "swiglu_limit": moe.swiglu_limit,
        "hc_mult": r.hc_mult,
        "hc_sinkhorn_iters": r.hc_sinkhorn_iters,
        "hc_eps": r.hc_eps,
    }


def read_released_ropes(fields: Fields, positions: int) -> dict[str, Any]:
    """``rope_theta`` for layers that see their window alone, ``compress_rope_theta`` and the scaling for the others."""
    theta, compress = fields.take("rope_theta", float), fields.take("compress_rope_theta", float)
    scaling = read_parameters(fields.table("rope_scaling"), compress, positions, True, attention_factor=1.0)
    return {"rope": {"theta": theta}, "compress_rope": scaling}


def write_released_ropes(cfg: ModelConfig) -> dict[str, Any]:
    values = write_parameters(cfg.compress_rope)
    if cfg.compress_rope.attention_factor == 1:
        values.pop("attention_factor", None)  # the family's own
    return {
        "rope_theta": cfg.rope.theta,
        "compress_rope_theta": cfg.compress_rope.theta,
        "rope_scaling": {"type": cfg.compress_rope.scaling, **values} if values else None,
    }


def read_ratios(fields: Fields, layers: int, heads: int) -> tuple[int, ...] | None:
    """``compress_ratios`` of the trunk; behind it may stand zeros for up to ``heads`` blocks that predict ahead."""
    if "compress_ratios" not in fields:
        fields.ignore(["compress_ratios"])
        return None
    ratios = fields.items("compress_ratios", int)
    if not layers <= len(ratios) <= layers + heads or any(ratios[layers:]):
        fields.fault(
            "compress_ratios",
            f"has {len(ratios)} entries, must have {layers}, one for each layer, and then at most {heads} zeros",
        )
    return ratios[:layers]


def _read(fields: Fields) -> dict[str, Any]:
    cfg = read_common(fields)
    layers, head_dim = cfg["num_hidden_layers"], cfg["attention"]["head_dim"]
    dspark = _read_dspark(fields)
    mtp = fields.take("num_nextn_predict_layers", int, 0)
    if mtp not in (0, 1):
        fields.fault("num_nextn_predict_layers", f"is {mtp}, only 0 or 1 is supported")
    ratios, csa_ratio = _read_schedule(fields, layers, 3 if dspark else mtp)
    factor = fields.take("partial_rotary_factor", float, None)
    rope_dim = fields.take("qk_rope_head_dim", int, None)
    if rope_dim is None:
        rope_dim = int(head_dim * (64 / 512 if factor is None else factor))
    elif factor is not None and rope_dim != int(head_dim * factor):
        fields.fault("qk_rope_head_dim", f"is {rope_dim}, but partial_rotary_factor makes it {int(head_dim * factor)}")
    if "rope_parameters" in fields and {"main", "compress"} & fields.values["rope_parameters"].keys():
        ropes = _read_two_ropes(fields, cfg["max_position_embeddings"], rope_dim / max(head_dim, 1))
    else:
        fields.ignore(["rope_parameters"])
        ropes = read_released_ropes(fields, cfg["max_position_embeddings"])
    cfg["attention"] |= {
        "kind": "compressed",
        "qk_rope_head_dim": rope_dim,
        "compress_ratios": ratios,
        "csa_ratio": csa_ratio,
    }
    cfg["moe"]["num_hash_layers"] = _read_hash_layers(fields, layers)
    cfg["residual"]["kind"] = "mhc"
    return cfg | ropes | {"mtp": {"num_layers": 0 if dspark else mtp}}


def _read_dspark(fields: Fields) -> bool:
    present = "dspark_block_size" in fields
    fields.ignore(f"dspark_{name}" for name in DSPARK)
    if present:
        log.warning("dspark_block_size: the drafter of a DeepSeek-V4 checkpoint is not loaded; the model is complete")
    return present


def _read_schedule(fields: Fields, layers: int, heads: int) -> tuple[tuple[int, ...], int]:
    """Ratios by layer, and that of the layers which select."""
    rates = fields.table("compress_rates")
    csa = rates.take(CSA, int, fields.take("compress_rate_csa", int, CSA_RATIO))
    hca = rates.take(HCA, int, fields.take("compress_rate_hca", int, HCA_RATIO))
    rates.finish()
    if csa == hca:
        fields.fault("compress_rates", f"are both {csa}; the two kinds of layers must differ")
    ratios = read_ratios(fields, layers, heads)
    if "layer_types" in fields:
        names = {SLIDING: 0, CSA: csa, HCA: hca}
        kinds = fields.items("layer_types", str)
        if len(kinds) != layers:
            fields.fault("layer_types", f"has {len(kinds)} entries, there are {layers} layers")
        if unknown := sorted(set(kinds) - names.keys()):
            fields.fault("layer_types", f"has {', '.join(unknown)}; known: {', '.join(names)}")
        by_kind = tuple(names.get(kind, 0) for kind in kinds)
        if ratios is not None and ratios != by_kind:
            fields.fault("compress_ratios", "and layer_types say different things")
        return by_kind, csa
    fields.ignore(["layer_types"])
    if ratios is None:
        fields.fault("compress_ratios", "is missing, and so is layer_types")
        return (0,) * max(layers, 0), csa
    return ratios, csa


def _read_hash_layers(fields: Fields, layers: int) -> int:
    count = fields.take("num_hash_layers", int, None)
    if "mlp_layer_types" not in fields:
        fields.ignore(["mlp_layer_types"])
        return 3 if count is None else min(count, layers)
    kinds = fields.items("mlp_layer_types", str)
    by_kind = kinds.count("hash_moe")
    if kinds != ("hash_moe",) * by_kind + ("moe",) * (layers - by_kind):
        fields.fault("mlp_layer_types", f"must be hash_moe for the first layers, then moe, {layers} in all")
    if count is not None and min(count, layers) != by_kind:
        fields.fault("num_hash_layers", f"is {count}, mlp_layer_types has {by_kind}")
    return by_kind


def _read_two_ropes(fields: Fields, positions: int, factor: float) -> dict[str, Any]:
    fields.ignore(["rope_scaling"])
    both = fields.table("rope_parameters")
    ropes = {}
    for name, field in (("main", "rope"), ("compress", "compress_rope")):
        table = both.table(name)
        theta = table.take("rope_theta", float)
        fields.agree(f"{field}_theta", theta, f"rope_parameters.{name}.rope_theta")
        table.agree("partial_rotary_factor", factor, "qk_rope_head_dim")
        ropes[field] = read_parameters(table, theta, positions, True, attention_factor=1.0)
    both.finish()
    return ropes


def _write(cfg: ModelConfig, dialect: str) -> dict[str, Any]:
    a, layers = cfg.attention, cfg.num_hidden_layers
    values = write_common(cfg) | {"num_nextn_predict_layers": cfg.mtp.num_layers}
    if dialect == "released":
        usual = a.csa_ratio == CSA_RATIO and set(a.compress_ratios) <= {0, CSA_RATIO, HCA_RATIO}
        return {
            **values,
            **write_released_ropes(cfg),
            "qk_rope_head_dim": a.qk_rope_head_dim,
            "compress_ratios": [*a.compress_ratios, *[0] * cfg.mtp.num_layers],
            **({} if usual else _write_schedule(cfg)),
            "num_hash_layers": cfg.moe.num_hash_layers,
        }
    partial = a.qk_rope_head_dim / a.head_dim
    hashed = min(cfg.moe.num_hash_layers, layers)
    return {
        **values,
        **_write_schedule(cfg),
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "partial_rotary_factor": partial,
        "rope_theta": cfg.rope.theta,
        "compress_rope_theta": cfg.compress_rope.theta,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": cfg.rope.theta, "partial_rotary_factor": partial},
            "compress": _nested(cfg, partial),
        },
    }


def _write_schedule(cfg: ModelConfig) -> dict[str, Any]:
    """The kinds of layers by name, and what the names mean."""
    a = cfg.attention
    others = sorted(set(a.compress_ratios) - {0, a.csa_ratio})
    if len(others) > 1:
        raise ConfigError(f"attention.compress_ratios: has {others} beside {a.csa_ratio}; there is a name for one more")
    rates = {CSA: a.csa_ratio, HCA: others[0] if others else HCA_RATIO}
    kind_of = {0: SLIDING, **{ratio: kind for kind, ratio in rates.items()}}
    return {"layer_types": [kind_of[ratio] for ratio in a.compress_ratios], "compress_rates": rates}


def _nested(cfg: ModelConfig, partial: float) -> dict[str, Any]:
    rope = cfg.compress_rope
    values = write_parameters(rope)
    if values and rope.scaling == "yarn":
        values["attention_factor"] = rope.attention_factor
    kind = rope.scaling if values else "default"
    return {"rope_type": kind, "rope_theta": rope.theta, "partial_rotary_factor": partial, **values}


def _plan(cfg: ModelConfig, dialect: str) -> Plan:
    with torch.device("meta"):
        names = list(Model(cfg).state_dict())
    top: dict[str, Entry] = {
        f"mtp.{name}.weight": Part(f"mtp.0.{name}.weight") for name in ("enorm", "hnorm", "e_proj", "h_proj", "norm")
    }
    top |= {f"mtp.collapse.{part}": Part(f"mtp.0.hc_head_{part}") for part in ("fn", "base", "scale")}
    plan = short_names.plan(cfg, names, top)
    return plan if dialect == "released" else {name: _renamed(entry) for name, entry in plan.items()}


def _renamed(entry: Entry) -> Entry:
    """As ``transformers`` saves it: a prefix before all but the head, and other names for a norm and the collapse."""
    if not isinstance(entry, Part):
        return type(entry)(tuple(_renamed(inner) for inner in entry.entries)) if hasattr(entry, "entries") else entry
    name = entry.name
    if name.startswith("mtp.") or name == "head.weight":
        return entry
    if name.startswith("hc_head_"):
        return Part(f"model.hc_head.{name.replace('hc_head_', 'hc_')}")
    name = {"embed.weight": "embed_tokens.weight"}.get(name, name)
    return Part(f"model.{name.replace('.kv_norm.', '.norm.')}")


def ignored(cfg: ModelConfig, name: str) -> bool:
    """Copies of embedding and head beside the MTP block; all of it where the model has none."""
    if not name.startswith("mtp."):
        return name == "head.weight" and cfg.tie_word_embeddings
    copies = ("mtp.0.embed.weight", "mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")
    return not cfg.mtp.num_layers or name in copies


V4 = Family(
    "deepseek_v4",
    "DeepseekV4ForCausalLM",
    read=_read,
    write=_write,
    plan=_plan,
    ignored=ignored,
    tensor_format=lambda name, storage: short_names.tensor_format(name, storage, "fp8_e8m0"),
    storages=("bf16", "fp32", "fp8", "fp8+fp4"),
    expert_dtype_on_top=True,
)
