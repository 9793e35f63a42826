import pytest
import torch

from fourfold.model.sequence import Document
from fourfold.serve.engine import Engine
from fourfold.serve.memory import MemoryTooSmall, check_weights, make_budget, size, weight_bytes, workspace_bytes
from fourfold.serve.request import RequestError
from tests.serve.test_engine import answer, request
from tests.serve.test_tails import compressed  # noqa: F401


def budget(model, memory, **options):
    return make_budget(model, memory=memory, page_size=16, **{"pages": None, "positions": 32, "sequences": 8} | options)


def test_the_parts_are_counted_and_stay_below_the_limit(model):
    assert weight_bytes(model) == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    sizes = [budget(model, memory * 2**20) for memory in (8, 16, 64)]
    for memory, b in zip((8, 16, 64), sizes, strict=True):
        assert b.total <= memory * 2**20 < b.total + 2 * b.page + 2**16
    assert sizes[0].pages < sizes[1].pages < sizes[2].pages
    assert sizes[2].workspace == workspace_bytes(model.cfg, 32, 8, 512)


def test_smaller_numbers_leave_room_for_more_pages(model):
    wide, half, byte = (budget(model, 2**26, cache_dtype=t) for t in (torch.float32, torch.bfloat16, torch.int8))
    assert wide.page == 2 * half.page and byte.page < 0.75 * half.page  # short rows, so that scales weigh
    assert wide.pages < half.pages < byte.pages and byte.total <= 2**26


def test_tails_are_counted(compressed):  # noqa: F811
    b = budget(compressed, 16 * 2**20)
    assert b.max_tails >= 1 and 0 < b.tails <= 2 * 2**20
    assert b.total <= 16 * 2**20


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(model, tokenizer):
    with pytest.raises(MemoryTooSmall, match=r"memory: is 100 KiB; .* are needed at least: .* of weights") as refused:
        Engine(model, tokenizer, memory=100 * 2**10)
    least = float(str(refused.value).split("; ")[1].split(" MiB")[0]) * 2**20
    with Engine(model, tokenizer, memory=int(1.01 * least)) as engine:
        assert answer(engine, request(Document.text([20] * 30), 4))[1].usage.completion_tokens
        with pytest.raises(MemoryTooSmall):
            Engine(model, tokenizer, memory=int(0.99 * least))


def test_weights_are_refused_before_they_are_loaded(model):
    with pytest.raises(MemoryTooSmall, match=r"the weights as fp32 take .*; as bf16 they would fit"):
        check_weights(model.cfg, int(0.6 * weight_bytes(model)), "fp32")
    check_weights(model.cfg, weight_bytes(model) * 2, "fp32")


def test_a_request_that_cannot_fit_is_refused_with_the_numbers(model, tokenizer):
    with Engine(model, tokenizer, page_size=16, pages=4) as engine:
        page = engine.budget.page
        needed, there = size(5 * page), size(4 * page)
        with pytest.raises(RequestError, match=f"max_tokens: .*{needed} needed, {there} available.*at most 5 are poss"):
            engine.submit(request(Document.text([20] * 60), 6))
        with pytest.raises(RequestError, match="prompt: has 65 tokens; this takes 5 cache pages"):
            engine.submit(request(Document.text([20] * 65), None))
        finished = answer(engine, request(Document.text([20] * 60), None))[1]  # as long as there is room
        assert finished.reason == "stop" or finished.usage.completion_tokens == 5


def test_sizes_for_people():
    assert [size(n) for n in (5, 1536, 2**30)] == ["5 B", "1.5 KiB", "1 GiB"]
