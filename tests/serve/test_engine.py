import asyncio
import random
import threading
import time

import numpy as np
import pytest
import torch

from fourfold.model.cache import PagePool
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.serve.engine import Engine
from fourfold.serve.request import Delta, EngineBusy, EngineError, Finished, Request, RequestError, Sampling
from fourfold.text.chat import Media, Message
from tests.serve.tiny import TINY, Scripted


def ask(engine, text, *media):
    return engine.encode([Message("user", [*media, text])])


def request(prompt, max_tokens=12, temperature=0.0, **options):
    sampling = Sampling(temperature=temperature, seed=options.pop("seed", None), top_p=options.pop("top_p", 1.0))
    return Request(prompt, sampling, max_tokens, **options)


def collect(handle):
    """(text by kind, Finished)"""
    *deltas, finished = list(handle)
    assert isinstance(finished, Finished)
    return [(d.kind, d.text) for d in deltas], finished


def answer(engine, wanted):
    deltas, finished = collect(engine.submit(wanted))
    return "".join(text for _, text in deltas), finished


def prompts(engine):
    """Conversations with all modalities, of many lengths, some with a common beginning."""
    noise = np.random.default_rng(0)
    image = Media("image", noise.integers(0, 256, (11, 9, 3)).astype(np.uint8))
    other = Media("image", noise.integers(0, 256, (11, 9, 3)).astype(np.uint8))
    sound = Media("audio", noise.uniform(-1, 1, 9000).astype(np.float32))
    frames = noise.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    video = Media("video", (frames, np.arange(3) / 4, noise.uniform(-1, 1, 8000).astype(np.float32)))
    long = "the quick brown fox jumps over the lazy dog, again and again " * 5
    return [
        ask(engine, "a"),
        ask(engine, "what is it?", image),
        ask(engine, "what is it?", other),
        ask(engine, "what is that, and why?", image),
        ask(engine, "listen", sound),
        ask(engine, "look", video),
        ask(engine, "all of it", video, image, sound),
        ask(engine, long),
        ask(engine, long + "but not today"),
    ]


def settle(engine):
    """Waits until nothing runs; then every page is free or cached."""
    deadline = time.monotonic() + 20
    while True:
        stats = engine.stats()
        idle = not stats["running"] and not stats["waiting"]
        if idle and stats["free_pages"] + stats["cached_pages"] == stats["pages"]:
            return stats
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)


def test_greedy_decoding_equals_the_plain_loop(engine, model, tokenizer):
    for prompt in prompts(engine):
        ids: list[int] = []
        grammar = engine._grammar
        with torch.inference_mode():
            while len(ids) < 8 and not grammar.stops & set(ids):
                tail = Document.text(ids)
                whole = Document(
                    torch.cat([prompt.tokens, tail.tokens]),
                    torch.cat([prompt.modality, tail.modality]),
                    torch.cat([prompt.marks, tail.marks]),
                    torch.cat([prompt.targets, tail.targets]),
                    prompt.patches,
                )
                logits = model(pack([whole]), logits="last").logits[0]
                ids.append(int(logits.index_fill(0, grammar.banned("content", False), -torch.inf).argmax()))
        text, finished = answer(engine, request(prompt, 8))
        assert finished.usage.completion_tokens == len(ids)
        assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "seed": -3, "top_p": 0.9}]
)
def test_together_or_alone_the_answers_are_the_same(model, tokenizer, options):
    with Engine(model, tokenizer, page_size=16, prefill_tokens=24) as engine:
        wanted = [request(p, 5 + n, salt=str(n), **options) for n, p in enumerate(prompts(engine))]
        alone = [answer(engine, w) for w in wanted]
    with Engine(model, tokenizer, page_size=16, prefill_tokens=24) as engine:
        handles = [engine.submit(w) for w in wanted]
        together = [collect(h) for h in handles]
        settle(engine)
    for (text, finished), (deltas, finished_together) in zip(alone, together, strict=True):
        assert text == "".join(t for _, t in deltas)
        assert finished == finished_together


