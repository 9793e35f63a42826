"""Directories as the models were released, written by hand: names, formats and configuration fields.

Nothing here uses the package. Each writer stores the judge's tensors in the released number formats and gives the
judge what these formats hold, so that both sides compute with the same values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.parity import reference

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
Stored = tuple[dict[str, Tensor], Tensor]  # suffix -> tensor in the file, and the values that they stand for
Row = tuple[str, Tensor, str]  # name in the file, the judge's tensor, its format


def plain(dtype: torch.dtype) -> Callable[[Tensor], Stored]:
    return lambda w: ({"": w.to(dtype)}, w.to(dtype).to(w.dtype))


def _spread(scale: Tensor, shape: torch.Size, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def _block_maxima(w: Tensor, rows: int, columns: int) -> Tensor:
    n, k = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
    padded = torch.zeros(n * rows, k * columns)
    padded[: w.shape[0], : w.shape[1]] = w.abs()
    return padded.view(n, rows, k, columns).amax((1, 3)).clamp_min(1e-4)


def fp8(w: Tensor) -> Stored:
    """``weight`` e4m3 and ``weight_scale_inv`` float32, one for 128 x 128; it multiplies."""
    scale = _block_maxima(w, 128, 128) / 448
    wide = _spread(scale, w.shape, 128, 128)
    stored = (w / wide).to(torch.float8_e4m3fn)
    return {"": stored, "_scale_inv": scale}, stored.float() * wide


def fp8_divided(w: Tensor) -> Stored:
    """The same file, misread: what the name of the scale suggests."""
    files, _ = fp8(w)
    return files, files[""].float() / _spread(files["_scale_inv"], w.shape, 128, 128)


def _exponent(scale: Tensor) -> Tensor:
    """A power of two as its e8m0 byte."""
    return (scale.log2().round() + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def fp8_e8m0(w: Tensor) -> Stored:
    """``weight`` e4m3 and ``scale`` e8m0, one for 128 x 128."""
    scale = torch.exp2((_block_maxima(w, 128, 128) / 448).log2().ceil())
    wide = _spread(scale, w.shape, 128, 128)
    stored = (w / wide).to(torch.float8_e4m3fn)
    return {"": stored, "scale": _exponent(scale)}, stored.float() * wide


def fp4(w: Tensor) -> Stored:
    """``weight`` of two E2M1 values to the byte, the even one low, and ``scale`` e8m0, one for 32 of a row."""
    scale = torch.exp2((_block_maxima(w, 1, 32) / 6).log2().ceil())
    wide = _spread(scale, w.shape, 1, 32)
    code = ((w / wide).abs()[..., None] - E2M1).abs().argmin(-1)
    values = E2M1[code] * w.sign() * wide
    nibbles = (code + 8 * (w < 0)).to(torch.uint8)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return {"": packed.view(torch.int8), "scale": _exponent(scale)}, values


FORMATS: dict[str, Callable[[Tensor], Stored]] = {
    "bf16": plain(torch.bfloat16),
    "f32": plain(torch.float32),
    "i64": plain(torch.int64),
    "fp8": fp8,
    "fp8 divided": fp8_divided,
    "fp8 e8m0": fp8_e8m0,
    "fp4": fp4,
}


@torch.no_grad()
def write(directory: Path, rows: list[Row], config: dict[str, Any], shards: int = 2) -> None:
    """The files, and into the judge's tensors what the files hold."""
    files: dict[str, Tensor] = {}
    for name, tensor, kind in rows:
        parts, values = FORMATS[kind](tensor)
        tensor.copy_(values)
        for suffix, part in parts.items():
            files[name.removesuffix("weight") + suffix if suffix == "scale" else name + suffix] = part.contiguous()
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(list(files.items())[shard::shards])  # a weight and its scale may lie in different files
        save_file(own, directory / file)
        index |= dict.fromkeys(own, file)
    total = sum(t.numel() * t.element_size() for t in files.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    (directory / "config.json").write_text(json.dumps(config))
    reference.write_tokenizer(directory)


def latent_rows(model: PreTrainedModel, dense: str) -> list[Row]:
    """V2, V3 and V3.2; ``dense``: the format of the matrices."""
    w = model.state_dict()
    high = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "weights_proj")
    rows: list[Row] = []
    for name, tensor in w.items():
        if ".experts." not in name:
            kind = "f32" if name.endswith("bias") else "bf16" if any(part in name for part in high) else dense
            rows.append((name, tensor, kind))
    for layer in range(model.config.num_hidden_layers):
        at = f"model.layers.{layer}.mlp."
        for expert, *parts in experts(w, at):
            named = zip(("gate", "up", "down"), parts, strict=True)
            rows += [(f"{at}experts.{expert}.{n}_proj.weight", part, dense) for n, part in named]
    return rows


