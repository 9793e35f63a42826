import dataclasses

import pytest
import torch

from fourfold.config import ModelConfig
from fourfold.model.cache import PagePool, SequenceState
from fourfold.model.sequence import AUDIO, IMAGE, START, Document, Patches
from fourfold.serve.prefix import PrefixStore, extend_with_text, page_key, root_key

CONFIG = ModelConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, intermediate_size=8)


def picture(value: float = 0.5, row: float = 0.0) -> Document:
    document = Document.text([5, 13, 13, 6])
    kinds = torch.tensor([0, IMAGE, IMAGE, 0])
    patches = Patches(torch.tensor([2]), torch.full((1, 3), value), torch.tensor([[0.0, row, 0.0]]))
    return dataclasses.replace(
        document, modality=kinds, marks=torch.tensor([0, START, 0, 0]), patches={"image": patches}
    )


def test_a_key_depends_on_all_that_the_model_sees_and_on_all_before():
    page, root = picture(), root_key("")
    moved = dataclasses.replace(page.patches["image"], index=torch.tensor([1]))
    others = [
        page_key(root_key("another user"), page),
        page_key(page_key(root, page), page),
        page_key(root, picture(value=0.25)),
        page_key(root, picture(row=1.0)),
        page_key(root, dataclasses.replace(page, tokens=torch.tensor([5, 13, 13, 7]))),
        page_key(root, dataclasses.replace(page, modality=torch.tensor([0, IMAGE, AUDIO, 0]))),
        page_key(root, dataclasses.replace(page, marks=torch.tensor([0, 0, START, 0]))),
        page_key(root, dataclasses.replace(page, patches={})),
        page_key(root, dataclasses.replace(page, patches={"image": moved})),
        page_key(root, dataclasses.replace(page, patches={"audio": page.patches["image"]})),
    ]
    assert page_key(root, page) == page_key(root, picture())
    assert len({page_key(root, page), *others}) == 1 + len(others)


def test_targets_do_not_matter():
    page = picture()
    assert page_key(b"", page) == page_key(b"", dataclasses.replace(page, targets=torch.zeros(4, dtype=torch.int64)))


def test_extend_with_text_is_plain_concatenation():
    both = extend_with_text(picture(), [1, 2])
    assert both.tokens.tolist() == [5, 13, 13, 6, 1, 2]
    assert both.modality.tolist() == [0, IMAGE, IMAGE, 0, 0, 0]
    assert both.patches["image"].index.tolist() == [2]
    assert page_key(b"", extend_with_text(Document.text([]), [1, 2])) == page_key(b"", Document.text([1, 2]))


@pytest.fixture
def pool():
    return PagePool(CONFIG, 4, page_size=2)


def fill(pool, store, name):
    """One page, computed by a request, known to the store, its request gone."""
    state = SequenceState()
    pool.reserve(state, 2)
    store.put(name, state.pages[0])
    pool.release(state.pages)
    return state.pages[0]


def test_a_page_outlives_its_request_and_is_given_up_when_room_is_needed(pool):
    store = PrefixStore(pool)
    pages = {name: fill(pool, store, name) for name in (b"a", b"b", b"c")}
    assert (pool.free, len(store), store.evictable) == (1, 3, 3)
    assert store.get(b"a") == pages[b"a"]  # used just now
    store.make_room(2)
    assert (store.get(b"a"), store.get(b"b"), store.get(b"c")) == (pages[b"a"], None, pages[b"c"])
    assert pool.free == 2


def test_a_page_in_use_stays(pool):
    store = PrefixStore(pool)
    page = fill(pool, store, b"a")
    pool.retain([page])
    assert store.evictable == 0
    store.make_room(4)
    assert store.get(b"a") == page and pool.free == 3
    pool.release([page])
    store.make_room(4)
    assert store.get(b"a") is None and pool.free == 4


def test_the_end_of_a_chain_goes_first(pool):
    store = PrefixStore(pool)
    chain = [b"1", b"2", b"3"]
    for name in chain:
        fill(pool, store, name)
    store.touch(chain)
    store.make_room(2)
    assert [store.get(name) is not None for name in chain] == [True, True, False]


def test_put_keeps_the_first_page_of_a_key(pool):
    store = PrefixStore(pool)
    first = fill(pool, store, b"a")
    second = fill(pool, store, b"a")
    assert first != second and store.get(b"a") == first and pool.references(second) == 0
