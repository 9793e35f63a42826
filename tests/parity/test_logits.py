"""What our models compute is what ``transformers`` computes, from the directory that its ``save_pretrained`` wrote."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold.model import cache
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from tests.model import tiny
from tests.parity import reference
from tests.parity.reference import BAR, FAMILIES, LENGTH, SEEDS, make, ours
from tests.parity.worst import difference

FEW = range(6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, seed: int) -> None:
    judge = make(family, seed)
    ids = reference.tokens(judge.config, seed)
    expected = reference.logits(judge.model, ids)
    assert 1 < expected.abs().max() < 8
    assert difference(f"{family} logits", reference.our_logits(ours(family, seed), ids), expected) <= BAR


def documents(family: str, seed: int) -> list[Document]:
    """A document and strangers, one of a single token."""
    config = make(family, seed).config
    lengths = (LENGTH, 23, 1, 40)
    return [Document.text(reference.tokens(config, seed + 100 * i, n).tolist()) for i, n in enumerate(lengths)]


def page_size(model: Model) -> int:
    return cache.layout(model.cfg).multiple * random.Random(model.cfg.hidden_size).choice([1, 2, 3])


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_strangers_in_the_pack_change_nothing(family: str, seed: int) -> None:
    judge, model = make(family, seed), ours(family, seed)
    docs = documents(family, seed)
    packed = tiny.logits(model, *docs).split([len(d) for d in docs])
    for got, doc in zip(packed, docs, strict=True):
        assert difference(f"{family} packed", got, reference.logits(judge.model, doc.tokens)) <= BAR


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_chunks_through_the_cache_give_the_same(family: str, seed: int) -> None:
    judge, model = make(family, seed), ours(family, seed)
    docs, rng = documents(family, seed), random.Random(seed)
    by_token = [[1] * len(d) for d in docs]
    by_chance = [tiny.random_chunks(len(d), rng) for d in docs]
    then_tokens = [[len(d) - len(d) // 2, *[1] * (len(d) // 2)] for d in docs]
    for chunks in (by_token, by_chance, then_tokens):
        got = tiny.decode(model, docs, chunks, page_size(model), fill=50.0)
        for logits, doc in zip(got, docs, strict=True):
            expected = reference.logits(judge.model, doc.tokens)
            assert difference(f"{family} through the cache", logits, expected) <= BAR


@torch.no_grad()
def greedy(model: Model, prompts: list[Tensor], n: int) -> list[list[int]]:
    """``n`` tokens after each prompt, all prompts decoded together."""
    size = page_size(model)
    pool = PagePool(model.cfg, sum(-(-(len(p) + n) // size) for p in prompts), size)
    states = [SequenceState() for _ in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    pieces = [Document.text(p.tolist()) for p in prompts]
    for _ in range(n):
        packed = pack(pieces, starts=[s.length for s in states])
        best = model(packed, cache=Cache(pool, states), logits="last").logits.argmax(-1).tolist()
        for text, token in zip(out, best, strict=True):
            text.append(token)
        pieces = [Document.text([token]) for token in best]
    return out


def greedy_of_judge(model: PreTrainedModel, prompt: Tensor, n: int) -> list[int]:
    """Without a cache: everything anew for each token."""
    ids = prompt
    for _ in range(n):
        ids = torch.cat([ids, reference.logits(model, ids)[-1:].argmax(-1)])
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text(family: str, seed: int) -> None:
    judge = make(family, seed)
    prompts = [d.tokens for d in documents(family, seed)]
    expected = [greedy_of_judge(judge.model, prompt, 16) for prompt in prompts]
    assert greedy(ours(family, seed), prompts, 16) == expected


def test_the_draws_cover_what_families_differ_in() -> None:
    """The seeds are worth nothing if they never draw a case."""

    def drawn(family: str, field: str) -> set[object]:
        return {str(getattr(make(family, seed).config, field)) for seed in SEEDS}

    llama = [make("llama", seed).config for seed in SEEDS]
    assert {c.model_type for c in llama} == {"llama", "qwen2"}
    assert {c.rope_parameters["rope_type"] for c in llama} == {"default", "linear", "yarn", "llama3"}
    assert {c.tie_word_embeddings for c in llama} == {False, True}
    assert {c.num_key_value_heads == c.num_attention_heads for c in llama} == {False, True}
    assert drawn("deepseek_v2", "topk_method") == {"greedy", "group_limited_greedy"}
    assert "None" in drawn("deepseek_v2", "q_lora_rank") and "None" in drawn("deepseek_v3", "q_lora_rank")
    for family in FAMILIES[1:4]:
        assert {make(family, s).config.rope_parameters["rope_type"] for s in SEEDS} == {"default", "yarn"}
        assert len(drawn(family, "n_group")) > 1 and len(drawn(family, "first_k_dense_replace")) > 1
    for family in FAMILIES[3:]:
        topk = {make(family, s).config.index_topk < LENGTH // 2 for s in SEEDS}
        assert topk == {False, True}
    v4 = [make("deepseek_v4", seed).config for seed in SEEDS]
    assert {kind for c in v4 for kind in c.layer_types} == {reference.SLIDING, reference.CSA, reference.HCA}
    assert {c.rope_parameters["compress"]["rope_type"] for c in v4} == {"default", "yarn"}
    for field in ("hc_mult", "o_groups", "sliding_window", "swiglu_limit", "mlp_layer_types", "compress_rates"):
        assert len(drawn("deepseek_v4", field)) > 1, field
