"""What a family of released checkpoints is: translations of its config and the places of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fourfold.config import (
    AttentionConfig,
    DrafterConfig,
    EngramConfig,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    ResidualConfig,
    RopeConfig,
)
from fourfold.config_media import MediaConfig
from fourfold.fields import ConfigError
from fourfold.weights.families.entries import Plan
from fourfold.weights.families.fields import GENERIC, Fields
from fourfold.weights.formats import FormatError, weight_block_size

DIALECTS = ("released", "transformers")
MOST_NAMED = 8  # fields that one error lists

# Stay float32 in a model of any dtype: small, and what they steer amplifies their rounding.
FLOAT32 = (
    "_residual.fn",
    "_residual.base",
    "_residual.scale",
    "collapse.fn",
    "collapse.base",
    "collapse.scale",
    ".sinks",
    ".position_bias",
)


@dataclass(frozen=True)
class Family:
    """One model_type of released checkpoints.

    read: fields of a config.json to those of a ModelConfig; faults go into the fields.
    write: a ModelConfig that the family can express to the fields of a config.json, in a dialect.
    plan: our tensor names to their places on disk, in a dialect.
    ignored: whether a tensor on disk is no part of the model, by name.
    tensor_format: the key of ``formats.FORMATS`` for a disk name under a storage that is not bf16 or fp32.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig, str], dict[str, Any]]
    plan: Callable[[ModelConfig, str], Plan]
    ignored: Callable[[ModelConfig, str], bool] = lambda cfg, name: False
    tensor_format: Callable[[str, str], str] = lambda name, storage: "bf16"
    storages: tuple[str, ...] = ("bf16", "fp32")
    dialects: tuple[str, ...] = DIALECTS
    expert_dtype_on_top: bool = False  # of config.json, not in its quantization_config

    def config(self, values: dict[str, Any]) -> ModelConfig:
        """A config.json to a ModelConfig. Raises ConfigError that lists every fault."""
        fields = Fields(values)
        fields.expect("model_type", self.model_type)
        _check_quantization(fields)
        cfg = self.read(fields)
        fields.ignore(GENERIC)
        fields.finish()
        fields.check()
        return ModelConfig.from_dict(cfg)

    def to_config(self, cfg: ModelConfig, dialect: str) -> dict[str, Any]:
        """A ModelConfig to a config.json. Raises ConfigError that names the fields the family cannot express."""
        if dialect not in self.dialects:
            raise ConfigError(f"dialect: is {dialect!r}; {self.model_type} has {', '.join(self.dialects)}")
        values = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.write(cfg, dialect),
        }
        try:
            understood = self.config(values)
        except ConfigError as error:
            raise ConfigError(f"{self.model_type} cannot express this model: {error}") from None
        wanted, got = _flat(canonical(cfg).to_dict()), _flat(canonical(understood).to_dict())
        differing = [
            f"{name} = {value!r} (it has {got.get(name)!r})" for name, value in wanted.items() if value != got.get(name)
        ]
        if len(differing) > MOST_NAMED:
            differing[MOST_NAMED:] = [f"and {len(differing) - MOST_NAMED} more fields"]
        if differing:
            raise ConfigError(f"{self.model_type} cannot express {', '.join(differing)}")
        return values


def canonical(cfg: ModelConfig) -> ModelConfig:
    """``cfg`` with every field that its composition does not use at its default: equal models compare equal."""
    defaults = ModelConfig(vocab_size=1, hidden_size=1, num_hidden_layers=1, intermediate_size=1)
    change: dict[str, Any] = {"initializer_range": defaults.initializer_range, "moe.bias_update_speed": 0.0}
    a = cfg.attention
    unused = set(AttentionConfig.__dataclass_fields__) - {"kind", "num_attention_heads"}
    unused -= {
        "mla": {"q_lora_rank", "qk_rope_head_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"},
        "gqa": {"head_dim", "num_key_value_heads", "qkv_bias"},
        "compressed": {"q_lora_rank", "qk_rope_head_dim", "head_dim", *_SHARED_KV, "csa_ratio"},
        "csa2": {"q_lora_rank", "qk_rope_head_dim", "head_dim", *_SHARED_KV, *_CSA2},
    }[a.kind]
    change |= _defaults("attention", AttentionConfig, unused)
    change["rope"] = dataclasses.asdict(_canonical_rope(cfg.rope))
    compress_rope = cfg.compress_rope if a.is_compressed else RopeConfig()
    change["compress_rope"] = dataclasses.asdict(_canonical_rope(compress_rope))
    if cfg.indexer.mode == "off":
        change["indexer"] = dataclasses.asdict(IndexerConfig())
    elif a.kind != "mla":
        change |= {"indexer.layers_per_indexer": 1, "indexer.first_layer": 0}
    if not cfg.moe.n_routed_experts:
        change["moe"] = dataclasses.asdict(MoEConfig(swiglu_limit=cfg.moe.swiglu_limit))
        change.pop("moe.bias_update_speed")
    else:
        change["moe.first_k_dense_replace"] = min(cfg.moe.first_k_dense_replace, cfg.num_hidden_layers)
        if cfg.moe.first_k_dense_replace == 0:
            change["intermediate_size"] = 1
        if cfg.moe.n_group == 1:
            change["moe.topk_method"] = "greedy"  # without groups all methods are
    if cfg.residual.kind == "plain":
        change["residual"] = dataclasses.asdict(ResidualConfig())
    if not cfg.engram.layer_ids:
        change["engram"] = dataclasses.asdict(EngramConfig())
    if not cfg.mtp.num_layers:
        change["mtp"] = dataclasses.asdict(MTPConfig())
    if not cfg.drafter.num_layers:
        change["drafter"] = dataclasses.asdict(DrafterConfig())
    if not cfg.media.embedded:
        change["media.hidden_size"] = MediaConfig().hidden_size
    return cfg.replace(**change)


def _check_quantization(fields: Fields) -> None:
    """Number formats are read off the tensors; a config that promises one we do not read is refused here."""
    if "quantization_config" not in fields:
        return
    table = fields.table("quantization_config")
    table.expect("quant_method", "fp8")
    table.expect("fmt", "e4m3")
    table.expect("scale_fmt", "ue8m0", "float")
    table.expect("expert_dtype", "fp4", "fp8")
    try:
        weight_block_size(table.values)
    except FormatError as error:
        fields.faults.append(str(error))


_SHARED_KV = ("o_groups", "o_lora_rank", "sliding_window", "compress_ratios")
_CSA2 = (
    "kv_source_layer_ids",
    "index_source_layer_ids",
    "candidate_source_layer_id",
    "candidate_topk_blocks",
    "candidate_block_size",
)


def _defaults(prefix: str, cls: type, names: set[str]) -> dict[str, Any]:
    return {f"{prefix}.{name}": cls.__dataclass_fields__[name].default for name in names}


def _canonical_rope(rope: RopeConfig) -> RopeConfig:
    if rope.factor == 1:
        return RopeConfig(theta=rope.theta)
    used = {"yarn": {"low_freq_factor", "high_freq_factor"}, "linear": set(RopeConfig.__dataclass_fields__)}
    unused = used.get(rope.scaling, {"beta_fast", "beta_slow", "mscale_all_dim", "attention_factor"})
    unused = unused - {"theta", "scaling", "factor"}
    defaults = {name: RopeConfig.__dataclass_fields__[name].default for name in unused}
    return dataclasses.replace(rope, **defaults)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
