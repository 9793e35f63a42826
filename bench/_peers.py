"""transformers' models of V3's and V4's architecture, and ours with the same weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM

from fourfold.model.transformer import Model
from fourfold.text.tokenizer import train_tokenizer
from fourfold.weights.checkpoint import load_model

SIZES: dict[str, dict[str, int]] = {
    "usual": {"rows": 4, "row": 512, "layers": 6, "width": 256, "vocabulary": 4096, "experts": 16, "expert": 192},
    "tiny": {"rows": 2, "row": 64, "layers": 3, "width": 32, "vocabulary": 288, "experts": 8, "expert": 16},
}


def peer(kind: str, size: dict[str, int]) -> nn.Module:
    """transformers' model with the weights that it begins training from."""
    d, layers = size["width"], size["layers"]
    common: dict[str, Any] = {
        "vocab_size": size["vocabulary"],
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "q_lora_rank": d // 2,
        "qk_rope_head_dim": 16 if d >= 128 else 4,
        "n_routed_experts": size["experts"],
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": size["expert"],
        "max_position_embeddings": 2 * size["row"],
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    if kind == "V3":
        head = 32 if d >= 128 else 8
        config = DeepseekV3Config(
            **common,
            intermediate_size=4 * d,
            num_key_value_heads=8,
            kv_lora_rank=d // 4,
            qk_nope_head_dim=head,
            v_head_dim=head,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        )
        return DeepseekV3ForCausalLM(config)
    csa, hca = "compressed_sparse_attention", "heavily_compressed_attention"
    config = DeepseekV4Config(
        **common,
        head_dim=64 if d >= 128 else 8,
        o_groups=2,
        o_lora_rank=d // 4,
        num_hash_layers=0,
        index_n_heads=8,
        index_head_dim=32 if d >= 128 else 8,
        index_topk=size["row"] // 16,
        layer_types=[(csa, hca)[layer % 2] for layer in range(layers)],
        compress_rates={csa: 4, hca: 16},
        sliding_window=size["row"] // 8,
        hc_mult=4,
    )
    return DeepseekV4ForCausalLM(config)


def ours(made: nn.Module, dtype: torch.dtype = torch.float32) -> Model:
    """Ours with the same weights, by way of a directory."""
    directory = Path(tempfile.mkdtemp(prefix="bench-train-"))
    try:
        made.save_pretrained(directory)
        train_tokenizer(["a text of no importance"], 272).save(directory / "tokenizer.json")
        return load_model(directory, dtype)[0].train().requires_grad_()
    finally:
        shutil.rmtree(directory)
