"""Tiny models of every make, and documents to run through them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.sequence import (
    AUDIO,
    END,
    IGNORE,
    IMAGE,
    MODALITIES,
    NEWLINE,
    NO_MARK,
    START,
    TEXT,
    VIDEO,
    Document,
    Patches,
    pack,
)
from fourfold.model.transformer import Model

VOCAB = 61
PLACEHOLDERS = {IMAGE: 13, VIDEO: 14, AUDIO: 15}

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "attention": {
        "num_attention_heads": 4,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "num_key_value_heads": 2,
        "head_dim": 6,
    },
}

MEDIA: dict[str, Any] = {
    "hidden_size": 16,
    "image": {"patch_size": 2},
    "video": {"patch_size": 2, "tubelet_frames": 1},
    "audio": {"n_mels": 5, "frames_per_token": 2},
}


COMPRESSED: dict[str, Any] = {
    "attention.kind": "compressed",
    "attention.q_lora_rank": 10,
    "attention.qk_rope_head_dim": 4,
    "attention.head_dim": 12,
    "attention.o_groups": 2,
    "attention.o_lora_rank": 6,
    "attention.sliding_window": 5,
    "attention.compress_ratios": [0, 4, 8],
    "compress_rope.theta": 400.0,
    "indexer.mode": "sparse",
    "indexer.n_heads": 8,
    "indexer.head_dim": 8,
    "indexer.topk": 3,
}


def config(**overrides: Any) -> ModelConfig:
    """The plain tiny transformer with dotted fields replaced."""
    return ModelConfig.from_dict(BASE).replace(**overrides)


def model(cfg: ModelConfig, seed: int = 0) -> Model:
    """Random weights, and random values too where training starts from zero or one."""
    torch.manual_seed(seed)
    made = Model(cfg).eval()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith(("norm.weight", "q_weight", "k_weight", "scale")):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
                if name.endswith("scale") and cfg.residual.kind == "hc":
                    tensor.mul_(0.2)  # free maps amplify rounding too
            elif name.endswith(("bias", "sinks")):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif name.endswith("base"):
                tensor.add_(torch.randn_like(tensor) * 0.3)
            elif name.endswith("conv.weight"):
                tensor.copy_(torch.randn_like(tensor) * 0.3)
            elif name.endswith("weights_proj.weight") and cfg.indexer.candidate_blocks:
                tensor.mul_(8)  # scores beyond the floor
    return made


def random_config(seed: int) -> ModelConfig:
    """Any combination of blocks."""
    rng = random.Random(seed)
    overrides: dict[str, Any] = {"num_hidden_layers": rng.choice([2, 3, 5])}
    draw = rng.random()
    if draw < 0.2:
        overrides |= {"attention.kind": "gqa", "attention.qkv_bias": rng.random() < 0.5}
    elif draw < 0.5:
        ratios = [rng.choice([0, 4, 8]) for _ in range(overrides["num_hidden_layers"])]
        overrides |= COMPRESSED | {
            "attention.compress_ratios": ratios,
            "attention.sliding_window": rng.choice([1, 2, 7]),
            "attention.o_groups": rng.choice([1, 4]),
            "indexer.mode": rng.choice(["off", "dense", "sparse", "sparse"]),
        }
    else:
        overrides["attention.q_lora_rank"] = rng.choice([0, 10])
        overrides |= {
            "indexer.mode": rng.choice(["off", "dense", "sparse", "sparse", "sparse"]),
            "indexer.n_heads": rng.choice([2, 5]),
            "indexer.head_dim": rng.choice([4, 8]),
            "indexer.topk": rng.choice([1, 5, 9]),
            "indexer.layers_per_indexer": rng.choice([1, 2, 4]),
            "indexer.first_layer": rng.choice([0, 0, 1]),
        }
    if rng.random() < 0.7:
        groups = rng.choice([1, 4])
        overrides |= {
            "moe.n_routed_experts": 8,
            "moe.num_experts_per_tok": rng.choice([1, 3]),
            "moe.moe_intermediate_size": rng.choice([7, 8]),
            "moe.n_shared_experts": rng.choice([0, 1, 2]),
            "moe.first_k_dense_replace": rng.choice([0, 1]),
            "moe.scoring_func": rng.choice(["sigmoid", "sqrtsoftplus", "softmax"]),
            "moe.n_group": groups,
            "moe.topk_group": 2 if groups > 1 else 1,
            "moe.topk_method": rng.choice(["noaux_tc", "group_limited_greedy"]),
            "moe.swiglu_limit": rng.choice([0.0, 0.3]),
            "moe.norm_topk_prob": rng.random() < 0.5,
            "moe.routed_scaling_factor": rng.choice([1.0, 2.5]),
        }
    overrides["residual.kind"] = rng.choice(["plain", "hc", "mhc", "mhc", "mhc_single_pass"])
    overrides["residual.hc_mult"] = rng.choice([2, 4])
    if rng.random() < 0.7:
        overrides |= {
            "engram.layer_ids": rng.choice([[0], [1], [0, 1]]),
            "engram.max_ngram": rng.choice([2, 3, 4]),
            "engram.vocab_size": 101,
            "engram.head_dim": 4,
            "engram.compressed_vocab_size": rng.choice([0, 20]),
        }
    if rng.random() < 0.7:
        overrides["media"] = MEDIA
    elif overrides.get("moe.n_routed_experts"):
        overrides["moe.num_hash_layers"] = rng.choice([0, 2])
    if rng.random() < 0.3:
        overrides |= {"rope.factor": 8.0, "rope.original_max_position_embeddings": 32, "rope.mscale_all_dim": 1.0}
    return config(**overrides)


def text(n: int, seed: int = 0) -> Document:
    generator = torch.Generator().manual_seed(seed)
    return Document.text(torch.randint(0, VOCAB, (n,), generator=generator).tolist())


def document(cfg: ModelConfig, n: int, seed: int) -> Document:
    """``n`` positions of text broken by spans of the media the model reads; every text after the first is learnt."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    kinds = [MODALITIES.index(m) for m in cfg.media.modalities]
    modality, marks = [TEXT], [NO_MARK]
    while len(modality) < n:
        if kinds and rng.random() < 0.3:
            kind, patches = rng.choice(kinds), rng.randint(1, 3)
            span = [START, *[NO_MARK] * patches, *[NEWLINE] * (kind == IMAGE), END]
        else:
            kind, span = TEXT, [NO_MARK] * rng.randint(1, 6)
        modality += [kind] * len(span)
        marks += span
    modality, marks = modality[:n], marks[:n]
    tokens = [rng.randrange(VOCAB) if m == TEXT else PLACEHOLDERS[m] for m in modality]
    after = list(zip(tokens[1:], modality[1:], strict=True))
    targets = [t if m == TEXT else IGNORE for t, m in after] + [IGNORE]
    patches = {}
    for kind in kinds:
        where = [i for i in range(n) if modality[i] == kind and marks[i] == NO_MARK]
        if where:
            features = getattr(cfg.media, MODALITIES[kind]).features
            patches[MODALITIES[kind]] = Patches(
                torch.tensor(where),
                torch.randn(len(where), features, generator=generator),
                torch.rand(len(where), 3, generator=generator) * 8,
            )
    return Document(*(torch.tensor(c) for c in (tokens, modality, marks, targets)), patches)


