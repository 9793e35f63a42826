"""A model small enough to run hundreds of requests, with every block switched on."""

import torch

from fourfold.config import ModelConfig
from fourfold.model.transformer import Model, Output
from fourfold.text.tokenizer import Tokenizer, train_tokenizer

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "attention": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "indexer": {"mode": "sparse", "n_heads": 2, "head_dim": 8, "topk": 16, "layers_per_indexer": 2},
    "moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "residual": {"kind": "mhc"},
    "engram": {"layer_ids": [1], "vocab_size": 101, "head_dim": 4},
    "media": {
        "hidden_size": 32,
        "image": {"patch_size": 4, "max_patches": 16},
        "video": {"patch_size": 4, "max_frames": 4, "max_patches": 4},
        "audio": {"n_mels": 16, "max_seconds": 4.0},
    },
}


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog, again and again"] * 3, 290)


def tiny_model(**indexer: int) -> Model:
    """indexer: what is unlike in its configuration."""
    torch.manual_seed(0)
    made = Model(ModelConfig.from_dict(TINY | {"indexer": TINY["indexer"] | indexer}))
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("weights_proj.weight") and made.cfg.indexer.candidate_blocks:
                tensor.mul_(8)  # scores beyond the floor
    return made


class Scripted(Model):
    """Says what it is told, whatever it is asked: the n-th token after the prompt is the n-th of ``script``."""

    script: list[int]
    prompt: int

    def forward(self, packed, cache=None, probe=None, logits="all"):
        output = super().forward(packed, cache, probe, logits)
        last = int(packed.positions[-1]) - self.prompt + 1
        if last >= 0:
            output.logits[:] = 0
            output.logits[:, self.script[last]] = 50
        return Output(output.logits)
