"""A tiny random model with every block of DeepSeek-V4.1, and documents with pictures for it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from fourfold.config import ModelConfig
from fourfold.media.processor import DocumentBuilder
from fourfold.model.sequence import Document
from fourfold.model.vision import after_image
from tests.model import tiny

IMAGE_ID = 17

CSA2: dict[str, Any] = {
    "num_hidden_layers": 8,
    "attention.kind": "csa2",
    "attention.q_lora_rank": 10,
    "attention.head_dim": 12,
    "attention.o_groups": 2,
    "attention.o_lora_rank": 6,
    "attention.sliding_window": 5,
    "attention.compress_ratios": [0, 2, 2, 2, 1, 1, 1, 1],
    "attention.kv_source_layer_ids": [1, 4],
    "attention.index_source_layer_ids": [1, 3, 4, 6],
    "attention.candidate_source_layer_id": 4,
    "attention.candidate_topk_blocks": 3,
    "attention.candidate_block_size": 2,
    "compress_rope.theta": 700.0,
    "compress_rope.factor": 4.0,
    "compress_rope.original_max_position_embeddings": 64,
    "indexer.mode": "sparse",
    "indexer.n_heads": 8,
    "indexer.head_dim": 8,
    "indexer.topk": 3,
    "rms_norm_eps": 1e-20,
}

VISION: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "patch_size": 2,
    "max_image_tokens": 22,
    "min_pixels": 64,
    "image_token_id": IMAGE_ID,
}

EVERYTHING: dict[str, Any] = CSA2 | {
    "moe.n_routed_experts": 8,
    "moe.num_experts_per_tok": 3,
    "moe.moe_intermediate_size": 8,
    "moe.first_k_dense_replace": 0,
    "moe.scoring_func": "sqrtsoftplus",
    "moe.routed_scaling_factor": 1.5,
    "moe.swiglu_limit": 0.5,
    "residual.kind": "mhc_single_pass",
    "engram.layer_ids": [1, 5],
    "engram.max_ngram": 4,
    "engram.vocab_size": 101,
    "drafter.num_layers": 3,
    "drafter.block_size": 4,
    "drafter.noise_token_id": 7,
    "drafter.target_layer_ids": [5, 6, 7],
    "drafter.markov_rank": 6,
    "drafter.n_routed_experts": 5,
    "drafter.num_experts_per_tok": 2,
    "media.vision": VISION,
}


def config(**overrides: Any) -> ModelConfig:
    return tiny.config(**(EVERYTHING | overrides))


def document(cfg: ModelConfig, seed: int, pieces: int = 4) -> Document:
    """Text and pictures of several sizes in turn, the text learnt."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    builder = DocumentBuilder(cfg.media, tokenizer=None)  # a tower's placeholder stands in the config
    for _ in range(pieces):
        builder.text([rng.randrange(tiny.VOCAB) for _ in range(rng.randint(1, 7))], learn=True)
        builder.image(noise.integers(0, 256, (rng.randint(5, 30), rng.randint(5, 30), 3), dtype=np.uint8))
    builder.text([rng.randrange(tiny.VOCAB) for _ in range(3)], learn=True)
    return builder.build()


def random_chunks(whole: Document, rng: random.Random) -> list[int]:
    """Lengths of chunks that leave pictures whole."""
    cuts = [0]
    while cuts[-1] < len(whole):
        cuts.append(min(after_image(whole, min(cuts[-1] + rng.choice([1, 1, 2, 5, 11]), len(whole))), len(whole)))
    return [stop - start for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