def test_a_step_is_one_forward_and_a_long_prompt_does_not_hold_up_the_others(model, tokenizer, monkeypatch):
    shapes = []
    plain = Model.forward

    def spy(self, packed, *args, **options):
        shapes.append(packed.cu_seqlens.diff().tolist())
        return plain(self, packed, *args, **options)

    monkeypatch.setattr(Model, "forward", spy)
    with Engine(model, tokenizer, page_size=16, prefill_tokens=32) as engine:
        first = engine.submit(request(ask(engine, "a"), 40))
        next(iter(first))
        second = engine.submit(request(ask(engine, "the lazy dog again and again " * 12), 4))
        third = engine.submit(request(ask(engine, "b"), 4))
        for handle in (second, third, first):
            list(handle)
    mixed = [s for s in shapes if s[0] == 1 and max(s) > 1]
    assert len(mixed) >= 3, shapes  # the first went on decoding beside the chunks of the second
    assert all(sum(n for n in s if n > 1) <= 32 for s in shapes)
    assert any(s.count(1) >= 2 for s in shapes)  # and sequences decode together


def test_a_short_prompt_does_not_wait_for_a_long_one(model, tokenizer, monkeypatch):
    plain = Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, *a, **k: (time.sleep(0.02), plain(self, *a, **k))[1])
    with Engine(model, tokenizer, page_size=16, prefill_tokens=32) as engine:
        long = engine.submit(request(ask(engine, "the lazy dog again and again " * 14), 1))
        list(engine.submit(request(ask(engine, "b"), 2)))
        assert engine.stats()["running"] == 1  # the long one still is in its prompt
        assert list(long)[-1].usage.completion_tokens == 1


def test_a_cache_hit_gives_the_same_answer_and_is_reported_exactly(engine):
    for prompt in prompts(engine)[1:]:
        size, cold_salt = engine.page_size, str(random.random())
        cold, cold_end = answer(engine, request(prompt, salt=cold_salt))
        warm, warm_end = answer(engine, request(prompt, salt=cold_salt))
        assert warm == cold
        assert cold_end.usage.cached_tokens == 0
        assert warm_end.usage.cached_tokens == (len(prompt) - 1) // size * size
        assert warm_end.usage.prompt_tokens == len(prompt)
    settle(engine)


