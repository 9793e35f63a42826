"""The released models as data (their config.json), and tiny ones of every family, each as a configuration of ours."""

from __future__ import annotations

from typing import Any

from fourfold.config import ModelConfig
from tests.model import tiny

VOCAB = 290

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
BESIDE = {  # what every file of the hub has beside its model
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
}
LATENT = BESIDE | {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "seq_aux": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
V2_LITE = LATENT | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
    "topk_method": "group_limited_greedy",
}
V3 = LATENT | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": FP8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
V32 = V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
}
V4_FLASH = BESIDE | {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 3,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": YARN | {"factor": 16, "original_max_position_embeddings": 65536},
    "max_position_embeddings": 1048576,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "rms_norm_eps": 1e-06,
    "expert_dtype": "fp4",
    "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
V4_PRO = V4_FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
    "index_topk": 1024,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
V4_FLASH_0731 = V4_FLASH | {
    "compress_ratios": [*V4_FLASH["compress_ratios"], 0, 0],
    "dspark_block_size": 5,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
}
TEXT_V41 = {
    name: V4_FLASH[name]
    for name in (
        "vocab_size num_attention_heads num_key_value_heads head_dim qk_rope_head_dim o_groups o_lora_rank "
        "n_shared_experts num_experts_per_tok routed_scaling_factor index_head_dim index_topk sliding_window "
        "rope_theta compress_rope_theta rope_scaling max_position_embeddings hc_mult hc_sinkhorn_iters hc_eps "
        "scoring_func topk_method norm_topk_prob swiglu_limit hidden_act attention_bias tie_word_embeddings"
    ).split()
}
V41 = {
    "architectures": ["DeepseekV41ForCausalLM"],
    "model_type": "deepseek_v41",
    "image_token_id": 129264,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
    },
    "text_config": TEXT_V41
    | {
        "model_type": "deepseek_v41_text",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_nextn_predict_layers": 3,
        "q_lora_rank": 1280,
        "moe_intermediate_size": 2304,
        "n_routed_experts": 384,
        "rms_norm_eps": 1e-20,
        "index_n_heads": 32,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0],
        "kv_source_layer_ids": [2, 8, 14, 20],
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
        "candidate_source_layer_id": 20,
        "candidate_topk_blocks": 2048,
        "candidate_block_size": 8,
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 16000000,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 99092,
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [37, 38, 39],
        "dspark_markov_rank": 256,
        "dspark_n_routed_experts": 128,
        "dspark_num_experts_per_tok": 3,
    },
    "vision_config": {
        "model_type": "deepseek_v41_vision",
        "num_hidden_layers": 32,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "patch_size": 14,
        "rope_theta": 10000.0,
        "downsample_ratio": 3,
        "max_image_tokens": 1024,
        "min_pixels": 295936,
        "max_wh_ratio": None,
    },
}
LLAMA_8B = {  # the R1 distillation of that size
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{name: BESIDE[name] for name in BESIDE if name != "tie_word_embeddings"},
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
QWEN_7B = {  # likewise
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **{name: BESIDE[name] for name in BESIDE if name != "attention_bias"},
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "use_mrope": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}

# ---------------------------------------------------------------- tiny models, one of each family

_EXPERTS: dict[str, Any] = {
    "moe.n_routed_experts": 6,
    "moe.num_experts_per_tok": 2,
    "moe.moe_intermediate_size": 8,
    "moe.n_shared_experts": 1,
}
_PLAIN_ROUTER: dict[str, Any] = {
    "moe.scoring_func": "softmax",
    "moe.norm_topk_prob": False,
}
_V3: dict[str, Any] = _EXPERTS | {
    "attention.q_lora_rank": 10,
    "moe.n_group": 3,
    "moe.topk_group": 2,
    "rope.factor": 4.0,
    "rope.original_max_position_embeddings": 32,
    "rope.mscale_all_dim": 0.7,
    "mtp.num_layers": 1,
    "mtp.normed_input": True,
}
_V4: dict[str, Any] = (
    tiny.COMPRESSED
    | _EXPERTS
    | {
        "moe.first_k_dense_replace": 0,
        "moe.scoring_func": "sqrtsoftplus",
        "moe.swiglu_limit": 0.5,
        "moe.routed_scaling_factor": 1.5,
        "residual.hc_mult": 2,
        "compress_rope.factor": 4.0,
        "compress_rope.original_max_position_embeddings": 32,
    }
)
_TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "attention.kind": "gqa",
        "rope.scaling": "llama3",
        "rope.factor": 8.0,
        "rope.original_max_position_embeddings": 64,
    },
    "qwen2": {"attention.kind": "gqa", "attention.qkv_bias": True, "tie_word_embeddings": True},
    "deepseek": {"attention.kind": "gqa", "moe.topk_method": "greedy"} | _EXPERTS | _PLAIN_ROUTER,
    "deepseek_v2": _EXPERTS | _PLAIN_ROUTER | {"moe.n_group": 3, "moe.topk_method": "group_limited_greedy"},
    "deepseek_v3": _V3,
    "deepseek_v32": _V3
    | {
        "indexer.mode": "sparse",
        "indexer.n_heads": 32,
        "indexer.head_dim": 8,
        "indexer.topk": 5,
        "indexer.layers_per_indexer": 1,
    },
    "deepseek_v4": _V4 | {"residual.kind": "mhc", "moe.num_hash_layers": 1, "mtp.num_layers": 1},
    "deepseek_v41": _V4
    | {
        "rms_norm_eps": 1e-20,
        "num_hidden_layers": 4,
        "attention.kind": "csa2",
        "attention.compress_ratios": [0, 2, 2, 2],
        "attention.kv_source_layer_ids": [1, 3],
        "attention.index_source_layer_ids": [1, 2, 3],
        "attention.candidate_source_layer_id": 1,
        "residual.kind": "mhc_single_pass",
        "engram.layer_ids": [0, 2],
        "engram.vocab_size": 101,
        "engram.compressed_vocab_size": 0,  # set from the tokenizer
        "engram.head_dim": 32,
        "drafter.num_layers": 2,
        "drafter.target_layer_ids": [2, 3],
        "drafter.markov_rank": 4,
        "drafter.n_routed_experts": 4,
        "drafter.num_experts_per_tok": 2,
        "media.vision": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "patch_size": 2,
            "downsample": 2,
            "min_pixels": 4,
            "image_token_id": 13,
        },
    },
}


def tiny_config(model_type: str, **overrides: Any) -> ModelConfig:
    """A tiny model that the family ``model_type`` can express."""
    return tiny.config(**({"vocab_size": VOCAB} | _TINY[model_type] | overrides))