@torch.no_grad()
def logits(made: Model, *documents: Document, row: int | None = None) -> Tensor:
    return made(pack(documents, row=row)).logits


@torch.no_grad()
def decode(
    made: Model,
    documents: list[Document],
    chunks: list[list[int]],
    page_size: int = 8,
    fill: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Logits of each document, computed through the cache, all documents together.

    chunks: per document, the lengths of the pieces it is fed in. ``fill``: what the fresh pages hold; ``dtype``:
    their format.
    """
    pool = PagePool(made.cfg, sum(-(-len(d) // page_size) for d in documents), page_size, dtype)
    pool.data.fill_(fill)
    states, out = [SequenceState() for _ in documents], [[] for _ in documents]
    for turn in range(max(map(len, chunks))):
        now = [i for i, c in enumerate(chunks) if turn < len(c)]
        pieces = [documents[i].slice(states[i].length, states[i].length + chunks[i][turn]) for i in now]
        packed = pack(pieces, starts=[states[i].length for i in now])
        got = made(packed, cache=Cache(pool, [states[i] for i in now])).logits
        for i, part in zip(now, got.split([len(p) for p in pieces]), strict=True):
            out[i].append(part)
    return [torch.cat(parts) for parts in out]


def random_chunks(n: int, rng: random.Random) -> list[int]:
    chunks = []
    while sum(chunks) < n:
        chunks.append(min(rng.choice([1, 1, 2, 3, 8, 9, 17]), n - sum(chunks)))
    return chunks
