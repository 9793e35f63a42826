"""Serving a model whose layers compress: what a prefix needs besides its pages."""

import random

import pytest
import torch

from fourfold.config import ModelConfig
from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.serve.engine import Engine
from fourfold.serve.request import Request, Sampling
from tests.serve.test_engine import answer
from tests.serve.tiny import TINY

COMPRESSED = {
    "kind": "compressed",
    "q_lora_rank": 16,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "o_groups": 2,
    "o_lora_rank": 8,
    "sliding_window": 6,
    "compress_ratios": [0, 4, 8],
}


@pytest.fixture(scope="module")
def compressed():
    torch.manual_seed(0)
    cfg = ModelConfig.from_dict({**TINY, "attention": COMPRESSED, "engram": {}, "media": {}})
    return Model(cfg)


def request(ids, salt="", **options):
    return Request(Document.text(ids), Sampling(0.0), 6, salt=salt, **options)


@pytest.mark.parametrize("prefill_tokens", [5, 64])
def test_a_reused_prefix_gives_the_cold_answer(compressed, tokenizer, prefill_tokens):
    """Prompts with common beginnings of any length, in a cache too small for all of them."""
    rng = random.Random(prefill_tokens)
    stem = [rng.randrange(20, 280) for _ in range(90)]
    hits = 0
    with (
        Engine(compressed, tokenizer, page_size=8, pages=60, prefill_tokens=prefill_tokens) as engine,
        Engine(compressed, tokenizer, page_size=8) as cold,
    ):
        assert engine.page_size == 8
        for turn in range(30):
            ids = stem[: rng.randrange(1, 90)] + [rng.randrange(20, 280) for _ in range(rng.randrange(1, 30))]
            got, end = answer(engine, request(ids))
            wanted, _ = answer(cold, request(ids, salt=str(turn)))
            assert got == wanted, (turn, len(ids))
            hits += end.usage.cached_tokens
    assert hits > 300


def test_only_the_newest_tails_are_kept(compressed, tokenizer):
    with Engine(compressed, tokenizer, page_size=8) as engine:
        engine._prefixes._max_tails = 2
        ids = list(range(20, 120))
        answer(engine, request(ids))
        assert len(engine._prefixes._tails) == 2
        assert answer(engine, request(ids))[1].usage.cached_tokens == 96  # the end of the last whole page
        assert answer(engine, request(ids[:50] + [7]))[1].usage.cached_tokens == 0  # its pages are there, no tail is


def test_pages_hold_whole_groups(compressed, tokenizer):
    with Engine(compressed, tokenizer, page_size=12) as engine:
        assert engine.page_size == 24
