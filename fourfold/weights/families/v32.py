"""DeepSeek-V3.2: V3 with a lightning indexer in every layer."""

from __future__ import annotations

from typing import Any

from fourfold.config import ModelConfig
from fourfold.weights.families import hugging_names, v3
from fourfold.weights.families.base import Family
from fourfold.weights.families.fields import MOST_LAYERS, Fields


def _read(fields: Fields) -> dict[str, Any]:
    layers, dense = fields.values.get("num_hidden_layers"), fields.values.get("first_k_dense_replace", 3)
    if type(layers) is int and type(dense) is int and 0 < layers <= MOST_LAYERS:
        kinds = ["dense"] * min(dense, layers) + ["sparse"] * (layers - dense)
        fields.agree("mlp_layer_types", kinds, "first_k_dense_replace")
        fields.agree("layer_types", ["indexed_attention"] * layers, "num_hidden_layers")
    if "q_lora_rank" not in fields:
        fields.fault("q_lora_rank", "is missing: the indexer reads the query latent")
    indexer = {
        "mode": "sparse",
        "n_heads": fields.take("index_n_heads", int, 64),
        "head_dim": fields.take("index_head_dim", int, 128),
        "topk": fields.take("index_topk", int, 2048),
        "layers_per_indexer": 1,
    }
    return v3.read(fields) | {"indexer": indexer}


def _write(cfg: ModelConfig, dialect: str) -> dict[str, Any]:
    values = v3.write(cfg, dialect) | {
        "index_n_heads": cfg.indexer.n_heads,
        "index_head_dim": cfg.indexer.head_dim,
        "index_topk": cfg.indexer.topk,
    }
    if dialect == "transformers":
        dense = min(cfg.moe.first_k_dense_replace, cfg.num_hidden_layers)
        values["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (cfg.num_hidden_layers - dense)
        values["layer_types"] = ["indexed_attention"] * cfg.num_hidden_layers
    return values


V32 = Family(
    "deepseek_v32",
    "DeepseekV32ForCausalLM",
    read=_read,
    write=_write,
    plan=v3.plan,
    ignored=hugging_names.ignored,
    tensor_format=lambda name, storage: hugging_names.tensor_format(name, "fp8_ue8m0"),
    storages=("bf16", "fp32", "fp8"),
)
