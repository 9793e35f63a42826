"""Files as they were released load, and compute what the judge computes with the values they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from fourfold.weights.checkpoint import load_model
from tests.parity import reference, released
from tests.parity.reference import BAR, CSA, HCA, SLIDING
from tests.parity.worst import difference

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# Larger than one block of scales, and of no round number of them.
LATENT: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 144,
    "intermediate_size": 264,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 130,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 1280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": YARN,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def latent(family: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The judge, and what its released config.json has beside the common fields."""
    if family.startswith("deepseek_v2"):
        more: dict[str, Any] = {"topk_method": "group_limited_greedy", "norm_topk_prob": False}
        if family == "deepseek_v2_lite":
            more |= {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}
        model = reference.build(DeepseekV2ForCausalLM, DeepseekV2Config(**LATENT | more), 1)
        return model, {**more, "scoring_func": "softmax"}
    more = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "quantization_config": FP8}
    if family == "deepseek_v3":
        values = {**LATENT, "norm_topk_prob": True, "num_nextn_predict_layers": 0}
        model = reference.build(DeepseekV3ForCausalLM, DeepseekV3Config(**values), 2)
        return model, {**more, "num_nextn_predict_layers": 0}
    index = {"index_n_heads": 32, "index_head_dim": 12, "index_topk": 9}
    model = reference.build(DeepseekV32ForCausalLM, DeepseekV32Config(**LATENT, **index), 3)
    more["quantization_config"] = {**FP8, "scale_fmt": "ue8m0"}
    return model, {**more, **index}


def both(model: PreTrainedModel, directory: Path, length: int = reference.LENGTH) -> tuple[Tensor, Tensor]:
    """Logits of ours and of the judge."""
    ids = reference.tokens(model.config, 5, length)
    expected = reference.logits(model, ids)
    assert 1 < expected.abs().max() < 8
    return reference.our_logits(load_model(directory)[0], ids), expected


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("deepseek_v2", "bf16"),
        ("deepseek_v2_lite", "bf16"),
        ("deepseek_v3", "fp8"),
        ("deepseek_v3", "bf16"),
        ("deepseek_v3", "f32"),
        ("deepseek_v32", "fp8"),
    ],
)
def test_latent_attention(family: str, dense: str) -> None:
    model, more = latent(family)
    directory = reference.new_directory()
    released.write(directory, released.latent_rows(model, dense), released.latent_config(model.config, **more))
    assert difference(f"{family} released {dense}", *both(model, directory)) <= BAR


