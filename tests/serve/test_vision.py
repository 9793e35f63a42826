"""Serving a model with an image tower: pictures are computed whole, and a prefix never ends within one."""

import random

import numpy as np
import pytest
import torch

from fourfold.media.processor import DocumentBuilder
from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.serve.engine import Engine
from fourfold.serve.request import Request, Sampling
from tests.model import v41
from tests.serve.test_engine import answer

PLAIN = {  # no tails: any whole page can be reused
    "attention.kind": "mla",
    "drafter.num_layers": 0,
    "drafter.target_layer_ids": [],
    "attention.compress_ratios": [],
    "attention.kv_source_layer_ids": [],
    "attention.index_source_layer_ids": [],
    "attention.candidate_source_layer_id": -1,
}


@pytest.fixture(scope="module", params=["csa2", "mla"])
def seeing(request):
    torch.manual_seed(0)
    return Model(v41.config(vocab_size=300, max_position_embeddings=512, **(PLAIN if request.param == "mla" else {})))


def prompt(model: Model, *parts: list[int] | np.ndarray) -> Document:
    builder = DocumentBuilder(model.cfg.media, tokenizer=None)
    for part in parts:
        builder.image(part) if isinstance(part, np.ndarray) else builder.text(part)
    return builder.build()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)  # 4 x 4 tokens: 22 positions


def wanting(document: Document, salt: str = "") -> Request:
    return Request(document, Sampling(0.0), 5, salt=salt)


@pytest.mark.parametrize("prefill_tokens", [3, 20, 64])
def test_any_chunks_give_the_same_answer(seeing, tokenizer, prefill_tokens):
    document = prompt(seeing, [30] * 5, picture(0), [40] * 3, picture(1), picture(2), [50] * 7)
    with Engine(seeing, tokenizer, page_size=8, prefill_tokens=1000) as engine:
        wanted, _ = answer(engine, wanting(document))
    with Engine(seeing, tokenizer, page_size=8, prefill_tokens=prefill_tokens) as engine:
        got, end = answer(engine, wanting(document))
    assert got == wanted and end.usage.completion_tokens > 0


def test_a_reused_prefix_gives_the_cold_answer(seeing, tokenizer):
    """Conversations that share pictures, in a cache too small for all of them."""
    rng, hits = random.Random(0), 0
    stem = [[31, 32, 33], picture(0), [34] * 8, picture(1), [36] * 9, picture(2), [39] * 12]
    with (
        Engine(seeing, tokenizer, page_size=8, pages=40, prefill_tokens=40) as engine,
        Engine(seeing, tokenizer, page_size=8) as cold,
    ):
        for turn in range(20):
            parts = stem[: rng.randrange(1, 8)] + [[rng.randrange(20, 280) for _ in range(rng.randrange(1, 20))]]
            document = prompt(seeing, *parts)
            got, end = answer(engine, wanting(document))
            wanted, _ = answer(cold, wanting(document, salt=str(turn)))
            assert got == wanted, turn
            hits += end.usage.cached_tokens
    assert hits > 200


def test_pictures_that_begin_alike_share_no_page(seeing, tokenizer):
    """The first rows of a picture hold what its last rows show."""
    first, second = picture(0), picture(0)
    second[12:] = 255 - second[12:]
    with Engine(seeing, tokenizer, page_size=8) as engine:
        answer(engine, wanting(prompt(seeing, first, [41] * 9)))
        pages = engine.stats()["cached_pages"]
        _, end = answer(engine, wanting(prompt(seeing, second, [41] * 9)))
        assert end.usage.cached_tokens == 0
        assert engine.stats()["cached_pages"] == 2 * pages > 0
        _, end = answer(engine, wanting(prompt(seeing, first, [41] * 9, [42])))
        assert end.usage.cached_tokens == 24
