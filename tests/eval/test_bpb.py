"""Bits per byte against a sum written out."""

import math

import pytest
import torch

from fourfold.eval.bpb import bits_per_byte
from fourfold.model.sequence import Document, pack
from fourfold.serve.local import LocalModel
from tests.serve.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def subject():
    return LocalModel(tiny_model(), tiny_tokenizer())


def summed(subject, ids):
    with torch.no_grad():
        logits = subject.model(pack([Document.text(ids)])).logits.log_softmax(-1)
    return -sum(float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1)) / math.log(2)


def test_bits_are_summed_over_all_tokens_and_divided_by_bytes(subject):
    texts = ["hello there", "a späte Stunde"]
    bos = subject.tokenizer.special("<|bos|>")
    bits = sum(summed(subject, [bos, *subject.tokenizer.encode(text)]) for text in texts)
    assert bits_per_byte(subject, texts) == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-5)


def test_with_a_cut_context_every_token_is_still_counted_once(subject):
    text = "one two three four five six seven eight nine ten"
    ids = [subject.tokenizer.special("<|bos|>"), *subject.tokenizer.encode(text)]
    pieces = [ids[start : start + 5] for start in range(0, len(ids) - 1, 4)]
    bits = sum(summed(subject, piece) for piece in pieces if len(piece) > 1)
    assert bits_per_byte(subject, [text], context=4) == pytest.approx(bits / len(text.encode()), rel=1e-5)
