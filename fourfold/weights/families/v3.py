"""DeepSeek-V3, R1 and V3.1: sigmoid routers with a selection bias, and one layer of multi-token prediction."""

from __future__ import annotations

from typing import Any

from fourfold.config import ModelConfig
from fourfold.weights.families import hugging_names, latent
from fourfold.weights.families.base import Family
from fourfold.weights.families.entries import Plan
from fourfold.weights.families.fields import Fields


def read(fields: Fields) -> dict[str, Any]:
    mtp = latent.read_mtp(fields)
    return latent.read(fields, "sigmoid", latent.read_groups(fields)) | {"mtp": mtp}


def write(cfg: ModelConfig, dialect: str) -> dict[str, Any]:
    return latent.write(cfg, dialect) | {"num_nextn_predict_layers": cfg.mtp.num_layers}


def plan(cfg: ModelConfig, dialect: str) -> Plan:
    return hugging_names.plan(cfg, router_bias=True) | hugging_names.mtp(cfg)


V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    read=read,
    write=write,
    plan=plan,
    ignored=hugging_names.ignored,
    tensor_format=lambda name, storage: hugging_names.tensor_format(name, "fp8"),
    storages=("bf16", "fp32", "fp8"),
)