def test_cached_and_cold_answers_are_equal_whatever_came_before(model, tokenizer):
    """Random conversations that share beginnings, in a cache so small that pages are given up all the time."""
    rng = random.Random(0)
    words = ["the quick brown fox ", "jumps over ", "the lazy dog ", "again and again "]
    noise = np.random.default_rng(0)
    images = [Media("image", noise.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(2)]
    with Engine(model, tokenizer, page_size=8, pages=40) as engine, Engine(model, tokenizer, page_size=8) as cold:
        hits = 0
        for turn in range(60):
            content = [rng.choice(words if rng.random() < 0.7 else images) for _ in range(rng.randint(1, 6))]
            prompt = engine.encode([Message("user", content)])
            options = {"temperature": 1.0, "seed": turn} if turn % 2 else {}
            got, end = answer(engine, request(prompt, 6, **options))
            wanted, _ = answer(cold, request(prompt, 6, salt=str(turn), **options))
            assert got == wanted, (turn, content)
            hits += end.usage.cached_tokens
        assert hits > 200
        settle(engine)


def test_generated_pages_are_reused_by_the_next_turn(engine):
    prompt = ask(engine, "the quick brown fox")
    handle = engine.submit(request(prompt, 60, temperature=1.0, seed=5, salt="chat"))
    list(handle)
    stats = settle(engine)
    ids = next(iter(engine._prefixes._pages), None)
    assert ids is not None and stats["cached_pages"] > len(prompt) // engine.page_size


def test_salts_do_not_share(engine):
    prompt = ask(engine, "the quick brown fox jumps over the lazy dog " * 3)
    assert answer(engine, request(prompt, salt="ann"))[1].usage.cached_tokens == 0
    assert answer(engine, request(prompt, salt="bob"))[1].usage.cached_tokens == 0
    assert answer(engine, request(prompt, salt="ann"))[1].usage.cached_tokens > 0


def test_concurrent_requests_share_the_pages_that_one_of_them_computed(model, tokenizer):
    with Engine(model, tokenizer, page_size=16, prefill_tokens=16) as engine:
        prompt = ask(engine, "the quick brown fox jumps over the lazy dog " * 6)
        ends = [collect(h)[1] for h in [engine.submit(request(prompt, 3)) for _ in range(4)]]
        assert sum(e.usage.cached_tokens for e in ends) > 2 * len(prompt)
        settle(engine)


def test_many_requests_in_a_cache_for_few(model, tokenizer):
    with Engine(model, tokenizer, page_size=8, pages=20, max_running=8) as engine:
        texts = ["the lazy dog " * (1 + n % 4) for n in range(24)]
        handles = [engine.submit(request(ask(engine, t), 8)) for t in texts]
        answers = [collect(h)[0] for h in handles]
        for n in range(24):
            assert answers[n] == answers[n % 4]
        settle(engine)


def test_limits_are_told_in_numbers(model, tokenizer):
    with Engine(model, tokenizer, page_size=16, pages=4) as engine:
        context = TINY["max_position_embeddings"]
        prompt = Document.text([20] * 60)
        with pytest.raises(
            RequestError, match=f"is {context}; the prompt has 60 .* {context}, so at most {context - 60}"
        ):
            engine.submit(request(prompt, context))
        with pytest.raises(RequestError, match="has 512 tokens; the context holds 512"):
            engine.submit(request(Document.text([20] * 512)))
        with pytest.raises(RequestError, match="takes 5 cache pages of 16 positions, and the cache has 4"):
            engine.submit(request(prompt, 6))
        assert answer(engine, request(prompt, 5))[1].reason in ("length", "stop")
    with pytest.raises(RequestError, match="prompt: is empty"):
        request(Document.text([]))
    with pytest.raises(RequestError, match="max_tokens: is 0"):
        request(prompt, 0)
    with pytest.raises(RequestError, match="stop: has 5"):
        request(prompt, stop=tuple("abcde"))


def test_without_max_tokens_the_context_is_the_limit(model, tokenizer):
    with Engine(model, tokenizer, page_size=16) as engine:
        prompt = Document.text([20] * 500)
        _, finished = answer(engine, request(prompt, None))
        assert finished.usage.completion_tokens <= 12
        assert finished.reason == ("length" if finished.usage.completion_tokens == 12 else "stop")


def test_a_full_queue_says_so(model, tokenizer, monkeypatch):
    gate = threading.Event()
    plain = Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, *a, **k: (gate.wait(20), plain(self, *a, **k))[1])
    with Engine(model, tokenizer, max_running=1, max_waiting=2) as engine:
        prompt = ask(engine, "a")
        handles = [engine.submit(request(prompt, 2))]
        while not engine.stats()["running"]:
            time.sleep(0.005)
        handles += [engine.submit(request(prompt, 2)) for _ in range(2)]
        with pytest.raises(EngineBusy, match="2 requests"):
            engine.submit(request(prompt, 2))
        gate.set()
        assert all(collect(h)[1].reason in ("length", "stop") for h in handles)


def test_cancelling_frees_everything(engine):
    prompt = ask(engine, "a")
    handle = engine.submit(request(prompt, 400, temperature=1.0, seed=2))
    next(iter(handle))
    handle.cancel()
    rest = list(handle)
    assert rest[-1].reason == "cancelled"
    assert rest[-1].usage.completion_tokens < 400
    settle(engine)


