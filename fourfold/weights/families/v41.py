"""DeepSeek-V4.1: entries and selections shared by layers, Engram, a drafter, and an image tower.

Its config.json has a table for the text model and one for the tower. There is no class of it in transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fourfold.config import EngramConfig, ModelConfig
from fourfold.config_media import VisionConfig
from fourfold.counts import engram_primes
from fourfold.fields import ConfigError, from_dict
from fourfold.model.transformer import Model
from fourfold.weights.families import short_names, v4
from fourfold.weights.families.base import Family
from fourfold.weights.families.entries import Entry, Part, Plan, Stack
from fourfold.weights.families.fields import GENERIC, Fields

VISION = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "max_image_tokens",
    "min_pixels",
)
SOURCES = ("kv_source_layer_ids", "index_source_layer_ids")
CANDIDATES = ("candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size")
MOST_TABLES, MOST_ROWS = 4096, 1 << 40
ENGRAM = {  # released name -> ours
    "engram_max_ngram_size": "max_ngram",
    "engram_n_heads": "n_heads",
    "engram_head_dim": "head_dim",
    "engram_vocab_size": "vocab_size",
    "engram_compressed_vocab_size": "compressed_vocab_size",
    "engram_pad_token_id": "pad_token_id",
}
DRAFTER = {
    "num_nextn_predict_layers": "num_layers",
    "dspark_block_size": "block_size",
    "dspark_noise_token_id": "noise_token_id",
    "dspark_markov_rank": "markov_rank",
    "dspark_n_routed_experts": "n_routed_experts",
    "dspark_num_experts_per_tok": "num_experts_per_tok",
}


def _read(fields: Fields) -> dict[str, Any]:
    text = fields.table("text_config")
    text.expect("model_type", "deepseek_v41_text")
    cfg = v4.read_common(text)
    text.expect("gate_temp", 1.0)
    text.expect("num_hash_layers", 0)
    cfg["moe"]["num_hash_layers"] = 0
    cfg["drafter"] = drafter = _read_drafter(text)
    cfg["engram"] = _read_engram(text)
    ratios = v4.read_ratios(text, cfg["num_hidden_layers"], drafter["num_layers"])
    if ratios is None:
        text.fault("compress_ratios", "is missing")
    cfg["attention"] |= {
        "kind": "csa2",
        "qk_rope_head_dim": text.take("qk_rope_head_dim", int),
        "compress_ratios": ratios or (),
        **{name: text.items(name, int) for name in SOURCES},
        "candidate_source_layer_id": text.take("candidate_source_layer_id", int, -1),
        "candidate_topk_blocks": text.take("candidate_topk_blocks", int, 2048),
        "candidate_block_size": text.take("candidate_block_size", int, 8),
    }
    cfg |= v4.read_released_ropes(text, cfg["max_position_embeddings"])
    cfg["residual"]["kind"] = "mhc_single_pass"
    cfg["media"] = _read_media(fields, text)
    text.ignore(GENERIC)
    text.finish()
    fields.agree("tie_word_embeddings", cfg["tie_word_embeddings"], "text_config")
    return cfg


def _read_engram(text: Fields) -> dict[str, Any]:
    layers = text.items("engram_layer_ids", int, [])
    if not layers:
        text.ignore([*ENGRAM, "engram_num_embeddings", "engram_layer_ids"])
        return {}
    engram = {ours: text.take(name, int) for name, ours in ENGRAM.items()} | {"layer_ids": layers}
    text.ignore(["engram_num_embeddings"])
    tables = len(layers) * engram["max_ngram"] * engram["n_heads"]
    if tables > MOST_TABLES or engram["vocab_size"] > MOST_ROWS:
        text.fault("engram_n_heads", f"makes {tables} tables from {engram['vocab_size']} rows on, too many to search")
        return {}
    stated = text.values.get("engram_num_embeddings")
    try:
        rows = engram_rows(from_dict(EngramConfig, engram))
    except ConfigError as error:
        text.fault("engram_layer_ids", str(error))
        return {}
    if stated is not None and stated != rows:
        text.fault("engram_num_embeddings", f"is {stated}, the primes from engram_vocab_size on make it {rows}")
    return engram


def engram_rows(engram: EngramConfig) -> list[int]:
    """Rows of the table of each Engram layer."""
    return [sum(prime for order in layer for prime in order) for layer in engram_primes(engram)]


def _read_drafter(text: Fields) -> dict[str, Any]:
    if not text.values.get("num_nextn_predict_layers"):
        text.ignore([*DRAFTER, "dspark_target_layer_ids"])
        return {"num_layers": 0}
    drafter = {ours: text.take(name, int) for name, ours in DRAFTER.items()}
    return drafter | {"target_layer_ids": text.items("dspark_target_layer_ids", int)}


def _read_media(fields: Fields, text: Fields) -> dict[str, Any]:
    image_id = fields.take("image_token_id", int, text.take("image_token_id", int, None))
    if "vision_config" not in fields:
        fields.ignore(["vision_config"])
        return {}
    vision = fields.table("vision_config")
    vision.expect("model_type", "deepseek_v41_vision")
    vision.expect("max_wh_ratio")
    vision.expect("hidden_act", "silu")
    tower = {name: vision.take(name, int) for name in VISION}
    tower["downsample"] = vision.take("downsample_ratio", int, vision.take("downsample", int, 3))
    tower["rope_theta"] = vision.take("rope_theta", float, 10000.0)
    tower["rms_norm_eps"] = vision.take("rms_norm_eps", float, 1e-6)
    tower["image_token_id"] = image_id
    if image_id is None:
        fields.fault("image_token_id", "is missing")
    vision.ignore(GENERIC)
    vision.finish()
    return {"vision": tower}


def _write(cfg: ModelConfig, dialect: str) -> dict[str, Any]:
    a, drafter = cfg.attention, cfg.drafter
    text = {
        "model_type": "deepseek_v41_text",
        **v4.write_common(cfg),
        **v4.write_released_ropes(cfg),
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "compress_ratios": [*a.compress_ratios, *[0] * drafter.num_layers],
        **{name: list(getattr(a, name)) for name in SOURCES},
        **{name: getattr(a, name) for name in CANDIDATES},
        "num_nextn_predict_layers": drafter.num_layers,
        "engram_layer_ids": list(cfg.engram.layer_ids),
    }
    if drafter.num_layers:
        text |= {name: getattr(drafter, ours) for name, ours in DRAFTER.items()}
        text["dspark_target_layer_ids"] = list(drafter.target_layer_ids)
    if cfg.engram.layer_ids:
        engram = cfg.engram
        if not engram.compressed_vocab_size:
            raise ConfigError("engram.compressed_vocab_size: is 0; it must be what the tokenizer gives")
        text |= {name: getattr(engram, ours) for name, ours in ENGRAM.items()}
        text["engram_num_embeddings"] = engram_rows(engram)
    values: dict[str, Any] = {"text_config": text, "tie_word_embeddings": cfg.tie_word_embeddings}
    if cfg.media.vision is None:
        return values
    return values | {
        "vision_config": {"model_type": "deepseek_v41_vision", **_write_vision(cfg.media.vision)},
        "image_token_id": cfg.media.vision.image_token_id,
    }


def _write_vision(vision: VisionConfig) -> dict[str, Any]:
    values = dataclasses.asdict(vision)
    del values["image_token_id"]
    return values | {"downsample_ratio": values.pop("downsample"), "max_wh_ratio": None}


def _plan(cfg: ModelConfig, dialect: str) -> Plan:
    with torch.device("meta"):
        state = Model(cfg).state_dict()
    top: dict[str, Entry] = {}
    for name in state:
        if name.startswith("media.tower."):
            disk = "vision." + name.removeprefix("media.tower.").replace("patch_embed.", "patch_embed.proj.")
            top[name] = Part(disk)
        elif name.startswith("media.aligner."):
            top[name] = Part(name.removeprefix("media."))
    top["media.image_delimiters"] = Stack(tuple(Part(f"image_{mark}") for mark in ("start", "newline", "end")))
    for layer in cfg.engram.layer_ids:
        top |= _engram(f"engrams.{layer}.", f"layers.{layer}.engram.", cfg)
    if count := cfg.drafter.num_layers:
        first, last = "mtp.0.", f"mtp.{count - 1}."
        top |= {f"drafter.{name}.weight": Part(f"{first}{name}.weight") for name in ("main_proj", "main_norm")}
        top |= {
            "drafter.norm.weight": Part(f"{last}norm.weight"),
            "drafter.markov_embed.weight": Part(f"{last}markov_head.embed.weight"),
            "drafter.markov_head.weight": Part(f"{last}markov_head.head.weight"),
            "drafter.confidence_proj.weight": Part(f"{last}confidence_head.proj.weight"),
        }
    return short_names.plan(cfg, state, top)


def _engram(ours: str, disk: str, cfg: ModelConfig) -> dict[str, Entry]:
    """One matrix on disk gives the keys of all streams and, below them, the value."""
    keys, d = cfg.residual.streams * cfg.hidden_size, cfg.hidden_size
    return {
        f"{ours}embed.weight": Part(f"{disk}embed.weight"),
        f"{ours}key_proj.weight": Part(f"{disk}wkv.weight", 0, 0, keys),
        f"{ours}value_proj.weight": Part(f"{disk}wkv.weight", 0, keys, keys + d),
        f"{ours}q_weight": Part(f"{disk}q_weight"),
        f"{ours}k_weight": Part(f"{disk}k_weight"),
    }


def ignored(cfg: ModelConfig, name: str) -> bool:
    """A delimiter that nothing uses, the drafter's bias for images, which it never reads, and an absent drafter."""
    if name.startswith("mtp."):
        copies = name.endswith((".embed.weight", ".head.weight")) and "markov_head" not in name
        return not cfg.drafter.num_layers or name.endswith("ffn.gate.bias_vl") or copies
    return name == "image_pad" or (name == "head.weight" and cfg.tie_word_embeddings)


def _tensor_format(name: str, storage: str) -> str:
    if name.endswith("engram.embed.weight"):
        return "fp8_rows"
    if name.startswith("vision."):
        return "bf16"
    return short_names.tensor_format(name, storage, "fp8_e8m0_32")


V41 = Family(
    "deepseek_v41",
    "DeepseekV41ForCausalLM",
    read=_read,
    write=_write,
    plan=_plan,
    ignored=ignored,
    tensor_format=_tensor_format,
    storages=("bf16", "fp32", "fp8", "fp8+fp4"),
    dialects=("released",),
)
