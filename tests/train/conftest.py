"""A run of seconds: a made-up corpus, a model of every block, a recipe of three phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourfold.data.corpus import Shard, flatten, write_shard

MODEL = """
[model]
vocab_size = 288
hidden_size = 16
num_hidden_layers = 2
intermediate_size = 24
max_position_embeddings = 512
attention.q_lora_rank = 8
attention.kv_lora_rank = 8
attention.qk_nope_head_dim = 4
attention.qk_rope_head_dim = 4
attention.v_head_dim = 4
attention.num_attention_heads = 2
indexer.n_heads = 2
indexer.head_dim = 8
indexer.topk = 8
indexer.layers_per_indexer = 1
moe.n_routed_experts = 4
moe.num_experts_per_tok = 2
moe.moe_intermediate_size = 8
moe.n_shared_experts = 1
residual.hc_mult = 2
engram.layer_ids = [1]
engram.vocab_size = 101
engram.head_dim = 4
media.hidden_size = 8
media.image.patch_size = 16
"""

RECIPE = (
    """
out = "{out}"
corpus = "{corpus}"
row = 192
rows = 1
bf16 = false
balance_weight = 1e-2
log_every = 1
save_every = 2
keep = 2

[optimizer]
lr = 1e-2
warmup_steps = 2

[[phases]]
steps = 3
indexer = "dense"

[[phases]]
steps = 1
indexer = "warmup"

[[phases]]
steps = 2
indexer = "sparse"
mtp = 0.3
weights.arithmetic = 1.0

[weights]
arithmetic = 1.0
shapes = 1.0
tones = 1.0
"""
    + MODEL
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Some prose, enough for a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = "the quick brown fox jumps over a lazy dog".split()
    texts = [" ".join(rng.choice(words, 60)).encode() for _ in range(8)]
    flat, offsets = flatten([np.frombuffer(text, np.uint8) for text in texts], np.uint8)
    columns = {"source": np.repeat("made", 8), "key": np.arange(8).astype(str), "split": np.repeat("train", 8)}
    write_shard(Shard("text", {"text": flat, "offsets": offsets}, columns, "made up", "A"), folder)
    return folder


@pytest.fixture
def recipe(tmp_path, corpus) -> Path:
    """The path of a recipe that writes to ``tmp_path / "run"``."""
    return write_recipe(tmp_path, corpus, "run")


def write_recipe(folder: Path, corpus: Path, name: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(RECIPE.format(out=folder / name, corpus=corpus))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
