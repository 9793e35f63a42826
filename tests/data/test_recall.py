"""Documents with hidden answers: their length, what they hold, and that training never sees the keys of a test."""

import numpy as np
import pytest

from fourfold.data.corpus import split_of
from fourfold.data.recall import RULER, TASKS, RecallError, document, lesson, names
from fourfold.model.sequence import IGNORE
from tests.serve.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("task", TASKS)
def test_a_document_fits_its_length_and_depends_on_its_seed_alone(task):
    made, again, other = (document(task, TOKENIZER, 2048, seed) for seed in (1, 1, 2))
    assert np.array_equal(made.context, again.context) and made.queries == again.queries
    assert not np.array_equal(made.context, other.context)
    sizes = [len(q.tokens) + len(q.answer) for q in made.queries]
    asked = sum(sizes) if task in ("drill", "rehearsal", "copy") else max(sizes)  # these ask all in a row
    assert 2048 * 0.94 < 1 + len(made.context) + asked <= 2048


@pytest.mark.parametrize("task", RULER)
def test_the_answers_stand_in_the_text(task):
    made = document(task, TOKENIZER, 2048, 3)
    text = TOKENIZER.decode(made.context.tolist())
    assert all(value in text for query in made.queries for value in query.values)


@pytest.mark.parametrize("task", [*RULER, "mqar"])
def test_what_is_tested_is_never_trained(task):
    splits = {
        split: {v for seed in range(3) for q in document(task, TOKENIZER, 1500, seed, split).queries for v in q.values}
        for split in ("train", "test")
    }
    if task != "mqar":  # there the pair is held apart, not its value
        assert not splits["train"] & splits["test"]
        assert all(split_of(f"{role(task)} {v}") == s for s, values in splits.items() for v in values)
    else:
        pairs = {
            split: {
                (*q.tokens, *q.answer) for seed in range(9) for q in document(task, TOKENIZER, 256, seed, split).queries
            }
            for split in ("train", "test")
        }
        assert pairs["train"] and pairs["test"] and not pairs["train"] & pairs["test"]


def role(task):
    return "key" if task in ("vt", "cwe", "fwe") else "value"


def test_keys_of_the_splits_are_disjoint():
    rng = np.random.default_rng(0)
    for kind in ("word", "number", "hex"):
        assert not set(names(rng, kind, "train", "key", 300)) & set(names(rng, kind, "test", "key", 100))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_asked_needle_lies_at_its_depth(depth):
    for task in ("niah_single_2", "niah_multikey_2", "niah_multiquery"):
        made = document(task, TOKENIZER, 4096, 0, depth=depth)
        assert made.depths[0] == pytest.approx(depth, abs=0.1)
        value = made.queries[0].values[0]
        assert value in TOKENIZER.decode(made.context[made.places[0] : made.places[0] + 60].tolist())


def test_a_lesson_learns_the_answers_alone():
    made = document("niah_multiquery", TOKENIZER, 1024, 0, "train")
    whole = lesson(made, [1])
    learnt = whole.targets[whole.targets != IGNORE].tolist()
    assert learnt == [token for query in made.queries for token in query.answer]


@pytest.mark.parametrize("task", ["drill", "rehearsal"])
def test_a_drill_asks_every_needle_and_holds_nothing_else(task):
    made = document(task, TOKENIZER, 900, 0, "train")
    text = TOKENIZER.decode(made.context.tolist())
    assert len(made.queries) == text.count("The code of") > 5
    for query, place in zip(made.queries, made.places, strict=True):
        said = TOKENIZER.decode(made.context[place:].tolist())
        known = TOKENIZER.decode(query.tokens).split("? ")[-1].strip()
        assert said.startswith(f" {known}{query.values[0]}.")
    whole = lesson(made)
    assert len(whole) <= 900
    learnt = whole.targets[whole.targets != IGNORE].tolist()
    with_questions = task == "rehearsal"
    assert learnt == [t for q in made.queries for t in [*(q.tokens if with_questions else []), *q.answer]]


def test_a_copy_says_every_needle_twice_more_and_learns_all_but_its_first_token():
    made = document("copy", TOKENIZER, 900, 0, "train")
    needles = TOKENIZER.decode(made.context.tolist()).removesuffix(".").split(".")
    assert len(needles) == len(set(needles)) > 5
    again = [TOKENIZER.decode([*q.tokens, *q.answer]).removesuffix(".") for q in made.queries]
    half = len(needles)
    assert sorted(again[:half]) == sorted(again[half:]) == sorted(needles)
    assert again[:half] != needles and again[half:] != again[:half]
    whole = lesson(made)
    learnt = whole.targets[whole.targets != IGNORE].tolist()
    assert learnt == [t for q in made.queries for t in q.answer] and all(len(q.tokens) == 1 for q in made.queries)
    assert all(split_of(f"key {needle.split('=')[0].strip()}") == "train" for needle in needles)


@pytest.mark.parametrize(
    ("task", "expected"), [("drill", {(2, True)}), ("rehearsal", {(2, True), (7, False), (7, True)})]
)
def test_drills_have_short_values_and_rehearsals_numbers_too(task, expected):
    values = [[q.values[0] for q in document(task, TOKENIZER, 400, seed, "train").queries] for seed in range(12)]
    kinds = {(len(v[0]), max(len(set(value)) for value in v) <= 3) for v in values}
    assert kinds == expected


def test_bad_input_is_refused():
    for refused, words in (
        (("poem", TOKENIZER, 100, 0), "task"),
        (("vt", TOKENIZER, 20, 0), "length"),
        (("cwe", TOKENIZER, 20, 0), "length"),
        (("copy", TOKENIZER, 20, 0), "length"),
        (("vt", TOKENIZER, 2000, 0, "all"), "split"),
        (("vt", TOKENIZER, 2000, 0, "test", 2.0), "depth"),
    ):
        with pytest.raises(RecallError, match=words):
            document(*refused)
