"""Recall tasks as a source of training."""

import pytest

from fourfold.config_media import MediaConfig
from fourfold.data.lessons import Lessons
from fourfold.data.recall import RecallError
from fourfold.data.stream import SourceSpec, StreamError, open_batches, open_stream
from tests.serve.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TASKS = {"niah_single_1": 1.0, "niah_multiquery": 2.0, "mqar": 1.0}


def test_a_document_is_a_function_of_its_number_and_fits():
    lessons, again = Lessons(TASKS, TOKENIZER, 1024, seed=3), Lessons(TASKS, TOKENIZER, 1024, seed=3)
    lengths = set()
    for number in range(40):
        made = lessons.document(number)
        assert made.tokens.tolist() == again.document(number).tokens.tolist()
        assert len(made) <= 1024 and made.tokens[0] == TOKENIZER.special("<|bos|>") and (made.targets >= 0).any()
        lengths.add(len(made))
    assert len(lengths) > 10 and min(lengths) < 512 < max(lengths)
    assert {lessons.skill(n) for n in range(40)} == set(TASKS)
    other = Lessons(TASKS, TOKENIZER, 1024, seed=4)
    assert any(lessons.document(n).tokens.tolist() != other.document(n).tokens.tolist() for n in range(3))


def test_a_source_of_them_fills_rows():
    spec = SourceSpec("recall", name="needles", skills=TASKS)
    stream = open_stream([spec], TOKENIZER, MediaConfig(), max_tokens=600)
    assert all(len(next(stream)) <= 600 for _ in range(5))
    packed = next(open_batches([spec], TOKENIZER, MediaConfig(), row=600, rows=2))
    assert len(packed) == 1200 and (packed.targets >= 0).any()


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"recall: 'hay' is no task.*mqar"):
        Lessons({"hay": 1.0}, TOKENIZER, 512)
    with pytest.raises(ValueError, match=r"recall\.mqar: weight"):
        Lessons({"mqar": -1.0}, TOKENIZER, 512)
    with pytest.raises(ValueError, match="positive weight"):
        Lessons({"mqar": 0.0}, TOKENIZER, 512)
    with pytest.raises(RecallError, match="length"):
        Lessons({"niah_multivalue": 1.0}, TOKENIZER, 40)
    with pytest.raises(StreamError, match=r"sources\.skills"):
        SourceSpec("recall")
