"""More requests than the cache has pages for: somebody waits, and nobody's answer changes."""

import threading

import pytest

from fourfold.model.sequence import Document
from fourfold.serve.engine import Engine
from fourfold.serve.request import Finished
from tests.serve.test_engine import answer, ask, collect, request, settle


def wanted(n, **options):
    return [
        request(Document.text(range(20 + 9 * i, 40 + 9 * i)), 60, salt=str(i), temperature=0.9, seed=i, **options)
        for i in range(n)
    ]


def test_an_interrupted_answer_is_the_same_token_for_token(model, tokenizer):
    with Engine(model, tokenizer, page_size=8) as engine:
        alone = [answer(engine, w) for w in wanted(6)]
        assert engine.stats()["preemptions"] == 0
    with Engine(model, tokenizer, page_size=8, pages=16) as engine:
        together = [collect(h) for h in [engine.submit(w) for w in wanted(6)]]
        assert engine.stats()["preemptions"] > 2
        settle(engine)
    for (text, finished), (deltas, end) in zip(alone, together, strict=True):
        assert text == "".join(t for _, t in deltas)
        assert finished == end  # and recomputing one's own pages is no cache hit


def test_a_request_is_taken_in_as_soon_as_its_prompt_fits(model, tokenizer):
    """Each may come to take the whole cache; they run together all the same."""
    with Engine(model, tokenizer, page_size=8, pages=16) as engine:
        handles = [engine.submit(request(Document.text([20 + i] * 8), 120, salt=str(i))) for i in range(3)]
        most = 0
        for handle in handles:
            for _ in handle:
                most = max(most, engine.stats()["running"])
        assert most == 3


def test_the_oldest_is_never_interrupted_and_the_newest_ends_too(model, tokenizer):
    """A stream of short requests behind a long one, in a cache that the long one fills."""
    with Engine(model, tokenizer, page_size=8, pages=16) as engine:
        done, lock = [], threading.Lock()

        def run(name, handle):
            events = list(handle)
            assert isinstance(events[-1], Finished)
            with lock:
                done.append(name)

        long = engine.submit(request(Document.text([50] * 20), 100, temperature=1.0, seed=1))
        threads = [threading.Thread(target=run, args=("long", long))]
        for n in range(12):
            handle = engine.submit(request(Document.text([60 + n] * 40), 30, temperature=1.0, seed=n))
            threads.append(threading.Thread(target=run, args=(n, handle)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert len(done) == 13
        settle(engine)


def test_an_interrupted_request_can_be_cancelled(model, tokenizer):
    with Engine(model, tokenizer, page_size=8, pages=16) as engine:
        handles = [engine.submit(w) for w in wanted(6)]
        while not engine.stats()["preemptions"]:
            assert engine.alive
        for handle in handles:
            handle.cancel()
        for handle in handles:
            assert list(handle)[-1].reason in ("cancelled", "length", "stop")
        settle(engine)


@pytest.mark.parametrize("pages", [8, 12])
def test_prompts_that_fill_the_cache_take_turns(model, tokenizer, pages):
    with Engine(model, tokenizer, page_size=8, pages=pages, prefill_tokens=16) as engine:
        texts = ["the quick brown fox " * 2, "the lazy dog " * 2, "again and again " * 2]
        handles = [engine.submit(request(ask(engine, t), 5, salt=t)) for t in texts * 3]
        answers = [collect(h)[0] for h in handles]
        assert answers[:3] == answers[3:6] == answers[6:]
        settle(engine)