def experts(w: dict[str, Tensor], at: str) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each routed expert of a layer, if it has any: gate, up and down, to be written to."""
    if at + "experts.down_proj" in w:
        for expert, down in enumerate(w[at + "experts.down_proj"]):
            yield expert, *w[at + "experts.gate_up_proj"][expert].chunk(2), down


def latent_config(config: PreTrainedConfig, **more: Any) -> dict[str, Any]:
    """The fields of a released config.json of V2, V3 and V3.2."""
    same = (
        "model_type vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads n_shared_experts n_routed_experts routed_scaling_factor kv_lora_rank "
        "q_lora_rank qk_rope_head_dim v_head_dim qk_nope_head_dim n_group topk_group num_experts_per_tok "
        "first_k_dense_replace norm_topk_prob max_position_embeddings rms_norm_eps bos_token_id eos_token_id"
    )
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    return {
        "architectures": [type(config).__name__.replace("Config", "ForCausalLM")],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.Config"},
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "moe_layer_freq": 1,
        "pretraining_tp": 1,
        "rope_scaling": {"type": "yarn", **rope} if kind == "yarn" else None,
        "rope_theta": int(theta),
        "seq_aux": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        **{name: getattr(config, name) for name in same.split()},
        **more,
    }


def mtp_rows(w: dict[str, Tensor], layer: int, embedding: Tensor, head: Tensor) -> list[Row]:
    """V3's prediction layer, out of the weights of the judge's ``MtpLayer``, with the copies that nobody needs."""
    at = f"model.layers.{layer}."
    rows: list[Row] = [
        (at + "embed_tokens.weight", embedding.clone(), "bf16"),
        (at + "shared_head.head.weight", head.clone(), "bf16"),
    ]
    for name, tensor in w.items():
        if ".experts." in name:
            continue
        own = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        rows.append((at + own, tensor, "f32" if name.endswith("bias") else "bf16"))
    for expert, *parts in experts(w, "mtp_block.mlp."):
        named = zip(("gate", "up", "down"), parts, strict=True)
        rows += [(f"{at}mlp.experts.{expert}.{n}_proj.weight", part, "bf16") for n, part in named]
    return rows


# The released name of each of the judge's, and its format.
V4_TOP = {
    "model.embed_tokens.weight": ("embed.weight", "bf16"),
    "lm_head.weight": ("head.weight", "bf16"),
    "model.norm.weight": ("norm.weight", "bf16"),
    "model.hc_head.hc_fn": ("hc_head_fn", "f32"),
    "model.hc_head.hc_base": ("hc_head_base", "f32"),
    "model.hc_head.hc_scale": ("hc_head_scale", "f32"),
}
V4_LAYER = {
    "input_layernorm.weight": ("attn_norm.weight", "bf16"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", "bf16"),
    **{f"{site}_hc.{n}": (f"hc_{site}_{n}", "f32") for site in ("attn", "ffn") for n in ("fn", "base", "scale")},
    "self_attn.sinks": ("attn.attn_sink", "f32"),
    "self_attn.q_a_proj.weight": ("attn.wq_a.weight", "fp8 e8m0"),
    "self_attn.q_a_norm.weight": ("attn.q_norm.weight", "bf16"),
    "self_attn.q_b_proj.weight": ("attn.wq_b.weight", "fp8 e8m0"),
    "self_attn.kv_proj.weight": ("attn.wkv.weight", "fp8 e8m0"),
    "self_attn.kv_norm.weight": ("attn.kv_norm.weight", "bf16"),
    "self_attn.o_a_proj.weight": ("attn.wo_a.weight", "fp8 e8m0"),
    "self_attn.o_b_proj.weight": ("attn.wo_b.weight", "fp8 e8m0"),
    "self_attn.compressor.kv_proj.weight": ("attn.compressor.wkv.weight", "bf16"),
    "self_attn.compressor.gate_proj.weight": ("attn.compressor.wgate.weight", "bf16"),
    "self_attn.compressor.position_bias": ("attn.compressor.ape", "f32"),
    "self_attn.compressor.kv_norm.weight": ("attn.compressor.norm.weight", "bf16"),
    "self_attn.compressor.indexer.q_b_proj.weight": ("attn.indexer.wq_b.weight", "fp8 e8m0"),
    "self_attn.compressor.indexer.scorer.weights_proj.weight": ("attn.indexer.weights_proj.weight", "bf16"),
    "self_attn.compressor.indexer.kv_proj.weight": ("attn.indexer.compressor.wkv.weight", "bf16"),
    "self_attn.compressor.indexer.gate_proj.weight": ("attn.indexer.compressor.wgate.weight", "bf16"),
    "self_attn.compressor.indexer.position_bias": ("attn.indexer.compressor.ape", "f32"),
    "self_attn.compressor.indexer.kv_norm.weight": ("attn.indexer.compressor.norm.weight", "bf16"),
    "mlp.gate.weight": ("ffn.gate.weight", "bf16"),
    "mlp.gate.e_score_correction_bias": ("ffn.gate.bias", "f32"),
    "mlp.gate.tid2eid": ("ffn.gate.tid2eid", "i64"),
    "mlp.shared_experts.gate_proj.weight": ("ffn.shared_experts.w1.weight", "fp8 e8m0"),
    "mlp.shared_experts.down_proj.weight": ("ffn.shared_experts.w2.weight", "fp8 e8m0"),
    "mlp.shared_experts.up_proj.weight": ("ffn.shared_experts.w3.weight", "fp8 e8m0"),
}


def v4_rows(w: dict[str, Tensor]) -> list[Row]:
    """All tensors of the trunk. w: the judge's ``state_dict``."""
    rows: list[Row] = [(name, w[theirs], kind) for theirs, (name, kind) in V4_TOP.items()]
    for layer in range(100):
        rows += v4_block_rows(w, f"model.layers.{layer}.", f"layers.{layer}.")
    assert len(rows) > len(V4_TOP)
    return rows


