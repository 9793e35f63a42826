"""Whatever the engine does to a request, its greedy tokens are those of the plain model."""

import tempfile
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.config import ModelConfig
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.quant.model import quantize_model
from fourfold.serve.engine import Engine
from fourfold.serve.running import Grammar
from fourfold.text.formats import default_chat
from tests.serve.test_engine import collect, request
from tests.serve.test_tails import COMPRESSED
from tests.serve.tiny import TINY, tiny_model, tiny_tokenizer

STEMS = [[20 + (n * k) % 230 for n in range(70)] for k in (1, 7, 11)]
QUANTISED = ("int8", "int4")


@cache
def made(kind):
    if kind == "compressed":
        torch.manual_seed(0)
        model = Model(ModelConfig.from_dict({**TINY, "attention": COMPRESSED, "engram": {}, "media": {}}))
    elif kind == "guessing":
        torch.manual_seed(0)
        model = Model(ModelConfig.from_dict({**TINY, "mtp": {"num_layers": 1}}))
    elif kind == "blocks":  # of keys, few of which get exact scores
        model = tiny_model(topk=8, block_size=4, candidate_blocks=4)
    elif kind in QUANTISED:
        torch.manual_seed(0)
        moe = TINY["moe"] | {"moe_intermediate_size": 32}
        model = Model(ModelConfig.from_dict({**TINY, "hidden_size": 64, "intermediate_size": 64, "moe": moe}))
        model = quantize_model(model, kind)
    else:
        model = tiny_model()
    tokenizer = tiny_tokenizer()
    return model.eval(), tokenizer, Grammar(default_chat(tokenizer), model.cfg.vocab_size)


@cache
def plain(kind, ids, count):
    """The greedy answer, each token from a forward over everything before it, and whether it is the whole of it.

    Quantised models round activations to codes, where the last bit of a sum, which depends on the shapes of its
    kernel, can become a whole code. Their answer is taken as far as no second token comes that near to the first.
    """
    model, tokenizer, grammar = made(kind)
    said: list[int] = []
    banned = grammar.banned("content", False)
    nearest = 0.25 if kind in QUANTISED else 0.0  # a logit moves by up to 0.06; their standard deviation is 1.5
    with torch.inference_mode():
        while len(said) < count and not grammar.stops & set(said):
            logits = model(pack([Document.text([*ids, *said])]), logits="last").logits[0]
            (first, second), (best, _) = logits.index_fill(0, banned, -torch.inf).topk(2)
            if first - second < nearest:
                return len(said), tokenizer.decode(said).replace("\ufffd", ""), False
            said.append(int(best))
    return len(said), tokenizer.decode(said).replace("\ufffd", ""), True


def agree(engine, kind, cases):
    """Asks all ``cases`` at once. Returns how many prompt tokens were taken from the cache, of each."""
    handles = [engine.submit(request(Document.text(ids), count)) for ids, count in cases]
    cached = []
    for handle, (ids, count) in zip(handles, cases, strict=True):
        deltas, finished = collect(handle)
        text = "".join(t for _, t in deltas).replace("\ufffd", "")
        tokens, answer, whole = plain(kind, ids, count)
        if whole:
            assert (finished.usage.completion_tokens, text) == (tokens, answer)
        else:
            assert text.startswith(answer)
        cached.append(finished.usage.cached_tokens)
    return cached


PROMPTS = st.tuples(st.integers(0, 2), st.integers(1, 70), st.integers(0, 3), st.integers(1, 14))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("kind", ["sparse", "compressed", "guessing", "blocks", *QUANTISED])
@given(
    asked=st.lists(PROMPTS, min_size=1, max_size=8),
    prefill=st.sampled_from([5, 16, 64]),
    pages=st.sampled_from([12, 16, 40]),
    running=st.sampled_from([1, 3, 8]),
    restart=st.booleans(),
)
def test_greedy_tokens_are_those_of_the_plain_model(kind, asked, prefill, pages, running, restart):
    model, tokenizer, _ = made(kind)
    cases = [((*STEMS[stem][:length], *range(30, 30 + more)), count) for stem, length, more, count in asked]
    with tempfile.TemporaryDirectory() as directory:
        guesses = "on" if kind == "guessing" else "off"
        options = {
            "speculate": guesses,
            "page_size": 8,
            "pages": pages,
            "prefill_tokens": prefill,
            "max_running": running,
        }
        for _ in range(1 + restart):  # the second time what memory and disk kept is there
            with Engine(model, tokenizer, context_cache=directory, **options) as engine:
                agree(engine, kind, cases)


@pytest.mark.parametrize("kind", ["sparse", "compressed", "blocks"])
def test_so_they_are_where_requests_are_preempted_and_prefixes_taken_from_memory_and_disk(kind, tmp_path):
    model, tokenizer, _ = made(kind)
    cases = [((*STEMS[n % 3][: 64 - 3 * n], 30 + n), 40) for n in range(6)]
    options = {"page_size": 8, "pages": 19, "prefill_tokens": 16, "max_running": 6, "context_cache": tmp_path}
    with Engine(model, tokenizer, **options) as engine:
        agree(engine, kind, cases)
        assert engine.stats()["preemptions"] > 0
        assert max(agree(engine, kind, cases[:1])) >= 32
    with Engine(model, tokenizer, **options) as engine:
        assert max(agree(engine, kind, cases[:1])) >= 32  # memory is empty
