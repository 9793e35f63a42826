"""Pages: reserving, sharing, releasing, reading and writing."""

from __future__ import annotations

import copy

import pytest
import torch

from fourfold.model.cache import Cache, CacheFull, PagePool, SequenceState, attention_width, indexer_layers, layout
from fourfold.model.sequence import TEXT, pack
from tests.model import tiny

SPARSE = {"indexer.mode": "sparse", "indexer.head_dim": 8, "indexer.topk": 4, "indexer.layers_per_indexer": 2}


def test_widths():
    mla = tiny.config(**SPARSE)
    assert attention_width(mla) == 12 + 4 and indexer_layers(mla) == [0, 2]
    assert layout(mla).per_position == 3 * 16 + 2 * 8 and layout(mla).tail_width == 0
    gqa = tiny.config(**{"attention.kind": "gqa"})
    assert attention_width(gqa) == 2 * 2 * 6 and indexer_layers(gqa) == []


def test_entries_take_a_fraction_of_a_page_and_tails_are_bounded():
    cfg = tiny.config(**tiny.COMPRESSED)
    kept, a, index = layout(cfg), cfg.attention, cfg.indexer.head_dim
    assert kept.per_position == (a.head_dim + index) / 4 + a.head_dim / 8 and kept.multiple == 8
    window = 3 * (a.sliding_window - 1) * a.head_dim
    assert kept.tail_width == window + 7 * 4 * (a.head_dim + index) + 7 * 2 * a.head_dim
    with pytest.raises(ValueError, match="page_size .12. a multiple of 8"):
        PagePool(cfg, 2, 12)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_has_pages_of_something(sizes):
    with pytest.raises(ValueError, match="n_pages.*page_size"):
        PagePool(tiny.config(), *sizes)


def test_pages_are_given_on_demand_and_come_back():
    pool, state = PagePool(tiny.config(), 5, 4), SequenceState()
    assert pool.free == 5
    pool.reserve(state, 4)
    assert len(state.pages) == 1 and pool.free == 4
    pool.reserve(state, 4)  # nothing was written yet: the same room
    assert len(state.pages) == 1
    state.length = 4
    pool.reserve(state, 1)
    assert len(state.pages) == len(set(state.pages)) == 2
    pool.release(state.pages)
    assert pool.free == 5
    with pytest.raises(ValueError, match="released more often than held"):
        pool.release(state.pages[:1])
    with pytest.raises(ValueError, match="is free and cannot be retained"):
        pool.retain(state.pages[:1])


def test_a_page_is_free_when_its_last_holder_lets_go():
    pool, state = PagePool(tiny.config(), 2, 4), SequenceState()
    pool.reserve(state, 3)
    pool.retain(state.pages)
    assert pool.references(state.pages[0]) == 2
    pool.release(state.pages)
    assert pool.free == 1
    pool.release(state.pages)
    assert pool.free == 2


def test_reserving_too_much_gives_nothing():
    pool, state = PagePool(tiny.config(), 2, 4), SequenceState()
    pool.reserve(state, 4)
    before = copy.deepcopy(state)
    with pytest.raises(CacheFull, match="2 cache pages of 4 positions wanted, 1 free"):
        pool.reserve(state, 9)
    assert state == before and pool.free == 1


@torch.no_grad()
def test_a_full_cache_leaves_every_sequence_as_it_was():
    """Two sequences grow together and there is room for one: neither may keep pages of the failed step."""
    made = tiny.model(tiny.config(**SPARSE))
    pool, states = PagePool(made.cfg, 3, 4), [SequenceState(), SequenceState()]
    documents = [tiny.text(12, seed=1), tiny.text(12, seed=2)]
    made(pack([d.slice(0, 4) for d in documents]), cache=Cache(pool, states))
    before, free = copy.deepcopy(states), pool.free
    with pytest.raises(CacheFull):
        made(pack([d.slice(4, 8) for d in documents], starts=[4, 4]), cache=Cache(pool, states))
    assert states == before and pool.free == free
    alone = made(pack([documents[0].slice(4, 8)], starts=[4]), cache=Cache(pool, states[:1])).logits
    torch.testing.assert_close(alone, tiny.logits(made, documents[0].slice(0, 8))[4:], rtol=0, atol=1e-5)


def test_batch_and_cache_must_agree():
    made = tiny.model(tiny.config())
    with pytest.raises(ValueError, match="1 sequences in the batch, 2 in the cache"):
        made(pack([tiny.text(3)]), cache=Cache(PagePool(made.cfg, 2), [SequenceState(), SequenceState()]))


@torch.no_grad()
def test_history_holds_text_and_marks_the_rest():
    cfg = tiny.config(media=tiny.MEDIA)
    document, state = tiny.document(cfg, 30, seed=0), SequenceState()
    made, pool = tiny.model(cfg), PagePool(cfg, 8, 4)
    for start, stop in ((0, 11), (11, 12), (12, 30)):
        made(pack([document.slice(start, stop)], starts=[start]), cache=Cache(pool, [state]))
        assert state.length == stop
    assert state.history == [
        t if m == TEXT else -1 for t, m in zip(document.tokens.tolist(), document.modality.tolist(), strict=True)
    ]
    assert Cache(pool, [state]).history(0, 3) == state.history[-3:]
    assert Cache(pool, [state]).history(0, 0) == []


@torch.no_grad()
def test_a_sequence_may_have_nothing_new():
    made, pool = tiny.model(tiny.config(**SPARSE)), PagePool(tiny.config(**SPARSE), 4, 4)
    states = [SequenceState(), SequenceState()]
    packed = pack([tiny.text(0), tiny.text(5)])
    got = made(packed, cache=Cache(pool, states)).logits
    torch.testing.assert_close(got, tiny.logits(made, tiny.text(5)), rtol=0, atol=1e-5)
    assert [s.length for s in states] == [0, 5] and states[0].pages == []


@torch.no_grad()
def test_pages_may_be_of_half_precision():
    cfg = tiny.config(**SPARSE)
    made, pool, state = tiny.model(cfg), PagePool(cfg, 8, 4, dtype=torch.bfloat16), SequenceState()
    document, out = tiny.text(20), []
    for start, stop in ((0, 12), *((t, t + 1) for t in range(12, 20))):
        piece = pack([document.slice(start, stop)], starts=[start])
        out.append(made(piece, cache=Cache(pool, [state])).logits)
    got, wanted = torch.cat(out), tiny.logits(made, document)
    assert got.dtype == torch.float32 and not torch.equal(got, wanted)
    assert (got - wanted).abs().mean() < 0.05 * wanted.std()