def test_a_waiting_request_can_be_cancelled(model, tokenizer):
    with Engine(model, tokenizer, max_running=1) as engine:
        first = engine.submit(request(ask(engine, "a"), 300, temperature=1.0, seed=2))
        second = engine.submit(request(ask(engine, "b"), 3))
        second.cancel()
        assert list(second)[-1].reason == "cancelled"
        first.cancel()
        settle(engine)


def test_a_request_that_breaks_the_forward_fails_alone(engine):
    good = [request(p, 6) for p in prompts(engine)]
    expected = [answer(engine, g) for g in good]
    bad = Document.text([5, 99_999, 6])  # a token that the vocabulary does not have
    handles = []
    for g in good:
        handles += [engine.submit(g), engine.submit(request(bad))]
    for index, (text, _) in enumerate(expected):
        assert "".join(t for _, t in collect(handles[2 * index])[0]) == text
        with pytest.raises(EngineError, match="failed on this request"):
            list(handles[2 * index + 1])
    assert engine.alive
    settle(engine)


def test_a_forward_that_fails_late_is_repeated_as_if_nothing_had_happened(engine, monkeypatch):
    """The cache has grown already when the head fails; here it fails for every batch of more than one."""
    wanted = [request(p, 6) for p in prompts(engine)]
    expected = [answer(engine, w) for w in wanted]
    plain = Model.head

    def head(self, hidden):
        if len(hidden) > 1:
            raise MemoryError("too large together")
        return plain(self, hidden)

    monkeypatch.setattr(Model, "head", head)
    handles = [engine.submit(w) for w in wanted]
    for handle, (text, _) in zip(handles, expected, strict=True):
        assert "".join(t for _, t in collect(handle)[0]) == text
    settle(engine)


def test_numbers_that_are_not_finite_stay_with_their_request(model, tokenizer):
    """Its pages are cleaned before others get them: a masked NaN would still poison a sum."""
    with Engine(model, tokenizer, page_size=16, pages=8) as engine:
        prompt = ask(engine, "what is it?", Media("image", np.full((8, 8, 3), 9, np.uint8)))
        good = request(ask(engine, "the quick brown fox"), 6)
        expected = answer(engine, good)[0]
        prompt.patches["image"].values[:] = float("nan")
        for _ in range(3):
            poisoned, healthy = engine.submit(request(prompt)), engine.submit(good)
            assert "".join(t for _, t in collect(healthy)[0]) == expected
            with pytest.raises(EngineError, match="not finite"):
                list(poisoned)
            settle(engine)
        assert torch.isfinite(engine._pool.data).all()


def test_closing_ends_what_is_under_way(model, tokenizer):
    engine = Engine(model, tokenizer)
    handle = engine.submit(request(ask(engine, "a"), 400, temperature=1.0, seed=2))
    next(iter(handle))
    engine.close()
    with pytest.raises(EngineError, match="stopped"):
        list(handle)
    with pytest.raises(EngineError, match="stopped"):
        engine.submit(request(ask(engine, "a")))
    assert not engine.alive


def test_a_fault_of_the_engine_itself_ends_every_request(model, tokenizer, monkeypatch):
    with Engine(model, tokenizer) as engine:
        monkeypatch.setattr(PagePool, "free", property(lambda self: 1 / 0))
        handle = engine.submit(request(ask(engine, "a")))
        with pytest.raises(EngineError, match="stopped"):
            list(handle)
        assert not engine.alive


def test_asyncio_and_threads_see_the_same_events(engine):
    wanted = request(ask(engine, "a"), 20, temperature=1.0, seed=3)
    expected = collect(engine.submit(wanted))

    async def consume():
        return [event async for event in engine.submit(wanted)]

    async def several():
        return await asyncio.gather(*(consume() for _ in range(5)))

    for events in asyncio.run(several()):
        assert events[-1] == expected[1]
        assert [(d.kind, d.text) for d in events[:-1]] == expected[0]