LLAMA: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
OLD = {"attention_bias": False, "hidden_act": "silu", "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True}
# What the judge is told, and what the released config.json says instead.
LLAMA_TYPES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        LlamaForCausalLM,
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {**OLD, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False},
    ),
    "llama of old": (
        LlamaForCausalLM,
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {**OLD, "rms_norm_eps": 1e-6, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama distilled": (
        LlamaForCausalLM,
        {"rms_norm_eps": 1e-5, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        {**OLD, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "mlp_bias": False},
    ),
    "qwen2 distilled": (
        Qwen2ForCausalLM,
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        {
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 21,
            "use_mrope": False,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
        },
    ),
}


@pytest.mark.parametrize("name", LLAMA_TYPES)
def test_llama_type(name: str) -> None:
    model_class, told, more = LLAMA_TYPES[name]
    model = reference.build(model_class, model_class.config_class(**LLAMA, **told), 6)
    directory = reference.new_directory()
    rows = [(tensor_name, w, "bf16") for tensor_name, w in model.state_dict().items()]
    config = {
        "model_type": name.split()[0],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0",
        **LLAMA,
        **more,
    }
    released.write(directory, rows, config)
    assert difference(f"{name} released", *both(model, directory)) <= BAR


def test_moe_16b() -> None:
    """The first mixture of experts, ``deepseek``: the judge's Llama with the judge's routed layers of V2."""
    experts = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
    layers = DeepseekV2Config(hidden_size=32, num_attention_heads=4, **experts, topk_method="greedy")
    layers._experts_implementation = "eager"
    config = LlamaConfig(**LLAMA, head_dim=8, rms_norm_eps=1e-6)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).float().eval()
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(layers)
    reference.randomise(model, torch.Generator().manual_seed(7))
    directory = reference.new_directory()
    told = {
        **OLD,
        **LLAMA,
        **experts,
        "model_type": "deepseek",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "seq_aux": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    released.write(directory, released.latent_rows(model, "bf16"), told)
    assert difference("deepseek released", *both(model, directory)) <= BAR


def test_the_scale_called_inverse_multiplies() -> None:
    """Divided by, as its name says, it would give another model."""
    model, more = latent("deepseek_v3")
    directory = reference.new_directory()
    rows = released.latent_rows(model, "fp8 divided")
    released.write(directory, rows, released.latent_config(model.config, **more))
    ids = reference.tokens(model.config, 5)
    apart = (reference.our_logits(load_model(directory)[0], ids) - reference.logits(model, ids)).abs()
    assert not apart.max() < 100 * BAR  # or they are NaN


def v4(experts: int = 6) -> PreTrainedModel:
    config = DeepseekV4Config(
        vocab_size=272,
        hidden_size=160,  # more than one block of either kind of scale
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=48,
        qk_rope_head_dim=8,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=20,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        num_hash_layers=2,
        swiglu_limit=1.0,
        index_n_heads=32,
        index_head_dim=16,
        index_topk=9,
        layer_types=[SLIDING, HCA, CSA, HCA],
        compress_rates={CSA: 4, HCA: 128},
        sliding_window=12,
        hc_mult=4,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_scaling={
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    return reference.build(DeepseekV4ForCausalLM, config, 4)


def test_v4() -> None:
    """fp4 experts, fp8 matrices, e8m0 scales of both; long enough for two entries of 128 positions."""
    model = v4()
    directory = reference.new_directory()
    released.write(directory, released.v4_rows(model.state_dict()), released.v4_config(model.config, mtp=0), shards=3)
    with safe_open(directory / "model-00001-of-00003.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} >= {"I8", "F8_E8M0", "BF16", "F32"}
    assert difference("deepseek_v4 released", *both(model, directory, 270)) <= BAR


def test_v4_base_has_its_experts_in_fp8() -> None:
    model = v4()
    directory = reference.new_directory()
    rows = [(name, w, "fp8 e8m0" if kind == "fp4" else kind) for name, w, kind in released.v4_rows(model.state_dict())]
    config = released.v4_config(model.config, mtp=0) | {"expert_dtype": "fp8"}
    released.write(directory, rows, config)
    assert difference("deepseek_v4 released base", *both(model, directory, 150)) <= BAR


@pytest.mark.parametrize("swap", ["nibbles", "halves", "exponent"])
def test_v4_formats_misread_are_seen(swap: str) -> None:
    """The high nibble first, w3 before w1, or a scale off by one power of two: each is another model."""
    model = v4()
    directory = reference.new_directory()
    rows = released.v4_rows(model.state_dict())
    released.write(directory, rows, released.v4_config(model.config, mtp=0))
    for _, tensor, kind in rows:
        if kind != "fp4":
            continue
        if swap == "nibbles":
            tensor.copy_(tensor.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
        elif swap == "exponent":
            tensor.mul_(2)
    if swap == "halves":
        for name, tensor in model.state_dict().items():
            if name.endswith("gate_up_proj"):
                tensor.copy_(torch.cat(tensor.chunk(2, 1)[::-1], 1))
    got, expected = both(model, directory)
    assert (got - expected).abs().max() > 100 * BAR


def test_random_ids_of_hash_layers_survive() -> None:
    """int64 tables stay whole numbers, whatever dtype the model is loaded in."""
    model = v4()
    directory = reference.new_directory()
    released.write(directory, released.v4_rows(model.state_dict()), released.v4_config(model.config, mtp=0))
    loaded = load_model(directory, dtype=torch.bfloat16)[0].state_dict()
    judge = model.state_dict()
    for layer in (0, 1):
        table = loaded[f"layers.{layer}.mlp.gate.tid2eid"]
        assert table.dtype == torch.int64
        assert torch.equal(table, judge[f"model.layers.{layer}.mlp.gate.tid2eid"])
    assert judge["model.layers.0.mlp.gate.tid2eid"].unique().numel() == 6
