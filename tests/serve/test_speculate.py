"""Guessing ahead changes how fast an answer comes, and nothing else."""

from collections import Counter

import pytest
import torch

from fourfold.config import ModelConfig
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.serve.engine import Engine
from fourfold.serve.request import Request, Sampling
from fourfold.serve.running import Running
from fourfold.serve.speculate import Speculator, can_speculate
from tests.serve.test_engine import answer, collect, prompts, request, settle
from tests.serve.test_tails import compressed  # noqa: F401
from tests.serve.tiny import TINY


@pytest.fixture(scope="module")
def guesser():
    torch.manual_seed(0)
    return Model(ModelConfig.from_dict({**TINY, "mtp": {"num_layers": 1}}))


@pytest.fixture
def answers(monkeypatch):
    """The ids of every finished answer, by seed."""
    found = {}
    plain = Running.finish

    def finish(self, reason):
        found[self.request.sampling.seed] = list(self.ids)
        plain(self, reason)

    monkeypatch.setattr(Running, "finish", finish)
    return found


def spy_on_guesses(monkeypatch, replace):
    """Has ``replace(running)`` decide every guess that is made."""
    plain = Speculator.guess

    def guess(self, batch):
        plain(self, batch)
        for running, _, _ in batch:
            if running.draft is not None:
                running.draft = replace(running)

    monkeypatch.setattr(Speculator, "guess", guess)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
@pytest.mark.parametrize("pages", [None, 40])
def test_the_answers_are_the_same_with_right_and_with_wrong_guesses(
    guesser, tokenizer, monkeypatch, answers, options, pages
):
    with Engine(guesser, tokenizer, page_size=8, prefill_tokens=24) as engine:
        asked = [request(p, 12 + n, seed=n, salt=str(n), **options) for n, p in enumerate(prompts(engine))]
        for a in asked:
            answer(engine, a)
    wanted, right = dict(answers), Counter()
    answers.clear()

    def replace(running):
        n = len(running.ids)
        right[n % 3 > 0] += 1
        return wanted[running.request.sampling.seed][n] if n % 3 else 25

    spy_on_guesses(monkeypatch, replace)
    with Engine(guesser, tokenizer, page_size=8, prefill_tokens=24, speculate="on", pages=pages) as engine:
        ends = [collect(h)[1] for h in [engine.submit(a) for a in asked]]
        stats = settle(engine)
    assert answers == wanted
    assert [e.usage.completion_tokens for e in ends] == [len(wanted[n]) for n in range(len(asked))]
    assert stats["drafted_tokens"] >= 20 and 0.3 < stats["accepted_tokens"] / stats["drafted_tokens"] < 0.9


def test_a_step_gives_two_tokens_when_the_guess_is_right(guesser, tokenizer, monkeypatch, answers):
    wanted = request(Document.text(range(20, 40)), 41, temperature=1.0, seed=3)
    with Engine(guesser, tokenizer) as engine:
        answer(engine, wanted)
        alone = engine.stats()["steps"]
    said = answers[3]
    spy_on_guesses(monkeypatch, lambda running: said[len(running.ids)])
    with Engine(guesser, tokenizer, speculate="on") as engine:
        answer(engine, wanted)
        assert engine.stats()["steps"] <= alone // 2 + 2
        assert engine.stats()["accepted_tokens"] == engine.stats()["drafted_tokens"]


def test_the_guesses_are_those_of_the_whole_sequence(guesser, tokenizer, monkeypatch):
    """With its cache, over chunks and one by one, the block says what it says over everything at once."""
    seen = []
    plain = Speculator.guess

    def guess(self, batch):
        plain(self, batch)
        seen.extend((r.request.prompt.tokens.tolist() + r.ids, r.draft) for r, _, _ in batch if r.draft is not None)

    monkeypatch.setattr(Speculator, "guess", guess)
    with Engine(guesser, tokenizer, page_size=8, prefill_tokens=16, speculate="on") as engine:
        answer(engine, request(Document.text(range(20, 70)), 20))
        banned = engine._grammar.banned("content", False)
    assert len(seen) > 10
    with torch.inference_mode():
        for ids, draft in seen:
            # a guess of the token after the last one, from the position before that
            logits = guesser(pack([Document.text([*ids, 0])]), mtp=True).mtp_logits[len(ids) - 2]
            assert int(logits.index_fill(0, banned, -torch.inf).argmax()) == draft


@pytest.mark.parametrize("honest", [True, False])
def test_the_distribution_is_the_models(guesser, tokenizer, monkeypatch, answers, honest):
    """Chi-square of the first three tokens, whose guesses are mostly the likeliest; and that it would notice an
    engine that takes every guess."""
    prompt = list(range(20, 30))
    sampling = {"temperature": 1.0, "top_k": 3}

    def next_tokens(ids):
        with torch.inference_mode():
            logits = guesser(pack([Document.text(ids)]), logits="last").logits[0].double()
        top = logits.index_fill(0, banned, -torch.inf).softmax(-1).topk(3)
        return dict(zip(top.indices.tolist(), (top.values / top.values.sum()).tolist(), strict=True))

    known = {}

    def replace(running):
        after = tuple(prompt + running.ids)
        known.setdefault(after, next_tokens(after))
        ranked = list(known[after])
        return ranked[max(0, running.request.sampling.seed % 6 - 3)]

    def take_every_guess(self, id, forced=False):
        return accept(self, id if self.draft is None else self.draft, forced)

    accept = Running.accept
    if not honest:
        monkeypatch.setattr(Running, "accept", take_every_guess)
    spy_on_guesses(monkeypatch, replace)
    n = 700
    with Engine(guesser, tokenizer, page_size=16, speculate="on", max_waiting=n) as engine:
        banned = engine._grammar.banned("content", False)
        handles = [
            engine.submit(Request(Document.text(prompt), Sampling(seed=seed, **sampling), 3)) for seed in range(n)
        ]
        for handle in handles:
            list(handle)
        stats = engine.stats()
    share = stats["accepted_tokens"] / stats["drafted_tokens"]
    assert 0.15 < share < 0.6 if honest else share == 1
    expected = {}
    for a, pa in next_tokens(prompt).items():
        for b, pb in next_tokens([*prompt, a]).items():
            for c, pc in next_tokens([*prompt, a, b]).items():
                expected[a, b, c] = n * pa * pb * pc
    assert not any(set(ids) & engine._grammar.stops for ids in expected)
    counts = Counter(tuple(ids) for ids in answers.values())
    assert set(counts) <= set(expected)
    chi = sum((counts[ids] - e) ** 2 / e for ids, e in expected.items())
    assert (chi < 55) == honest  # 26 degrees of freedom: p = 0.0008


def test_auto_stops_guessing_where_it_does_not_pay(guesser, tokenizer, monkeypatch):
    spy_on_guesses(monkeypatch, lambda running: 25)
    with Engine(guesser, tokenizer, speculate="auto") as engine:
        answer(engine, request(Document.text(range(20, 40)), 80, temperature=1.0, seed=3))
        assert engine.stats()["drafted_tokens"] <= 17


def test_who_cannot_guess_says_so(model, compressed, tokenizer):  # noqa: F811
    for mute in (model, compressed):
        assert not can_speculate(mute)
        with pytest.raises(ValueError, match="speculate: this model has no MTP block"):
            Engine(mute, tokenizer, speculate="on")
    with pytest.raises(ValueError, match="speculate: is 'maybe'"):
        Engine(model, tokenizer, speculate="maybe")
    with Engine(model, tokenizer, speculate="auto") as engine:
        assert "drafted_tokens" not in engine.stats()