def test_waiting_for_events_gives_up_after_the_timeout(engine, monkeypatch):
    gate = threading.Event()
    plain = Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, *a, **k: (gate.wait(20), plain(self, *a, **k))[1])
    handle = engine.submit(request(ask(engine, "a"), 1))

    async def consume():
        nothing = await handle.next_events(0.02)
        gate.set()
        return nothing, [event async for event in handle]

    nothing, events = asyncio.run(consume())
    assert nothing == [] and isinstance(events[-1], Finished)


@pytest.fixture
def say(model, tokenizer):
    scripted = Scripted(model.cfg)
    scripted.load_state_dict(model.state_dict())
    with Engine(scripted, tokenizer, page_size=16) as engine:

        def run(*parts, thinking=False, max_tokens=200, **options):
            """Each part is text or the name of a special token."""
            special = ("<|eos|>", "</think>", "<tool_call>", "</tool_call>", "<think>", "<|user|>")
            ids = [[tokenizer.special(p)] if p in special else tokenizer.encode(p) for p in parts]
            scripted.script = sum(ids, [])
            prompt = engine.encode([Message("user", "go")], thinking=thinking)
            scripted.prompt = len(prompt)
            deltas, finished = collect(engine.submit(request(prompt, max_tokens, thinking=thinking, **options)))
            kinds = {kind: "".join(t for k, t in deltas if k == kind) for kind, _ in deltas}
            return kinds, finished

        yield run


def test_reasoning_answer_and_end(say):
    kinds, finished = say("let me see", "</think>", "yes", "<|eos|>", thinking=True)
    assert kinds == {"reasoning": "let me see", "content": "yes"}
    assert finished.reason == "stop"
    assert finished.usage.reasoning_tokens == finished.usage.completion_tokens - 4  # y, e, s and the end


def test_a_thinking_budget_closes_the_reasoning(say):
    kinds, finished = say("1234567890", "ok", "<|eos|>", thinking=True, thinking_budget=4)
    assert kinds["reasoning"] == "1234"
    assert kinds["content"].startswith("67890")  # the fifth token was replaced by the end of the reasoning
    assert finished.usage.reasoning_tokens == 5


def test_a_stop_string_ends_the_answer_but_not_the_reasoning(say):
    kinds, finished = say("a END b", "</think>", "one EN two END three", "<|eos|>", thinking=True, stop=("END", "xyz"))
    assert kinds == {"reasoning": "a END b", "content": "one EN two "}
    assert finished.reason == "stop"


def test_what_a_stop_string_held_back_is_said_at_the_end(say):
    assert say("one EN", "<|eos|>", stop=("END",))[0] == {"content": "one EN"}
    kinds, finished = say("one EN and more", max_tokens=6, stop=("END",))
    assert finished.reason == "length" and "one EN and more".startswith(kinds["content"])


def test_length(say):
    kinds, finished = say("1234567890", max_tokens=5)
    assert (kinds["content"], finished.reason, finished.usage.completion_tokens) == ("12345", "length", 5)


def test_a_tool_call(say):
    call = '{"name": "add", "arguments": {"a": 1}}'
    kinds, finished = say("well ", "<tool_call>", call, "</tool_call>", "<|eos|>", tools=True)
    assert kinds == {"content": "well ", "tool_call": call}
    assert finished.reason == "tool_calls"


def test_what_is_no_call_becomes_content(say):
    kinds, finished = say("<tool_call>", "{broken", "</tool_call>", "<|eos|>", tools=True)
    assert kinds == {"content": "{broken"} and finished.reason == "stop"


def test_special_tokens_out_of_place_are_never_said(say):
    for name in ("<tool_call>", "<|user|>", "<think>", "</think>"):
        kinds, _ = say(name, "1", "<|eos|>", max_tokens=2)
        assert Delta("content", name).text not in str(kinds)
