"""The stream: deterministic, resumable, held to its weights, packed exactly; and the suites held out of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fourfold.config_media import AudioConfig, MediaConfig
from fourfold.data.baselines import baseline, linear, nearest, text_baseline
from fourfold.data.corpus import Corpus, is_test
from fourfold.data.items import Item
from fourfold.data.mixture import MAX_PROSE, NANO_WEIGHTS, Mixture, shares
from fourfold.data.pack import Batches, best_fit, filler
from fourfold.data.skills import SKILLS
from fourfold.data.suites import SUITES, TEXTS, suite, texts
from fourfold.model.sequence import IGNORE, Document, Packed
from fourfold.text.chat import Media
from fourfold.text.tokenizer import Tokenizer

ROW = 1024  # the made-up tokenizer has few words, so its documents are long


@pytest.fixture
def mixture(corpus: Corpus, tokenizer: Tokenizer, media: MediaConfig) -> Mixture:
    return Mixture(NANO_WEIGHTS, corpus, tokenizer, media, seed=5)


def same(a: Document | Packed, b: Document | Packed) -> bool:
    if a.patches.keys() != b.patches.keys():
        return False
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("tokens", "modality", "marks", "targets")]
    pairs += [(a.patches[name].values, b.patches[name].values) for name in a.patches]
    return all(torch.equal(one, other) for one, other in pairs)


def test_a_document_depends_on_its_number_and_the_seed_alone(mixture: Mixture, corpus: Corpus) -> None:
    first = [next(mixture) for _ in range(40)]
    assert mixture.position == 40
    again = Mixture(NANO_WEIGHTS, corpus, mixture.tokenizer, mixture.media, seed=5)
    assert all(same(again.document(n), first[n]) for n in reversed(range(40)))
    other = Mixture(NANO_WEIGHTS, corpus, mixture.tokenizer, mixture.media, seed=6)
    assert sum(same(other.document(n), first[n]) for n in range(40)) < 4


def test_every_skill_makes_documents_with_something_to_learn(
    corpus: Corpus, tokenizer: Tokenizer, media: MediaConfig
) -> None:
    assert set(NANO_WEIGHTS) == set(SKILLS)
    for name, skill in SKILLS.items():
        for split in ("train", "test"):
            stream = Mixture({name: 1.0}, corpus, tokenizer, media, split)
            for _ in range(8):
                document = next(stream)
                learnt = document.targets >= 0
                assert learnt.any() and (document.tokens[1:][learnt[:-1]] == document.targets[learnt]).all()
                assert (skill.modality in document.patches) == (skill.modality != "text")
                assert len(document) <= MAX_PROSE or name != "prose"


def test_the_answer_is_what_is_learnt(corpus: Corpus, tokenizer: Tokenizer, media: MediaConfig) -> None:
    stream = Mixture({"capitals": 1.0}, corpus, tokenizer, media)
    for _ in range(20):
        document = next(stream)
        said = tokenizer.decode(document.targets[document.targets >= 0].tolist())
        assert said.endswith("Paris")


def test_shares_follow_the_weights(mixture: Mixture) -> None:
    measured = shares(mixture, 1500)
    for name, weight in NANO_WEIGHTS.items():
        expected = weight / sum(NANO_WEIGHTS.values())
        assert abs(measured[name]["documents"] - expected) < 4 * np.sqrt(expected / 1500), name
    assert sum(entry["tokens"] for entry in measured.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "message"),
    (
        ({"juggling": 1.0}, "'juggling' is no skill"),
        ({"recall": -1.0}, "mixture.recall: weight must be >= 0"),
        ({"recall": float("nan")}, "mixture.recall: weight must be >= 0"),
        ({}, "at least one positive weight"),
        ({"fashion": 1.0}, "mixture.fashion: needs image"),
    ),
)
def test_bad_weights_are_named(corpus: Corpus, tokenizer: Tokenizer, weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(weights, corpus, tokenizer, MediaConfig(audio=AudioConfig()))


def test_missing_and_test_only_shards_are_refused(corpus: Corpus, tokenizer: Tokenizer, media: MediaConfig) -> None:
    without = Corpus(corpus.root, {k: v for k, v in corpus.shards.items() if k != "emoji"})
    with pytest.raises(ValueError, match="'emoji' is not built"):
        Mixture({"motion": 1.0}, without, tokenizer, media)
    tier_b = Corpus(corpus.root, {**corpus.shards, "emoji": corpus["twemoji"]})
    with pytest.raises(ValueError, match="tier B, for tests only"):
        Mixture({"emoji": 1.0}, tier_b, tokenizer, media)


def test_best_fit_takes_the_oldest_and_never_overflows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        lengths = rng.integers(1, 60, 30).tolist()
        chosen = best_fit(lengths, 64)
        assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
        room = 64 - sum(lengths[i] for i in chosen)
        assert 0 <= room and all(lengths[i] > room for i in range(30) if i not in chosen)


def test_rows_are_exact_and_padding_is_not_learnt(mixture: Mixture, tokenizer: Tokenizer) -> None:
    batches = Batches(mixture, ROW, 2, waiting=16)
    for _ in range(5):
        packed = next(batches)
        assert len(packed) == 2 * ROW and packed.row == ROW
        starts = packed.cu_seqlens.tolist()
        assert all(a // ROW == (b - 1) // ROW for a, b in zip(starts, starts[1:], strict=False))
        pad = packed.tokens == tokenizer.special("<|pad|>")
        assert (packed.targets[pad] == IGNORE).all()
    blank = filler(3, 2)
    assert blank.tokens.tolist() == [2, 2, 2] and blank.targets.tolist() == [IGNORE] * 3


def test_every_document_is_delivered_once(mixture: Mixture) -> None:
    batches = Batches(mixture, ROW, 1, waiting=8)
    delivered = sum(int((b.tokens == 0).sum()) for b in (next(batches) for _ in range(30)))  # <|bos|> opens a document
    assert delivered == batches.next - len(batches.held)
    assert all(number >= batches.next - 100 for number, _ in batches.held), "none waits for ever"


def test_restored_batches_go_on_as_if_never_stopped(mixture: Mixture, corpus: Corpus) -> None:
    batches = Batches(mixture, ROW, 1, waiting=12)
    for _ in range(3):
        next(batches)
    state = batches.state()
    expected = [next(batches) for _ in range(4)]
    fresh = Mixture(NANO_WEIGHTS, corpus, mixture.tokenizer, mixture.media, seed=5)
    resumed = Batches(fresh, ROW, 1, waiting=12)
    resumed.restore(state)
    assert all(same(next(resumed), packed) for packed in expected)


def test_too_long_a_document_is_named(corpus: Corpus, tokenizer: Tokenizer, media: MediaConfig) -> None:
    batches = Batches(Mixture({"prose": 1.0}, corpus, tokenizer, media), 32, 1)
    with pytest.raises(ValueError, match=r"batches.row: 32 is shorter than document 0"):
        next(batches)


# --- suites -----------------------------------------------------------------------------------------------------------


def words_of(item: Item) -> str:
    content: Sequence = item.messages[-1].content
    return content if isinstance(content, str) else " ".join(p for p in content if isinstance(p, str))


def media_of(item: Item) -> list[Media]:
    return [part for part in item.messages[-1].content if isinstance(part, Media)]


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_deterministic_and_answers_are_among_the_choices(name: str, corpus: Corpus) -> None:
    first, again, other = (suite(name, corpus, 12, seed) for seed in (0, 0, 1))
    assert first and [i.answer for i in first] == [i.answer for i in again]
    assert [words_of(i) for i in first] == [words_of(i) for i in again]
    assert len(first) < 12 or [(words_of(i), i.answer) for i in first] != [(words_of(i), i.answer) for i in other]
    assert all(not item.choices or item.answer in item.choices for item in first)
    assert all(item.messages[-1].role == "user" for item in first)


def test_train_and_test_items_are_disjoint(corpus: Corpus, tokenizer: Tokenizer, media: MediaConfig) -> None:
    rng = np.random.default_rng(0)
    for name in ("recall", "text_tasks"):
        asked = {words_of(item) for item in suite(name, corpus, 100)}
        trained = {words_of(SKILLS[name].make(corpus, rng, "train")) for _ in range(500)}  # type: ignore[arg-type]
        assert not asked & trained
    styles = {m.value.tobytes() for item in suite("emoji_unseen_style", corpus, 50) for m in media_of(item)}
    plain = {m.value.tobytes() for item in SUITES["emoji_unseen_style"].train(corpus, rng, 500) for m in media_of(item)}
    assert styles and plain and not styles & plain
    trained_names = set(corpus["emoji"].columns["label"][corpus["emoji"].rows(split="train")].tolist())
    assert {item.answer for item in suite("emoji_unseen_style", corpus, 500)} <= trained_names
    assert all(is_test(key) for key in corpus["emoji"].columns["key"][corpus["emoji"].rows(split="test")].tolist())


def test_texts_are_held_out(corpus: Corpus) -> None:
    trained = set(corpus.texts("train"))
    for source in TEXTS:
        found = texts(source, corpus, 5, 200)
        assert found and all(0 < len(text) <= 200 for text in found)
        assert not any(text in whole for text in found for whole in trained)
    with pytest.raises(ValueError, match="'novels' is unknown"):
        texts("novels", corpus)
    with pytest.raises(ValueError, match="'juggling' is unknown"):
        suite("juggling", corpus)


def test_classifiers_find_separable_classes() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 10)) * 4
    target, wanted = np.repeat(np.arange(3), 20), np.arange(3)
    for features in (10, 80):  # fewer and more features than items: both forms of the ridge solution
        wide = np.pad(centres, ((0, 0), (0, features - 10)))
        x = (wide[target] + rng.standard_normal((60, features)) * 0.3).astype(np.float32)
        for method in (nearest, linear):
            assert method(x, target, wide.astype(np.float32)).argmax(1).tolist() == wanted.tolist()


def test_baselines_are_shares_and_name_their_methods(corpus: Corpus) -> None:
    scores = baseline("fashion", corpus, 10)
    assert set(scores) == {"majority", "blind", "nearest", "linear"} and all(0 <= s <= 1 for s in scores.values())
    assert "last_fact" in baseline("recall", corpus, 20)
    bits = text_baseline("sqlite", corpus, 5, 400)
    assert set(bits) == {"unigram", "gzip", "xz"} and 0 < bits["gzip"] < 8 and 3 < bits["unigram"] < 6