def v4_block_rows(w: dict[str, Tensor], theirs: str, at: str) -> list[Row]:
    rows = [(at + name, w[theirs + own], kind) for own, (name, kind) in V4_LAYER.items() if theirs + own in w]
    for expert, *parts in experts(w, theirs + "mlp."):
        named = zip(("w1", "w3", "w2"), parts, strict=True)
        rows += [(f"{at}ffn.experts.{expert}.{n}.weight", part, "fp4") for n, part in named]
    return rows


def v4_config(config: PreTrainedConfig, mtp: int) -> dict[str, Any]:
    """The fields of a released config.json of V4."""
    same = (
        "model_type vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads head_dim "
        "qk_rope_head_dim q_lora_rank o_groups o_lora_rank n_routed_experts n_shared_experts num_experts_per_tok "
        "routed_scaling_factor scoring_func norm_topk_prob index_n_heads index_head_dim index_topk sliding_window "
        "compress_rope_theta max_position_embeddings hc_mult hc_sinkhorn_iters hc_eps swiglu_limit rms_norm_eps "
        "bos_token_id eos_token_id"
    )
    yarn = {k: v for k, v in config.rope_parameters["compress"].items() if k.startswith(("factor", "beta", "original"))}
    kinds = {reference.SLIDING: 0, **config.compress_rates}
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "compress_ratios": [kinds[kind] for kind in config.layer_types] + [0] * mtp,
        "expert_dtype": "fp4",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "num_hash_layers": config.mlp_layer_types.count("hash_moe"),
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": mtp,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rope_scaling": {"type": "yarn", **yarn} if yarn else None,
        "rope_theta": config.rope_parameters["main"]["rope_theta"],
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        **{name: getattr(config, name) for name in same.split()},
    }
